"""A step of a share of a batch but for its product, and all steps with it, as cupy_rnn/cuda/steps.cu has them.

A step is computed a tile of units at a time, of a divided step (see by_steps.py) the part from `start` to `end`. Steps
count in the order of processing; which time a step visits is said in triton_rnn/cell/indexing.py.
"""

from collections import namedtuple

import numpy as np
from numba import from_dtype, types

from .equations import gru, lstm, slstm
from .functions import cast, compiled, flags, numbers, take
from .product import COLUMNS, SEQUENCES, product
from .tile import (
    CONSTANTS, GATES, OF_H, ROWS, UNITS, ZERO, add, add_rows, blend, clear, copy, divide, fill, load, load_shares,
    multiply, row, store, vectors,
)  # fmt: skip

TENSORS = (
    "gates", "dgates", "z", "dz",  # [T*B, 4H]; of the step [B, 4H], with heads [B, heads, 4 D]
    "h", "dh", "dh_total", "reset_h", "c", "reset_c", "dreset_h", "dreset_c", "normed_c",  # [T*B, H]
    "h0", "h_n", "dh_n", "h_next", "dh_next", "dropout_h", "m", "o", "v", "dh_from_zoneout",  # [B, H]
    "c0", "c_n", "dc",  # [K, B, H]
    "weight_peephole", "bias_hh", "weight",  # [3H]; [heads, D, GATES D], backward [heads, GATES D, D]
    "zoneout_h", "zoneout_c", "rate_h", "rate_c",  # [T*B, H] bool; one float
    "resets", "lengths",  # [T*B] bool; [B] int64
    "scratch", "taken",  # [shares, SCRATCH]; one int64, how many shares
)  # fmt: skip
SIZES = "step", "share", "T", "B", "H", "heads", "from_x", "h_start", "reverse", "cell", "start", "end"
CALL = np.dtype([(name, np.int64) for name in (*TENSORS, *SIZES)])
"""What a call is; of tensors addresses, 0 where it has none. Threads take shares of so many sequences."""
call_at = cast(types.intp, from_dtype(CALL), "inttoptr")
CELLS = LSTM, GRU, SLSTM = range(3)
STOPS = OF_Z, OF_C, OF_M, OF_HIDDEN = range(4)
SCRATCH = ROWS * UNITS + SEQUENCES * COLUMNS  # float32 numbers: a tile, and a product's sums
SIZE = 4  # bytes of a number
EMPTY = -np.float32(np.inf)  # the REST of an empty state

Place = namedtuple("Place", "step valid continues last next_continues row at earlier state rest unit gates z n")
"""A tile's place: what holds for its sequence at a step, and where its units are in tensors.

No padding; the state before is that of the step before; the sequence ends; the state after reaches the next step; in
[T*B, *]; in [T*B, H], there a step before, in [B, H] and the second [B, H]; the unit; in [T*B, 4H], in z; how many.
"""


@compiled
def position(a, step, b):
    """(No padding, the row in [T*B, *], the state before is that of the step before, the sequence ends)."""
    length = numbers(a.lengths)[b] if a.lengths else a.T
    valid = step < length
    time = length - 1 - step if a.reverse and valid else step
    row = time * a.B + b
    # A reset at t separates t from t - 1 in both directions; the reverse direction comes from t + 1.
    later, there = (time + 1, row + a.B) if a.reverse else (time, row)
    reset = a.resets != 0 and later < length and flags(a.resets)[there] != 0
    return valid, row, valid and not reset, step == length - 1


@compiled
def place_of(a, step, b, head, u):
    """The place of the tile from unit u of a head."""
    valid, row, continues, last = position(a, step, b)
    width = a.H // a.heads
    unit = head * width + u
    at, state, back = row * a.H + unit, b * a.H + unit, a.B * a.H
    z, n = (b * a.heads + head) * 4 * width + u, min(UNITS, width - u)
    return Place(
        step, valid, continues, last, position(a, step + 1, b)[2], row, at, at + back if a.reverse else at - back,
        state, state + back, unit, row * 4 * a.H + unit, z, n,
    )  # fmt: skip


