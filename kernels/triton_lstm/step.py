"""The step family: every hidden size, batch, projection and dtype; W_hh is read from L2 at every step.

One launch for the whole sequence. The work of a step is split into tiles of sequences and units, distributed over the
programs. A grid-wide barrier (exchange.grid_barrier) ends the step, since the next one needs the results of all. A step
has several such rounds where something needs all units of a sequence: a projection (h = W_hr m; m is the output of the
cell, see cell.py), and the layer norms of W_hh h and of c (norm.py). All programs must be resident at once. Tiles are
[batch, units].
"""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem, Recurrence
from .cell import (
    cell_backward,
    cell_forward,
    gates_backward,
    next_cell,
    normed_output_backward,
    output,
    zoneout,
    zoneout_backward,
)
from .exchange import grid_barrier
from .features import MOST_ROWS
from .indexing import (
    cell_before,
    interleaved_gates,
    load_gates,
    load_peepholes,
    load_zoneout,
    position,
    reset_to,
    row_before,
    row_in_h_then_h0,
    sequences_from,
    split_gate_columns,
    step_after,
    store_gates,
    time_of,
)
from .norm import (
    load_for_units,
    moments,
    moments_of_tiles,
    normalise,
    normalise_backward,
    store_pair,
    sums_of_tiles,
)
from .planning import Device, Family, Plan


