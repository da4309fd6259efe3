"""Layer norm (Ba, Kiros & Hinton, 2016) over units that many tiles share: LN(v) = gain (v - mean) scale + bias.

A tile contributes two numbers a sequence, in a tensor [tiles, B, 2] that all can read after a grid-wide barrier:
forward the mean and the sum of squares about it, backward two sums. They are combined in the same order every time.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)  # as torch.nn.LayerNorm, and kernels/layer_norm.py
AT_ONCE = tl.constexpr(16)  # tiles whose numbers are loaded together


@triton.jit
def moments(v, mask, count):
    """v [rows, n], with `count` valid elements per row -> (mean, sum of squares about it), each [rows]."""
    mean = tl.sum(tl.where(mask, v, 0.0), axis=1) / count
    distance = tl.where(mask, v - mean[:, None], 0.0)
    return mean, tl.sum(distance * distance, axis=1)


@triton.jit
def normalise(v, mean, scale, gain, bias):
    """LN(v), [rows, units]; mean and scale [rows, 1], gain and bias [1, units]."""
    return gain * ((v - mean) * scale) + bias


@triton.jit
def normalise_backward(d, unit, scale, mean_d, mean_d_unit):
    """Gradient of unit = (v - mean) scale -> of v. The means are those of d and of d * unit over all units."""
    return scale * (d - mean_d - unit * mean_d_unit)


@triton.jit
def normalise_gates(z, mean, scale, gain):
    """LN(z) of each of a tuple of gates, without a bias."""
    normed = ()
    for n in tl.static_range(len(z)):
        normed = normed + (normalise(z[n], mean, scale, gain[n], 0.0),)
    return normed


@triton.jit
def gates_of_unit(dz, gain, unit, DTYPE: tl.constexpr):
    """Gradients of all gates LN(W_hh h), rounded as they are stored -> (gradients d of unit, over the gates the sums of
    d and of d * unit)."""
    d = ()
    for n in tl.static_range(4):
        d = d + (gain[n] * dz[n].to(DTYPE).to(tl.float32),)
    sum_d_unit = (d[0] * unit[0] + d[1] * unit[1]) + (d[2] * unit[2] + d[3] * unit[3])
    return d, (d[0] + d[1]) + (d[2] + d[3]), sum_d_unit


@triton.jit
def normalise_gates_backward(d, unit, scale, mean_d, mean_d_unit):
    """`normalise_backward` of each of a tuple of gates."""
    dz = ()
    for n in tl.static_range(len(d)):
        dz = dz + (normalise_backward(d[n], unit[n], scale, mean_d, mean_d_unit),)
    return dz


@triton.jit
def squares_about(mean, own_mean, own_squares, count):
    """Of `count` elements: their sum of squares about any mean, from that about their own (Chan, Golub & LeVeque,
    1979). About the mean of all, the sums of the parts can be added up."""
    distance = own_mean - mean
    return own_squares + count * distance * distance


@triton.jit
def store_pair(pairs_ptr, tile, B, first, second):
    """A tile's two numbers of each of its sequences, [BB]."""
    at = pairs_ptr + (tile.unit_tile.to(tl.int64) * B + tile.sequence.index) * 2
    tl.store(at, first, mask=tile.sequence.in_batch)
    tl.store(at + 1, second, mask=tile.sequence.in_batch)


@triton.jit
def load_pairs(pairs_ptr, tile, index, mask, B, TILES: tl.constexpr):
    """The numbers of some tiles, (first, second), each [AT_ONCE, BB]; zero where there is no such tile."""
    at = pairs_ptr + (tile[:, None].to(tl.int64) * B + index[None, :]) * 2
    there = (tile < TILES)[:, None] & mask[None, :]
    first = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    return first, tl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def sums_of_tiles(pairs_ptr, index, mask, B, S: tl.constexpr):
    """Over all units: (sum of the first numbers, of the second), each [BB]."""
    TILES: tl.constexpr = (S.H + S.UNITS - 1) // S.UNITS
    first = tl.zeros(index.shape, tl.float32)
    second = tl.zeros(index.shape, tl.float32)
    for start in range(0, TILES, AT_ONCE):
        some_first, some_second = load_pairs(pairs_ptr, start + tl.arange(0, AT_ONCE), index, mask, B, TILES)
        first += tl.sum(some_first, axis=0)
        second += tl.sum(some_second, axis=0)
    return first, second


@triton.jit
def moments_of_tiles(pairs_ptr, sequence, B, GATES: tl.constexpr, S: tl.constexpr):
    """(mean, scale) of GATES * H elements whose moments tiles have stored, each [BB]."""
    TILES: tl.constexpr = (S.H + S.UNITS - 1) // S.UNITS
    index, in_batch = sequence.index, sequence.in_batch
    mean = tl.zeros(index.shape, tl.float32)
    for start in range(0, TILES, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        means, _ = load_pairs(pairs_ptr, tile, index, in_batch, B, TILES)
        mean += tl.sum(means * units_of(tile, S)[:, None], axis=0)
    mean = mean / S.H
    squares = tl.zeros(index.shape, tl.float32)
    for start in range(0, TILES, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        means, own = load_pairs(pairs_ptr, tile, index, in_batch, B, TILES)
        squares += tl.sum(squares_about(mean[None, :], means, own, GATES * units_of(tile, S)[:, None]), axis=0)
    return mean, tl.rsqrt(squares / (GATES * S.H) + EPS)


@triton.jit
def units_of(tile, S: tl.constexpr):
    """How many units a tile has, or a program, float32; 0 past the last."""
    return tl.minimum(tl.maximum(S.H - tile * S.UNITS, 0), S.UNITS).to(tl.float32)
