"""The step family: one launch a time step, the recurrent product fused with the gates and the cell update.

Works for every H, B and GPU. A program owns BLOCK_B sequences and BLOCK_H hidden units, and reads the rows of
W_hh that belong to its units from L2 at every step. With a projection (h = W_hr m) a second, small kernel
follows in the same step.
"""

import triton
import triton.language as tl

from .cell import activate, cell_backward, cell_forward, zoneout, zoneout_backward
from .indexing import (
    interleaved_gates,
    load_gates,
    load_lengths,
    load_zone,
    row_before,
    row_of,
    split_gate_columns,
    starts_afresh,
    step_after,
    store_gates,
    time_of,
)


@triton.jit
def product(
    acc,  # [rows, columns] float32, added to
    a_ptr,  # [*, K]
    a_row,  # [rows] which rows of a
    a_mask,  # [rows] False: the row counts as zero
    scale_ptr,  # [*, K] factors of a, or None
    scale_row,  # [rows]
    w_ptr,
    w_column,  # [columns] offset of each column's first element
    w_mask,  # [columns]
    w_stride_k,  # from one k to the next within a column
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + (scale * a)[rows] @ w[:, columns], over K in tiles."""
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_row[:, None] * K + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        if scale_ptr is not None:
            scale_at = scale_ptr + scale_row[:, None] * K + k[None, :]
            a *= tl.load(scale_at, mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(
            w_ptr + w_column[None, :] + k[:, None] * w_stride_k, mask=(k < K)[:, None] & w_mask[None, :], other=0.0
        )
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["step", "T", "B"])
def lstm_step_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weight_hh_ptr,  # [4H, P]
    h_prev_ptr,  # h0 [B, P] at step 0, then h [T*B, P]
    c_prev_ptr,  # c0 [B, H] at step 0, then c; float32
    h_ptr,  # [T*B, P]; with a projection m [B, H] of this step
    c_ptr,  # float32 [T*B, H] if SAVE, else [B, H], updated in place
    h_n_ptr,  # [B, P], None with a projection
    c_n_ptr,  # [B, H] float32
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    mask_h_ptr,  # [B, P] or None
    zone_h_ptr,  # [T*B, P], one float32, or None; None with a projection
    zone_c_ptr,  # [T*B, H], one float32, or None
    step,
    T,
    B,
    H: tl.constexpr,
    P: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    unit_start = tl.program_id(1) * BLOCK_H
    unit = unit_start + tl.arange(0, BLOCK_H)  # [BH]
    in_batch = batch < B
    length = load_lengths(lengths_ptr, batch, in_batch, T)
    time = time_of(step, length, REVERSE)
    valid = in_batch & (step < length)
    carried = valid & ~starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE)
    row = row_of(time, batch, B)
    row_prev = row_before(step, time, batch, B, REVERSE)
    here = valid[:, None] & (unit < H)[None, :]  # [BB, BH]

    # Product: all four gates of the program's units, [BB, 4 BH].
    column, column_unit = interleaved_gates(unit_start, H, BLOCK_H)
    z = tl.zeros((BLOCK_B, 4 * BLOCK_H), tl.float32)
    z = product(
        z, h_prev_ptr, row_prev, carried, mask_h_ptr, batch.to(tl.int64), weight_hh_ptr, column * P, column_unit < H, 1,
        P, BLOCK_K, PRECISION,
    )  # fmt: skip
    z_i, z_f, z_g, z_o = split_gate_columns(z, BLOCK_B, BLOCK_H)

    # Gates.
    x_i, x_f, x_g, x_o = load_gates(gates_ptr, row[:, None] * (4 * H) + unit[None, :], here, H)
    i, f, g, o = activate(x_i + z_i, x_f + z_f, x_g + z_g, x_o + z_o)

    # Cell.
    c_row_prev = row_prev if SAVE else batch.to(tl.int64)
    c_row = row if SAVE else batch.to(tl.int64)
    c_prev_at = c_prev_ptr + c_row_prev[:, None] * H + unit[None, :]
    before = carried[:, None] & (unit < H)[None, :]
    c_prev = tl.load(c_prev_at, mask=before, other=0.0)
    c, m = cell_forward(i, f, g, o, c_prev)
    if zone_c_ptr is not None:
        c = zoneout(load_zone(zone_c_ptr, row[:, None] * H + unit[None, :], here), c_prev, c)
    if zone_h_ptr is not None:
        h_prev = tl.load(h_prev_ptr + row_prev[:, None] * H + unit[None, :], mask=before, other=0.0)
        m = zoneout(load_zone(zone_h_ptr, row[:, None] * H + unit[None, :], here), h_prev.to(tl.float32), m)

    # Store. Padding gets zeros; the last valid step gives the final states.
    m = tl.where(here, m, 0.0).to(h_ptr.dtype.element_ty)
    in_tile = in_batch[:, None] & (unit < H)[None, :]
    last = in_tile & (step == length - 1)[:, None]
    final_at = batch[:, None].to(tl.int64) * H + unit[None, :]
    h_row = batch.to(tl.int64) if PROJECT else row
    tl.store(h_ptr + h_row[:, None] * H + unit[None, :], m, mask=in_tile)
    c_at = c_ptr + c_row[:, None] * H + unit[None, :]
    if SAVE:
        tl.store(c_at, tl.where(here, c, 0.0), mask=in_tile)
    else:
        tl.store(c_at, c, mask=here)  # the state of a sequence that has ended stays
    tl.store(c_n_ptr + final_at, c, mask=last)
    if not PROJECT:
        tl.store(h_n_ptr + final_at, m, mask=last)
    if SAVE:
        store_gates(gates_ptr, row[:, None] * (4 * H) + unit[None, :], here, i, f, g, o, H)


@triton.jit(do_not_specialize=["step", "T", "B"])
def lstm_step_project_kernel(
    m_ptr,  # [B, H] of this step
    weight_hr_ptr,  # [P, H]
    h_prev_ptr,  # h0 [B, P] at step 0, then h [T*B, P]
    h_ptr,  # [T*B, P]
    h_n_ptr,  # [B, P]
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    zone_h_ptr,  # [T*B, P], one float32, or None
    step,
    T,
    B,
    H: tl.constexpr,
    P: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = W_hr m at one step, or with zoneout what it makes of that."""
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    in_batch = batch < B
    length = load_lengths(lengths_ptr, batch, in_batch, T)
    time = time_of(step, length, REVERSE)
    row = row_of(time, batch, B)
    valid = in_batch & (step < length)

    h = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    h = product(h, m_ptr, batch.to(tl.int64), valid, None, batch, weight_hr_ptr, p * H, p < P, 1, H, BLOCK_K, PRECISION)

    if zone_h_ptr is not None:
        here = valid[:, None] & (p < P)[None, :]
        carried = valid & ~starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE)
        row_prev = row_before(step, time, batch, B, REVERSE)
        h_prev_at = h_prev_ptr + row_prev[:, None] * P + p[None, :]
        h_prev = tl.load(h_prev_at, mask=carried[:, None] & here, other=0.0).to(tl.float32)
        h = zoneout(load_zone(zone_h_ptr, row[:, None] * P + p[None, :], here), h_prev, h)
    h = h.to(h_ptr.dtype.element_ty)
    in_tile = in_batch[:, None] & (p < P)[None, :]
    tl.store(h_ptr + row[:, None] * P + p[None, :], h, mask=in_tile)
    tl.store(h_n_ptr + batch[:, None].to(tl.int64) * P + p[None, :], h, mask=in_tile & (step == length - 1)[:, None])


