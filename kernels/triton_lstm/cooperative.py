"""The cooperative family: the whole sequence in one launch, W_hh spread over many programs, h exchanged at each step.

The programs of one batch tile are a group; each owns BLOCK_H hidden units, keeps its part of W_hh on chip, and needs
at every step what all of its group computed at the step before. Groups never wait for each other. All programs of a
launch must be resident at once.

forward    A program holds the four gates' rows of its units, [4 BH, H]. It publishes h of its units.

backward   dh of a unit needs dgates of all units, four times as wide as h, so the product is split by gate: the group
           falls into teams of four programs, which own 4 BH units together. Member g of a team holds W_hh^T of gate
           g for all of the team's units, [4 BH, H], reads only the dgates of gate g, and publishes its partial sums
           in a second, small exchange; each member then adds up the four for its own BH units, in the same order
           every time.

Tiles are [units, batch], gates first, so that a batch tile of 8 or 16 fills a tensor-core instruction. K, the inner
dimension of a product, comes in tiles of BLOCK_K (held as a tuple, so that the weights stay on chip), and each tile is
split K_SPLIT ways over the warps.
"""

import triton
import triton.language as tl

from .cell import activate, cell_backward, cell_forward
from .exchange import announce, collect, publish, wait
from .indexing import (
    cell_before,
    interleaved_gates,
    load_gates,
    load_lengths,
    row_in_history,
    row_of,
    split_gate_rows,
    starts_afresh,
    step_after,
    store_gates,
    time_of,
)


@triton.jit
def k_indices(BLOCK_K: tl.constexpr, K_SPLIT: tl.constexpr):
    """Indices of the first tile of K, [K_SPLIT, BLOCK_K / K_SPLIT]."""
    EACH: tl.constexpr = BLOCK_K // K_SPLIT
    return tl.arange(0, K_SPLIT)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def load_weights(
    at,  # [M] pointers at k = 0 of each row
    row_mask,  # [M]
    k,  # [K_SPLIT, BLOCK_K / K_SPLIT]
    stride_k,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tuple of TILES tiles [K_SPLIT, M, BLOCK_K / K_SPLIT], which stays on chip."""
    weights = ()
    for tile in tl.static_range(TILES):
        k_of_tile = k[:, None, :] + tile * BLOCK_K
        mask = row_mask[None, :, None] & (k_of_tile < K)
        weights = weights + (tl.load(at[None, :, None] + k_of_tile * stride_k, mask=mask, other=0.0),)  # noqa: RUF005
    return weights


@triton.jit
def product(
    weights,  # TILES tiles [K_SPLIT, M, k]
    x,  # TILES tiles [K_SPLIT, k, N]
    M: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    K_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W x, [M, N] float32."""
    acc = tl.zeros((K_SPLIT, M, N), tl.float32)
    for tile in tl.static_range(TILES):
        acc = tl.dot(weights[tile], x[tile], acc, input_precision=PRECISION)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["T", "B", "batch_start"])
