"""Offsets of cells in tensors: the time that a step visits, the row of a state, and the column of a gate.

A tensor of all steps [T, B, width] is contiguous, and is indexed as [T * B, width]. The row of a sequence at a time is
time * B + index, in int64, where index is the sequence's place in the batch.

A *time* is an index into x. A *step* counts in the order of processing. For a sequence of length L, padded to T:

    forward   step s visits time s
    reverse   step s visits time L - 1 - s
    padding   steps s >= L visit time s in both directions, so each padded position is visited once

A tensor of cells, each a unit of a sequence, is [BB, BH] for a tile of BB sequences and BH units, or [THREADS] with the
cell of each thread. A tensor of sequences is [BB] or [THREADS].
"""

from collections import namedtuple

import triton
import triton.language as tl

# The whole batch: pointers to lengths [B] and resets [T*B], or None if absent; the numbers of steps and sequences.
Batch = namedtuple("Batch", "lengths_ptr resets_ptr T B")
# Some sequences: the index of each in the batch, whether the batch has that index, and the length, each [BB] or
# [THREADS].
Sequences = namedtuple("Sequences", "index in_batch length")
# Some sequences and units at a step:
#   unit_tile             the number of the tile of units
#   place, unit           the numbers of the units in their head and in the layer, each [BH]
#   sequence, position    Sequences and Position, [BB]
#   cells                 Offsets, [BB, BH]
Tile = namedtuple("Tile", "unit_tile place unit sequence position cells")
# The position of each sequence at a step. Every field is [BB] or [THREADS]:
#   row          the row in a tensor [T*B, *]
#   row_prev     the row of the state before the step: in h0 [B, *] at step 0, in h [T*B, *] at later steps
#   valid        whether the step is within the sequence's length
#   continues    whether it is valid and the state is not reset before it
#   is_last      whether the sequence ends with this step
Position = namedtuple("Position", "row row_prev valid continues is_last")
# Offsets of cells in tensors, in elements, and masks of cells. Every field is [BB, BH] or [THREADS]:
#   at           the offset in [T*B, H]
#   prev_at      the offset of the state before the step: in [B, H] at step 0, in [T*B, H] at later steps
#   gates_at     the offset of the first gate in [T*B, 4H]
#   state_at     the offset in [B, H]
#   in_tile      whether both the sequence and the unit exist
#   valid        whether the cell exists and the step is no padding
#   continues    whether it is valid and starts from the step before, or from the initial state
#   reset        whether it is valid and starts from zero, or from a state that the call gives
#   is_last      whether the sequence ends with this step: [BB, 1] or [THREADS]
Offsets = namedtuple("Offsets", "at prev_at gates_at state_at in_tile valid continues reset is_last")


@triton.jit
def sequences(index, batch):
    """Return the Sequences of these indices, some of which may be past the end of the batch."""
    in_batch = index < batch.B
    length = tl.zeros_like(index) + batch.T
    if batch.lengths_ptr is not None:
        length = tl.load(batch.lengths_ptr + index, mask=in_batch, other=0).to(tl.int32)
    return Sequences(index, in_batch, length)


@triton.jit
def time_of(step, length, REVERSE: tl.constexpr):
    """Return the time that each sequence visits at `step`."""
    return tl.where(step < length, length - 1 - step, step) if REVERSE else tl.zeros_like(length) + step


@triton.jit
def row_of(time, index, B):
    """Return the row of a sequence at a time in a tensor [T * B, width], as int64."""
    return time.to(tl.int64) * B + index


@triton.jit
def is_reset(time, sequence, batch, REVERSE: tl.constexpr):
    """Return whether the state is reset before the step that visits `time`.

    A reset at t separates time t from time t - 1 in both directions. In reverse the step before visited time + 1, so
    the reset that counts is the one at time + 1.
    """
    later = time + 1 if REVERSE else time
    reset = time < 0  # False everywhere, for a call without resets
    if batch.resets_ptr is not None:
        mask = sequence.in_batch & (later < sequence.length)
        reset = tl.load(batch.resets_ptr + row_of(later, sequence.index, batch.B), mask=mask, other=0) != 0
    return reset


