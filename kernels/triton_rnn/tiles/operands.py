"""What the step and the held family multiply, and what they add up: rows that other programs wrote, columns of W_hh."""

from collections import namedtuple

import triton
import triton.language as tl

from ..cell import indexing, noise
from ..parameters import Arrivals

# Rows of a tensor: where each begins [rows]; which there are [rows], the others are zeros; factors of them, which begin
# at factors_at [rows], or None. (No function of Triton 3.4 returns None, in a tuple neither: so none returns Rows.)
Rows = namedtuple("Rows", "ptr at mask factors_ptr factors_at")
# Columns of weights: where each begins [columns]; which there are [columns]; how far it is from one k to the next.
# `first`, of both, is where a part of K begins, counted within the head, see indexing.by_gate.
Columns = namedtuple("Columns", "ptr at mask stride")


@triton.jit
def load_rows(rows, k, K: tl.constexpr, S: tl.constexpr, first=0):
    """Columns k of the rows, times the factors, [rows, k]; zeros past K."""
    column = indexing.units_at(indexing.by_gate(k, first, S), S)
    in_a = rows.mask[:, None] & (k < K)[None, :]
    a = tl.load(rows.ptr + (rows.at[:, None] + column[None, :]), mask=in_a, other=0.0, cache_modifier=".cg")
    return noise.dropout(a, rows.factors_ptr, rows.factors_at[:, None] + column[None, :], in_a)


@triton.jit
def load_weights(columns, k_start, K: tl.constexpr, S: tl.constexpr, first=0):
    """BLOCK_K rows of Columns, from k_start on."""
    offset = tl.arange(0, S.BLOCK_K)
    row, start = offset, k_start
    if S.HEADS > 1:
        row, start = indexing.by_gate(k_start + offset, first, S).to(tl.int64), 0
    k_ptr = columns.ptr + columns.at[None, :] + row[:, None] * columns.stride
    start = tl.cast(start, tl.int64) * columns.stride  # K times the stride may be more than int32 holds
    return tl.load(k_ptr + start, mask=(k_start + offset < K)[:, None] & columns.mask[None, :], other=0.0)


@triton.jit
def weights_of_gates(weight_hh_ptr, unit_tile, S: tl.constexpr):
    """Columns of W_hh, four gates for each unit of a tile, as split_gates takes them; of a gate that h does not reach
    there is none."""
    FIRST: tl.constexpr = 4 - S.GATES
    n = tl.arange(0, 4 * S.UNITS)
    place = unit_tile * S.UNITS + n // 4
    column, mask = n % 4 * S.H + indexing.units_at(place, S), place < S.D
    if FIRST > 0:
        mask &= column >= FIRST * S.H
        column -= FIRST * S.H
    return Columns(weight_hh_ptr, column.to(tl.int64) * S.D, mask, 1)


@triton.jit
def dgates_of_part(dgates_ptr, row, part, S: tl.constexpr):
    """Where a part of K lies in dgates [T*B, 4H]: (pointer, where the rows begin). With heads parts are not neighbours,
    so by_gate finds them."""
    at = row * (4 * S.H)
    if S.HEADS > 1:
        dgates_ptr += (4 - S.GATES) * S.H
    elif S.GATES == 4:
        at = (row * S.PARTS + part) * S.K
    else:
        dgates_ptr += (4 - S.GATES) * S.H + part * S.K
    return dgates_ptr, at


@triton.jit
def weights_of_part(weight_hh_ptr, part, place, S: tl.constexpr):
    """Columns of W_hh, which begin where a part of K does, for the units at these places of the head."""
    D: tl.constexpr = S.D  # Triton 3.4 takes no field of a tuple into another tuple
    number = tl.program_id(2) if S.HEADS > 1 else part
    weight_hh_ptr += tl.cast(number, tl.int64) * (D * D if S.HEADS > 1 else S.K * D)
    return Columns(weight_hh_ptr, place, place < D, D)


@triton.jit
def store_sum(dh, sums_ptr, tile, B, S: tl.constexpr):
    """Store what a part of K contributes to dh of PARTS tiles' units, in sums [PARTS, B, H] float32."""
    sums_ptr += tl.cast(B, tl.int64) * S.H * (tile.unit_tile % S.PARTS)
    tl.store(sums_ptr + tile.cells.state_at, dh, mask=tile.cells.in_tile)


@triton.jit
def sum_of_parts(sums_ptr, tile, B, S: tl.constexpr):
    """The sum of what all parts stored, [BB, BH]."""
    PARTS: tl.constexpr = S.PARTS  # Triton 3.4 takes no field of a tuple for static_range
    sums_ptr, dh = sums_ptr + tile.cells.state_at, tl.zeros(tile.cells.at.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        dh += tl.load(sums_ptr, mask=tile.cells.valid, other=0.0, cache_modifier=".cg")
        sums_ptr += tl.cast(B, tl.int64) * S.H
    return dh


@triton.jit
def of_head(arrivals, B, S: tl.constexpr):
    """The Arrivals of this program's head: programs of different heads never wait for each other."""
    first = tl.program_id(2) * tl.cdiv(B, S.BLOCK_B) if S.HEADS > 1 else 0
    return Arrivals(arrivals.arrivals_ptr + first, arrivals.error_ptr)
