"""torch.nn.LSTM for a padded batch with lengths, in the way PyTorch offers: pack, run, pad again."""

from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..problem import Problem
from .engine import Engine, Unable, load, states

NAMES = ("torch-packed",)
EVERYWHERE = NAMES


def absent(name: str, device: str) -> str | None:
    """It is always there."""
    return None


def build(name: str, problem: Problem) -> Engine:
    """The module with the problem's weights; packing is part of the call."""
    case = problem.case
    if case.reset_rate or case.sequences != "ragged":
        raise Unable("only for padded batches with lengths")
    assert problem.lengths is not None
    lstm = nn.LSTM(
        case.inputs, case.hidden, case.layers, bidirectional=case.directions == 2,
        device=problem.h0.device, dtype=case.torch_dtype,
    )  # fmt: skip
    parameters, (h0, c0) = load(lstm, problem), states(problem)
    lengths = problem.lengths.cpu()  # where packing wants them

    def call(x):
        y, (h_n, c_n) = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), (h0, c0))
        return pad_packed_sequence(y, total_length=case.steps)[0], h_n, c_n

    return Engine(call, parameters, h0, c0)
