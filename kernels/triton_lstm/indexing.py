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

from .cell import mix, mix_backward, next_cell

Batch = namedtuple("Batch", "lengths_ptr resets_ptr T B")  # what all sequences have in common
Sequences = namedtuple("Sequences", "index in_batch length")  # of some: where in the batch, whether there is one
# Some sequences and units at a step: tensors are [BB] of sequences, [BH] of units, [BB, BH] of cells.
Tile = namedtuple("Tile", "batch_tile unit_tile unit sequence place row_prev cells")


class Position(NamedTuple):
    """Where sequences are at a step."""

    time: tl.tensor
    row: tl.tensor  # of [T*B, *]
    valid: tl.tensor  # no padding
    continues: tl.tensor  # and not reset before the step


class Cells(NamedTuple):
    """Where cells are at a step, each a unit of a sequence, and which of them there are."""

    at: tl.tensor  # in [T*B, H]
    gates_at: tl.tensor  # in [T*B, 4H], of gate i
    state_at: tl.tensor  # in [B, H]
    in_tile: tl.tensor  # a unit of a sequence in the batch
    valid: tl.tensor  # no padding
    continues: tl.tensor  # the state before is that of the step before
    reset: tl.tensor  # it is not, but zero or what it is reset to


@triton.jit
def sequences(index, batch):
    """The Sequences at `index` in the batch."""
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
def row_before(step, time, index, B, REVERSE: tl.constexpr):
    """Row of the state that `step` starts from: in h0 or c0 [B, width] at step 0, in h or c [T * B, width] after."""
    before = time + 1 if REVERSE else time - 1
    return tl.where(step == 0, index.to(tl.int64), row_of(before, index, B))


@triton.jit
def row_in_h_then_h0(step, sequence, batch, REVERSE: tl.constexpr):
    """Row of h after `step` in [T * B + B, P]: h of every step, and last h0, which is h after step -1."""
    time = time_of(step, sequence.length, REVERSE)
    of_h0 = row_of(tl.zeros_like(time) + batch.T, sequence.index, batch.B)
    return tl.where(step < 0, of_h0, row_of(time, sequence.index, batch.B))


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
    """The Position of some Sequences."""
    time = time_of(step, sequence.length, REVERSE)
    row = row_of(time, sequence.index, batch.B)
    valid = sequence.in_batch & (step < sequence.length)
    continues = valid & ~is_reset(time, sequence, batch, REVERSE)
    return Position(time, row, valid, continues)


@triton.jit
def cells_at(sequence, place, unit, in_units, H):
    """The Cells of some Sequences at their Position: a unit of each, where `in_units`. All have one shape."""
    valid, continues = place.valid & in_units, place.continues & in_units
    at, gates_at = place.row * H + unit, place.row * (4 * H) + unit
    state_at = sequence.index.to(tl.int64) * H + unit
    return Cells(at, gates_at, state_at, sequence.in_batch & in_units, valid, continues, valid & ~continues)


@triton.jit
def tile_at(number, step, batch, H, S: tl.constexpr, PARTS: tl.constexpr = 1):
    """A program's Tile, of rows of H units. Neighbours have the same units, whose weights they read.

    With PARTS a tile has the units of PARTS neighbours, whose numbers stand for parts of a product.
    """
    batch_tile, unit_tile = number, tl.program_id(0)
    if not S.HELD:
        batch_tile, unit_tile = number % tl.cdiv(batch.B, S.BLOCK_B), number // tl.cdiv(batch.B, S.BLOCK_B)
    sequence = sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), batch)
    unit = unit_tile // PARTS * (PARTS * S.UNITS) + tl.arange(0, PARTS * S.UNITS)
    place = position(step, sequence, batch, S.REVERSE)
    of_rows = Sequences(sequence.index[:, None], sequence.in_batch[:, None], None)
    at_rows = Position(None, place.row[:, None], place.valid[:, None], place.continues[:, None])
    cells = cells_at(of_rows, at_rows, unit[None, :], (unit < H)[None, :], H)
    row_prev = row_before(step, place.time, sequence.index, batch.B, S.REVERSE)
    return Tile(batch_tile, unit_tile, unit, sequence, place, row_prev, cells)


# Tensor cores leave a product [rows, columns] in threads of which each has two rows, 8 apart, of its warp's 16, and of
# every 8 columns two neighbours. Memory is read and written by threads that have 16 neighbouring bytes of rows farther
# apart. Which row is which sequence is free: if ORDERED it is such that fewer products go to another thread.


