"""The cells' equations on a tile, in loops that LLVM vectorises; triton_rnn/equations.py states the formulas.

A gate's row is that of its pre-activation: of an LSTM i, f, g, o, of a GRU r, z, n, s, of an sLSTM u, v, g, o; of
gradients likewise, but of a GRU n, r, z, s. Constants are peepholes of i, f and o, or a GRU's biases of h. C is c, or a
GRU's h, or an sLSTM's q, whose REST is l; backward their gradients. v is c, or LN(c).
"""

import numpy as np

from .functions import above, compiled, floats, sigmoid, tanh
from .tile import BEFORE, CONSTANTS, DV, DZ_O, GATES, OF_H, ONE, REST, ZERO, C, M, vectors

CELLS = LSTM, GRU, SLSTM = range(3)
I, F, G, O = R, Z, N, S = U, V, _, _ = GATES
Z_I, Z_F, Z_G, Z_O = Z_N, Z_R, Z_Z, Z_S = OF_H
P_I, P_F, P_O = B_R, B_Z, B_N = CONSTANTS
LOWEST = np.finfo(np.float32).min  # that is finite


@compiled
def forward(tile, n, cell, peepholes):
    """The gates, and the state after the step, in place of that before it."""
    w, units = floats(tile), range(vectors(n))
    if cell == LSTM:
        for j in units:
            c, z_i, z_f = w[C + j], w[I + j] + w[Z_I + j], w[F + j] + w[Z_F + j]
            z_g, z_o = w[G + j] + w[Z_G + j], w[O + j] + w[Z_O + j]
            if peepholes:
                z_i += w[P_I + j] * c
                z_f += w[P_F + j] * c
            i, f, g = sigmoid(z_i), sigmoid(z_f), tanh(z_g)
            c = f * c + i * g
            if peepholes:
                z_o += w[P_O + j] * c
            w[I + j], w[F + j], w[G + j], w[O + j], w[C + j] = i, f, g, sigmoid(z_o), c
    elif cell == GRU:
        for j in units:
            r = sigmoid(w[R + j] + w[Z_R + j] + w[B_R + j])
            z = sigmoid(w[Z + j] + w[Z_Z + j] + w[B_Z + j])
            s = w[S + j] + w[Z_S + j] + w[B_N + j]
            g = tanh(w[N + j] + r * s)
            w[R + j], w[Z + j], w[N + j], w[S + j], w[C + j] = r, z, g, s, g + z * (w[C + j] - g)
    else:
        for j in units:
            z_i, z_f = w[U + j] + w[Z_I + j], w[V + j] + w[Z_F + j]
            k = w[REST + j] + (z_f if z_f < ZERO else ZERO) - above(z_f)
            a = z_i - (LOWEST if k < LOWEST else k)  # -inf, not NaN, where z_i and k are -inf
            u, g = sigmoid(a), tanh(w[G + j] + w[Z_G + j])
            o = sigmoid(w[O + j] + w[Z_O + j])
            w[U + j], w[V + j], w[G + j], w[O + j], w[C + j] = u, sigmoid(-z_f), g, o, w[C + j] + u * (g - w[C + j])
            w[REST + j] = (z_i if k < z_i else k) + above(a)


@compiled
def output(tile, n, cell):
    """M of o and v, which is in C."""
    w, units = floats(tile), range(vectors(n))
    if cell == LSTM:
        for j in units:
            w[M + j] = w[O + j] * tanh(w[C + j])
    elif cell == GRU:
        for j in units:
            w[M + j] = w[C + j]
    else:
        for j in units:
            w[M + j] = w[O + j] * w[C + j]


@compiled
def output_backward(tile, n, cell, normed):
    """The gradients of z_o and of v, in DZ_O and DV, from that of m in M. LN(c) is in DV, if c is normed."""
    w, units = floats(tile), range(vectors(n))
    if cell == LSTM:
        for j in units:
            o, dm, c = w[O + j], w[M + j], w[F + j] * w[BEFORE + j] + w[I + j] * w[G + j]
            t = tanh(w[DV + j] if normed else c)
            w[DZ_O + j], w[DV + j] = dm * t * o * (ONE - o), dm * o * (ONE - t * t)
    elif cell == GRU:
        for j in units:
            w[DV + j] = w[M + j]
    else:
        for j in units:
            o, dm, q = w[O + j], w[M + j], w[BEFORE + j] + w[U + j] * (w[G + j] - w[BEFORE + j])
            w[DZ_O + j], w[DV + j] = dm * q * o * (ONE - o), dm * o


@compiled
def backward(tile, n, cell, peepholes):
    """The gradients of the pre-activations and of the state before the step, from those of z_o and of that after it."""
    w, units = floats(tile), range(vectors(n))
    if cell == LSTM:
        for j in units:
            i, f, g, dz_o, dc = w[I + j], w[F + j], w[G + j], w[DZ_O + j], w[C + j]
            if peepholes:
                dc += dz_o * w[P_O + j]
            dz_i, dz_f = dc * g * i * (ONE - i), dc * w[BEFORE + j] * f * (ONE - f)
            w[Z_I + j], w[Z_F + j], w[Z_G + j], w[Z_O + j] = dz_i, dz_f, dc * i * (ONE - g * g), dz_o
            dc = dc * f
            if peepholes:
                dc += dz_i * w[P_I + j] + dz_f * w[P_F + j]
            w[C + j] = dc
    elif cell == GRU:
        for j in units:
            r, z, g, s, d = w[R + j], w[Z + j], w[N + j], w[S + j], w[C + j]
            dz_n = d * (ONE - z) * (ONE - g * g)
            w[Z_N + j], w[Z_R + j] = dz_n, dz_n * s * r * (ONE - r)
            w[Z_Z + j], w[Z_S + j] = d * (w[BEFORE + j] - g) * z * (ONE - z), dz_n * r
            w[C + j] = d * z
    else:
        for j in units:
            u, g, dq, dl = w[U + j], w[G + j], w[C + j], w[REST + j]
            stays, d = ONE - u, dq * (g - w[BEFORE + j])
            dk = stays * (dl - u * d)
            w[Z_I + j], w[Z_F + j] = u * (dl + stays * d), dk * w[V + j]
            w[Z_G + j], w[Z_O + j] = dq * u * (ONE - g * g), w[DZ_O + j]
            w[C + j], w[REST + j] = dq * stays, dk
