"""python -m bench acting: a step of many environments, T = 1 without gradients, by torch.nn, a module and a Stream."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gpu_lstm

from . import rows, timing
from .providers.engine import as_hx

CELLS, ENVIRONMENTS, HIDDEN = ("LSTM", "GRU"), (2, 8, 64, 512, 4096), 128
SECONDS, ROUNDS = 1.5, (10, 100)  # of timing, for a row
TOLERANCE = 1e-5
WAYS = "torch.nn", "module", "Stream"


def ways(cell: str, N: int, resets: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """A step from the same states, each returning y [N, H]. A Stream goes on from its own, so it is reset first."""
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(HIDDEN, HIDDEN).eval()
    ours = gpu_lstm.convert(theirs)
    x, start = torch.randn(1, N, HIDDEN), torch.rand(N) < 1 / 50  # [1, N, I], [N]
    states = [torch.randn(1, N, HIDDEN).tanh() for _ in (0, *[1] * (cell == "LSTM"))]  # h, and of an LSTM c, [1, N, H]
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
    """Measure, print a row as it is done, and add the rows to a file. RuntimeError where two ways differ."""
    torch.set_num_threads(threads)
    for cell, N, resets in itertools.product(CELLS, ENVIRONMENTS, (False, True)):
        calls = ways(cell, N, resets)
        first, *others = (call() for call in calls.values())
        if any((other - first).abs().max() > TOLERANCE for other in others):
            raise RuntimeError(f"{cell}, N={N}: a step of torch.nn, the module and the Stream differ")
        taken = timing.interleaved(calls, "cpu", SECONDS, ROUNDS)
        row = {"cell": cell, "N": N, "H": HIDDEN, "resets": resets}
        row |= {f"{way} us": 1e6 * float(np.median(each)) for way, each in taken.items()}
        speeds = {f"{way}, times as fast": float(np.median(taken["torch.nn"] / taken[way])) for way in WAYS[1:]}
        rows.put(row | speeds, file)
    return 0
