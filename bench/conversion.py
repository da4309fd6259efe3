"""python -m bench models: whole models before and after `gpu_lstm.convert`, their outputs and gradients compared."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import rows, timing
from .measure import relative_errors
from .models import MODELS, Model

SECONDS, ROUNDS = 6.0, (10, 60)  # of timing, for a model and pass
TOLERANCE = 1e-3  # by which outputs and gradients may differ, relative to their norm


def gradient_of(y: Tensor) -> Tensor:
    """The gradient of an output that training begins with: random, and the same in every call."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and in training the gradients of all parameters."""
    y = model(x)
    if not model.training:
        return {"output": y}
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(y, [*named.values()], gradient_of(y))
    return {"output": y} | {f"gradient of {name}": gradient for name, gradient in zip(named, gradients)}


def calls(kind: Model, training: bool) -> dict[str, Callable[[], object]]:
    """A training step (forward, backward, SGD) or a forward pass, before and after. RuntimeError where they differ."""
    torch.manual_seed(0)
    before = kind.make().train(training)
    x = (kind.training if training else kind.inference)()
    after = copy.deepcopy(before)
    kind.converted(after)
    ways = {"before": before, "after": after}
    with torch.set_grad_enabled(training):
        found = {way: outputs(model, x) for way, model in ways.items()}
    truth = {name: value.detach().double() for name, value in found["before"].items()}
    for name, error in relative_errors(found["after"], truth).items():
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name}: before and after differ by {error:.2g}, expected {TOLERANCE:g}")

    def step(model: nn.Module) -> Callable[[], object]:
        if not training:
            return torch.no_grad()(lambda: model(x))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)  # which leaves the weights as they are
        gradient = gradient_of(found["before"]["output"])

        def train() -> None:
            optimiser.zero_grad()
            model(x).backward(gradient)
            optimiser.step()

        return train

    return {way: step(model) for way, model in ways.items()}


def run(file: Path | None, threads: int) -> int:
    """Measure, print a row as it is done, and add the rows to a file. Exit status 0."""
    torch.set_num_threads(threads)
    for name, model in MODELS.items():
        for what, training in (("training", True), ("inference", False)):
            taken = timing.interleaved(calls(model, training), "cpu", SECONDS, ROUNDS)
            row: dict[str, Any] = {"model": name, "recurrent layers": model.layers, "pass": what}
            row |= {f"{way} ms": 1e3 * float(np.median(each)) for way, each in taken.items()}
            speeds = timing.percentiles(taken["before"] / taken["after"])
            rows.put(row | dict(zip(("times as fast", "p20", "p80"), speeds)), file)
    return 0
