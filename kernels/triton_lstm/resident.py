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
from ..cells import CELLS
from ..memory import Buffer
from ..operands import as_words, transposed_gates
from ..problem import Problem, Recurrence
from . import indexing
from .cells import cell_backward, cell_forward
from .cells.lstm import gates_backward, mix_backward, normed_output_backward, output
from .fragments import SEQUENCES, load_weights, product, share, take, threads
from .indexing import Cells, Position, Sequences
from .norm import EPS, gates_of_unit, normalise, normalise_backward, normalise_gates, normalise_gates_backward
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, NormC, NormHH, Saved
from .planning import Plan, Resident, power_of_two

# All fields but the step are tuples of CELLS.
Owned = namedtuple("Owned", "units columns sequences")  # by a thread; columns are of the batch tile
Now = namedtuple("Now", "step positions cells")  # where those are at a step
Before = namedtuple("Before", "x h operands c")  # a step: what comes from the input, h as stored, h with dropout
Activations = namedtuple("Activations", "gates c c_prev")  # that forward saved


@triton.jit
def cells_of_thread(batch, S: tl.constexpr):
    """The Owned cells of every thread."""
    thread = threads(S.WARPS)
    units, columns, sequences = (), (), ()
    for n in tl.static_range(S.UNITS // S.WARPS // 4):
        units = units + (thread.warp * (S.UNITS // S.WARPS) + n // 2 * 8 + thread.column,)
        columns = columns + (2 * thread.quarter + n % 2,)
        sequences = sequences + (indexing.sequences(tl.program_id(0) * SEQUENCES + columns[n], batch),)
    return Owned(units, columns, sequences)


@triton.jit
def cells_at_step(step, owned, batch, S: tl.constexpr):
    """Where they are Now."""
    positions, cells = (), ()
    for n in tl.static_range(len(owned.units)):
        unit, sequence = owned.units[n], Sequences(*owned.sequences[n])
        position = indexing.position(step, sequence, batch, S.REVERSE)
        positions = positions + (position,)
        cells = cells + (indexing.cells_at(sequence, position, unit, unit < S.H, S.H),)
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
def load_step(h, c, now, hidden, cell, H: tl.constexpr):
    """What the cells have Before the step."""
    DTYPE: tl.constexpr = hidden.h_ptr.dtype.element_ty
    x, h_prev, operands, c_prev = (), (), (), ()
    for n in tl.static_range(len(h)):
        each = Cells(*now.cells[n])
        x = x + (indexing.load_gates(cell.gates_ptr, each.gates_at, each.valid, H),)
        h_prev = h_prev + (tl.where(each.reset, 0.0, h[n]).to(DTYPE),)
        operand = h_prev[n]
        if hidden.dropout_h_ptr is not None:
            factors = tl.load(hidden.dropout_h_ptr + each.state_at, mask=each.in_tile, other=0.0).to(tl.float32)
            operand = (factors * operand.to(tl.float32)).to(DTYPE)
        operands = operands + (operand,)
        c_prev = c_prev + (indexing.reset_to(tl.where(each.reset, 0.0, c[n]), cell.reset_c_ptr, each),)
    return Before(x, h_prev, operands, c_prev)


@triton.jit
def product_with_h(weights, h, owned, turn, S: tl.constexpr):
    """W_hh h: the four gates of each cell."""
    shared = share(h, owned.columns, owned.units, turn, S.CHUNKS)
    products = product(weights, take(shared, 0, S.CHUNKS, S.CHUNKS, S.WARPS), h[0].dtype)
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
def normed_cells(before, z, peepholes, affine_c, owned, S: tl.constexpr):
    """(gates, c, m) of each cell, with m = o tanh(LN(c))."""
    gates, c, normed = (), (), ()
    for n in tl.static_range(len(z)):
        of_cell, c_next, m = cell_forward(before.x[n], z[n], before.c[n], peepholes[n], S)
        gates, c = gates + (of_cell,), c + ((c_next,),)
    mean, scale = moments(c, owned, S.H)
    for n in tl.static_range(len(z)):
        (c_next,) = c[n]
        m = output(gates[n][3], normalise(c_next, mean[n % 2], scale[n % 2], *affine_c[n]))
        normed = normed + ((gates[n], c_next, m),)
    return normed


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_forward_kernel(
    weights_ptr,  # [4H, W] int32: W_hh
    hidden: Hidden, cell: Cell, norm_hh: NormHH, norm_c: NormC, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps of a batch tile."""
    H: tl.constexpr = S.H
    DTYPE: tl.constexpr = cell.gates_ptr.dtype.element_ty
    CELLS: tl.constexpr = S.UNITS // S.WARPS // 4
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    owned = cells_of_thread(batch, S)

    # The four gates' rows of the warp's units, once: a pair of tiles is 8 units, i and f of the first, g and o.
    rows = ()
    for n in tl.static_range(2 * CELLS):
        unit = owned.units[n // 4 * 2]
        rows = rows + (indexing.row_of_gate(n % 4, unit, S),)
    weights = load_weights(weights_ptr, rows, threads(S.WARPS).quarter * 4, S.W, 16, DTYPE, S.CHUNKS)

    h, c, peepholes, gain_hh, affine_c = (), (), (), (), ()
    states = cells_at_step(0, owned, batch, S).cells
    for n in tl.static_range(CELLS):
        unit = owned.units[n]
        peepholes = peepholes + (indexing.load_peepholes(cell.weight_peephole_ptr, unit, H),)
        if norm_hh.gain_hh_ptr is not None:
            gain_hh = gain_hh + (indexing.load_gates(norm_hh.gain_hh_ptr, unit, unit < H, H),)
        if norm_c.gain_c_ptr is not None:
            affine_c = affine_c + (indexing.load_affine(norm_c.gain_c_ptr, norm_c.bias_c_ptr, unit, H),)
        state = Cells(*states[n])
        h = h + (tl.load(hidden.h0_ptr + state.state_at, mask=state.in_tile, other=0.0),)
        c = c + (tl.load(cell.c0_ptr + state.state_at, mask=state.in_tile, other=0.0),)
    for step in range(T):
        now = cells_at_step(step, owned, batch, S)
        before = load_step(h, c, now, hidden, cell, H)  # the product hides its latency
        z = product_with_h(weights, before.operands, owned, step % 2, S)
        if norm_hh.gain_hh_ptr is not None:
            z = normalise_products(z, gain_hh, owned, H)
        if norm_c.gain_c_ptr is not None:
            new = normed_cells(before, z, peepholes, affine_c, owned, S)
        h, c = (), ()
        for n in tl.static_range(CELLS):
            each = Cells(*now.cells[n])
            if norm_c.gain_c_ptr is not None:
                gates, c_next, h_next = new[n]
            else:  # here, not earlier: the fewer gates wait to be stored, the fewer the instructions
                gates, c_next, h_next = cell_forward(before.x[n], z[n], before.c[n], peepholes[n], S)
            c_next = indexing.zoneout(cell.zoneout_c_ptr, each, before.c[n], c_next)
            if hidden.zoneout_h_ptr is not None:
                h_before = indexing.reset_to(before.h[n].to(tl.float32), hidden.reset_h_ptr, each)
                h_next = indexing.zoneout(hidden.zoneout_h_ptr, each, h_before, h_next)
            h_next = tl.where(each.valid, h_next, 0.0).to(DTYPE)  # zeros in padding, where the state stays
            tl.store(hidden.h_ptr + each.at, h_next, mask=each.in_tile)
            if cell.c_ptr is not None:
                indexing.store_gates(cell.gates_ptr, each.gates_at, each.valid, gates, H)
                tl.store(cell.c_ptr + each.at, tl.where(each.valid, c_next, 0.0), mask=each.in_tile)
            h = h + (tl.where(each.valid, h_next, before.h[n]),)
            c = c + (tl.where(each.valid, c_next, before.c[n]),)
    for n in tl.static_range(CELLS):
        state = Cells(*states[n])
        tl.store(hidden.h_n_ptr + state.state_at, h[n], mask=state.in_tile)
        tl.store(cell.c_n_ptr + state.state_at, c[n], mask=state.in_tile)


@triton.jit
def load_saved(now, owned, saved, batch, S: tl.constexpr):
    """The Activations of a step."""
    gates, c, c_prev = (), (), ()
    for n in tl.static_range(len(now.cells)):
        sequence, cell = Sequences(*owned.sequences[n]), Cells(*now.cells[n])
        row_prev = indexing.row_before(now.step, Position(*now.positions[n]).time, sequence.index, batch.B, S.REVERSE)
        of_cell = indexing.load_saved(saved, now.step, row_prev, owned.units[n], cell, S.H)
        gates, c, c_prev = gates + (of_cell[0],), c + (of_cell[1],), c_prev + (of_cell[2],)
    return Activations(gates, c, c_prev)


@triton.jit
def output_gradients(dh, now, hidden):
    """Gradients of h after the step -> (gradients of the output m, what zoneout passes on to h before the step)."""
    dm, dh_before = (), ()
    for n in tl.static_range(len(dh)):
        cell = Cells(*now.cells[n])
        of_m = tl.where(cell.valid, dh[n], 0.0)
        if hidden.dh_ptr is not None:
            of_m += tl.load(hidden.dh_ptr + cell.at, mask=cell.valid, other=0.0).to(tl.float32)
        of_h = tl.zeros_like(of_m)
        if hidden.zoneout_h_ptr is not None:
            of_h, of_m = mix_backward(indexing.load_share(hidden.zoneout_h_ptr, cell), of_m)
        dm, dh_before = dm + (of_m,), dh_before + (of_h,)
    return dm, dh_before


@triton.jit
def normed_outputs_backward(gates, dm, now, owned, norm_c, H: tl.constexpr):
    """Of each cell (dz_o, gradient of c) through m = o tanh(LN(c))."""
    unit_c, d, d_unit, dz_o, outputs = (), (), (), (), ()
    for n in tl.static_range(len(dm)):
        cell = Cells(*now.cells[n])
        unit_c = unit_c + (tl.load(norm_c.unit_c_ptr + cell.at, mask=cell.valid, other=0.0),)
        gain, bias = indexing.load_affine(norm_c.gain_c_ptr, norm_c.bias_c_ptr, owned.units[n], H)
        of_o, of_unit = normed_output_backward(gates[n][3], unit_c[n], dm[n], gain, bias)
        dz_o, d, d_unit = dz_o + (of_o,), d + (of_unit,), d_unit + (of_unit * unit_c[n],)
    sum_d, sum_d_unit = sum_over_units(d), sum_over_units(d_unit)
    for n in tl.static_range(len(dm)):
        position = Position(*now.positions[n])
        scale = tl.load(norm_c.scale_c_ptr + position.row, mask=position.valid, other=0.0)
        of_c = normalise_backward(d[n], unit_c[n], scale, sum_d[n % 2] / H, sum_d_unit[n % 2] / H)
        outputs = outputs + ((dz_o[n], of_c),)
    return outputs


@triton.jit
def cells_backward(dc, activations, dm, outputs, now, peepholes, cell, S: tl.constexpr):
    """(dz, gradient of c before the step) of each cell; zero in padding, where every factor was loaded as zero."""
    dz, dc_before = (), ()
    for n in tl.static_range(len(dc)):
        each, gates, c_prev = Cells(*now.cells[n]), activations.gates[n], activations.c_prev[n]
        of_c = tl.where(each.valid, dc[n], 0.0)
        of_c, c, from_zoneout = indexing.zoneout_c_backward(
            of_c, cell.zoneout_c_ptr, gates, activations.c[n], c_prev, each, S
        )
        if outputs is None:
            of_gates, of_c_prev = cell_backward(gates, c_prev, c, dm[n], of_c, peepholes[n], S)
        else:
            dz_o, of_c_by_m = outputs[n]
            of_gates, of_c_prev = gates_backward(gates, c_prev, dz_o, of_c + of_c_by_m, peepholes[n])
        if cell.zoneout_c_ptr is not None:
            of_c_prev += from_zoneout
        dz, dc_before = dz + (of_gates,), dc_before + (of_c_prev,)
    return dz, dc_before


@triton.jit
def normed_products_backward(dz, now, owned, norm_hh, H: tl.constexpr, DTYPE: tl.constexpr):
    """Gradients of LN(W_hh h) of each cell -> of W_hh h."""
    d, unit_hh, sums, sums_unit, dz_hh = (), (), (), (), ()
    for n in tl.static_range(len(dz)):
        unit, cell = owned.units[n], Cells(*now.cells[n])
        gain = indexing.load_gates(norm_hh.gain_hh_ptr, unit, unit < H, H)
        unit_hh = unit_hh + (indexing.load_gates(norm_hh.unit_hh_ptr, cell.gates_at, cell.valid, H),)
        of_unit, sum_d, sum_d_unit = gates_of_unit(dz[n], gain, unit_hh[n], DTYPE)
        d, sums, sums_unit = d + (of_unit,), sums + (sum_d,), sums_unit + (sum_d_unit,)
    sum_d, sum_d_unit = sum_over_units(sums), sum_over_units(sums_unit)
    for n in tl.static_range(len(dz)):
        position = Position(*now.positions[n])
        scale = tl.load(norm_hh.scale_hh_ptr + position.row, mask=position.valid, other=0.0)
        mean_d, mean_d_unit = sum_d[n % 2] / (4 * H), sum_d_unit[n % 2] / (4 * H)
        dz_hh = dz_hh + (normalise_gates_backward(d[n], unit_hh[n], scale, mean_d, mean_d_unit),)
    return dz_hh


@triton.jit
def product_with_dz(weights, dz, elements, owned, turn, DTYPE: tl.constexpr, S: tl.constexpr):
    """W_hh^T dz of each cell, gate by gate: of each gate and then cell, `elements` is the place in a row of dz."""
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    operand, products, dh = (), (), ()
    for gate in tl.static_range(4 - GATES, 4):
        for n in tl.static_range(len(dz)):
            operand = operand + (dz[n][gate].to(DTYPE),)
    shared = share(operand, owned.columns, elements, turn, GATES * S.CHUNKS)
    for gate in tl.static_range(GATES):
        words = take(shared, gate * S.CHUNKS, S.CHUNKS, GATES * S.CHUNKS, S.WARPS)
        products = products + (product(weights[gate], words, DTYPE),)
    for n in tl.static_range(len(dz)):
        of_two = products[0][n] + products[1][n]
        dh = dh + (of_two + (products[2][n] + products[3][n] if GATES == 4 else products[2][n]),)
    return dh


@triton.jit(do_not_specialize=["T", "B"])
def lstm_resident_backward_kernel(
    weights_ptr,  # [GATES, H, W] int32: W_hh^T of each gate
    hidden: HiddenBackward,  # dh_from_zoneout is written at the first step alone
    cell: CellBackward, saved: Saved, norm_hh: NormHH, norm_c: NormC, dh_total_ptr, lengths_ptr, resets_ptr, T, B,
    S: tl.constexpr,
):  # fmt: skip
    """All steps of a batch tile, from the last to the first."""
    H: tl.constexpr = S.H
    GATES: tl.constexpr = S.GATES
    DTYPE: tl.constexpr = saved.gates_ptr.dtype.element_ty
    CELLS: tl.constexpr = S.UNITS // S.WARPS // 4
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    owned = cells_of_thread(batch, S)

    # The rows of W_hh^T of the warp's units, gate by gate, once.
    rows, weights, elements_of_dz, peepholes = (), (), (), ()
    first_word = threads(S.WARPS).quarter * 4
    for n in tl.static_range(CELLS // 2):
        rows = rows + (tl.where(owned.units[2 * n] < H, owned.units[2 * n], -1),)
    for gate in tl.static_range(GATES):
        of_gate = weights_ptr + gate * H * S.W
        weights = weights + (load_weights(of_gate, rows, first_word, S.W, 16, DTYPE, S.CHUNKS),)
        for n in tl.static_range(CELLS):  # the gates of UNITS units are a row of K
            elements_of_dz = elements_of_dz + (gate * S.UNITS + owned.units[n],)

    # Gradients of the state after the current step: at a sequence's last step, those of the final state.
    dh, dc = (), ()
    states = cells_at_step(0, owned, batch, S).cells
    for n in tl.static_range(CELLS):
        peepholes = peepholes + (indexing.load_peepholes(cell.weight_peephole_ptr, owned.units[n], H),)
        state = Cells(*states[n])
        dh_n = tl.zeros((32 * S.WARPS,), tl.float32)
        if hidden.dh_n_ptr is not None:
            dh_n += tl.load(hidden.dh_n_ptr + state.state_at, mask=state.in_tile, other=0.0).to(tl.float32)
        dh = dh + (dh_n,)
        dc = dc + (tl.load(cell.dc_ptr + state.state_at, mask=state.in_tile, other=0.0),)
    for back in range(T):
        now = cells_at_step(T - 1 - back, owned, batch, S)
        activations = load_saved(now, owned, saved, batch, S)
        dm, dh_from_zoneout = output_gradients(dh, now, hidden)
        outputs = None
        if norm_c.gain_c_ptr is not None:
            outputs = normed_outputs_backward(activations.gates, dm, now, owned, norm_c, H)
        dz, dc_before = cells_backward(dc, activations, dm, outputs, now, peepholes, cell, S)
        dz_hh = dz
        if norm_hh.gain_hh_ptr is not None:
            dz_hh = normed_products_backward(dz, now, owned, norm_hh, H, DTYPE)
        dh_of_product = product_with_dz(weights, dz_hh, elements_of_dz, owned, back % 2, DTYPE, S)

        dh_after, dc_after, dh, dc = dh, dc, (), ()
        for n in tl.static_range(CELLS):
            each, dh_before = Cells(*now.cells[n]), dh_of_product[n]
            indexing.store_gates(cell.dgates_ptr, each.gates_at, each.in_tile, dz[n], H)
            if norm_c.gain_c_ptr is not None:
                tl.store(dh_total_ptr + each.at, dm[n], mask=each.in_tile)
            if hidden.dropout_h_ptr is not None:
                dh_before *= tl.load(hidden.dropout_h_ptr + each.state_at, mask=each.in_tile, other=0.0).to(tl.float32)
            if hidden.zoneout_h_ptr is not None:
                dh_before += dh_from_zoneout[n]
                is_first = each.continues & (tl.zeros_like(owned.units[n]) + now.step == 0)
                tl.store(hidden.dh_from_zoneout_ptr + each.state_at, dh_from_zoneout[n], mask=is_first)
            if hidden.dreset_h_ptr is not None:
                tl.store(hidden.dreset_h_ptr + each.at, dh_from_zoneout[n], mask=each.reset)
            if cell.dreset_c_ptr is not None:
                tl.store(cell.dreset_c_ptr + each.at, dc_before[n], mask=each.reset)
            # No gradient flows past a reset.
            dh = dh + (tl.where(each.valid, tl.where(each.continues, dh_before, 0.0), dh_after[n]),)
            dc = dc + (tl.where(each.valid, tl.where(each.continues, dc_before[n], 0.0), dc_after[n]),)
    for n in tl.static_range(CELLS):
        tl.store(cell.dc_ptr + Cells(*states[n]).state_at, dc[n], mask=Cells(*states[n]).in_tile)


MOST_REGISTERS = 160  # of a thread's 255 that may hold weights


def plans(problem: Problem, card: Card, backward: bool) -> Iterator[Plan]:
    """Where the registers of one block hold W_hh as operands of tensor cores."""
    if problem.projects_in_loop or problem.batch == 0 or problem.exact_float32:
        return
    units = max(128 // problem.size, power_of_two(problem.hidden))  # two chunks of K or more, as `share` requires
    warps = units // 16 if backward else min(8, units // 8)
    gates = CELLS[problem.cell].rows if backward else 4  # forward a tile of a product has four
    registers = gates * units * units * problem.size // (4 * 32 * warps)  # of a thread
    if warps <= 8 and registers <= MOST_REGISTERS:
        shared = 2 * 8 * units * problem.size * (gates if backward else 1)
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
    return {"weights_ptr": transposed_gates(r.inputs.weight_hh, CELLS[p.cell].rows, p.hidden)}


OPERANDS = forward_operands, backward_operands
