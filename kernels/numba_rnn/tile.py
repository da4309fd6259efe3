"""A tile: up to UNITS units of one sequence at one step, in rows of float32 numbers that have names.

Tiles and tensors are addresses. The address of an absent tensor is 0. All rows are in one piece of memory at constant
distances, so that LLVM knows that they do not overlap.
"""

from collections import namedtuple
from math import sqrt
from typing import Any

from numba import types
from numba.extending import intrinsic

from ..layer_norm import EPS
from .functions import F, compiled, floats, summing

UNITS, ROWS = 128, 17
SIZE = 4  # bytes of a number
GATES = 0, UNITS, 2 * UNITS, 3 * UNITS
"""The part of the pre-activations that comes from x, later the gates."""
OF_H = 4 * UNITS, 5 * UNITS, 6 * UNITS, 7 * UNITS
"""The part of the pre-activations that comes from h. Backward, the gradients of the pre-activations."""
CONSTANTS = 8 * UNITS, 9 * UNITS, 10 * UNITS  # peepholes, or the biases of h
C, REST, M, DZ_O, DV, BEFORE = (row * UNITS for row in range(11, ROWS))
"""C has c, and REST the other number of the cell state. Backward both have the gradients. M has the output of the cell.
DZ_O and DV have the gradients of the pre-activation of o and of v, which is c or LN(c). BEFORE has the state before
the step."""
row = namedtuple("Rows", "C REST M DZ_O DV BEFORE")(C, REST, M, DZ_O, DV, BEFORE)
"""The rows as arguments. Numba compiles a function again for each global number that it is given."""
ZERO, ONE = F(0), F(1)


@intrinsic
def vectors(context: Any, n: Any) -> Any:
    """Return n, rounded up to whole vectors of 16 units. Results past n are computed, but not stored.

    LLVM prefers vectors of 8 numbers for Intel's CPUs, even if they have AVX-512. An attribute of the calling function
    makes it use 16.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own `add` refuses values
        fifteen = context.get_constant(types.intp, 15)
        return builder.and_(builder.add(arguments[0], fifteen), builder.not_(fifteen))

    return types.intp(types.intp), generate


@compiled
def fill(t, at, value, n):
    """Set n numbers of a tensor to a value."""
    numbers = floats(t)
    for j in range(n):
        numbers[at + j] = value


@compiled
def move(to, to_at, t, at, n):
    """Copy n numbers of t to another tensor, if that is present. If t is absent, write zeros."""
    if to and t:
        numbers, new = floats(t), floats(to)
        for j in range(n):
            new[to_at + j] = numbers[at + j]
    elif to:
        fill(to, to_at, ZERO, n)


@compiled
def add(to, to_at, t, at, n):
    """Add n numbers of t to another tensor, if t is present."""
    if t:
        numbers, sums = floats(t), floats(to)
        for j in range(n):
            sums[to_at + j] += numbers[at + j]


@compiled
def multiply(to, to_at, t, at, n):
    """Multiply n numbers of a tensor by numbers of t, if both are present."""
    if to and t:
        numbers, products = floats(t), floats(to)
        for j in range(n):
            products[to_at + j] *= numbers[at + j]


@compiled
def zoneout(tile, new, shares, before, n):
    """Mix row `new` with the state before the step, whose shares are in row `shares`."""
    w = floats(tile)
    for j in range(n):
        x, share = w[new + j], w[shares + j]
        w[new + j] = x if share == ZERO else share * w[before + j] + (ONE - share) * x


@compiled
def zoneout_backward(tile, shares, d, n):
    """Split the gradient in row d: the part of the state before the step replaces its shares, the rest stays in d."""
    w = floats(tile)
    for j in range(n):
        share, x = w[shares + j], w[d + j]
        w[shares + j], w[d + j] = share * x, (ONE - share) * x


@summing
def moments(t, at, n):
    """Return the mean of n numbers of a tensor, and 1 / sqrt(variance + EPS)."""
    v, sum_, squares = floats(t), ZERO, ZERO
    for j in range(n):
        sum_ += v[at + j]
    mean = sum_ / F(n)
    for j in range(n):
        squares += (v[at + j] - mean) * (v[at + j] - mean)
    return mean, ONE / sqrt(squares / F(n) + F(EPS))


@compiled
def normalise(t, at, mean, scale, gain, bias, start, n):
    """Replace n numbers of a tensor by their layer norm. Gain and bias are read from index `start` on."""
    v, factors = floats(t), floats(gain)
    for j in range(n):
        v[at + j] = (v[at + j] - mean) * scale * factors[start + j]
    add(t, at, bias, start, n)


@summing
def normalise_backward(t, at, of, of_at, mean, scale, gain, n):
    """Replace the gradient of a layer norm, n numbers of t, by the gradient of its input, which is in `of`."""
    d, v, factors, sum_, product = floats(t), floats(of), floats(gain), ZERO, ZERO
    for j in range(n):
        dy = d[at + j] * factors[j]
        sum_ += dy
        product += dy * (v[of_at + j] - mean)
    sum_, product = sum_ / F(n), product * scale * scale / F(n)
    for j in range(n):
        d[at + j] = scale * (d[at + j] * factors[j] - sum_ - product * (v[of_at + j] - mean))
