"""The resident family: the whole sequence in one launch, W_hh on chip, no exchange between programs.

A program owns 8 sequences and all hidden units, for hidden sizes whose W_hh fits the registers of one block. The units
are split over the warps: each holds the rows of its units as operands of products (fragments.py), reads h of all units
from shared memory, and computes the cells that its products belong to, so that a step has one barrier. Kernels are
written thread by thread; a thread has CELLS cells: number n is the unit 8 (n // 2) + column of its warp's, and the
sequence 2 quarter + n % 2.
"""

from collections.abc import Iterator
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from ..operands import as_words, transposed_gates
from ..problem import Problem, Recurrence
from . import indexing
from .cell import cell_forward, gates_backward, mix_backward, normed_output_backward, output, output_backward
from .fragments import SEQUENCES, load_weights, product, share, take, threads
from .norm import EPS, gates_of_unit, normalise, normalise_backward, normalise_gates, normalise_gates_backward
from .planning import Device, Family, Plan, power_of_two


@triton.jit
def cells_of_thread(batch, UNITS: tl.constexpr, WARPS: tl.constexpr):
    """A thread's cells: their units, where in the batch tile and which their Sequences are; tuples of CELLS."""
    _, warp, column, quarter = threads(WARPS)
    units, places, of_cells = (), (), ()
    for n in tl.static_range(UNITS // WARPS // 4):
        units = units + (warp * (UNITS // WARPS) + n // 2 * 8 + column,)
        places = places + (2 * quarter + n % 2,)
        of_cells = of_cells + (indexing.sequences(tl.program_id(0) * SEQUENCES + places[n], batch),)
    return units, places, of_cells


@triton.jit
def cells_at_step(step, units, sequence, batch, H: tl.constexpr, REVERSE: tl.constexpr):
    """The Position and the Cells of each of a thread's cells; tuples of CELLS."""
    places, cells = (), ()
    for n in tl.static_range(len(units)):
        of_cell = indexing.Sequences(*sequence[n])  # named again: Triton 3.4 to 3.6 forget it in a tuple that grew
        place = indexing.position(step, of_cell, batch, REVERSE)
        places = places + (place,)
        cells = cells + (indexing.cells_at(of_cell, place, units[n], units[n] < H, H),)
    return places, cells


@triton.jit
def sum_over_units(values, K: tl.constexpr, WARPS: tl.constexpr):
    """Sums over all units of number K of each cell's values, for a thread's two sequences: a pair of [THREADS]."""
    even = tl.zeros((32 * WARPS,), tl.float32)
    odd = tl.zeros((32 * WARPS,), tl.float32)
    for n in tl.static_range(0, len(values), 2):
        even += values[n][K]
        odd += values[n + 1][K]
    both = tl.reshape(tl.join(even, odd), (8 * WARPS, 4, 2))  # [warps and columns, quarters, sequences]
    total = tl.broadcast_to(tl.sum(both, axis=0)[None, :, :], (8 * WARPS, 4, 2))
    return tl.split(tl.reshape(total, (32 * WARPS, 2)))


@triton.jit
def moments(v, unit, H: tl.constexpr, WARPS: tl.constexpr):
    """(means, scales) of a tuple of values for each cell, for a thread's two sequences; zero past the last unit."""
    COUNT: tl.constexpr = len(v[0]) * H
    sums, squares = (), ()
    for n in tl.static_range(len(v)):
        total = v[n][0]
        for k in tl.static_range(1, len(v[n])):
            total += v[n][k]
        sums = sums + ((total,),)
    even, odd = sum_over_units(sums, 0, WARPS)
    mean = (even / COUNT, odd / COUNT)
    for n in tl.static_range(len(v)):
        total = tl.zeros((32 * WARPS,), tl.float32)
        for k in tl.static_range(len(v[n])):
            distance = tl.where(unit[n] < H, v[n][k] - mean[n % 2], 0.0)
            total += distance * distance
        squares = squares + ((total,),)
    even, odd = sum_over_units(squares, 0, WARPS)
    return mean, (tl.rsqrt(even / COUNT + EPS), tl.rsqrt(odd / COUNT + EPS))


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_forward_kernel(
    gates_ptr,
    weights_ptr,  # [4H, W] int32: W_hh
    weight_peephole_ptr, gain_hh_ptr, gain_c_ptr, bias_c_ptr, h0_ptr, c0_ptr,
    h_ptr,  # [T*B, H] out
    c_ptr,
    h_n_ptr, c_n_ptr,  # [B, H] out, the latter float32
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
    thread, warp, column, quarter = threads(WARPS)
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    unit, places_in_tile, sequence = cells_of_thread(batch, UNITS, WARPS)

    # The four gates' rows of the warp's units, once: a pair of tiles is 8 units, i and f of the first, g and o.
    rows = ()
    for n in tl.static_range(2 * CELLS):
        rows = rows + (tl.where(unit[n // 4 * 2] < H, n % 4 * H + unit[n // 4 * 2], -1),)
    weights = load_weights(weights_ptr, rows, quarter * 4, W, 16, DTYPE, CHUNKS)

    h, c, peepholes, gain_hh, affine_c = (), (), (), (), ()
    states = cells_at_step(0, unit, sequence, batch, H, REVERSE)[1]
    for n in tl.static_range(CELLS):
        peepholes = peepholes + (indexing.load_peepholes(weight_peephole_ptr, unit[n], H),)
        if NORM_HH:
            gain_hh = gain_hh + (indexing.load_gates(gain_hh_ptr, unit[n], unit[n] < H, H),)
        if NORM_C:
            affine_c = affine_c + (indexing.load_affine(gain_c_ptr, bias_c_ptr, unit[n], H),)
        state = indexing.Cells(*states[n])
        h = h + (tl.load(h0_ptr + state.state_at, mask=state.in_tile, other=0.0),)
        c = c + (tl.load(c0_ptr + state.state_at, mask=state.in_tile, other=0.0),)
    for step in range(T):
        _, cells = cells_at_step(step, unit, sequence, batch, H, REVERSE)

        # Load, before the product, which hides its latency.
        x, h_prev, h_operand, c_prev = (), (), (), ()
        for n in tl.static_range(CELLS):
            cell = indexing.Cells(*cells[n])
            x = x + (indexing.load_gates(gates_ptr, cell.gates_at, cell.valid, H),)
            h_prev = h_prev + (tl.where(cell.reset, 0.0, h[n]).to(DTYPE),)
            operand = h_prev[n]
            if dropout_h_ptr is not None:
                factors = tl.load(dropout_h_ptr + cell.state_at, mask=cell.in_tile, other=0.0).to(tl.float32)
                operand = (factors * operand.to(tl.float32)).to(DTYPE)
            h_operand = h_operand + (operand,)
            c_prev = c_prev + (indexing.reset_to(tl.where(cell.reset, 0.0, c[n]), reset_c_ptr, cell),)

        # Product: the four gates of the thread's cells.
        shared = share(h_operand, places_in_tile, unit, step % 2, CHUNKS)
        products = product(weights, take(shared, 0, CHUNKS, CHUNKS, WARPS), DTYPE)
        z = ()
        for n in tl.static_range(CELLS):
            of_cell = products[n // 2 * 8 + n % 2 : n // 2 * 8 + 8 : 2]  # both of a tile's cells alternate
            z = z + (of_cell,)

        # Gates and cell.
        if NORM_HH:
            mean, scale = moments(z, unit, H, WARPS)
            z_hh, z = z, ()
            for n in tl.static_range(CELLS):
                z = z + (normalise_gates(z_hh[n], mean[n % 2], scale[n % 2], gain_hh[n]),)
        if NORM_C:
            new, new_c = (), ()
            for n in tl.static_range(CELLS):
                new = new + (cell_forward(x[n], z[n], c_prev[n], peepholes[n], PEEPHOLES),)
                new_c = new_c + ((new[n][1],),)
            mean, scale = moments(new_c, unit, H, WARPS)

        # Store. The state of a sequence that has ended stays; its padding gets zeros.
        h, c = (), ()
        for n in tl.static_range(CELLS):
            cell = indexing.Cells(*cells[n])
            if NORM_C:
                gates, c_next, h_next = new[n]
                h_next = output(gates[3], normalise(c_next, mean[n % 2], scale[n % 2], *affine_c[n]))
            else:  # here, not earlier: the fewer gates wait to be stored, the fewer the instructions
                gates, c_next, h_next = cell_forward(x[n], z[n], c_prev[n], peepholes[n], PEEPHOLES)
            c_next = indexing.zoneout(zoneout_c_ptr, cell, c_prev[n], c_next)
            if zoneout_h_ptr is not None:
                h_before = indexing.reset_to(h_prev[n].to(tl.float32), reset_h_ptr, cell)
                h_next = indexing.zoneout(zoneout_h_ptr, cell, h_before, h_next)
            h_next = tl.where(cell.valid, h_next, 0.0).to(DTYPE)
            tl.store(h_ptr + cell.at, h_next, mask=cell.in_tile)
            if SAVE:
                indexing.store_gates(gates_ptr, cell.gates_at, cell.valid, gates, H)
                tl.store(c_ptr + cell.at, tl.where(cell.valid, c_next, 0.0), mask=cell.in_tile)
            h = h + (tl.where(cell.valid, h_next, h_prev[n]),)
            c = c + (tl.where(cell.valid, c_next, c_prev[n]),)
    for n in tl.static_range(CELLS):
        state = indexing.Cells(*states[n])
        tl.store(h_n_ptr + state.state_at, h[n], mask=state.in_tile)
        tl.store(c_n_ptr + state.state_at, c[n], mask=state.in_tile)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_backward_kernel(
    dh_ptr, dh_n_ptr, gates_ptr, c_ptr, c0_ptr,
    weights_ptr,  # [4, H, W] int32: W_hh^T of each gate
    weight_peephole_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr, gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr,
    dh_total_ptr, dgates_ptr,
    dc_ptr,  # in: the gradient of c_n; out: of c0
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
    thread, warp, column, quarter = threads(WARPS)
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    unit, places_in_tile, sequence = cells_of_thread(batch, UNITS, WARPS)

    # The rows of W_hh^T of the warp's units, gate by gate, once.
    rows, weights, elements_of_dz = (), (), ()
    for n in tl.static_range(CELLS // 2):
        rows = rows + (tl.where(unit[2 * n] < H, unit[2 * n], -1),)
    for gate in tl.static_range(4):
        weights = weights + (load_weights(weights_ptr + gate * H * W, rows, quarter * 4, W, 16, DTYPE, CHUNKS),)
        for n in tl.static_range(CELLS):  # four gates of UNITS units are a row of K
            elements_of_dz = elements_of_dz + (gate * UNITS + unit[n],)

    # Gradients of the state after the current step: at a sequence's last step, those of the final state.
    dh, dc, peepholes = (), (), ()
    states = cells_at_step(0, unit, sequence, batch, H, REVERSE)[1]
    for n in tl.static_range(CELLS):
        peepholes = peepholes + (indexing.load_peepholes(weight_peephole_ptr, unit[n], H),)
        state = indexing.Cells(*states[n])
        of_h = tl.zeros((32 * WARPS,), tl.float32)
        if dh_n_ptr is not None:
            of_h += tl.load(dh_n_ptr + state.state_at, mask=state.in_tile, other=0.0).to(tl.float32)
        dh = dh + (of_h,)
        dc = dc + (tl.load(dc_ptr + state.state_at, mask=state.in_tile, other=0.0),)
    saved = indexing.Saved(gates_ptr, c_ptr, c0_ptr, reset_c_ptr)
    for back in range(T):
        step = T - 1 - back
        places, cells = cells_at_step(step, unit, sequence, batch, H, REVERSE)

        # Load, of all cells before the first store.
        loaded = ()
        for n in tl.static_range(CELLS):
            cell = indexing.Cells(*cells[n])
            dm = indexing.add_gradients_given(tl.where(cell.valid, dh[n], 0.0), dh_ptr, None, None, cell)
            place, of_cell = indexing.Position(*places[n]), indexing.Sequences(*sequence[n])
            row_prev = indexing.row_before(step, place.time, of_cell.index, B, REVERSE)
            gates, c, c_prev = indexing.load_saved(saved, step, row_prev, unit[n], cell, H)
            dh_prev = tl.zeros_like(dm)
            if zoneout_h_ptr is not None:
                dh_prev, dm = mix_backward(indexing.load_share(zoneout_h_ptr, cell), dm)
            of_c = tl.where(cell.valid, dc[n], 0.0)
            of_c, c, dc_prev = indexing.zoneout_c_backward(of_c, zoneout_c_ptr, gates, c, c_prev, cell)
            loaded = loaded + ((gates, c, c_prev, dm, of_c, dh_prev, dc_prev),)

        # Output.
        if NORM_C:
            units = ()
            for n in tl.static_range(CELLS):
                cell = indexing.Cells(*cells[n])
                gates, _, _, dm, _, _, _ = loaded[n]
                tl.store(dh_total_ptr + cell.at, dm, mask=cell.in_tile)
                unit_c = tl.load(unit_c_ptr + cell.at, mask=cell.valid, other=0.0)
                gain, bias = indexing.load_affine(gain_c_ptr, bias_c_ptr, unit[n], H)
                dz_o, d_unit = normed_output_backward(gates[3], unit_c, dm, gain, bias)
                units = units + ((d_unit, d_unit * unit_c, dz_o, unit_c),)
            sum_d, sum_d_unit = sum_over_units(units, 0, WARPS), sum_over_units(units, 1, WARPS)

        # Cell. In padding every factor was loaded as zero, so its gradients are zero.
        dz, dc_before = (), ()
        for n in tl.static_range(CELLS):
            gates, c, c_prev, dm, of_c, _, dc_from_zoneout = loaded[n]
            if NORM_C:
                d_unit, _, dz_o, unit_c = units[n]
                place = indexing.Position(*places[n])
                scale = tl.load(scale_c_ptr + place.row, mask=place.valid, other=0.0)
                of_c += normalise_backward(d_unit, unit_c, scale, sum_d[n % 2] / H, sum_d_unit[n % 2] / H)
            else:
                dz_o, dc_of_m = output_backward(gates[3], c, dm)
                of_c += dc_of_m
            d_gates, dc_prev = gates_backward(gates, c_prev, dz_o, of_c, peepholes[n], PEEPHOLES)
            if zoneout_c_ptr is not None:
                dc_prev += dc_from_zoneout
            dz = dz + (d_gates,)
            dc_before = dc_before + (dc_prev,)

        # Through the layer norm, to the gradient of W_hh h.
        dz_hh = dz
        if NORM_HH:
            units_hh, dz_hh = (), ()
            for n in tl.static_range(CELLS):
                gain = indexing.load_gates(gain_hh_ptr, unit[n], unit[n] < H, H)
                cell = indexing.Cells(*cells[n])
                unit_hh = indexing.load_gates(unit_hh_ptr, cell.gates_at, cell.valid, H)
                d, sum_of_d, sum_of_d_unit = gates_of_unit(dz[n], gain, unit_hh, DTYPE)
                units_hh = units_hh + ((sum_of_d, sum_of_d_unit, d, unit_hh),)
            sum_d, sum_d_unit = sum_over_units(units_hh, 0, WARPS), sum_over_units(units_hh, 1, WARPS)
            for n in tl.static_range(CELLS):
                _, _, d, unit_hh = units_hh[n]
                place = indexing.Position(*places[n])
                scale = tl.load(scale_hh_ptr + place.row, mask=place.valid, other=0.0)
                mean_d, mean_d_unit = sum_d[n % 2] / (4 * H), sum_d_unit[n % 2] / (4 * H)
                dz_hh = dz_hh + (normalise_gates_backward(d, unit_hh, scale, mean_d, mean_d_unit),)

        # Product, gate by gate: the gradient of the state before the step.
        operand, of_gates = (), ()
        for n in tl.static_range(4 * CELLS):  # number n is gate n // CELLS of cell n % CELLS
            operand = operand + (dz_hh[n % CELLS][n // CELLS].to(DTYPE),)
        shared = share(operand, places_in_tile, elements_of_dz, back % 2, 4 * CHUNKS)
        for gate in tl.static_range(4):
            words = take(shared, gate * CHUNKS, CHUNKS, 4 * CHUNKS, WARPS)
            of_gates = of_gates + (product(weights[gate], words, DTYPE),)

        # Store; no gradient flows past a reset.
        dh_after, dc_after, dh, dc = dh, dc, (), ()
        for n in tl.static_range(CELLS):
            cell = indexing.Cells(*cells[n])
            indexing.store_gates(dgates_ptr, cell.gates_at, cell.in_tile, dz[n], H)
            of_h = (of_gates[0][n] + of_gates[1][n]) + (of_gates[2][n] + of_gates[3][n])
            if dropout_h_ptr is not None:
                of_h *= tl.load(dropout_h_ptr + cell.state_at, mask=cell.in_tile, other=0.0).to(tl.float32)
            if zoneout_h_ptr is not None:
                _, _, _, _, _, dh_prev, _ = loaded[n]
                of_h += dh_prev
                is_first = tl.zeros_like(unit[n]) + step == 0
                tl.store(dh_from_zoneout_ptr + cell.state_at, dh_prev, mask=cell.continues & is_first)
                if dreset_h_ptr is not None:
                    tl.store(dreset_h_ptr + cell.at, dh_prev, mask=cell.reset)
            if dreset_c_ptr is not None:
                tl.store(dreset_c_ptr + cell.at, dc_before[n], mask=cell.reset)
            dh = dh + (tl.where(cell.valid, tl.where(cell.continues, of_h, 0.0), dh_after[n]),)
            dc = dc + (tl.where(cell.valid, tl.where(cell.continues, dc_before[n], 0.0), dc_after[n]),)
    for n in tl.static_range(CELLS):
        state = indexing.Cells(*states[n])
        tl.store(dc_ptr + state.state_at, dc[n], mask=state.in_tile)


MOST_REGISTERS = 160  # of a thread's 255 that may hold weights


def plans(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    """Where the registers of one block hold W_hh as operands of tensor cores."""
    in_the_loop = problem.projected and problem.regularised  # see kernels/projection.py
    if in_the_loop or problem.batch == 0 or problem.exact_float32:
        return
    units = max(128 // problem.size, power_of_two(problem.hidden))  # two chunks of K or more, as `share` requires
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
BUFFERS = None, None


def forward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """What forward reads besides the tensors of a call."""
    return {"weights_ptr": as_words(r.given.weight_hh, p.hidden)}


def backward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """As forward_operands, for backward."""
    return {"weights_ptr": transposed_gates(r.given.weight_hh, p.hidden)}


OPERANDS = forward_operands, backward_operands
