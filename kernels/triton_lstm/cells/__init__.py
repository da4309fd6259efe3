"""The cells on tiles of [rows, units], in float32. Every kernel family computes the one that its constants name."""

import triton
import triton.language as tl

from .gru import gru_backward, gru_forward, gru_next_cell
from .lstm import lstm_backward, lstm_forward, lstm_next_cell


@triton.jit
def cell_forward(x, z, c_prev, peepholes, S: tl.constexpr):
    """The parts of the pre-activations from the input and from h, and c before the step -> (four gates, c, m)."""
    if S.CELL == "gru":
        after = gru_forward(x, z, c_prev)
    else:
        after = lstm_forward(x, z, c_prev, peepholes)
    return after


@triton.jit
def cell_backward(gates, c_prev, c, dm, dc, peepholes, S: tl.constexpr):
    """Gradients of m, and of c from the next step -> (of the four pre-activations; gradient of c_prev)."""
    if S.CELL == "gru":
        before = gru_backward(gates, c_prev, dm, dc)
    else:
        before = lstm_backward(gates, c_prev, c, dm, dc, peepholes)
    return before


@triton.jit
def next_cell(gates, c_prev, S: tl.constexpr):
    """c, [rows, units]."""
    return gru_next_cell(gates, c_prev) if S.CELL == "gru" else lstm_next_cell(gates, c_prev)
