"""nn.LSTM called step by step with its state masked by `dones`, as recurrent PPO is commonly written."""

import torch
from torch import nn

from ..problem import Problem
from .engine import Engine, Unable, load, states

NAMES = ("cleanrl-loop",)
EVERYWHERE = NAMES


def absent(name: str, device: str) -> str | None:
    """It is always there."""
    return None


def build(name: str, problem: Problem) -> Engine:
    """The module with the problem's weights, one call a step."""
    case = problem.case
    if case.directions > 1 or case.sequences != "full" or not case.reset_rate:
        raise Unable("only for resets in whole sequences, one direction")
    assert problem.resets is not None
    lstm = nn.LSTM(case.inputs, case.hidden, case.layers, device=problem.h0.device, dtype=case.torch_dtype)
    parameters, (h0, c0) = load(lstm, problem), states(problem)
    keep = (~problem.resets).to(case.torch_dtype)[:, None, :, None]  # [T, 1, B, 1]

    def call(x):
        h, c = h0, c0
        outputs = []
        for x_t, keep_t in zip(x.split(1), keep.unbind()):
            y, (h, c) = lstm(x_t, (keep_t * h, keep_t * c))
            outputs.append(y)
        return torch.cat(outputs), h, c

    return Engine(call, parameters, h0, c0)