@triton.jit
def rows_of_product(xs, ORDERED: tl.constexpr):
    """Each [rows] of a tile; if ORDERED, 8 of its first half, 8 of its second, 8 of its first, ..."""
    ROWS: tl.constexpr = xs[0].shape[0]
    if ORDERED and ROWS >= 16:
        ordered = ()
        for n in tl.static_range(len(xs)):
            x = tl.permute(tl.reshape(xs[n], (2, ROWS // 16, 8)), (1, 0, 2))
            ordered = ordered + (tl.reshape(x, (ROWS,)),)
        xs = ordered
    return xs


@triton.jit
def rows_of_tile(z, ORDERED: tl.constexpr):
    """The reverse of rows_of_product, for a product [rows, columns]."""
    ROWS: tl.constexpr = z.shape[0]
    if ORDERED and ROWS >= 16:
        shape: tl.constexpr = z.shape
        z = tl.permute(tl.reshape(z, (ROWS // 16, 2, 8, z.shape[1])), (1, 0, 2, 3))
        z = tl.reshape(z, shape)
    return z


@triton.jit
def columns_of_gates(unit_tile, S: tl.constexpr):
    """The columns of a product of all four gates of a tile's units: (index into 4H, unit), each [4 * UNITS].

    Number n is gate n % 4 of unit n // 4.
    """
    first_unit = unit_tile * S.UNITS
    n = tl.arange(0, 4 * S.UNITS)
    unit = first_unit + n // 4
    return n % 4 * S.H + unit, unit


@triton.jit
def split_gates(z):
    """[rows, 4 * UNITS] with those columns -> (i, f, g, o), each [rows, UNITS]."""
    ig, fo = tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 4, 2, 2)))
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o


# Tiles are loaded as float32 by offsets and masks of `Cells`.


@triton.jit
def load_gates(gates_ptr, at, mask, H: tl.constexpr, AS_STORED: tl.constexpr = False):
    """(i, f, g, o) of a tile of a [rows, 4H] tensor; `at` is its offsets for gate i. AS_STORED: not converted yet."""
    gates = ()
    for n in tl.static_range(4):
        gate = tl.load(gates_ptr + at + n * H, mask=mask, other=0.0)
        gates = gates + (gate if AS_STORED else gate.to(tl.float32),)
    return gates


@triton.jit
def as_float(gates):
    """What load_gates loaded AS_STORED."""
    i, f, g, o = gates
    return i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)


@triton.jit
def store_gates(gates_ptr, at, mask, gates, H: tl.constexpr):
    """The reverse of load_gates, rounded to the tensor's dtype."""
    for n in tl.static_range(4):
        tl.store(gates_ptr + at + n * H, gates[n], mask=mask)


@triton.jit
def load_peepholes(weight_peephole_ptr, unit, H: tl.constexpr):
    """The peepholes of some units to the gates i, f and o, from [3H]; () where there are none."""
    peepholes = ()
    if weight_peephole_ptr is not None:
        for n in tl.static_range(3):
            weight = tl.load(weight_peephole_ptr + n * H + unit, mask=unit < H, other=0.0)
            peepholes = peepholes + (weight.to(tl.float32),)
    return peepholes


@triton.jit
def load_affine(gain_ptr, bias_ptr, unit, H: tl.constexpr):
    """(gain, bias) of a layer norm for some units, from [H]; zeros where there is no bias."""
    gain, bias = tl.load(gain_ptr + unit, mask=unit < H, other=0.0).to(tl.float32), tl.zeros(unit.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + unit, mask=unit < H, other=0.0).to(tl.float32)
    return gain, bias


@triton.jit
def reset_to(before, reset_ptr, cells):
    """The state before a step; where that is reset, and so zero, the one of `reset_ptr`, if there is one."""
    if reset_ptr is not None:
        before += tl.load(reset_ptr + cells.at, mask=cells.reset, other=0.0).to(tl.float32)
    return before


@triton.jit
def load_state(state_ptr, reset_ptr, cells):
    """The state before a step, from where the step before left it."""
    before = tl.load(state_ptr + cells.state_at, mask=cells.continues, other=0.0).to(tl.float32)
    return reset_to(before, reset_ptr, cells)


@triton.jit
def load_saved(saved, step, row_prev, unit, cells, H: tl.constexpr, AS_STORED: tl.constexpr = False):
    """What forward saved of a step: (activated gates, AS_STORED as in `load_gates`; c; c before it)."""
    gates = load_gates(saved.gates_ptr, cells.gates_at, cells.valid, H, AS_STORED)
    c = tl.load(saved.c_ptr + cells.at, mask=cells.valid, other=0.0)
    return gates, c, load_c_before(saved, step, row_prev, unit, cells, H)


@triton.jit
def load_c_before(saved, step, row_prev, unit, cells, H: tl.constexpr):
    """c before a step, as forward saved it, in row `row_before`."""
    prev_at = row_prev * H + unit
    is_first = tl.zeros(prev_at.shape, tl.int32) + step == 0
    c_prev = tl.load(saved.c0_ptr + prev_at, mask=cells.continues & is_first, other=0.0)
    c_prev += tl.load(saved.c_ptr + prev_at, mask=cells.continues & ~is_first, other=0.0)
    return reset_to(c_prev, saved.reset_c_ptr, cells)


@triton.jit
def load_gradients_given(hidden, is_last, cells):
    """The gradients that backward is given, as they are stored: of the step's h and, where it `is_last`, of h_n."""
    given = ()
    if hidden.dh_ptr is not None:
        given = given + (tl.load(hidden.dh_ptr + cells.at, mask=cells.valid, other=0.0),)
    if hidden.dh_n_ptr is not None:
        given = given + (tl.load(hidden.dh_n_ptr + cells.state_at, mask=cells.valid & is_last, other=0.0),)
    return given


@triton.jit
def add_as_float(x, others):
    """x and all others."""
    for n in tl.static_range(len(others)):
        x += others[n].to(tl.float32)
    return x


@triton.jit
def load_share(zoneout_ptr, cells):
    """The share of the previous state that stays: of each cell by a mask, or one float32 for all."""
    if zoneout_ptr.dtype.element_ty == tl.float32:
        share = tl.load(zoneout_ptr)
    else:
        share = tl.load(zoneout_ptr + cells.at, mask=cells.valid, other=0).to(tl.float32)
    return share


@triton.jit
def zoneout(zoneout_ptr, cells, before, new):
    """The state after a step that computed `new`: with zoneout a share of it stays as `before`."""
    if zoneout_ptr is not None:
        new = mix(load_share(zoneout_ptr, cells), before, new)
    return new


@triton.jit
def zoneout_h_backward(dh, hidden, cells):
    """dh, without the part through zoneout of the step after -> the gradient of the h that the step computed. That part
    is in dh_from_zoneout, and is replaced by this step's."""
    if hidden.zoneout_h_ptr is not None:
        dh += tl.load(hidden.dh_from_zoneout_ptr + cells.state_at, mask=cells.valid, other=0.0)
        dh_prev, dh = mix_backward(load_share(hidden.zoneout_h_ptr, cells), dh)
        if hidden.dreset_h_ptr is not None:
            tl.store(hidden.dreset_h_ptr + cells.at, dh_prev, mask=cells.reset)
        from_zoneout = tl.where(cells.continues, dh_prev, 0.0)
        tl.store(hidden.dh_from_zoneout_ptr + cells.state_at, from_zoneout, mask=cells.valid)
    return dh


@triton.jit
def zoneout_c_backward(dc, zoneout_c_ptr, gates, c, c_prev, cells):
    """Gradient of c after zoneout -> (that of c as the step computed it, this c, the gradient of c_prev by zoneout)."""
    dc_prev = tl.zeros_like(dc)
    if zoneout_c_ptr is not None:
        c = next_cell(gates, c_prev)  # the saved one is after zoneout
        dc_prev, dc = mix_backward(load_share(zoneout_c_ptr, cells), dc)
    return dc, c, dc_prev


@triton.jit
def store_hidden(h, tile, step, hidden, h_prev_ptr, P: tl.constexpr):
    """Store h of a tile, after zoneout, and h_n of sequences whose last step it is; returns that h. The state before
    the step is in h_prev_ptr, h0 or h."""
    cells, is_last = tile.cells, step == tile.sequence.length - 1
    if hidden.zoneout_h_ptr is not None:
        prev_at = tile.row_prev[:, None] * P + tile.unit[None, :]
        h_prev = tl.load(h_prev_ptr + prev_at, mask=cells.continues, other=0.0).to(tl.float32)
        h_prev = reset_to(h_prev, hidden.reset_h_ptr, cells)
        h = zoneout(hidden.zoneout_h_ptr, cells, h_prev, h)
    tl.store(hidden.h_ptr + cells.at, h, mask=cells.in_tile)
    tl.store(hidden.h_n_ptr + cells.state_at, h, mask=cells.in_tile & is_last[:, None])
    return h


@triton.jit
def gradient_of_h(dh, tile, step, hidden):
    """What the product of the step after returned -> the gradient of h that the step computed."""
    cells = tile.cells
    if hidden.dropout_h_ptr is not None:
        dh *= tl.load(hidden.dropout_h_ptr + cells.state_at, mask=cells.valid, other=0.0).to(tl.float32)
    is_last = (step == tile.sequence.length - 1)[:, None]
    dh = add_as_float(dh, load_gradients_given(hidden, is_last, cells))
    return zoneout_h_backward(dh, hidden, cells)
