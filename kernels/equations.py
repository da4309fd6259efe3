"""The equations of the cells. Triton compiles them for tiles, Numba for single numbers. They compute in float32.

    LSTM   i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
           c = f * c_prev + i * g                                  m = o * tanh(c), or o * tanh(LN(c))
           with peepholes z_i += p_i * c_prev      z_f += p_f * c_prev      z_o += p_o * c
    GRU    r, z = sigmoid(z_r), sigmoid(z_z)       n = tanh(z_n + r * s)    c = m = (1 - z) * n + z * c_prev
    sLSTM  k = l_prev + log sigmoid(z_f)    a = z_i - k    u = sigmoid(a)    c = c_prev + u * (tanh(z_g) - c_prev)
           l = max(k, z_i) + log(1 + e^-|a|)               o = sigmoid(z_o)  m = o * c

The paper of the sLSTM has a cell state, a normaliser n and a stabiliser m. Here c is its cell state divided by n, and l
is m + log n of the paper.

m is the output of the cell. The hidden state is h = W_hr m with a projection, and h = m without one. Each module of
gpu_lstm/equations/ names the paper of its cell.

The four gates and pre-activations of a unit have a fixed order. The s of a GRU is a pre-activation. The v
of an sLSTM takes the place of f: it is the slope of log sigmoid(z_f), which backward needs.

             forward                       gradients of the pre-activations
    LSTM     i, f, g, o                    the same order
    GRU      r, z, n, s                    n, r, z, s
    sLSTM    u, v = sigmoid(-z_f), g, o    the same order

In a GRU the candidate has two pre-activations: z_n = W_in x + b_in, and s = W_hn h_prev + b_hn. So x reaches r, z and
n, and h reaches r, z and s. The order n, r, z, s makes neighbours of them: x reaches the first three, and h reaches the
last three. The products W_hh h have this order too, with a zero in the place of n.

A cell may keep more numbers of a unit than c. They are the tuple `rest`, which is (l,) for an sLSTM and empty for the
other cells. A unit has c = 0 and l = -inf before its first step. The backward pass reads c before the step. It carries
the gradient of l, and does not read l itself.

S.CELL is LSTM, GRU or SLSTM. `compiled_by` lists the names that the compiler's module must define.
"""

# ruff: noqa: F821

from collections.abc import Callable
from types import FunctionType
from typing import Any


def next_cell(gates, c_prev, S):
    """Return c after a step, from the four activated gates and c before the step."""
    if S.CELL == SLSTM:
        c = c_prev + gates[0] * (gates[2] - c_prev)
    elif S.CELL == GRU:
        c = gates[2] + gates[1] * (c_prev - gates[2])
    else:
        c = gates[1] * c_prev + gates[0] * gates[2]
    return c


def cell_forward(z_x, z_h, c_prev, rest, constants, peepholes, S):
    """Return the four gates, c and the rest after a step.

    Args:
        z_x: the part of each pre-activation that comes from the input, in the order of the gates. A GRU's z_x has three
            numbers, or four where h of some steps is known before the time loop. The fourth is then the part of s.
        z_h: the part of each pre-activation that comes from h, in the order of the gradients.
        c_prev: c before the step.
        rest: the rest before the step.
        constants: the peepholes p_i, p_f and p_o if `peepholes` is true. For a GRU: b_hh of r, z and s. Else empty.
        peepholes: whether an LSTM has peepholes. Other cells do not read it.
    """
    if S.CELL == SLSTM:
        z_i, z_f = z_x[0] + z_h[0], z_x[1] + z_h[1]
        k = rest[0] + minimum(z_f, ZERO) - above(z_f)
        a = z_i - where(k < LOWEST, LOWEST, k)  # where z_i and k are both -inf, z_i - k would be NaN
        gates = (sigmoid(a), sigmoid(-z_f), tanh(z_x[2] + z_h[2]), sigmoid(z_x[3] + z_h[3]))
        c, rest = next_cell(gates, c_prev, S), (maximum(k, z_i) + above(a),)
    elif S.CELL == GRU:
        z_r, z_z, s = z_x[0] + z_h[1], z_x[1] + z_h[2], z_h[3]
        if len(constants) > 0:
            z_r += constants[0]
            z_z += constants[1]
            s += constants[2]
        if len(z_x) == 4:
            s += z_x[3]
        r = sigmoid(z_r)
        # The last gate is s itself. z_x[2] is z_n, and tanh_as computes n as exactly as the dtype of z_x needs.
        gates = (r, sigmoid(z_z), tanh_as(z_x[2] + r * s, z_x[2]), s)
        c = next_cell(gates, c_prev, S)
    else:
        z_i, z_f, z_g, z_o = z_x[0] + z_h[0], z_x[1] + z_h[1], z_x[2] + z_h[2], z_x[3] + z_h[3]
        if peepholes:
            z_i += constants[0] * c_prev
            z_f += constants[1] * c_prev
        i, f, g = sigmoid(z_i), sigmoid(z_f), tanh(z_g)
        c = f * c_prev + i * g
        if peepholes:  # i and f saw c before the step, and o sees c after it
            z_o += constants[2] * c
        gates = (i, f, g, sigmoid(z_o))
    return gates, c, rest


