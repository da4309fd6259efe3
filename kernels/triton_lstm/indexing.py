"""Where things lie: which time a step visits, which row a state is in, which column is which gate.

A sequence tensor [T, B, width] is contiguous and read as rows [T * B, width]; row = time * B + batch, int64.
A *step* counts in the order of processing. With a sequence of length L in a batch padded to T:

    forward   step s visits time s
    reverse   step s visits time L - 1 - s
    padding   steps s >= L visit time s in both directions, so that each padded position is visited once
"""

import triton
import triton.language as tl


@triton.jit
def load_lengths(lengths_ptr, batch, in_batch, T):
    """Lengths of the rows `batch`, T where there are none given."""
    if lengths_ptr is None:
        length = tl.zeros_like(batch) + T
    else:
        length = tl.load(lengths_ptr + batch, mask=in_batch, other=0).to(tl.int32)
    return length


@triton.jit
def time_of(step, length, REVERSE: tl.constexpr):
    """The time that each row visits at `step`."""
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
def starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE: tl.constexpr):
    """Where the state is zeroed before the step at `time`.

    A reset at t separates time t from time t - 1, either way round; the reverse direction comes from time + 1.
    """
    if resets_ptr is None:
        afresh = time < 0
    else:
        later = time + 1 if REVERSE else time  # of the two times that a reset may separate
        afresh = tl.load(resets_ptr + row_of(later, batch, B), mask=in_batch & (later < length), other=0) != 0
    return afresh


@triton.jit
def gate_columns(unit_start, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns of a product that yields all four gates of BLOCK_H units side by side.

    Returns (index into 4H, unit), each [4 * BLOCK_H]: column n is gate n % 4 of unit n // 4.
    """
    n = tl.arange(0, 4 * BLOCK_H)
    unit = unit_start + n // 4
    return (n % 4) * H + unit, unit


@triton.jit
def split_gates(z, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """A product over gate_columns [BLOCK_B, 4 * BLOCK_H] -> (i, f, g, o), each [BLOCK_B, BLOCK_H]."""
    ig, fo = tl.split(tl.reshape(z, (BLOCK_B, BLOCK_H, 2, 2)))
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o


@triton.jit
def load_gates(gates_ptr, row, unit, mask, H: tl.constexpr):
    """The four gates of units `unit` in rows `row` of a [rows, 4H] tensor, each [rows, units] float32."""
    at = gates_ptr + row[:, None] * (4 * H) + unit[None, :]
    i = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(at + H, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(at + 2 * H, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(at + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return i, f, g, o


@triton.jit
def store_gates(gates_ptr, row, unit, mask, i, f, g, o, H: tl.constexpr):
    """The reverse of load_gates, rounded to the tensor's dtype."""
    at = gates_ptr + row[:, None] * (4 * H) + unit[None, :]
    tl.store(at, i.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(at + H, f.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(at + 2 * H, g.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(at + 3 * H, o.to(gates_ptr.dtype.element_ty), mask=mask)
