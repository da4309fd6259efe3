"""The resident family: one launch runs the whole sequence, W_hh stays on chip, and programs exchange nothing.

A program owns 8 sequences and all hidden units, or the units of one head. The warps share the units. One step:

    registers of each warp           shared memory, two buffers      registers of each warp
    ------------------------         ---------------------------     -----------------------------------
    h of the warp's own cells --->   h of all units            --->  h of all units, the operand B
                          to_shared  [8 sequences, D]          take
                                     one barrier a step              W_hh of the warp's units, the operand A,
                                                                     loaded once before the first step
                                                                       |  product: A B, sums in registers
                                                                       v
    memory: x W_ih^T + b  ------------------------------------->     z of exactly the warp's own cells
    (loaded while the product runs)                                    |  cell_forward, output
                                                                       v
    memory: h, c, activated gates  <--------------------------------  h and c of the warp's own cells

Without any option, the forward kernel of an LSTM does this:

    W = the rows of W_hh of the warp's units                   stays in registers
    h, c = h0, c0 of the thread's cells                        stay in registers
    for step in range(T):
        z_x = load gates[step]                                 x W_ih^T + b of the thread's cells
        shared[step % 2] = h, then wait for all warps          to_shared: h of all units
        z_h = W shared[step % 2]                               take, product
        i, f, g, o = sigmoid or tanh of z_x + z_h              cell_forward
        c = f c + i g, h = o tanh(c)
        store h, c, and i, f, g, o

The backward kernel, with W^T = the columns of W_hh of the warp's units:

    dh, dc = the gradients of h_n and c_n
    for step in range(T - 1, -1, -1):
        load i, f, g, o, c, c_prev                             load_step
        dh = dh + the gradient of the output
        dz, dc = the gradients that come from dh and dc        output_backward, cell_backward
        shared[step % 2] = dz, then wait for all warps
        dh = W^T shared[step % 2]                              product_with_dz
        store dz

Backward computes the cells of a step first, and then the product W_hh^T dz, which is dh of the step before. So dz takes
the place of h, and W_hh^T the place of W_hh. The cells need the loads of their step at once, so no product can hide the
latency of these loads. The product is computed for one gate after another, and the results are added.

The layout of mma.sync decides which cells a thread owns. fragments.py defines `column` and `quarter`, the two numbers
of a thread in this layout (groupID and threadID_in_group in the PTX ISA). Cell n of a thread belongs to the unit
8 (n // 2) + column of the warp, and to the sequence 2 quarter + n % 2. So a thread keeps its cells from step to step,
and nothing is exchanged after the product. Each quantity of a cell is a tuple, which has a tensor [THREADS] for each of
the thread's cells.

Example: 64 units and 8 warps, so a warp has 8 units, and a thread has two cells. Thread 37 is lane 5 of warp 1, so its
column is 5 // 4 = 1, and its quarter is 5 % 4 = 1. It owns the unit 8 + 1 = 9 of the sequences 2 and 3.

Triton 3.4 to 3.6 lose the field names of a named tuple that is appended to a tuple. Offsets(*cells[n]) restores them.
"""

from collections import namedtuple

import triton
import triton.language as tl

from ..cell import indexing, noise, states
from ..cell.indexing import Batch, Offsets, Sequences
from ..equations import after_zeros, cell_backward, cell_forward, output, output_backward
from ..parameters import CellBackward, CellPointers, HiddenBackward, HiddenPointers, Saved, name_in_profiles
from .fragments import SEQUENCES, load_words, product, take, threads, to_shared

# The cells of each thread. Every field is a tuple with one entry for each cell: its unit, the unit's place in the head
# of the program and the sequence's slot, its number in the batch tile, all [THREADS], and its Sequences.
Owned = namedtuple("Owned", "units places slots sequences")