@compiled
def load_before(tile, states, there, initial, reset_to, p):
    """h or c before a step, in BEFORE: from the states of all times, the initial ones, or those to reset to."""
    if not p.continues:
        load(tile, row.BEFORE, reset_to, p.at, p.n)
    elif p.step == 0:
        load(tile, row.BEFORE, initial, p.state, p.n)
    else:
        load(tile, row.BEFORE, states, there, p.n)


@compiled
def load_c_before(a, tile, p):
    """Of an inference c lies where the step before stored it."""
    if a.c:
        load_before(tile, a.c, p.earlier, a.c0, a.reset_c, p)
    else:
        load_before(tile, a.c_n, p.state, a.c0, a.reset_c, p)


@compiled
def load_constants(a, tile, constants, p):
    for k in range(3):
        load(tile, CONSTANTS[k], constants, k * a.H + p.unit, p.n)


@compiled
def gates_and_cell(a, tile, p):
    """The gates, c in C, and that after zoneout in DV, which is stored."""
    width = a.H // a.heads
    for k in range(4):
        load(tile, GATES[k], a.gates if k < a.from_x else 0, p.gates + k * a.H, p.n)
        load(tile, OF_H[k], a.z, p.z + k * width, p.n)
    load_c_before(a, tile, p)
    copy(tile, row.C, row.BEFORE, p.n)
    if a.cell == LSTM:
        load_constants(a, tile, a.weight_peephole, p)
        lstm.forward(tile, vectors(p.n), a.weight_peephole != 0)
    elif a.cell == GRU:
        load_constants(a, tile, a.bias_hh, p)
        gru.forward(tile, vectors(p.n))
    else:
        load(tile, row.REST, a.c_n if p.step else a.c0, p.rest, p.n)
        if not p.continues:
            fill(tile, row.REST, EMPTY, p.n)
        slstm.forward(tile, vectors(p.n))
        store(a.c_n, p.rest, tile, row.REST, p.n)
    copy(tile, row.DV, row.C, p.n)
    if a.zoneout_c or a.rate_c:
        load_shares(tile, row.DZ_O, a.zoneout_c, a.rate_c, p.at, p.n)
        blend(tile, row.DV, row.BEFORE, row.DZ_O, p.n)
    store(a.c, p.at, tile, row.DV, p.n)
    if p.last or not a.c:
        store(a.c_n, p.state, tile, row.DV, p.n)
    if a.c:
        for k in range(4):
            store(a.gates, p.gates + k * a.H, tile, GATES[k], p.n)


@compiled
def store_h(a, tile, p):
    """h of m, which is in M, and what the next product multiplies."""
    if p.valid and (a.zoneout_h or a.rate_h):
        load_before(tile, a.h, p.earlier, a.h0, a.reset_h, p)
        load_shares(tile, row.DZ_O, a.zoneout_h, a.rate_h, p.at, p.n)
        blend(tile, row.M, row.BEFORE, row.DZ_O, p.n)
    store(a.h, p.at, tile, row.M, p.n)
    if p.last:
        store(a.h_n, p.state, tile, row.M, p.n)
    if p.next_continues:
        multiply(tile, row.M, a.dropout_h, p.state, p.n)
        store(a.h_next, p.state, tile, row.M, p.n)
    else:
        clear(a.h_next, p.state, p.n)


