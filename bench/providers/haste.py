"""haste_pytorch.LSTM, written against haste_pytorch 0.5.0rc0.

It multiplies from the right, kernel [I, 4H] and recurrent_kernel [H, 4H], with one bias [4H], and has the gates in the
order i, g, f, o. Its lengths only choose the final states; they do not mask the output.
"""

import importlib
from functools import partial

import torch
from torch import Tensor

from ..inputs import Inputs
from .engine import Engine, Provider, Unable, absence, expect

NAMES = {"weight_ih_l0": "kernel", "weight_hh_l0": "recurrent_kernel", "bias_l0": "bias"}


def build(inputs: Inputs) -> Engine:
    """The module with the weights of the inputs."""
    expect(inputs.case)
    case = inputs.case
    if case.torch_dtype != torch.float32:
        raise Unable("float32 only")
    lstm = importlib.import_module("haste_pytorch").LSTM(case.input_size, case.hidden_size)
    lstm.from_native_weights(*inputs.weights.values())  # which makes new parameters, on the weights' device
    return Engine.of(lstm.train(case.training).requires_grad_(case.training), to_torch)


def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gates in the order i, f, g, o; transposed."""
    gates = {name: gradients[theirs].movedim(-1, 0).unflatten(0, (4, -1)) for name, theirs in NAMES.items()}
    return {name: gradient[[0, 2, 1, 3]].flatten(0, 1) for name, gradient in gates.items()}


INSTALL = "pip install --no-build-isolation haste_pytorch, with nvcc"
PROVIDERS = {"haste": Provider(build, partial(absence, "haste_pytorch", INSTALL))}
