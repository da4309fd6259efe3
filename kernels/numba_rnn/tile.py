"""A tile: up to UNITS units of one sequence at one step, in rows of float32 numbers that have names.

Tiles and tensors are addresses, 0 for a tensor that a call has not. All rows are in one piece of memory at constant
distances, so that LLVM knows that they do not overlap.
"""

from collections import namedtuple
from math import sqrt

from ..layer_norm import EPS
from .functions import F, compiled, floats, summing

UNITS, ROWS = 128, 17
SIZE = 4  # bytes of a number
GATES = 0, UNITS, 2 * UNITS, 3 * UNITS
"""Of pre-activations the part from x, then the gates."""
OF_H = 4 * UNITS, 5 * UNITS, 6 * UNITS, 7 * UNITS
"""Of pre-activations the part from h; backward their gradients."""
CONSTANTS = 8 * UNITS, 9 * UNITS, 10 * UNITS  # peepholes, or the biases of h
C, REST, M, DZ_O, DV, BEFORE = (row * UNITS for row in range(11, ROWS))
"""c, and what a cell keeps besides; backward their gradients. What h is made of. Gradients of the pre-activation of o,
and of v, which is c or LN(c). The state before the step."""
row = namedtuple("Rows", "C REST M DZ_O DV BEFORE")(C, REST, M, DZ_O, DV, BEFORE)
"""To be passed on: of each global number by itself Numba would make a type, and compile a function for each."""
ZERO, ONE = F(0), F(1)


@compiled
def vectors(n):
    """How many of n units to compute: whole vectors of the CPU. What is past n is not stored."""
    return (n + 15) // 16 * 16


@compiled
def fill(t, at, value, n):
    """Set n numbers of a tensor to a value."""
    numbers = floats(t)
    for j in range(n):
        numbers[at + j] = value


@compiled
def move(to, to_at, t, at, n):
    """Numbers of t to another tensor, if that is there; zeros, if t is not."""
    if to and t:
        numbers, new = floats(t), floats(to)
        for j in range(n):
            new[to_at + j] = numbers[at + j]
    elif to:
        fill(to, to_at, ZERO, n)


@compiled
def add(to, to_at, t, at, n):
    """Add numbers of t to another tensor; nothing, if t is not there."""
    if t:
        numbers, sums = floats(t), floats(to)
        for j in range(n):
            sums[to_at + j] += numbers[at + j]


@compiled
def multiply(to, to_at, t, at, n):
    """Multiply numbers of a tensor by those of t, if both are there."""
    if to and t:
        numbers, products = floats(t), floats(to)
        for j in range(n):
            products[to_at + j] *= numbers[at + j]


@compiled
def zoneout(tile, new, shares, before, n):
    """`new`, mixed with the state before, by the shares of it that stay."""
    w = floats(tile)
    for j in range(n):
        x, share = w[new + j], w[shares + j]
        w[new + j] = x if share == ZERO else share * w[before + j] + (ONE - share) * x


@compiled
def zoneout_backward(tile, shares, d, n):
    """A gradient, into what flows to the state before, in place of the shares, and to the new one."""
    w = floats(tile)
    for j in range(n):
        share, x = w[shares + j], w[d + j]
        w[shares + j], w[d + j] = share * x, (ONE - share) * x


@summing
def moments(t, at, n):
    """The mean of n numbers of a tensor, and 1 / sqrt(variance + EPS)."""
    v, sum_, squares = floats(t), ZERO, ZERO
    for j in range(n):
        sum_ += v[at + j]
    mean = sum_ / F(n)
    for j in range(n):
        squares += (v[at + j] - mean) * (v[at + j] - mean)
    return mean, ONE / sqrt(squares / F(n) + F(EPS))


@compiled
def normalise(t, at, mean, scale, gain, bias, start, n):
    """Replace n numbers of a tensor by their layer norm; gain and bias are read from `start` on."""
    v, factors = floats(t), floats(gain)
    for j in range(n):
        v[at + j] = (v[at + j] - mean) * scale * factors[start + j]
    add(t, at, bias, start, n)


@summing
def normalise_backward(t, at, of, of_at, mean, scale, gain, n):
    """Replace the gradient of a layer norm by the gradient of the n numbers `of` that were normalised."""
    d, v, factors, sum_, product = floats(t), floats(of), floats(gain), ZERO, ZERO
    for j in range(n):
        dy = d[at + j] * factors[j]
        sum_ += dy
        product += dy * (v[of_at + j] - mean)
    sum_, product = sum_ / F(n), product * scale * scale / F(n)
    for j in range(n):
        d[at + j] = scale * (d[at + j] * factors[j] - sum_ - product * (v[of_at + j] - mean))
