"""The step family: every hidden size, batch, projection and dtype; W_hh is read from L2 at every step, or held.

One launch for the whole sequence. The work of a step is split into tiles of sequences and units, distributed over the
programs. A grid-wide barrier (exchange.grid_barrier) ends the step, since the next one needs the results of all. A step
has several such rounds where something needs all units of a sequence: a projection (h = W_hr m; m is the output of the
cell, see cell.py), and the layer norms of W_hh h and of c (norm.py). All programs must be resident at once. Tiles are
[batch, units].

Where W_hh of a tile's units fits in shared memory, a program can hold it: all its tiles have the same units, and are of
the sequences of its group. Before the product a tile waits for the other units' tiles of the same sequences, no others.
"""

import itertools
from math import ceil

import torch
import triton
import triton.language as tl

from ..architectures import have_room
from ..memory import Buffer
from ..problem import Problem
from . import indexing
from .cell import cell_forward, gates_backward, normed_output_backward, output, output_backward
from .exchange import arrive, grid_barrier, unless_timed_out, wait_for
from .features import MOST_ROWS
from .norm import gates_of_unit, moments, moments_of_tiles, normalise, normalise_backward, store_pair, sums_of_tiles
from .planning import Device, Family, Plan, expected, power_of_two


@triton.jit
def product(
    a_ptr,  # [*, K], of other programs
    row,  # [rows] which rows of a
    mask,  # [rows] False: the row counts as zero
    factors_ptr,  # [*, K] factors of a, or None
    factors_row,  # [rows]
    norm,  # None, or a is the gradient of a layer norm's result and the product is of what was normalised:
    # (unit_ptr [*, K], gain_ptr [K], and [rows] each scale, mean_d, mean_d_unit, see norm.normalise_backward)
    w_ptr,
    w_column,  # [columns] offset of each column's first element
    w_mask,  # [columns]
    w_stride_k,  # from one k to the next within a column
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(factors * a)[rows] @ w[:, columns], [rows, columns] float32, over K in tiles."""
    acc = tl.zeros((row.shape[0], w_column.shape[0]), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        a, at, in_a = load_rows(a_ptr, row, mask, factors_ptr, factors_row, k, K)
        if norm is not None:
            unit_ptr, gain_ptr, scale, mean_d, mean_d_unit = norm
            unit = tl.load(unit_ptr + at, mask=in_a, other=0.0).to(tl.float32)
            gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            d = gain[None, :] * a.to(tl.float32)
            d = normalise_backward(d, unit, scale[:, None], mean_d[:, None], mean_d_unit[:, None])
            a = tl.where(in_a, d, 0.0).to(a.dtype)
        w = load_weights(w_ptr, w_column, w_mask, w_stride_k, k_start, K, BLOCK_K)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_of_held(held, a, PRECISION: tl.constexpr):
    """a @ held^T of weights `held` [columns, K] and rows of a [rows, K] -> [rows, columns] float32.

    Computed as held a^T: wgmma takes 64 rows, or a multiple, and 8 columns or more.
    """
    return tl.trans(tl.dot(held, tl.trans(a), input_precision=PRECISION))


@triton.jit
def h_before(
    batch_tile, poll_limit, arrivals_ptr, error_ptr, h_prev_ptr, dropout_h_ptr, step, batch,
    P: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(The poll limit after the wait for it, h before a step of a tile's sequences, all units, with dropout [BB, BK]).

    There is nothing to wait for, and all is zero, past the last tile.
    """
    if batch_tile < tl.cdiv(batch.B, BLOCK_B):
        poll_limit = wait_for_tile(arrivals_ptr, batch_tile, step, poll_limit, error_ptr, step)
    sequence = indexing.sequences(batch_tile * BLOCK_B + tl.arange(0, BLOCK_B), batch)
    place = indexing.position(step, sequence, batch, REVERSE)
    row, index = indexing.row_before(step, place.time, sequence.index, batch.B, REVERSE), sequence.index.to(tl.int64)
    h, _, _ = load_rows(h_prev_ptr, row, place.continues, dropout_h_ptr, index, tl.arange(0, BLOCK_K), P)
    return poll_limit, h


@triton.jit
def dgates_after(
    batch_tile, poll_limit, times, arrivals_ptr, error_ptr, dgates_ptr, step, batch,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The same of dgates of the step after, for backward: of the program's part of K, after so many `times`."""
    if batch_tile < tl.cdiv(batch.B, BLOCK_B):
        poll_limit = wait_for_tile(arrivals_ptr, batch_tile, times, poll_limit, error_ptr, step)
    sequence = indexing.sequences(batch_tile * BLOCK_B + tl.arange(0, BLOCK_B), batch)
    place = indexing.position(step + 1, sequence, batch, REVERSE)
    row = place.row * PARTS + tl.program_id(0) % PARTS
    dgates, _, _ = load_rows(dgates_ptr, row, place.continues, None, row, tl.arange(0, BLOCK_K), 4 * H // PARTS)
    return poll_limit, dgates


@triton.jit
def load_rows(a_ptr, row, mask, factors_ptr, factors_row, k, K: tl.constexpr):
    """(factors * a)[rows] of some k; where they lie; which of them there are."""
    at, in_a = row[:, None] * K + k[None, :], mask[:, None] & (k < K)[None, :]
    a = tl.load(a_ptr + at, mask=in_a, other=0.0, cache_modifier=".cg")
    if factors_ptr is not None:
        a *= tl.load(factors_ptr + factors_row[:, None] * K + k[None, :], mask=in_a, other=0.0)
    return a, at, in_a


@triton.jit
def load_weights(w_ptr, w_column, w_mask, w_stride_k, k_start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile [BLOCK_K, columns] of a product's weights."""
    offset = tl.arange(0, BLOCK_K)
    w_at = w_ptr + w_column[None, :] + offset[:, None] * w_stride_k
    w_start = tl.cast(k_start, tl.int64) * w_stride_k  # K w_stride_k may be more than int32 holds
    return tl.load(w_at + w_start, mask=(k_start + offset < K)[:, None] & w_mask[None, :], other=0.0)


@triton.jit
def tiles_of_program(B, width, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, HELD: tl.constexpr):
    """(The first tile of a program, the end, from one to the next); if HELD, all have the same units."""
    batch_tiles = tl.cdiv(B, BLOCK_B)
    if HELD:
        tiles = tl.program_id(1), batch_tiles, tl.num_programs(1)
    else:
        tiles = tl.program_id(0), batch_tiles * tl.cdiv(width, BLOCK_H), tl.num_programs(0)
    return tiles


@triton.jit
def tile_of(number, B, BLOCK_B: tl.constexpr, HELD: tl.constexpr):
    """(Which sequences, which units) a tile has; neighbours share the units, whose weights they read."""
    batch_tile, unit_tile = number, tl.program_id(0)
    if not HELD:
        batch_tile, unit_tile = number % tl.cdiv(B, BLOCK_B), number // tl.cdiv(B, BLOCK_B)
    return batch_tile, unit_tile


@triton.jit
def wait_for_tile(arrivals_ptr, batch_tile, times, poll_limit, error_ptr, step):
    """Wait until all programs that have units of a tile's sequences have arrived so many times; see wait_for."""
    return wait_for(arrivals_ptr + batch_tile, times * tl.num_programs(0), poll_limit, error_ptr, step)


@triton.jit
def tile_at(
    tile, step, batch, H, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr = 1,
):  # fmt: skip
    """A `tile_of` at a step: (units [BH], its Sequences [BB], their Position [BB], its Cells [BB, BH]).

    With PARTS a tile has the units of PARTS neighbours, whose numbers stand for parts of a product.
    """
    batch_tile, unit_tile = tile
    sequence = indexing.sequences(batch_tile * BLOCK_B + tl.arange(0, BLOCK_B), batch)
    unit = unit_tile // PARTS * (PARTS * BLOCK_H) + tl.arange(0, PARTS * BLOCK_H)
    place = indexing.position(step, sequence, batch, REVERSE)
    return unit, sequence, place, indexing.cells_of_tile(sequence, place, unit, H)


@triton.jit
def load_cells(gates_ptr, c_prev_ptr, reset_c_ptr, cells, H: tl.constexpr):
    """The part of a tile's gates from the input, as stored, and c before the step."""
    x = indexing.load_gates(gates_ptr, cells.gates_at, cells.valid, H, True)
    return x, indexing.load_state(c_prev_ptr, reset_c_ptr, cells)


@triton.jit
def product_place(batch, unit_tile, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Where a tile of W_hh h lies in [B, tiles, 4 BH]."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    return (batch[:, None].to(tl.int64) * TILES + unit_tile) * (4 * BLOCK_H) + tl.arange(0, 4 * BLOCK_H)[None, :]


@triton.jit
def pairs_of_step(step, H: tl.constexpr, BLOCK_H: tl.constexpr, B):
    """Where the tiles' pairs of a step begin: two steps alternate, since one is written while the other is read."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    return tl.cast(step % 2, tl.int64) * (TILES * 2) * B


@triton.jit
def store_hidden(
    h, h_ptr, h_n_ptr, h_prev_ptr, row_prev, zoneout_h_ptr, reset_h_ptr, unit, cells, is_last, P: tl.constexpr
):
    """Store h of a tile, after zoneout, and h_n of sequences whose step `is_last`, [BB]; returns that h."""
    if zoneout_h_ptr is not None:
        prev_at = row_prev[:, None] * P + unit[None, :]
        h_prev = tl.load(h_prev_ptr + prev_at, mask=cells.continues, other=0.0).to(tl.float32)
        h = indexing.zoneout(zoneout_h_ptr, cells, indexing.reset_to(h_prev, reset_h_ptr, cells), h)
    tl.store(h_ptr + cells.at, h, mask=cells.in_tile)
    tl.store(h_n_ptr + cells.state_at, h, mask=cells.in_tile & is_last[:, None])
    return h


@triton.jit(do_not_specialize=["T", "B"])
def lstm_step_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    h0_ptr, c0_ptr, weight_hh_ptr, weight_hr_ptr, weight_peephole_ptr,
    h_ptr,  # [T*B, P] out
    m_ptr,  # [B, H] of the step, None without a projection
    gain_hh_ptr,
    product_ptr,  # [B, 4H, in full tiles] float32: W_hh h of the step, or None
    moments_hh_ptr,  # [tiles, B, 2] float32 of it, or None
    gain_c_ptr, bias_c_ptr,
    cell_ptr,  # [2, B, H] float32: o and c of the step, or None
    moments_c_ptr,  # [tiles, B, 2] float32 of c, or None
    c_ptr,
    h_n_ptr,  # [B, P] out where a sequence has a step
    c_n_ptr,  # [B, H] float32 out: c after every step
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr, reset_h_ptr, reset_c_ptr,
    arrivals_ptr,  # [tiles of sequences] int32 zero, see exchange.grid_barrier; None if there is only one round
    error_ptr, T, B, H: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
    PROJECT: tl.constexpr, PEEPHOLES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """All steps. A step has up to three rounds over the tiles, each ended by a grid-wide barrier.

    Round NORM_HH is the cell. The recurrent product belongs to it, or is round 0 if a layer norm needs all of W_hh h.
    One more round has what needs the cells of all units: a projection, or a layer norm of c. HELD, there is one round,
    and a tile waits for those of the same sequences alone.
    """
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    ROUNDS: tl.constexpr = 1 + PROJECT + NORM_HH + NORM_C
    of = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    poll_limit = tl.load(error_ptr + 1) if arrivals_ptr is not None else 1
    held = None
    if HELD:
        column, column_unit = indexing.columns_of_gates(tl.program_id(0) * BLOCK_H, H, BLOCK_H)
        held = tl.trans(load_weights(weight_hh_ptr, column.to(tl.int64) * P, column_unit < H, 1, 0, P, BLOCK_K))
    for step in range(T):
        h_prev_ptr = tl.where(step == 0, h0_ptr, h_ptr)
        c_prev_ptr = tl.where(step == 0, c0_ptr, c_n_ptr)
        for round in tl.static_range(ROUNDS):
            width = P if round > NORM_HH else H
            first, end, stride = tiles_of_program(B, width, BLOCK_B, BLOCK_H, HELD)
            given = arrivals_ptr, error_ptr, h_prev_ptr, dropout_h_ptr, step, of
            if AHEAD:
                poll_limit, h_prev = h_before(first, poll_limit, *given, P, REVERSE, BLOCK_B, BLOCK_K)
            for number in range(first, end, stride):
                tile = tile_of(number, B, BLOCK_B, HELD)
                batch_tile, unit_tile = tile
                unit, sequence, place, cells = tile_at(tile, step, of, width, REVERSE, BLOCK_B, BLOCK_H)
                batch, in_batch, length = sequence.index, sequence.in_batch, sequence.length
                time, valid, continues = place.time, place.valid, place.continues
                at, gates_at, state_at, in_tile, valid_tile, continues_tile, reset_tile = cells
                row_prev = indexing.row_before(step, time, batch, B, REVERSE)
                column, column_unit = indexing.columns_of_gates(unit_tile * BLOCK_H, H, BLOCK_H)
                count = tl.minimum(H - unit_tile * BLOCK_H, BLOCK_H)  # units of the tile

                # Load.
                if HELD and not AHEAD:
                    poll_limit, h_prev = h_before(batch_tile, poll_limit, *given, P, REVERSE, BLOCK_B, BLOCK_K)
                if HELD:
                    x, c_prev = load_cells(gates_ptr, c_prev_ptr, reset_c_ptr, cells, H)

                # Product: all four gates of the tile's units, [BB, 4 BH].
                if round == 0:
                    if HELD:
                        z = product_of_held(held, h_prev, PRECISION)
                    else:
                        z = product(
                            h_prev_ptr, row_prev, continues, dropout_h_ptr, batch.to(tl.int64), None,
                            weight_hh_ptr, column.to(tl.int64) * P, column_unit < H, 1, P, BLOCK_K, PRECISION,
                        )  # fmt: skip
                    z = unless_timed_out(z, poll_limit)
                if AHEAD:  # the cells of this tile are computed while h of the next one is loaded
                    poll_limit, h_prev = h_before(number + stride, poll_limit, *given, P, REVERSE, BLOCK_B, BLOCK_K)
                if NORM_HH and round < 2:
                    z_at = product_ptr + product_place(batch, unit_tile, H, BLOCK_H)
                if NORM_HH and round == 0:
                    tl.store(z_at, z, mask=in_batch[:, None])
                    pair = moments(z, (column_unit < H)[None, :], 4 * count)
                    store_pair(moments_hh_ptr, unit_tile, batch, in_batch, B, *pair)

                # Gates and cell.
                if round == NORM_HH:
                    if not HELD:
                        x, c_prev = load_cells(gates_ptr, c_prev_ptr, reset_c_ptr, cells, H)
                    if NORM_HH:
                        z = tl.load(z_at, mask=in_batch[:, None], other=0.0, cache_modifier=".cg")
                        mean, scale = moments_of_tiles(moments_hh_ptr, batch, in_batch, B, H, BLOCK_H, 4)
                        gain = tl.load(gain_hh_ptr + column, mask=column_unit < H, other=0.0).to(tl.float32)
                        z = normalise(z, mean[:, None], scale[:, None], gain[None, :], 0.0)
                        z = unless_timed_out(z, poll_limit)
                    z = indexing.split_gates(z, BLOCK_B, BLOCK_H)
                    peepholes = indexing.load_peepholes(weight_peephole_ptr, unit[None, :], H)
                    gates, c, m = cell_forward(x, z, c_prev, peepholes, PEEPHOLES)
                    m = tl.where(valid_tile, m, 0.0)  # padding gets zeros
                    if NORM_C:
                        tl.store(cell_ptr + state_at, gates[3], mask=valid_tile)
                        tl.store(cell_ptr + tl.cast(B, tl.int64) * H + state_at, c, mask=valid_tile)
                        pair = moments(c, (unit < H)[None, :], count)
                        store_pair(moments_c_ptr, unit_tile, batch, in_batch, B, *pair)
                    c = indexing.zoneout(zoneout_c_ptr, cells, c_prev, c)
                    if PROJECT:
                        tl.store(m_ptr + state_at, m, mask=in_tile)
                    tl.store(c_n_ptr + state_at, c, mask=valid_tile)
                    if SAVE:
                        tl.store(c_ptr + at, tl.where(valid_tile, c, 0.0), mask=in_tile)
                        indexing.store_gates(gates_ptr, gates_at, valid_tile, gates, H)

                # Output.
                if round > NORM_HH:
                    if PROJECT:
                        m = product(
                            m_ptr, batch.to(tl.int64), valid, None, batch, None,
                            weight_hr_ptr, unit.to(tl.int64) * H, unit < P, 1, H, BLOCK_K, PRECISION,
                        )  # fmt: skip
                    else:
                        o = tl.load(cell_ptr + state_at, mask=valid_tile, other=0.0)
                        c = tl.load(cell_ptr + tl.cast(B, tl.int64) * H + state_at, mask=valid_tile, other=0.0)
                        mean, scale = moments_of_tiles(moments_c_ptr, batch, in_batch, B, H, BLOCK_H, 1)
                        gain, bias = indexing.load_affine(gain_c_ptr, bias_c_ptr, unit[None, :], H)
                        m = output(o, normalise(c, mean[:, None], scale[:, None], gain, bias))
                    m = tl.where(valid_tile, unless_timed_out(m, poll_limit), 0.0)
                if round + 1 == ROUNDS:
                    is_last = step == length - 1
                    store_hidden(
                        m, h_ptr, h_n_ptr, h_prev_ptr, row_prev, zoneout_h_ptr, reset_h_ptr, unit, cells, is_last, P
                    )
                if HELD and step + 1 < T:
                    arrive(arrivals_ptr + batch_tile, poll_limit)
            if (arrivals_ptr is not None and not HELD) and (step + 1 < T or round + 1 < ROUNDS):
                poll_limit = grid_barrier(arrivals_ptr, ROUNDS * step + round + 1, poll_limit, error_ptr, step)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_step_backward_kernel(
    dh_ptr, dh_n_ptr,
    gates_ptr,  # [T*B, 4H] activated
    c_ptr, c0_ptr, weight_hh_ptr, weight_hr_ptr, weight_peephole_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr,
    sums_hh_ptr,  # [2, tiles, B, 2] float32: as sums_c, of unit_hh, for even and odd steps alternately; or None
    gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr,
    sums_c_ptr,  # [tiles, B, 2] float32: the sums of the gradient of unit_c, and of it times unit_c; or None
    dgates_ptr,  # [T*B, 4H] out
    sums_ptr,  # [PARTS, B, P] float32: the products of a step, which add up; or None
    dh_total_ptr,
    dc_ptr,  # [B, H] float32, gradient of c_n, becomes that of c before every step
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr,
    dh_from_zoneout_ptr,  # [B, P] float32 or None, see indexing.zoneout_h_backward
    dreset_h_ptr, reset_c_ptr, dreset_c_ptr,
    arrivals_ptr,  # [tiles of sequences] int32 zero, see exchange.grid_barrier; None if there is only one round
    error_ptr, T, B, H: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, PROJECT: tl.constexpr,
    PEEPHOLES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first. A step has two rounds over the tiles if there is a projection, or a layer
    norm of c, which needs sums over all units; each ends with a grid-wide barrier. HELD: as forward.

    With PARTS one more round comes first: products over parts of K, for PARTS times as many units. They are tiles that
    read less, which the next round adds up.
    """
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    DTYPE: tl.constexpr = dgates_ptr.dtype.element_ty
    SPLIT: tl.constexpr = PARTS > 1
    ROUNDS: tl.constexpr = SPLIT + (2 if PROJECT or NORM_C else 1)
    EARLY: tl.constexpr = HELD and BLOCK_B * BLOCK_H <= 1024  # for more cells a thread has no registers left
    tl.static_assert(4 * H % PARTS == 0, "parts of K are equal")
    K: tl.constexpr = 4 * H // PARTS
    of, saved = indexing.Batch(lengths_ptr, resets_ptr, T, B), indexing.Saved(gates_ptr, c_ptr, c0_ptr, reset_c_ptr)
    poll_limit = tl.load(error_ptr + 1) if arrivals_ptr is not None else 1
    held = None
    if HELD:
        of_part = weight_hh_ptr + tl.cast(tl.program_id(0) % PARTS, tl.int64) * (K * P)
        column = tl.program_id(0) // PARTS * (PARTS * BLOCK_H) + tl.arange(0, PARTS * BLOCK_H)
        held = tl.trans(load_weights(of_part, column, column < P, P, 0, K, BLOCK_K))
    for back in range(T):
        step = T - 1 - back
        for round in tl.static_range(ROUNDS):
            width = H if round + 1 == ROUNDS else P
            rounded = tl.cdiv(P, PARTS * BLOCK_H) * PARTS * BLOCK_H if round < SPLIT else width
            first, end, stride = tiles_of_program(B, rounded, BLOCK_B, BLOCK_H, HELD)
            times = ROUNDS * back  # arrivals of each program, for a tile, before this step
            given = times, arrivals_ptr, error_ptr, dgates_ptr, step, of
            if AHEAD:
                poll_limit, dgates = dgates_after(first, poll_limit, *given, H, REVERSE, BLOCK_B, BLOCK_K, PARTS)
            for number in range(first, end, stride):
                tile = tile_of(number, B, BLOCK_B, HELD)
                batch_tile, unit_tile = tile
                unit, sequence, place, cells = tile_at(
                    tile, step, of, width, REVERSE, BLOCK_B, BLOCK_H,
                    PARTS if round < SPLIT else 1,
                )  # fmt: skip
                batch, in_batch, length = sequence.index, sequence.in_batch, sequence.length
                time, row, valid = place.time, place.row, place.valid
                at, gates_at, state_at, in_tile, valid_tile, continues_tile, reset_tile = cells
                row_prev = indexing.row_before(step, time, batch, B, REVERSE)[:, None]
                if HELD and not AHEAD and round == 0:
                    poll_limit, dgates = dgates_after(
                        batch_tile, poll_limit, *given, H, REVERSE, BLOCK_B, BLOCK_K, PARTS
                    )
                if EARLY and round + 1 == ROUNDS:
                    gates, c, c_prev = indexing.load_saved(saved, step, row_prev, unit[None, :], cells, H)

                # Product with dgates of the step after, whose [*, 4H] are [PARTS *, K] here.
                part = unit_tile % PARTS
                if round == 0:
                    if HELD:
                        dm = product_of_held(held, dgates, PRECISION)
                    else:
                        after = indexing.position(step + 1, sequence, of, REVERSE)
                        row_next, next_continues = after.row, after.continues
                        norm = None
                        if NORM_HH:
                            pairs_at = sums_hh_ptr + pairs_of_step(step + 1, H, BLOCK_H, B)
                            sum_d, sum_d_unit = sums_of_tiles(pairs_at, batch, valid, B, H, BLOCK_H)
                            scale = tl.load(scale_hh_ptr + row_next, mask=next_continues, other=0.0)
                            norm = (unit_hh_ptr, gain_hh_ptr + part * K, scale, sum_d / (4 * H), sum_d_unit / (4 * H))
                        rows = indexing.rows_of_product((row_next * PARTS + part, next_continues), not NORM_HH)
                        dm = product(
                            dgates_ptr, *rows, None, row_next, norm, weight_hh_ptr + tl.cast(part, tl.int64) * (K * P),
                            unit, unit < P, P, K, BLOCK_K, PRECISION,
                        )  # fmt: skip
                        dm = indexing.rows_of_tile(dm, not NORM_HH)
                elif round == SPLIT:
                    if HELD:
                        poll_limit = wait_for_tile(arrivals_ptr, batch_tile, times + 1, poll_limit, error_ptr, step)
                    sum_at, dm = sums_ptr + state_at, tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
                    for _ in tl.static_range(PARTS):
                        dm += tl.load(sum_at, mask=valid_tile, other=0.0, cache_modifier=".cg")
                        sum_at += tl.cast(B, tl.int64) * P
                elif PROJECT:
                    dm = product(
                        dh_total_ptr, row, valid, None, row, None,
                        weight_hr_ptr, unit, unit < H, H, P, BLOCK_K, PRECISION,
                    )  # fmt: skip
                elif NORM_C:
                    dm = tl.load(dh_total_ptr + at, mask=valid_tile, other=0.0).to(tl.float32)
                dm = unless_timed_out(dm, poll_limit)
                if AHEAD:
                    poll_limit, dgates = dgates_after(
                        number + stride, poll_limit, *given, H, REVERSE, BLOCK_B, BLOCK_K, PARTS
                    )

                # The gradient of h.
                if round < SPLIT:
                    tl.store(sums_ptr + tl.cast(B, tl.int64) * P * part + state_at, dm, mask=in_tile)
                if round == SPLIT:
                    if dropout_h_ptr is not None:
                        dm *= tl.load(dropout_h_ptr + state_at, mask=valid_tile, other=0.0).to(tl.float32)
                    dm = indexing.add_gradients_given(dm, dh_ptr, dh_n_ptr, (step == length - 1)[:, None], cells)
                    dm = indexing.zoneout_h_backward(dm, zoneout_h_ptr, dh_from_zoneout_ptr, dreset_h_ptr, cells)
                    if round + 1 < ROUNDS:
                        dm = tl.where(valid_tile, dm, 0.0).to(DTYPE)
                        tl.store(dh_total_ptr + at, dm, mask=in_tile)
                        dm = dm.to(tl.float32)

                # Output.
                if NORM_C and round >= SPLIT:
                    o = tl.load(gates_ptr + gates_at + 3 * H, mask=valid_tile, other=0.0).to(tl.float32)
                    unit_c = tl.load(unit_c_ptr + at, mask=valid_tile, other=0.0)
                    gain, bias = indexing.load_affine(gain_c_ptr, bias_c_ptr, unit[None, :], H)
                    dz_o, d_unit = normed_output_backward(o, unit_c, dm, gain, bias)
                    if round == SPLIT:
                        sum_d, sum_d_unit = tl.sum(d_unit, 1), tl.sum(d_unit * unit_c, 1)
                        store_pair(sums_c_ptr, unit_tile, batch, in_batch, B, sum_d, sum_d_unit)

                # Cell.
                if round + 1 == ROUNDS:
                    if not EARLY:
                        gates, c, c_prev = indexing.load_saved(saved, step, row_prev, unit[None, :], cells, H)
                    dc = tl.load(dc_ptr + state_at, mask=valid_tile, other=0.0)
                    dc, c, dc_from_zoneout = indexing.zoneout_c_backward(dc, zoneout_c_ptr, gates, c, c_prev, cells)
                    if NORM_C:
                        sum_d, sum_d_unit = sums_of_tiles(sums_c_ptr, batch, valid, B, H, BLOCK_H)
                        scale = tl.load(scale_c_ptr + row, mask=valid, other=0.0)
                        dc += normalise_backward(
                            d_unit, unit_c, scale[:, None], (sum_d / H)[:, None], (sum_d_unit / H)[:, None]
                        )
                    else:
                        dz_o, dc_of_m = output_backward(gates[3], c, dm)
                        dc += dc_of_m
                    peepholes = indexing.load_peepholes(weight_peephole_ptr, unit[None, :], H)
                    dz, dc_prev = gates_backward(gates, c_prev, dz_o, dc, peepholes, PEEPHOLES)
                    if NORM_HH:
                        unit_hh = indexing.load_gates(unit_hh_ptr, gates_at, valid_tile, H)
                        gain_hh = indexing.load_gates(gain_hh_ptr, unit[None, :], (unit < H)[None, :], H)
                        _, d, d_unit = gates_of_unit(dz, gain_hh, unit_hh, DTYPE)
                        pairs_at = sums_hh_ptr + pairs_of_step(step, H, BLOCK_H, B)
                        store_pair(pairs_at, unit_tile, batch, in_batch, B, tl.sum(d, 1), tl.sum(d_unit, 1))
                    if zoneout_c_ptr is not None:
                        dc_prev += dc_from_zoneout

                    # Store. In padding every factor was loaded as zero, so its gradients are zero.
                    indexing.store_gates(dgates_ptr, gates_at, in_tile, dz, H)
                    tl.store(dc_ptr + state_at, tl.where(continues_tile, dc_prev, 0.0), mask=valid_tile)
                    if dreset_c_ptr is not None:
                        tl.store(dreset_c_ptr + at, dc_prev, mask=reset_tile)
                if HELD and (step > 0 or round + 1 < ROUNDS):
                    arrive(arrivals_ptr + batch_tile, poll_limit)
            if (arrivals_ptr is not None and not HELD) and (step > 0 or round + 1 < ROUNDS):
                poll_limit = grid_barrier(arrivals_ptr, times + round + 1, poll_limit, error_ptr, step)


def step_plan(problem: Problem, device: Device, backward: bool) -> Plan:
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
    columns = 16  # of which a forward product has four gates
    tiles = ceil(problem.batch / rows) * ceil(max(problem.hidden, problem.projected) / columns)
    programs = max(1, min(tiles, device.multiprocessors // problem.side_by_side))
    k = 128 // problem.size  # 128 bytes of each row at a time
    stage = (rows + columns * (1 if backward else 4)) * k * problem.size
    why = "W_hh is read from L2 at every step"
    if problem.normalised:
        why += "; layer norms need sums over all units, for one or two more grid-wide barriers"
    return Plan(
        Family.STEP, rows, columns, k, programs, 1, 8 if problem.exact_float32 else 4,
        stages, 2 * stage, why,
        tiles_per_group=ceil(tiles / programs), side_by_side=problem.side_by_side,
    )  # fmt: skip


# Sequences, units, parts of K: wgmma takes 64 columns of the product, or a multiple; forward a unit has four.
HELD_FORWARD = [(rows, columns, 1) for rows in (16, 32, 64) for columns in (16, 32)]
HELD_BACKWARD = [(16, 64, 1), (32, 64, 1), (32, 32, 2), (16, 16, 4), (32, 16, 4), (64, 32, 4)]
# Backward, in half precision, W_hh of a tile is [K, units] in shared memory, in blocks of 64 units. From Triton 3.6 on
# a kernel stores each block whole, one after another, but wgmma looks for 256 rows of every block before the next 256
# (compile_table/triton_issue.md). Those are the same for one block, or up to 256 rows: nothing else is proposed.
BLOCK_UNITS, BLOCK_ROWS = 64, 256


def held_plans(problem: Problem, device: Device, backward: bool) -> list[Plan]:
    """The best three plans, by expected time, whose programs hold W_hh of some units in shared memory.

    For products by wgmma, whose operands are there; backward, also of parts of K. A resident program holds up to 128
    units, and beyond 512 these plans gain nothing.
    """
    rounds = problem.normalised or (problem.projected and problem.regularised)
    able = device.architecture == 90 and not problem.exact_float32
    if not able or not 128 < problem.hidden <= 512 or rounds:
        return []
    found, multiprocessors = [], device.multiprocessors // problem.side_by_side
    for rows, columns, parts in HELD_BACKWARD if backward else HELD_FORWARD:
        inner = problem.hidden * (4 if backward else 1) // parts
        k = power_of_two(inner)
        batch_tiles, programs = ceil(problem.batch / rows), parts * ceil(problem.hidden / (parts * columns))
        shared = (rows + columns * (parts if backward else 4)) * k * problem.size
        # While one block of a multiprocessor waits another one computes.
        blocks = 2 if programs * batch_tiles > multiprocessors and have_room(2, shared, device.shared) else 1
        groups = min(batch_tiles, blocks * multiprocessors // programs)
        warps = 4 if rows * columns == 256 else 16 if (rows, columns, blocks) == (64, 32, 1) else 8
        # A thread has registers for 128 bytes more, beside four cells. Where K is padded nothing is gained.
        room = rows * k * problem.size <= 128 * 32 * warps and rows * columns <= 4 * 32 * warps
        ahead = batch_tiles > groups and blocks == parts == 1 and room and k == inner
        as_stored = not backward or columns * parts <= BLOCK_UNITS or k <= BLOCK_ROWS
        if groups > 0 and shared <= device.shared and as_stored:
            found.append(Plan(
                Family.STEP, rows, columns, k, programs, groups, warps, 1, shared,
                "programs hold W_hh in shared memory", tiles_per_group=ceil(batch_tiles / groups),
                side_by_side=problem.side_by_side, parts=parts, held=blocks, ahead=ahead,
            ))  # fmt: skip
    return sorted(found, key=lambda plan: expected(problem, device, plan, backward).seconds)[:3]


def split_plans(problem: Problem, device: Device, backward: bool) -> list[Plan]:
    """The best two plans, by expected time, whose backward splits the product into parts of K.

    A program has a part for more units: for 16 units and all of K it would read far more of dgates than of W_hh.
    """
    if not backward or problem.projected or problem.normalised or problem.exact_float32:
        return []
    found = []
    for rows, (columns, parts) in itertools.product((16, 32, 64, 128), ((8, 8), (16, 4), (16, 8), (32, 4))):
        tiles, shared = ceil(problem.batch / rows) * ceil(problem.hidden / columns), 3 * 128 * (rows + parts * columns)
        programs = max(1, min(tiles, device.multiprocessors // problem.side_by_side))
        in_words = 4 * problem.hidden * problem.size % (16 * parts) == 0  # of 16 bytes, in which a part is loaded
        fits = rows <= max(16, power_of_two(problem.batch)) and rows * columns <= 2048 and shared <= device.shared
        if in_words and fits:
            found.append(Plan(
                Family.STEP, rows, columns, 128 // problem.size, programs, 1, max(4, rows * columns // 128), 3, shared,
                "W_hh is read from L2 at every step, for products of parts of K",
                tiles_per_group=ceil(tiles / programs), side_by_side=problem.side_by_side, parts=parts,
            ))  # fmt: skip
    return sorted(found, key=lambda plan: expected(problem, device, plan, backward).seconds)[:2]


KERNELS = lstm_step_forward_kernel, lstm_step_backward_kernel


def forward_buffers(p: Problem, plan: Plan) -> dict[str, Buffer]:
    """What forward writes besides the results that all families share."""
    f32, tiles = torch.float32, ceil(p.hidden / plan.columns)
    buffers = {}
    if p.projected:
        buffers["m_ptr"] = Buffer(p.dtype, (p.batch, p.hidden))
    if p.norms[0]:
        buffers["product_ptr"] = Buffer(f32, (p.batch, tiles, 4 * plan.columns))
        buffers["moments_hh_ptr"] = Buffer(f32, (tiles, p.batch, 2))
    if p.norms[1]:
        buffers["cell_ptr"] = Buffer(f32, (2, p.batch, p.hidden))
        buffers["moments_c_ptr"] = Buffer(f32, (tiles, p.batch, 2))
    return buffers


def backward_buffers(p: Problem, plan: Plan) -> dict[str, Buffer]:
    """As forward_buffers, for backward."""
    f32, tiles = torch.float32, ceil(p.hidden / plan.columns)
    buffers = {}
    if plan.parts > 1:
        buffers["sums_ptr"] = Buffer(f32, (plan.parts, p.batch, p.width))
    if p.norms[0]:
        buffers["sums_hh_ptr"] = Buffer(f32, (2, tiles, p.batch, 2), fill=0)
    if p.norms[1]:
        buffers["sums_c_ptr"] = Buffer(f32, (tiles, p.batch, 2))
    return buffers


BUFFERS = forward_buffers, backward_buffers
OPERANDS = None, None
