"""python -m bench ppo: an update of recurrent PPO, in one call over all steps and in a loop over them.

What is timed is the training step of examples/recurrent_ppo.py, forward to optimiser. Its LSTM is called once with
`resets`; the loop is StepLoop. Both have the same weights and batch, and are timed only after their loss and gradients
were found equal.
"""

import argparse
import functools
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from . import expected, report, results, timing
from .isolated import ROOT
from .measure import relative_errors
from .providers.loops import StepLoop

SIZES = [(128, N, H) for H in (128, 256) for N in (8, 64)]  # T, N, H
EPISODE = 50  # steps of one, in the mean
SECONDS = 4.0  # of timing, a size
TOLERANCE = 1e-4  # by which loss and gradients may differ, relative to their norm


class Measured(NamedTuple):
    """Seconds a training step, for every round."""

    steps: int  # T
    environments: int  # N
    hidden: int  # H
    one_call: Any  # a sequence
    loop: Any

    @property
    def speed(self) -> tuple[float, ...]:
        """The loop's time over that of one call, both of one round: median, 20th and 80th percentile."""
        return tuple(timing.percentiles(np.divide(self.loop, self.one_call)))


def measure(device: str, sizes: Sequence[tuple[int, int, int]] = SIZES, seconds: float = SECONDS) -> list[Measured]:
    """Check and time the training step at every size (T, N, H), in float32.

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
            found, true = (values_of(example, agent, batch) for agent in agents.values())
            for name, error in relative_errors(found, {name: value.double() for name, value in true.items()}).items():
                if not error <= TOLERANCE:
                    raise RuntimeError(f"{name}: one call and the loop differ by {error:.2g}, expected {TOLERANCE:g}")
            calls = {}
            for name, agent in agents.items():
                optimiser = torch.optim.Adam(agent.parameters(), lr=0.0)  # which leaves the weights as they are
                step = functools.partial(example.training_step, agent, optimiser, batch)
                calls[name] = lambda number, step=step: step()
            rows.append(Measured(T, N, H, **timing.interleaved(calls, device, seconds)))
    return rows


@functools.cache
def load_example() -> Any:
    """examples/recurrent_ppo.py as a module."""
    spec: Any = importlib.util.spec_from_file_location("recurrent_ppo", ROOT / "examples" / "recurrent_ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_batch(example: Any, T: int, N: int, H: int, device: str) -> Any:
    """A rollout of random numbers, the same wherever it is made."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    starts = (torch.rand(T, N, generator=generator) < 1 / EPISODE).to(device)
    actions = torch.randint(2, (T, N), generator=generator).to(device)
    log_probs = torch.full((T, N), math.log(0.5), device=device)  # an untrained policy's, nearly
    state = normal(1, N, H).tanh(), normal(1, N, H)
    return example.Rollout(normal(T, N, 2), starts, actions, log_probs, normal(T, N), normal(T, N), state)


def values_of(example: Any, agent: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The loss and all gradients."""
    loss, parameters = example.loss(agent, batch), dict(agent.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss} | {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the subcommand."""
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=known, default=known[0], help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Measure, and print a line a size. Exit status: 0, or 2 if the example cannot be loaded."""
    try:
        rows = measure(options.device)
    except ImportError as error:
        print(f'python -m bench ppo: {error}; pip install ".[examples]"', file=sys.stderr)
        return 2
    cells = pd.DataFrame({
        "T": str(row.steps), "N": str(row.environments), "H": str(row.hidden),
        "loop ms": f"{1e3 * np.median(row.loop):.2f}", "one call ms": f"{1e3 * np.median(row.one_call):.2f}",
        "times as fast": f"{row.speed[0]:.2f}", "p20-p80": "{:.2f}-{:.2f}".format(*row.speed[1:]),
    } for row in rows)  # fmt: skip
    select = expected.inside("dispatch.available").select
    backend = select(None, torch.device(options.device), torch.float32, None, False).value
    where = f"one call by {backend}; {results.provenance(options.device)['device']}, torch {torch.__version__}"
    Console().print(report.table(cells, "An update of recurrent PPO, float32", where))
    return 0
