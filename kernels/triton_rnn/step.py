"""The step family: every hidden size, batch and dtype; W_hh is read from L2 at every step, or held.

One launch for the whole sequence. A step is a round over tiles of sequences and units, which the programs share out;
backward, where products are split into parts of K, it is two. A grid-wide barrier (exchange.grid_barrier) ends a round,
since the next one needs the results of all. All programs must be resident at once. Those of a head wait for each other
alone, or for nobody where a head has just one.

Where W_hh of a tile's units fits in shared memory, a program can hold it: all its tiles have the same units, and are of
the sequences of its group. Before the product a tile waits for the other units' tiles of the same sequences, no others.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from . import indexing, noise, reset, states
from .equations import cell_backward, cell_forward, output, output_backward
from .exchange import arrive, grid_barrier, unless_timed_out, wait_for
from .indexing import Batch, rows_of_product
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, Pointer, Saved, name_in_profiles

# Rows [rows] of a tensor [*, K or more] that other programs wrote: zeros where not `mask` [rows], else times factors
# [*, K] or None.
Rows = namedtuple("Rows", "ptr row mask factors_ptr factors_row")
# Columns [columns] of weights: offset of each one's first element, whether there is one, from one k to the next.
# The `first` k of a part counts from the head's, see indexing.by_gate.
Columns = namedtuple("Columns", "ptr at mask stride")


class Arrivals(NamedTuple):
    arrivals_ptr: Pointer  # [HEADS, tiles of sequences] int32, programs that have arrived; None: step_plans.waits
    error_ptr: Pointer  # [1] int32, and after it the poll limit


# All that a round needs; `held` is W_hh [4 BH, BK] if it is held, backward [PARTS BH, BK]; the state before the step is
# in h_prev [B or T*B, H] and c_prev [B, H], the initial one or the last; sums are [PARTS, B, H] float32, which add up.
Forward = namedtuple("Forward", "batch arrivals weight_hh_ptr held hidden cell h_prev_ptr c_prev_ptr")
Backward = namedtuple("Backward", "batch arrivals weight_hh_ptr held hidden cell saved sums_ptr")


@triton.jit
def product(rows, columns, K: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, first=0):
    """Rows @ Columns, [rows, columns] float32, over K in tiles; rows are STRIDE apart."""
    acc = tl.zeros((rows.row.shape[0], columns.at.shape[0]), tl.float32)
    for k_start in range(0, K, S.BLOCK_K):
        a = load_rows(rows, k_start + tl.arange(0, S.BLOCK_K), K, STRIDE, S, first)
        acc = tl.dot(a, load_weights(columns, k_start, K, S, first), acc, input_precision=S.PRECISION)
    return acc


@triton.jit
def product_of_held(held, a, S: tl.constexpr):
    """a [rows, K] @ held^T [K, columns] -> [rows, columns] float32, computed as held a^T: wgmma takes 64 rows, or a
    multiple, and 8 columns or more."""
    return tl.trans(tl.dot(held, tl.trans(a), input_precision=S.PRECISION))


@triton.jit
def load_rows(rows, k, K: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, first=0):
    """The rows' columns k times the factors, zeros past K."""
    column, _ = indexing.units_at(indexing.by_gate(k, first, S), S)
    at, in_a = rows.row[:, None] * STRIDE + column[None, :], rows.mask[:, None] & (k < K)[None, :]
    a = tl.load(rows.ptr + at, mask=in_a, other=0.0, cache_modifier=".cg")
    return noise.dropout(a, rows.factors_ptr, rows.factors_row[:, None] * STRIDE + column[None, :], in_a)


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
def tiles_of_program(B, unit_tiles, S: tl.constexpr):
    """(The first tile of a program, the end, from one to the next); if HELD, all have the same units."""
    AXIS: tl.constexpr = 1 if S.HELD else 0
    return tl.program_id(AXIS), tl.cdiv(B, S.BLOCK_B) * (1 if S.HELD else unit_tiles), tl.num_programs(AXIS)


@triton.jit
def of_head(arrivals, B, S: tl.constexpr):
    """Those of the program's head, whose programs wait for no others."""
    first = tl.program_id(2) * tl.cdiv(B, S.BLOCK_B) if S.HEADS > 1 else 0
    return Arrivals(arrivals.arrivals_ptr + first, arrivals.error_ptr)


@triton.jit
def wait_for_tile(arrivals, batch_tile, times, poll_limit, step):
    """Wait until all programs that have units of a tile's sequences have arrived so many times; see wait_for."""
    expected = times * tl.num_programs(0)
    return wait_for(arrivals.arrivals_ptr + batch_tile, expected, poll_limit, arrivals.error_ptr, step)