def output(o, v, S):
    """Return m, from the last gate o and from v, which is c or LN(c)."""
    if S.CELL == SLSTM:
        m = o * v
    elif S.CELL == GRU:
        m = v
    else:
        m = o * tanh(v)
    return m


def output_backward(o, v, dm, S):
    """Return the gradients of the last pre-activation and of v that come from dm, by sigmoid' = s (1 - s)."""
    if S.CELL == SLSTM:
        dz_o, dv = dm * v * o * (ONE - o), dm * o
    elif S.CELL == GRU:
        dz_o, dv = zeros_like(dm), dm
    else:
        t = tanh(v)
        dz_o, dv = dm * t * o * (ONE - o), dm * o * (ONE - t * t)
    return dz_o, dv


def cell_backward(gates, c_prev, dz_o, dc, drest, constants, peepholes, S):
    """Return the gradients of the four pre-activations, of c before the step, and of the rest before the step.

    Args:
        gates: the four activated gates.
        c_prev: c before the step.
        dz_o: the gradient of the last pre-activation that comes from m, see `output_backward`.
        dc: the gradient of c after the step, with the part that comes from m.
        drest: the gradient of the rest after the step.
        constants: the peepholes if `peepholes` is true.
    """
    if S.CELL == SLSTM:
        u, v, g, _ = gates
        stays, dl, d = ONE - u, drest[0], dc * (g - c_prev)
        dk = stays * (dl - u * d)
        dz = (u * (dl + stays * d), dk * v, dc * u * (ONE - g * g), dz_o)
        dc_prev, drest = dc * stays, (dk,)
    elif S.CELL == GRU:
        r, update, n, s = gates
        dz_n = dc * (ONE - update) * (ONE - n * n)
        dz_r, dz_z = dz_n * s * r * (ONE - r), dc * (c_prev - n) * update * (ONE - update)
        dz, dc_prev = (dz_n, dz_r, dz_z, dz_n * r), dc * update
    else:
        i, f, g, _ = gates
        if peepholes:
            dc += dz_o * constants[2]
        dz_i = dc * g * i * (ONE - i)
        dz_f = dc * c_prev * f * (ONE - f)
        dz = (dz_i, dz_f, dc * i * (ONE - g * g), dz_o)
        dc_prev = dc * f
        if peepholes:
            dc_prev += dz_i * constants[0] + dz_f * constants[1]
    return dz, dc_prev, drest


EQUATIONS = next_cell, cell_forward, output, output_backward, cell_backward


def compiled_by(compiler: Callable[[Any], Any], known: dict[str, Any]) -> list[Any]:
    """Compile the EQUATIONS, store each in `known` by its name, and return them in order.

    `known` has the globals of the compiler's module. They define the other names that the equations use:

        GRU, SLSTM                             the values of S.CELL
        ZERO, ONE, LOWEST                      0, 1 and the lowest finite float32
        where, minimum, maximum, zeros_like    as in NumPy
        sigmoid(x), tanh(x)
        tanh_as(x, like)                       tanh, as exact as the dtype of `like` needs
        above(x)                               log(1 + e^-|x|)
    """
    for function in EQUATIONS:
        known[function.__name__] = compiler(FunctionType(function.__code__, known, function.__name__))
    return [known[function.__name__] for function in EQUATIONS]
