"""python -m bench ppo: time an iteration of examples/recurrent_ppo.py, by gpu_lstm and by a loop over torch.nn.

An iteration is a rollout, with a call for each step, and EPOCHS updates. gpu_lstm makes an update in one call over all
steps, and acts by the same module. The loop calls torch.nn at every step. The environments themselves are not timed.
"""

import importlib.util
import math
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gpu_lstm

from . import rows, timing
from .isolated import ROOT
from .providers.engine import as_hx
from .providers.torchs import LOOPS

SIZES = [(128, N, H) for H in (128, 256) for N in (2, 8, 64)]  # (T, the number N of environments, H)
SECONDS = 6.0  # time for the timing of a size and cell
CELLS, WAYS = ("LSTM", "GRU"), ("loop", "one call")
TOLERANCE = 1e-4  # the largest difference of loss and gradients, relative to their norm


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


@torch.no_grad()
def rollout(agent: nn.Module, batch: Any) -> None:
    """Act for T steps, as `rollouts` of the example does, on given observations."""
    state = batch.state
    for observation, start in zip(batch.observations.split(1), batch.starts.split(1)):
        policy, _, state = agent(observation, state, start)
        policy.log_prob(policy.sample())


@timing.float32_products("fp32")
def measure(device: str, T: int, N: int, H: int) -> dict[tuple[str, str, str], np.ndarray]:
    """Return the seconds of every round in float32, by cell, by way, and by "update" or "rollout".

    Raises:
        RuntimeError: loss or gradients of the two ways differ.
    """
    torch.set_num_threads(1)  # as in `measure.measure`
    example = load_example()
    batch, calls = random_batch(example, T, N, H, device), {}
    for cell in CELLS:
        found = {}
        for way, package in zip(WAYS, (LOOPS, gpu_lstm)):
            torch.manual_seed(0)
            agent = example.Agent(H).to(device)
            agent.lstm = getattr(package, cell)(H, H, device=device)
            state = batch.state[: 2 if cell == "LSTM" else 1]
            given = batch._replace(state=state if way == "loop" else as_hx(state))
            found[way] = rows.with_gradients(example.loss(agent, given), agent)
            optimiser = torch.optim.Adam(agent.parameters(), lr=0.0)  # lr 0 leaves the weights unchanged
            calls[cell, way, "update"] = partial(example.training_step, agent, optimiser, given)
            calls[cell, way, "rollout"] = partial(rollout, agent, given)
        rows.check_same(found["one call"], found["loop"], TOLERANCE)
    return timing.interleaved(calls, device, SECONDS * len(CELLS))


def run(device: str, file: Path | None = None) -> int:
    """Measure, and print each row when it is done. Return the exit status: 0, or 2 if the example cannot be loaded."""
    try:
        example = load_example()
    except ImportError as error:
        print(f'python -m bench ppo: {error}; pip install ".[examples]"', file=sys.stderr)
        return 2
    for T, N, H in SIZES:
        seconds = measure(device, T, N, H)
        x, resets = torch.zeros(T, N, H, device=device), torch.ones(T, N, dtype=torch.bool, device=device)
        for cell in CELLS:
            update, acting = ({way: seconds[cell, way, part] for way in WAYS} for part in ("update", "rollout"))
            iteration = {way: acting[way] + example.EPOCHS * update[way] for way in WAYS}
            row = {"cell": cell, "T": T, "N": N, "H": H}
            row |= {f"update, {way} ms": 1e3 * float(np.median(update[way])) for way in WAYS}
            row |= rows.speed("", update["loop"] / update["one call"])
            row["by"] = gpu_lstm.explain(getattr(gpu_lstm, cell)(H, H, device=device), x, resets=resets).backend
            row |= {f"rollout, {way} ms": 1e3 * float(np.median(acting[way])) for way in WAYS}
            for part, its in ("rollout", acting), ("iteration", iteration):
                row |= rows.speed(f"{part}, ", its["loop"] / its["one call"])
            rows.put(row, file, device)
    return 0
