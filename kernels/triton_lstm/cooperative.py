"""The cooperative family: the whole sequence in one launch, W_hh spread over many programs, h exchanged at each step.

The programs of one batch tile are a group; each owns BLOCK_H hidden units, keeps its part of W_hh on chip, and needs
at every step what all of its group computed at the step before. Groups never wait for each other. All programs of a
launch must be resident at once.

forward    A program holds the four gates' rows of its units, [4 BH, H]. It publishes h of its units.

backward   dh of a unit needs dgates of all units, four times as wide as h, so the product is split by gate: the group
           falls into quartets, four programs that own 4 BH units together. Program g of a quartet holds W_hh^T of gate
           g for all units of the quartet, [4 BH, H], reads only the dgates of gate g, and publishes its partial sums
           in a second, small exchange; each then adds up the four for its own BH units, in the same order every time.

Tiles are [units, batch], gates first, so that a batch tile of 8 or 16 fills a tensor-core instruction. K, the inner
dimension of a product, comes in tiles of BLOCK_K (held as a tuple, so that the weights stay on chip), and each tile is
split K_SPLIT ways over the warps.

What is exchanged are words of 32 bits (exchange.py), PER units in each: a row of H units takes W = ceil(H / PER) words,
of which the last may be half empty.
"""

import itertools
from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import KB
from ..recurrence import Recurrence
from .cell import activate, cell_backward, cell_forward
from .exchange import announce, collect, pack, publish, unpack, wait
from .features import OPTIONS, SMALLEST_TILE
from .giving_up import error_word
from .indexing import (
    cell_before,
    interleaved_gates,
    load_gates,
    position,
    row_in_h_then_h0,
    row_of,
    sequences_from,
    split_gate_rows,
    step_after,
    store_gates,
    time_of,
)
from .initial_gradient import initial_hidden_gradient
from .planning import Device, Family, Launch, Plan, Problem, batch_tiles, power_of_two

PATIENCE = 1 << 22  # polls in one wait before a program gives up: seconds, where a step takes microseconds

FILL = -1  # as int32: the word that stands for data which is not there yet, and that `pack` never makes

PARTIALS_WORKSPACE = 256 << 20  # bytes for the partial sums that programs exchange backward


@triton.jit
def k_indices(BLOCK_K: tl.constexpr, K_SPLIT: tl.constexpr):
    """Indices of the first tile of K, [K_SPLIT, BLOCK_K / K_SPLIT]."""
    EACH: tl.constexpr = BLOCK_K // K_SPLIT
    return tl.arange(0, K_SPLIT)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def load_weights(
    at,  # [ROWS] pointers at k = 0 of each row
    row_mask,  # [ROWS]
    k,  # [K_SPLIT, BLOCK_K / K_SPLIT]
    stride_k,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tuple of TILES tiles [K_SPLIT, ROWS, BLOCK_K / K_SPLIT], which stays on chip."""
    weights = ()
    for tile in tl.static_range(TILES):
        k_of_tile = k[:, None, :] + tile * BLOCK_K
        mask = row_mask[None, :, None] & (k_of_tile < K)
        weights = weights + (tl.load(at[None, :, None] + k_of_tile * stride_k, mask=mask, other=0.0),)  # noqa: RUF005
    return weights


@triton.jit
def product(
    weights,  # TILES tiles [K_SPLIT, ROWS, BLOCK_K / K_SPLIT]
    x,  # TILES tiles [K_SPLIT, COLUMNS, words of BLOCK_K / K_SPLIT]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    K_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W x, [ROWS, COLUMNS] float32."""
    acc = tl.zeros((K_SPLIT, ROWS, COLUMNS), tl.float32)
    for tile in tl.static_range(TILES):
        x_tile = tl.permute(unpack(x[tile], weights[tile].dtype), (0, 2, 1))  # [K_SPLIT, BLOCK_K / K_SPLIT, COLUMNS]
        acc = tl.dot(weights[tile], x_tile, acc, input_precision=PRECISION)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["T", "B", "batch_start"])
