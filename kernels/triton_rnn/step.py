"""The step family: every hidden size, batch, projection and dtype; W_hh is read from L2 at every step, or held.

One launch for the whole sequence. A step is a round over tiles of sequences and units, which the programs share out.
Tiles are [batch, units]. A grid-wide barrier (exchange.grid_barrier) ends a round, since the next one needs the results
of all. More rounds belong to a step where something needs all units of a sequence: a projection (h = W_hr m; m is the
output of the cell, see equations/), the layer norms of W_hh h and of c (norm.py), of which a projection has none. All
programs must be resident at once. Those of a head wait for each other alone, or for nobody where a head has just one.

Where W_hh of a tile's units fits in shared memory, a program can hold it: all its tiles have the same units, and are of
the sequences of its group. Before the product a tile waits for the other units' tiles of the same sequences, no others.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from . import indexing, noise, norm_tiles, reset, states
from .equations import cell_backward, cell_forward, output, output_backward
from .exchange import arrive, grid_barrier, unless_timed_out, wait_for
from .features import nothing
from .indexing import Batch, rows_of_product
from .norm import Norm, normalised
from .norm_tiles import load_normed, pairs_of_step
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, NormC, NormHH, Pointer, Saved, name_in_profiles

# Rows [rows] of a tensor [*, K or more] that other programs wrote: zeros where not `mask` [rows], else times factors
# [*, K] or None.
Rows = namedtuple("Rows", "ptr row mask factors_ptr factors_row")
# Columns [columns] of weights: offset of each one's first element, whether there is one, from one k to the next.
# The `first` k of a part counts from the head's, see indexing.by_gate.
Columns = namedtuple("Columns", "ptr at mask stride")


class Products(NamedTuple):
    weight_hh_ptr: Pointer  # [GATES H, P], of heads [GATES H, D]
    weight_hr_ptr: Pointer  # [P, H]
    m_ptr: Pointer  # [B, H] forward: m of a step
    product_ptr: Pointer  # [B, 4H, in full tiles] float32 forward, with a layer norm of W_hh h: that of a step
    cell_ptr: Pointer  # [2, B, H] float32 forward, with a layer norm of c: o and c of a step
    sums_ptr: Pointer  # [PARTS, B, P] float32 backward: the products of a step, which add up


class Arrivals(NamedTuple):
    arrivals_ptr: Pointer  # [HEADS, tiles of sequences] int32, programs that have arrived; None: step_plans.waits
    error_ptr: Pointer  # [1] int32, and after it the poll limit


# All that a round needs; `held` is W_hh [4 BH, BK] if it is held, backward [PARTS BH, BK]; the state before the step is
# in h_prev [B or T*B, P] and c_prev [B, H], the initial one or the last.
Forward = namedtuple("Forward", "batch arrivals products held hidden cell norm_hh norm_c h_prev_ptr c_prev_ptr")
Backward = namedtuple("Backward", "batch arrivals products held hidden cell saved norm_hh norm_c dh_total_ptr")


@triton.jit
def product(rows, columns, normed, K: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, first=0):
    """Rows @ Columns, [rows, columns] float32, over K in tiles; rows are STRIDE apart. With NormedRows they are the
    gradient of a layer norm's result, and the product is of the gradient of what was normalised."""
    acc = tl.zeros((rows.row.shape[0], columns.at.shape[0]), tl.float32)
    for k_start in range(0, K, S.BLOCK_K):
        k = k_start + tl.arange(0, S.BLOCK_K)
        a, at, in_a = load_rows(rows, k, K, STRIDE, S, first)
        a = norm_tiles.rows_backward(a, normed, at, in_a, k, K)
        acc = tl.dot(a, load_weights(columns, k_start, K, S, first), acc, input_precision=S.PRECISION)
    return acc


@triton.jit
def product_of_held(held, a, S: tl.constexpr):
    """a [rows, K] @ held^T [K, columns] -> [rows, columns] float32, computed as held a^T: wgmma takes 64 rows, or a
    multiple, and 8 columns or more."""
    return tl.trans(tl.dot(held, tl.trans(a), input_precision=S.PRECISION))