@triton.jit
def h_before(batch_tile, step, call, poll_limit, S: tl.constexpr):
    """(The poll limit after the wait; h before a step of all units of a tile's sequences, with dropout, [BB, BK]).
    Past the last tile there is nothing to wait for, and h is zero."""
    if batch_tile < tl.cdiv(call.batch.B, S.BLOCK_B):
        poll_limit = wait_for_tile(call.arrivals, batch_tile, step, poll_limit, step)
    sequence = indexing.sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), call.batch)
    here, index = indexing.position(step, sequence, call.batch, S.REVERSE), sequence.index.to(tl.int64)
    rows = Rows(call.h_prev_ptr, here.row_prev, here.continues, call.hidden.dropout_h_ptr, index)
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.D, S.H, S)


@triton.jit
def dgates_after(batch_tile, step, times, call, poll_limit, S: tl.constexpr):
    """Like h_before, for backward: this program's part of K of dgates of the step after, after `times` arrivals."""
    if batch_tile < tl.cdiv(call.batch.B, S.BLOCK_B):
        poll_limit = wait_for_tile(call.arrivals, batch_tile, times, poll_limit, step)
    sequence = indexing.sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), call.batch)
    after = indexing.position(step + 1, sequence, call.batch, S.REVERSE)
    part = tl.program_id(0) % S.PARTS
    dgates_ptr, row = rows_of_dgates(call.cell.dgates_ptr, after.row, part, S)
    rows = Rows(dgates_ptr, row, after.continues, None, row)
    STRIDE: tl.constexpr = S.K if S.GATES == 4 and S.HEADS == 1 else 4 * S.H
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.K, STRIDE, S, part * S.K)


@triton.jit
def rows_of_dgates(dgates_ptr, row, part, S: tl.constexpr):
    """(Pointer, rows) of one part of K in dgates [T*B, 4H], the gates that h reaches; a row has K elements, or 4H; with
    heads of all K. Not Rows, since functions in Triton 3.4 cannot return None."""
    if S.HEADS > 1:
        dgates_ptr += (4 - S.GATES) * S.H
    elif S.GATES == 4:
        row = row * S.PARTS + part
    else:
        dgates_ptr += (4 - S.GATES) * S.H + part * S.K
    return dgates_ptr, row


@triton.jit
def product_with_h(tile, call, S: tl.constexpr):
    """W_hh h: all four gates of a tile's units, [BB, 4 BH]."""
    index = tile.sequence.index.to(tl.int64)
    h = Rows(call.h_prev_ptr, tile.position.row_prev, tile.position.continues, call.hidden.dropout_h_ptr, index)
    return product(h, weights_of_gates(call.weight_hh_ptr, tile.unit_tile, S), S.D, S.H, S)


@triton.jit
def weights_of_gates(weight_hh_ptr, unit_tile, S: tl.constexpr):
    """W_hh of all gates of a tile's units, as Columns; zeros for a gate that h does not reach."""
    FIRST: tl.constexpr = 4 - S.GATES
    column, place = indexing.columns_of_gates(unit_tile, S)
    mask = place < S.D
    if FIRST > 0:
        mask &= column >= FIRST * S.H
        column -= FIRST * S.H
    return Columns(weight_hh_ptr, column.to(tl.int64) * S.D, mask, 1)


@triton.jit
def rows_of_weights(weight_hh_ptr, part, S: tl.constexpr):
    """W_hh from the first row of a part of K on; with heads from the head's first."""
    number = tl.program_id(2) if S.HEADS > 1 else part
    return weight_hh_ptr + tl.cast(number, tl.int64) * (S.D * S.D if S.HEADS > 1 else S.K * S.D)


@triton.jit
def load_cells(call, cells, S: tl.constexpr):
    """What comes to a tile's gates from the input, as stored; c, and the rest, before the step."""
    x = states.load_gates(call.cell.gates_ptr, cells.gates_at, cells.valid, S.H, True, S.FROM_X)
    c_prev = reset.load_state(call.c_prev_ptr, cells.state_at, call.cell.reset_c_ptr, cells)
    return x, c_prev, states.load_rest_before(call.c_prev_ptr, cells, call.batch.B, S)