@triton.jit
def cells_of_thread(batch, S: tl.constexpr):
    """Return the Owned cells of each thread."""
    thread = threads(S.WARPS)
    units, places, slots, sequences = (), (), (), ()
    for n in tl.static_range(S.UNITS // S.WARPS // 4):  # a warp's units times 8 sequences, shared out among 32 lanes
        places = places + (thread.warp * (S.UNITS // S.WARPS) + n // 2 * 8 + thread.column,)
        units = units + (indexing.units_at(places[n], S),)
        slots = slots + (2 * thread.quarter + n % 2,)
        sequences = sequences + (indexing.sequences(tl.program_id(0) * SEQUENCES + slots[n], batch),)
    return Owned(units, places, slots, sequences)


@triton.jit
def cells_at_step(step, owned, batch, S: tl.constexpr):
    """Return the Offsets of each cell at a step, as a tuple."""
    cells = ()
    for n in tl.static_range(len(owned.units)):
        sequence = Sequences(*owned.sequences[n])
        position = indexing.position(step, sequence, batch, S.REVERSE)
        cells = cells + (indexing.cells_at(sequence, position, owned.units[n], owned.places[n] < S.D, S.H),)
    return cells


@triton.jit
def load_weights(weights_ptr, owned, DTYPE: tl.constexpr, S: tl.constexpr):
    """Load the rows of W_hh of the warp's units, as load_words returns them.

    Each 8 rows are one gate of 8 units: first all gates of the first 8 units, then all gates of the next 8. A tile has
    16 rows. If the number of rows is not a multiple of 16, the last 8 rows are zeros.
    """
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    rows = ()
    for n in tl.static_range(GATES * len(owned.units) // 2):
        unit, place = owned.units[n // GATES * 2], owned.places[n // GATES * 2]
        rows = rows + (tl.where(place < S.D, n % GATES * S.H + unit, -1),)
    if len(rows) % 2 > 0:
        rows = rows + (tl.full((32 * S.WARPS,), -1, tl.int32),)
    return load_words(weights_ptr, rows, threads(S.WARPS).quarter * 4, S.W, 16, DTYPE, S.CHUNKS)


@triton.jit(repr=name_in_profiles("resident_forward_kernel"), do_not_specialize=["T", "B"])
def resident_forward_kernel(
    weights_ptr,  # [GATES H, W] int32: W_hh
    hidden: HiddenPointers, cell: CellPointers, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """Run all steps forward for a batch tile of 8 sequences. The grid is (batch tiles, 1, heads)."""
    DTYPE: tl.constexpr = cell.gates_ptr.dtype.element_ty
    EMPTY: tl.constexpr = S.EMPTY  # Triton 3.4 takes no field of a tuple into another tuple
    SUMS: tl.constexpr = 2 * S.GATES  # sums of a thread for 8 units, alternately for two cells
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    owned = cells_of_thread(batch, S)

    weights = load_weights(weights_ptr, owned, DTYPE, S)
    h, c, rest, constants = (), (), (), ()
    first = cells_at_step(0, owned, batch, S)
    for n in tl.static_range(len(owned.units)):
        unit, cells = owned.units[n], Offsets(*first[n])
        constants = constants + (states.load_constants_forward(cell, unit, S),)
        h = h + (tl.load(hidden.h0_ptr + cells.state_at, mask=cells.in_tile, other=0.0),)
        c = c + (tl.load(cell.c0_ptr + cells.state_at, mask=cells.in_tile, other=0.0),)
        rest = rest + (states.load_rest(cell.c0_ptr, cells, cells.in_tile, B, S.EMPTY, S),)
    for step in range(T):
        now = cells_at_step(step, owned, batch, S)
        # Load: x W_ih^T + b of the gates, and the state before the step. The product should hide the latency.
        z_x, h_before, operand, c_before, rest_before = (), (), (), (), rest
        for n in tl.static_range(len(owned.units)):
            cells = Offsets(*now[n])
            z_x = z_x + (states.load_gates(cell.gates_ptr, cells.gates_at, cells.valid, S.H, False, S.FROM_X),)
            h_before = h_before + (tl.where(cells.reset, 0.0, h[n]).to(DTYPE),)
            h_float = h_before[n].to(tl.float32)
            h_float = noise.dropout(h_float, hidden.dropout_h_ptr, cells.state_at, cells.in_tile)
            operand = operand + (h_float.to(DTYPE),)
            c_prev = tl.where(cells.reset, 0.0, c[n])
            c_before = c_before + (states.reset_to(c_prev, cell.reset_c_ptr, cells),)

        # Product: z_h = W_hh h, the part of z that comes from h, for the thread's cells.
        shared = to_shared(operand, owned.slots, owned.places, step % 2, S.CHUNKS)
        products = product(weights, take(shared, 0, S.CHUNKS, S.CHUNKS, S.WARPS), DTYPE)

        # Gates and cell, then store.
        h, c, rest = (), (), ()
        for n in tl.static_range(len(owned.units)):
            cells, c_prev = Offsets(*now[n]), c_before[n]
            # In an LSTM, SUMS is 8. The sums of a thread for 8 units are i0 i1 f0 f1 g0 g1 o0 o1, where 0 and 1 are its
            # two sequences. Cell 0 takes sums 0, 2, 4 and 6, cell 1 takes 1, 3, 5 and 7. The next 8 units begin at 8.
            z_h = after_zeros(products[n // 2 * SUMS + n % 2 : n // 2 * SUMS + SUMS : 2])
            rest_prev = states.select(~cells.reset, rest_before[n], (EMPTY,))
            # Each cell is stored before the next one is computed. The gates of few cells wait in registers then, and
            # the kernel needs fewer instructions.
            gates, c_next, rest_next = cell_forward(
                z_x[n], z_h, c_prev, rest_prev, constants[n], len(constants[n]) > 0, S
            )
            h_next = output(gates[3], c_next, S)
            c_next = noise.zoneout(c_next, (c_prev,) + noise.load_share(cell.zoneout_c_ptr, cells))
            h_prev = states.reset_to(h_before[n].to(tl.float32), hidden.reset_h_ptr, cells)
            h_next = noise.zoneout(h_next, (h_prev,) + noise.load_share(hidden.zoneout_h_ptr, cells))
            h_next = tl.where(cells.valid, h_next, 0.0).to(DTYPE)  # h is zero in padding, and the state stays
            tl.store(hidden.h_ptr + cells.at, h_next, mask=cells.in_tile)
            states.save(gates, c_next, cell, cells, S.H)
            h = h + (tl.where(cells.valid, h_next, h_before[n]),)
            c = c + (tl.where(cells.valid, c_next, c_prev),)
            rest = rest + (states.select(cells.valid, rest_next, rest_prev),)
    for n in tl.static_range(len(owned.units)):
        cells = Offsets(*first[n])
        tl.store(hidden.h_n_ptr + cells.state_at, h[n], mask=cells.in_tile)
        tl.store(cell.c_n_ptr + cells.state_at, c[n], mask=cells.in_tile)
        states.store_rest(cell.c_n_ptr, rest[n], cells, cells.in_tile, B, S)


@triton.jit
def load_transposed(weights_ptr, owned, DTYPE: tl.constexpr, S: tl.constexpr):
    """Load W_hh^T of the warp's units.

    Returns a tuple with the weights of each gate, and a tuple with the place in a row of dz of each gate of each cell,
    in the order of product_with_dz.
    """
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    rows, weights, elements = (), (), ()
    for n in tl.static_range(0, len(owned.units), 2):
        rows = rows + (tl.where(owned.places[n] < S.D, owned.units[n], -1),)
    for gate in tl.static_range(GATES):
        gate_ptr = weights_ptr + gate * S.H * S.W
        quads = load_words(gate_ptr, rows, threads(S.WARPS).quarter * 4, S.W, 16, DTYPE, S.CHUNKS)
        weights = weights + (quads,)
        for n in tl.static_range(len(owned.units)):  # the gates of UNITS units are a row of K
            elements = elements + (gate * S.UNITS + owned.places[n],)
    return weights, elements


@triton.jit
def product_with_dz(weights, dz, elements, owned, buffer, DTYPE: tl.constexpr, S: tl.constexpr):
    """Return W_hh^T dz of each cell, as a tuple. It multiplies one gate at a time.

    `weights` and `elements` are from load_transposed. `elements` has all cells of the first gate, then of the next
    gate.
    """
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    operand, products, dh = (), (), ()
    for gate in tl.static_range(4 - GATES, 4):
        for n in tl.static_range(len(dz)):
            operand = operand + (dz[n][gate].to(DTYPE),)
    shared = to_shared(operand, owned.slots, elements, buffer, GATES * S.CHUNKS)
    for gate in tl.static_range(GATES):
        words = take(shared, gate * S.CHUNKS, S.CHUNKS, GATES * S.CHUNKS, S.WARPS)
        products = products + (product(weights[gate], words, DTYPE),)
    for n in tl.static_range(len(dz)):
        total = products[0][n] if GATES == 1 else products[0][n] + products[1][n]
        if GATES > 2:  # added in pairs: a sum of one after the other would take one more register, and spill
            total += products[2][n] + products[3][n] if GATES == 4 else products[2][n]
        dh = dh + (total,)
    return dh


@triton.jit
def load_gradients_of_final_state(dh_n_ptr, dc_ptr, cells, S: tl.constexpr):
    """Load the gradients of h_n and c_n, each [THREADS] float32. Without dh_n the first is zero."""
    dh_n = tl.zeros((32 * S.WARPS,), tl.float32)
    if dh_n_ptr is not None:
        dh_n += tl.load(dh_n_ptr + cells.state_at, mask=cells.in_tile, other=0.0).to(tl.float32)
    return dh_n, tl.load(dc_ptr + cells.state_at, mask=cells.in_tile, other=0.0)


@triton.jit
def load_step(saved, cell, step, now, B, S: tl.constexpr):
    """Load (the activations of a step, as states.as_float returns them, the gradient of the rest after the step).

    Both are tuples with one entry for each cell. The gradient of the rest stays in memory between steps, since no
    registers are left for it during the product.
    """
    activations, drest = (), ()
    for n in tl.static_range(len(now)):
        cells = Offsets(*now[n])
        saved_n = states.load_saved(saved, step, cells, S.H)
        activations = activations + (states.as_float(saved_n, cell.zoneout_c_ptr, S),)
        drest = drest + (states.load_rest(cell.dc_ptr, cells, cells.valid, B, 0.0, S),)
    return activations, drest


@triton.jit
def store_stayed(hidden, stayed, cells, step):
    """Store `stayed`, the gradient of h before a step through zoneout of h, at the first step and where h was reset."""
    is_first = cells.continues & (tl.zeros(cells.at.shape, tl.int32) + step == 0)
    tl.store(hidden.dh_from_zoneout_ptr + cells.state_at, stayed, mask=is_first)
    if hidden.dreset_h_ptr is not None:
        tl.store(hidden.dreset_h_ptr + cells.at, stayed, mask=cells.reset)


@triton.jit(repr=name_in_profiles("resident_backward_kernel"), do_not_specialize=["T", "B"])
def resident_backward_kernel(
    weights_ptr,  # [GATES, H, W] int32: W_hh^T of each gate
    hidden: HiddenBackward,  # dh_from_zoneout is written only at the first step
    cell: CellBackward, saved: Saved, lengths_ptr, resets_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """Run all steps backward, from the last to the first, for a batch tile. The grid is (batch tiles, 1, heads)."""
    DTYPE: tl.constexpr = saved.gates_ptr.dtype.element_ty
    batch = Batch(lengths_ptr, resets_ptr, T, B)
    owned = cells_of_thread(batch, S)

    # dh and dc are the gradients of the state after the current step. They begin as the gradients of h_n and c_n.
    weights, elements = load_transposed(weights_ptr, owned, DTYPE, S)
    dh, dc, peepholes, first = (), (), (), cells_at_step(0, owned, batch, S)
    for n in tl.static_range(len(owned.units)):
        dh_n, dc_n = load_gradients_of_final_state(hidden.dh_n_ptr, cell.dc_ptr, Offsets(*first[n]), S)
        peepholes = peepholes + (states.load_constants(cell.weight_peephole_ptr, owned.units[n], S.H),)
        dh, dc = dh + (dh_n,), dc + (dc_n,)
    for back in range(T):
        step = T - 1 - back
        now = cells_at_step(step, owned, batch, S)
        activations, drest = load_step(saved, cell, step, now, B, S)

        # Output and cell. In padding every factor was loaded as zero, so all gradients are zero.
        dh_stayed, dz, dc_prev = (), (), ()
        for n in tl.static_range(len(owned.units)):
            cells = Offsets(*now[n])
            gates, c, c_prev = activations[n]
            dm = tl.where(cells.valid, dh[n], 0.0)
            if hidden.dh_ptr is not None:
                dm += tl.load(hidden.dh_ptr + cells.at, mask=cells.valid, other=0.0).to(tl.float32)
            dm, stayed = noise.zoneout_backward(dm, noise.load_share(hidden.zoneout_h_ptr, cells))
            dz_o, dc_by_m = output_backward(gates[3], c, dm, S)
            dc_n = tl.where(cells.valid, dc[n], 0.0)
            d, dc_stayed = noise.zoneout_backward(dc_n, noise.load_share(cell.zoneout_c_ptr, cells))
            dz_n, d, drest_n = cell_backward(
                gates, c_prev, dz_o, d + dc_by_m, drest[n], peepholes[n], len(peepholes[n]) > 0, S
            )
            states.store_gradient_of_rest(cell.dc_ptr, drest_n, cells, B, S)
            dh_stayed, dz = dh_stayed + (stayed,), dz + (dz_n,)
            dc_prev = dc_prev + (noise.add_stayed(d, dc_stayed, cell.zoneout_c_ptr),)

        # Product: dh before the step = W_hh^T dz. The loop needs none at step 0, and kernels/layer.py computes dh0.
        dh_prev = product_with_dz(weights, dz, elements, owned, back % 2, DTYPE, S)

        # Store.
        dh_after, dc_after, dh, dc = dh, dc, (), ()
        for n in tl.static_range(len(owned.units)):
            cells = Offsets(*now[n])
            states.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz[n], S.H)
            d = noise.dropout(dh_prev[n], hidden.dropout_h_ptr, cells.state_at, cells.in_tile)
            if hidden.zoneout_h_ptr is not None:
                d += dh_stayed[n]
                store_stayed(hidden, dh_stayed[n], cells, step)
            if cell.dreset_c_ptr is not None:
                tl.store(cell.dreset_c_ptr + cells.at, dc_prev[n], mask=cells.reset)
            # No gradient flows past a reset.
            dh = dh + (tl.where(cells.valid, tl.where(cells.continues, d, 0.0), dh_after[n]),)
            dc = dc + (tl.where(cells.valid, tl.where(cells.continues, dc_prev[n], 0.0), dc_after[n]),)
    for n in tl.static_range(len(owned.units)):
        tl.store(cell.dc_ptr + Offsets(*first[n]).state_at, dc[n], mask=Offsets(*first[n]).in_tile)