@triton.jit
def load_rows(rows, k, K: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, first=0):
    """Returns (the rows' columns k times the factors, their offsets, their mask)."""
    column, _ = indexing.units_at(indexing.by_gate(k, first, S), S)
    at, in_a = rows.row[:, None] * STRIDE + column[None, :], rows.mask[:, None] & (k < K)[None, :]
    a = tl.load(rows.ptr + at, mask=in_a, other=0.0, cache_modifier=".cg")
    return noise.dropout(a, rows.factors_ptr, rows.factors_row[:, None] * STRIDE + column[None, :], in_a), at, in_a


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
def tiles_of_program(B, width, S: tl.constexpr):
    """(The first tile of a program, the end, from one to the next); if HELD, all have the same units."""
    AXIS: tl.constexpr = 1 if S.HELD else 0
    batch_tiles = tl.cdiv(B, S.BLOCK_B)
    return tl.program_id(AXIS), batch_tiles * (1 if S.HELD else tl.cdiv(width, S.UNITS)), tl.num_programs(AXIS)


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
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.COLUMNS, S.P, S)[0]


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
    return poll_limit, load_rows(rows, tl.arange(0, S.BLOCK_K), S.K, STRIDE, S, part * S.K)[0]


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
    return product(h, weights_of_gates(call.products.weight_hh_ptr, tile.unit_tile, S), nothing(), S.COLUMNS, S.P, S)


@triton.jit
def weights_of_gates(weight_hh_ptr, unit_tile, S: tl.constexpr):
    """W_hh of all gates of a tile's units, as Columns; zeros for a gate that h does not reach."""
    FIRST: tl.constexpr = 4 - S.GATES
    column, place = indexing.columns_of_gates(unit_tile, S)
    mask = place < S.D
    if FIRST > 0:
        mask &= column >= FIRST * S.H
        column -= FIRST * S.H
    return Columns(weight_hh_ptr, column.to(tl.int64) * S.COLUMNS, mask, 1)


@triton.jit
def rows_of_weights(weight_hh_ptr, part, S: tl.constexpr):
    """W_hh from the first row of a part of K on; with heads from the head's first."""
    number = tl.program_id(2) if S.HEADS > 1 else part
    return weight_hh_ptr + tl.cast(number, tl.int64) * (S.D * S.COLUMNS if S.HEADS > 1 else S.K * S.COLUMNS)


@triton.jit
def product_round(step, call, poll_limit, S: tl.constexpr):
    """W_hh h of all units, and the moments that its layer norm needs."""
    first, end, stride = tiles_of_program(call.batch.B, S.D, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.H, S)
        z = unless_timed_out(product_with_h(tile, call, S), poll_limit)
        norm_tiles.store_product(z, call.products.product_ptr, call.norm_hh, tile, call.batch.B, S)


@triton.jit
def load_cells(call, cells, S: tl.constexpr):
    """What comes to a tile's gates from the input, as stored; c, and the rest, before the step."""
    x = states.load_gates(call.cell.gates_ptr, cells.gates_at, cells.valid, S.H, True, S.FROM_X)
    c_prev = reset.load_state(call.c_prev_ptr, cells.state_at, call.cell.reset_c_ptr, cells)
    return x, c_prev, states.load_rest_before(call.c_prev_ptr, cells, call.batch.B, S)


@triton.jit
def load_beside(call, tile, S: tl.constexpr):
    """What else a tile's cells read: constants; with zoneout the share of c that stays, and noise.load_h_before."""
    constants = states.load_constants_forward(call.cell, tile.unit[None, :], S)
    h_before = ()
    if call.products.weight_hr_ptr is None and call.norm_c.gain_ptr is None:  # else the next round has h
        h_before = noise.load_h_before(call.hidden, call.h_prev_ptr, tile.cells.prev_at, tile.cells)
    return constants, noise.load_share(call.cell.zoneout_c_ptr, tile.cells), h_before