def lstm_cooperative_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weight_hh_ptr,  # [4H, H]
    c0_ptr,  # [B, H] float32
    words_ptr,  # [T*B + B, W] int32: h of every step, out and the exchange, filled beforehand if FLAGGED; then h0
    c_ptr,  # [T*B, H] float32 out, None without SAVE
    h_n_ptr,  # [B, H] out where a sequence has a step
    c_n_ptr,  # [B, H] float32 out where a sequence has a step
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    arrivals_ptr,  # [batch tiles] int32 zeros, None if FLAGGED
    error_ptr,  # [1] int32
    T,
    B,
    batch_start,  # of this launch's first batch tile
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    FLAGGED: tl.constexpr,
    PATIENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SPLIT: tl.constexpr,
):
    """All steps of the units of a program; grid (programs of a group, groups)."""
    members = tl.num_programs(0)
    group = tl.program_id(1)
    patience = PATIENCE
    batch, in_batch, length = sequences_from(batch_start + group * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    DTYPE: tl.constexpr = weight_hh_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    unit_start = tl.program_id(0) * BLOCK_H
    unit = unit_start + tl.arange(0, BLOCK_H)  # [BH]
    in_units = (unit < H)[:, None]
    in_tile = in_units & in_batch[None, :]  # [BH, BB]
    state_at = batch[None, :].to(tl.int64) * H + unit[:, None]
    word = unit_start // PER + tl.arange(0, BLOCK_H // PER)  # [BH / PER]
    in_words = (word < W)[:, None] & in_batch[None, :]  # [BH / PER, BB]

    # The rows of W_hh that belong to the program's units, once.
    TILES: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    k = k_indices(BLOCK_K, K_SPLIT)
    gate_row, gate_unit = interleaved_gates(unit_start, H, BLOCK_H)
    weights = load_weights(weight_hh_ptr + gate_row * H, gate_unit < H, k, 1, H, TILES, BLOCK_K)
    k_word = k_indices(BLOCK_K // PER, K_SPLIT)[:, None, :]

    c = tl.load(c0_ptr + state_at, mask=in_tile, other=0.0)
    first_row = row_of(time_of(0, length, REVERSE), batch, B)
    first_tile = in_units & (in_batch & (length > 0))[None, :]
    gates_at = first_row[None, :] * (4 * H) + unit[:, None]
    x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at, first_tile, H)
    for step in range(T):
        _, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
        row_prev = row_in_h_then_h0(step - 1, time_of(step - 1, length, REVERSE), batch, T, B)
        valid_tile = in_units & valid[None, :]

        # Load what the group published at the step before, and multiply: the gates of the program's units, [4 BH, BB].
        patience = wait(arrivals_ptr, group, members * step, patience, error_ptr, step, FLAGGED)
        h_at = words_ptr + row_prev[None, :, None] * W + k_word
        left = tl.where(continues[None, :, None], W - k_word, 0)
        h_prev = collect(h_at, left, error_ptr, step, TILES, BLOCK_K // PER, PATIENCE, FLAGGED)
        z = product(weights, h_prev, 4 * BLOCK_H, BLOCK_B, TILES, K_SPLIT, PRECISION)
        z_i, z_f, z_g, z_o = split_gate_rows(z, BLOCK_H, BLOCK_B)

        # Gates and cell.
        i, f, g, o = activate(x_i + z_i, x_f + z_f, x_g + z_g, x_o + z_o)
        c_next, h = cell_forward(i, f, g, o, tl.where(continues[None, :], c, 0.0))

        # Publish first: the others wait for it. Padding gets zeros.
        words = pack(tl.where(valid_tile, h, 0.0), DTYPE)
        publish(words_ptr + row[None, :] * W + word[:, None], words, in_words)
        announce(arrivals_ptr, group, FLAGGED)

        # Load the next step's inputs; they arrive while this program waits.
        row_next = row_of(time_of(step + 1, length, REVERSE), batch, B)
        next_tile = in_units & (in_batch & (step + 1 < length))[None, :]
        gates_at_next = row_next[None, :] * (4 * H) + unit[:, None]
        x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at_next, next_tile, H)

        # Store the rest.
        last = valid_tile & (step == length - 1)[None, :]
        tl.store(h_n_ptr + state_at, h.to(h_n_ptr.dtype.element_ty), mask=last)
        tl.store(c_n_ptr + state_at, c_next, mask=last)
        if SAVE:
            store_gates(gates_ptr, gates_at, valid_tile, i, f, g, o, H)
            at = row[None, :] * H + unit[:, None]
            tl.store(c_ptr + at, tl.where(valid_tile, c_next, 0.0), mask=in_tile)
        c = c_next
        gates_at = gates_at_next


@triton.jit(do_not_specialize=["T", "B", "batch_start", "steps_before", "steps_now"])
def lstm_cooperative_backward_kernel(
    dh_ptr,  # [T*B, H] or None
    dh_n_ptr,  # [B, H] or None
    gates_ptr,  # [T*B, 4H] activated
    c_ptr,  # [T*B, H] float32
    c0_ptr,  # [B, H] float32
    weight_hh_ptr,  # [4H, H]
    words_ptr,  # [T*B, 4, W] int32: dgates, out and the exchange; filled beforehand if FLAGGED
    partials_ptr,  # [steps_now*B, 4, H] int32: float32 words, the second exchange; filled beforehand if FLAGGED
    dc_ptr,  # [B, H] float32, in: gradient of c after the first of these steps taken; out: of c before the last
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    arrivals_ptr,  # [batch tiles, 2] int32 zeros, None if FLAGGED
    error_ptr,  # [1] int32
    T,
    B,
    batch_start,  # of this launch's first batch tile
    steps_before,  # how many steps earlier launches took, from the end
    steps_now,  # how many this launch takes
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    FLAGGED: tl.constexpr,
    PATIENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SPLIT: tl.constexpr,
):
    """Some steps, from the last to the first, of the units of a program; grid (programs of a group, groups)."""
    members = tl.num_programs(0)
    group = tl.program_id(1)
    dgates_arrived, partials_arrived = 2 * group, 2 * group + 1  # counters
    patience = PATIENCE
    batch, in_batch, length = sequences_from(batch_start + group * BLOCK_B, lengths_ptr, T, B, BLOCK_B)
    quartet, gate = tl.program_id(0) // 4, tl.program_id(0) % 4
    quartet_unit = quartet * (4 * BLOCK_H) + tl.arange(0, 4 * BLOCK_H)  # [4 BH]
    unit = quartet * (4 * BLOCK_H) + gate * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
    part = tl.arange(0, 4)[:, None, None]
    DTYPE: tl.constexpr = weight_hh_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    in_units = (unit < H)[:, None]
    in_tile = in_units & in_batch[None, :]  # [BH, BB]
    in_quartet = (quartet_unit < H)[:, None] & in_batch[None, :]  # [4 BH, BB]
    word = (quartet * 4 + gate) * (BLOCK_H // PER) + tl.arange(0, BLOCK_H // PER)  # [BH / PER]
    in_words = (word < W)[:, None] & in_batch[None, :]  # [BH / PER, BB]
    state_at = batch[None, :].to(tl.int64) * H + unit[:, None]

    # W_hh^T of the program's gate for its quartet's units, once.
    TILES: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    k = k_indices(BLOCK_K, K_SPLIT)
    weight_at = weight_hh_ptr + gate * (H * H) + quartet_unit
    weights = load_weights(weight_at, quartet_unit < H, k, H, H, TILES, BLOCK_K)
    k_word = k_indices(BLOCK_K // PER, K_SPLIT)[:, None, :]

    dc = tl.load(dc_ptr + state_at, mask=in_tile, other=0.0)
    for done in range(steps_now):
        step = T - 1 - steps_before - done
        time, row, valid, continues = position(step, length, resets_ptr, batch, B, in_batch, REVERSE)
        row_next, next_continues = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)
        valid_tile = in_units & valid[None, :]

        # Load, before waiting: it arrives meanwhile.
        gates_at = row[None, :] * (4 * H) + unit[:, None]
        at = row[None, :] * H + unit[:, None]
        i, f, g, o = load_gates(gates_ptr, gates_at, valid_tile, H)
        c = tl.load(c_ptr + at, mask=valid_tile, other=0.0)
        c_prev = cell_before(c_ptr, c0_ptr, step, time, batch, B, unit, continues, H, REVERSE)
        dm = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if dh_ptr is not None:
            dm += tl.load(dh_ptr + at, mask=valid_tile, other=0.0).to(tl.float32)
        if dh_n_ptr is not None:
            last = valid_tile & (step == length - 1)[None, :]
            dm += tl.load(dh_n_ptr + state_at, mask=last, other=0.0).to(tl.float32)

        # Product: this gate's part of dh for the quartet's units, [4 BH, BB].
        patience = wait(arrivals_ptr, dgates_arrived, members * done, patience, error_ptr, step, FLAGGED)
        dgates_at = words_ptr + row_next[None, :, None] * (4 * W) + gate * W + k_word
        left = tl.where(next_continues[None, :, None], W - k_word, 0)
        dz = collect(dgates_at, left, error_ptr, step, TILES, BLOCK_K // PER, PATIENCE, FLAGGED)
        partial = product(weights, dz, 4 * BLOCK_H, BLOCK_B, TILES, K_SPLIT, PRECISION)
        partial_row = row_of(tl.zeros_like(batch) + done, batch, B)
        partial_at = partial_row[None, :] * (4 * H) + gate * H + quartet_unit[:, None]
        publish(partials_ptr + partial_at, pack(partial, tl.float32), in_quartet)
        announce(arrivals_ptr, partials_arrived, FLAGGED)

        # Add up the quartet's four parts for the program's own units.
        patience = wait(arrivals_ptr, partials_arrived, members * (done + 1), patience, error_ptr, step, FLAGGED)
        parts_at = partials_ptr + partial_row[None, :, None] * (4 * H) + part * H + unit[None, None, :]
        left = tl.where(valid[None, :, None], H - unit[None, None, :], 0)
        parts = collect(parts_at, left, error_ptr, step, 1, BLOCK_H, PATIENCE, FLAGGED)  # [4, BB, BH]
        dm += tl.trans(tl.sum(unpack(parts[0], tl.float32), axis=0))

        # Cell.
        dz_i, dz_f, dz_g, dz_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dm, tl.where(valid_tile, dc, 0.0))

        # Publish. In padding every factor was loaded as zero, so its gradients are zero.
        word_at = words_ptr + row[None, :] * (4 * W) + word[:, None]
        publish(word_at, pack(dz_i, DTYPE), in_words)
        publish(word_at + W, pack(dz_f, DTYPE), in_words)
        publish(word_at + 2 * W, pack(dz_g, DTYPE), in_words)
        publish(word_at + 3 * W, pack(dz_o, DTYPE), in_words)
        announce(arrivals_ptr, dgates_arrived, FLAGGED)
        dc = tl.where(valid[None, :], tl.where(continues[None, :], dc_prev, 0.0), dc)
    tl.store(dc_ptr + state_at, dc, mask=in_tile)


def plans(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    """Where W_hh fits all multiprocessors together: in one launch if possible, then on as many of them as possible."""
    if problem.projected or problem.batch == 0:
        return
    k = min(256, max(64, power_of_two(problem.hidden)))
    tiles = ceil(problem.hidden / k)
    candidates = []
    for columns, rows in itertools.product((8, 16, 32), batch_tiles(problem.batch, SMALLEST_TILE)):
        # Forward a program holds four gates of its units; backward one gate for the units of its quartet.
        programs = 4 * ceil(problem.hidden / (4 * columns)) if backward else ceil(problem.hidden / columns)
        weights = 4 * columns * tiles * k * problem.size
        exchanged = k * rows * problem.size
        summed = 4 * 4 * columns * rows * 4  # the parts of K that different warps took
        shared = weights + max(exchanged, summed) + KB
        groups = min(ceil(problem.batch / rows), device.multiprocessors // (programs * problem.side_by_side))
        if groups and shared <= device.shared:
            what = "dgates" if backward else "h"
            why = f"{programs} programs hold W_hh, {weights // KB} KB each, and exchange {what}"
            candidates.append(
                Plan(
                    Family.COOPERATIVE, rows, columns, k, 4, programs, groups, 8, 1, shared, why,
                    side_by_side=problem.side_by_side,
                )
            )  # fmt: skip
    candidates.sort(key=lambda plan: (plan.launches(problem.batch), -plan.programs * plan.groups, plan.rows))
    yield from candidates


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward: one launch for as many batch tiles as can be resident at once."""
    r = recurrence
    steps, batch, _ = gates.shape
    h_then_h0 = _rows_of_words(gates, steps + 1, batch)
    h_n, c_n = r.h0.clone(), r.c0.clone()  # what a sequence of length 0 ends with
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    if plan.flagged:
        h_then_h0.view(torch.int32).fill_(FILL)
    h_then_h0[-1].zero_()
    h_then_h0[-1, ..., : r.hidden] = torch.where(r.h0.isnan(), float("nan"), r.h0)  # any NaN but the fill's
    for batch_start, groups in _batches(batch, plan):
        launch(
            lstm_cooperative_forward_kernel, (plan.programs, groups),
            gates_ptr=gates, weight_hh_ptr=r.weight_hh, c0_ptr=r.c0, words_ptr=h_then_h0.view(torch.int32),
            c_ptr=c if save else None, h_n_ptr=h_n, c_n_ptr=c_n, arrivals_ptr=_counters(gates, plan, groups),
            error_ptr=error_word(gates.device, 0), batch_start=batch_start, SAVE=save,
            **_shared_arguments(plan, gates, r),
        )  # fmt: skip
    return h_then_h0[:-1, ..., : r.hidden].contiguous(), h_n, c_n, c


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
    """As launch.layer_backward: as forward, and in more launches where the partial sums would take too much memory."""
    r = recurrence
    steps, batch, _ = gates.shape
    dgates = _rows_of_words(gates, steps, batch, 4)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernels make it that of c0
    most = min(steps, max(1, PARTIALS_WORKSPACE // (16 * dc.numel())))  # steps of one launch
    partials = gates.new_empty(most, batch, 4 * r.hidden, dtype=torch.int32)
    if plan.flagged:
        dgates.view(torch.int32).fill_(FILL)
    for steps_before in range(0, steps, most):
        if plan.flagged:
            partials.fill_(FILL)
        for batch_start, groups in _batches(batch, plan):
            launch(
                lstm_cooperative_backward_kernel, (plan.programs, groups),
                dh_ptr=dh, dh_n_ptr=dh_n, gates_ptr=gates, c_ptr=c, c0_ptr=r.c0, weight_hh_ptr=r.weight_hh,
                words_ptr=dgates.view(torch.int32), partials_ptr=partials, dc_ptr=dc,
                arrivals_ptr=_counters(gates, plan, 2 * groups), error_ptr=error_word(gates.device, 1),
                batch_start=batch_start, steps_before=steps_before, steps_now=min(most, steps - steps_before),
                **_shared_arguments(plan, gates, r),
            )  # fmt: skip
    dgates = dgates[..., : r.hidden].reshape(gates.shape)
    return dgates, initial_hidden_gradient(dgates, dh_n, None, r), dc, gates.new_empty(0)


def _shared_arguments(plan: Plan, gates: Tensor, r: Recurrence) -> dict[str, Any]:
    """What both kernels are given."""
    steps, batch, _ = gates.shape
    return dict(
        lengths_ptr=r.lengths, resets_ptr=r.resets, T=steps, B=batch, H=r.hidden, REVERSE=r.reverse,
        FLAGGED=plan.flagged, PATIENCE=PATIENCE, PRECISION=r.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, BLOCK_K=plan.k, K_SPLIT=plan.k_split,
        num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers, **OPTIONS,
        launch_cooperative_grid=True,
    )  # fmt: skip


def _batches(batch: int, plan: Plan) -> list[tuple[int, int]]:
    """(first sequence, batch tiles) of each launch: no more programs at once than the device keeps resident."""
    step = plan.rows * plan.groups
    return [(start, min(plan.groups, ceil((batch - start) / plan.rows))) for start in range(0, batch, step)]


def _rows_of_words(gates: Tensor, *rows: int) -> Tensor:
    """[*rows, H or one more] of the dtype of `gates` [T, B, 4H]: so many that a row is a whole number of words."""
    hidden = gates.shape[-1] // 4
    return gates.new_empty(*rows, hidden + hidden * gates.itemsize % 4 // gates.itemsize)


def _counters(like: Tensor, plan: Plan, count: int) -> Tensor | None:
    return None if plan.flagged else torch.zeros(count, dtype=torch.int32, device=like.device)
