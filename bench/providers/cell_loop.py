"""A loop over torch.nn.LSTMCell, as people write it where nn.LSTM does not do what they need."""

import torch
from torch import nn

from ..problem import Problem
from .engine import Engine, Unable, states

NAMES = ("cell-loop",)
EVERYWHERE = ()


def absent(name: str, device: str) -> str | None:
    """It is always there."""
    return None


def build(name: str, problem: Problem) -> Engine:
    """One nn.LSTMCell, called T times."""
    case = problem.case
    if case.layers * case.directions > 1 or case != case.plain():
        raise Unable("one layer, one direction, no lengths, no resets")
    cell = nn.LSTMCell(case.inputs, case.hidden, device=problem.h0.device, dtype=case.torch_dtype)
    cell.load_state_dict({key.removesuffix("_l0"): tensor for key, tensor in problem.weights.items()})
    cell.requires_grad_(case.run == "training")
    h0, c0 = states(problem)

    def call(x):
        h, c = h0[0], c0[0]
        outputs = []
        for x_t in x.unbind():
            h, c = cell(x_t, (h, c))
            outputs.append(h)
        return torch.stack(outputs), h[None], c[None]

    return Engine(call, {f"{key}_l0": tensor for key, tensor in cell.named_parameters()}, h0, c0)
