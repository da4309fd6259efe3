"""A product of matrices, in tiles of SEQUENCES rows and COLUMNS columns, whose sums stay in the nearest cache."""

import numpy as np

from .functions import compiled, floats

SEQUENCES, COLUMNS = 4, 128
ZERO = np.float32(0)


@compiled
def product(x, x_row, weight, out, out_row, count, K, N, scratch):
    """out [count, N] = x [count, K] weight [K, N]; rows of x and out are x_row and out_row elements apart.

    All are addresses; scratch is [SEQUENCES, COLUMNS].
    """
    x_, w, out_, sums = floats(x), floats(weight), floats(out), floats(scratch)
    last, whole = (count - 1) * x_row, K // 4 * 4  # four rows of the weight at a time save loads and stores of sums
    for n in range(0, N, COLUMNS):
        columns = min(COLUMNS, N - n)
        for b in range(0, count, SEQUENCES):
            at = b * x_row  # past the last sequence the last again, for nothing
            at_1, at_2, at_3 = min(at + x_row, last), min(at + 2 * x_row, last), min(at + 3 * x_row, last)
            for j in range(SEQUENCES * COLUMNS):
                sums[j] = ZERO
            for k in range(0, whole, 4):
                a0, b0, c0, d0 = x_[at + k], x_[at_1 + k], x_[at_2 + k], x_[at_3 + k]
                a1, b1, c1, d1 = x_[at + k + 1], x_[at_1 + k + 1], x_[at_2 + k + 1], x_[at_3 + k + 1]
                a2, b2, c2, d2 = x_[at + k + 2], x_[at_1 + k + 2], x_[at_2 + k + 2], x_[at_3 + k + 2]
                a3, b3, c3, d3 = x_[at + k + 3], x_[at_1 + k + 3], x_[at_2 + k + 3], x_[at_3 + k + 3]
                row = k * N + n
                for j in range(columns):
                    w0, w1, w2, w3 = w[row + j], w[row + N + j], w[row + 2 * N + j], w[row + 3 * N + j]
                    sums[j] += (a0 * w0 + a1 * w1) + (a2 * w2 + a3 * w3)
                    sums[COLUMNS + j] += (b0 * w0 + b1 * w1) + (b2 * w2 + b3 * w3)
                    sums[2 * COLUMNS + j] += (c0 * w0 + c1 * w1) + (c2 * w2 + c3 * w3)
                    sums[3 * COLUMNS + j] += (d0 * w0 + d1 * w1) + (d2 * w2 + d3 * w3)
            for k in range(whole, K):
                a0, b0, c0, d0 = x_[at + k], x_[at_1 + k], x_[at_2 + k], x_[at_3 + k]
                for j in range(columns):
                    w0 = w[k * N + n + j]
                    sums[j] += a0 * w0
                    sums[COLUMNS + j] += b0 * w0
                    sums[2 * COLUMNS + j] += c0 * w0
                    sums[3 * COLUMNS + j] += d0 * w0
            for s in range(min(SEQUENCES, count - b)):
                to = (b + s) * out_row + n
                for j in range(columns):
                    out_[to + j] = sums[s * COLUMNS + j]
