"""python -m bench acting: time a step of many environments (T = 1, no gradients) by torch.nn, a module, a Stream."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gpu_lstm

from . import rows, timing
from .providers.engine import as_hx

CELLS, ENVIRONMENTS, HIDDEN = ("LSTM", "GRU"), (2, 8, 64, 512, 4096), 128
SECONDS, ROUNDS = 1.5, (10, 100)  # time for the timing of a row; the fewest and the most rounds
TOLERANCE = 1e-5  # the largest difference of y, relative to its norm
WAYS = "torch.nn", "module", "Stream"


def ways(cell: str, N: int, resets: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the ways to make a step. At first all start from the same states. Each returns y [N, H].

    A Stream resets its own states before the step, and the next call continues from them.
    """
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(HIDDEN, HIDDEN).eval()
    ours = gpu_lstm.convert(theirs)
    x, start = torch.randn(1, N, HIDDEN), torch.rand(N) < 1 / 50  # [1, N, I], [N]
    states = [*torch.randn(2 if cell == "LSTM" else 1, 1, N, HIDDEN).tanh()]  # h, and for an LSTM c, each [1, N, H]
    stream = gpu_lstm.Stream(ours, N, as_hx(states))

    def by_torch() -> torch.Tensor:
        keep = (~start).to(x.dtype)[None, :, None]  # [1, N, 1]
        return theirs(x, as_hx([keep * state for state in states] if resets else states))[0][0]

    def by_module() -> torch.Tensor:
        return ours(x, as_hx(states), resets=start[None] if resets else None)[0][0]

    def by_stream() -> torch.Tensor:
        if resets:
            stream.reset(start)
        return stream(x[0])

    return {name: torch.no_grad()(way) for name, way in zip(WAYS, (by_torch, by_module, by_stream))}


def run(file: Path | None, threads: int) -> int:
    """Measure; print each row when it is done, and add it to a file.

    Raises:
        RuntimeError: two ways differ in their results.
    """
    torch.set_num_threads(threads)
    gpu_lstm.GRU(HIDDEN, HIDDEN)(torch.randn(20, 2, HIDDEN))  # compiles the loops, which a call of one step never does
    for cell, N, resets in itertools.product(CELLS, ENVIRONMENTS, (False, True)):
        calls = ways(cell, N, resets)
        found = {way: call() for way, call in calls.items()}
        rows.check_same(found, dict.fromkeys(WAYS, found["torch.nn"]), TOLERANCE)
        taken = timing.interleaved(calls, "cpu", SECONDS, ROUNDS)
        row: dict[str, Any] = {"cell": cell, "N": N, "H": HIDDEN, "resets": resets}
        row |= {f"{way} us": 1e6 * float(np.median(each)) for way, each in taken.items()}
        for way in WAYS[1:]:
            row |= rows.speed(f"{way}, ", taken["torch.nn"] / taken[way])
        rows.put(row, file)
    return 0
