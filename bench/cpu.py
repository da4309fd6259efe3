"""python -m bench cpu: measure a sample of calls on a CPU, and how much time the choices of `auto` waste."""

import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import gpu_lstm

from . import rows, timing

STEPS, BATCHES, UNITS = (1, 2, 4, 8, 16, 128, 1024), (1, 4, 16, 64, 512), (16, 32, 64, 128, 256, 512, 1024)
MOST = 7e7  # T B H^2; larger calls take long, and their products take nearly all of the time
SECONDS, ROUNDS = 0.12, (4, 40)
ROWS = 300  # of the sample
CALLS = "plain", "resets", "lengths", "4 heads", "lengths, 4 heads", "zoneout"
KINDS = [*itertools.product(("GRU", "LSTM"), CALLS), ("SLSTM", "plain")]


def call(module: nn.Module, x: Tensor, given: dict[str, Tensor], training: bool) -> Callable[[], object]:
    """Return a function that runs a forward pass without autograd, or forward and backward."""
    if not training:
        return torch.no_grad()(partial(module, x, **given))
    x, learnt = x.clone().requires_grad_(), [*module.parameters()]
    gradient = torch.randn_like(x)

    def step() -> object:
        y, _ = module(x, **given)
        return torch.autograd.grad(y, [x, *learnt], gradient)

    return step


def measure(cell: str, what: str, shape: tuple[int, int, int], training: bool) -> dict[str, Any]:
    """Measure a call with the present number of threads. Return its row, with the choice of `auto` in the end."""
    (T, B, H), before = shape, "reference" if cell == "SLSTM" or what == "zoneout" else "torch"
    torch.manual_seed(0)
    x, given, calls = torch.randn(T, B, H), dict[str, Tensor](), {}
    if what == "resets":
        given["resets"] = torch.rand(T, B) < 1 / 50
    if "lengths" in what:
        given["lengths"] = torch.randint(1, T + 1, (B,))
    options: Any = {"heads": 4} if "heads" in what else {"zoneout": 0.1} if what == "zoneout" else {}
    for backend in (before, "numba", "auto"):
        module = getattr(gpu_lstm, cell)(H, H, backend=backend, **options).train(training)
        calls[backend] = call(module, x, given, training)
    calls.pop("auto")()
    with torch.set_grad_enabled(training):
        chosen = gpu_lstm.explain(module, x, **given).backend
    taken = timing.interleaved(calls, "cpu", SECONDS, ROUNDS)
    ms = {f"{name} ms": 1e3 * float(np.median(taken[way])) for name, way in (("before", before), ("numba", "numba"))}
    ratio = float(np.median(taken["numba"] / taken[before]))
    kind = {"threads": torch.get_num_threads(), "cell": cell, "what": what, "T": T, "B": B, "H": H}
    return kind | {"training": training, "before": before} | ms | {"ratio": ratio, "chosen": chosen}


def run(file: Path | None, threads: int) -> int:
    """Measure the sample. Print its rows, and append them to a file if one is given."""
    torch.set_num_threads(threads)
    cases = [
        (*kind, (T, B, H), training)
        for kind, T, B, H, training in itertools.product(KINDS, STEPS, BATCHES, UNITS, (False, True))
        if T * B * H * H <= MOST and (T <= 128 or not {"SLSTM", "zoneout"} & {*kind})  # else loops take seconds
    ]
    for case in track(random.Random(0).sample(cases, ROWS), "CPU", console=Console(stderr=True), transient=True):
        rows.put(measure(*case), file)
    return 0
