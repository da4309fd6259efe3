"""The resident family: the whole sequence in one launch, W_hh on chip, no exchange between programs.

A program owns 8 sequences and all hidden units, for hidden sizes whose W_hh fits the registers of one block. The units
are split over the warps: each holds the rows of its units as operands of products (fragments.py), reads h of all units
from shared memory, and computes the cells that its products belong to, so that a step has one barrier. Kernels are
written thread by thread; a thread has CELLS cells: number n is the unit 8 (n // 2) + column of its warp's, and the
sequence 2 quarter + n % 2. What is of each cell is a tuple of CELLS. (Triton 3.4 to 3.6 forget the names of a named
tuple in a tuple that grew: hence Cells(*cells[n]).)
"""

from collections import namedtuple
from collections.abc import Iterator
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from ..cards import Card
from ..memory import Buffer
from ..operands import as_words, transposed_gates
from ..problem import Problem, Recurrence
from . import indexing
from .cell import cell_forward, gates_backward, mix_backward, normed_output_backward, output, output_backward
from .fragments import SEQUENCES, load_weights, product, share, take, threads
from .indexing import Cells, Position, Sequences
from .norm import EPS, Norm, gates_of_unit, normalise, normalise_backward, normalise_gates, normalise_gates_backward
from .planning import Plan, Resident, power_of_two

# All fields but the step are tuples of CELLS.
Owned = namedtuple("Owned", "units columns sequences")  # by a thread; columns are of the batch tile
Now = namedtuple("Now", "step positions cells")  # where those are at a step
Before = namedtuple("Before", "x h operands c")  # a step: what comes from the input, h as stored, h with dropout
Activations = namedtuple("Activations", "gates c c_prev")  # that forward saved


