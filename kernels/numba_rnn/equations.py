"""The cells of kernels/equations.py on a tile, in loops that LLVM vectorises.

A gate replaces its pre-activation in the same row. The rows are i, f, g, o for an LSTM, r, z, n, s for a GRU, and u, v,
g, o for an sLSTM. Gradients of pre-activations have the same rows, for a GRU in the order n, r, z, s. Constants are the
peepholes of i, f and o, or a GRU's biases of h. C has c, and REST has l of an sLSTM. Backward they have the gradients.
"""

from collections import namedtuple

import numpy as np

from ..equations import compiled_by
from .functions import above, compiled, floats, inlined, sigmoid, tanh  # noqa: F401  # some for `compiled_by`
from .tile import BEFORE, CONSTANTS, DV, DZ_O, GATES, OF_H, ONE, REST, ZERO, C, M, vectors  # noqa: F401

CELLS = LSTM, GRU, SLSTM = range(3)
Sizes = namedtuple("Sizes", "CELL")  # the only field of triton_rnn/parameters.py's Sizes that the equations read


@inlined
def tanh_as(x, like):
    return tanh(x)


@inlined
def where(condition, x, y):
    return x if condition else y


@inlined
def minimum(x, y):
    return x if x < y else y


@inlined
def maximum(x, y):
    return y if x < y else x


@inlined
def zeros_like(x):
    return ZERO


LOWEST = np.finfo(np.float32).min
next_cell, cell_forward, cell_output, cell_output_backward, cell_backward = compiled_by(inlined, globals())


@inlined
def four(w, rows, j):
    """Return unit j of four rows."""
    return w[rows[0] + j], w[rows[1] + j], w[rows[2] + j], w[rows[3] + j]


@inlined
def put_four(w, rows, j, values):
    """Set unit j of four rows."""
    w[rows[0] + j], w[rows[1] + j], w[rows[2] + j], w[rows[3] + j] = values


@inlined
def constants_of(w, j):
    """Return the constants of unit j: peepholes, or a GRU's biases of h."""
    return w[CONSTANTS[0] + j], w[CONSTANTS[1] + j], w[CONSTANTS[2] + j]


# C and REST are read before they are written.


@inlined
def forward_of(tile, n, peepholes, S):
    """Compute the gates, and replace the state before the step by the state after it."""
    w = floats(tile)
    for j in range(vectors(n)):
        z_x, z_h, rest = four(w, GATES, j), four(w, OF_H, j), (w[REST + j],)
        gates, w[C + j], rest = cell_forward(z_x, z_h, w[C + j], rest, constants_of(w, j), peepholes, S)
        put_four(w, GATES, j, gates)
        if S.CELL == SLSTM:
            w[REST + j] = rest[0]


@inlined
def output_of(tile, n, _, S):
    """Compute M from the last gate and from v, which is in C."""
    w = floats(tile)
    for j in range(vectors(n)):
        w[M + j] = cell_output(w[GATES[3] + j], w[C + j], S)


@inlined
def output_backward_of(tile, n, normed, S):
    """Compute the gradients of z_o and v in DZ_O and DV from the gradient of m in M. If `normed`, DV has LN(c)."""
    w = floats(tile)
    for j in range(vectors(n)):
        gates = four(w, GATES, j)
        v = w[DV + j] if normed else next_cell(gates, w[BEFORE + j], S)
        w[DZ_O + j], w[DV + j] = cell_output_backward(gates[3], v, w[M + j], S)


@inlined
def backward_of(tile, n, peepholes, S):
    """Compute the gradients of the pre-activations. Replace the gradient of the state by the one before the step."""
    w = floats(tile)
    for j in range(vectors(n)):
        gates, of, rest = four(w, GATES, j), constants_of(w, j), (w[REST + j],)
        dz, w[C + j], rest = cell_backward(gates, w[BEFORE + j], w[DZ_O + j], w[C + j], rest, of, peepholes, S)
        put_four(w, OF_H, j, dz)
        if S.CELL == SLSTM:
            w[REST + j] = rest[0]


def by_cell(loop):
    """Return a function with one copy of the loop for each cell, so that nothing is decided inside the loop."""

    def run(tile, n, cell, flag):
        if cell == LSTM:
            loop(tile, n, flag, Sizes(LSTM))
        elif cell == GRU:
            loop(tile, n, flag, Sizes(GRU))
        else:
            loop(tile, n, flag, Sizes(SLSTM))

    # Numba names machine code by the function's qualified name and a number that every process counts from the start.
    # If two processes kept different loops under one name, the linker of a third process would take one for the other.
    run.__qualname__ = f"run_{loop.__name__}"
    return compiled(run)


forward, output, output_backward, backward = map(by_cell, (forward_of, output_of, output_backward_of, backward_of))