@triton.jit
def hidden_gradient(
    dh_ptr,  # [T*B, P] or None
    dh_n_ptr,  # [B, P] or None
    dgates_ptr,  # [T*B, 4H]
    weight_hh_ptr,  # [4H, P]
    mask_h_ptr,  # [B, P] or None
    zone_h_ptr,  # [T*B, P], one float32, or None
    dh_held_ptr,  # [B, P] float32 or None, in: what zoneout hands back at the step after; out: what it does here
    step,
    length,  # [BB]
    batch,  # [BB]
    row,  # [BB]
    row_next,  # [BB] row of the step after this one
    flows_back,  # [BB] whether that step started from this one's state
    p,  # [BP]
    valid,  # [BB]
    carried,  # [BB] whether this step started from the state before it
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of what one step computed as h, [BB, BP]: from the output, the final state and the step after."""
    dh = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    dh = product(
        dh, dgates_ptr, row_next, flows_back, None, row_next, weight_hh_ptr, p, p < P, P, 4 * H, BLOCK_K, PRECISION
    )
    here = valid[:, None] & (p < P)[None, :]
    state_at = batch[:, None].to(tl.int64) * P + p[None, :]
    if mask_h_ptr is not None:
        dh *= tl.load(mask_h_ptr + state_at, mask=here, other=0.0).to(tl.float32)
    if dh_ptr is not None:
        dh += tl.load(dh_ptr + row[:, None] * P + p[None, :], mask=here, other=0.0).to(tl.float32)
    if dh_n_ptr is not None:
        last = here & (step == length - 1)[:, None]
        dh += tl.load(dh_n_ptr + state_at, mask=last, other=0.0).to(tl.float32)
    if zone_h_ptr is not None:
        dh += tl.load(dh_held_ptr + state_at, mask=here, other=0.0)
        held, dh = zoneout_backward(load_zone(zone_h_ptr, row[:, None] * P + p[None, :], here), dh)
        tl.store(dh_held_ptr + state_at, tl.where(carried[:, None], held, 0.0), mask=here)
    return dh


@triton.jit(do_not_specialize=["step", "T", "B"])
def lstm_step_project_backward_kernel(
    dh_ptr,  # [T*B, P] or None
    dh_n_ptr,  # [B, P] or None
    dgates_ptr,  # [T*B, 4H], the steps after this one are there
    weight_hh_ptr,  # [4H, P]
    dh_total_ptr,  # [T*B, P] out
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    mask_h_ptr,  # [B, P] or None
    zone_h_ptr,  # [T*B, P], one float32, or None
    dh_held_ptr,  # [B, P] float32 or None, see hidden_gradient
    step,
    T,
    B,
    H: tl.constexpr,
    P: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The whole gradient of W_hr m at one step, where a projection stands between h and the cell."""
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    in_batch = batch < B
    length = load_lengths(lengths_ptr, batch, in_batch, T)
    time = time_of(step, length, REVERSE)
    row = row_of(time, batch, B)
    valid = in_batch & (step < length)
    carried = valid & ~starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE)
    row_next, flows_back = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)

    dh = hidden_gradient(
        dh_ptr, dh_n_ptr, dgates_ptr, weight_hh_ptr, mask_h_ptr, zone_h_ptr, dh_held_ptr,
        step, length, batch, row, row_next, flows_back, p, valid, carried, H, P, BLOCK_B, BLOCK_P, BLOCK_K, PRECISION,
    )  # fmt: skip

    dh = tl.where(valid[:, None], dh, 0.0).to(dh_total_ptr.dtype.element_ty)
    tl.store(dh_total_ptr + row[:, None] * P + p[None, :], dh, mask=in_batch[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["step", "T", "B"])
def lstm_step_backward_kernel(
    dh_ptr,  # [T*B, P] or None; with a projection the whole gradient of W_hr m
    dh_n_ptr,  # [B, P] or None
    gates_ptr,  # [T*B, 4H] activated
    c_ptr,  # [T*B, H] float32
    c_prev_ptr,  # c0 [B, H] at step 0, then c; float32
    weight_ptr,  # W_hh [4H, P]; with a projection W_hr [P, H]
    dgates_ptr,  # [T*B, 4H] out; the steps after this one are there
    dc_ptr,  # [B, H] float32, in: gradient of c after this step; out: of c before it. Starts as dc_n, ends as dc0
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    mask_h_ptr,  # [B, P] or None
    zone_h_ptr,  # [T*B, P], one float32, or None
    zone_c_ptr,  # [T*B, H], one float32, or None
    dh_held_ptr,  # [B, P] float32 or None, see hidden_gradient; with a projection these of h have been seen to
    step,
    T,
    B,
    H: tl.constexpr,
    P: tl.constexpr,
    REVERSE: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
    in_batch = batch < B
    length = load_lengths(lengths_ptr, batch, in_batch, T)
    time = time_of(step, length, REVERSE)
    row = row_of(time, batch, B)
    row_prev = row_before(step, time, batch, B, REVERSE)
    valid = in_batch & (step < length)
    carried = valid & ~starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE)
    row_next, flows_back = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)
    in_units = (unit < H)[None, :]
    here = valid[:, None] & in_units  # [BB, BH]

    # Product: the gradient of m, through the step after and, if there is one, the projection.
    if PROJECT:
        dm = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        dm = product(dm, dh_ptr, row, valid, None, row, weight_ptr, unit, unit < H, H, P, BLOCK_K, PRECISION)
    else:
        dm = hidden_gradient(
            dh_ptr, dh_n_ptr, dgates_ptr, weight_ptr, mask_h_ptr, zone_h_ptr, dh_held_ptr, step, length, batch, row,
            row_next, flows_back, unit, valid, carried, H, P, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
        )  # fmt: skip

    # Cell.
    i, f, g, o = load_gates(gates_ptr, row[:, None] * (4 * H) + unit[None, :], here, H)
    c = tl.load(c_ptr + row[:, None] * H + unit[None, :], mask=here, other=0.0)
    c_prev = tl.load(c_prev_ptr + row_prev[:, None] * H + unit[None, :], mask=carried[:, None] & in_units, other=0.0)
    state_at = batch[:, None].to(tl.int64) * H + unit[None, :]
    dc = tl.load(dc_ptr + state_at, mask=here, other=0.0)
    if zone_c_ptr is not None:
        c, _ = cell_forward(i, f, g, o, c_prev)  # as it was before zoneout
        held, dc = zoneout_backward(load_zone(zone_c_ptr, row[:, None] * H + unit[None, :], here), dc)
    dz_i, dz_f, dz_g, dz_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dm, dc)
    if zone_c_ptr is not None:
        dc_prev += held

    # Store. In padding every factor was loaded as zero, so its gradients are zero.
    gates_at = row[:, None] * (4 * H) + unit[None, :]
    store_gates(dgates_ptr, gates_at, in_batch[:, None] & in_units, dz_i, dz_f, dz_g, dz_o, H)
    tl.store(dc_ptr + state_at, tl.where(carried[:, None], dc_prev, 0.0), mask=here)
