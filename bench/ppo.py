"""python -m bench ppo: the training step of examples/recurrent_ppo.py, in one call over all steps and in a loop."""

import importlib.util
import math
import sys
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import nn

import gpu_lstm

from . import report, results, timing
from .isolated import ROOT
from .measure import relative_errors
from .providers.engine import as_hx
from .providers.torchs import LOOPS

SIZES = [(128, N, H) for H in (128, 256) for N in (2, 8, 64)]  # T, N environments, H
SECONDS = 4.0  # of timing, a size and cell
CELLS = "LSTM", "GRU"
TOLERANCE = 1e-4  # by which loss and gradients may differ, relative to their norm


@cache
def load_example() -> Any:
    spec: Any = importlib.util.spec_from_file_location("recurrent_ppo", ROOT / "examples" / "recurrent_ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_batch(example: Any, T: int, N: int, H: int, device: str) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        starts, actions = torch.rand(T, N) < 1 / 50, torch.randint(2, (T, N))
        log_probs = torch.full((T, N), math.log(0.5))  # nearly an untrained policy's
        state = torch.randn(1, N, H).tanh().to(device), torch.randn(1, N, H).to(device)
        rest = torch.randn(T, N, 2), starts, actions, log_probs, torch.randn(T, N), torch.randn(T, N)
        return example.Rollout(*(each.to(device) for each in rest), state)


def loss_and_gradients(example: Any, agent: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    loss, parameters = example.loss(agent, batch), dict(agent.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss} | {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients)}


@timing.float32_products("fp32")
def measure(device: str, T: int, N: int, H: int) -> dict[tuple[str, str], np.ndarray]:
    """Seconds of every round in float32, by cell and way. RuntimeError unless loss and gradients are equal."""
    torch.set_num_threads(1)  # as in `measure.measure`
    example = load_example()
    batch, calls = random_batch(example, T, N, H, device), {}
    for cell in CELLS:
        found = {}
        for way, package in (("one call", gpu_lstm), ("loop", LOOPS)):
            torch.manual_seed(0)
            agent = example.Agent(H).to(device)
            agent.lstm = getattr(package, cell)(H, H, device=device)
            state = batch.state[: 2 if cell == "LSTM" else 1]
            given = batch._replace(state=state if way == "loop" else as_hx(state))
            found[way] = loss_and_gradients(example, agent, given)
            optimiser = torch.optim.Adam(agent.parameters(), lr=0.0)  # which leaves the weights as they are
            calls[cell, way] = partial(example.training_step, agent, optimiser, given)
        truth = {name: value.double() for name, value in found["loop"].items()}
        for name, error in relative_errors(found["one call"], truth).items():
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name}: one call and the loop differ by {error:.2g}, expected {TOLERANCE:g}")
    return timing.interleaved(calls, device, SECONDS * len(CELLS))


def run(device: str) -> int:
    """Measure, and print a line per size. Exit status: 0, or 2 if the example cannot be loaded."""
    try:
        load_example()
    except ImportError as error:
        print(f'python -m bench ppo: {error}; pip install ".[examples]"', file=sys.stderr)
        return 2
    cells, whole = [], len(SIZES) * len(CELLS) * SECONDS * 1.5  # with what is built and checked
    for number, (T, N, H) in enumerate(SIZES):
        about = f"; all take about {whole:.0f} seconds" * (number == 0)
        print(f"size {number + 1} of {len(SIZES)}: T={T}, {N} environments, H={H}{about}", file=sys.stderr, flush=True)
        seconds = measure(device, T, N, H)
        x, resets = torch.zeros(T, N, H, device=device), torch.ones(T, N, dtype=torch.bool, device=device)
        for cell in CELLS:
            loop, one_call = (seconds[cell, way] for way in ("loop", "one call"))
            speed, low, high = timing.percentiles(np.divide(loop, one_call))
            ms = [f"{1e3 * np.median(each):.2f}" for each in (loop, one_call)]
            backend = gpu_lstm.explain(getattr(gpu_lstm, cell)(H, H, device=device), x, resets=resets).backend
            cells.append([cell, *map(str, (T, N, H)), *ms, f"{speed:.2f}", f"{low:.2f}-{high:.2f}", backend])
    where = f"{results.provenance(device)['device']}, torch {torch.__version__}"
    columns = ["cell", "T", "N", "H", "loop ms", "one call ms", "times as fast", "p20-p80", "one call by"]
    table = pd.DataFrame(cells, columns=columns)
    report.console().print(report.table(table, "An update of recurrent PPO, float32", where))
    return 0
