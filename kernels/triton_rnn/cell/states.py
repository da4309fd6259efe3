"""What a step loads of its cells, from memory or as forward saved it, and what it stores, by their `Offsets`.

A reset makes the state before a step zero, or one that the call gives: its pointer is None if it gives none.
"""

import triton
import triton.language as tl

from ..equations import next_cell
from .noise import dropout, load_share, zoneout, zoneout_backward


@triton.jit
def reset_to(before, reset_ptr, cells):
    """The state before a step, zero where it is reset -> there what it is reset to."""
    if reset_ptr is not None:
        before += tl.load(reset_ptr + cells.at, mask=cells.reset, other=0.0).to(tl.float32)
    return before


@triton.jit
def load_state(state_ptr, at, reset_ptr, cells):
    """The state before a step: the one that lies `at`, or what it is reset to."""
    before = tl.load(state_ptr + at, mask=cells.continues, other=0.0).to(tl.float32)
    return reset_to(before, reset_ptr, cells)


@triton.jit
def store_gradient(d, gradient_ptr, dreset_ptr, cells):
    """Store the gradient d of the state before a step. None flows past a reset: there it is that of the state given."""
    if dreset_ptr is not None:
        tl.store(dreset_ptr + cells.at, d, mask=cells.reset)
    tl.store(gradient_ptr + cells.state_at, tl.where(cells.continues, d, 0.0), mask=cells.valid)


@triton.jit
def load_gates(gates_ptr, at, mask, H: tl.constexpr, AS_STORED: tl.constexpr = False, COUNT: tl.constexpr = 4):
    """COUNT gates of a [rows, 4H] tensor; `at` is the offset of the first. AS_STORED: not converted to float32."""
    gates = ()
    for n in tl.static_range(COUNT):
        gate = tl.load(gates_ptr + at + n * H, mask=mask, other=0.0)
        gates = gates + (gate if AS_STORED else gate.to(tl.float32),)
    return gates


@triton.jit
def store_gates(gates_ptr, at, mask, gates, H: tl.constexpr):
    """The reverse of load_gates, rounded to the tensor's dtype, if there is a tensor."""
    if gates_ptr is not None:
        for n in tl.static_range(4):
            tl.store(gates_ptr + at + n * H, gates[n], mask=mask)


@triton.jit
def load_constants(constants_ptr, unit, H: tl.constexpr, COUNT: tl.constexpr = 3):
    """COUNT constants of some units, from [COUNT H]: peepholes, or b_hh of the gates; empty in a cell without."""
    constants = ()
    if constants_ptr is not None:
        for n in tl.static_range(COUNT):
            constant = tl.load(constants_ptr + n * H + unit, mask=unit < H, other=0.0)
            constants = constants + (constant.to(tl.float32),)
    return constants


@triton.jit
def load_constants_forward(cell, unit, S: tl.constexpr):
    """The constants of the cell forward."""
    peepholes = load_constants(cell.weight_peephole_ptr, unit, S.H)
    return peepholes + load_constants(cell.bias_hh_ptr, unit, S.H, S.GATES)


@triton.jit
def load_cells(c_prev_ptr, cell, cells, B, S: tl.constexpr):
    """(What comes to the gates from the input, as stored; c and the rest before the step.)"""
    x = load_gates(cell.gates_ptr, cells.gates_at, cells.valid, S.H, True, S.FROM_X)
    c_prev = load_state(c_prev_ptr, cells.state_at, cell.reset_c_ptr, cells)
    return x, c_prev, load_rest(c_prev_ptr, cells, cells.continues, B, S.EMPTY, S)


@triton.jit
def save(gates, c, cell, cells, H: tl.constexpr):
    """Store what backward reads of a step, if anything."""
    if cell.c_ptr is not None:
        store_gates(cell.gates_ptr, cells.gates_at, cells.valid, gates, H)
        tl.store(cell.c_ptr + cells.at, tl.where(cells.valid, c, 0.0), mask=cells.in_tile)


@triton.jit
def load_saved(saved, step, cells, H: tl.constexpr):
    """(Four activated gates of a step, c after zoneout, c before the step): for `as_float`, which waits for them."""
    gates = load_gates(saved.gates_ptr, cells.gates_at, cells.valid, H, True)
    c = tl.load(saved.c_ptr + cells.at, mask=cells.valid, other=0.0)
    return gates, c, load_c_before(saved, step, cells)