@triton.jit
def cell_round(step, call, poll_limit, S: tl.constexpr):
    """The cells, and h if that needs no other units. Returns the poll limit after its waits for h before."""
    NORM_HH: tl.constexpr = call.norm_hh.gain_ptr is not None
    NORM_C: tl.constexpr = call.norm_c.gain_ptr is not None
    PROJECT: tl.constexpr = call.products.weight_hr_ptr is not None
    EARLY: tl.constexpr = S.HELD and S.BLOCK_B * S.UNITS <= 128 * S.WARPS  # a thread has registers for four cells
    first, end, stride = tiles_of_program(call.batch.B, S.D, S)
    if S.AHEAD:
        poll_limit, h_prev = h_before(first, step, call, poll_limit, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.H, S)
        cells = tile.cells

        # Load, and product: all four gates of the tile's units, [BB, 4 BH].
        if S.HELD and not S.AHEAD:
            poll_limit, h_prev = h_before(tile.batch_tile, step, call, poll_limit, S)
        if EARLY:
            beside = load_beside(call, tile, S)
        if S.HELD or NORM_HH:
            x, c_prev, rest_prev = load_cells(call, cells, S)
        if S.HELD:
            z = product_of_held(call.held, h_prev, S)
        elif NORM_HH:
            z = norm_tiles.load_product(call.products.product_ptr, call.norm_hh, tile, call.batch.B, S)
        else:
            z = product_with_h(tile, call, S)
            x, c_prev, rest_prev = load_cells(call, cells, S)
        z = unless_timed_out(z, poll_limit)
        if S.AHEAD:  # these cells are computed while h of the next tile is loaded
            poll_limit, h_prev = h_before(number + stride, step, call, poll_limit, S)

        # Gates, cell and output. Padding gets zeros.
        if not EARLY:
            beside = load_beside(call, tile, S)
        constants, share_c, h_kept = beside
        gates, c, rest = cell_forward(x, indexing.split_gates(z), c_prev, rest_prev, constants, S)
        norm_tiles.store_c(gates[3], c, call.products.cell_ptr, call.norm_c, tile, call.batch.B, S)
        m = tl.where(cells.valid, output(gates[3], c, S), 0.0)
        c = noise.zoneout(c, c_prev, share_c)

        # Store.
        tl.store(call.cell.c_n_ptr + cells.state_at, c, mask=cells.valid)
        states.store_rest(call.cell.c_n_ptr, rest, cells, cells.valid, call.batch.B, S)
        states.save(gates, c, call.cell, cells, S.H)
        if PROJECT:
            tl.store(call.products.m_ptr + cells.state_at, m, mask=cells.in_tile)
        elif not NORM_C:
            states.store_hidden(m, call.hidden, h_kept, cells)
        if S.HELD and step + 1 < call.batch.T:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit
def output_round(step, call, poll_limit, S: tl.constexpr):
    """h, where it needs the cells of all units: W_hr m, or the output of LN(c)."""
    PROJECT: tl.constexpr = call.products.weight_hr_ptr is not None
    first, end, stride = tiles_of_program(call.batch.B, S.P, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.P, S)
        if PROJECT:
            index, unit = tile.sequence.index.to(tl.int64), tile.unit
            m = Rows(call.products.m_ptr, index, tile.position.valid, None, index)
            columns = Columns(call.products.weight_hr_ptr, unit.to(tl.int64) * S.H, unit < S.P, 1)
            h = product(m, columns, nothing(), S.H, S.H, S)
        else:
            o, v = norm_tiles.load_c(call.products.cell_ptr, call.norm_c, tile, call.batch.B, S)
            h = output(o, v, S)
        h = tl.where(tile.cells.valid, unless_timed_out(h, poll_limit), 0.0)
        h_kept = noise.load_h_before(call.hidden, call.h_prev_ptr, tile.cells.prev_at, tile.cells)
        states.store_hidden(h, call.hidden, h_kept, tile.cells)


