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
    x_, weight_, out_, sums, last = floats(x), floats(weight), floats(out), floats(scratch), (count - 1) * x_row
    for n in range(0, N, COLUMNS):
        columns = min(COLUMNS, N - n)
        for b in range(0, count, SEQUENCES):
            at = b * x_row  # past the last sequence the last again, for nothing
            at_1, at_2, at_3 = min(at + x_row, last), min(at + 2 * x_row, last), min(at + 3 * x_row, last)
            for j in range(SEQUENCES * COLUMNS):
                sums[j] = ZERO
            for k in range(0, K, 2):  # two rows of the weight at a time, for half of the loads and stores of sums
                pair = k + 1 < K
                one = k + 1 if pair else k
                a0, b0, c0, d0 = x_[at + k], x_[at_1 + k], x_[at_2 + k], x_[at_3 + k]
                a1, b1, c1, d1 = ZERO, ZERO, ZERO, ZERO
                if pair:
                    a1, b1, c1, d1 = x_[at + one], x_[at_1 + one], x_[at_2 + one], x_[at_3 + one]
                row_0, row_1 = k * N + n, one * N + n
                for j in range(columns):
                    w0, w1 = weight_[row_0 + j], weight_[row_1 + j]
                    sums[j] += a0 * w0 + a1 * w1
                    sums[COLUMNS + j] += b0 * w0 + b1 * w1
                    sums[2 * COLUMNS + j] += c0 * w0 + c1 * w1
                    sums[3 * COLUMNS + j] += d0 * w0 + d1 * w1
            for s in range(min(SEQUENCES, count - b)):
                to = (b + s) * out_row + n
                for j in range(columns):
                    out_[to + j] = sums[s * COLUMNS + j]
