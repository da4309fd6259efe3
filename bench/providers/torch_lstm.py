"""torch.nn.LSTM: ATen on the CPU, cuDNN on CUDA. The yardstick."""

from torch import nn

from ..problem import Problem
from .engine import Engine, Unable, load, states

NAMES = ("torch",)
EVERYWHERE = NAMES


def absent(name: str, device: str) -> str | None:
    """It is always there."""
    return None


def build(name: str, problem: Problem) -> Engine:
    """The module with the problem's weights."""
    case = problem.case
    if case.reset_rate or case.sequences == "ragged":
        raise Unable("takes lengths only packed, and no resets")
    lstm = nn.LSTM(
        case.inputs, case.hidden, case.layers, bidirectional=case.directions == 2,
        device=problem.h0.device, dtype=case.torch_dtype,
    )  # fmt: skip
    parameters, (h0, c0) = load(lstm, problem), states(problem)

    def call(x):
        y, (h_n, c_n) = lstm(x, (h0, c0))
        return y, h_n, c_n

    return Engine(call, parameters, h0, c0)
