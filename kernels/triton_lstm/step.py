"""The step family: one launch a time step, the recurrent product fused with the gates and the cell update.

Works for every H, B and GPU. A program owns BLOCK_B sequences and BLOCK_H hidden units, and reads the rows of
W_hh that belong to its units from L2 at every step. With a projection (h = W_hr m) a second, small kernel
follows in the same step; m is the output of the cell, see cell.py. Tiles are [batch, units].
"""

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recurrence import Recurrence
from .cell import activate, cell_backward, cell_forward, zoneout, zoneout_backward
from .features import MOST_ROWS, OPTIONS
from .indexing import (
    interleaved_gates,
    is_reset,
    load_gates,
    load_zoneout,
    position,
    row_before,
    row_of,
    sequences_from,
    split_gate_columns,
    step_after,
    store_gates,
    time_of,
)
from .initial_gradient import initial_hidden_gradient
from .planning import Family, Launch, Plan, Problem

LARGEST_GRID_Y = 65_535  # of any GPU (CUDA C++ Programming Guide); x, where the batch is, has 2^31 - 1


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
    w_at = w_ptr + w_column[None, :] + tl.arange(0, BLOCK_K)[:, None] * w_stride_k
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_row[:, None] * K + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        if scale_ptr is not None:
            scale_at = scale_ptr + scale_row[:, None] * K + k[None, :]
            a *= tl.load(scale_at, mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        w_start = tl.cast(k_start, tl.int64) * w_stride_k  # K w_stride_k may be more than int32 holds
        w = tl.load(w_at + w_start, mask=(k < K)[:, None] & w_mask[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["step", "T", "B"])
def lstm_step_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weight_hh_ptr,  # [4H, P]
    h_prev_ptr,  # h0 [B, P] at step 0, then h [T*B, P]
    c_prev_ptr,  # c0 [B, H] at step 0, then c; float32
    h_ptr,  # [T*B, P] out; with a projection m [B, H] of this step
    c_ptr,  # float32 [T*B, H] if SAVE, else [B, H], updated in place
    h_n_ptr,  # [B, P] out where a sequence has a step; None with a projection
    c_n_ptr,  # [B, H] float32 out where a sequence has a step
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    dropout_h_ptr,  # [B, P] or None
    zoneout_h_ptr,  # [T*B, P], one float32, or None; None with a projection
    zoneout_c_ptr,  # [T*B, H], one float32, or None
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
    """One step: the recurrent product, the gates and the cell; h as well unless a projection follows."""
    batch, in_batch, length = sequences_from(tl.program_id(0) * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    unit_start = tl.program_id(1) * BLOCK_H
    unit = unit_start + tl.arange(0, BLOCK_H)  # [BH]
    time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
    row_prev = row_before(step, time, batch, B, REVERSE)
    in_units = (unit < H)[None, :]
    valid_tile = valid[:, None] & in_units  # [BB, BH]

    # Product: all four gates of the program's units, [BB, 4 BH].
    column, column_unit = interleaved_gates(unit_start, H, BLOCK_H)
    z = tl.zeros((BLOCK_B, 4 * BLOCK_H), tl.float32)
    z = product(
        z, h_prev_ptr, row_prev, continues, dropout_h_ptr, batch.to(tl.int64),
        weight_hh_ptr, column.to(tl.int64) * P, column_unit < H, 1, P, BLOCK_K, PRECISION,
    )  # fmt: skip
    z_i, z_f, z_g, z_o = split_gate_columns(z, BLOCK_B, BLOCK_H)

    # Gates.
    gates_at = row[:, None] * (4 * H) + unit[None, :]
    x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at, valid_tile, H)
    i, f, g, o = activate(x_i + z_i, x_f + z_f, x_g + z_g, x_o + z_o)

    # Cell. Zoneout's masks lie as h and c do.
    at = row[:, None] * H + unit[None, :]
    c_row_prev = row_prev if SAVE else batch.to(tl.int64)
    c_row = row if SAVE else batch.to(tl.int64)
    c_prev_at = c_prev_ptr + c_row_prev[:, None] * H + unit[None, :]
    continues_tile = continues[:, None] & in_units
    c_prev = tl.load(c_prev_at, mask=continues_tile, other=0.0)
    c, m = cell_forward(i, f, g, o, c_prev)
    if zoneout_c_ptr is not None:
        c = zoneout(load_zoneout(zoneout_c_ptr, at, valid_tile), c_prev, c)
    if zoneout_h_ptr is not None:
        h_prev = tl.load(h_prev_ptr + row_prev[:, None] * H + unit[None, :], mask=continues_tile, other=0.0)
        m = zoneout(load_zoneout(zoneout_h_ptr, at, valid_tile), h_prev.to(tl.float32), m)

    # Store. Padding gets zeros; the last valid step gives the final states.
    m = tl.where(valid_tile, m, 0.0).to(h_ptr.dtype.element_ty)
    in_tile = in_batch[:, None] & in_units
    last = in_tile & (step == length - 1)[:, None]
    final_at = batch[:, None].to(tl.int64) * H + unit[None, :]
    h_row = batch.to(tl.int64) if PROJECT else row
    tl.store(h_ptr + h_row[:, None] * H + unit[None, :], m, mask=in_tile)
    c_at = c_ptr + c_row[:, None] * H + unit[None, :]
    if SAVE:
        tl.store(c_at, tl.where(valid_tile, c, 0.0), mask=in_tile)
    else:
        tl.store(c_at, c, mask=valid_tile)  # the state of a sequence that has ended stays
    tl.store(c_n_ptr + final_at, c, mask=last)
    if not PROJECT:
        tl.store(h_n_ptr + final_at, m, mask=last)
    if SAVE:
        store_gates(gates_ptr, gates_at, valid_tile, i, f, g, o, H)


@triton.jit(do_not_specialize=["step", "T", "B"])
def lstm_step_project_kernel(
    m_ptr,  # [B, H] of this step
    weight_hr_ptr,  # [P, H]
    h_prev_ptr,  # h0 [B, P] at step 0, then h [T*B, P]
    h_ptr,  # [T*B, P]
    h_n_ptr,  # [B, P]
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    zoneout_h_ptr,  # [T*B, P], one float32, or None
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
    batch, in_batch, length = sequences_from(tl.program_id(0) * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    time = time_of(step, length, REVERSE)
    row = row_of(time, batch, B)
    valid = in_batch & (step < length)

    h = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    h = product(
        h, m_ptr, batch.to(tl.int64), valid, None, batch,
        weight_hr_ptr, p.to(tl.int64) * H, p < P, 1, H, BLOCK_K, PRECISION,
    )  # fmt: skip

    at = row[:, None] * P + p[None, :]
    in_tile = in_batch[:, None] & (p < P)[None, :]  # [BB, BP]
    if zoneout_h_ptr is not None:
        continues = valid & ~is_reset(resets_ptr, time, length, batch, B, in_batch, REVERSE)
        row_prev = row_before(step, time, batch, B, REVERSE)
        h_prev_at = h_prev_ptr + row_prev[:, None] * P + p[None, :]
        h_prev = tl.load(h_prev_at, mask=continues[:, None] & in_tile, other=0.0).to(tl.float32)
        h = zoneout(load_zoneout(zoneout_h_ptr, at, valid[:, None] & in_tile), h_prev, h)
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + at, h, mask=in_tile)
    tl.store(h_n_ptr + batch[:, None].to(tl.int64) * P + p[None, :], h, mask=in_tile & (step == length - 1)[:, None])


@triton.jit
def hidden_gradient(
    dh_ptr,  # [T*B, P] or None
    dh_n_ptr,  # [B, P] or None
    dgates_ptr,  # [T*B, 4H]
    weight_hh_ptr,  # [4H, P]
    dropout_h_ptr,  # [B, P] or None
    zoneout_h_ptr,  # [T*B, P], one float32, or None
    dh_from_zoneout_ptr,  # [B, P] float32 or None: what the step after hands back through zoneout; out: this one's
    step,
    length,  # [BB]
    batch,  # [BB]
    row,  # [BB]
    row_next,  # [BB] row of the step after this one
    next_continues,  # [BB] whether that step starts from this one's state
    p,  # [BP]
    valid,  # [BB]
    continues,  # [BB] whether this step starts from the state before it
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
        dh, dgates_ptr, row_next, next_continues, None, row_next, weight_hh_ptr, p, p < P, P, 4 * H, BLOCK_K, PRECISION
    )
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
        share = load_zoneout(zoneout_h_ptr, row[:, None] * P + p[None, :], valid_tile)
        dh_prev, dh = zoneout_backward(share, dh)
        tl.store(dh_from_zoneout_ptr + state_at, tl.where(continues[:, None], dh_prev, 0.0), mask=valid_tile)
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
    dropout_h_ptr,  # [B, P] or None
    zoneout_h_ptr,  # [T*B, P], one float32, or None
    dh_from_zoneout_ptr,  # [B, P] float32 or None, see hidden_gradient
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
    batch, in_batch, length = sequences_from(tl.program_id(0) * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    _, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
    row_next, next_continues = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)

    dh = hidden_gradient(
        dh_ptr, dh_n_ptr, dgates_ptr, weight_hh_ptr, dropout_h_ptr, zoneout_h_ptr, dh_from_zoneout_ptr,
        step, length, batch, row, row_next, next_continues, p, valid, continues,
        H, P, BLOCK_B, BLOCK_P, BLOCK_K, PRECISION,
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
    dropout_h_ptr,  # [B, P] or None; with a projection lstm_step_project_backward_kernel takes those of h
    zoneout_h_ptr,  # [T*B, P], one float32, or None
    zoneout_c_ptr,  # [T*B, H], one float32, or None
    dh_from_zoneout_ptr,  # [B, P] float32 or None, see hidden_gradient
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
    """One step backward: the product with the dgates of the step after, and the cell."""
    batch, in_batch, length = sequences_from(tl.program_id(0) * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
    time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
    row_prev = row_before(step, time, batch, B, REVERSE)
    row_next, next_continues = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)
    in_units = (unit < H)[None, :]
    valid_tile = valid[:, None] & in_units  # [BB, BH]

    # Product: the gradient of m, through the step after and, if there is one, the projection.
    if PROJECT:
        dm = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        dm = product(dm, dh_ptr, row, valid, None, row, weight_ptr, unit, unit < H, H, P, BLOCK_K, PRECISION)
    else:
        dm = hidden_gradient(
            dh_ptr, dh_n_ptr, dgates_ptr, weight_ptr, dropout_h_ptr, zoneout_h_ptr, dh_from_zoneout_ptr,
            step, length, batch, row, row_next, next_continues, unit, valid, continues,
            H, P, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
        )  # fmt: skip

    # Cell.
    at = row[:, None] * H + unit[None, :]
    gates_at = row[:, None] * (4 * H) + unit[None, :]
    i, f, g, o = load_gates(gates_ptr, gates_at, valid_tile, H)
    c = tl.load(c_ptr + at, mask=valid_tile, other=0.0)
    c_prev = tl.load(c_prev_ptr + row_prev[:, None] * H + unit[None, :], mask=continues[:, None] & in_units, other=0.0)
    state_at = batch[:, None].to(tl.int64) * H + unit[None, :]
    dc = tl.load(dc_ptr + state_at, mask=valid_tile, other=0.0)
    if zoneout_c_ptr is not None:
        c, _ = cell_forward(i, f, g, o, c_prev)  # as the step computed it; what was saved is after zoneout
        dc_from_zoneout, dc = zoneout_backward(load_zoneout(zoneout_c_ptr, at, valid_tile), dc)
    dz_i, dz_f, dz_g, dz_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dm, dc)
    if zoneout_c_ptr is not None:
        dc_prev += dc_from_zoneout

    # Store. In padding every factor was loaded as zero, so its gradients are zero.
    store_gates(dgates_ptr, gates_at, in_batch[:, None] & in_units, dz_i, dz_f, dz_g, dz_o, H)
    tl.store(dc_ptr + state_at, tl.where(continues[:, None], dc_prev, 0.0), mask=valid_tile)


def step_plan(problem: Problem, backward: bool) -> Plan:
    """One launch a step: works for every problem.

    The product of a step is small, so what counts is that many programs share it: the narrowest tiles that still
    fill tensor-core instructions.

    Raises:
        ValueError: more hidden units or projected features than a grid has programs for.
    """
    rows = 16 if problem.batch <= 16 else 32 if problem.batch <= 32 else 64
    columns = 32 if backward else 16  # a unit has four columns in the forward product
    most, stages = (32, 2) if problem.regularised else (MOST_ROWS, 3)  # masks take registers
    no_tensor_cores = problem.dtype is torch.float32 and problem.precision == "ieee"
    if no_tensor_cores:
        most, columns = most // 2, 16  # and so do products without them
    rows = min(rows, most)
    widest = max(problem.hidden, problem.projected)
    if widest > LARGEST_GRID_Y * columns:
        raise ValueError(f"expected at most {LARGEST_GRID_Y * columns} units or projected features, got {widest}")
    warps = 8 if no_tensor_cores and problem.regularised else 4
    k = 128 // problem.size  # 128 bytes of each row at a time
    stage = (rows + columns * (1 if backward else 4)) * k * problem.size
    if problem.regularised:
        why = "recurrent dropout and zoneout run step by step"
    elif problem.projected:
        why = "a projection runs step by step"
    else:
        why = "W_hh is read from L2 at every step"
    return Plan(
        Family.STEP, rows, columns, k, 1, ceil(problem.hidden / columns), ceil(problem.batch / rows), warps,
        stages, 2 * stage, why,
    )  # fmt: skip


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward: one launch a step, two with a projection."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = gates.new_empty(steps, batch, r.width)
    h_n, c_n = r.h0.clone(), r.c0.clone()  # what a sequence of length 0 ends with
    c = r.c0.new_empty(steps, batch, r.hidden) if save else r.c0.clone()  # of every step, or updated in place
    m = gates.new_empty(batch, r.hidden) if r.projected else h
    grid = (ceil(batch / plan.rows), ceil(r.hidden / plan.columns))
    project_grid = (ceil(batch / plan.rows), ceil(r.width / plan.columns))
    shared = _shared_arguments(plan, gates, r)
    arguments = shared | dict(
        gates_ptr=gates, weight_hh_ptr=r.weight_hh, h_ptr=m, c_ptr=c, h_n_ptr=None if r.projected else h_n, c_n_ptr=c_n,
        dropout_h_ptr=r.dropout_h, zoneout_h_ptr=None if r.projected else r.zoneout_h, zoneout_c_ptr=r.zoneout_c,
        SAVE=save, PROJECT=r.projected, BLOCK_H=plan.columns,
    )  # fmt: skip
    project_arguments = shared | dict(
        m_ptr=m, weight_hr_ptr=r.weight_hr, h_ptr=h, h_n_ptr=h_n, zoneout_h_ptr=r.zoneout_h, BLOCK_P=plan.columns
    )
    h_prev, c_prev = r.h0, r.c0 if save else c
    for s in range(steps):
        launch(lstm_step_forward_kernel, grid, h_prev_ptr=h_prev, c_prev_ptr=c_prev, step=s, **arguments)
        if r.projected:
            launch(lstm_step_project_kernel, project_grid, h_prev_ptr=h_prev, step=s, **project_arguments)
        h_prev, c_prev = h, c
    return h, h_n, c_n, c if save else c.new_empty(0)


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    recurrence: Recurrence,
    *,
    plan: Plan,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_backward: one launch a step, two with a projection."""
    r = recurrence
    steps, batch, _ = gates.shape
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; each step makes it that of the c before
    dh_from_zoneout = None if r.zoneout_h is None else torch.zeros_like(r.h0, dtype=torch.float32)
    dh_total = gates.new_empty((steps, batch, r.width) if r.projected else 0)
    grid = (ceil(batch / plan.rows), ceil(r.hidden / plan.columns))
    project_grid = (ceil(batch / plan.rows), ceil(r.width / plan.columns))
    shared = _shared_arguments(plan, gates, r)
    of_h = dict(  # for the kernel that takes the gradient of h
        dh_ptr=dh, dh_n_ptr=dh_n, dropout_h_ptr=r.dropout_h, zoneout_h_ptr=r.zoneout_h,
        dh_from_zoneout_ptr=dh_from_zoneout,
    )  # fmt: skip
    project_arguments = shared | of_h | dict(
        dgates_ptr=dgates, weight_hh_ptr=r.weight_hh, dh_total_ptr=dh_total, BLOCK_P=plan.columns
    )  # fmt: skip
    if r.projected:
        of_m = dict.fromkeys(of_h) | dict(dh_ptr=dh_total, weight_ptr=r.weight_hr)
    else:
        of_m = of_h | dict(weight_ptr=r.weight_hh)
    arguments = shared | of_m | dict(
        gates_ptr=gates, c_ptr=c, dgates_ptr=dgates, dc_ptr=dc, zoneout_c_ptr=r.zoneout_c,
        PROJECT=r.projected, BLOCK_H=plan.columns,
    )  # fmt: skip
    for s in reversed(range(steps)):
        if r.projected:
            launch(lstm_step_project_backward_kernel, project_grid, step=s, **project_arguments)
        launch(lstm_step_backward_kernel, grid, c_prev_ptr=c if s else r.c0, step=s, **arguments)
    return dgates, initial_hidden_gradient(dgates, dh_n, dh_from_zoneout, r), dc, dh_total


def _shared_arguments(plan: Plan, gates: Tensor, r: Recurrence) -> dict[str, Any]:
    """What every kernel of the family is given at every step."""
    steps, batch, _ = gates.shape
    return dict(
        lengths_ptr=r.lengths, resets_ptr=r.resets, T=steps, B=batch, H=r.hidden, P=r.width, REVERSE=r.reverse,
        PRECISION=r.precision, BLOCK_B=plan.rows, BLOCK_K=plan.k,
        num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers, **OPTIONS,
    )  # fmt: skip
