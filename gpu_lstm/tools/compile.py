"""The loops for CPUs, compiled and verified ahead of the first call, and where they are kept."""

import warnings
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from .. import modules
from ..call.choices import Backend
from ..dispatch import available
from ..kernels.contract import launcher_of

X, LENGTHS, RESETS = torch.zeros(4, 3, 1), torch.tensor([4, 3, 2]), torch.ones(4, 3, dtype=torch.bool)  # T = 4, B = 3


def compile_loops(cells: Iterable[str], sizes: Iterable[int]) -> str:
    """Compile the loops for this CPU, verify them for layers of these cells and hidden sizes, and say where they are.

    Raises what a call of backend `numba` raises, and as a UserWarning what such a call warns of: a loop that is not
    right, or a result that is not kept.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm: ")
        for cell, hidden, lengths, resets in product(cells, sizes, (None, LENGTHS), (None, RESETS)):
            module = getattr(modules, cell.upper())(1, hidden, bidirectional=True, backend="numba")
            with torch.no_grad():
                module(X, lengths=lengths, resets=resets)
            output, states = module(X, lengths=lengths, resets=resets)
            of_output, of_states = output.sum(), sum(t.sum() for t in states)
            for loss in (of_output, of_states, of_output + of_states):
                loss.backward(retain_graph=True)
    return loops_for_this_cpu()


def loops_for_this_cpu() -> str:
    """The folder where the compiled loops for this CPU are kept, or why there are none."""
    if (problem := available.import_problem(Backend.NUMBA)) is not None:
        return f"none: backend 'numba' {problem}"
    launch: Any = launcher_of(Backend.NUMBA.value)
    found = launch.build.kept_in(*launch.LOOPS)
    return str(found or f"none yet{launch.build.of_others()}")
