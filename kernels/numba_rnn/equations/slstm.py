"""The sLSTM cell: rows are u, v, g and o, of pre-activations i, f, g and o. C is q and REST l."""

import numpy as np

from ..functions import above, compiled, floats, sigmoid, tanh
from ..tile import BEFORE, DV, DZ_O, GATES, OF_H, ONE, REST, ZERO, C, M, vectors

U, V, G, O = GATES
Z_I, Z_F, Z_G, Z_O = OF_H
LOWEST = np.finfo(np.float32).min  # that is finite


@compiled
def forward(tile, n):
    w = floats(tile)
    for j in range(vectors(n)):
        z_i, z_f = w[U + j] + w[Z_I + j], w[V + j] + w[Z_F + j]
        k = w[REST + j] + (z_f if z_f < ZERO else ZERO) - above(z_f)
        a = z_i - (LOWEST if k < LOWEST else k)  # -inf, not NaN, where z_i and k are -inf
        u, g = sigmoid(a), tanh(w[G + j] + w[Z_G + j])
        o = sigmoid(w[O + j] + w[Z_O + j])
        w[U + j], w[V + j], w[G + j], w[O + j], w[C + j] = u, sigmoid(-z_f), g, o, w[C + j] + u * (g - w[C + j])
        w[REST + j] = (z_i if k < z_i else k) + above(a)


@compiled
def output(tile, n):
    w = floats(tile)
    for j in range(vectors(n)):
        w[M + j] = w[O + j] * w[C + j]


@compiled
def output_backward(tile, n):
    w = floats(tile)
    for j in range(vectors(n)):
        o, dm, q = w[O + j], w[M + j], w[BEFORE + j] + w[U + j] * (w[G + j] - w[BEFORE + j])
        w[DZ_O + j], w[DV + j] = dm * q * o * (ONE - o), dm * o


@compiled
def backward(tile, n):
    w = floats(tile)
    for j in range(vectors(n)):
        u, g, dq, dl = w[U + j], w[G + j], w[C + j], w[REST + j]
        stays, d = ONE - u, dq * (g - w[BEFORE + j])
        dk = stays * (dl - u * d)
        w[Z_I + j], w[Z_F + j] = u * (dl + stays * d), dk * w[V + j]
        w[Z_G + j], w[Z_O + j] = dq * u * (ONE - g * g), w[DZ_O + j]
        w[C + j], w[REST + j] = dq * stays, dk
