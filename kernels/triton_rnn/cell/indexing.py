"""Where things lie: which time a step visits, which row a state is in, which column is which gate.

A sequence tensor [T, B, width] is contiguous and read as rows [T * B, width]; row = time * B + batch, int64.
A *step* counts in the order of processing. With a sequence of length L in a batch padded to T:

    forward   step s visits time s
    reverse   step s visits time L - 1 - s
    padding   steps s >= L visit time s in both directions, so that each padded position is visited once
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

Batch = namedtuple("Batch", "lengths_ptr resets_ptr T B")  # what all sequences have in common: [B], [T*B], how many
# Some sequences, [BB] or one for each of [THREADS]: where in the batch, whether there is one, and its length.
Sequences = namedtuple("Sequences", "index in_batch length")
# Some sequences and units at a step: the number of the units' tile, places in the head and units [BH], Sequences and
# Position [BB], Offsets [BB, BH].
Tile = namedtuple("Tile", "unit_tile place unit sequence position cells")


class Position(NamedTuple):
    """Where sequences are at a step, each [BB] or [THREADS]."""

    row: tl.tensor  # of [T*B, *]
    row_prev: tl.tensor  # of the state that the step starts from: in h0 [B, *] at step 0, in h [T*B, *] after
    valid: tl.tensor  # no padding
    continues: tl.tensor  # and not reset before the step
    is_last: tl.tensor  # the sequence ends


class Offsets(NamedTuple):
    """Where cells, each a unit of a sequence, are in tensors, in elements; which there are: [BB, BH] or [THREADS]."""

    at: tl.tensor  # in [T*B, H]
    prev_at: tl.tensor  # of the state before, in [B, H] at step 0, in [T*B, H] after
    gates_at: tl.tensor  # in [T*B, 4H], of the first gate
    state_at: tl.tensor  # in [B, H]
    in_tile: tl.tensor  # a unit of a sequence in the batch
    valid: tl.tensor  # no padding
    continues: tl.tensor  # the state before is that of the step before
    reset: tl.tensor  # it is not, but zero or what it is reset to
    is_last: tl.tensor  # the sequence ends: [BB, 1] or [THREADS]


@triton.jit
def sequences(index, batch):
    """The sequences of these numbers, some of which may be past the batch."""
    in_batch = index < batch.B
    length = tl.zeros_like(index) + batch.T
    if batch.lengths_ptr is not None:
        length = tl.load(batch.lengths_ptr + index, mask=in_batch, other=0).to(tl.int32)
    return Sequences(index, in_batch, length)


@triton.jit
def time_of(step, length, REVERSE: tl.constexpr):
    """The time that each sequence visits at `step`."""
    return tl.where(step < length, length - 1 - step, step) if REVERSE else tl.zeros_like(length) + step


@triton.jit
def row_of(time, index, B):
    """Row of (time, index in the batch) in a [T * B, width] tensor."""
    return time.to(tl.int64) * B + index


@triton.jit
def is_reset(time, sequence, batch, REVERSE: tl.constexpr):
    """Where the state is zeroed before the step at `time`. A reset at t separates time t from time t - 1 in both
    directions; the reverse direction comes from time + 1."""
    later = time + 1 if REVERSE else time  # of the two times that a reset may separate
    reset = time < 0
    if batch.resets_ptr is not None:
        mask = sequence.in_batch & (later < sequence.length)
        reset = tl.load(batch.resets_ptr + row_of(later, sequence.index, batch.B), mask=mask, other=0) != 0
    return reset


@triton.jit
def position(step, sequence, batch, REVERSE: tl.constexpr):
    """Where sequences are at a step."""
    time = time_of(step, sequence.length, REVERSE)
    row = row_of(time, sequence.index, batch.B)
    valid = sequence.in_batch & (step < sequence.length)
    continues = valid & ~is_reset(time, sequence, batch, REVERSE)
    row_prev = row_of(time + 1 if REVERSE else time - 1, sequence.index, batch.B)
    row_prev = tl.where(step == 0, sequence.index.to(tl.int64), row_prev)
    return Position(row, row_prev, valid, continues, step == sequence.length - 1)


@triton.jit
def units_at(place, S: tl.constexpr):
    """The units at these places of the program's head, which is the grid's last axis."""
    if S.HEADS > 1:
        place += tl.program_id(2) * S.D
    return place


@triton.jit
def cells_at(sequence, position, unit, in_units, H):
    """The Offsets of some Sequences at their Position: a unit of each, where `in_units`."""
    at, prev_at, gates_at = position.row * H + unit, position.row_prev * H + unit, position.row * (4 * H) + unit
    state_at, in_tile = sequence.index.to(tl.int64) * H + unit, sequence.in_batch & in_units
    valid, continues = position.valid & in_units, position.continues & in_units
    return Offsets(at, prev_at, gates_at, state_at, in_tile, valid, continues, valid & ~continues, position.is_last)


@triton.jit
def by_gate(k, first, S: tl.constexpr):
    """With heads: an index first + k in a head's [GATES, D] -> the index in [GATES, H], for head 0."""
    return (first + k) // S.D * S.H + (first + k) % S.D if S.HEADS > 1 else k


