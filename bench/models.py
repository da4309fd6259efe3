"""python -m bench models: whole models before and after `gpu_lstm.convert`, their outputs and gradients compared."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import rows, timing
from .zoo import MODELS, Model

SECONDS, ROUNDS = 6.0, (10, 60)  # of timing, for a model and pass
TOLERANCE = 1e-3  # the largest difference of outputs and gradients, relative to their norm


def calls(kind: Model, training: bool) -> dict[str, Callable[[], object]]:
    """Return a training step (forward, backward, SGD) or a forward pass, before and after the conversion.

    Raises:
        RuntimeError: output or gradients of the two differ.
    """
    torch.manual_seed(0)
    before = kind.make().train(training)
    x = kind.inputs(kind.of_training if training else kind.of_inference)
    after = copy.deepcopy(before)
    kind.converted(after)
    ways = {"before": before, "after": after}
    with torch.set_grad_enabled(training):
        dy = torch.randn_like(before(x))
        found = {way: rows.with_gradients(model(x), model, dy) for way, model in ways.items()}
    rows.check_same(found["after"], found["before"], TOLERANCE)

    def step(model: nn.Module) -> Callable[[], object]:
        if not training:
            return torch.no_grad()(lambda: model(x))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)  # lr 0 leaves the weights unchanged

        def train() -> None:
            optimiser.zero_grad()
            model(x).backward(dy)
            optimiser.step()

        return train

    return {way: step(model) for way, model in ways.items()}


def run(file: Path | None, threads: int) -> int:
    """Measure; print each row when it is done, and add it to a file."""
    torch.set_num_threads(threads)
    for name, model in MODELS.items():
        for what, training in (("training", True), ("inference", False)):
            taken = timing.interleaved(calls(model, training), "cpu", SECONDS, ROUNDS)
            row: dict[str, Any] = {"model": name, "recurrent layers": model.layers, "pass": what}
            row |= {f"{way} ms": 1e3 * float(np.median(each)) for way, each in taken.items()}
            rows.put(row | rows.speed("", taken["before"] / taken["after"]), file)
    return 0
