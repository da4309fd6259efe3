"""The held family: one launch runs the whole sequence, and W_hh stays in shared memory.

A program owns some units, and loads their W_hh once. A group of programs owns some tiles of sequences, and each of its
programs computes them one after another. Before a product a program waits for the programs that compute the other units
of the same sequences, and for no others: each tile of sequences has a counter of arrivals. With AHEAD a program loads
the operand of its next tile before it computes the cells of the current one.
"""

from collections import namedtuple

import triton
import triton.language as tl

from ..cell import indexing, states
from ..cell.indexing import Batch
from ..exchange import arrive, unless_timed_out, wait_for
from ..parameters import Arrivals, CellBackward, CellPointers, HiddenBackward, HiddenPointers, Saved, name_in_profiles
from . import operands
from .cells import backward_step, forward_cells, load_constants_and_h
from .operands import Rows, load_rows, load_weights, of_head

# The arguments of await_h: h before the step, [B, H] at step 0 and [T*B, H] at later steps; factors of dropout [B, H].
# The arguments of await_dgates: dgates [T*B, 4H]. Both have the Batch, and the Arrivals of the program's head.
Before = namedtuple("Before", "h_prev_ptr dropout_h_ptr batch arrivals")
After = namedtuple("After", "dgates_ptr batch arrivals")


@triton.jit
def product_of_held(held, a, S: tl.constexpr):
    """Return the product of a [rows, K] and held^T [K, columns], [rows, columns] float32.

    It is computed as (held a^T)^T, since wgmma takes a multiple of 64 rows, but as few as 8 columns.
    """
    return tl.trans(tl.dot(held, tl.trans(a), input_precision=S.PRECISION))


@triton.jit
def await_tile(source, batch_tile, times, step, poll_limit, S: tl.constexpr):
    """Wait for a tile of sequences: return (the poll limit after the wait, the tile's Sequences [BB]).

    Past the last tile there is nothing to wait for.
    """
    if batch_tile < tl.cdiv(source.batch.B, S.BLOCK_B):
        poll_limit = wait_for(source.arrivals, batch_tile, times, poll_limit, step)
    return poll_limit, indexing.sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), source.batch)


@triton.jit
def await_h(before, batch_tile, step, poll_limit, S: tl.constexpr):
    """Wait for h before a step, and load it: return (the poll limit after the wait, h with dropout [BB, BK]).

    Past the last tile h is zero.
    """
    poll_limit, sequence = await_tile(before, batch_tile, step, step, poll_limit, S)
    here = indexing.position(step, sequence, before.batch, S.REVERSE)
    at, factors_at = here.row_prev * S.H, sequence.index.to(tl.int64) * S.H
    rows = Rows(before.h_prev_ptr, at, here.continues, before.dropout_h_ptr, factors_at)
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.D, S)