def lstm_cooperative_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weight_hh_ptr,  # [4H, H]
    c0_ptr,  # [B, H] float32
    h_ptr,  # [T*B + B, H]: h of every step, out and the exchange, filled beforehand if FLAGGED; then h0
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
    members = tl.num_programs(0)
    group = tl.program_id(1)
    patience = PATIENCE
    batch = batch_start + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    unit_start = tl.program_id(0) * BLOCK_H
    unit = unit_start + tl.arange(0, BLOCK_H)  # [BH]
    in_batch = batch < B
    in_units = (unit < H)[:, None]
    in_tile = in_units & in_batch[None, :]  # [BH, BB]
    length = load_lengths(lengths_ptr, batch, in_batch, T)
    state_at = batch[None, :].to(tl.int64) * H + unit[:, None]

    # The rows of W_hh that belong to the program's units, once.
    TILES: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    k = k_indices(BLOCK_K, K_SPLIT)
    gate_row, gate_unit = interleaved_gates(unit_start, H, BLOCK_H)
    weights = load_weights(weight_hh_ptr + gate_row * H, gate_unit < H, k, 1, H, TILES, BLOCK_K)

    c = tl.load(c0_ptr + state_at, mask=in_tile, other=0.0)
    time = time_of(0, length, REVERSE)
    here = in_units & (in_batch & (length > 0))[None, :]
    gates_at = row_of(time, batch, B)[None, :] * (4 * H) + unit[:, None]
    x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at, here, H)
    for step in range(T):
        valid = in_batch & (step < length)
        carried = valid & ~starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE)
        row = row_of(time, batch, B)
        row_prev = row_in_history(step - 1, time_of(step - 1, length, REVERSE), batch, T, B)
        here = in_units & valid[None, :]

        # Load what the group published at the step before, and multiply: the gates of the program's units, [4 BH, BB].
        patience = wait(arrivals_ptr, group, members * step, patience, error_ptr, step, FLAGGED)
        h_at = row_prev[None, None, :] * H + k[:, :, None]
        h_prev, patience = collect(
            h_ptr, h_at, k[:, :, None], carried[None, None, :], patience, error_ptr, step, H, TILES, BLOCK_K, FLAGGED
        )
        z = product(weights, h_prev, 4 * BLOCK_H, BLOCK_B, TILES, K_SPLIT, PRECISION)
        z_i, z_f, z_g, z_o = split_gate_rows(z, BLOCK_H, BLOCK_B)

        # Gates and cell.
        i, f, g, o = activate(x_i + z_i, x_f + z_f, x_g + z_g, x_o + z_o)
        c_next, h = cell_forward(i, f, g, o, tl.where(carried[None, :], c, 0.0))

        # Publish first: the others wait for it. Padding gets zeros.
        at = row[None, :] * H + unit[:, None]
        publish(h_ptr + at, tl.where(here, h, 0.0), in_tile)
        announce(arrivals_ptr, group, FLAGGED)

        # Load the next step's inputs; they arrive while this program waits.
        time_next = time_of(step + 1, length, REVERSE)
        here_next = in_units & (in_batch & (step + 1 < length))[None, :]
        gates_at_next = row_of(time_next, batch, B)[None, :] * (4 * H) + unit[:, None]
        x_i, x_f, x_g, x_o = load_gates(gates_ptr, gates_at_next, here_next, H)

        # Store the rest.
        last = here & (step == length - 1)[None, :]
        tl.store(h_n_ptr + state_at, h.to(h_n_ptr.dtype.element_ty), mask=last)
        tl.store(c_n_ptr + state_at, c_next, mask=last)
        if SAVE:
            store_gates(gates_ptr, gates_at, here, i, f, g, o, H)
            tl.store(c_ptr + at, tl.where(here, c_next, 0.0), mask=in_tile)
        c = c_next
        time = time_next
        gates_at = gates_at_next


