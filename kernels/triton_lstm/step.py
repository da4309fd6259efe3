"""The step family: every hidden size, batch, projection and dtype; W_hh is read from L2 at every step, or held.

One launch for the whole sequence. A step is a round over tiles of sequences and units, which the programs share out.
Tiles are [batch, units]. A grid-wide barrier (exchange.grid_barrier) ends a round, since the next one needs the results
of all. More rounds belong to a step where something needs all units of a sequence: a projection (h = W_hr m; m is the
output of the cell, see cell.py), the layer norms of W_hh h and of c (norm.py), of which a projection has none. All
programs must be resident at once.

Where W_hh of a tile's units fits in shared memory, a program can hold it: all its tiles have the same units, and are of
the sequences of its group. Before the product a tile waits for the other units' tiles of the same sequences, no others.
"""

import itertools
from collections import namedtuple
from math import ceil

import torch
import triton
import triton.language as tl

from ..cards import Card
from ..cells import CELLS
from ..memory import Buffer
from ..problem import Problem
from . import indexing
from .cells import cell_backward, cell_forward
from .cells.lstm import gates_backward, normed_output_backward, output
from .exchange import arrive, grid_barrier, unless_timed_out, wait_for
from .features import MOST_ROWS
from .norm import gates_of_unit, moments, moments_of_tiles, normalise, normalise_backward, store_pair, sums_of_tiles
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, Saved
from .planning import Held, Plan, Step, expected, power_of_two

# Rows [rows] of a tensor [*, K or more] that other programs wrote: zeros where not `mask`, else times factors [*, K] or
# None.
Rows = namedtuple("Rows", "ptr row mask factors_ptr factors_row")
# Columns [columns] of weights: offset of each one's first element, whether there is one, from one k to the next.
Columns = namedtuple("Columns", "ptr at mask stride")
# What a layer norm made of rows: unit [*, K], gain [K]; and for `normalise_backward` scale and means, [rows].
Normed = namedtuple("Normed", "unit_ptr gain_ptr scale mean_d mean_d_unit")


@triton.jit
def product(rows, columns, normed, K: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr):
    """Rows @ Columns, [rows, columns] float32, over K in tiles; rows are STRIDE apart. With `normed` they are the
    gradient of a layer norm's result, and the product is of the gradient of what was normalised."""
    acc = tl.zeros((rows.row.shape[0], columns.at.shape[0]), tl.float32)
    for k_start in range(0, K, S.BLOCK_K):
        k = k_start + tl.arange(0, S.BLOCK_K)
        a, at, in_a = load_rows(rows, k, K, STRIDE)
        if normed is not None:
            unit = tl.load(normed.unit_ptr + at, mask=in_a, other=0.0).to(tl.float32)
            gain = tl.load(normed.gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            d = gain[None, :] * a.to(tl.float32)
            means = normed.mean_d[:, None], normed.mean_d_unit[:, None]
            a = tl.where(in_a, normalise_backward(d, unit, normed.scale[:, None], *means), 0.0).to(a.dtype)
        acc = tl.dot(a, load_weights(columns, k_start, K, S.BLOCK_K), acc, input_precision=S.PRECISION)
    return acc


@triton.jit
def product_of_held(held, a, S: tl.constexpr):
    """a @ held^T of weights `held` [columns, K] and rows of a [rows, K] -> [rows, columns] float32.

    Computed as held a^T: wgmma takes 64 rows, or a multiple, and 8 columns or more.
    """
    return tl.trans(tl.dot(held, tl.trans(a), input_precision=S.PRECISION))


@triton.jit
def load_rows(rows, k, K: tl.constexpr, STRIDE: tl.constexpr):
    """Columns k of Rows, times the factors; where they lie; which of them there are."""
    at, in_a = rows.row[:, None] * STRIDE + k[None, :], rows.mask[:, None] & (k < K)[None, :]
    a = tl.load(rows.ptr + at, mask=in_a, other=0.0, cache_modifier=".cg")
    if rows.factors_ptr is not None:
        a *= tl.load(rows.factors_ptr + rows.factors_row[:, None] * K + k[None, :], mask=in_a, other=0.0)
    return a, at, in_a


@triton.jit
def load_weights(columns, k_start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K rows of Columns, from k_start on."""
    offset = tl.arange(0, BLOCK_K)
    at = columns.ptr + columns.at[None, :] + offset[:, None] * columns.stride
    start = tl.cast(k_start, tl.int64) * columns.stride  # K times the stride may be more than int32 holds
    return tl.load(at + start, mask=(k_start + offset < K)[:, None] & columns.mask[None, :], other=0.0)


@triton.jit
def tiles_of_program(B, width, S: tl.constexpr):
    """(The first tile of a program, the end, from one to the next); if HELD, all have the same units."""
    AXIS: tl.constexpr = 1 if S.HELD else 0
    batch_tiles = tl.cdiv(B, S.BLOCK_B)
    return tl.program_id(AXIS), batch_tiles * (1 if S.HELD else tl.cdiv(width, S.UNITS)), tl.num_programs(AXIS)


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
    place = indexing.position(step, sequence, call.batch, S.REVERSE)
    row, index = indexing.row_before(step, place.time, sequence.index, call.batch.B, S.REVERSE), sequence.index
    rows = Rows(call.h_prev_ptr, row, place.continues, call.hidden.dropout_h_ptr, index.to(tl.int64))
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.P, S.P)[0]


@triton.jit
def dgates_after(batch_tile, step, times, call, poll_limit, S: tl.constexpr):
    """Like h_before, for backward: this program's part of K of dgates of the step after, after `times` arrivals."""
    if batch_tile < tl.cdiv(call.batch.B, S.BLOCK_B):
        poll_limit = wait_for_tile(call.arrivals, batch_tile, times, poll_limit, step)
    sequence = indexing.sequences(batch_tile * S.BLOCK_B + tl.arange(0, S.BLOCK_B), call.batch)
    place = indexing.position(step + 1, sequence, call.batch, S.REVERSE)
    at = rows_of_dgates(call.cell.dgates_ptr, place.row, tl.program_id(0) % S.PARTS, S)
    rows = Rows(at[0], at[1], place.continues, None, at[1])
    K: tl.constexpr = S.GATES * S.H // S.PARTS
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), K, K if S.GATES == 4 else 4 * S.H)[0]


