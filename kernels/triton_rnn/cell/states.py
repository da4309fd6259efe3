"""Loads and stores of the cells of a step, at their `Offsets`.

Every tensor of cells is [BB, BH] in a tile, or [THREADS] with the cell of each thread. A reset replaces the state
before a step by zero, or by a state that the call gives. The pointer to that state is None if the call gives none.
"""

import triton
import triton.language as tl

from ..equations import next_cell
from .noise import dropout, load_share, zoneout, zoneout_backward


@triton.jit
def reset_to(before, reset_ptr, cells):
    """Add the state that a reset gives to `before`, the state before a step, which is zero where it is reset."""
    if reset_ptr is not None:
        before += tl.load(reset_ptr + cells.at, mask=cells.reset, other=0.0).to(tl.float32)
    return before


@triton.jit
def load_state(state_ptr, at, reset_ptr, cells):
    """Load the state before a step, in float32: from the offsets `at`, and where it is reset, from the given state."""
    before = tl.load(state_ptr + at, mask=cells.continues, other=0.0).to(tl.float32)
    return reset_to(before, reset_ptr, cells)


@triton.jit
def store_gradient(d, gradient_ptr, dreset_ptr, cells):
    """Store the gradient d of the state before a step.

    No gradient flows past a reset. There d is the gradient of the state that the reset gives, and gradient_ptr gets
    zero.
    """
    if dreset_ptr is not None:
        tl.store(dreset_ptr + cells.at, d, mask=cells.reset)
    tl.store(gradient_ptr + cells.state_at, tl.where(cells.continues, d, 0.0), mask=cells.valid)


@triton.jit
def load_gates(gates_ptr, at, mask, H: tl.constexpr, AS_STORED: tl.constexpr = False, COUNT: tl.constexpr = 4):
    """Load COUNT gates of each cell from a tensor [rows, 4H], as a tuple. `at` has the offsets of the first gate.

    They are converted to float32, unless AS_STORED is true.
    """
    gates = ()
    for n in tl.static_range(COUNT):
        gate = tl.load(gates_ptr + at + n * H, mask=mask, other=0.0)
        gates = gates + (gate if AS_STORED else gate.to(tl.float32),)
    return gates


@triton.jit
def store_gates(gates_ptr, at, mask, gates, H: tl.constexpr):
    """Store four gates of each cell where load_gates loads them, rounded to the tensor's dtype. Do nothing for None."""
    if gates_ptr is not None:
        for n in tl.static_range(4):
            tl.store(gates_ptr + at + n * H, gates[n], mask=mask)


@triton.jit
def load_constants(constants_ptr, unit, H: tl.constexpr, COUNT: tl.constexpr = 3):
    """Load COUNT constants of each unit from a tensor [COUNT H], in float32: peepholes or b_hh.

    Returns a tuple, which is empty if the pointer is None.
    """
    constants = ()
    if constants_ptr is not None:
        for n in tl.static_range(COUNT):
            constant = tl.load(constants_ptr + n * H + unit, mask=unit < H, other=0.0)
            constants = constants + (constant.to(tl.float32),)
    return constants


@triton.jit
def load_constants_forward(cell, unit, S: tl.constexpr):
    """Load the constants of cell_forward: the peepholes [3H] of an LSTM, or b_hh [GATES H] of a GRU."""
    peepholes = load_constants(cell.weight_peephole_ptr, unit, S.H)
    return peepholes + load_constants(cell.bias_hh_ptr, unit, S.H, S.GATES)


@triton.jit
def load_cells(c_prev_ptr, cell, cells, B, S: tl.constexpr):
    """Load the inputs of cell_forward from memory.

    Returns (the part of the pre-activations that comes from the input, as stored, c before the step, the rest before
    the step).
    """
    x = load_gates(cell.gates_ptr, cells.gates_at, cells.valid, S.H, True, S.FROM_X)
    c_prev = load_state(c_prev_ptr, cells.state_at, cell.reset_c_ptr, cells)
    return x, c_prev, load_rest(c_prev_ptr, cells, cells.continues, B, S.EMPTY, S)


@triton.jit
def save(gates, c, cell, cells, H: tl.constexpr):
    """Store the activated gates and c of a step for the backward pass, unless c_ptr is None. In padding c is zero."""
    if cell.c_ptr is not None:
        store_gates(cell.gates_ptr, cells.gates_at, cells.valid, gates, H)
        tl.store(cell.c_ptr + cells.at, tl.where(cells.valid, c, 0.0), mask=cells.in_tile)


@triton.jit
def load_saved(saved, step, cells, H: tl.constexpr):
    """Load (the four activated gates of a step, c after zoneout, load_c_before), all as stored.

    `as_float` converts the result. A thread waits for the loads only there.
    """
    gates = load_gates(saved.gates_ptr, cells.gates_at, cells.valid, H, True)
    c = tl.load(saved.c_ptr + cells.at, mask=cells.valid, other=0.0)
    return gates, c, load_c_before(saved, step, cells)


@triton.jit
def load_c_before(saved, step, cells):
    """Load c before a step, as the forward pass saved it.

    Returns a tuple of terms, for `total`: c0 at the first step, c at later steps, and the c that a reset gives. At most
    one term is not zero. A thread waits for the loads only where it adds the terms.
    """
    is_first = tl.zeros(cells.prev_at.shape, tl.int32) + step == 0
    first = tl.load(saved.c0_ptr + cells.prev_at, mask=cells.continues & is_first, other=0.0)
    later = tl.load(saved.c_ptr + cells.prev_at, mask=cells.continues & ~is_first, other=0.0)
    terms = (first, later)
    if saved.reset_c_ptr is not None:
        terms = terms + (reset_to(0.0, saved.reset_c_ptr, cells),)
    return terms


