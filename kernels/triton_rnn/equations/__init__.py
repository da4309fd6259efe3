"""The cells on tiles of [rows, units], in float32. Every kernel family computes the one that its constants name.

What a cell keeps of a unit beside c is a tuple, `rest`: of an sLSTM l, of others nothing.
"""

import triton
import triton.language as tl

from .gru import gru_backward, gru_forward, gru_next_cell
from .lstm import lstm_backward, lstm_forward, lstm_next_cell, lstm_output, lstm_output_backward
from .slstm import slstm_backward, slstm_forward, slstm_next_cell, slstm_output, slstm_output_backward

EMPTY_REST = tl.constexpr(-float("inf"))  # before the first step, and after a reset


@triton.jit
def cell_forward(x, z, c_prev, rest_prev, constants, S: tl.constexpr):
    """The parts of the pre-activations from the input and from h, and c and the rest before the step
    -> (four gates, c, the rest)."""
    rest = ()
    if S.CELL == "gru":
        gates, c = gru_forward(x, z, c_prev, constants)
    elif S.CELL == "slstm":
        gates, c, l = slstm_forward(x, z, c_prev, rest_prev[0])
        rest = (l,)
    else:
        gates, c = lstm_forward(x, z, c_prev, constants)
    return gates, c, rest


@triton.jit
def output(o, v, S: tl.constexpr):
    """m, the cell's output, of its last gate o and v, which is c or, in a cell that `normalises`, LN(c)."""
    if S.CELL == "gru":
        m = v
    elif S.CELL == "slstm":
        m = slstm_output(o, v)
    else:
        m = lstm_output(o, v)
    return m


@triton.jit
def output_backward(o, v, dm, S: tl.constexpr):
    """Gradient of m -> (as far as it comes from m: of the last pre-activation; of v)."""
    if S.CELL == "gru":
        dz_o, dv = tl.zeros_like(dm), dm
    elif S.CELL == "slstm":
        dz_o, dv = slstm_output_backward(o, v, dm)
    else:
        dz_o, dv = lstm_output_backward(o, v, dm)
    return dz_o, dv


@triton.jit
def cell_backward(gates, c_prev, dz_o, dc, drest, peepholes, S: tl.constexpr):
    """Gradients of the last pre-activation from m, of c and of the rest
    -> (of the four pre-activations; of c_prev; of the rest before)."""
    drest_prev = ()
    if S.CELL == "gru":
        dz, dc_prev = gru_backward(gates, c_prev, dc)
    elif S.CELL == "slstm":
        dz, dc_prev, dl = slstm_backward(gates, c_prev, dz_o, dc, drest[0])
        drest_prev = (dl,)
    else:
        dz, dc_prev = lstm_backward(gates, c_prev, dz_o, dc, peepholes)
    return dz, dc_prev, drest_prev


@triton.jit
def next_cell(gates, c_prev, S: tl.constexpr):
    """c, [rows, units]."""
    if S.CELL == "gru":
        c = gru_next_cell(gates, c_prev)
    elif S.CELL == "slstm":
        c = slstm_next_cell(gates, c_prev)
    else:
        c = lstm_next_cell(gates, c_prev)
    return c
