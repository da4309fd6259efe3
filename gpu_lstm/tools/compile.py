"""Compile and verify the loops for CPUs ahead of the first call, and find the folder that keeps them."""

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
CALLS = [(X[:1], None, None), *product([X], (None, LENGTHS, LENGTHS.int()), (None, RESETS))]


def compile_loops(cells: Iterable[str], sizes: Iterable[int]) -> str:
    """Compile the loops for this CPU, verify them for layers of these cells and hidden sizes, and return their folder.

    The errors are the same as in a call with backend "numba". The warnings of such a call are raised as errors of class
    UserWarning. They say that a loop failed its verification, or that a result cannot be kept on disk.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm: ")
        for cell, hidden, (x, lengths, resets) in product(cells, sizes, CALLS):
            module = getattr(modules, cell.upper())(1, hidden, bidirectional=True, backend="numba")
            with torch.no_grad():
                module(x, lengths=lengths, resets=resets)
            output, states = module(x, lengths=lengths, resets=resets)
            of_output, of_states = output.sum(), sum(t.sum() for t in states)
            for loss in (of_output, of_states, of_output + of_states):
                loss.backward(retain_graph=True)
    return loops_for_this_cpu()


def loops_for_this_cpu() -> str:
    """Return the folder of the compiled loops for this CPU, or the reason why there are none."""
    if (problem := available.import_problem(Backend.NUMBA)) is not None:
        return f"none: backend 'numba' {problem}"
    launch: Any = launcher_of(Backend.NUMBA.value)
    try:
        found = launch.build.kept_in(*launch.LOOPS, launch.MATMUL)
        return str(found or f"none yet{launch.build.of_others()}")
    except OSError as error:
        return f"none: {error}"
