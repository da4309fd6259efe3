"""The step family: one launch runs the whole sequence, and W_hh is read from L2 at every step.

It works for every hidden size, batch size and dtype.

A step is a round over tiles of sequences and units, which the programs share out. With PARTS > 1 a backward step is two
rounds: a round of products, each over one part of K, and a round of cells, which add up the products. A grid-wide
barrier ends each round, since the next round needs the results of all programs. The programs of a head wait only for
each other. If a head has one program, that program waits for no other.
"""

import triton
import triton.language as tl

from ..cell import indexing, states
from ..cell.indexing import Batch, rows_of_product
from ..exchange import grid_barrier, unless_timed_out
from ..parameters import Arrivals, CellBackward, CellPointers, HiddenBackward, HiddenPointers, Saved, name_in_profiles
from . import operands
from .cells import backward_step, forward_cells, load_constants_and_h
from .operands import Rows, load_rows, load_weights, of_head


@triton.jit
def product_over_k(rows, columns, K: tl.constexpr, S: tl.constexpr, first=0):
    """Return the product of Rows and Columns, [rows, columns] float32, with BLOCK_K elements of K at a time."""
    acc = tl.zeros((rows.at.shape[0], columns.at.shape[0]), tl.float32)
    for k_start in range(0, K, S.BLOCK_K):
        a = load_rows(rows, k_start + tl.arange(0, S.BLOCK_K), K, S, first)
        acc = tl.dot(a, load_weights(columns, k_start, K, S, first), acc, input_precision=S.PRECISION)
    return acc


@triton.jit(repr=name_in_profiles("step_forward_kernel"), do_not_specialize=["T", "B"])
def step_forward_kernel(
    weight_hh_ptr,  # [GATES H, D]
    hidden: HiddenPointers, cell: CellPointers, arrivals: Arrivals, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """Run all steps forward. The grid is (programs, 1, heads)."""
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    arrivals = of_head(arrivals, B, S) if WAITS else arrivals
    for step in range(T):
        h_prev_ptr = tl.where(step == 0, hidden.h0_ptr, hidden.h_ptr)
        c_prev_ptr = tl.where(step == 0, cell.c0_ptr, cell.c_n_ptr)
        for number in range(tl.program_id(0), tl.cdiv(B, S.BLOCK_B) * S.TILES, tl.num_programs(0)):
            # Load and product: z_h = W_hh h of a tile's units [BB, 4 BH], then of each gate [BB, BH].
            tile = indexing.tile_of(number, step, batch, S)
            at, factors_at = tile.position.row_prev * S.H, tile.sequence.index.to(tl.int64) * S.H
            h_prev = Rows(h_prev_ptr, at, tile.position.continues, hidden.dropout_h_ptr, factors_at)
            z_h = product_over_k(h_prev, operands.weights_of_gates(weight_hh_ptr, tile.unit_tile, S), S.D, S)
            z_x, c_prev, rest_prev = states.load_cells(c_prev_ptr, cell, tile.cells, B, S)
            z_h = indexing.split_gates(unless_timed_out(z_h, poll_limit))

            # Gates and cell, then store h.
            constants, share_c, h_kept = load_constants_and_h(h_prev_ptr, hidden, cell, tile, S)
            h, _, _ = forward_cells(z_x, z_h, c_prev, rest_prev, constants, share_c, cell, tile, B, S)
            states.store_hidden(h, hidden, h_kept, tile.cells)
        if WAITS and step + 1 < T:
            poll_limit = grid_barrier(arrivals, step + 1, poll_limit, step)
        # A launch that does not wait has one step, or heads with one program each, which waits for its own threads.
        if not WAITS and S.HEADS > 1:
            tl.debug_barrier()


@triton.jit
def product_with_dgates(weight_hh_ptr, dgates_ptr, tile, step, batch, S: tl.constexpr):
    """Return W_hh^T dgates of the next step, [BB, units]. With PARTS > 1 only the tile's part of K is summed over.

    After the last step no state continues, so the product is 0.
    """
    part = tile.unit_tile % S.PARTS
    after = indexing.position(step + 1, tile.sequence, batch, S.REVERSE)
    dgates_ptr, at = operands.dgates_of_part(dgates_ptr, rows_of_product(after.row), part, S)
    dgates = Rows(dgates_ptr, at, rows_of_product(after.continues), None, at)
    columns = operands.weights_of_part(weight_hh_ptr, part, tile.place, S)
    return indexing.rows_of_tile(product_over_k(dgates, columns, S.K, S, part * S.K))


@triton.jit
def product_round(weight_hh_ptr, dgates_ptr, sums_ptr, step, batch, poll_limit, S: tl.constexpr):
    """Compute and store the products over parts of K. The next round adds them up.

    A program computes one part for the units of PARTS tiles, which reads less than all of K for the units of one tile.
    """
    unit_tiles = tl.cdiv(S.TILES, S.PARTS) * S.PARTS
    for number in range(tl.program_id(0), tl.cdiv(batch.B, S.BLOCK_B) * unit_tiles, tl.num_programs(0)):
        tile = indexing.tile_of(number, step, batch, S, S.PARTS)
        dh = unless_timed_out(product_with_dgates(weight_hh_ptr, dgates_ptr, tile, step, batch, S), poll_limit)
        operands.store_sum(dh, sums_ptr, tile, batch.B, S)


@triton.jit(repr=name_in_profiles("step_backward_kernel"), do_not_specialize=["T", "B"])
def step_backward_kernel(
    weight_hh_ptr,  # [GATES H, D]
    sums_ptr,  # [PARTS, B, H] float32: the products over parts of K. None if there is one part
    hidden: HiddenBackward, cell: CellBackward, saved: Saved, arrivals: Arrivals, lengths_ptr, resets_ptr, T, B,
    S: tl.constexpr,
):  # fmt: skip
    """Run all steps backward, from the last to the first. The grid is (programs, 1, heads)."""
    ROUNDS: tl.constexpr = 2 if S.PARTS > 1 else 1
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    tl.static_assert(S.GATES * S.D % S.PARTS == 0, "parts of K are equal")
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    arrivals = of_head(arrivals, B, S) if WAITS else arrivals
    for back in range(T):
        step = T - 1 - back
        if S.PARTS > 1:
            product_round(weight_hh_ptr, cell.dgates_ptr, sums_ptr, step, batch, poll_limit, S)
            poll_limit = grid_barrier(arrivals, ROUNDS * back + 1, poll_limit, step)
        for number in range(tl.program_id(0), tl.cdiv(B, S.BLOCK_B) * S.TILES, tl.num_programs(0)):
            # Product: dh = W_hh^T dgates, for the tile's units [BB, BH]. Then cell and gates.
            tile = indexing.tile_of(number, step, batch, S)
            if S.PARTS > 1:
                dh = operands.sum_of_parts(sums_ptr, tile, B, S)
            else:
                dh = product_with_dgates(weight_hh_ptr, cell.dgates_ptr, tile, step, batch, S)
            backward_step(unless_timed_out(dh, poll_limit), (), hidden, cell, saved, tile, step, B, S)
        if WAITS and step > 0:
            poll_limit = grid_barrier(arrivals, ROUNDS * (back + 1), poll_limit, step)
        if not WAITS and S.HEADS > 1:
            tl.debug_barrier()