@triton.jit(repr=name_in_profiles("held_forward_kernel"), do_not_specialize=["T", "B"])
def held_forward_kernel(
    weight_hh_ptr,  # [GATES H, D]
    hidden: HiddenPointers, cell: CellPointers, arrivals: Arrivals, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """Run all steps forward. The grid is (programs of a group, groups, heads)."""
    EARLY: tl.constexpr = S.BLOCK_B * S.UNITS <= 128 * S.WARPS  # then a thread has registers for these loads
    batch, arrivals = Batch(lengths_ptr, resets_ptr, T, B), of_head(arrivals, B, S)
    poll_limit = tl.load(arrivals.error_ptr + 1)
    unit_tile, first, stride = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    held = tl.trans(load_weights(operands.weights_of_gates(weight_hh_ptr, unit_tile, S), 0, S.D, S))  # [4 BH, BK]
    for step in range(T):
        h_prev_ptr = tl.where(step == 0, hidden.h0_ptr, hidden.h_ptr)
        c_prev_ptr = tl.where(step == 0, cell.c0_ptr, cell.c_n_ptr)
        before = Before(h_prev_ptr, hidden.dropout_h_ptr, batch, arrivals)
        if S.AHEAD:
            poll_limit, h_prev = await_h(before, first, step, poll_limit, S)
        for batch_tile in range(first, tl.cdiv(B, S.BLOCK_B), stride):
            # Load: h before the step [BB, BK], and the inputs of the cells, each [BB, BH].
            tile = indexing.tile_at(batch_tile, unit_tile, step, batch, S)
            if not S.AHEAD:
                poll_limit, h_prev = await_h(before, batch_tile, step, poll_limit, S)
            if EARLY:
                constants, share_c, h_kept = load_constants_and_h(h_prev_ptr, hidden, cell, tile, S)
            z_x, c_prev, rest_prev = states.load_cells(c_prev_ptr, cell, tile.cells, B, S)

            # Product: z_h = W_hh h of the tile's units, four gates [BB, 4 BH].
            z_h = unless_timed_out(product_of_held(held, h_prev, S), poll_limit)
            if S.AHEAD:
                poll_limit, h_prev = await_h(before, batch_tile + stride, step, poll_limit, S)

            # Gates and cell, then publish h: the counter says that the tile's part of it is stored.
            if not EARLY:
                constants, share_c, h_kept = load_constants_and_h(h_prev_ptr, hidden, cell, tile, S)
            z_h = indexing.split_gates(z_h)
            h, _, _ = forward_cells(z_x, z_h, c_prev, rest_prev, constants, share_c, cell, tile, B, S)
            states.store_hidden(h, hidden, h_kept, tile.cells)
            if step + 1 < T:
                arrive(arrivals.arrivals_ptr + batch_tile, poll_limit)


@triton.jit
def await_dgates(after, batch_tile, times, step, poll_limit, S: tl.constexpr):
    """Wait for dgates of the next step, and load them: return (the poll limit after the wait, dgates [BB, BK])."""
    poll_limit, sequence = await_tile(after, batch_tile, times, step, poll_limit, S)
    there = indexing.position(step + 1, sequence, after.batch, S.REVERSE)
    dgates_ptr, at = operands.dgates_of_part(after.dgates_ptr, there.row, 0, S)
    rows = Rows(dgates_ptr, at, there.continues, None, at)
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.K, S)


@triton.jit(repr=name_in_profiles("held_backward_kernel"), do_not_specialize=["T", "B"])
def held_backward_kernel(
    weight_hh_ptr,  # [GATES H, D]
    hidden: HiddenBackward, cell: CellBackward, saved: Saved, arrivals: Arrivals, lengths_ptr, resets_ptr, T, B,
    S: tl.constexpr,
):  # fmt: skip
    """Run all steps backward, from the last to the first. The grid is (programs of a group, groups, heads)."""
    EARLY: tl.constexpr = S.BLOCK_B * S.UNITS <= 1024  # with more cells a thread has no registers left for these loads
    batch, arrivals = Batch(lengths_ptr, resets_ptr, T, B), of_head(arrivals, B, S)
    poll_limit, after = tl.load(arrivals.error_ptr + 1), After(cell.dgates_ptr, batch, arrivals)
    unit_tile, first, stride = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    place = unit_tile * S.UNITS + tl.arange(0, S.UNITS)
    held = tl.trans(load_weights(operands.weights_of_part(weight_hh_ptr, 0, place, S), 0, S.K, S))
    for back in range(T):
        step = T - 1 - back
        if S.AHEAD:
            poll_limit, dgates = await_dgates(after, first, back, step, poll_limit, S)
        for batch_tile in range(first, tl.cdiv(B, S.BLOCK_B), stride):
            # Load: dgates of the next step [BB, BK], and the saved gates and c, each [BB, BH].
            tile = indexing.tile_at(batch_tile, unit_tile, step, batch, S)
            if not S.AHEAD:
                poll_limit, dgates = await_dgates(after, batch_tile, back, step, poll_limit, S)
            loaded = states.load_saved(saved, step, tile.cells, S.H) if EARLY else ()

            # Product: dh = W_hh^T dgates, for the tile's units [BB, BH].
            dh = unless_timed_out(product_of_held(held, dgates, S), poll_limit)
            if S.AHEAD:
                poll_limit, dgates = await_dgates(after, batch_tile + stride, back, step, poll_limit, S)

            # Cell and gates, then publish dgates.
            backward_step(dh, loaded, hidden, cell, saved, tile, step, B, S)
            if step > 0:
                arrive(arrivals.arrivals_ptr + batch_tile, poll_limit)