@triton.jit
def rows_of_dgates(dgates_ptr, row, part, S: tl.constexpr):
    """(Pointer, rows) of one part of K of dgates [T*B, 4H], of the gates that h reaches; rows are of K, or of 4H. Not
    Rows, since functions of Triton 3.4 cannot return None."""
    if S.GATES == 4:
        row = row * S.PARTS + part
    else:
        dgates_ptr += (4 - S.GATES) * S.H + part * (S.GATES * S.H // S.PARTS)
    return dgates_ptr, row


# Kernels' pointers that no other family has, see parameters.py, and those of the layer norms and the projection: W_hh h
# of a step, [B, 4H, in full tiles] float32, and its moments, [tiles, B, 2] float32; m, [B, H] of a step; o and c of a
# step in cell, [2, B, H] float32, and moments of c; how many programs have arrived, see exchange.grid_barrier.
Recurrent = namedtuple("Recurrent", "weight_hh_ptr gain_hh_ptr product_ptr moments_hh_ptr")
Output = namedtuple("Output", "weight_hr_ptr m_ptr gain_c_ptr bias_c_ptr cell_ptr moments_c_ptr")
Arrivals = namedtuple("Arrivals", "arrivals_ptr error_ptr")  # of each tile of sequences; None with one round alone
# All that a round of forward needs; the state before the step is in h_prev and c_prev, the initial one or the last.
Forward = namedtuple("Forward", "batch arrivals recurrent held hidden cell output h_prev_ptr c_prev_ptr")


@triton.jit
def product_with_h(tile, call, S: tl.constexpr):
    """W_hh h: all four gates of a tile's units, [BB, 4 BH]."""
    index = tile.sequence.index.to(tl.int64)
    h = Rows(call.h_prev_ptr, tile.row_prev, tile.place.continues, call.hidden.dropout_h_ptr, index)
    return product(h, weights_of_gates(call.recurrent.weight_hh_ptr, tile.unit_tile, S), None, S.P, S.P, S)


@triton.jit
def weights_of_gates(weight_hh_ptr, unit_tile, S: tl.constexpr):
    """W_hh of all gates of a tile's units, as Columns; zeros for a gate that h does not reach."""
    FIRST: tl.constexpr = 4 - S.GATES
    column, unit = indexing.columns_of_gates(unit_tile, S)
    mask = unit < S.H
    if FIRST > 0:
        mask &= column >= FIRST * S.H
        column -= FIRST * S.H
    return Columns(weight_hh_ptr, column.to(tl.int64) * S.P, mask, 1)


@triton.jit
def product_place(tile, S: tl.constexpr):
    """Where a tile of W_hh h lies in [B, tiles, 4 BH]."""
    TILES: tl.constexpr = (S.H + S.UNITS - 1) // S.UNITS
    number = tile.sequence.index[:, None].to(tl.int64) * TILES + tile.unit_tile
    return number * (4 * S.UNITS) + tl.arange(0, 4 * S.UNITS)[None, :]


@triton.jit
def product_round(step, call, poll_limit, S: tl.constexpr):
    """W_hh h of all units, and the moments that its layer norm needs."""
    first, end, stride = tiles_of_program(call.batch.B, S.H, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.H, S)
        z = unless_timed_out(product_with_h(tile, call, S), poll_limit)
        tl.store(call.recurrent.product_ptr + product_place(tile, S), z, mask=tile.sequence.in_batch[:, None])
        column, unit = indexing.columns_of_gates(tile.unit_tile, S)
        store_moments(call.recurrent.moments_hh_ptr, tile, z, unit < S.H, 4, call.batch.B, S)


@triton.jit
def store_moments(moments_ptr, tile, v, mask, GATES: tl.constexpr, B, S: tl.constexpr):
    """Moments of a tile's v [BB, columns], of which GATES are of each unit."""
    count = GATES * tl.minimum(S.H - tile.unit_tile * S.UNITS, S.UNITS)
    mean, squares = moments(v, mask[None, :], count)
    store_pair(moments_ptr, tile, B, mean, squares)


@triton.jit
def normed_product(tile, call, S: tl.constexpr):
    """LN(W_hh h), whose parts all programs have stored."""
    sequence, norm = tile.sequence, call.recurrent
    column, unit = indexing.columns_of_gates(tile.unit_tile, S)
    at = norm.product_ptr + product_place(tile, S)
    z = tl.load(at, mask=sequence.in_batch[:, None], other=0.0, cache_modifier=".cg")
    mean, scale = moments_of_tiles(norm.moments_hh_ptr, sequence, call.batch.B, 4, S)
    gain = tl.load(norm.gain_hh_ptr + column, mask=unit < S.H, other=0.0).to(tl.float32)
    return normalise(z, mean[:, None], scale[:, None], gain[None, :], 0.0)


@triton.jit
def load_cells(call, cells, H: tl.constexpr):
    """The part of a tile's gates from the input, as stored, and c before the step."""
    x = indexing.load_gates(call.cell.gates_ptr, cells.gates_at, cells.valid, H, True)
    return x, indexing.load_state(call.c_prev_ptr, call.cell.reset_c_ptr, cells)


@triton.jit
def cell_round(step, call, poll_limit, S: tl.constexpr):
    """The cells, and h if that needs no other units. Returns the poll limit after its waits for h before."""
    NORM_C: tl.constexpr = call.output.gain_c_ptr is not None
    PROJECT: tl.constexpr = call.output.weight_hr_ptr is not None
    first, end, stride = tiles_of_program(call.batch.B, S.H, S)
    if S.AHEAD:
        poll_limit, h_prev = h_before(first, step, call, poll_limit, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.H, S)
        cells = tile.cells

        # Load, and product: all four gates of the tile's units, [BB, 4 BH].
        if S.HELD and not S.AHEAD:
            poll_limit, h_prev = h_before(tile.batch_tile, step, call, poll_limit, S)
        if S.HELD:
            x, c_prev = load_cells(call, cells, S.H)
            z = unless_timed_out(product_of_held(call.held, h_prev, S), poll_limit)
        elif call.recurrent.gain_hh_ptr is not None:
            x, c_prev = load_cells(call, cells, S.H)
            z = unless_timed_out(normed_product(tile, call, S), poll_limit)
        else:
            z = unless_timed_out(product_with_h(tile, call, S), poll_limit)
            x, c_prev = load_cells(call, cells, S.H)
        if S.AHEAD:  # these cells are computed while h of the next tile is loaded
            poll_limit, h_prev = h_before(number + stride, step, call, poll_limit, S)

        # Gates and cell.
        z = indexing.split_gates(z)
        peepholes = indexing.load_peepholes(call.cell.weight_peephole_ptr, tile.unit[None, :], S.H)
        gates, c, m = cell_forward(x, z, c_prev, peepholes, S)
        m = tl.where(cells.valid, m, 0.0)  # padding gets zeros
        if NORM_C:
            tl.store(call.output.cell_ptr + cells.state_at, gates[3], mask=cells.valid)
            tl.store(call.output.cell_ptr + tl.cast(call.batch.B, tl.int64) * S.H + cells.state_at, c, mask=cells.valid)
            store_moments(call.output.moments_c_ptr, tile, c, tile.unit < S.H, 1, call.batch.B, S)
        c = indexing.zoneout(call.cell.zoneout_c_ptr, cells, c_prev, c)

        # Store.
        if PROJECT:
            tl.store(call.output.m_ptr + cells.state_at, m, mask=cells.in_tile)
        tl.store(call.cell.c_n_ptr + cells.state_at, c, mask=cells.valid)
        if call.cell.c_ptr is not None:  # saved for backward
            tl.store(call.cell.c_ptr + cells.at, tl.where(cells.valid, c, 0.0), mask=cells.in_tile)
            indexing.store_gates(call.cell.gates_ptr, cells.gates_at, cells.valid, gates, S.H)
        if not (PROJECT or NORM_C):
            indexing.store_hidden(m, tile, step, call.hidden, call.h_prev_ptr, S.P)
        if S.HELD and step + 1 < call.batch.T:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit
def output_round(step, call, poll_limit, S: tl.constexpr):
    """h, where it needs the cells of all units: W_hr m, or o tanh(LN(c))."""
    first, end, stride = tiles_of_program(call.batch.B, S.P, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.P, S)
        sequence, cells, of = tile.sequence, tile.cells, call.output
        if of.weight_hr_ptr is not None:
            index = sequence.index.to(tl.int64)
            m = Rows(of.m_ptr, index, tile.place.valid, None, index)
            h = product(
                m, Columns(of.weight_hr_ptr, tile.unit.to(tl.int64) * S.H, tile.unit < S.P, 1), None, S.H, S.H, S
            )
        else:
            o = tl.load(of.cell_ptr + cells.state_at, mask=cells.valid, other=0.0)
            c_at = tl.cast(call.batch.B, tl.int64) * S.H + cells.state_at
            c = tl.load(of.cell_ptr + c_at, mask=cells.valid, other=0.0)
            mean, scale = moments_of_tiles(of.moments_c_ptr, sequence, call.batch.B, 1, S)
            gain, bias = indexing.load_affine(of.gain_c_ptr, of.bias_c_ptr, tile.unit[None, :], S.H)
            h = output(o, normalise(c, mean[:, None], scale[:, None], gain, bias))
        h = tl.where(cells.valid, unless_timed_out(h, poll_limit), 0.0)
        indexing.store_hidden(h, tile, step, call.hidden, call.h_prev_ptr, S.P)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_step_forward_kernel(
    recurrent: Recurrent, hidden: Hidden, cell: Cell, output: Output, arrivals: Arrivals,
    lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps. Each is a round over all tiles, and one more for each thing that needs all units of a sequence: the
    layer norm of W_hh h before the cell; the layer norm of c, or a projection, after it."""
    NORM_HH: tl.constexpr = recurrent.gain_hh_ptr is not None
    OUTPUT: tl.constexpr = output.weight_hr_ptr is not None or output.gain_c_ptr is not None
    ROUNDS: tl.constexpr = 1 + NORM_HH + OUTPUT
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    held = None
    if S.HELD:
        weights = weights_of_gates(recurrent.weight_hh_ptr, tl.program_id(0), S)
        held = tl.trans(load_weights(weights, 0, S.P, S.BLOCK_K))
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    for step in range(T):
        h_prev_ptr = tl.where(step == 0, hidden.h0_ptr, hidden.h_ptr)
        c_prev_ptr = tl.where(step == 0, cell.c0_ptr, cell.c_n_ptr)
        call = Forward(batch, arrivals, recurrent, held, hidden, cell, output, h_prev_ptr, c_prev_ptr)
        times = ROUNDS * step  # arrivals of each program before this step
        if NORM_HH:
            product_round(step, call, poll_limit, S)
            poll_limit = grid_barrier(arrivals, times + 1, poll_limit, step)
        poll_limit = cell_round(step, call, poll_limit, S)
        if OUTPUT:
            poll_limit = grid_barrier(arrivals, times + (ROUNDS - 1), poll_limit, step)
            output_round(step, call, poll_limit, S)
        if (WAITS and not S.HELD) and step + 1 < T:
            poll_limit = grid_barrier(arrivals, times + ROUNDS, poll_limit, step)


# Likewise. Sums are the products of a step, [PARTS, B, P] float32, which add up; sums_c, [tiles, B, 2] float32, those
# of the gradient of unit_c, and of it times unit_c; sums_hh, [2, tiles, B, 2], those of unit_hh at even and odd steps.
RecurrentBackward = namedtuple(
    "RecurrentBackward", "weight_hh_ptr sums_ptr gain_hh_ptr unit_hh_ptr scale_hh_ptr sums_hh_ptr"
)
OutputBackward = namedtuple(
    "OutputBackward", "weight_hr_ptr dh_total_ptr gain_c_ptr bias_c_ptr unit_c_ptr scale_c_ptr sums_c_ptr"
)
# All that a round of backward needs.
Backward = namedtuple("Backward", "batch arrivals recurrent held hidden cell saved output")


@triton.jit
def pairs_of_step(step, B, S: tl.constexpr):
    """Where the tiles' pairs of a step begin: two steps alternate, since one is written while the other is read."""
    TILES: tl.constexpr = (S.H + S.UNITS - 1) // S.UNITS
    return tl.cast(step % 2, tl.int64) * (TILES * 2) * B


@triton.jit
def product_with_dgates(tile, step, call, S: tl.constexpr):
    """dgates of the step after times W_hh, [BB, units]; of the tile's part of K alone, if there are several."""
    NORM_HH: tl.constexpr = call.recurrent.gain_hh_ptr is not None
    H: tl.constexpr = S.H
    P: tl.constexpr = S.P
    K: tl.constexpr = S.GATES * H // S.PARTS
    part = tile.unit_tile % S.PARTS
    after = indexing.position(step + 1, tile.sequence, call.batch, S.REVERSE)
    normed = None
    if NORM_HH:
        pairs_ptr = call.recurrent.sums_hh_ptr + pairs_of_step(step + 1, call.batch.B, S)
        sum_d, sum_d_unit = sums_of_tiles(pairs_ptr, tile.sequence.index, tile.place.valid, call.batch.B, S)
        scale = tl.load(call.recurrent.scale_hh_ptr + after.row, mask=after.continues, other=0.0)
        gain_ptr = call.recurrent.gain_hh_ptr + part * K
        normed = Normed(call.recurrent.unit_hh_ptr, gain_ptr, scale, sum_d / (4 * H), sum_d_unit / (4 * H))
    at = rows_of_dgates(call.cell.dgates_ptr, after.row, part, S)
    ordered = indexing.rows_of_product((at[1], after.continues), not NORM_HH)
    dgates = Rows(at[0], ordered[0], ordered[1], None, after.row)
    weight_ptr = call.recurrent.weight_hh_ptr + tl.cast(part, tl.int64) * (K * P)
    dh = product(dgates, Columns(weight_ptr, tile.unit, tile.unit < P, P), normed, K, K if S.GATES == 4 else 4 * H, S)
    return indexing.rows_of_tile(dh, not NORM_HH)


@triton.jit
def product_round_backward(step, times, call, poll_limit, S: tl.constexpr):
    """Products of parts of K, for PARTS times as many units: such tiles read less. The cells' round adds them up."""
    first, end, stride = tiles_of_program(call.batch.B, tl.cdiv(S.P, S.PARTS * S.UNITS) * (S.PARTS * S.UNITS), S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.P, S, S.PARTS)
        if S.HELD:
            poll_limit, dgates = dgates_after(tile.batch_tile, step, times, call, poll_limit, S)
            dh = product_of_held(call.held, dgates, S)
        else:
            dh = product_with_dgates(tile, step, call, S)
        dh = unless_timed_out(dh, poll_limit)
        of_part = call.recurrent.sums_ptr + tl.cast(call.batch.B, tl.int64) * S.P * (tile.unit_tile % S.PARTS)
        tl.store(of_part + tile.cells.state_at, dh, mask=tile.cells.in_tile)
        if S.HELD:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit
def sum_of_parts(tile, call, S: tl.constexpr):
    """The sum of all parts' products, [BB, BH]."""
    PARTS: tl.constexpr = S.PARTS  # Triton 3.4 takes no field of a tuple for static_range
    at, dh = call.recurrent.sums_ptr + tile.cells.state_at, tl.zeros(tile.cells.at.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        dh += tl.load(at, mask=tile.cells.valid, other=0.0, cache_modifier=".cg")
        at += tl.cast(call.batch.B, tl.int64) * S.P
    return dh


@triton.jit
def output_round_backward(step, call, poll_limit, S: tl.constexpr):
    """The whole gradient of h, and the sums over units that the layer norm of c needs."""
    DTYPE: tl.constexpr = call.cell.dgates_ptr.dtype.element_ty
    first, end, stride = tiles_of_program(call.batch.B, S.P, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.P, S)
        dh = sum_of_parts(tile, call, S) if S.PARTS > 1 else product_with_dgates(tile, step, call, S)
        dh = indexing.gradient_of_h(unless_timed_out(dh, poll_limit), tile, step, call.hidden)
        dh = tl.where(tile.cells.valid, dh, 0.0).to(DTYPE)
        tl.store(call.output.dh_total_ptr + tile.cells.at, dh, mask=tile.cells.in_tile)
        if call.output.gain_c_ptr is not None:
            dz_o, d_unit, unit_c = normed_output(dh.to(tl.float32), tile, call, S)
            store_pair(call.output.sums_c_ptr, tile, call.batch.B, tl.sum(d_unit, 1), tl.sum(d_unit * unit_c, 1))


@triton.jit
def normed_output(dm, tile, call, S: tl.constexpr):
    """Gradient of m = o tanh(LN(c)) -> (dz_o, gradient of unit_c; unit_c)."""
    cells, output = tile.cells, call.output
    o = tl.load(call.saved.gates_ptr + cells.gates_at + 3 * S.H, mask=cells.valid, other=0.0).to(tl.float32)
    unit_c = tl.load(output.unit_c_ptr + cells.at, mask=cells.valid, other=0.0)
    gain, bias = indexing.load_affine(output.gain_c_ptr, output.bias_c_ptr, tile.unit[None, :], S.H)
    dz_o, d_unit = normed_output_backward(o, unit_c, dm, gain, bias)
    return dz_o, d_unit, unit_c


@triton.jit
def cell_round_backward(step, times, call, poll_limit, S: tl.constexpr):
    """The gradient of m, then those of the cells. Returns the poll limit after its waits for dgates."""
    H: tl.constexpr = S.H
    DTYPE: tl.constexpr = call.cell.dgates_ptr.dtype.element_ty
    NORM_C: tl.constexpr = call.output.gain_c_ptr is not None
    EARLY: tl.constexpr = S.HELD and S.BLOCK_B * S.UNITS <= 1024  # for more cells a thread has no registers left
    cell, B = call.cell, call.batch.B
    first, end, stride = tiles_of_program(B, H, S)
    if S.AHEAD:
        poll_limit, dgates = dgates_after(first, step, times, call, poll_limit, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, H, S)
        cells, sequence, unit = tile.cells, tile.sequence, tile.unit
        row_prev = tile.row_prev[:, None]

        # The gradient of m, of the step after or as the round before left it.
        if S.HELD and S.PARTS == 1 and not S.AHEAD:
            poll_limit, dgates = dgates_after(tile.batch_tile, step, times, call, poll_limit, S)
        if EARLY:
            gates, c, c_prev = indexing.load_saved(call.saved, step, row_prev, unit[None, :], cells, H)
        if call.output.weight_hr_ptr is not None:
            dh = Rows(call.output.dh_total_ptr, tile.place.row, tile.place.valid, None, tile.place.row)
            dm = product(dh, Columns(call.output.weight_hr_ptr, unit, unit < H, H), None, S.P, S.P, S)
            dm = unless_timed_out(dm, poll_limit)
        elif NORM_C:
            dm = tl.load(call.output.dh_total_ptr + cells.at, mask=cells.valid, other=0.0).to(tl.float32)
            dm = unless_timed_out(dm, poll_limit)
        else:
            if S.PARTS > 1:
                if S.HELD:
                    poll_limit = wait_for_tile(call.arrivals, tile.batch_tile, times + 1, poll_limit, step)
                dm = sum_of_parts(tile, call, S)
            elif S.HELD:
                dm = product_of_held(call.held, dgates, S)
            else:
                dm = product_with_dgates(tile, step, call, S)
            dm = unless_timed_out(dm, poll_limit)
            if S.AHEAD:  # these cells are computed while dgates of the next tile are loaded
                poll_limit, dgates = dgates_after(number + stride, step, times, call, poll_limit, S)
            dm = indexing.gradient_of_h(dm, tile, step, call.hidden)

        # Output and cell.
        if NORM_C:
            dz_o, d_unit, unit_c = normed_output(dm, tile, call, S)
        if not EARLY:
            gates, c, c_prev = indexing.load_saved(call.saved, step, row_prev, unit[None, :], cells, H)
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        dc, c, dc_from_zoneout = indexing.zoneout_c_backward(dc, cell.zoneout_c_ptr, gates, c, c_prev, cells, S)
        if NORM_C:
            sum_d, sum_d_unit = sums_of_tiles(call.output.sums_c_ptr, sequence.index, tile.place.valid, B, S)
            scale = tl.load(call.output.scale_c_ptr + tile.place.row, mask=tile.place.valid, other=0.0)
            means = (sum_d / H)[:, None], (sum_d_unit / H)[:, None]
            dc += normalise_backward(d_unit, unit_c, scale[:, None], *means)
        peepholes = indexing.load_peepholes(cell.weight_peephole_ptr, unit[None, :], H)
        if NORM_C:
            dz, dc_prev = gates_backward(gates, c_prev, dz_o, dc, peepholes)
        else:
            dz, dc_prev = cell_backward(gates, c_prev, c, dm, dc, peepholes, S)
        if call.recurrent.gain_hh_ptr is not None:
            unit_hh = indexing.load_gates(call.recurrent.unit_hh_ptr, cells.gates_at, cells.valid, H)
            gain_hh = indexing.load_gates(call.recurrent.gain_hh_ptr, unit[None, :], (unit < H)[None, :], H)
            d, sum_d, sum_d_unit = gates_of_unit(dz, gain_hh, unit_hh, DTYPE)
            pairs_ptr = call.recurrent.sums_hh_ptr + pairs_of_step(step, B, S)
            store_pair(pairs_ptr, tile, B, tl.sum(sum_d, 1), tl.sum(sum_d_unit, 1))
        if cell.zoneout_c_ptr is not None:
            dc_prev += dc_from_zoneout

        # Store. In padding every factor was loaded as zero, so its gradients are zero.
        indexing.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, H)
        tl.store(cell.dc_ptr + cells.state_at, tl.where(cells.continues, dc_prev, 0.0), mask=cells.valid)
        if cell.dreset_c_ptr is not None:
            tl.store(cell.dreset_c_ptr + cells.at, dc_prev, mask=cells.reset)
        if S.HELD and step > 0:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit(do_not_specialize=["T", "B"])
def lstm_step_backward_kernel(
    recurrent: RecurrentBackward, hidden: HiddenBackward, cell: CellBackward, saved: Saved, output: OutputBackward,
    arrivals: Arrivals, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first. Rounds are as forward: for a projection or a layer norm of c the gradient
    of h is a round before the cells, and so are products of parts of K."""
    OUTPUT: tl.constexpr = output.weight_hr_ptr is not None or output.gain_c_ptr is not None
    ROUNDS: tl.constexpr = 1 + OUTPUT + (S.PARTS > 1)
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    tl.static_assert(S.GATES * S.H % S.PARTS == 0, "parts of K are equal")
    K: tl.constexpr = S.GATES * S.H // S.PARTS
    P: tl.constexpr = S.P
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    held = None
    if S.HELD:
        of_part = recurrent.weight_hh_ptr + tl.cast(tl.program_id(0) % S.PARTS, tl.int64) * (K * P)
        column = tl.program_id(0) // S.PARTS * (S.PARTS * S.UNITS) + tl.arange(0, S.PARTS * S.UNITS)
        held = tl.trans(load_weights(Columns(of_part, column, column < P, P), 0, K, S.BLOCK_K))
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    call = Backward(batch, arrivals, recurrent, held, hidden, cell, saved, output)
    for back in range(T):
        step = T - 1 - back
        times = ROUNDS * back  # arrivals of each program before this step, for a tile if HELD
        if S.PARTS > 1:
            poll_limit = product_round_backward(step, times, call, poll_limit, S)
            if not S.HELD:
                poll_limit = grid_barrier(arrivals, times + 1, poll_limit, step)
        if OUTPUT:
            output_round_backward(step, call, poll_limit, S)
            poll_limit = grid_barrier(arrivals, times + (ROUNDS - 1), poll_limit, step)
        poll_limit = cell_round_backward(step, times, call, poll_limit, S)
        if (WAITS and not S.HELD) and step > 0:
            poll_limit = grid_barrier(arrivals, times + ROUNDS, poll_limit, step)


def step_plan(problem: Problem, card: Card, backward: bool) -> Plan:
    """A plan that works for every problem: no more programs than fit the card at once, and tiles that fill them.

    The product of a step is small, so many programs must share it: tiles are the narrowest that still fill tensor-core
    instructions.
    """
    rows = 16 if problem.batch <= 16 else 32 if problem.batch <= 32 else 64
    heavy = problem.regularised or problem.normalised  # masks and norms need registers
    most, stages = (32, 2) if heavy else (MOST_ROWS, 3)
    if heavy and problem.projected:
        most = min(most, MOST_ROWS // 2)  # with more, Triton 3.4 spills
    if problem.exact_float32:
        most //= 2  # and products without tensor cores do, too
    rows = max(16, min(rows, most))
    units = 16  # of which a forward product has four gates
    tiles = ceil(problem.batch / rows) * ceil(max(problem.hidden, problem.projected) / units)
    programs = max(1, min(tiles, card.multiprocessors // problem.side_by_side))
    k = 128 // problem.size  # 128 bytes of each row at a time
    stage = (rows + units * (1 if backward else 4)) * k * problem.size
    why = "W_hh is read from L2 at every step"
    if problem.normalised:
        why += "; layer norms need sums over all units, for one or two more grid-wide barriers"
    return Plan(
        Step(k), rows, units, programs, 1, 8 if problem.exact_float32 else 4, 2 * stage, why, num_stages=stages,
        tiles_per_program=ceil(tiles / programs), side_by_side=problem.side_by_side,
    )  # fmt: skip


# Sequences, units, parts of K: wgmma takes 64 columns of the product, or a multiple; forward a unit has four.
HELD_FORWARD = [(rows, units, 1) for rows in (16, 32, 64) for units in (16, 32)]
HELD_BACKWARD = [(16, 64, 1), (32, 64, 1), (32, 32, 2), (16, 16, 4), (32, 16, 4), (64, 32, 4)]
# Backward, in half precision, W_hh of a tile is [K, units] in shared memory, in blocks of 64 units. From Triton 3.6 on
# a kernel stores each block whole, one after another, but wgmma looks for 256 rows of every block before the next 256
# (compile_table/triton_issue.md). Those are the same for one block, or up to 256 rows: nothing else is proposed.
BLOCK_UNITS, BLOCK_ROWS = 64, 256


def held_plans(problem: Problem, card: Card, backward: bool) -> list[Plan]:
    """The best three plans, by expected time, whose programs hold W_hh of some units in shared memory.

    For products by wgmma, whose operands are there; backward, also of parts of K. A resident program holds up to 128
    units, and beyond 512 these plans gain nothing.
    """
    able = card.architecture == 90 and not problem.exact_float32
    if not able or not 128 < problem.hidden <= 512 or problem.normalised or problem.projects_in_loop:
        return []
    plans, multiprocessors, gates = [], card.multiprocessors // problem.side_by_side, CELLS[problem.cell].rows
    for rows, units, parts in HELD_BACKWARD if backward else HELD_FORWARD:
        inner = problem.hidden * (gates if backward else 1) // parts
        k = power_of_two(inner)
        batch_tiles, programs = ceil(problem.batch / rows), parts * ceil(problem.hidden / (parts * units))
        shared = (rows + units * (parts if backward else 4)) * k * problem.size
        # While one block of a multiprocessor waits another one computes.
        blocks = 2 if programs * batch_tiles > multiprocessors and card.has_room(2, shared) else 1
        groups = min(batch_tiles, blocks * multiprocessors // programs)
        warps = 4 if rows * units == 256 else 16 if (rows, units, blocks) == (64, 32, 1) else 8
        # A thread has registers for 128 bytes more, beside four cells. Where K is padded nothing is gained.
        room = rows * k * problem.size <= 128 * 32 * warps and rows * units <= 4 * 32 * warps
        ahead = batch_tiles > groups and blocks == parts == 1 and room and k == inner
        as_stored = not backward or units * parts <= BLOCK_UNITS or k <= BLOCK_ROWS
        if groups > 0 and shared <= card.shared and as_stored and gates * problem.hidden % parts == 0:
            plans.append(Plan(
                Held(k, parts, ahead), rows, units, programs, groups, warps, shared,
                "programs hold W_hh in shared memory", blocks=blocks,
                tiles_per_program=ceil(batch_tiles / groups), side_by_side=problem.side_by_side,
            ))  # fmt: skip
    return sorted(plans, key=lambda plan: expected(problem, card, plan, backward).seconds)[:3]


def split_plans(problem: Problem, card: Card, backward: bool) -> list[Plan]:
    """The best two plans, by expected time, whose backward splits the product into parts of K.

    A program has a part for more units: for 16 units and all of K it would read far more of dgates than of W_hh.
    """
    if not backward or problem.projected or problem.normalised or problem.exact_float32:
        return []
    plans = []
    for rows, (units, parts) in itertools.product((16, 32, 64, 128), ((8, 8), (16, 4), (16, 8), (32, 4))):
        tiles, shared = ceil(problem.batch / rows) * ceil(problem.hidden / units), 3 * 128 * (rows + parts * units)
        programs = max(1, min(tiles, card.multiprocessors // problem.side_by_side))
        in_words = (
            CELLS[problem.cell].rows * problem.hidden * problem.size % (16 * parts) == 0
        )  # of 16 bytes, in which a part is loaded
        fits = rows <= max(16, power_of_two(problem.batch)) and rows * units <= 2048 and shared <= card.shared
        if in_words and fits:
            plans.append(Plan(
                Step(128 // problem.size, parts), rows, units, programs, 1, max(4, rows * units // 128), shared,
                "W_hh is read from L2 at every step, for products of parts of K", num_stages=3,
                tiles_per_program=ceil(tiles / programs), side_by_side=problem.side_by_side,
            ))  # fmt: skip
    return sorted(plans, key=lambda plan: expected(problem, card, plan, backward).seconds)[:2]


KERNELS = lstm_step_forward_kernel, lstm_step_backward_kernel
OPERANDS = None, None


def buffers(p: Problem, plan: Plan, backward: bool) -> dict[str, Buffer]:
    """What a pass writes besides the results that all families share."""
    f32, tiles = torch.float32, ceil(p.hidden / plan.units)
    scratch = {}
    if backward and plan.family.parts > 1:
        scratch["sums_ptr"] = Buffer(f32, (plan.family.parts, p.batch, p.width))
    if backward and p.gain_hh:
        scratch["sums_hh_ptr"] = Buffer(f32, (2, tiles, p.batch, 2), fill=0)
    if backward and p.gain_c:
        scratch["sums_c_ptr"] = Buffer(f32, (tiles, p.batch, 2))
    if not backward and p.projected:
        scratch["m_ptr"] = Buffer(p.dtype, (p.batch, p.hidden))
    if not backward and p.gain_hh:
        scratch["product_ptr"] = Buffer(f32, (p.batch, tiles, 4 * plan.units))
        scratch["moments_hh_ptr"] = Buffer(f32, (tiles, p.batch, 2))
    if not backward and p.gain_c:
        scratch["cell_ptr"] = Buffer(f32, (2, p.batch, p.hidden))
        scratch["moments_c_ptr"] = Buffer(f32, (tiles, p.batch, 2))
    return scratch
