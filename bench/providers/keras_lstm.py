"""keras.layers.LSTM and Bidirectional on Keras's torch backend, written against Keras 3.15.

Keras takes the batch first, one bias where torch has two, and lengths as a mask.
"""

import importlib
import importlib.util
import os
import sys

import torch
from torch import Tensor

from ..problem import Problem
from .engine import Engine, Unable, states
from .installed import release

NAMES = ("keras",)
EVERYWHERE = ()


def absent(name: str, device: str) -> str | None:
    """Keras 3 is not installed, or another of its backends is chosen."""
    if importlib.util.find_spec("keras") is None or release("keras") < (3,):
        return "keras 3 is not installed: pip install 'keras>=3'"
    backend = sys.modules["keras"].backend.backend() if "keras" in sys.modules else os.environ.get("KERAS_BACKEND")
    if backend not in (None, "torch"):
        return f"keras's backend is {backend}: set KERAS_BACKEND=torch"
    return None


def build(name: str, problem: Problem) -> Engine:
    """One Keras layer for each layer, with the problem's weights and states."""
    case = problem.case
    if case.reset_rate or case.sequences == "packed":
        raise Unable("takes lengths only as a mask, and no resets")
    os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it once, when it is first imported
    keras = importlib.import_module("keras")
    device = str(problem.h0.device)
    suffixes = ("", "_reverse")[: case.directions]

    layers, parameters = [], {}
    with keras.device(device):
        for number in range(case.layers):
            # Without zero_output_for_mask, steps beyond the length repeat the last output.
            layer = keras.layers.LSTM(
                case.hidden, return_sequences=True, return_state=True, zero_output_for_mask=True,
                dtype=str(case.torch_dtype).removeprefix("torch."),
            )  # fmt: skip
            if case.directions == 2:
                layer = keras.layers.Bidirectional(layer)
            layer.build((case.batch, case.steps, case.hidden * case.directions if number else case.inputs))
            layers.append(layer)
            directions = [layer.forward_layer, layer.backward_layer] if case.directions == 2 else [layer]
            for direction, suffix in zip(directions, suffixes):
                cell, place = direction.cell, f"l{number}{suffix}"
                weight_ih, weight_hh, bias_ih, bias_hh = (
                    problem.weights[f"{kind}_{place}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                for kind, variable, value in (
                    ("weight_ih", cell.kernel, weight_ih.T),
                    ("weight_hh", cell.recurrent_kernel, weight_hh.T),
                    ("bias", cell.bias, bias_ih + bias_hh),
                ):
                    variable.assign(value)
                    parameters[f"{kind}_{place}"] = variable.value

    h0, c0 = states(problem)
    mask = None
    if problem.lengths is not None:
        mask = torch.arange(case.steps, device=device) < problem.lengths[:, None]  # [B, T]

    def call(x):
        y, finals = x.transpose(0, 1), []
        rows = iter(zip(h0, c0))
        for layer in layers:
            initial = [state for _ in suffixes for state in next(rows)]
            y, *last = layer(y, initial_state=initial, mask=mask)
            finals += last
        return y.transpose(0, 1), torch.stack(finals[::2]), torch.stack(finals[1::2])

    return Engine(call, parameters, h0, c0, to_torch=_to_torch, within=lambda: keras.device(device))


def _to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights transposed; the bias's gradient is that of either of torch's."""
    named = {}
    for name, gradient in gradients.items():
        kind, place = name.rsplit("_l", 1)
        if kind == "bias":
            named[f"bias_ih_l{place}"] = named[f"bias_hh_l{place}"] = gradient
        else:
            named[name] = gradient.T
    return named