@compiled
def tile_after_product(a, tile, p):
    if a.start == OF_Z and p.valid:
        gates_and_cell(a, tile, p)
    elif a.start == OF_C:
        load(tile, GATES[3], a.o, p.state, p.n)
        load(tile, row.C, a.v, p.state, p.n)
    elif a.start == OF_M:
        load(tile, row.M, a.m, p.state, p.n)
    if not p.valid:
        for each in (GATES[3], row.C, row.M):
            fill(tile, each, ZERO, p.n)
        if a.start == OF_Z:
            clear(a.c, p.at, p.n)
    elif a.start != OF_M and a.end != OF_C:
        if a.cell == LSTM:
            lstm.output(tile, vectors(p.n))
        elif a.cell == GRU:
            copy(tile, row.M, row.C, p.n)
        else:
            slstm.output(tile, vectors(p.n))
    if a.end == OF_C:
        store(a.o, p.state, tile, GATES[3], p.n)
        store(a.v, p.state, tile, row.C, p.n)
    elif a.end == OF_M:
        store(a.m, p.state, tile, row.M, p.n)
    else:
        store_h(a, tile, p)


@compiled
def gradient_of_m(a, tile, p):
    """The gradient of m, or of W_hr m, in M."""
    load(tile, row.M, a.dh_next if p.next_continues else 0, p.state, p.n)
    multiply(tile, row.M, a.dropout_h, p.state, p.n)
    add(tile, row.M, a.dh, p.at, p.n)
    if p.last:
        add(tile, row.M, a.dh_n, p.state, p.n)
    if a.zoneout_h or a.rate_h:
        add(tile, row.M, a.dh_from_zoneout, p.state, p.n)
        load_shares(tile, row.DV, a.zoneout_h, a.rate_h, p.at, p.n)
        divide(tile, row.DV, row.M, p.n)
        pass_on(a.dh_from_zoneout, p.state, a.dreset_h, tile, row.DV, p)


@compiled
def pass_on(gradient, state, of_reset, tile, row, p):
    """A gradient to the state before a step; none flows past a reset."""
    if p.continues:
        store(gradient, state, tile, row, p.n)
    else:
        clear(gradient, state, p.n)
        store(of_reset, p.at, tile, row, p.n)


@compiled
def load_v(a, tile, p):
    """c, or LN(c), after a step in DV, from the gates and c before the step."""
    if a.normed_c:
        load(tile, row.DV, a.normed_c, p.at, p.n)
    elif a.cell == LSTM:
        lstm.next_cell(tile, vectors(p.n))
    elif a.cell == SLSTM:
        slstm.next_cell(tile, vectors(p.n))


@compiled
def output_backward(a, tile, p):
    """The gradients of z_o and of v, in DZ_O and DV, from that of m."""
    if a.cell == LSTM:
        lstm.output_backward(tile, vectors(p.n))
    elif a.cell == GRU:
        copy(tile, row.DV, row.M, p.n)
    else:
        slstm.output_backward(tile, vectors(p.n))


@compiled
def gates_and_cell_backward(a, tile, p):
    """The gradients of pre-activations, and of c before the step, from those of z_o and of v."""
    zones = a.zoneout_c != 0 or a.rate_c != 0
    load(tile, row.C, a.dc, p.state, p.n)
    if zones:
        load_shares(tile, row.M, a.zoneout_c, a.rate_c, p.at, p.n)
        divide(tile, row.M, row.C, p.n)
    add_rows(tile, row.C, row.DV, p.n)
    if a.cell == LSTM:
        load_constants(a, tile, a.weight_peephole, p)
        lstm.backward(tile, vectors(p.n), a.weight_peephole != 0)
    elif a.cell == GRU:
        gru.backward(tile, vectors(p.n))
    else:
        load(tile, row.REST, a.dc, p.rest, p.n)
        slstm.backward(tile, vectors(p.n))
        pass_on(a.dc, p.rest, 0, tile, row.REST, p)
    if zones:
        add_rows(tile, row.C, row.M, p.n)
    pass_on(a.dc, p.state, a.dreset_c, tile, row.C, p)