@triton.jit
def product(
    acc,  # [rows, columns] float32, added to
    a_ptr,  # [*, K], of other programs
    a_row,  # [rows] which rows of a
    a_mask,  # [rows] False: the row counts as zero
    scale_ptr,  # [*, K] factors of a, or None
    scale_row,  # [rows]
    w_ptr,
    w_column,  # [columns] offset of each column's first element
    w_mask,  # [columns]
    w_stride_k,  # from one k to the next within a column
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (scale * a)[rows] @ w[:, columns], over K in tiles."""
    w_at = w_ptr + w_column[None, :] + tl.arange(0, BLOCK_K)[:, None] * w_stride_k
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        a_at = a_ptr + a_row[:, None] * K + k[None, :]
        a = tl.load(a_at, mask=a_mask[:, None] & (k < K)[None, :], other=0.0, cache_modifier=".cg")
        if scale_ptr is not None:
            scale_at = scale_ptr + scale_row[:, None] * K + k[None, :]
            a *= tl.load(scale_at, mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        w_start = tl.cast(k_start, tl.int64) * w_stride_k  # K w_stride_k may be more than int32 holds
        w = tl.load(w_at + w_start, mask=(k < K)[:, None] & w_mask[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_through_norm(
    acc,  # [rows, columns] float32, added to
    d_ptr,  # [*, K] gradient of a layer norm's result, of other programs
    unit_ptr,  # [*, K]
    gain_ptr,  # [K]
    row,  # [rows]
    row_mask,  # [rows] False: the row counts as zero
    scale,  # [rows] and below: see norm.normalise_backward
    mean_d, mean_d_unit,
    w_ptr,  # [K, columns]
    column,  # [columns]
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + d' @ w[:, columns], where d' is the gradient of what was normalised."""
    w_at = w_ptr + column[None, :] + tl.arange(0, BLOCK_K)[:, None] * COLUMNS
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (k < K)[None, :]
        d = tl.load(d_ptr + row[:, None] * K + k[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        unit = tl.load(unit_ptr + row[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        d_v = normalise_backward(
            gain[None, :] * d.to(tl.float32), unit, scale[:, None], mean_d[:, None], mean_d_unit[:, None]
        )
        w_start = tl.cast(k_start, tl.int64) * COLUMNS  # K COLUMNS may be more than int32 holds
        w = tl.load(w_at + w_start, mask=(k < K)[:, None] & (column < COLUMNS)[None, :], other=0.0)
        acc = tl.dot(tl.where(mask, d_v, 0.0).to(d.dtype), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_at(tile, B, BLOCK_B: tl.constexpr):
    """(first sequence, number of the tile of units) of a tile: neighbours share the units, whose weights they read."""
    return tile % tl.cdiv(B, BLOCK_B) * BLOCK_B, tile // tl.cdiv(B, BLOCK_B)


@triton.jit
def recurrent_product(
    h_ptr,  # [T*B + B, P]
    row,  # [BB] row of h before the step
    continues,  # [BB]
    dropout_h_ptr,  # [B, P] or None
    batch,  # [BB]
    weight_hh_ptr,  # [4H, P]
    unit_tile, H: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W_hh h for all four gates of a tile's units, interleaved: [BB, 4 BH], and which columns there are, [4 BH]."""
    column, column_unit = interleaved_gates(unit_tile * BLOCK_H, H, BLOCK_H)
    z = tl.zeros((BLOCK_B, 4 * BLOCK_H), tl.float32)
    z = product(
        z, h_ptr, row, continues, dropout_h_ptr, batch.to(tl.int64),
        weight_hh_ptr, column.to(tl.int64) * P, column_unit < H, 1, P, BLOCK_K, PRECISION,
    )  # fmt: skip
    return z, column_unit < H


@triton.jit
def product_place(batch, unit_tile, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Where a tile of W_hh h lies in [B, tiles, 4 BH]."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    return (batch[:, None].to(tl.int64) * TILES + unit_tile) * (4 * BLOCK_H) + tl.arange(0, 4 * BLOCK_H)[None, :]


@triton.jit(do_not_specialize=["T", "B"])
def lstm_step_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weight_hh_ptr, weight_hr_ptr, peephole_ptr,
    h_ptr,  # [T*B + B, P]: h of every step, out; then h0
    m_ptr,  # [B, H] of the step, None without a projection
    gain_hh_ptr,
    product_ptr,  # [B, 4H, in full tiles] float32: W_hh h of the step, or None
    moments_hh_ptr,  # [tiles, B, 2] float32 of it, or None
    gain_c_ptr, bias_c_ptr,
    cell_ptr,  # [2, B, H] float32: o and c of the step, or None
    moments_c_ptr,  # [tiles, B, 2] float32 of c, or None
    c_ptr,
    h_n_ptr,  # [B, P] out where a sequence has a step
    c_n_ptr,  # [B, H] float32 c0, made c after every step
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr, reset_h_ptr, reset_c_ptr,
    arrivals_ptr,  # [1] int32 zero, see exchange.grid_barrier
    error_ptr, T, B, H: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
    PROJECT: tl.constexpr, PEEPHOLES: tl.constexpr, PRECISION: tl.constexpr, POLL_LIMIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps: the recurrent product, the gates and the cell; then, if there is one, the projection.

    Layer norms split it after the product and after the cell.
    """
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    BARRIERS: tl.constexpr = 1 + PROJECT + NORM_HH + NORM_C
    poll_limit = POLL_LIMIT
    for step in range(T):
        if NORM_HH:
            for tile in range(tl.program_id(0), tl.cdiv(B, BLOCK_B) * tl.cdiv(H, BLOCK_H), tl.num_programs(0)):
                first, unit_tile = tile_at(tile, B, BLOCK_B)
                batch, in_batch, length = sequences_from(first, lengths_ptr, T, B, BLOCK_B)
                time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
                row_prev = row_in_h_then_h0(step - 1, time_of(step - 1, length, REVERSE), batch, T, B)
                z, in_columns = recurrent_product(
                    h_ptr, row_prev, continues, dropout_h_ptr, batch, weight_hh_ptr, unit_tile,
                    H, P, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
                )  # fmt: skip
                tl.store(product_ptr + product_place(batch, unit_tile, H, BLOCK_H), z, mask=in_batch[:, None])
                mean, squares = moments(z, in_columns[None, :], 4 * tl.minimum(H - unit_tile * BLOCK_H, BLOCK_H))
                store_pair(moments_hh_ptr, unit_tile, batch, in_batch, B, mean, squares)
            poll_limit = grid_barrier(arrivals_ptr, BARRIERS * step + 1, poll_limit, error_ptr, step)

        for tile in range(tl.program_id(0), tl.cdiv(B, BLOCK_B) * tl.cdiv(H, BLOCK_H), tl.num_programs(0)):
            first, unit_tile = tile_at(tile, B, BLOCK_B)
            batch, in_batch, length = sequences_from(first, lengths_ptr, T, B, BLOCK_B)
            unit = unit_tile * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
            time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
            row_prev = row_in_h_then_h0(step - 1, time_of(step - 1, length, REVERSE), batch, T, B)
            in_units = (unit < H)[None, :]
            valid_tile = valid[:, None] & in_units  # [BB, BH]
            continues_tile = continues[:, None] & in_units
            reset_tile = valid_tile & ~continues_tile

            # Product: all four gates of the tile's units, [BB, 4 BH].
            if NORM_HH:
                z_at = product_ptr + product_place(batch, unit_tile, H, BLOCK_H)
                z = tl.load(z_at, mask=in_batch[:, None], other=0.0, cache_modifier=".cg")
                mean, scale = moments_of_tiles(moments_hh_ptr, batch, in_batch, B, H, BLOCK_H, 4)
                column, column_unit = interleaved_gates(unit_tile * BLOCK_H, H, BLOCK_H)
                gain = tl.load(gain_hh_ptr + column, mask=column_unit < H, other=0.0).to(tl.float32)
                z = normalise(z, mean[:, None], scale[:, None], gain[None, :], 0.0)
            else:
                z, _ = recurrent_product(
                    h_ptr, row_prev, continues, dropout_h_ptr, batch, weight_hh_ptr, unit_tile,
                    H, P, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
                )  # fmt: skip
            z_i, z_f, z_g, z_o = split_gate_columns(z, BLOCK_B, BLOCK_H)

            # Gates and cell. Zoneout's masks lie as h and c do.
            gates_at = row[:, None] * (4 * H) + unit[None, :]
            x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at, valid_tile, H)
            at = row[:, None] * H + unit[None, :]
            state_at = batch[:, None].to(tl.int64) * H + unit[None, :]
            c_prev = tl.load(c_n_ptr + state_at, mask=continues_tile, other=0.0)
            c_prev = reset_to(c_prev, reset_c_ptr, at, reset_tile)
            p_i, p_f, p_o = load_peepholes(peephole_ptr, unit[None, :], H)
            i, f, g, o, c, m = cell_forward(
                x_i + z_i, x_f + z_f, x_g + z_g, x_o + z_o, c_prev, p_i, p_f, p_o, PEEPHOLES
            )
            if NORM_C:
                tl.store(cell_ptr + state_at, o, mask=valid_tile)
                tl.store(cell_ptr + tl.cast(B, tl.int64) * H + state_at, c, mask=valid_tile)
                mean, squares = moments(c, in_units, tl.minimum(H - unit_tile * BLOCK_H, BLOCK_H))
                store_pair(moments_c_ptr, unit_tile, batch, in_batch, B, mean, squares)
            if zoneout_c_ptr is not None:
                c = zoneout(load_zoneout(zoneout_c_ptr, at, valid_tile), c_prev, c)
            if zoneout_h_ptr is not None and not (PROJECT or NORM_C):
                h_at = h_ptr + row_prev[:, None] * H + unit[None, :]
                h_prev = tl.load(h_at, mask=continues_tile, other=0.0).to(tl.float32)
                h_prev = reset_to(h_prev, reset_h_ptr, at, reset_tile)
                m = zoneout(load_zoneout(zoneout_h_ptr, at, valid_tile), h_prev, m)

            # Store. Padding gets zeros; the last valid step gives the final states.
            in_tile = in_batch[:, None] & in_units
            m = tl.where(valid_tile, m, 0.0).to(h_ptr.dtype.element_ty)
            if PROJECT:
                tl.store(m_ptr + state_at, m, mask=in_tile)
            elif not NORM_C:
                tl.store(h_ptr + at, m, mask=in_tile)
                tl.store(h_n_ptr + state_at, m, mask=in_tile & (step == length - 1)[:, None])
            tl.store(c_n_ptr + state_at, c, mask=valid_tile)
            if SAVE:
                tl.store(c_ptr + at, tl.where(valid_tile, c, 0.0), mask=in_tile)
                store_gates(gates_ptr, gates_at, valid_tile, i, f, g, o, H)

        if PROJECT or NORM_C:
            poll_limit = grid_barrier(arrivals_ptr, BARRIERS * step + BARRIERS - 1, poll_limit, error_ptr, step)
            for tile in range(tl.program_id(0), tl.cdiv(B, BLOCK_B) * tl.cdiv(P, BLOCK_H), tl.num_programs(0)):
                first, p_tile = tile_at(tile, B, BLOCK_B)
                batch, in_batch, length = sequences_from(first, lengths_ptr, T, B, BLOCK_B)
                p = p_tile * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
                time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
                at = row[:, None] * P + p[None, :]
                in_tile = in_batch[:, None] & (p < P)[None, :]

                if NORM_C:  # p is a unit
                    state_at = batch[:, None].to(tl.int64) * H + p[None, :]
                    valid_tile = valid[:, None] & in_tile
                    o = tl.load(cell_ptr + state_at, mask=valid_tile, other=0.0)
                    c = tl.load(cell_ptr + tl.cast(B, tl.int64) * H + state_at, mask=valid_tile, other=0.0)
                    mean, scale = moments_of_tiles(moments_c_ptr, batch, in_batch, B, H, BLOCK_H, 1)
                    gain, bias = load_for_units(gain_c_ptr, p, 0.0, H), load_for_units(bias_c_ptr, p, 0.0, H)
                    h = output(o, normalise(c, mean[:, None], scale[:, None], gain[None, :], bias[None, :]))
                    h = tl.where(valid_tile, h, 0.0)
                else:
                    h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
                    h = product(
                        h, m_ptr, batch.to(tl.int64), valid, None, batch,
                        weight_hr_ptr, p.to(tl.int64) * H, p < P, 1, H, BLOCK_K, PRECISION,
                    )  # fmt: skip
                if zoneout_h_ptr is not None:
                    row_prev = row_in_h_then_h0(step - 1, time_of(step - 1, length, REVERSE), batch, T, B)
                    h_at = h_ptr + row_prev[:, None] * P + p[None, :]
                    h_prev = tl.load(h_at, mask=continues[:, None] & in_tile, other=0.0).to(tl.float32)
                    h_prev = reset_to(h_prev, reset_h_ptr, at, (valid & ~continues)[:, None] & in_tile)
                    h = zoneout(load_zoneout(zoneout_h_ptr, at, valid[:, None] & in_tile), h_prev, h)
                h = h.to(h_ptr.dtype.element_ty)
                final_at = batch[:, None].to(tl.int64) * P + p[None, :]
                tl.store(h_ptr + at, h, mask=in_tile)
                tl.store(h_n_ptr + final_at, h, mask=in_tile & (step == length - 1)[:, None])
        poll_limit = grid_barrier(arrivals_ptr, BARRIERS * step + BARRIERS, poll_limit, error_ptr, step)


@triton.jit
def pairs_of_step(step, H: tl.constexpr, BLOCK_H: tl.constexpr, B):
    """Where the tiles' pairs of a step begin: two steps alternate, since one is written while the other is read."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    return tl.cast(step % 2, tl.int64) * (TILES * 2) * B


@triton.jit
def hidden_gradient(
    dh_ptr,  # [T*B, P] or None
    dh_n_ptr,  # [B, P] or None
    dgates_ptr,  # [T*B, 4H]
    weight_hh_ptr,  # [4H, P]
    dropout_h_ptr,  # [B, P] or None
    zoneout_h_ptr,  # [T*B, P], one float32, or None
    dh_from_zoneout_ptr,  # [B, P] float32 or None: gradient through zoneout of the step after; out: of this one
    dreset_h_ptr,  # [T*B, P] float32 or None, see lstm_step_backward_kernel
    gain_hh_ptr,  # [4H] or None
    unit_hh_ptr,  # [T*B, 4H] or None
    scale_hh_ptr,  # [T*B] float32 or None
    sums_hh_ptr,  # [2, tiles, B, 2] float32 or None, see lstm_step_backward_kernel
    step,
    length,  # [BB]
    batch,  # [BB]
    row,  # [BB]
    row_next,  # [BB] row of the step after this one
    next_continues,  # [BB] whether that step starts from this one's state
    p,  # [BP]
    valid,  # [BB]
    continues,  # [BB] whether this step starts from the state before it
    B, H: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of what one step computed as h, [BB, BP]: from the output, the final state and the step after."""
    dh = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    if gain_hh_ptr is None:
        dh = product(
            dh, dgates_ptr, row_next, next_continues, None, row_next,
            weight_hh_ptr, p, p < P, P, 4 * H, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        pairs_at = sums_hh_ptr + pairs_of_step(step + 1, H, BLOCK_P, B)
        sum_d, sum_d_unit = sums_of_tiles(pairs_at, batch, valid, B, H, BLOCK_P)
        scale = tl.load(scale_hh_ptr + row_next, mask=next_continues, other=0.0)
        dh = product_through_norm(
            dh, dgates_ptr, unit_hh_ptr, gain_hh_ptr, row_next, next_continues,
            scale, sum_d / (4 * H), sum_d_unit / (4 * H), weight_hh_ptr, p, 4 * H, P, BLOCK_K, PRECISION,
        )  # fmt: skip
    valid_tile = valid[:, None] & (p < P)[None, :]
    state_at = batch[:, None].to(tl.int64) * P + p[None, :]
    if dropout_h_ptr is not None:
        dh *= tl.load(dropout_h_ptr + state_at, mask=valid_tile, other=0.0).to(tl.float32)
    if dh_ptr is not None:
        dh += tl.load(dh_ptr + row[:, None] * P + p[None, :], mask=valid_tile, other=0.0).to(tl.float32)
    if dh_n_ptr is not None:
        last = valid_tile & (step == length - 1)[:, None]
        dh += tl.load(dh_n_ptr + state_at, mask=last, other=0.0).to(tl.float32)
    if zoneout_h_ptr is not None:
        dh += tl.load(dh_from_zoneout_ptr + state_at, mask=valid_tile, other=0.0)
        at = row[:, None] * P + p[None, :]
        dh_prev, dh = zoneout_backward(load_zoneout(zoneout_h_ptr, at, valid_tile), dh)
        if dreset_h_ptr is not None:
            tl.store(dreset_h_ptr + at, dh_prev, mask=valid_tile & ~continues[:, None])
        tl.store(dh_from_zoneout_ptr + state_at, tl.where(continues[:, None], dh_prev, 0.0), mask=valid_tile)
    return dh


@triton.jit(do_not_specialize=["T", "B"])
def lstm_step_backward_kernel(
    dh_ptr, dh_n_ptr,
    gates_ptr,  # [T*B, 4H] activated
    c_ptr, c0_ptr, weight_hh_ptr, weight_hr_ptr, peephole_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr,
    sums_hh_ptr,  # [2, tiles, B, 2] float32: as sums_c, of unit_hh, for even and odd steps alternately; or None
    gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr,
    sums_c_ptr,  # [tiles, B, 2] float32: the sums of the gradient of unit_c, and of it times unit_c; or None
    dgates_ptr,  # [T*B, 4H] out
    dh_total_ptr,
    dc_ptr,  # [B, H] float32, gradient of c_n, made that of c before every step
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr,
    dh_from_zoneout_ptr,  # [B, P] float32 or None, see hidden_gradient
    dreset_h_ptr, reset_c_ptr, dreset_c_ptr,
    arrivals_ptr,  # [1] int32 zero, see exchange.grid_barrier
    error_ptr, T, B, H: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, PROJECT: tl.constexpr,
    PEEPHOLES: tl.constexpr, PRECISION: tl.constexpr, POLL_LIMIT: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first: the product with the dgates of the step after, and the cell."""
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    BARRIERS: tl.constexpr = 2 if PROJECT or NORM_C else 1
    poll_limit = POLL_LIMIT
    for back in range(T):
        step = T - 1 - back
        if PROJECT or NORM_C:
            for tile in range(tl.program_id(0), tl.cdiv(B, BLOCK_B) * tl.cdiv(P, BLOCK_H), tl.num_programs(0)):
                first, p_tile = tile_at(tile, B, BLOCK_B)
                batch, in_batch, length = sequences_from(first, lengths_ptr, T, B, BLOCK_B)
                p = p_tile * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
                time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
                row_next, next_continues = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)
                dh = hidden_gradient(
                    dh_ptr, dh_n_ptr, dgates_ptr, weight_hh_ptr, dropout_h_ptr, zoneout_h_ptr, dh_from_zoneout_ptr,
                    dreset_h_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr, sums_hh_ptr,
                    step, length, batch, row, row_next, next_continues, p, valid, continues, B,
                    H, P, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
                )  # fmt: skip
                at = row[:, None] * P + p[None, :]
                in_tile = in_batch[:, None] & (p < P)[None, :]
                dh = tl.where(valid[:, None], dh, 0.0).to(dh_total_ptr.dtype.element_ty)
                tl.store(dh_total_ptr + at, dh, mask=in_tile)
                if NORM_C:  # p is a unit, and dh the gradient of m
                    valid_tile = valid[:, None] & in_tile
                    o = tl.load(gates_ptr + row[:, None] * (4 * H) + 3 * H + p[None, :], mask=valid_tile, other=0.0)
                    unit_c = tl.load(unit_c_ptr + at, mask=valid_tile, other=0.0)
                    gain, bias = load_for_units(gain_c_ptr, p, 0.0, H), load_for_units(bias_c_ptr, p, 0.0, H)
                    _, d_unit = normed_output_backward(
                        o.to(tl.float32), unit_c, dh.to(tl.float32), gain[None, :], bias[None, :]
                    )
                    store_pair(sums_c_ptr, p_tile, batch, in_batch, B, tl.sum(d_unit, 1), tl.sum(d_unit * unit_c, 1))
            poll_limit = grid_barrier(arrivals_ptr, BARRIERS * back + 1, poll_limit, error_ptr, step)

        for tile in range(tl.program_id(0), tl.cdiv(B, BLOCK_B) * tl.cdiv(H, BLOCK_H), tl.num_programs(0)):
            first, unit_tile = tile_at(tile, B, BLOCK_B)
            batch, in_batch, length = sequences_from(first, lengths_ptr, T, B, BLOCK_B)
            unit = unit_tile * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
            time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
            in_units = (unit < H)[None, :]
            valid_tile = valid[:, None] & in_units  # [BB, BH]

            # Product: the gradient of m, through the step after and, if there is one, the projection.
            if PROJECT:
                dm = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
                dm = product(
                    dm, dh_total_ptr, row, valid, None, row, weight_hr_ptr, unit, unit < H, H, P, BLOCK_K, PRECISION
                )
            elif NORM_C:
                dm = tl.load(dh_total_ptr + row[:, None] * H + unit[None, :], mask=valid_tile, other=0.0).to(tl.float32)
            else:
                row_next, next_continues = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)
                dm = hidden_gradient(
                    dh_ptr, dh_n_ptr, dgates_ptr, weight_hh_ptr, dropout_h_ptr, zoneout_h_ptr, dh_from_zoneout_ptr,
                    dreset_h_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr, sums_hh_ptr,
                    step, length, batch, row, row_next, next_continues, unit, valid, continues, B,
                    H, P, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
                )  # fmt: skip

            # Cell.
            at = row[:, None] * H + unit[None, :]
            gates_at = row[:, None] * (4 * H) + unit[None, :]
            i, f, g, o = load_gates(gates_ptr, gates_at, valid_tile, H)
            c = tl.load(c_ptr + at, mask=valid_tile, other=0.0)
            prev_at = row_before(step, time, batch, B, REVERSE)[:, None] * H + unit[None, :]
            c_prev = cell_before(c_ptr, c0_ptr, step, prev_at, continues[:, None] & in_units)
            c_prev = reset_to(c_prev, reset_c_ptr, at, valid_tile & ~continues[:, None])
            state_at = batch[:, None].to(tl.int64) * H + unit[None, :]
            dc = tl.load(dc_ptr + state_at, mask=valid_tile, other=0.0)
            if zoneout_c_ptr is not None:
                c = next_cell(i, f, g, c_prev)  # as the step computed it; what was saved is after zoneout
                dc_from_zoneout, dc = zoneout_backward(load_zoneout(zoneout_c_ptr, at, valid_tile), dc)
            p_i, p_f, p_o = load_peepholes(peephole_ptr, unit[None, :], H)
            if NORM_C:
                unit_c = tl.load(unit_c_ptr + at, mask=valid_tile, other=0.0)
                gain, bias = load_for_units(gain_c_ptr, unit, 0.0, H), load_for_units(bias_c_ptr, unit, 0.0, H)
                dz_o, d_unit = normed_output_backward(o, unit_c, dm, gain[None, :], bias[None, :])
                sum_d, sum_d_unit = sums_of_tiles(sums_c_ptr, batch, valid, B, H, BLOCK_H)
                scale_c = tl.load(scale_c_ptr + row, mask=valid, other=0.0)
                dc += normalise_backward(
                    d_unit, unit_c, scale_c[:, None], (sum_d / H)[:, None], (sum_d_unit / H)[:, None]
                )
                dz_i, dz_f, dz_g, dz_o, dc_prev = gates_backward(i, f, g, c_prev, dz_o, dc, p_i, p_f, p_o, PEEPHOLES)
            else:
                dz_i, dz_f, dz_g, dz_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dm, dc, p_i, p_f, p_o, PEEPHOLES)
            if NORM_HH:
                # As the step before will read dz: rounded.
                DTYPE: tl.constexpr = dgates_ptr.dtype.element_ty
                u_i, u_f, u_g, u_o = load_gates(unit_hh_ptr, gates_at, valid_tile, H)
                gain_i, gain_f, gain_g, gain_o = load_gates(gain_hh_ptr, unit[None, :], in_units, H)
                d_i, d_f = gain_i * dz_i.to(DTYPE).to(tl.float32), gain_f * dz_f.to(DTYPE).to(tl.float32)
                d_g, d_o = gain_g * dz_g.to(DTYPE).to(tl.float32), gain_o * dz_o.to(DTYPE).to(tl.float32)
                sum_d = tl.sum(d_i + d_f + d_g + d_o, axis=1)
                sum_d_unit = tl.sum(d_i * u_i + d_f * u_f + d_g * u_g + d_o * u_o, axis=1)
                pairs_at = sums_hh_ptr + pairs_of_step(step, H, BLOCK_H, B)
                store_pair(pairs_at, unit_tile, batch, in_batch, B, sum_d, sum_d_unit)
            if zoneout_c_ptr is not None:
                dc_prev += dc_from_zoneout

            # Store. In padding every factor was loaded as zero, so its gradients are zero.
            store_gates(dgates_ptr, gates_at, in_batch[:, None] & in_units, dz_i, dz_f, dz_g, dz_o, H)
            tl.store(dc_ptr + state_at, tl.where(continues[:, None], dc_prev, 0.0), mask=valid_tile)
            if dreset_c_ptr is not None:
                tl.store(dreset_c_ptr + at, dc_prev, mask=valid_tile & ~continues[:, None])
        poll_limit = grid_barrier(arrivals_ptr, BARRIERS * back + BARRIERS, poll_limit, error_ptr, step)


def step_plan(problem: Problem, device: Device, backward: bool) -> Plan:
    """Works for every problem: no more programs than fit the card at once, and tiles that fill them.

    The product of a step is small, so what counts is that many programs share it: the narrowest tiles that still fill
    tensor-core instructions.
    """
    rows = 16 if problem.batch <= 16 else 32 if problem.batch <= 32 else 64
    heavy = problem.regularised or problem.normalised  # masks and norms need registers
    most, stages = (32, 2) if heavy else (MOST_ROWS, 3)
    if problem.exact_float32:
        most //= 2  # and products without tensor cores do, too
    rows = min(rows, most)
    columns = 16  # of which a forward product has four gates
    tiles = ceil(problem.batch / rows) * ceil(max(problem.hidden, problem.projected) / columns)
    programs = max(1, min(tiles, device.multiprocessors // problem.side_by_side))
    k = 128 // problem.size  # 128 bytes of each row at a time
    stage = (rows + columns * (1 if backward else 4)) * k * problem.size
    why = "W_hh is read from L2 at every step"
    if problem.normalised:
        why += "; layer norms need sums over all units, for one or two more grid-wide barriers"
    return Plan(
        Family.STEP, rows, columns, k, programs, 1, 8 if problem.exact_float32 and heavy else 4,
        stages, 2 * stage, why,
        walks=ceil(tiles / programs), side_by_side=problem.side_by_side,
    )  # fmt: skip


KERNELS = lstm_step_forward_kernel, lstm_step_backward_kernel


def forward_buffers(gates: Tensor, r: Recurrence, plan: Plan) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What forward needs besides what all families are given: h, for `hidden_states`; and arguments."""
    steps, batch, _ = gates.shape
    h_then_h0 = gates.new_empty(steps + 1, batch, r.h0.shape[1])
    h_then_h0[-1] = r.h0
    f32, hidden = r.c0, r.c0.shape[1]
    tiles, norm_hh, norm_c = ceil(hidden / plan.columns), r.gain_hh is not None, r.gain_c is not None
    return h_then_h0, {
        "h_ptr": h_then_h0,
        "m_ptr": None if r.weight_hr is None else gates.new_empty(batch, hidden),
        "h_n_ptr": r.h0.clone(),  # what a sequence of length 0 ends with
        "c_n_ptr": r.c0.clone(),
        "product_ptr": f32.new_empty(batch, tiles, 4 * plan.columns) if norm_hh else None,
        "moments_hh_ptr": f32.new_empty(tiles, batch, 2) if norm_hh else None,
        "cell_ptr": f32.new_empty(2, batch, hidden) if norm_c else None,
        "moments_c_ptr": f32.new_empty(tiles, batch, 2) if norm_c else None,
        "arrivals_ptr": torch.zeros(1, dtype=torch.int32, device=gates.device),
    }


def hidden_states(h_then_h0: Tensor, hidden: int) -> Tensor:
    """h [T, B, P]; not a view, which autograd forbids to change in place."""
    return h_then_h0.resize_(h_then_h0.shape[0] - 1, *h_then_h0.shape[1:])


def backward_buffers(gates: Tensor, r: Recurrence, plan: Plan) -> tuple[Tensor, dict[str, Tensor | None]]:
    """As forward_buffers, of backward: dgates, for `gradient_of_gates`; and arguments."""
    dgates, tiles, batch = torch.empty_like(gates), ceil(r.c0.shape[1] / plan.columns), len(r.h0)
    return dgates, {
        "dgates_ptr": dgates,
        "sums_hh_ptr": None if r.gain_hh is None else r.c0.new_zeros(2, tiles, batch, 2),
        "sums_c_ptr": None if r.gain_c is None else r.c0.new_empty(tiles, batch, 2),
        "arrivals_ptr": torch.zeros(1, dtype=torch.int32, device=gates.device),
    }


def gradient_of_gates(dgates: Tensor, gates: Tensor) -> Tensor:
    """dgates [T, B, 4H]."""
    return dgates