@triton.jit
def tile_of(number, step, batch, S: tl.constexpr, PARTS: tl.constexpr = 1):
    """The Tile of this number. Neighbours have the same units, whose weights they read."""
    batch_tiles = tl.cdiv(batch.B, S.BLOCK_B)
    return tile_at(number % batch_tiles, number // batch_tiles, step, batch, S, PARTS)


@triton.jit
def tile_at(batch_tile, unit_tile, step, batch, S: tl.constexpr, PARTS: tl.constexpr = 1):
    """The Tile of some sequences and units. With PARTS it has the units of PARTS neighbours, whose numbers stand for
    parts of a product."""
    sequence = sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), batch)
    place = unit_tile // PARTS * (PARTS * S.UNITS) + tl.arange(0, PARTS * S.UNITS)
    unit = units_at(place, S)
    now = position(step, sequence, batch, S.REVERSE)
    of_rows = Sequences(sequence.index[:, None], sequence.in_batch[:, None], None)
    rows, rows_prev = now.row[:, None], now.row_prev[:, None]
    at_rows = Position(rows, rows_prev, now.valid[:, None], now.continues[:, None], now.is_last[:, None])
    cells = cells_at(of_rows, at_rows, unit[None, :], (place < S.D)[None, :], S.H)
    return Tile(unit_tile, place, unit, sequence, now, cells)


# Tensor cores leave a product [rows, columns] in threads that have two rows each, 8 apart, of a warp's 16, and two
# neighbours of every 8 columns. Threads that read and write memory have 16 neighbouring bytes, of rows farther apart.
# Which row is which sequence is free: this order moves fewer products to another thread.


@triton.jit
def rows_of_product(x):
    """Reorders a [rows] vector: blocks of 8 rows alternate between the first and the second half."""
    ROWS: tl.constexpr = x.shape[0]
    if ROWS >= 16:
        x = tl.reshape(tl.permute(tl.reshape(x, (2, ROWS // 16, 8)), (1, 0, 2)), (ROWS,))
    return x


@triton.jit
def rows_of_tile(z):
    """The reverse of rows_of_product, for a product [rows, columns]."""
    ROWS: tl.constexpr = z.shape[0]
    if ROWS >= 16:
        shape: tl.constexpr = z.shape
        z = tl.permute(tl.reshape(z, (ROWS // 16, 2, 8, z.shape[1])), (1, 0, 2, 3))
        z = tl.reshape(z, shape)
    return z


@triton.jit
def split_gates(z):
    """[rows, 4 * UNITS], where column n is gate n % 4 of unit n // 4 -> (i, f, g, o), each [rows, UNITS]."""
    ig, fo = tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 4, 2, 2)))
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o