@triton.jit(do_not_specialize=["T", "B", "batch_start", "first", "turns"])
def lstm_cooperative_backward_kernel(
    dh_ptr,  # [T*B, H] or None
    dh_n_ptr,  # [B, H] or None
    gates_ptr,  # [T*B, 4H] activated
    c_ptr,  # [T*B, H] float32
    c0_ptr,  # [B, H] float32
    weight_hh_ptr,  # [4H, H]
    dgates_ptr,  # [T*B, 4H] out, and the exchange; filled beforehand if FLAGGED
    partials_ptr,  # [turns*B, 4, H] float32, the second exchange; filled beforehand if FLAGGED
    dc_ptr,  # [B, H] float32, in: gradient of c after the first of these steps taken; out: of c before the last
    lengths_ptr,  # [B] or None
    resets_ptr,  # [T*B] or None
    arrivals_ptr,  # [batch tiles, 2] int32 zeros, None if FLAGGED
    error_ptr,  # [1] int32
    T,
    B,
    batch_start,  # of this launch's first batch tile
    first,  # how many steps were taken by earlier launches, from the end
    turns,  # how many steps this launch takes
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
    members = tl.num_programs(0)
    dgates_arrived, partials_arrived = 2 * tl.program_id(1), 2 * tl.program_id(1) + 1
    patience = PATIENCE
    batch = batch_start + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    team, gate = tl.program_id(0) // 4, tl.program_id(0) % 4
    team_unit = team * (4 * BLOCK_H) + tl.arange(0, 4 * BLOCK_H)  # [4 BH]
    unit = team * (4 * BLOCK_H) + gate * BLOCK_H + tl.arange(0, BLOCK_H)  # [BH]
    part = tl.arange(0, 4)
    in_batch = batch < B
    in_units = (unit < H)[:, None]
    in_tile = in_units & in_batch[None, :]  # [BH, BB]
    in_team = (team_unit < H)[:, None] & in_batch[None, :]  # [4 BH, BB]
    length = load_lengths(lengths_ptr, batch, in_batch, T)
    state_at = batch[None, :].to(tl.int64) * H + unit[:, None]

    # W_hh^T of the program's gate for its team's units, once.
    TILES: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    k = k_indices(BLOCK_K, K_SPLIT)
    weight_at = weight_hh_ptr + gate * (H * H) + team_unit
    weights = load_weights(weight_at, team_unit < H, k, H, H, TILES, BLOCK_K)

    dc = tl.load(dc_ptr + state_at, mask=in_tile, other=0.0)
    for turn in range(turns):
        step = T - 1 - first - turn
        time = time_of(step, length, REVERSE)
        valid = in_batch & (step < length)
        carried = valid & ~starts_afresh(resets_ptr, time, length, batch, B, in_batch, REVERSE)
        row = row_of(time, batch, B)
        row_next, flows_back = step_after(resets_ptr, step, length, batch, B, in_batch, REVERSE)
        here = in_units & valid[None, :]

        # Load, before waiting: it arrives meanwhile.
        gates_at = row[None, :] * (4 * H) + unit[:, None]
        at = row[None, :] * H + unit[:, None]
        i, f, g, o = load_gates(gates_ptr, gates_at, here, H)
        c = tl.load(c_ptr + at, mask=here, other=0.0)
        c_prev = cell_before(c_ptr, c0_ptr, step, time, batch, B, unit, carried, H, REVERSE)
        dm = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if dh_ptr is not None:
            dm += tl.load(dh_ptr + at, mask=here, other=0.0).to(tl.float32)
        if dh_n_ptr is not None:
            last = here & (step == length - 1)[None, :]
            dm += tl.load(dh_n_ptr + state_at, mask=last, other=0.0).to(tl.float32)

        # Product: this gate's part of dh for the team's units, [4 BH, BB].
        patience = wait(arrivals_ptr, dgates_arrived, members * turn, patience, error_ptr, step, FLAGGED)
        dgates_at = row_next[None, None, :] * (4 * H) + gate * H + k[:, :, None]
        dz, patience = collect(
            dgates_ptr, dgates_at, k[:, :, None], flows_back[None, None, :], patience, error_ptr, step,
            H, TILES, BLOCK_K, FLAGGED,
        )  # fmt: skip
        partial = product(weights, dz, 4 * BLOCK_H, BLOCK_B, TILES, K_SPLIT, PRECISION)
        partial_row = row_of(tl.zeros_like(batch) + turn, batch, B)
        partial_at = partial_row[None, :] * (4 * H) + gate * H + team_unit[:, None]
        publish(partials_ptr + partial_at, partial, in_team)
        announce(arrivals_ptr, partials_arrived, FLAGGED)

        # Add up the team's four parts for the program's own units.
        patience = wait(arrivals_ptr, partials_arrived, members * (turn + 1), patience, error_ptr, step, FLAGGED)
        part_at = (partial_row[None, :] * (4 * H) + unit[:, None])[None, :, :] + part[:, None, None] * H
        parts, patience = collect(
            partials_ptr, part_at, unit[None, :, None], valid[None, None, :], patience, error_ptr, step,
            H, 1, BLOCK_H, FLAGGED,
        )  # fmt: skip
        dm += tl.sum(parts[0], axis=0)

        # Cell.
        dz_i, dz_f, dz_g, dz_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dm, tl.where(here, dc, 0.0))

        # Publish. In padding every factor was loaded as zero, so its gradients are zero.
        publish(dgates_ptr + gates_at, dz_i, in_tile)
        publish(dgates_ptr + gates_at + H, dz_f, in_tile)
        publish(dgates_ptr + gates_at + 2 * H, dz_g, in_tile)
        publish(dgates_ptr + gates_at + 3 * H, dz_o, in_tile)
        announce(arrivals_ptr, dgates_arrived, FLAGGED)
        dc = tl.where(valid[None, :], tl.where(carried[None, :], dc_prev, 0.0), dc)
    tl.store(dc_ptr + state_at, dc, mask=in_tile)