@triton.jit
def position(step, sequence, batch, REVERSE: tl.constexpr):
    """Return the Position of the Sequences at a step."""
    time = time_of(step, sequence.length, REVERSE)
    row = row_of(time, sequence.index, batch.B)
    valid = sequence.in_batch & (step < sequence.length)
    continues = valid & ~is_reset(time, sequence, batch, REVERSE)
    row_prev = row_of(time + 1 if REVERSE else time - 1, sequence.index, batch.B)
    row_prev = tl.where(step == 0, sequence.index.to(tl.int64), row_prev)
    return Position(row, row_prev, valid, continues, step == sequence.length - 1)


@triton.jit
def units_at(place, S: tl.constexpr):
    """Return the units at these places of the program's head. The head is the last axis of the grid."""
    if S.HEADS > 1:
        place += tl.program_id(2) * S.D
    return place


@triton.jit
def cells_at(sequence, position, unit, in_units, H):
    """Return the Offsets of the cells of some Sequences and units. A unit exists where in_units is true."""
    at, prev_at, gates_at = position.row * H + unit, position.row_prev * H + unit, position.row * (4 * H) + unit
    state_at, in_tile = sequence.index.to(tl.int64) * H + unit, sequence.in_batch & in_units
    valid, continues = position.valid & in_units, position.continues & in_units
    return Offsets(at, prev_at, gates_at, state_at, in_tile, valid, continues, valid & ~continues, position.is_last)


@triton.jit
def by_gate(k, first, S: tl.constexpr):
    """Convert an index of K within a head into an index of K within all heads, for head 0.

    The rows of W_hh of one head are [GATES, D], and the rows of all heads are [GATES, H]. With several heads this
    returns the index in [GATES, H] of element first + k of [GATES, D]. With one head it returns k, since the caller's
    pointers already begin at `first`.
    """
    return (first + k) // S.D * S.H + (first + k) % S.D if S.HEADS > 1 else k


@triton.jit
def tile_of(number, step, batch, S: tl.constexpr, PARTS: tl.constexpr = 1):
    """Return the Tile of this number. Neighbouring numbers have the same units, so they read the same weights."""
    batch_tiles = tl.cdiv(batch.B, S.BLOCK_B)
    return tile_at(number % batch_tiles, number // batch_tiles, step, batch, S, PARTS)


@triton.jit
def tile_at(batch_tile, unit_tile, step, batch, S: tl.constexpr, PARTS: tl.constexpr = 1):
    """Return the Tile of one tile of sequences and one tile of units.

    With PARTS > 1 the result has the units of PARTS neighbouring tiles. Each of these PARTS numbers then has the same
    units, and stands for one part of K in the product.
    """
    sequence = sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), batch)
    place = unit_tile // PARTS * (PARTS * S.UNITS) + tl.arange(0, PARTS * S.UNITS)
    unit = units_at(place, S)
    now = position(step, sequence, batch, S.REVERSE)
    of_rows = Sequences(sequence.index[:, None], sequence.in_batch[:, None], None)
    rows, rows_prev = now.row[:, None], now.row_prev[:, None]
    at_rows = Position(rows, rows_prev, now.valid[:, None], now.continues[:, None], now.is_last[:, None])
    cells = cells_at(of_rows, at_rows, unit[None, :], (place < S.D)[None, :], S.H)
    return Tile(unit_tile, place, unit, sequence, now, cells)


# After a product [rows, columns] by tensor cores, a thread has two of the 16 rows of its warp, 8 rows apart, and two
# neighbours of every 8 columns. In loads and stores a thread has 16 neighbouring bytes, and its rows are farther apart.
# The order of the sequences in the rows of the product is free. The order below moves fewer elements to another thread.


@triton.jit
def rows_of_product(x):
    """Reorder a vector [rows], so that blocks of 8 rows alternate between the first half and the second half."""
    ROWS: tl.constexpr = x.shape[0]
    if ROWS >= 16:
        x = tl.reshape(tl.permute(tl.reshape(x, (2, ROWS // 16, 8)), (1, 0, 2)), (ROWS,))
    return x


@triton.jit
def rows_of_tile(z):
    """Undo rows_of_product, for a product [rows, columns]."""
    ROWS: tl.constexpr = z.shape[0]
    if ROWS >= 16:
        shape: tl.constexpr = z.shape
        z = tl.permute(tl.reshape(z, (ROWS // 16, 2, 8, z.shape[1])), (1, 0, 2, 3))
        z = tl.reshape(z, shape)
    return z


@triton.jit
def split_gates(z):
    """Split [rows, 4 * UNITS], where column n is gate n % 4 of unit n // 4, into (i, f, g, o), each [rows, UNITS]."""
    ig, fo = tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 4, 2, 2)))
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o
