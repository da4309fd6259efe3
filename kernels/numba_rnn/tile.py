"""A tile: up to UNITS units of one sequence at one step, in rows of float32 numbers that have names.

All rows are in one piece of memory at constant distances, so that LLVM knows that they do not overlap. A tile and
tensors are addresses, a tensor's is 0 where a call has none; `at` is where the units begin in it.
"""

from collections import namedtuple

import numpy as np

from .functions import compiled, flags, floats

UNITS = 128
ROWS = 17
GATES = (0, UNITS, 2 * UNITS, 3 * UNITS)
"""Of pre-activations the part from x, then the gates."""
OF_H = tuple(4 * UNITS + gate for gate in GATES)
"""Of pre-activations the part from h; backward their gradients."""
CONSTANTS = tuple(row * UNITS for row in (8, 9, 10))  # peepholes, or the biases of h
C, REST, M, DZ_O, DV, BEFORE = (row * UNITS for row in (11, 12, 13, 14, 15, 16))
"""c, and what a cell keeps besides; backward their gradients. What h is made of. Gradients of the pre-activation of o,
and of v, which is c or LN(c). c before the step."""
row = namedtuple("Rows", "C REST M DZ_O DV BEFORE")(C, REST, M, DZ_O, DV, BEFORE)
"""The same, to be passed on: each global number is a type of its own to Numba, for which it compiles a function again."""
ZERO, ONE = np.float32(0), np.float32(1)


@compiled
def vectors(n):
    """How many units to compute where there are n: whole vectors of the CPU's. What is past n is not stored."""
    return (n + 15) // 16 * 16


@compiled
def fill(tile, row, value, n):
    w = floats(tile)
    for j in range(n):
        w[row + j] = value


@compiled
def copy(tile, to, row, n):
    w = floats(tile)
    for j in range(n):
        w[to + j] = w[row + j]


@compiled
def add_rows(tile, to, row, n):
    w = floats(tile)
    for j in range(n):
        w[to + j] += w[row + j]


@compiled
def load(tile, row, x, at, n):
    """A row from x; zeros where there is no x."""
    if x:
        w, t = floats(tile), floats(x)
        for j in range(n):
            w[row + j] = t[at + j]
    else:
        fill(tile, row, ZERO, n)


@compiled
def store(x, at, tile, row, n):
    """A row to x, if there is an x."""
    if x:
        w, t = floats(tile), floats(x)
        for j in range(n):
            t[at + j] = w[row + j]


@compiled
def clear(x, at, n):
    """Zeros to x, if there is an x."""
    if x:
        t = floats(x)
        for j in range(n):
            t[at + j] = ZERO


@compiled
def add(tile, row, x, at, n):
    if x:
        w, t = floats(tile), floats(x)
        for j in range(n):
            w[row + j] += t[at + j]


@compiled
def multiply(tile, row, x, at, n):
    if x:
        w, t = floats(tile), floats(x)
        for j in range(n):
            w[row + j] *= t[at + j]


@compiled
def load_shares(tile, row, mask, rate, at, n):
    """What share of the state before stays."""
    w = floats(tile)
    for j in range(n):
        if rate:
            w[row + j] = floats(rate)[0]
        else:
            w[row + j] = ONE if flags(mask)[at + j] else ZERO


@compiled
def blend(tile, row, before, shares, n):
    """With the state before, by shares."""
    w = floats(tile)
    for j in range(n):
        x, share = w[row + j], w[shares + j]
        w[row + j] = x if share == ZERO else share * w[before + j] + (ONE - share) * x


@compiled
def divide(tile, stays, changes, n):
    """A gradient, in `changes`, and shares, in `stays`: into what flows to the state before, and to the new one."""
    w = floats(tile)
    for j in range(n):
        share, d = w[stays + j], w[changes + j]
        w[stays + j], w[changes + j] = share * d, (ONE - share) * d