@compiled
def tile_before_product(a, tile, p):
    """In padding all gradients are 0."""
    if not p.valid:
        for each in (row.M, row.DZ_O, row.DV, *OF_H):
            fill(tile, each, ZERO, p.n)
    elif a.start == OF_HIDDEN:
        gradient_of_m(a, tile, p)
    elif a.start == OF_M:
        load(tile, row.M, a.m, p.state, p.n)
    if a.start == OF_HIDDEN:
        store(a.dh_total, p.at, tile, row.M, p.n)
    if a.end == OF_M:
        store(a.m, p.state, tile, row.M, p.n)
        return
    if p.valid:
        for k in range(4):
            load(tile, GATES[k], a.gates, p.gates + k * a.H, p.n)
        load_c_before(a, tile, p)
        if a.start == OF_C:
            load(tile, row.DZ_O, a.o, p.state, p.n)
            load(tile, row.DV, a.v, p.state, p.n)
        else:
            load_v(a, tile, p)
            output_backward(a, tile, p)
    if a.end == OF_C:
        store(a.o, p.state, tile, row.DZ_O, p.n)
        store(a.v, p.state, tile, row.DV, p.n)
        return
    if p.valid:
        gates_and_cell_backward(a, tile, p)
    for k in range(4):
        store(a.dgates, p.gates + k * a.H, tile, OF_H[k], p.n)
        store(a.dz, p.z + k * (a.H // a.heads), tile, OF_H[k], p.n)


@compiled
def step_after_product(a, tile, step, first, end):
    """Of the sequences from `first` to `end`."""
    for b in range(first, end):
        for head in range(a.heads):
            for u in range(0, a.H // a.heads, UNITS):
                tile_after_product(a, tile, place_of(a, step, b, head, u))


@compiled
def step_before_product(a, tile, step, first, end):
    for b in range(first, end):
        for head in range(a.heads):
            for u in range(0, a.H // a.heads, UNITS):
                tile_before_product(a, tile, place_of(a, step, b, head, u))


def after_product(address):
    """A step of a call, at its address."""
    a = call_at(address)
    step_after_product(a, a.scratch, a.step, 0, a.B)


def before_product(address):
    a = call_at(address)
    step_before_product(a, a.scratch, a.step, 0, a.B)


def forward(address):
    """All steps of a call, of the shares of its sequences that this thread takes; h_next has what step 0 multiplies."""
    a = call_at(address)
    width = a.H // a.heads
    columns = (4 - a.h_start) * width
    number = take(a.taken)
    while number * a.share < a.B:
        first, end = number * a.share, min((number + 1) * a.share, a.B)
        tile = a.scratch + SIZE * number * SCRATCH
        for step in range(a.T):
            for head in range(a.heads):
                x, weight = a.h_next + SIZE * (first * a.H + head * width), a.weight + SIZE * head * width * columns
                z = a.z + SIZE * ((first * a.heads + head) * 4 + a.h_start) * width
                product(x, a.H, weight, z, 4 * a.H, end - first, width, columns, tile + SIZE * ROWS * UNITS)
            step_after_product(a, tile, step, first, end)
        number = take(a.taken)


def backward(address):
    """As forward, from the last step to the first."""
    a = call_at(address)
    width = a.H // a.heads
    rows = (4 - a.h_start) * width
    number = take(a.taken)
    while number * a.share < a.B:
        first, end = number * a.share, min((number + 1) * a.share, a.B)
        tile = a.scratch + SIZE * number * SCRATCH
        for step in range(a.T - 1, -1, -1):
            step_before_product(a, tile, step, first, end)
            for head in range(a.heads if step else 0):
                dz = a.dz + SIZE * ((first * a.heads + head) * 4 + a.h_start) * width
                weight, dh = a.weight + SIZE * head * rows * width, a.dh_next + SIZE * (first * a.H + head * width)
                product(dz, 4 * a.H, weight, dh, a.H, end - first, rows, width, tile + SIZE * ROWS * UNITS)
        number = take(a.taken)
