"""Layer norms (norm.py) in the step family. A tile contributes two numbers a sequence, [tiles, B, 2] float32, which all
programs read after a grid-wide barrier: forward the mean and the sum of squares about it, backward two sums. They are
combined in the same order every time."""

from collections import namedtuple

import triton
import triton.language as tl

from . import indexing, norm
from .features import nothing

AT_ONCE = tl.constexpr(16)  # tiles whose numbers are loaded together

# What the norm made of rows of W_hh h: unit [*, K], gain [K]; scale and the means of `normalise_backward`, [rows].
NormedRows = namedtuple("NormedRows", "unit_ptr gain_ptr scale mean_d mean_d_unit")


@triton.jit
def store_pair(pairs_ptr, tile, B, first, second):
    """A tile's two numbers of each of its sequences, [BB]."""
    pair_ptr = pairs_ptr + (tile.unit_tile.to(tl.int64) * B + tile.sequence.index) * 2
    tl.store(pair_ptr, first, mask=tile.sequence.in_batch)
    tl.store(pair_ptr + 1, second, mask=tile.sequence.in_batch)


@triton.jit
def load_pairs(pairs_ptr, tile, index, mask, B, S: tl.constexpr):
    """The numbers of some tiles, (first, second), each [AT_ONCE, BB]; zero where there is no such tile."""
    pair_ptr = pairs_ptr + (tile[:, None].to(tl.int64) * B + index[None, :]) * 2
    is_there = (tile < S.TILES)[:, None] & mask[None, :]
    first = tl.load(pair_ptr, mask=is_there, other=0.0, cache_modifier=".cg")
    return first, tl.load(pair_ptr + 1, mask=is_there, other=0.0, cache_modifier=".cg")


@triton.jit
def store_moments(pairs_ptr, tile, v, mask, COUNT: tl.constexpr, B, S: tl.constexpr):
    """Store the mean of a tile's v [BB, columns], COUNT columns a unit, and the sum of squares about it."""
    mean = tl.sum(tl.where(mask, v, 0.0), axis=1) / (COUNT * tl.minimum(S.H - tile.unit_tile * S.UNITS, S.UNITS))
    distance = tl.where(mask, v - mean[:, None], 0.0)
    store_pair(pairs_ptr, tile, B, mean, tl.sum(distance * distance, axis=1))