@triton.jit
def cell_round(step, call, poll_limit, S: tl.constexpr):
    """A step. Returns the poll limit after its waits for h before."""
    first, end, stride = tiles_of_program(call.batch.B, S.TILES, S)
    if S.AHEAD:
        poll_limit, h_prev = h_before(first, step, call, poll_limit, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S)
        cells = tile.cells

        # Load, and product: all four gates of the tile's units, [BB, 4 BH].
        if S.HELD and not S.AHEAD:
            poll_limit, h_prev = h_before(tile.batch_tile, step, call, poll_limit, S)
        if S.HELD:
            x, c_prev, rest_prev = load_cells(call, cells, S)
            z = product_of_held(call.held, h_prev, S)
        else:
            z = product_with_h(tile, call, S)
            x, c_prev, rest_prev = load_cells(call, cells, S)
        z = unless_timed_out(z, poll_limit)
        if S.AHEAD:  # these cells are computed while h of the next tile is loaded
            poll_limit, h_prev = h_before(number + stride, step, call, poll_limit, S)

        # Gates, cell and output. Padding gets zeros.
        constants = states.load_constants_forward(call.cell, tile.unit[None, :], S.H)
        gates, c, rest = cell_forward(x, indexing.split_gates(z), c_prev, rest_prev, constants, S)
        h = tl.where(cells.valid, output(gates[3], c, S), 0.0)
        c = noise.zoneout(c, c_prev, call.cell.zoneout_c_ptr, cells)

        # Store.
        tl.store(call.cell.c_n_ptr + cells.state_at, c, mask=cells.valid)
        states.store_rest(call.cell.c_n_ptr, rest, cells, cells.valid, call.batch.B, S)
        states.save(gates, c, call.cell, cells, S.H)
        states.store_hidden(h, call.hidden, call.h_prev_ptr, cells)
        if S.HELD and step + 1 < call.batch.T:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit(repr=name_in_profiles("step_forward_kernel"), do_not_specialize=["T", "B"])
def step_forward_kernel(
    weight_hh_ptr,  # [GATES H, D]
    hidden: Hidden, cell: Cell, arrivals: Arrivals, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps, each a round over all tiles."""
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    arrivals, held = of_head(arrivals, B, S) if WAITS else arrivals, None
    if S.HELD:
        weights = weights_of_gates(weight_hh_ptr, tl.program_id(0), S)
        held = tl.trans(load_weights(weights, 0, S.D, S))
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    for step in range(T):
        h_prev_ptr = tl.where(step == 0, hidden.h0_ptr, hidden.h_ptr)
        c_prev_ptr = tl.where(step == 0, cell.c0_ptr, cell.c_n_ptr)
        call = Forward(batch, arrivals, weight_hh_ptr, held, hidden, cell, h_prev_ptr, c_prev_ptr)
        poll_limit = cell_round(step, call, poll_limit, S)
        if (WAITS and not S.HELD) and step + 1 < T:
            poll_limit = grid_barrier(arrivals, step + 1, poll_limit, step)
        if not WAITS and S.HEADS > 1:  # the only program of a head
            tl.debug_barrier()


@triton.jit
def product_with_dgates(tile, step, call, S: tl.constexpr):
    """dgates of the step after times W_hh, [BB, units]; of the tile's part of K alone, if there are several."""
    STRIDE: tl.constexpr = S.K if S.GATES == 4 and S.HEADS == 1 else 4 * S.H
    part = tile.unit_tile % S.PARTS
    after = indexing.position(step + 1, tile.sequence, call.batch, S.REVERSE)
    dgates_ptr, row = rows_of_dgates(call.cell.dgates_ptr, after.row, part, S)
    row = rows_of_product(row)
    dgates = Rows(dgates_ptr, row, rows_of_product(after.continues), None, row)
    weight_ptr = rows_of_weights(call.weight_hh_ptr, part, S)
    columns = Columns(weight_ptr, tile.place, tile.place < S.D, S.D)
    return indexing.rows_of_tile(product(dgates, columns, S.K, STRIDE, S, part * S.K))


@triton.jit
def product_round_backward(step, times, call, poll_limit, S: tl.constexpr):
    """Products of parts of K, for PARTS times as many units: such tiles read less. The cells' round adds them up."""
    first, end, stride = tiles_of_program(call.batch.B, tl.cdiv(S.TILES, S.PARTS) * S.PARTS, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S, S.PARTS)
        if S.HELD:
            poll_limit, dgates = dgates_after(tile.batch_tile, step, times, call, poll_limit, S)
            dh = product_of_held(call.held, dgates, S)
        else:
            dh = product_with_dgates(tile, step, call, S)
        dh = unless_timed_out(dh, poll_limit)
        sums_ptr = call.sums_ptr + tl.cast(call.batch.B, tl.int64) * S.H * (tile.unit_tile % S.PARTS)
        tl.store(sums_ptr + tile.cells.state_at, dh, mask=tile.cells.in_tile)
        if S.HELD:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit
def sum_of_parts(tile, call, S: tl.constexpr):
    """The sum of all parts' products, [BB, BH]."""
    PARTS: tl.constexpr = S.PARTS  # Triton 3.4 takes no field of a tuple for static_range
    sums_ptr, dh = call.sums_ptr + tile.cells.state_at, tl.zeros(tile.cells.at.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        dh += tl.load(sums_ptr, mask=tile.cells.valid, other=0.0, cache_modifier=".cg")
        sums_ptr += tl.cast(call.batch.B, tl.int64) * S.H
    return dh


@triton.jit
def gradient_of_h(tile, step, times, dgates, call, poll_limit, S: tl.constexpr):
    """(The poll limit after its waits; dh of a tile from the step after): a product with dgates, of which there may be
    a sum of parts, or with W_hh that is held."""
    if S.HELD and S.PARTS > 1:
        poll_limit = wait_for_tile(call.arrivals, tile.batch_tile, times + 1, poll_limit, step)
    if S.PARTS > 1:
        dh = sum_of_parts(tile, call, S)
    elif S.HELD:
        dh = product_of_held(call.held, dgates, S)
    else:
        dh = product_with_dgates(tile, step, call, S)
    return poll_limit, unless_timed_out(dh, poll_limit)


@triton.jit
def cell_round_backward(step, times, call, poll_limit, S: tl.constexpr):
    """The gradient of h, then those of the cells. Returns the poll limit after its waits for dgates."""
    EARLY: tl.constexpr = S.HELD and S.BLOCK_B * S.UNITS <= 1024  # for more cells a thread has no registers left
    cell, B = call.cell, call.batch.B
    first, end, stride = tiles_of_program(B, S.TILES, S)
    if S.AHEAD:
        poll_limit, dgates = dgates_after(first, step, times, call, poll_limit, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S)
        cells = tile.cells

        # Load, and product.
        if not S.AHEAD:
            dgates = None
        if S.HELD and S.PARTS == 1 and not S.AHEAD:
            poll_limit, dgates = dgates_after(tile.batch_tile, step, times, call, poll_limit, S)
        if EARLY:
            gates, c, c_prev = states.load_saved(call.saved, step, cells, S.H)
        poll_limit, dh = gradient_of_h(tile, step, times, dgates, call, poll_limit, S)
        if S.AHEAD:  # these cells are computed while dgates of the next tile are loaded
            poll_limit, dgates = dgates_after(number + stride, step, times, call, poll_limit, S)
        dh = states.gradient_of_h(dh, states.load_gradients_given(call.hidden, cells), call.hidden, cells)
        if not EARLY:
            gates, c, c_prev = states.load_saved(call.saved, step, cells, S.H)

        # Output and cell. In padding every factor was loaded as zero, so its gradients are zero.
        gates, c, c_prev = states.as_float(gates, c, c_prev)
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        dc, dc_stayed = noise.zoneout_backward(dc, cell.zoneout_c_ptr, cells)
        c = noise.without_zoneout(c, gates, c_prev, cell.zoneout_c_ptr, S)
        dz_o, dc_by_m = output_backward(gates[3], c, dh, S)
        peepholes = states.load_constants(cell.weight_peephole_ptr, tile.unit[None, :], S.H)
        drest = states.load_gradient_of_rest(cell.dc_ptr, cells, B, S)
        dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m, drest, peepholes, S)
        dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)

        # Store.
        states.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, S.H)
        reset.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
        states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)
        if S.HELD and step > 0:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit(repr=name_in_profiles("step_backward_kernel"), do_not_specialize=["T", "B"])
