"""Layer norms (norm.py) in the resident family, where a program has all units. Arguments are tuples of CELLS. Sums
are pairs, of a thread's two sequences: that of cell number n is n % 2."""

import triton
import triton.language as tl

from . import norm
from .equations import cell_forward
from .features import nothing
from .indexing import Cells, Position


@triton.jit
def sum_over_units(values):
    """[THREADS] float32 of each cell -> a pair of [THREADS]: the sums over all units."""
    THREADS: tl.constexpr = values[0].shape[0]
    even = tl.zeros((THREADS,), tl.float32)
    odd = tl.zeros((THREADS,), tl.float32)
    for n in tl.static_range(0, len(values), 2):
        even += values[n]
        odd += values[n + 1]
    both = tl.reshape(tl.join(even, odd), (THREADS // 4, 4, 2))  # [warps and columns, quarters, sequences]
    total = tl.broadcast_to(tl.sum(both, axis=0)[None, :, :], (THREADS // 4, 4, 2))
    return tl.split(tl.reshape(total, (THREADS, 2)))


@triton.jit
def moments(v, owned, H: tl.constexpr):
    """A tuple of values of each cell -> (mean, scale) over all units."""
    COUNT: tl.constexpr = len(v[0]) * H
    sums, squares = (), ()
    for n in tl.static_range(len(v)):
        total = v[n][0]
        for k in tl.static_range(1, len(v[n])):
            total += v[n][k]
        sums = sums + (total,)
    even, odd = sum_over_units(sums)
    mean = (even / COUNT, odd / COUNT)
    for n in tl.static_range(len(v)):
        total = tl.zeros_like(even)
        for k in tl.static_range(len(v[n])):
            distance = tl.where(owned.units[n] < H, v[n][k] - mean[n % 2], 0.0)
            total += distance * distance
        squares = squares + (total,)
    even, odd = sum_over_units(squares)
    return mean, (tl.rsqrt(even / COUNT + norm.EPS), tl.rsqrt(odd / COUNT + norm.EPS))


@triton.jit
def normalise_products(z, norm_hh, affine, owned, H: tl.constexpr):
    """W_hh h of each cell -> LN(W_hh h)."""
    normed = z
    if norm_hh.gain_ptr is not None:
        mean, scale = moments(z, owned, H)
        normed = ()
        for n in tl.static_range(len(z)):
            normed = normed + (norm.normalise(z[n], mean[n % 2], scale[n % 2], affine[n]),)
    return normed


@triton.jit
def moments_of_c(norm_c, before, z, constants, owned, S: tl.constexpr):
    """(mean, scale) of c as the cells compute it. (They do so again, and the compiler leaves one of the two out.)"""
    found = nothing()
    if norm_c.gain_ptr is not None:
        c = ()
        for n in tl.static_range(len(z)):
            c = c + ((cell_forward(before.x[n], z[n], before.c[n], (), constants[n], S)[1],),)
        found = moments(c, owned, S.H)
    return found


@triton.jit
def normalise_c(c, norm_c, found, affine, n: tl.constexpr):
    """c of cell number n -> LN(c)."""
    if norm_c.gain_ptr is not None:
        c = norm.normalise((c,), found[0][n % 2], found[1][n % 2], affine)[0]
    return c


@triton.jit
def load_normed(of, now, owned, COUNT: tl.constexpr, H: tl.constexpr):
    """What a norm made of each cell."""
    normed = ()
    for n in tl.static_range(len(owned.units)):
        affine = norm.load_affine(of, owned.units[n], COUNT, H)
        normed = normed + (norm.load_normed(of, affine, Position(*now.positions[n]), Cells(*now.cells[n]), H),)
    return normed


@triton.jit
def backward_over_block(d, of, normed, DTYPE: tl.constexpr, H: tl.constexpr):
    """Gradients of LN(v) of each cell, as they are stored in DTYPE -> of v."""
    dv = d
    if of.gain_ptr is not None:
        COUNT: tl.constexpr = len(d[0])
        d_unit, sums, sums_unit, dv = (), (), (), ()
        for n in tl.static_range(len(d)):
            by_unit, sum_d, sum_d_unit = norm.unit_backward(d[n], normed[n], DTYPE)
            d_unit, sums, sums_unit = d_unit + (by_unit,), sums + (sum_d,), sums_unit + (sum_d_unit,)
        sum_d, sum_d_unit = sum_over_units(sums), sum_over_units(sums_unit)
        for n in tl.static_range(len(d)):
            means = sum_d[n % 2] / (COUNT * H), sum_d_unit[n % 2] / (COUNT * H)
            dv = dv + (norm.normed_backward(d_unit[n], normed[n], *means),)
    return dv
