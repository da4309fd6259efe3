"""The resident family: the whole sequence in one launch, W_hh on chip, no exchange between programs.

A program owns 8 sequences and all hidden units, for hidden sizes whose W_hh fits the registers of one block. The units
are split over the warps: each holds the rows of its units as operands of products (fragments.py), reads h of all units
from shared memory, and computes the cells that its products belong to, so that a step has one barrier. Kernels are
written thread by thread; a thread has CELLS cells: number n is the unit 8 (n // 2) + column of its warp's, and the
sequence 2 quarter + n % 2.
"""

from collections.abc import Iterator
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import as_words, transposed_gates
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
from .fragments import load_weights, product, sequence_in, share, take, threads
from .indexing import (
    cell_before,
    load_gates,
    load_peepholes,
    load_zoneout,
    position,
    reset_to,
    row_before,
    store_gates,
)
from .norm import EPS, load_for_units, normalise, normalise_backward
from .planning import Device, Family, Plan, power_of_two


@triton.jit
def cells(UNITS: tl.constexpr, WARPS: tl.constexpr, CELLS: tl.constexpr):
    """A thread's cells: (units, places of their sequences in the batch tile), tuples of CELLS [THREADS]."""
    _, warp, column, quarter = threads(WARPS)
    units, sequences = (), ()
    for n in tl.static_range(CELLS):
        units = units + (warp * (UNITS // WARPS) + n // 2 * 8 + column,)
        sequences = sequences + (2 * quarter + n % 2,)
    return units, sequences


@triton.jit
def two_sequences(lengths_ptr, T, B, WARPS: tl.constexpr):
    """Those of a thread's even and odd cells: (numbers, whether there are such, lengths), pairs of [THREADS]."""
    _, _, _, quarter = threads(WARPS)
    even, in_even, even_length = sequence_in(tl.program_id(0), 2 * quarter, lengths_ptr, T, B)
    odd, in_odd, odd_length = sequence_in(tl.program_id(0), 2 * quarter + 1, lengths_ptr, T, B)
    return (even, odd), (in_even, in_odd), (even_length, odd_length)


@triton.jit
def two_positions(step, length, resets_ptr, batch, B, in_batch, REVERSE: tl.constexpr):
    """`position` of both: (times, rows, valid, continues), pairs of [THREADS]."""
    time, row, valid, continues = position(step, length[0], resets_ptr, batch[0], B, in_batch[0], REVERSE)
    time_1, row_1, valid_1, continues_1 = position(step, length[1], resets_ptr, batch[1], B, in_batch[1], REVERSE)
    return (time, time_1), (row, row_1), (valid, valid_1), (continues, continues_1)


@triton.jit
def load_factors(dropout_h_ptr, batch, unit, in_batch, H: tl.constexpr):
    """Those of h of a cell, [THREADS] float32."""
    at = batch.to(tl.int64) * H + unit
    return tl.load(dropout_h_ptr + at, mask=in_batch & (unit < H), other=0.0).to(tl.float32)


@triton.jit
def sum_over_units(values, PER: tl.constexpr, CELLS: tl.constexpr, WARPS: tl.constexpr):
    """Of values [THREADS], PER a cell: their sums for a thread's two sequences over all units, a pair of [THREADS]."""
    even = tl.zeros((32 * WARPS,), tl.float32)
    odd = tl.zeros((32 * WARPS,), tl.float32)
    for n in tl.static_range(PER * CELLS):
        if n // PER % 2 == 0:
            even += values[n]
        else:
            odd += values[n]
    both = tl.reshape(tl.join(even, odd), (8 * WARPS, 4, 2))  # [warps and columns, quarters, sequences]
    total = tl.broadcast_to(tl.sum(both, axis=0)[None, :, :], (8 * WARPS, 4, 2))
    return tl.split(tl.reshape(total, (32 * WARPS, 2)))


@triton.jit
def forward_of_cell(n: tl.constexpr, x, z, c_prev, peepholes, PEEPHOLES: tl.constexpr):
    """`cell_forward` of a thread's cell number n."""
    return cell_forward(
        x[4 * n] + z[4 * n], x[4 * n + 1] + z[4 * n + 1], x[4 * n + 2] + z[4 * n + 2], x[4 * n + 3] + z[4 * n + 3],
        c_prev[n], peepholes[3 * n], peepholes[3 * n + 1], peepholes[3 * n + 2], PEEPHOLES,
    )  # fmt: skip


@triton.jit
def two_scales(scale_ptr, row, valid):
    """Those of a thread's two sequences, from [T*B] float32: a pair of [THREADS]."""
    return tl.load(scale_ptr + row[0], mask=valid[0], other=0.0), tl.load(scale_ptr + row[1], mask=valid[1], other=0.0)


@triton.jit
def moments(v, unit, H: tl.constexpr, PER: tl.constexpr, CELLS: tl.constexpr, WARPS: tl.constexpr):
    """(means, scales) of the same, pairs of [THREADS]. Past the last unit v is zero."""
    even, odd = sum_over_units(v, PER, CELLS, WARPS)
    mean = (even / (PER * H), odd / (PER * H))
    squares = ()
    for n in tl.static_range(PER * CELLS):
        distance = tl.where(unit[n // PER] < H, v[n] - mean[n // PER % 2], 0.0)
        squares = squares + (distance * distance,)
    even, odd = sum_over_units(squares, PER, CELLS, WARPS)
    return mean, (tl.rsqrt(even / (PER * H) + EPS), tl.rsqrt(odd / (PER * H) + EPS))


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_forward_kernel(
    gates_ptr,  # [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, if SAVE: activated gates
    weights_ptr,  # [4H, W] int32: W_hh
    peephole_ptr, gain_hh_ptr, gain_c_ptr, bias_c_ptr, h0_ptr, c0_ptr,
    h_ptr,  # [T*B, H]
    c_ptr,
    h_n_ptr,  # [B, H]
    c_n_ptr,  # [B, H] float32
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr, reset_h_ptr, reset_c_ptr, T, B,
    H: tl.constexpr, PEEPHOLES: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
    UNITS: tl.constexpr,  # at least H
    WARPS: tl.constexpr,
):  # fmt: skip
    """All steps of a batch tile."""
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    CHUNKS: tl.constexpr = UNITS // PER // 16
    CELLS: tl.constexpr = UNITS // WARPS // 4
    TILES: tl.constexpr = CELLS  # of 16 rows: of 8 units the gates i and f, then g and o
    thread, warp, column, quarter = threads(WARPS)
    unit, sequence = cells(UNITS, WARPS, CELLS)
    batch, in_batch, length = two_sequences(lengths_ptr, T, B, WARPS)

    # The four gates' rows of the warp's units, once: a pair of tiles is 8 units, i and f of the first, g and o.
    rows = ()
    for n in tl.static_range(2 * TILES):
        rows = rows + (tl.where(unit[n // 4 * 2] < H, n % 4 * H + unit[n // 4 * 2], -1),)
    weights = load_weights(weights_ptr, rows, quarter * 4, W, 16, CHUNKS, TILES)

    h, c, peepholes, gains_hh, gains_c, biases_c = (), (), (), (), (), ()
    for n in tl.static_range(CELLS):
        peepholes = peepholes + load_peepholes(peephole_ptr, unit[n], H)
        if NORM_HH:
            gains_hh = gains_hh + load_gates(gain_hh_ptr, unit[n], unit[n] < H, H)
        if NORM_C:
            gains_c = gains_c + (load_for_units(gain_c_ptr, unit[n], 0.0, H),)
            biases_c = biases_c + (load_for_units(bias_c_ptr, unit[n], 0.0, H),)
        state_at = batch[n % 2].to(tl.int64) * H + unit[n]
        in_tile = in_batch[n % 2] & (unit[n] < H)
        h = h + (tl.load(h0_ptr + state_at, mask=in_tile, other=0.0),)
        c = c + (tl.load(c0_ptr + state_at, mask=in_tile, other=0.0),)
    for step in range(T):
        time, row, valid, continues = two_positions(step, length, resets_ptr, batch, B, in_batch, REVERSE)

        # Load, before the product, which hides its latency.
        x, h_prev, h_operand, c_prev = (), (), (), ()
        for n in tl.static_range(CELLS):
            x = x + load_gates(gates_ptr, row[n % 2] * (4 * H) + unit[n], valid[n % 2] & (unit[n] < H), H)
            reset = valid[n % 2] & ~continues[n % 2]
            h_prev = h_prev + (tl.where(reset, 0.0, h[n]).to(DTYPE),)
            if dropout_h_ptr is not None:
                factors = load_factors(dropout_h_ptr, batch[n % 2], unit[n], in_batch[n % 2], H)
                h_operand = h_operand + ((factors * h_prev[n].to(tl.float32)).to(DTYPE),)
            else:
                h_operand = h_operand + (h_prev[n],)
            before = tl.where(reset, 0.0, c[n])
            c_prev = c_prev + (reset_to(before, reset_c_ptr, row[n % 2] * H + unit[n], reset & (unit[n] < H)),)

        # Product: the four gates of the thread's cells.
        shared = share(h_operand, sequence, unit, step % 2, DTYPE, CELLS, CHUNKS, WARPS)
        products = product(weights, take(shared, 0, CHUNKS, CHUNKS, DTYPE, WARPS), DTYPE, CHUNKS, TILES, WARPS)
        z = ()
        for n in tl.static_range(4 * CELLS):  # number n is gate n % 4 of cell n // 4
            z = z + (products[n // 8 * 8 + n % 4 * 2 + n // 4 % 2],)
        if NORM_HH:
            mean, scale = moments(z, unit, H, 4, CELLS, WARPS)
            products, z = z, ()
            for n in tl.static_range(4 * CELLS):
                z = z + (normalise(products[n], mean[n // 4 % 2], scale[n // 4 % 2], gains_hh[n], 0.0),)

        if NORM_C:
            cell_of, c_cell, h_cell = (), (), ()
            for n in tl.static_range(CELLS):
                cell_of = cell_of + forward_of_cell(n, x, z, c_prev, peepholes, PEEPHOLES)
                c_cell = c_cell + (cell_of[6 * n + 4],)
            mean, scale = moments(c_cell, unit, H, 1, CELLS, WARPS)
            for n in tl.static_range(CELLS):
                normed = normalise(c_cell[n], mean[n % 2], scale[n % 2], gains_c[n], biases_c[n])
                h_cell = h_cell + (output(cell_of[6 * n + 3], normed),)

        h, c = (), ()
        for n in tl.static_range(CELLS):
            # Gates and cell.
            if NORM_C:
                i, f, g, o = cell_of[6 * n], cell_of[6 * n + 1], cell_of[6 * n + 2], cell_of[6 * n + 3]
                c_next, h_next = c_cell[n], h_cell[n]
            else:
                i, f, g, o, c_next, h_next = forward_of_cell(n, x, z, c_prev, peepholes, PEEPHOLES)
            at = row[n % 2] * H + unit[n]
            valid_cell = valid[n % 2] & (unit[n] < H)
            if zoneout_c_ptr is not None:
                c_next = zoneout(load_zoneout(zoneout_c_ptr, at, valid_cell), c_prev[n], c_next)
            if zoneout_h_ptr is not None:
                h_before = reset_to(h_prev[n].to(tl.float32), reset_h_ptr, at, valid_cell & ~continues[n % 2])
                h_next = zoneout(load_zoneout(zoneout_h_ptr, at, valid_cell), h_before, h_next)

            # Store. The state of a sequence that has ended stays; its padding gets zeros.
            h_next = tl.where(valid[n % 2], h_next, 0.0).to(DTYPE)
            in_tile = in_batch[n % 2] & (unit[n] < H)
            tl.store(h_ptr + at, h_next, mask=in_tile)
            if SAVE:
                gates_at = row[n % 2] * (4 * H) + unit[n]
                store_gates(gates_ptr, gates_at, valid_cell, i, f, g, o, H)
                tl.store(c_ptr + at, tl.where(valid[n % 2], c_next, 0.0), mask=in_tile)
            h = h + (tl.where(valid[n % 2], h_next, h_prev[n]),)
            c = c + (tl.where(valid[n % 2], c_next, c_prev[n]),)
    for n in tl.static_range(CELLS):
        state_at = batch[n % 2].to(tl.int64) * H + unit[n]
        in_tile = in_batch[n % 2] & (unit[n] < H)
        tl.store(h_n_ptr + state_at, h[n], mask=in_tile)
        tl.store(c_n_ptr + state_at, c[n], mask=in_tile)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_backward_kernel(
    dh_ptr, dh_n_ptr,
    gates_ptr,  # [T*B, 4H] activated
    c_ptr, c0_ptr,
    weights_ptr,  # [4, H, W] int32: W_hh^T of each gate
    peephole_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr, gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr,
    dh_total_ptr,
    dgates_ptr,  # [T*B, 4H] out
    dc_ptr,  # [B, H] float32, in: gradient of c_n; out: of c0
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr,
    dh_from_zoneout_ptr,  # [B, H] float32 zeros, out: the gradient of h0 through zoneout; or None
    dreset_h_ptr, reset_c_ptr, dreset_c_ptr, T, B, H: tl.constexpr, PEEPHOLES: tl.constexpr, REVERSE: tl.constexpr,
    UNITS: tl.constexpr,  # at least H
    WARPS: tl.constexpr,
):  # fmt: skip
    """All steps of a batch tile, from the last to the first."""
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    CHUNKS: tl.constexpr = UNITS // PER // 16  # of one gate
    CELLS: tl.constexpr = UNITS // WARPS // 4
    TILES: tl.constexpr = CELLS // 4  # of 16 units
    thread, warp, column, quarter = threads(WARPS)
    unit, sequence = cells(UNITS, WARPS, CELLS)
    batch, in_batch, length = two_sequences(lengths_ptr, T, B, WARPS)

    # The rows of W_hh^T of the warp's units, gate by gate, once.
    rows = ()
    for n in tl.static_range(2 * TILES):
        rows = rows + (tl.where(unit[2 * n] < H, unit[2 * n], -1),)
    weights_i = load_weights(weights_ptr, rows, quarter * 4, W, 16, CHUNKS, TILES)
    weights_f = load_weights(weights_ptr + H * W, rows, quarter * 4, W, 16, CHUNKS, TILES)
    weights_g = load_weights(weights_ptr + 2 * H * W, rows, quarter * 4, W, 16, CHUNKS, TILES)
    weights_o = load_weights(weights_ptr + 3 * H * W, rows, quarter * 4, W, 16, CHUNKS, TILES)
    elements_of_dz = ()  # four gates of UNITS units are a row of K
    for n in tl.static_range(4 * CELLS):
        elements_of_dz = elements_of_dz + (n // CELLS * UNITS + unit[n % CELLS],)

    # Gradients of the state after the step in hand: at a sequence's last step, those of the final state.
    dh, dc, peepholes = (), (), ()
    for n in tl.static_range(CELLS):
        peepholes = peepholes + load_peepholes(peephole_ptr, unit[n], H)
        state_at = batch[n % 2].to(tl.int64) * H + unit[n]
        in_tile = in_batch[n % 2] & (unit[n] < H)
        of_h = tl.zeros((32 * WARPS,), tl.float32)
        if dh_n_ptr is not None:
            of_h += tl.load(dh_n_ptr + state_at, mask=in_tile, other=0.0).to(tl.float32)
        dh = dh + (of_h,)
        dc = dc + (tl.load(dc_ptr + state_at, mask=in_tile, other=0.0),)
    for back in range(T):
        step = T - 1 - back
        time, row, valid, continues = two_positions(step, length, resets_ptr, batch, B, in_batch, REVERSE)

        # Load, of all cells before the first store.
        saved, dh_before, dc_before = (), (), ()
        for n in tl.static_range(CELLS):
            at = row[n % 2] * H + unit[n]
            valid_cell = valid[n % 2] & (unit[n] < H)
            from_prev = continues[n % 2] & (unit[n] < H)
            dm = tl.where(valid_cell, dh[n], 0.0)
            if dh_ptr is not None:
                dm += tl.load(dh_ptr + at, mask=valid_cell, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + at, mask=valid_cell, other=0.0)
            prev_at = row_before(step, time[n % 2], batch[n % 2], B, REVERSE) * H + unit[n]
            c_prev = cell_before(c_ptr, c0_ptr, step, prev_at, from_prev)
            c_prev = reset_to(c_prev, reset_c_ptr, at, valid_cell & ~from_prev)
            i, f, g, o = load_gates(gates_ptr, row[n % 2] * (4 * H) + unit[n], valid_cell, H)
            of_c = tl.where(valid_cell, dc[n], 0.0)
            if zoneout_h_ptr is not None:
                to_before, dm = zoneout_backward(load_zoneout(zoneout_h_ptr, at, valid_cell), dm)
                dh_before = dh_before + (to_before,)
            if zoneout_c_ptr is not None:
                c = next_cell(i, f, g, c_prev)  # as the step computed it; what was saved is after zoneout
                to_before, of_c = zoneout_backward(load_zoneout(zoneout_c_ptr, at, valid_cell), of_c)
                dc_before = dc_before + (to_before,)
            saved = saved + (i, f, g, o, c, c_prev, dm, of_c)

        # Cell. In padding every factor was loaded as zero, so its gradients are zero.
        if NORM_C:
            outer, d_units, d_units_along, through_c = (), (), (), ()
            for n in tl.static_range(CELLS):
                at = row[n % 2] * H + unit[n]
                unit_c = tl.load(unit_c_ptr + at, mask=valid[n % 2] & (unit[n] < H), other=0.0)
                gain, bias = load_for_units(gain_c_ptr, unit[n], 0.0, H), load_for_units(bias_c_ptr, unit[n], 0.0, H)
                dm = saved[8 * n + 6]
                tl.store(dh_total_ptr + at, dm.to(DTYPE), mask=in_batch[n % 2] & (unit[n] < H))
                d_o, d_unit = normed_output_backward(saved[8 * n + 3], unit_c, dm, gain, bias)
                outer = outer + (d_o, unit_c)
                d_units = d_units + (d_unit,)
                d_units_along = d_units_along + (d_unit * unit_c,)
            of_d = sum_over_units(d_units, 1, CELLS, WARPS)
            of_d_unit = sum_over_units(d_units_along, 1, CELLS, WARPS)
            scale = two_scales(scale_c_ptr, row, valid)
            for n in tl.static_range(CELLS):
                through_c = through_c + (
                    normalise_backward(
                        d_units[n], outer[2 * n + 1], scale[n % 2], of_d[n % 2] / H, of_d_unit[n % 2] / H
                    ),
                )
        dz_i, dz_f, dz_g, dz_o, dc_prev = (), (), (), (), ()
        for n in tl.static_range(CELLS):
            if NORM_C:
                d_i, d_f, d_g, d_o, d_c = gates_backward(
                    saved[8 * n], saved[8 * n + 1], saved[8 * n + 2], saved[8 * n + 5],
                    outer[2 * n], saved[8 * n + 7] + through_c[n],
                    peepholes[3 * n], peepholes[3 * n + 1], peepholes[3 * n + 2], PEEPHOLES,
                )  # fmt: skip
            else:
                d_i, d_f, d_g, d_o, d_c = cell_backward(
                    saved[8 * n], saved[8 * n + 1], saved[8 * n + 2], saved[8 * n + 3], saved[8 * n + 4],
                    saved[8 * n + 5], saved[8 * n + 6], saved[8 * n + 7],
                    peepholes[3 * n], peepholes[3 * n + 1], peepholes[3 * n + 2], PEEPHOLES,
                )  # fmt: skip
            dz_i = dz_i + (d_i.to(DTYPE),)
            dz_f = dz_f + (d_f.to(DTYPE),)
            dz_g = dz_g + (d_g.to(DTYPE),)
            dz_o = dz_o + (d_o.to(DTYPE),)
            if zoneout_c_ptr is not None:
                d_c += dc_before[n]
            dc_prev = dc_prev + (d_c,)

        # Through the layer norm, to the gradient of W_hh h.
        operand = dz_i + dz_f + dz_g + dz_o
        if NORM_HH:
            units_hh, d_units, d_units_along = (), (), ()
            for n in tl.static_range(CELLS):
                gates_at = row[n % 2] * (4 * H) + unit[n]
                of_gates = load_gates(unit_hh_ptr, gates_at, valid[n % 2] & (unit[n] < H), H)
                gain_i, gain_f, gain_g, gain_o = load_gates(gain_hh_ptr, unit[n], unit[n] < H, H)
                d_unit = (gain_i * dz_i[n], gain_f * dz_f[n], gain_g * dz_g[n], gain_o * dz_o[n])
                along = d_unit[0] * of_gates[0] + d_unit[1] * of_gates[1]
                along += d_unit[2] * of_gates[2] + d_unit[3] * of_gates[3]
                units_hh = units_hh + of_gates
                d_units = d_units + d_unit
                d_units_along = d_units_along + (along,)
            of_d = sum_over_units(d_units, 4, CELLS, WARPS)
            of_d_unit = sum_over_units(d_units_along, 1, CELLS, WARPS)
            scale = two_scales(scale_hh_ptr, row, valid)
            operand = ()
            for n in tl.static_range(4 * CELLS):  # number n is gate n // CELLS of cell n % CELLS
                d = normalise_backward(
                    d_units[n % CELLS * 4 + n // CELLS], units_hh[n % CELLS * 4 + n // CELLS], scale[n % CELLS % 2],
                    of_d[n % CELLS % 2] / (4 * H), of_d_unit[n % CELLS % 2] / (4 * H),
                )  # fmt: skip
                operand = operand + (d.to(DTYPE),)

        # Product, gate by gate: the gradient of the state before the step.
        shared = share(
            operand, sequence + sequence + sequence + sequence, elements_of_dz, back % 2,
            DTYPE, 4 * CELLS, 4 * CHUNKS, WARPS,
        )  # fmt: skip
        words_i = take(shared, 0, CHUNKS, 4 * CHUNKS, DTYPE, WARPS)
        from_i = product(weights_i, words_i, DTYPE, CHUNKS, TILES, WARPS)
        words_f = take(shared, CHUNKS, CHUNKS, 4 * CHUNKS, DTYPE, WARPS)
        from_f = product(weights_f, words_f, DTYPE, CHUNKS, TILES, WARPS)
        words_g = take(shared, 2 * CHUNKS, CHUNKS, 4 * CHUNKS, DTYPE, WARPS)
        from_g = product(weights_g, words_g, DTYPE, CHUNKS, TILES, WARPS)
        words_o = take(shared, 3 * CHUNKS, CHUNKS, 4 * CHUNKS, DTYPE, WARPS)
        from_o = product(weights_o, words_o, DTYPE, CHUNKS, TILES, WARPS)

        # Store; no gradient flows past a reset.
        dh_after, dc_after = dh, dc
        dh, dc = (), ()
        for n in tl.static_range(CELLS):
            gates_at = row[n % 2] * (4 * H) + unit[n]
            store_gates(dgates_ptr, gates_at, in_batch[n % 2] & (unit[n] < H), dz_i[n], dz_f[n], dz_g[n], dz_o[n], H)
            reset = valid[n % 2] & ~continues[n % 2] & (unit[n] < H)
            of_h = (from_i[n] + from_f[n]) + (from_g[n] + from_o[n])
            if dropout_h_ptr is not None:
                of_h *= load_factors(dropout_h_ptr, batch[n % 2], unit[n], in_batch[n % 2], H)
            if zoneout_h_ptr is not None:
                of_h += dh_before[n]
                to_h0 = continues[n % 2] & (unit[n] < H) & (tl.zeros_like(unit[n]) + step == 0)
                tl.store(dh_from_zoneout_ptr + batch[n % 2].to(tl.int64) * H + unit[n], dh_before[n], mask=to_h0)
                if dreset_h_ptr is not None:
                    tl.store(dreset_h_ptr + row[n % 2] * H + unit[n], dh_before[n], mask=reset)
            dh = dh + (tl.where(valid[n % 2], tl.where(continues[n % 2], of_h, 0.0), dh_after[n]),)
            if dreset_c_ptr is not None:
                tl.store(dreset_c_ptr + row[n % 2] * H + unit[n], dc_prev[n], mask=reset)
            of_c = tl.where(continues[n % 2], dc_prev[n], 0.0)
            dc = dc + (tl.where(valid[n % 2], of_c, dc_after[n]),)
    for n in tl.static_range(CELLS):
        state_at = batch[n % 2].to(tl.int64) * H + unit[n]
        tl.store(dc_ptr + state_at, dc[n], mask=in_batch[n % 2] & (unit[n] < H))


MOST_REGISTERS = 160  # of a thread's 255 that may hold weights


def plans(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    """Where the registers of one block hold W_hh as operands of tensor cores."""
    in_the_loop = problem.projected and problem.regularised  # see kernels/projection.py
    if in_the_loop or problem.batch == 0 or problem.exact_float32:
        return
    units = max(128 // problem.size, power_of_two(problem.hidden))  # two chunks of K or more, as `share` wants
    warps = units // 16 if backward else min(8, units // 8)
    registers = 4 * units * units * problem.size // (4 * 32 * warps)  # of a thread
    if warps <= 8 and registers <= MOST_REGISTERS:
        shared = 2 * 8 * units * problem.size * (4 if backward else 1)
        shared += 32 * warps * problem.normalised  # sums of 8 sequences that each warp hands the others
        yield Plan(
            Family.RESIDENT, 8, units, units * problem.size // 64, 1, ceil(problem.batch / 8), warps, 1, shared,
            f"one block holds W_hh in registers, {registers} a thread, so that no exchange is needed",
        )  # fmt: skip


KERNELS = lstm_resident_forward_kernel, lstm_resident_backward_kernel


def forward_buffers(gates: Tensor, r: Recurrence, plan: Plan) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What forward needs besides what all families are given: h, for `hidden_states`; and arguments."""
    steps, batch, gates_of_all = gates.shape
    h = gates.new_empty(steps, batch, gates_of_all // 4)
    return h, {
        "weights_ptr": as_words(r.weight_hh),
        "h_ptr": h,
        "h_n_ptr": torch.empty_like(r.h0),
        "c_n_ptr": torch.empty_like(r.c0),
    }


def hidden_states(h: Tensor, hidden: int) -> Tensor:
    """h [T, B, H]."""
    return h


def backward_buffers(gates: Tensor, r: Recurrence, plan: Plan) -> tuple[Tensor, dict[str, Tensor | None]]:
    """As forward_buffers, of backward: dgates, for `gradient_of_gates`; and arguments."""
    dgates = torch.empty_like(gates)
    return dgates, {"weights_ptr": transposed_gates(r.weight_hh), "dgates_ptr": dgates}


def gradient_of_gates(dgates: Tensor, gates: Tensor) -> Tensor:
    """dgates [T, B, 4H]."""
    return dgates
