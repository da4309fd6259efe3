"""Where things lie: which time a step visits, which row a state is in, which column is which gate.

A sequence tensor [T, B, width] is contiguous and read as rows [T * B, width]; row = time * B + batch, int64.
A *step* counts in the order of processing. With a sequence of length L in a batch padded to T:

    forward   step s visits time s
    reverse   step s visits time L - 1 - s
    padding   steps s >= L visit time s in both directions, so that each padded position is visited once

Pointers that mean the same in every kernel, for H units and P features of h (H without a projection); those of what a
call has not are None:

    h0 [B, P]  c0 [B, H] float32  c [T*B, H] float32  lengths [B]  resets [T*B]  error [1] int32, see timeouts.py
    weight_hh [4H, P]  weight_hr [P, H]  peephole [3H]  dropout_h [B, P]
    zoneout_h [T*B, P] or one float32         reset_h [T*B, P], read with zoneout_h alone
    zoneout_c [T*B, H] or one float32         reset_c [T*B, H] float32
    gain_hh [4H]  gain_c [H]  bias_c [H]      of the layer norms of W_hh h and of c, and what they normalised:
    unit_hh [T*B, 4H]  unit_c [T*B, H] float32  scale_hh [T*B] float32  scale_c [T*B] float32
    dh [T*B, P]  dh_n [B, P]                  gradients given to backward
    dh_total [T*B, P]                         out: the whole gradient of W_hr m, or with a layer norm of c that of m
    dreset_h [T*B, P] float32                 zeros; out where a step is reset: through zoneout, of the h before it
    dreset_c [T*B, H] float32                 zeros; out where a step is reset: of the c before it
"""

import triton
import triton.language as tl


@triton.jit
def load_lengths(lengths_ptr, batch, in_batch, T):
    """Lengths of the sequences `batch`, T where there are none given."""
    if lengths_ptr is None:
        length = tl.zeros_like(batch) + T
    else:
        length = tl.load(lengths_ptr + batch, mask=in_batch, other=0).to(tl.int32)
    return length


@triton.jit
def sequences_from(first, lengths_ptr, T, B, BLOCK_B: tl.constexpr):
    """A batch tile from sequence `first` on: (batch, whether there is such a sequence, its length), each [BB]."""
    batch = first + tl.arange(0, BLOCK_B)
    in_batch = batch < B
    return batch, in_batch, load_lengths(lengths_ptr, batch, in_batch, T)


@triton.jit
def time_of(step, length, REVERSE: tl.constexpr):
    """The time that each sequence visits at `step`."""
    if REVERSE:
        time = tl.where(step < length, length - 1 - step, step)
    else:
        time = tl.zeros_like(length) + step
    return time


@triton.jit
def row_of(time, batch, B):
    """Row of (time, batch) in a [T * B, width] tensor."""
    return time.to(tl.int64) * B + batch


@triton.jit
def row_before(step, time, batch, B, REVERSE: tl.constexpr):
    """Row of the state that `step` starts from: in h0 or c0 [B, width] at step 0, in h or c [T * B, width] after."""
    before = time + 1 if REVERSE else time - 1
    return tl.where(step == 0, batch.to(tl.int64), row_of(before, batch, B))


@triton.jit
def row_in_h_then_h0(step, time, batch, T, B):
    """Row of h after `step` in [T * B + B, H]: h of every step, and last h0, which is h after step -1."""
    return tl.where(step < 0, row_of(tl.zeros_like(time) + T, batch, B), row_of(time, batch, B))


@triton.jit
def is_reset(resets_ptr, time, length, batch, B, in_batch, REVERSE: tl.constexpr):
    """Where the state is zeroed before the step at `time`.

    A reset at t separates time t from time t - 1, either way round; the reverse direction comes from time + 1.
    """
    if resets_ptr is None:
        reset = time < 0
    else:
        later = time + 1 if REVERSE else time  # of the two times that a reset may separate
        reset = tl.load(resets_ptr + row_of(later, batch, B), mask=in_batch & (later < length), other=0) != 0
    return reset