@triton.jit
def moments_of_tiles(pairs_ptr, sequence, B, COUNT: tl.constexpr, S: tl.constexpr):
    """(mean, scale) of COUNT * H elements whose moments tiles have stored, each [BB, 1]."""
    index, in_batch = sequence.index, sequence.in_batch
    mean = tl.zeros(index.shape, tl.float32)
    for start in range(0, S.TILES, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        means, _ = load_pairs(pairs_ptr, tile, index, in_batch, B, S)
        mean += tl.sum(means * norm.units_of(tile, S)[:, None], axis=0)
    mean = mean / S.H
    squares = tl.zeros(index.shape, tl.float32)
    for start in range(0, S.TILES, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        means, of_tiles = load_pairs(pairs_ptr, tile, index, in_batch, B, S)
        squares += tl.sum(
            norm.squares_about(mean[None, :], means, of_tiles, COUNT * norm.units_of(tile, S)[:, None]), axis=0
        )
    return mean[:, None], tl.rsqrt(squares / (COUNT * S.H) + norm.EPS)[:, None]


@triton.jit
def means_of_tiles(pairs_ptr, index, mask, B, COUNT: tl.constexpr, S: tl.constexpr):
    """The means of `normalise_backward`, each [BB]: sums that tiles have stored, divided by COUNT * H."""
    first = tl.zeros(index.shape, tl.float32)
    second = tl.zeros(index.shape, tl.float32)
    for start in range(0, S.TILES, AT_ONCE):
        some_first, some_second = load_pairs(pairs_ptr, start + tl.arange(0, AT_ONCE), index, mask, B, S)
        first += tl.sum(some_first, axis=0)
        second += tl.sum(some_second, axis=0)
    return first / (COUNT * S.H), second / (COUNT * S.H)


@triton.jit
def product_at(tile, S: tl.constexpr):
    """Where a tile of W_hh h lies in [B, tiles, 4 BH]."""
    number = tile.sequence.index[:, None].to(tl.int64) * S.TILES + tile.unit_tile
    return number * (4 * S.UNITS) + tl.arange(0, 4 * S.UNITS)[None, :]


@triton.jit
def store_product(z, product_ptr, norm_hh, tile, B, S: tl.constexpr):
    """Store W_hh h [BB, 4 BH] of a tile, and its moments."""
    tl.store(product_ptr + product_at(tile, S), z, mask=tile.sequence.in_batch[:, None])
    _, unit = indexing.columns_of_gates(tile.unit_tile, S)
    store_moments(norm_hh.pairs_ptr, tile, z, (unit < S.H)[None, :], 4, B, S)


@triton.jit
def load_product(product_ptr, norm_hh, tile, B, S: tl.constexpr):
    """LN(W_hh h) [BB, 4 BH] of a tile, once all tiles are stored."""
    column, unit = indexing.columns_of_gates(tile.unit_tile, S)
    z_ptr = product_ptr + product_at(tile, S)
    z = tl.load(z_ptr, mask=tile.sequence.in_batch[:, None], other=0.0, cache_modifier=".cg")
    mean, scale = moments_of_tiles(norm_hh.pairs_ptr, tile.sequence, B, 4, S)
    gain = tl.load(norm_hh.gain_ptr + column, mask=unit < S.H, other=0.0).to(tl.float32)
    return norm.normalise((z,), mean, scale, ((gain[None, :],), (0.0,)))[0]


@triton.jit
def store_c(o, c, cell_ptr, norm_c, tile, B, S: tl.constexpr):
    """With a norm of c: store o and c of a tile, [BB, BH], which the output needs, and the moments of c."""
    if norm_c.gain_ptr is not None:
        cells = tile.cells
        tl.store(cell_ptr + cells.state_at, o, mask=cells.valid)
        tl.store(cell_ptr + tl.cast(B, tl.int64) * S.H + cells.state_at, c, mask=cells.valid)
        store_moments(norm_c.pairs_ptr, tile, c, (tile.unit < S.H)[None, :], 1, B, S)


@triton.jit
def load_c(cell_ptr, norm_c, tile, B, S: tl.constexpr):
    """(o, LN(c)) [BB, BH] of a tile, once all tiles are stored."""
    cells = tile.cells
    o = tl.load(cell_ptr + cells.state_at, mask=cells.valid, other=0.0)
    c = tl.load(cell_ptr + tl.cast(B, tl.int64) * S.H + cells.state_at, mask=cells.valid, other=0.0)
    mean, scale = moments_of_tiles(norm_c.pairs_ptr, tile.sequence, B, 1, S)
    return o, norm.normalise((c,), mean, scale, norm.load_affine(norm_c, tile.unit[None, :], 1, S.H))[0]


@triton.jit
def load_normed(of, tile, COUNT: tl.constexpr, H: tl.constexpr):
    """What a norm made of a tile; its scale is [BB, 1]."""
    rows = indexing.Position(None, tile.position.row[:, None], None, tile.position.valid[:, None], None, None)
    return norm.load_normed(of, norm.load_affine(of, tile.unit[None, :], COUNT, H), rows, tile.cells, H)


@triton.jit
def pairs_of_step(of, step, B, S: tl.constexpr):
    """Those of W_hh h: two steps alternate, since one is written while the other is read."""
    return of.pairs_ptr + tl.cast(step % 2, tl.int64) * (S.TILES * 2) * B


@triton.jit
def store_sums(d, normed, pairs_ptr, tile, B, DTYPE: tl.constexpr):
    """Of the gradient of LN(v) of a tile, which is stored in DTYPE, the sums that backward needs."""
    _, sum_d, sum_d_unit = norm.unit_backward(d, normed, DTYPE)
    store_pair(pairs_ptr, tile, B, tl.sum(sum_d, 1), tl.sum(sum_d_unit, 1))


@triton.jit
def c_backward(d, norm_c, normed, tile, B, S: tl.constexpr):
    """Gradient of LN(c) of a tile -> of c, once all tiles are stored."""
    if norm_c.gain_ptr is not None:
        d_unit, _, _ = norm.unit_backward((d,), normed, tl.float32)
        means = means_of_tiles(norm_c.pairs_ptr, tile.sequence.index, tile.position.valid, B, 1, S)
        d = norm.normed_backward(d_unit, normed, means[0][:, None], means[1][:, None])[0]
    return d


@triton.jit
def load_normed_rows(norm_hh, tile, step, after, first, B, S: tl.constexpr):
    """What the norm of W_hh h made of the step after, where a tile's sequences are `after`: columns from `first` on."""
    normed = nothing()
    if norm_hh.gain_ptr is not None:
        pairs_ptr = pairs_of_step(norm_hh, step + 1, B, S)
        means = means_of_tiles(pairs_ptr, tile.sequence.index, tile.position.valid, B, 4, S)
        scale = tl.load(norm_hh.scale_ptr + after.row, mask=after.continues, other=0.0)
        normed = NormedRows(norm_hh.unit_ptr, norm_hh.gain_ptr + first, scale, means[0], means[1])
    return normed


@triton.jit
def rows_backward(a, normed, at, mask, k, K: tl.constexpr):
    """Gradient a of LN(W_hh h), columns k of rows, which lie `at` -> of W_hh h."""
    if len(normed) > 0:
        unit = tl.load(normed.unit_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(normed.gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        means = normed.mean_d[:, None], normed.mean_d_unit[:, None]
        d = norm.normalise_backward(gain[None, :] * a.to(tl.float32), unit, normed.scale[:, None], *means)
        a = tl.where(mask, d, 0.0).to(a.dtype)
    return a