@triton.jit(repr=name_in_profiles("step_forward_kernel"), do_not_specialize=["T", "B"])
def step_forward_kernel(
    products: Products, hidden: Hidden, cell: Cell, norm_hh: NormHH, norm_c: NormC, arrivals: Arrivals,
    lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps. Each is a round over all tiles, and one more for each thing that needs all units of a sequence: the
    layer norm of W_hh h before the cell; the layer norm of c, or a projection, after it."""
    norm_hh, norm_c = Norm(*norm_hh), Norm(*norm_c)
    NORM_HH: tl.constexpr = norm_hh.gain_ptr is not None
    OUTPUT: tl.constexpr = products.weight_hr_ptr is not None or norm_c.gain_ptr is not None
    ROUNDS: tl.constexpr = 1 + NORM_HH + OUTPUT
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    arrivals, held = of_head(arrivals, B, S) if WAITS else arrivals, None
    if S.HELD:
        weights = weights_of_gates(products.weight_hh_ptr, tl.program_id(0), S)
        held = tl.trans(load_weights(weights, 0, S.COLUMNS, S))
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    for step in range(T):
        h_prev_ptr = tl.where(step == 0, hidden.h0_ptr, hidden.h_ptr)
        c_prev_ptr = tl.where(step == 0, cell.c0_ptr, cell.c_n_ptr)
        call = Forward(batch, arrivals, products, held, hidden, cell, norm_hh, norm_c, h_prev_ptr, c_prev_ptr)
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
        if not WAITS and S.HEADS > 1:  # the only program of a head
            tl.debug_barrier()


@triton.jit
def product_with_dgates(tile, step, call, S: tl.constexpr):
    """dgates of the step after times W_hh, [BB, units]; of the tile's part of K alone, if there are several."""
    NORM_HH: tl.constexpr = call.norm_hh.gain_ptr is not None
    P: tl.constexpr = S.COLUMNS
    STRIDE: tl.constexpr = S.K if S.GATES == 4 and S.HEADS == 1 else 4 * S.H
    part = tile.unit_tile % S.PARTS
    after = indexing.position(step + 1, tile.sequence, call.batch, S.REVERSE)
    normed = norm_tiles.load_normed_rows(call.norm_hh, tile, step, after, part * S.K, call.batch.B, S)
    dgates_ptr, row = rows_of_dgates(call.cell.dgates_ptr, after.row, part, S)
    row, continues = rows_of_product(row, not NORM_HH), rows_of_product(after.continues, not NORM_HH)
    dgates = Rows(dgates_ptr, row, continues, None, row)
    weight_ptr = rows_of_weights(call.products.weight_hh_ptr, part, S)
    columns = Columns(weight_ptr, tile.place, tile.place < P, P)
    dh = product(dgates, columns, normed, S.K, STRIDE, S, part * S.K)
    return indexing.rows_of_tile(dh, not NORM_HH)


@triton.jit
def product_round_backward(step, times, call, poll_limit, S: tl.constexpr):
    """Products of parts of K, for PARTS times as many units: such tiles read less. The cells' round adds them up."""
    units = tl.cdiv(S.COLUMNS, S.PARTS * S.UNITS) * (S.PARTS * S.UNITS)
    first, end, stride = tiles_of_program(call.batch.B, units, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.P, S, S.PARTS)
        if S.HELD:
            poll_limit, dgates = dgates_after(tile.batch_tile, step, times, call, poll_limit, S)
            dh = product_of_held(call.held, dgates, S)
        else:
            dh = product_with_dgates(tile, step, call, S)
        dh = unless_timed_out(dh, poll_limit)
        sums_ptr = call.products.sums_ptr + tl.cast(call.batch.B, tl.int64) * S.P * (tile.unit_tile % S.PARTS)
        tl.store(sums_ptr + tile.cells.state_at, dh, mask=tile.cells.in_tile)
        if S.HELD:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit
def sum_of_parts(tile, call, S: tl.constexpr):
    """The sum of all parts' products, [BB, BH]."""
    PARTS: tl.constexpr = S.PARTS  # Triton 3.4 takes no field of a tuple for static_range
    sums_ptr, dh = call.products.sums_ptr + tile.cells.state_at, tl.zeros(tile.cells.at.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        dh += tl.load(sums_ptr, mask=tile.cells.valid, other=0.0, cache_modifier=".cg")
        sums_ptr += tl.cast(call.batch.B, tl.int64) * S.P
    return dh


@triton.jit
def output_round_backward(step, call, poll_limit, S: tl.constexpr):
    """The whole gradient of h, and the sums over units that the layer norm of c needs."""
    DTYPE: tl.constexpr = call.cell.dgates_ptr.dtype.element_ty
    B = call.batch.B
    first, end, stride = tiles_of_program(B, S.P, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.P, S)
        cells = tile.cells
        dh = sum_of_parts(tile, call, S) if S.PARTS > 1 else product_with_dgates(tile, step, call, S)
        dh_given = states.load_gradients_given(call.hidden, cells)
        dh = states.gradient_of_h(unless_timed_out(dh, poll_limit), dh_given, call.hidden, cells)
        dh = tl.where(cells.valid, dh, 0.0).to(DTYPE)
        tl.store(call.dh_total_ptr + cells.at, dh, mask=cells.in_tile)
        if call.norm_c.gain_ptr is not None:
            normed = load_normed(call.norm_c, tile, 1, S.H)
            o = tl.load(call.saved.gates_ptr + cells.gates_at + 3 * S.H, mask=cells.valid, other=0.0).to(tl.float32)
            _, d = output_backward(o, normalised((), call.norm_c, normed)[0], dh.to(tl.float32), S)
            norm_tiles.store_sums((d,), normed, call.norm_c.pairs_ptr, tile, B, tl.float32)


@triton.jit
def gradient_of_m(tile, step, times, dgates, call, poll_limit, S: tl.constexpr):
    """(The poll limit after its waits; dm of a tile): by W_hr, as the round before left it, or as a product with
    dgates, of which there may be a sum of parts, or with W_hh that is held."""
    H: tl.constexpr = S.H  # Triton 3.4 takes no field of a tuple into another tuple
    place, cells, unit = tile.position, tile.cells, tile.unit
    if S.HELD and S.PARTS > 1:
        poll_limit = wait_for_tile(call.arrivals, tile.batch_tile, times + 1, poll_limit, step)
    if call.products.weight_hr_ptr is not None:
        dh = Rows(call.dh_total_ptr, place.row, place.valid, None, place.row)
        dm = product(dh, Columns(call.products.weight_hr_ptr, unit, unit < H, H), nothing(), S.P, S.P, S)
    elif call.norm_c.gain_ptr is not None:
        dm = tl.load(call.dh_total_ptr + cells.at, mask=cells.valid, other=0.0).to(tl.float32)
    elif S.PARTS > 1:
        dm = sum_of_parts(tile, call, S)
    elif S.HELD:
        dm = product_of_held(call.held, dgates, S)
    else:
        dm = product_with_dgates(tile, step, call, S)
    return poll_limit, unless_timed_out(dm, poll_limit)


@triton.jit
def cell_round_backward(step, times, call, poll_limit, S: tl.constexpr):
    """The gradient of m, then those of the cells. Returns the poll limit after its waits for dgates."""
    OUTPUT: tl.constexpr = call.products.weight_hr_ptr is not None or call.norm_c.gain_ptr is not None
    NORM_HH: tl.constexpr = call.norm_hh.gain_ptr is not None
    DTYPE: tl.constexpr = call.cell.dgates_ptr.dtype.element_ty
    EARLY: tl.constexpr = S.HELD and S.BLOCK_B * S.UNITS <= 1024  # for more cells a thread has no registers left
    cell, B = call.cell, call.batch.B
    first, end, stride = tiles_of_program(B, S.D, S)
    if S.AHEAD:
        poll_limit, dgates = dgates_after(first, step, times, call, poll_limit, S)
    for number in range(first, end, stride):
        tile = indexing.tile_at(number, step, call.batch, S.H, S)
        cells = tile.cells

        # Load, and product: the gradient of m. Where a round before has left it, that has added what is given.
        if not S.AHEAD:
            dgates = None
        if S.HELD and S.PARTS == 1 and not S.AHEAD:
            poll_limit, dgates = dgates_after(tile.batch_tile, step, times, call, poll_limit, S)
        if EARLY:
            gates, c, c_prev = states.load_saved(call.saved, step, cells, S.H)
        poll_limit, dm = gradient_of_m(tile, step, times, dgates, call, poll_limit, S)
        if S.AHEAD:  # these cells are computed while dgates of the next tile are loaded
            poll_limit, dgates = dgates_after(number + stride, step, times, call, poll_limit, S)
        if not OUTPUT:
            dm = states.gradient_of_h(dm, states.load_gradients_given(call.hidden, cells), call.hidden, cells)
        normed = load_normed(call.norm_c, tile, 1, S.H)
        if not EARLY:
            gates, c, c_prev = states.load_saved(call.saved, step, cells, S.H)

        # Output and cell. In padding every factor was loaded as zero, so its gradients are zero.
        gates, c, c_prev = states.as_float(gates, c, c_prev)
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        dc, dc_stayed = noise.zoneout_backward(dc, noise.load_share(cell.zoneout_c_ptr, cells))
        c = noise.without_zoneout(c, gates, c_prev, cell.zoneout_c_ptr, S)
        dz_o, dc_by_m = output_backward(gates[3], normalised((c,), call.norm_c, normed)[0], dm, S)
        dc_by_m = norm_tiles.c_backward(dc_by_m, call.norm_c, normed, tile, B, S)
        peepholes = states.load_constants(cell.weight_peephole_ptr, tile.unit[None, :], S.H)
        drest = states.load_gradient_of_rest(cell.dc_ptr, cells, B, S)
        dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m, drest, peepholes, S)
        dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)

        # Store.
        if NORM_HH:
            normed_hh, pairs_ptr = load_normed(call.norm_hh, tile, 4, S.H), pairs_of_step(call.norm_hh, step, B, S)
            norm_tiles.store_sums(dz, normed_hh, pairs_ptr, tile, B, DTYPE)
        states.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, S.H)
        reset.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
        states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)
        if S.HELD and step > 0:
            arrive(call.arrivals.arrivals_ptr + tile.batch_tile, poll_limit)
    return poll_limit


