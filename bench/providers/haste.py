"""haste_pytorch.LSTM, written against haste_pytorch 0.5.0rc0.

It multiplies from the right, kernel [I, 4H] and recurrent_kernel [H, 4H], with one bias [4H], and has the gates in the
order i, g, f, o. Its lengths only choose the final states; they do not mask the output.
"""

import importlib

import torch
from torch import Tensor

from ..problem import Problem
from .engine import Engine, Unable, states
from .installed import missing

NAMES = ("haste",)
EVERYWHERE = ()


def absent(name: str, device: str) -> str | None:
    """It needs CUDA, also to be installed."""
    if not device.startswith("cuda"):
        return "haste needs CUDA"
    return missing("haste_pytorch", "pip install --no-build-isolation haste_pytorch, with nvcc")


def build(name: str, problem: Problem) -> Engine:
    """The module with the problem's weights."""
    case = problem.case
    if case.layers * case.directions > 1 or case != case.plain():
        raise Unable("one layer, one direction, no masked lengths, no resets")
    if case.torch_dtype != torch.float32:
        raise Unable("float32 only")
    training = case.run == "training"
    lstm = importlib.import_module("haste_pytorch").LSTM(case.inputs, case.hidden)
    lstm.from_native_weights(*problem.weights.values())  # which makes new parameters, on the weights' device
    lstm.train(training).requires_grad_(training)
    h0, c0 = states(problem)

    def call(x):
        y, (h_n, c_n) = lstm(x, (h0, c0))
        return y, h_n, c_n

    return Engine(call, dict(lstm.named_parameters()), h0, c0, to_torch=_to_torch)


def _to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gates in the order i, f, g, o, then transposed; the bias's gradient is that of either of torch's."""

    def reordered(gradient: Tensor) -> Tensor:
        i, g, f, o = gradient.chunk(4, dim=-1)
        return torch.cat([i, f, g, o], dim=-1)

    bias = reordered(gradients["bias"])
    return {
        "weight_ih_l0": reordered(gradients["kernel"]).T,
        "weight_hh_l0": reordered(gradients["recurrent_kernel"]).T,
        "bias_ih_l0": bias,
        "bias_hh_l0": bias,
    }