def step_backward_kernel(
    weight_hh_ptr, sums_ptr, hidden: HiddenBackward, cell: CellBackward, saved: Saved, arrivals: Arrivals,
    lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first; products of parts of K are a round before the cells."""
    ROUNDS: tl.constexpr = 2 if S.PARTS > 1 else 1
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    tl.static_assert(S.GATES * S.D % S.PARTS == 0, "parts of K are equal")
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    arrivals, held = of_head(arrivals, B, S) if WAITS else arrivals, None
    if S.HELD:
        part = tl.program_id(0) % S.PARTS
        weight_ptr = rows_of_weights(weight_hh_ptr, part, S)
        column = tl.program_id(0) // S.PARTS * (S.PARTS * S.UNITS) + tl.arange(0, S.PARTS * S.UNITS)
        held = tl.trans(load_weights(Columns(weight_ptr, column, column < S.D, S.D), 0, S.K, S, part * S.K))
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    call = Backward(batch, arrivals, weight_hh_ptr, held, hidden, cell, saved, sums_ptr)
    for back in range(T):
        step = T - 1 - back
        times = ROUNDS * back  # arrivals of each program before this step, for a tile if HELD
        if S.PARTS > 1:
            poll_limit = product_round_backward(step, times, call, poll_limit, S)
            if not S.HELD:
                poll_limit = grid_barrier(arrivals, times + 1, poll_limit, step)
        poll_limit = cell_round_backward(step, times, call, poll_limit, S)
        if (WAITS and not S.HELD) and step > 0:
            poll_limit = grid_barrier(arrivals, times + ROUNDS, poll_limit, step)
        if not WAITS and S.HEADS > 1:
            tl.debug_barrier()
