"""keras.layers.LSTM and Bidirectional on Keras's torch backend, written against Keras 3.15.

Keras has the batch first, one bias where torch has two, and lengths as a mask.
"""

import importlib
import os
import sys

import torch
from torch import Tensor

from ..inputs import WEIGHTS, Inputs
from .engine import Engine, Provider, absence, expect


def absent(device: str) -> str | None:
    """Another of Keras's backends is chosen, or Keras 3 is not installed."""
    backend = sys.modules["keras"].backend.backend() if "keras" in sys.modules else os.environ.get("KERAS_BACKEND")
    if backend not in (None, "torch"):
        return f"keras's backend is {backend}: set KERAS_BACKEND=torch"
    os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it once, when it is first imported
    return absence("keras", "pip install 'keras>=3'", device, cuda=False)


def build(inputs: Inputs) -> Engine:
    """One Keras layer for each layer, with the weights of the inputs."""
    expect(inputs.case, "layers", "directions", "ragged")
    case, device, keras = inputs.case, str(inputs.h0.device), importlib.import_module("keras")
    suffixes = ("", "_reverse")[: case.directions]
    layers, parameters = [], {}
    with keras.device(device):
        for number in range(case.layers):
            # Without zero_output_for_mask, steps beyond the length repeat the last output.
            layer = keras.layers.LSTM(
                case.hidden_size, return_sequences=True, return_state=True, zero_output_for_mask=True,
                dtype=str(case.torch_dtype).removeprefix("torch."),
            )  # fmt: skip
            if case.directions == 2:
                layer = keras.layers.Bidirectional(layer)
            layer.build((case.batch, case.steps, case.hidden_size * case.directions if number else case.input_size))
            layers.append(layer)
            directions = [layer.forward_layer, layer.backward_layer] if case.directions == 2 else [layer]
            for direction, suffix in zip(directions, suffixes):
                cell, place = direction.cell, f"l{number}{suffix}"
                weight_ih, weight_hh, bias_ih, bias_hh = (inputs.weights[f"{kind}_{place}"] for kind in WEIGHTS)
                values = {"weight_ih": weight_ih.T, "weight_hh": weight_hh.T, "bias": bias_ih + bias_hh}
                for variable, (kind, value) in zip((cell.kernel, cell.recurrent_kernel, cell.bias), values.items()):
                    variable.assign(value)
                    parameters[f"{kind}_{place}"] = variable.value

    lengths = inputs.lengths
    mask = None if lengths is None else torch.arange(case.steps, device=device) < lengths[:, None]  # [B, T]

    def call(x, state):
        y, finals, rows = x.transpose(0, 1), [], iter(zip(*state))
        for layer in layers:
            y, *last = layer(y, initial_state=[each for _ in suffixes for each in next(rows)], mask=mask)
            finals += last
        return y.transpose(0, 1), (torch.stack(finals[::2]), torch.stack(finals[1::2]))

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gradient.T if gradient.dim() == 2 else gradient for name, gradient in gradients.items()}

    return Engine(call, parameters, to_torch, within=lambda: keras.device(device))


PROVIDERS = {"keras": Provider(build, absent)}