@triton.jit
def cells_of_thread(batch, UNITS: tl.constexpr, WARPS: tl.constexpr):
    """The Owned cells of every thread."""
    thread = threads(WARPS)
    units, columns, sequences = (), (), ()
    for n in tl.static_range(UNITS // WARPS // 4):
        units = units + (thread.warp * (UNITS // WARPS) + n // 2 * 8 + thread.column,)
        columns = columns + (2 * thread.quarter + n % 2,)
        sequences = sequences + (indexing.sequences(tl.program_id(0) * SEQUENCES + columns[n], batch),)
    return Owned(units, columns, sequences)


@triton.jit
def cells_at_step(step, owned, batch, H: tl.constexpr, REVERSE: tl.constexpr):
    """Where they are Now."""
    positions, cells = (), ()
    for n in tl.static_range(len(owned.units)):
        unit, sequence = owned.units[n], Sequences(*owned.sequences[n])
        position = indexing.position(step, sequence, batch, REVERSE)
        positions = positions + (position,)
        cells = cells + (indexing.cells_at(sequence, position, unit, unit < H, H),)
    return Now(step, positions, cells)


@triton.jit
def sum_over_units(values):
    """[THREADS] float32 of each cell -> a pair of [THREADS]: the sums over all units, of a thread's two sequences."""
    THREADS: tl.constexpr = values[0].shape[0]
    even = tl.zeros((THREADS,), tl.float32)
    odd = tl.zeros((THREADS,), tl.float32)
    for n in tl.static_range(0, len(values), 2):
        even += values[n]
        odd += values[n + 1]
    both = tl.reshape(tl.join(even, odd), (THREADS // 4, 4, 2))  # [warps and columns, quarters, sequences]
    total = tl.broadcast_to(tl.sum(both, axis=0)[None, :, :], (THREADS // 4, 4, 2))
    return tl.split(tl.reshape(total, (THREADS, 2)))


@triton.jit
def moments(v, owned, H: tl.constexpr):
    """A tuple of values of each cell -> (mean, scale) over all units, each a pair: of a thread's two sequences."""
    COUNT: tl.constexpr = len(v[0]) * H
    sums, squares = (), ()
    for n in tl.static_range(len(v)):
        total = v[n][0]
        for k in tl.static_range(1, len(v[n])):
            total += v[n][k]
        sums = sums + (total,)
    even, odd = sum_over_units(sums)
    mean = (even / COUNT, odd / COUNT)
    for n in tl.static_range(len(v)):
        total = tl.zeros_like(even)
        for k in tl.static_range(len(v[n])):
            distance = tl.where(owned.units[n] < H, v[n][k] - mean[n % 2], 0.0)
            total += distance * distance
        squares = squares + (total,)
    even, odd = sum_over_units(squares)
    return mean, (tl.rsqrt(even / COUNT + EPS), tl.rsqrt(odd / COUNT + EPS))


@triton.jit
def load_step(h, c, now, gates_ptr, dropout_h_ptr, reset_c_ptr, H: tl.constexpr):
    """What the cells have Before the step."""
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    x, h_prev, operands, c_prev = (), (), (), ()
    for n in tl.static_range(len(h)):
        cell = Cells(*now.cells[n])
        x = x + (indexing.load_gates(gates_ptr, cell.gates_at, cell.valid, H),)
        h_prev = h_prev + (tl.where(cell.reset, 0.0, h[n]).to(DTYPE),)
        operand = h_prev[n]
        if dropout_h_ptr is not None:
            factors = tl.load(dropout_h_ptr + cell.state_at, mask=cell.in_tile, other=0.0).to(tl.float32)
            operand = (factors * operand.to(tl.float32)).to(DTYPE)
        operands = operands + (operand,)
        c_prev = c_prev + (indexing.reset_to(tl.where(cell.reset, 0.0, c[n]), reset_c_ptr, cell),)
    return Before(x, h_prev, operands, c_prev)


@triton.jit
def product_with_h(weights, h, owned, turn, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """W_hh h: the four gates of each cell."""
    shared = share(h, owned.columns, owned.units, turn, CHUNKS)
    products = product(weights, take(shared, 0, CHUNKS, CHUNKS, WARPS), h[0].dtype)
    z = ()
    for n in tl.static_range(len(h)):
        z = z + (products[n // 2 * 8 + n % 2 : n // 2 * 8 + 8 : 2],)  # both of a tile's cells alternate
    return z


@triton.jit
def normalise_products(z, gain_hh, owned, H: tl.constexpr):
    """LN(W_hh h) of each cell."""
    mean, scale = moments(z, owned, H)
    normed = ()
    for n in tl.static_range(len(z)):
        normed = normed + (normalise_gates(z[n], mean[n % 2], scale[n % 2], gain_hh[n]),)
    return normed


@triton.jit
def normed_cells(before, z, peepholes, affine_c, owned, H: tl.constexpr, PEEPHOLES: tl.constexpr):
    """(gates, c, m) of each cell, with m = o tanh(LN(c))."""
    gates, c, normed = (), (), ()
    for n in tl.static_range(len(z)):
        of_cell, c_next, m = cell_forward(before.x[n], z[n], before.c[n], peepholes[n], PEEPHOLES)
        gates, c = gates + (of_cell,), c + ((c_next,),)
    mean, scale = moments(c, owned, H)
    for n in tl.static_range(len(z)):
        (c_next,) = c[n]
        m = output(gates[n][3], normalise(c_next, mean[n % 2], scale[n % 2], *affine_c[n]))
        normed = normed + ((gates[n], c_next, m),)
    return normed


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_forward_kernel(
    gates_ptr,
    weights_ptr,  # [4H, W] int32: W_hh
    weight_peephole_ptr, gain_hh_ptr, gain_c_ptr, bias_c_ptr, h0_ptr, c0_ptr,
    h_ptr,  # [T*B, H] out
    c_ptr,  # None: gates are not saved either
    h_n_ptr, c_n_ptr,  # [B, H] out, the latter float32
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr, reset_h_ptr, reset_c_ptr, T, B,
    H: tl.constexpr, REVERSE: tl.constexpr,
    UNITS: tl.constexpr,  # at least H
    WARPS: tl.constexpr,
):  # fmt: skip
    """All steps of a batch tile."""
    PEEPHOLES: tl.constexpr = weight_peephole_ptr is not None
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    CHUNKS: tl.constexpr = UNITS // PER // 16
    CELLS: tl.constexpr = UNITS // WARPS // 4
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    owned = cells_of_thread(batch, UNITS, WARPS)

    # The four gates' rows of the warp's units, once: a pair of tiles is 8 units, i and f of the first, g and o.
    rows = ()
    for n in tl.static_range(2 * CELLS):
        unit = owned.units[n // 4 * 2]
        rows = rows + (tl.where(unit < H, n % 4 * H + unit, -1),)
    weights = load_weights(weights_ptr, rows, threads(WARPS).quarter * 4, W, 16, DTYPE, CHUNKS)

    h, c, peepholes, gain_hh, affine_c = (), (), (), (), ()
    states = cells_at_step(0, owned, batch, H, REVERSE).cells
    for n in tl.static_range(CELLS):
        unit = owned.units[n]
        peepholes = peepholes + (indexing.load_peepholes(weight_peephole_ptr, unit, H),)
        if gain_hh_ptr is not None:
            gain_hh = gain_hh + (indexing.load_gates(gain_hh_ptr, unit, unit < H, H),)
        if gain_c_ptr is not None:
            affine_c = affine_c + (indexing.load_affine(gain_c_ptr, bias_c_ptr, unit, H),)
        state = Cells(*states[n])
        h = h + (tl.load(h0_ptr + state.state_at, mask=state.in_tile, other=0.0),)
        c = c + (tl.load(c0_ptr + state.state_at, mask=state.in_tile, other=0.0),)
    for step in range(T):
        now = cells_at_step(step, owned, batch, H, REVERSE)
        before = load_step(h, c, now, gates_ptr, dropout_h_ptr, reset_c_ptr, H)  # the product hides its latency
        z = product_with_h(weights, before.operands, owned, step % 2, CHUNKS, WARPS)
        if gain_hh_ptr is not None:
            z = normalise_products(z, gain_hh, owned, H)
        new = normed_cells(before, z, peepholes, affine_c, owned, H, PEEPHOLES) if gain_c_ptr is not None else None
        h, c = (), ()
        for n in tl.static_range(CELLS):
            cell = Cells(*now.cells[n])
            if gain_c_ptr is not None:
                gates, c_next, h_next = new[n]
            else:  # here, not earlier: the fewer gates wait to be stored, the fewer the instructions
                gates, c_next, h_next = cell_forward(before.x[n], z[n], before.c[n], peepholes[n], PEEPHOLES)
            c_next = indexing.zoneout(zoneout_c_ptr, cell, before.c[n], c_next)
            if zoneout_h_ptr is not None:
                h_before = indexing.reset_to(before.h[n].to(tl.float32), reset_h_ptr, cell)
                h_next = indexing.zoneout(zoneout_h_ptr, cell, h_before, h_next)
            h_next = tl.where(cell.valid, h_next, 0.0).to(DTYPE)  # zeros in padding, where the state stays
            tl.store(h_ptr + cell.at, h_next, mask=cell.in_tile)
            if c_ptr is not None:
                indexing.store_gates(gates_ptr, cell.gates_at, cell.valid, gates, H)
                tl.store(c_ptr + cell.at, tl.where(cell.valid, c_next, 0.0), mask=cell.in_tile)
            h = h + (tl.where(cell.valid, h_next, before.h[n]),)
            c = c + (tl.where(cell.valid, c_next, before.c[n]),)
    for n in tl.static_range(CELLS):
        state = Cells(*states[n])
        tl.store(h_n_ptr + state.state_at, h[n], mask=state.in_tile)
        tl.store(c_n_ptr + state.state_at, c[n], mask=state.in_tile)


@triton.jit
def load_saved(now, owned, saved, batch, H: tl.constexpr, REVERSE: tl.constexpr):
    """The Activations of a step."""
    gates, c, c_prev = (), (), ()
    for n in tl.static_range(len(now.cells)):
        sequence, cell = Sequences(*owned.sequences[n]), Cells(*now.cells[n])
        row_prev = indexing.row_before(now.step, Position(*now.positions[n]).time, sequence.index, batch.B, REVERSE)
        of_cell = indexing.load_saved(saved, now.step, row_prev, owned.units[n], cell, H)
        gates, c, c_prev = gates + (of_cell[0],), c + (of_cell[1],), c_prev + (of_cell[2],)
    return Activations(gates, c, c_prev)


@triton.jit
def output_gradients(dh, now, dh_ptr, zoneout_h_ptr):
    """Gradients of h after the step -> (gradients of the output m, what zoneout passes on to h before the step)."""
    dm, dh_before = (), ()
    for n in tl.static_range(len(dh)):
        cell = Cells(*now.cells[n])
        of_m = indexing.add_gradients_given(tl.where(cell.valid, dh[n], 0.0), dh_ptr, None, None, cell)
        of_h = tl.zeros_like(of_m)
        if zoneout_h_ptr is not None:
            of_h, of_m = mix_backward(indexing.load_share(zoneout_h_ptr, cell), of_m)
        dm, dh_before = dm + (of_m,), dh_before + (of_h,)
    return dm, dh_before


@triton.jit
def normed_outputs_backward(gates, dm, now, owned, norm, H: tl.constexpr):
    """Of each cell (dz_o, gradient of c) through m = o tanh(LN(c))."""
    unit_c, d, d_unit, dz_o, outputs = (), (), (), (), ()
    for n in tl.static_range(len(dm)):
        cell = Cells(*now.cells[n])
        unit_c = unit_c + (tl.load(norm.unit_ptr + cell.at, mask=cell.valid, other=0.0),)
        gain, bias = indexing.load_affine(norm.gain_ptr, norm.bias_ptr, owned.units[n], H)
        of_o, of_unit = normed_output_backward(gates[n][3], unit_c[n], dm[n], gain, bias)
        dz_o, d, d_unit = dz_o + (of_o,), d + (of_unit,), d_unit + (of_unit * unit_c[n],)
    sum_d, sum_d_unit = sum_over_units(d), sum_over_units(d_unit)
    for n in tl.static_range(len(dm)):
        position = Position(*now.positions[n])
        scale = tl.load(norm.scale_ptr + position.row, mask=position.valid, other=0.0)
        of_c = normalise_backward(d[n], unit_c[n], scale, sum_d[n % 2] / H, sum_d_unit[n % 2] / H)
        outputs = outputs + ((dz_o[n], of_c),)
    return outputs


@triton.jit
def cells_backward(dc, activations, dm, outputs, now, peepholes, zoneout_c_ptr, PEEPHOLES: tl.constexpr):
    """(dz, gradient of c before the step) of each cell; zero in padding, where every factor was loaded as zero."""
    dz, dc_before = (), ()
    for n in tl.static_range(len(dc)):
        cell = Cells(*now.cells[n])
        gates, c_prev = activations.gates[n], activations.c_prev[n]
        of_c = tl.where(cell.valid, dc[n], 0.0)
        of_c, c, from_zoneout = indexing.zoneout_c_backward(of_c, zoneout_c_ptr, gates, activations.c[n], c_prev, cell)
        dz_o, of_c_by_m = output_backward(gates[3], c, dm[n]) if outputs is None else outputs[n]
        of_gates, of_c_prev = gates_backward(gates, c_prev, dz_o, of_c + of_c_by_m, peepholes[n], PEEPHOLES)
        if zoneout_c_ptr is not None:
            of_c_prev += from_zoneout
        dz, dc_before = dz + (of_gates,), dc_before + (of_c_prev,)
    return dz, dc_before


@triton.jit
def normed_products_backward(dz, now, owned, norm, H: tl.constexpr, DTYPE: tl.constexpr):
    """Gradients of LN(W_hh h) of each cell -> of W_hh h."""
    d, unit_hh, sums, sums_unit, dz_hh = (), (), (), (), ()
    for n in tl.static_range(len(dz)):
        unit, cell = owned.units[n], Cells(*now.cells[n])
        gain = indexing.load_gates(norm.gain_ptr, unit, unit < H, H)
        unit_hh = unit_hh + (indexing.load_gates(norm.unit_ptr, cell.gates_at, cell.valid, H),)
        of_unit, sum_d, sum_d_unit = gates_of_unit(dz[n], gain, unit_hh[n], DTYPE)
        d, sums, sums_unit = d + (of_unit,), sums + (sum_d,), sums_unit + (sum_d_unit,)
    sum_d, sum_d_unit = sum_over_units(sums), sum_over_units(sums_unit)
    for n in tl.static_range(len(dz)):
        position = Position(*now.positions[n])
        scale = tl.load(norm.scale_ptr + position.row, mask=position.valid, other=0.0)
        mean_d, mean_d_unit = sum_d[n % 2] / (4 * H), sum_d_unit[n % 2] / (4 * H)
        dz_hh = dz_hh + (normalise_gates_backward(d[n], unit_hh[n], scale, mean_d, mean_d_unit),)
    return dz_hh


@triton.jit
def product_with_dz(weights, dz, elements, owned, turn, CHUNKS: tl.constexpr, WARPS: tl.constexpr, DTYPE: tl.constexpr):
    """W_hh^T dz of each cell, gate by gate: of each gate and then cell, `elements` is the place in a row of dz."""
    operand, products, dh = (), (), ()
    for gate in tl.static_range(4):
        for n in tl.static_range(len(dz)):
            operand = operand + (dz[n][gate].to(DTYPE),)
    shared = share(operand, owned.columns, elements, turn, 4 * CHUNKS)
    for gate in tl.static_range(4):
        words = take(shared, gate * CHUNKS, CHUNKS, 4 * CHUNKS, WARPS)
        products = products + (product(weights[gate], words, DTYPE),)
    i, f, g, o = products
    for n in tl.static_range(len(dz)):
        dh = dh + ((i[n] + f[n]) + (g[n] + o[n]),)
    return dh


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_backward_kernel(
    dh_ptr, dh_n_ptr, gates_ptr, c_ptr, c0_ptr,
    weights_ptr,  # [4, H, W] int32: W_hh^T of each gate
    weight_peephole_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr, gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr,
    dh_total_ptr, dgates_ptr,
    dc_ptr,  # in: the gradient of c_n; out: of c0
    lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr,
    dh_from_zoneout_ptr,  # [B, H] float32 zeros, out: the gradient of h0 through zoneout; or None
    dreset_h_ptr, reset_c_ptr, dreset_c_ptr, T, B, H: tl.constexpr, REVERSE: tl.constexpr,
    UNITS: tl.constexpr,  # at least H
    WARPS: tl.constexpr,
):  # fmt: skip
    """All steps of a batch tile, from the last to the first."""
    PEEPHOLES: tl.constexpr = weight_peephole_ptr is not None
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    CHUNKS: tl.constexpr = UNITS // PER // 16  # of one gate
    CELLS: tl.constexpr = UNITS // WARPS // 4
    batch, saved = indexing.Batch(lengths_ptr, resets_ptr, T, B), indexing.Saved(gates_ptr, c_ptr, c0_ptr, reset_c_ptr)
    norm_hh = Norm(gain_hh_ptr, None, unit_hh_ptr, scale_hh_ptr)
    norm_c = Norm(gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr)
    owned = cells_of_thread(batch, UNITS, WARPS)

    # The rows of W_hh^T of the warp's units, gate by gate, once.
    rows, weights, elements_of_dz, peepholes = (), (), (), ()
    first_word = threads(WARPS).quarter * 4
    for n in tl.static_range(CELLS // 2):
        rows = rows + (tl.where(owned.units[2 * n] < H, owned.units[2 * n], -1),)
    for gate in tl.static_range(4):
        weights = weights + (load_weights(weights_ptr + gate * H * W, rows, first_word, W, 16, DTYPE, CHUNKS),)
        for n in tl.static_range(CELLS):  # four gates of UNITS units are a row of K
            elements_of_dz = elements_of_dz + (gate * UNITS + owned.units[n],)

    # Gradients of the state after the current step: at a sequence's last step, those of the final state.
    dh, dc = (), ()
    states = cells_at_step(0, owned, batch, H, REVERSE).cells
    for n in tl.static_range(CELLS):
        peepholes = peepholes + (indexing.load_peepholes(weight_peephole_ptr, owned.units[n], H),)
        state = Cells(*states[n])
        dh_n = tl.zeros((32 * WARPS,), tl.float32)
        if dh_n_ptr is not None:
            dh_n += tl.load(dh_n_ptr + state.state_at, mask=state.in_tile, other=0.0).to(tl.float32)
        dh = dh + (dh_n,)
        dc = dc + (tl.load(dc_ptr + state.state_at, mask=state.in_tile, other=0.0),)
    for back in range(T):
        now = cells_at_step(T - 1 - back, owned, batch, H, REVERSE)
        activations = load_saved(now, owned, saved, batch, H, REVERSE)
        dm, dh_from_zoneout = output_gradients(dh, now, dh_ptr, zoneout_h_ptr)
        outputs = None
        if gain_c_ptr is not None:
            outputs = normed_outputs_backward(activations.gates, dm, now, owned, norm_c, H)
        dz, dc_before = cells_backward(dc, activations, dm, outputs, now, peepholes, zoneout_c_ptr, PEEPHOLES)
        dz_hh = normed_products_backward(dz, now, owned, norm_hh, H, DTYPE) if gain_hh_ptr is not None else dz
        dh_of_product = product_with_dz(weights, dz_hh, elements_of_dz, owned, back % 2, CHUNKS, WARPS, DTYPE)

        dh_after, dc_after, dh, dc = dh, dc, (), ()
        for n in tl.static_range(CELLS):
            cell, dh_before = Cells(*now.cells[n]), dh_of_product[n]
            indexing.store_gates(dgates_ptr, cell.gates_at, cell.in_tile, dz[n], H)
            if gain_c_ptr is not None:
                tl.store(dh_total_ptr + cell.at, dm[n], mask=cell.in_tile)
            if dropout_h_ptr is not None:
                dh_before *= tl.load(dropout_h_ptr + cell.state_at, mask=cell.in_tile, other=0.0).to(tl.float32)
            if zoneout_h_ptr is not None:
                dh_before += dh_from_zoneout[n]
                is_first = cell.continues & (tl.zeros_like(owned.units[n]) + now.step == 0)
                tl.store(dh_from_zoneout_ptr + cell.state_at, dh_from_zoneout[n], mask=is_first)
            if dreset_h_ptr is not None:
                tl.store(dreset_h_ptr + cell.at, dh_from_zoneout[n], mask=cell.reset)
            if dreset_c_ptr is not None:
                tl.store(dreset_c_ptr + cell.at, dc_before[n], mask=cell.reset)
            # No gradient flows past a reset.
            dh = dh + (tl.where(cell.valid, tl.where(cell.continues, dh_before, 0.0), dh_after[n]),)
            dc = dc + (tl.where(cell.valid, tl.where(cell.continues, dc_before[n], 0.0), dc_after[n]),)
    for n in tl.static_range(CELLS):
        tl.store(dc_ptr + Cells(*states[n]).state_at, dc[n], mask=Cells(*states[n]).in_tile)


MOST_REGISTERS = 160  # of a thread's 255 that may hold weights


def plans(problem: Problem, card: Card, backward: bool) -> Iterator[Plan]:
    """Where the registers of one block hold W_hh as operands of tensor cores."""
    if problem.projects_in_loop or problem.batch == 0 or problem.exact_float32:
        return
    units = max(128 // problem.size, power_of_two(problem.hidden))  # two chunks of K or more, as `share` requires
    warps = units // 16 if backward else min(8, units // 8)
    registers = 4 * units * units * problem.size // (4 * 32 * warps)  # of a thread
    if warps <= 8 and registers <= MOST_REGISTERS:
        shared = 2 * 8 * units * problem.size * (4 if backward else 1)
        shared += 32 * warps * problem.normalised  # sums of 8 sequences that each warp hands the others
        yield Plan(
            Resident(units * problem.size // 64), 8, units, 1, ceil(problem.batch / 8), warps, shared,
            f"one block holds W_hh in registers, {registers} a thread, so that no exchange is needed",
        )  # fmt: skip


KERNELS = lstm_resident_forward_kernel, lstm_resident_backward_kernel


def buffers(p: Problem, plan: Plan, backward: bool) -> dict[str, Buffer]:
    """What a pass writes besides the results that all families share: nothing."""
    return {}


def forward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """What forward reads besides the tensors of a call."""
    return {"weights_ptr": as_words(r.inputs.weight_hh, p.hidden)}


def backward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """As forward_operands, for backward."""
    return {"weights_ptr": transposed_gates(r.inputs.weight_hh, p.hidden)}


OPERANDS = forward_operands, backward_operands