@triton.jit(repr=name_in_profiles("step_backward_kernel"), do_not_specialize=["T", "B"])
def step_backward_kernel(
    products: Products, hidden: HiddenBackward, cell: CellBackward, saved: Saved, norm_hh: NormHH, norm_c: NormC,
    dh_total_ptr, arrivals: Arrivals, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first. Rounds are as forward: for a projection or a layer norm of c the gradient
    of h is a round before the cells, and so are products of parts of K."""
    norm_hh, norm_c = Norm(*norm_hh), Norm(*norm_c)
    OUTPUT: tl.constexpr = products.weight_hr_ptr is not None or norm_c.gain_ptr is not None
    ROUNDS: tl.constexpr = 1 + OUTPUT + (S.PARTS > 1)
    WAITS: tl.constexpr = arrivals.arrivals_ptr is not None
    tl.static_assert(S.GATES * S.D % S.PARTS == 0, "parts of K are equal")
    P: tl.constexpr = S.COLUMNS
    poll_limit = tl.load(arrivals.error_ptr + 1) if WAITS else 1
    arrivals, held = of_head(arrivals, B, S) if WAITS else arrivals, None
    if S.HELD:
        part = tl.program_id(0) % S.PARTS
        weight_ptr = rows_of_weights(products.weight_hh_ptr, part, S)
        column = tl.program_id(0) // S.PARTS * (S.PARTS * S.UNITS) + tl.arange(0, S.PARTS * S.UNITS)
        held = tl.trans(load_weights(Columns(weight_ptr, column, column < P, P), 0, S.K, S, part * S.K))
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    call = Backward(batch, arrivals, products, held, hidden, cell, saved, norm_hh, norm_c, dh_total_ptr)
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
        if not WAITS and S.HEADS > 1:
            tl.debug_barrier()
