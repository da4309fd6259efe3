"""python -m bench acting: a step of many environments, T = 1 without gradients, by torch.nn, a module and a Stream."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import nn

import gpu_lstm

from . import report, results, timing
from .providers.engine import as_hx

CELLS, ENVIRONMENTS, HIDDEN = ("LSTM", "GRU"), (2, 8, 64, 512, 4096), 128
SECONDS, ROUNDS = 1.5, (10, 100)  # of timing, for a row
TOLERANCE = 1e-5
WHERE = ["date", "commit", "device", "torch", "gpu_lstm"]
COLUMNS = ["cell", "N", "resets", "torch.nn us", "module us", "Stream us", "module, times as fast", "Stream"]


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

    return {name: torch.no_grad()(way) for name, way in zip(COLUMNS[3:], (by_torch, by_module, by_stream))}


def run(file: Path | None, threads: int) -> int:
    """Measure, print a row as it is done, and add the rows to a file. RuntimeError where two ways differ."""
    torch.set_num_threads(threads)
    where = results.provenance("cpu")
    report.console().print(f"{where['device']}, torch {where['torch']}, float32, {HIDDEN} units", "; ".join(COLUMNS), sep="\n")
    for cell, N, resets in itertools.product(CELLS, ENVIRONMENTS, (False, True)):
        calls = ways(cell, N, resets)
        first, *others = (call() for call in calls.values())
        if any((other - first).abs().max() > TOLERANCE for other in others):
            raise RuntimeError(f"{cell}, N={N}: a step of torch.nn, the module and the Stream differ")
        taken = timing.interleaved(calls, "cpu", SECONDS, ROUNDS)
        theirs, *ours = taken.values()
        us = [1e6 * float(np.median(each)) for each in taken.values()]
        row = [cell, N, resets, *us, *(float(np.median(theirs / each)) for each in ours)]
        report.console().print("; ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in row))
        if file:
            table = pd.DataFrame([row + [where[column] for column in WHERE]], columns=COLUMNS + WHERE)
            table.to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.4g")
    return 0
