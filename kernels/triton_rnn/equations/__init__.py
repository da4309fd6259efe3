"""The cells on tiles of [rows, units], in float32. Every kernel family computes the one that its constants name.

What a cell keeps of a unit beside c is a tuple, `rest`: of an sLSTM l, of others nothing.
"""

import triton
import triton.language as tl

from .gru import gru_backward, gru_forward, gru_next_cell
from .lstm import lstm_backward, lstm_forward, lstm_next_cell, lstm_output_backward, tanh
from .slstm import slstm_backward, slstm_forward, slstm_next_cell, slstm_output_backward


@triton.jit
def after_zeros(z):
    """What h sends to the last gates -> to all four: zeros to those that it does not reach."""
    return (0.0,) * (4 - len(z)) + z


@triton.jit
def cell_forward(x, z, c_prev, rest, constants, S: tl.constexpr):
    """The parts of the pre-activations from the input and from h, and c and the rest before the step
    -> (four gates, c, the rest)."""
    return (
        slstm_forward(x, z, c_prev, rest) if S.CELL == "slstm" else
        gru_forward(x, z, c_prev, constants) if S.CELL == "gru" else lstm_forward(x, z, c_prev, constants)
    )  # fmt: skip


@triton.jit
def output(o, v, S: tl.constexpr):
    """m, the cell's output, of its last gate o and v, which is c or, in a cell that `normalises`, LN(c)."""
    return o * v if S.CELL == "slstm" else v if S.CELL == "gru" else o * tanh(v)


@triton.jit
def output_backward(o, v, dm, S: tl.constexpr):
    """The gradients (of the last pre-activation, of v), as far as they come from that of m."""
    return (
        slstm_output_backward(o, v, dm) if S.CELL == "slstm" else
        (tl.zeros_like(dm), dm) if S.CELL == "gru" else lstm_output_backward(o, v, dm)
    )  # fmt: skip


@triton.jit
def cell_backward(gates, c_prev, dz_o, dc, drest, peepholes, S: tl.constexpr):
    """Gradients of the last pre-activation from m, of c and of the rest
    -> (of the four pre-activations; of c_prev; of the rest before)."""
    return (
        slstm_backward(gates, c_prev, dz_o, dc, drest) if S.CELL == "slstm" else
        gru_backward(gates, c_prev, dc) if S.CELL == "gru" else lstm_backward(gates, c_prev, dz_o, dc, peepholes)
    )  # fmt: skip


@triton.jit
def next_cell(gates, c_prev, S: tl.constexpr):
    """c after a step, [rows, units]."""
    return (
        slstm_next_cell(gates, c_prev) if S.CELL == "slstm" else
        gru_next_cell(gates, c_prev) if S.CELL == "gru" else lstm_next_cell(gates, c_prev)
    )  # fmt: skip
