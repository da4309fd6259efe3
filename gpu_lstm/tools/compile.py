"""The loops for CPUs, compiled and verified ahead of the first call, and where they are kept."""

import warnings
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from .. import modules
from ..call.choices import Backend
from ..dispatch import available
from ..kernels.layer import launcher_of

RAGGED = {"lengths": torch.tensor([4, 3, 2]), "resets": torch.ones(4, 3, dtype=torch.bool)}  # [B], [T, B]


def compile_loops(cells: Iterable[str], sizes: Iterable[int]) -> str:
    """Compile the loops for this CPU, verify them for layers of these cells and hidden sizes, and say where they are.

    Raises what a call of backend `numba` raises, and as a UserWarning what such a call warns of: a loop that is not
    right, or a result that is not kept.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm: ")
        for cell, hidden in product(cells, sizes):
            module = getattr(modules, cell.upper())(1, hidden, bidirectional=True, backend=Backend.NUMBA)
            for names in ((), ("lengths",), ("resets",), ("lengths", "resets")):
                _call(module, **{name: RAGGED[name] for name in names})
    return loops_for_this_cpu()


def _call(module: Any, **ragged: torch.Tensor) -> None:
    """Run a layer for inference, and for training on losses of its output, of h_n, and of both."""
    x = torch.zeros(4, 3, 1)  # [T, B, I]
    with torch.no_grad():
        module(x, **ragged)
    output, state = module(x, **ragged)  # [T, B, 2 H], [2, B, H]
    h_n = state if isinstance(state, torch.Tensor) else state[0]
    for loss in (output.sum(), h_n.sum(), output.sum() + h_n.sum()):
        torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def loops_for_this_cpu() -> str:
    """The folder where the compiled loops for this CPU are kept, or why there are none."""
    if (problem := available.import_problem(Backend.NUMBA)) is not None:
        return f"none: backend 'numba' {problem}"
    launch: Any = launcher_of(Backend.NUMBA.value)
    found = launch.build.kept_in(*launch.LOOPS)
    return str(found or f"none yet{launch.build.of_others()}")
