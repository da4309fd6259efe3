"""The GRU cell: rows are r, z, n and s, of gradients n, r, z and s; constants the biases of h. C is h."""

from ..functions import compiled, floats, sigmoid, tanh
from ..tile import BEFORE, CONSTANTS, GATES, OF_H, ONE, C, vectors

R, Z, N, S = GATES
Z_N, Z_R, Z_Z, Z_S = OF_H
B_R, B_Z, B_N = CONSTANTS


@compiled
def forward(tile, n):
    w = floats(tile)
    for j in range(vectors(n)):
        r = sigmoid(w[R + j] + w[Z_R + j] + w[B_R + j])
        z = sigmoid(w[Z + j] + w[Z_Z + j] + w[B_Z + j])
        s = w[S + j] + w[Z_S + j] + w[B_N + j]
        g = tanh(w[N + j] + r * s)
        w[R + j], w[Z + j], w[N + j], w[S + j], w[C + j] = r, z, g, s, g + z * (w[C + j] - g)


@compiled
def backward(tile, n):
    w = floats(tile)
    for j in range(vectors(n)):
        r, z, g, s, d = w[R + j], w[Z + j], w[N + j], w[S + j], w[C + j]
        dz_n = d * (ONE - z) * (ONE - g * g)
        w[Z_N + j], w[Z_R + j] = dz_n, dz_n * s * r * (ONE - r)
        w[Z_Z + j], w[Z_S + j] = d * (w[BEFORE + j] - g) * z * (ONE - z), dz_n * r
        w[C + j] = d * z
