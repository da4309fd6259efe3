"""The resident family: the whole sequence in one launch, W_hh on chip, no exchange between programs.

A program owns BLOCK_B sequences and all hidden units. It reads W_hh once and walks every step with h and c in
registers. For hidden sizes whose W_hh fits one block. Tiles are [units, batch], gates first, so that a batch tile of 8
or 16 fills a tensor-core instruction.
"""

from collections.abc import Iterator
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import KB
from ..recurrence import Recurrence
from .cell import activate, cell_backward, cell_forward
from .features import OPTIONS, SMALLEST_TILE
from .indexing import (
    cell_before,
    interleaved_gates,
    join_gate_rows,
    load_gates,
    position,
    sequences_from,
    split_gate_rows,
    store_gates,
)
from .initial_gradient import initial_hidden_gradient
from .planning import Device, Family, Launch, Plan, Problem, batch_tiles, power_of_two


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weight_hh_ptr,  # [4H, H]
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, H] float32
    h_ptr,  # [T*B, H]
    c_ptr,  # [T*B, H] float32, None without SAVE
    h_n_ptr,  # [B, H]
    c_n_ptr,  # [B, H] float32
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
):
    """All steps of a batch tile."""
    unit = tl.arange(0, BLOCK_H)  # [BH]
    batch, in_batch, length = sequences_from(tl.program_id(0) * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    in_units = (unit < H)[:, None]
    in_tile = in_units & in_batch[None, :]  # [BH, BB]
    state_at = batch[None, :].to(tl.int64) * H + unit[:, None]

    # W_hh once, [4 BH, BH].
    gate_row, gate_unit = interleaved_gates(0, H, BLOCK_H)
    weight_at = weight_hh_ptr + gate_row[:, None] * H + unit[None, :]
    weight = tl.load(weight_at, mask=(gate_unit < H)[:, None] & (unit < H)[None, :], other=0.0)

    h = tl.load(h0_ptr + state_at, mask=in_tile, other=0.0)
    c = tl.load(c0_ptr + state_at, mask=in_tile, other=0.0)
    for step in range(T):
        _, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
        valid_tile = in_units & valid[None, :]

        # Load, before the product, which hides its latency.
        gates_at = row[None, :] * (4 * H) + unit[:, None]
        x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at, valid_tile, H)

        # Product: all four gates of all units, [4 BH, BB].
        reset = valid & ~continues
        h = tl.where(reset[None, :], 0.0, h).to(h.dtype)
        c = tl.where(reset[None, :], 0.0, c)
        z_i, z_f, z_g, z_o = split_gate_rows(tl.dot(weight, h, input_precision=PRECISION), BLOCK_H, BLOCK_B)

        # Gates and cell.
        i, f, g, o = activate(x_i + z_i, x_f + z_f, x_g + z_g, x_o + z_o)
        c_next, h_next = cell_forward(i, f, g, o, c)
        h_next = h_next.to(h.dtype)

        # Store. The state of a sequence that has ended stays; its padding gets zeros.
        h = tl.where(valid_tile, h_next, h)
        c = tl.where(valid_tile, c_next, c)
        at = row[None, :] * H + unit[:, None]
        tl.store(h_ptr + at, tl.where(valid_tile, h_next, 0.0), mask=in_tile)
        if SAVE:
            store_gates(gates_ptr, gates_at, valid_tile, i, f, g, o, H)
            tl.store(c_ptr + at, tl.where(valid_tile, c_next, 0.0), mask=in_tile)
    tl.store(h_n_ptr + state_at, h, mask=in_tile)
    tl.store(c_n_ptr + state_at, c, mask=in_tile)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_backward_kernel(
    dh_ptr,  # [T*B, H] or None
    dh_n_ptr,  # [B, H] or None
    gates_ptr,  # [T*B, 4H] activated
    c_ptr,  # [T*B, H] float32
    c0_ptr,  # [B, H] float32
    weight_hh_ptr,  # [4H, H]
    dgates_ptr,  # [T*B, 4H] out
    dc_ptr,  # [B, H] float32, in: gradient of c_n; out: of c0
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
):
    """All steps of a batch tile, from the last to the first."""
    unit = tl.arange(0, BLOCK_H)  # [BH]
    batch, in_batch, length = sequences_from(tl.program_id(0) * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    in_units = (unit < H)[:, None]
    in_tile = in_units & in_batch[None, :]  # [BH, BB]
    state_at = batch[None, :].to(tl.int64) * H + unit[:, None]

    # W_hh^T once, [BH, 4 BH].
    gate_row, gate_unit = interleaved_gates(0, H, BLOCK_H)
    weight_at = weight_hh_ptr + gate_row[None, :] * H + unit[:, None]
    weight = tl.load(weight_at, mask=(gate_unit < H)[None, :] & in_units, other=0.0)

    # Gradients of the state after the step in hand: at a sequence's last step, those of the final state.
    dh = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    dc = tl.load(dc_ptr + state_at, mask=in_tile, other=0.0)
    if dh_n_ptr is not None:
        dh += tl.load(dh_n_ptr + state_at, mask=in_tile, other=0.0).to(tl.float32)
    for back in range(T):
        step = T - 1 - back
        time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
        valid_tile = in_units & valid[None, :]

        # Load.
        gates_at = row[None, :] * (4 * H) + unit[:, None]
        at = row[None, :] * H + unit[:, None]
        i, f, g, o = load_gates(gates_ptr, gates_at, valid_tile, H)
        c = tl.load(c_ptr + at, mask=valid_tile, other=0.0)
        c_prev = cell_before(c_ptr, c0_ptr, step, time, batch, B, unit, continues, H, REVERSE)
        dm = tl.where(valid_tile, dh, 0.0)
        if dh_ptr is not None:
            dm += tl.load(dh_ptr + at, mask=valid_tile, other=0.0).to(tl.float32)

        # Cell.
        dz_i, dz_f, dz_g, dz_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dm, tl.where(valid_tile, dc, 0.0))

        # Store, rounded as the product will read it.
        store_gates(dgates_ptr, gates_at, in_tile, dz_i, dz_f, dz_g, dz_o, H)

        # Product: the gradient of the state before the step, [BH, BB]; none flows past a reset.
        dz = join_gate_rows(dz_i, dz_f, dz_g, dz_o, BLOCK_H, BLOCK_B).to(weight.dtype)
        dh_prev = tl.dot(weight, dz, input_precision=PRECISION)
        dh = tl.where(valid[None, :], tl.where(continues[None, :], dh_prev, 0.0), dh)
        dc = tl.where(valid[None, :], tl.where(continues[None, :], dc_prev, 0.0), dc)
    tl.store(dc_ptr + state_at, dc, mask=in_tile)