@triton.jit
def load_c_before(saved, step, cells):
    """c before a step, as forward saved it: terms, of which one is not zero."""
    is_first = tl.zeros(cells.prev_at.shape, tl.int32) + step == 0
    first = tl.load(saved.c0_ptr + cells.prev_at, mask=cells.continues & is_first, other=0.0)
    later = tl.load(saved.c_ptr + cells.prev_at, mask=cells.continues & ~is_first, other=0.0)
    terms = (first, later)
    if saved.reset_c_ptr is not None:
        terms = terms + (reset_to(0.0, saved.reset_c_ptr, cells),)
    return terms


@triton.jit
def as_float(loaded, zoneout_c_ptr, S: tl.constexpr):
    """What `load_saved` loaded, in float32, with c as the step computed it, before zoneout."""
    stored, c, terms = loaded
    i, f, g, o = stored
    gates, c_prev = (i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)), total(terms)
    if zoneout_c_ptr is not None:
        c = next_cell(gates, c_prev, S)
    return gates, c, c_prev


@triton.jit
def total(terms):
    """What load_c_before loaded."""
    c_prev = terms[0] + terms[1]
    if len(terms) == 3:
        c_prev += terms[2]
    return c_prev


# The rest is what a cell keeps of a unit beside c, a tuple, see equations.py: in c0, c_n and their gradients, which are
# [KEPT, B, H], it comes after c.


@triton.jit
def load_rest(c_ptr, cells, mask, B, OTHER: tl.constexpr, S: tl.constexpr):
    """The rest where `mask`, elsewhere OTHER; or its gradient."""
    rest = ()
    if S.KEPT > 1:
        rest = (tl.load(c_ptr + tl.cast(B, tl.int64) * S.H + cells.state_at, mask=mask, other=OTHER),)
    return rest


@triton.jit
def select(mask, rest, others):
    """The rest where `mask`, elsewhere the others."""
    selected = ()
    for n in tl.static_range(len(rest)):
        selected = selected + (tl.where(mask, rest[n], others[n]),)
    return selected


@triton.jit
def store_rest(c_ptr, rest, cells, mask, B, S: tl.constexpr):
    """The reverse of load_rest."""
    if S.KEPT > 1:
        tl.store(c_ptr + tl.cast(B, tl.int64) * S.H + cells.state_at, rest[0], mask=mask)


@triton.jit
def store_gradient_of_rest(dc_ptr, drest, cells, B, S: tl.constexpr):
    """Store the gradient of the rest before a step; none flows past a reset."""
    store_rest(dc_ptr, select(cells.continues, drest, (0.0,)), cells, cells.valid, B, S)


@triton.jit
def load_h_before(hidden, h_prev_ptr, prev_at, cells):
    """For `zoneout`: h before a step, and the share of it that stays; empty without zoneout."""
    before = ()
    if hidden.zoneout_h_ptr is not None:
        h_prev = load_state(h_prev_ptr, prev_at, hidden.reset_h_ptr, cells)
        before = (h_prev,) + load_share(hidden.zoneout_h_ptr, cells)
    return before


@triton.jit
def store_hidden(h, hidden, before, cells):
    """Store h after zoneout, and h_n where a sequence ends; returns that h. `before` is of `load_h_before`."""
    h = zoneout(h, before)
    tl.store(hidden.h_ptr + cells.at, h, mask=cells.in_tile)
    tl.store(hidden.h_n_ptr + cells.state_at, h, mask=cells.in_tile & cells.is_last)
    return h


@triton.jit
def load_gradients_given(hidden, cells):
    """(The gradients of the step's h that backward is given, and of h_n where a sequence ends; with zoneout, what
    stayed of the next h's, and the share of h that stays.) They are as stored: to convert them is to wait for them."""
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
    """From dh, the next step's product, and what load_gradients_given loaded: the gradient of the h that this step
    computed. dh_from_zoneout hands what stays to the step before."""
    given, stayed = loaded
    dh = dropout(dh, hidden.dropout_h_ptr, cells.state_at, cells.valid)
    for n in tl.static_range(len(given)):
        dh += given[n].to(tl.float32)
    if len(stayed) > 0:
        dh, stays = zoneout_backward(dh + stayed[0], stayed[1:])
        store_gradient(stays, hidden.dh_from_zoneout_ptr, hidden.dreset_h_ptr, cells)
    return dh
