"""python -m bench ppo: an update of recurrent PPO, in one call over all steps and in a loop over them.

The training step of examples/recurrent_ppo.py is timed, from forward to optimiser. Its LSTM is called once with
`resets`; the loop is StepLoop. Both have the same weights and batch, and are timed only after their loss and gradients
were found equal.
"""

import argparse
import functools
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from . import inside, report, results, timing
from .isolated import ROOT
from .measure import relative_errors
from .providers.loops import StepLoop

SIZES = [(128, N, H) for H in (128, 256) for N in (8, 64)]  # T, N environments, H
EPISODE = 50  # steps of one, in the mean
SECONDS = 4.0  # of timing, a size
TOLERANCE = 1e-4  # by which loss and gradients may differ, relative to their norm


def measure(device: str, sizes: Sequence[tuple[int, int, int]] = SIZES) -> list[tuple[Any, ...]]:
    """Check and time the training step at every size, in float32: T, N, H, and the seconds of every round of both.

    Raises ImportError where what the example needs is not installed, RuntimeError where loss or gradients differ.
    """
    example, rows = load_example(), []
    torch.set_num_threads(1)  # as in `measure`
    with timing.float32_products("fp32"):
        for T, N, H in track(sizes, "recurrent PPO", console=Console(stderr=True), transient=True):
            agents = {name: example.Agent(H).to(device) for name in ("one_call", "loop")}
            agents["loop"].lstm = StepLoop(H, H, device=device)
            agents["loop"].load_state_dict(agents["one_call"].state_dict())
            batch = random_batch(example, T, N, H, device)
            found, true = (loss_and_gradients(example, agent, batch) for agent in agents.values())
            for name, error in relative_errors(found, {name: value.double() for name, value in true.items()}).items():
                if not error <= TOLERANCE:
                    raise RuntimeError(f"{name}: one call and the loop differ by {error:.2g}, expected {TOLERANCE:g}")
            calls = {}
            for name, agent in agents.items():
                optimiser = torch.optim.Adam(agent.parameters(), lr=0.0)  # which leaves the weights as they are
                step = functools.partial(example.training_step, agent, optimiser, batch)
                calls[name] = lambda number, step=step: step()
            rows.append((T, N, H, timing.interleaved(calls, device, SECONDS)))
    return rows


@functools.cache
def load_example() -> Any:
    spec: Any = importlib.util.spec_from_file_location("recurrent_ppo", ROOT / "examples" / "recurrent_ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_batch(example: Any, T: int, N: int, H: int, device: str) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        starts, actions = torch.rand(T, N) < 1 / EPISODE, torch.randint(2, (T, N))
        log_probs = torch.full((T, N), math.log(0.5))  # nearly an untrained policy's
        state = torch.randn(1, N, H).tanh().to(device), torch.randn(1, N, H).to(device)
        rest = torch.randn(T, N, 2), starts, actions, log_probs, torch.randn(T, N), torch.randn(T, N)
        return example.Rollout(*(each.to(device) for each in rest), state)


def loss_and_gradients(example: Any, agent: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    loss, parameters = example.loss(agent, batch), dict(agent.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss} | {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients)}


def run(options: argparse.Namespace) -> int:
    """Measure, and print a line a size. Exit status: 0, or 2 if the example cannot be loaded."""
    try:
        rows = measure(options.device)
    except ImportError as error:
        print(f'python -m bench ppo: {error}; pip install ".[examples]"', file=sys.stderr)
        return 2
    cells = []
    for *sizes, seconds in rows:
        speed, low, high = timing.percentiles(np.divide(seconds["loop"], seconds["one_call"]))
        ms = [f"{1e3 * np.median(seconds[name]):.2f}" for name in ("loop", "one_call")]
        cells.append([*map(str, sizes), *ms, f"{speed:.2f}", f"{low:.2f}-{high:.2f}"])
    columns = ["T", "N", "H", "loop ms", "one call ms", "times as fast", "p20-p80"]
    select = inside.inside("dispatch.available").select
    backend = select(None, torch.device(options.device), torch.float32, None, False).value
    where = f"one call by {backend}; {results.provenance(options.device)['device']}, torch {torch.__version__}"
    Console().print(report.table(pd.DataFrame(cells, columns=columns), "An update of recurrent PPO, float32", where))
    return 0