@triton.jit
def position(step, length, resets_ptr, batch, B, in_batch, REVERSE: tl.constexpr):
    """Where each sequence is at `step`: (time, row, valid, continues), each [BB].

    valid: the step is one of the sequence's, not padding. continues: and its state before is not zeroed by a reset.
    """
    time = time_of(step, length, REVERSE)
    row = row_of(time, batch, B)
    valid = in_batch & (step < length)
    continues = valid & ~is_reset(resets_ptr, time, length, batch, B, in_batch, REVERSE)
    return time, row, valid, continues


@triton.jit
def step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE: tl.constexpr):
    """(row of the step after this one, whether it started from this one's state), each [BB]."""
    _, row, _, continues = position(step + 1, length, resets_ptr, batch, B, in_batch, REVERSE)
    return row, continues


@triton.jit
def cell_before(c_ptr, c0_ptr, step, at, continues):
    """The cell state that `step` started from, float32: of c0 at step 0, zero where not `continues`.

    `at` is its place in a tensor [rows, H], by row_before.
    """
    at_start = tl.zeros(at.shape, tl.int32) + step == 0
    first = tl.load(c0_ptr + at, mask=continues & at_start, other=0.0)
    later = tl.load(c_ptr + at, mask=continues & ~at_start, other=0.0)
    return first + later


@triton.jit
def reset_to(before, reset_ptr, at, reset):
    """The state before a step, which is zero where it is `reset`: there it is that of `reset_ptr`, if there is one.

    `at` is the step's place in a tensor [T * B, width].
    """
    if reset_ptr is not None:
        before += tl.load(reset_ptr + at, mask=reset, other=0.0).to(tl.float32)
    return before


@triton.jit
def interleaved_gates(unit_start, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """The order in which one product yields all four gates of BLOCK_H units: number n is gate n % 4 of unit n // 4.

    Returns (index into 4H, unit), each [4 * BLOCK_H]. So a thread holds all four gates of its units.
    """
    n = tl.arange(0, 4 * BLOCK_H)
    unit = unit_start + n // 4
    return (n % 4) * H + unit, unit


@triton.jit
def split_gate_columns(z, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """[ROWS, 4 * BLOCK_H] with interleaved columns -> (i, f, g, o), each [ROWS, BLOCK_H]."""
    ig, fo = tl.split(tl.reshape(z, (ROWS, BLOCK_H, 2, 2)))
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o


@triton.jit
def load_peepholes(peephole_ptr, unit, H: tl.constexpr):
    """The peepholes of some units to the gates i, f and o, float32, from [3H]; zeros, unused, where there are none."""
    p_i = tl.zeros(unit.shape, tl.float32)
    p_f, p_o = p_i, p_i
    if peephole_ptr is not None:
        p_i += tl.load(peephole_ptr + unit, mask=unit < H, other=0.0).to(tl.float32)
        p_f += tl.load(peephole_ptr + H + unit, mask=unit < H, other=0.0).to(tl.float32)
        p_o += tl.load(peephole_ptr + 2 * H + unit, mask=unit < H, other=0.0).to(tl.float32)
    return p_i, p_f, p_o


@triton.jit
def load_zoneout(zoneout_ptr, at, mask):
    """The share of the state before that stays, for `cell.zoneout`: a tile of a mask, or one float32 for all."""
    if zoneout_ptr.dtype.element_ty == tl.float32:
        share = tl.load(zoneout_ptr)
    else:
        share = tl.load(zoneout_ptr + at, mask=mask, other=0).to(tl.float32)
    return share


@triton.jit
def load_gates(gates_ptr, at, mask, H: tl.constexpr):
    """The four gates of a tile of a [rows, 4H] tensor, float32; `at` is the tile's offsets for gate i."""
    i = tl.load(gates_ptr + at, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(gates_ptr + at + H, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gates_ptr + at + 2 * H, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(gates_ptr + at + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return i, f, g, o


@triton.jit
def store_gates(gates_ptr, at, mask, i, f, g, o, H: tl.constexpr):
    """The reverse of load_gates, rounded to the tensor's dtype."""
    tl.store(gates_ptr + at, i.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(gates_ptr + at + H, f.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(gates_ptr + at + 2 * H, g.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(gates_ptr + at + 3 * H, o.to(gates_ptr.dtype.element_ty), mask=mask)