@triton.jit
def as_float(loaded, zoneout_c_ptr, S: tl.constexpr):
    """Convert the result of load_saved to float32: (gates, c before zoneout, c before the step).

    The forward pass saved c after zoneout. With zoneout of c this computes c before zoneout again.
    """
    stored, c, terms = loaded
    i, f, g, o = stored
    gates, c_prev = (i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)), total(terms)
    if zoneout_c_ptr is not None:
        c = next_cell(gates, c_prev, S)
    return gates, c, c_prev


@triton.jit
def total(terms):
    """Return c before a step, the sum of the terms from load_c_before."""
    c_prev = terms[0] + terms[1]
    if len(terms) == 3:
        c_prev += terms[2]
    return c_prev


# The rest is a tuple of the numbers that a cell keeps of a unit besides c, see kernels/equations.py. The tensors c0,
# c_n and their gradients are [KEPT, B, H]. The first [B, H] of each is c, and the rest follows.


@triton.jit
def load_rest(c_ptr, cells, mask, B, OTHER: tl.constexpr, S: tl.constexpr):
    """Load the rest, or its gradient, where `mask` is true. Elsewhere it is OTHER."""
    rest = ()
    if S.KEPT > 1:
        rest = (tl.load(c_ptr + tl.cast(B, tl.int64) * S.H + cells.state_at, mask=mask, other=OTHER),)
    return rest


@triton.jit
def select(mask, rest, others):
    """Return `rest` where `mask` is true, and `others` elsewhere."""
    selected = ()
    for n in tl.static_range(len(rest)):
        selected = selected + (tl.where(mask, rest[n], others[n]),)
    return selected


@triton.jit
def store_rest(c_ptr, rest, cells, mask, B, S: tl.constexpr):
    """Store the rest, or its gradient, where load_rest loads it."""
    if S.KEPT > 1:
        tl.store(c_ptr + tl.cast(B, tl.int64) * S.H + cells.state_at, rest[0], mask=mask)


@triton.jit
def store_gradient_of_rest(dc_ptr, drest, cells, B, S: tl.constexpr):
    """Store the gradient of the rest before a step. It is zero after a reset, since no gradient flows past a reset."""
    store_rest(dc_ptr, select(cells.continues, drest, (0.0,)), cells, cells.valid, B, S)


@triton.jit
def load_h_before(hidden, h_prev_ptr, prev_at, cells):
    """Load (h before a step, the share of h that stays), for `zoneout`. The tuple is empty without zoneout of h."""
    before = ()
    if hidden.zoneout_h_ptr is not None:
        h_prev = load_state(h_prev_ptr, prev_at, hidden.reset_h_ptr, cells)
        before = (h_prev,) + load_share(hidden.zoneout_h_ptr, cells)
    return before


@triton.jit
def store_hidden(h, hidden, before, cells):
    """Apply zoneout to h, store it, and store it as h_n where a sequence ends. Return it.

    `before` is from load_h_before.
    """
    h = zoneout(h, before)
    tl.store(hidden.h_ptr + cells.at, h, mask=cells.in_tile)
    tl.store(hidden.h_n_ptr + cells.state_at, h, mask=cells.in_tile & cells.is_last)
    return h


@triton.jit
def load_gradients_given(hidden, cells):
    """Load the terms of the gradient of h that exist before the product of the step.

    Returns two tuples, all tensors as stored, since a conversion would wait for the loads:

        given     dh of the step, and dh_n where a sequence ends, as far as the call has them
        stayed    with zoneout of h: the part of the next step's dh that stayed, and the share of h that stays
    """
    given, stayed = (), ()
    if hidden.dh_ptr is not None:
        given = given + (tl.load(hidden.dh_ptr + cells.at, mask=cells.valid, other=0.0),)
    if hidden.dh_n_ptr is not None:
        given = given + (tl.load(hidden.dh_n_ptr + cells.state_at, mask=cells.valid & cells.is_last, other=0.0),)
    if hidden.zoneout_h_ptr is not None:
        dh = tl.load(hidden.dh_from_zoneout_ptr + cells.state_at, mask=cells.valid, other=0.0)
        stayed = (dh,) + load_share(hidden.zoneout_h_ptr, cells)
    return given, stayed


@triton.jit
def gradient_of_h(dh, loaded, hidden, cells):
    """Return the gradient of the h that this step computed, before zoneout.

    `dh` is the product W_hh^T dgates of the next step, and `loaded` is from load_gradients_given. With zoneout of h the
    part that stays is stored in dh_from_zoneout, where the step before loads it.
    """
    given, stayed = loaded
    dh = dropout(dh, hidden.dropout_h_ptr, cells.state_at, cells.valid)
    for n in tl.static_range(len(given)):
        dh += given[n].to(tl.float32)
    if len(stayed) > 0:
        dh, stays = zoneout_backward(dh + stayed[0], stayed[1:])
        store_gradient(stays, hidden.dh_from_zoneout_ptr, hidden.dreset_h_ptr, cells)
    return dh
