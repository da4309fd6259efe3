"""The operands of the products of the step and the held family, and the sums over parts of K.

The left operand has rows of h or dgates, which other programs wrote. The right operand has columns of weights from
W_hh. K is the dimension that a product sums over. Indices k count within the program's head.
"""

from collections import namedtuple

import triton
import triton.language as tl

from ..cell import indexing, noise
from ..parameters import Arrivals

# Rows of a tensor:
#   ptr, at                    a pointer, and the offset where each row begins [rows]
#   mask                       the rows that exist [rows]. The others count as zeros
#   factors_ptr, factors_at    a pointer to factors of the elements, or None, and where those of each row begin [rows]
# In Triton 3.4 a function cannot return None, nor a tuple that has None, so no function returns Rows.
Rows = namedtuple("Rows", "ptr at mask factors_ptr factors_at")
# Columns of weights:
#   ptr, at    a pointer, and the offset where each column begins [columns]
#   mask       the columns that exist [columns]. The others count as zeros
#   stride     the distance from one k to the next
# The argument `first` of functions is the index in the head's K where the part of K begins, see indexing.by_gate.
Columns = namedtuple("Columns", "ptr at mask stride")


@triton.jit
def load_rows(rows, k, K: tl.constexpr, S: tl.constexpr, first=0):
    """Load elements k of the Rows, times their factors, [rows, k]. Elements past K are zeros."""
    column = indexing.units_at(indexing.by_gate(k, first, S), S)
    in_a = rows.mask[:, None] & (k < K)[None, :]
    a = tl.load(rows.ptr + (rows.at[:, None] + column[None, :]), mask=in_a, other=0.0, cache_modifier=".cg")
    return noise.dropout(a, rows.factors_ptr, rows.factors_at[:, None] + column[None, :], in_a)


@triton.jit
def load_weights(columns, k_start, K: tl.constexpr, S: tl.constexpr, first=0):
    """Load BLOCK_K elements of each of the Columns, from k_start on, [BLOCK_K, columns]. Elements past K are zeros."""
    offset = tl.arange(0, S.BLOCK_K)
    row, start = offset, k_start
    if S.HEADS > 1:
        row, start = indexing.by_gate(k_start + offset, first, S).to(tl.int64), 0
    k_ptr = columns.ptr + columns.at[None, :] + row[:, None] * columns.stride
    start = tl.cast(start, tl.int64) * columns.stride  # K times the stride may exceed int32
    return tl.load(k_ptr + start, mask=(k_start + offset < K)[:, None] & columns.mask[None, :], other=0.0)


@triton.jit
def weights_of_gates(weight_hh_ptr, unit_tile, S: tl.constexpr):
    """Return the Columns for the gates of a tile's units, four for each unit, in the order of indexing.split_gates.

    A gate that h does not reach has no row in W_hh. Its column is masked.
    """
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
    """Return the place of a part of K in dgates [T*B, 4H]: (a pointer, the offset where each row begins).

    With heads the elements of a part are not neighbours. The pointer is then to the first gate that h reaches, and
    indexing.by_gate finds the elements.
    """
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
    """Return the Columns of W_hh for the units at these places of the head, from the first k of a part of K on."""
    D: tl.constexpr = S.D  # Triton 3.4 takes no field of a tuple into another tuple
    number = tl.program_id(2) if S.HEADS > 1 else part
    weight_hh_ptr += tl.cast(number, tl.int64) * (D * D if S.HEADS > 1 else S.K * D)
    return Columns(weight_hh_ptr, place, place < D, D)


@triton.jit
def store_sum(dh, sums_ptr, tile, B, S: tl.constexpr):
    """Store dh [BB, PARTS BH], the contribution of the tile's part of K, in sums [PARTS, B, H] float32."""
    sums_ptr += tl.cast(B, tl.int64) * S.H * (tile.unit_tile % S.PARTS)
    tl.store(sums_ptr + tile.cells.state_at, dh, mask=tile.cells.in_tile)


@triton.jit
def sum_of_parts(sums_ptr, tile, B, S: tl.constexpr):
    """Return the sum of the contributions of all parts, [BB, BH], added up in a fixed order."""
    PARTS: tl.constexpr = S.PARTS  # Triton 3.4 takes no field of a tuple for static_range
    sums_ptr, dh = sums_ptr + tile.cells.state_at, tl.zeros(tile.cells.at.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        dh += tl.load(sums_ptr, mask=tile.cells.valid, other=0.0, cache_modifier=".cg")
        sums_ptr += tl.cast(B, tl.int64) * S.H
    return dh


@triton.jit
def of_head(arrivals, B, S: tl.constexpr):
    """Return the Arrivals of this program's head. Programs of different heads never wait for each other."""
    first = tl.program_id(2) * tl.cdiv(B, S.BLOCK_B) if S.HEADS > 1 else 0
    return Arrivals(arrivals.arrivals_ptr + first, arrivals.error_ptr)
