"""The cells on tiles of [rows, units], in float32. Every kernel family computes the one that its constants name."""

import triton
import triton.language as tl

from .gru import gru_backward, gru_forward, gru_next_cell
from .lstm import lstm_backward, lstm_forward, lstm_next_cell, lstm_output, lstm_output_backward


@triton.jit
def cell_forward(x, z, c_prev, constants, S: tl.constexpr):
    """The parts of the pre-activations from the input and from h, and c before the step -> (four gates, c)."""
    return gru_forward(x, z, c_prev, constants) if S.CELL == "gru" else lstm_forward(x, z, c_prev, constants)


@triton.jit
def output(o, v, S: tl.constexpr):
    """m, the cell's output, of its last gate o and v, which is c or, in a cell that `normalises`, LN(c)."""
    return v if S.CELL == "gru" else lstm_output(o, v)


@triton.jit
def output_backward(o, v, dm, S: tl.constexpr):
    """Gradient of m -> (as far as it comes from m: of the last pre-activation; of v)."""
    return (tl.zeros_like(dm), dm) if S.CELL == "gru" else lstm_output_backward(o, v, dm)


@triton.jit
def cell_backward(gates, c_prev, dz_o, dc, peepholes, S: tl.constexpr):
    """Gradients of the last pre-activation from m, and of c -> (of the four pre-activations; of c_prev)."""
    return gru_backward(gates, c_prev, dc) if S.CELL == "gru" else lstm_backward(gates, c_prev, dz_o, dc, peepholes)


@triton.jit
def next_cell(gates, c_prev, S: tl.constexpr):
    """c, [rows, units]."""
    return gru_next_cell(gates, c_prev) if S.CELL == "gru" else lstm_next_cell(gates, c_prev)