def plans(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    """Where W_hh and the gates of a batch tile fit one block, the largest batch tile first."""
    if problem.projected or problem.batch == 0:
        return
    units = max(16, power_of_two(problem.hidden))
    weights = 4 * units * units * problem.size
    for rows in batch_tiles(problem.batch, SMALLEST_TILE):
        gates = 4 * units * rows * 4  # they change places through shared memory
        if backward:
            gates = gates * (20 if problem.size == 4 else 13 if device.architecture >= 100 else 8) // 4 + 10 * KB
        shared = weights + gates
        if shared <= device.shared and 4 * units * rows <= 8192:
            yield Plan(
                Family.RESIDENT, rows, units, units, 1, 1, ceil(problem.batch / rows), 8 if units >= 64 else 4, 1,
                shared, f"W_hh ({weights // KB} KB) fits one block, so that no exchange is needed",
            )  # fmt: skip


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward: one launch."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = gates.new_empty(steps, batch, r.hidden)
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    h_n, c_n = torch.empty_like(r.h0), torch.empty_like(r.c0)
    grid = (ceil(batch / plan.rows),)
    launch(
        lstm_resident_forward_kernel, grid,
        gates_ptr=gates, weight_hh_ptr=r.weight_hh, h0_ptr=r.h0, c0_ptr=r.c0, h_ptr=h, c_ptr=c if save else None,
        h_n_ptr=h_n, c_n_ptr=c_n, lengths_ptr=r.lengths, resets_ptr=r.resets, T=steps, B=batch,
        H=r.hidden, REVERSE=r.reverse, SAVE=save, PRECISION=r.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, num_warps=plan.num_warps, maxnreg=plan.registers, **OPTIONS,
    )  # fmt: skip
    return h, h_n, c_n, c


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
    """As launch.layer_backward: one launch."""
    r = recurrence
    steps, batch, _ = gates.shape
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
    grid = (ceil(batch / plan.rows),)
    launch(
        lstm_resident_backward_kernel, grid,
        dh_ptr=dh, dh_n_ptr=dh_n, gates_ptr=gates, c_ptr=c, c0_ptr=r.c0, weight_hh_ptr=r.weight_hh,
        dgates_ptr=dgates, dc_ptr=dc, lengths_ptr=r.lengths, resets_ptr=r.resets, T=steps, B=batch,
        H=r.hidden, REVERSE=r.reverse, PRECISION=r.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, num_warps=plan.num_warps, maxnreg=plan.registers, **OPTIONS,
    )  # fmt: skip
    return dgates, initial_hidden_gradient(dgates, dh_n, None, r), dc, gates.new_empty(0)
