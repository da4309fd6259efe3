"""The LSTM cell, with or without peepholes: rows are i, f, g and o, constants the peepholes of i, f and o."""

from ..functions import compiled, floats, sigmoid, tanh
from ..tile import BEFORE, CONSTANTS, DV, DZ_O, GATES, OF_H, ONE, C, M, vectors

I, F, G, O = GATES
Z_I, Z_F, Z_G, Z_O = OF_H
P_I, P_F, P_O = CONSTANTS


@compiled
def forward(tile, n, peepholes):
    w = floats(tile)
    for j in range(vectors(n)):
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


@compiled
def output(tile, n):
    """m of o and c, or LN(c)."""
    w = floats(tile)
    for j in range(vectors(n)):
        w[M + j] = w[O + j] * tanh(w[C + j])


@compiled
def output_backward(tile, n, normed):
    """LN(c) is in DV, if c is normed."""
    w = floats(tile)
    for j in range(vectors(n)):
        o, dm, c = w[O + j], w[M + j], w[F + j] * w[BEFORE + j] + w[I + j] * w[G + j]
        t = tanh(w[DV + j] if normed else c)
        w[DZ_O + j], w[DV + j] = dm * t * o * (ONE - o), dm * o * (ONE - t * t)


@compiled
def backward(tile, n, peepholes):
    w = floats(tile)
    for j in range(vectors(n)):
        i, f, g, dz_o, dc = w[I + j], w[F + j], w[G + j], w[DZ_O + j], w[C + j]
        if peepholes:
            dc += dz_o * w[P_O + j]
        dz_i, dz_f = dc * g * i * (ONE - i), dc * w[BEFORE + j] * f * (ONE - f)
        w[Z_I + j], w[Z_F + j], w[Z_G + j], w[Z_O + j] = dz_i, dz_f, dc * i * (ONE - g * g), dz_o
        dc = dc * f
        if peepholes:
            dc += dz_i * w[P_I + j] + dz_f * w[P_F + j]
        w[C + j] = dc
