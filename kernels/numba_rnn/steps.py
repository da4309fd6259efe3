"""The time loop: one step without its product, or all steps with their products, in tiles of units of a sequence.

Steps count in the order of processing. A step may be divided, see by_steps.py. Then a call runs its part from `start`
to `end`. cupy_rnn/cuda/steps.cu has the same steps. triton_rnn/cell/indexing.py says which time a step visits.
"""

from collections import namedtuple

import numpy as np

from . import equations
from .functions import F, compiled, flags, floats, numbers, take
from .product import by_panels, by_rows, into_panels, matrices, vectors_of
from .record import OF_C, OF_HIDDEN, OF_M, OF_Z, SCRATCH, call_at, product_at
from .tile import (
    CONSTANTS,
    GATES,
    OF_H,
    SIZE,
    UNITS,
    add,
    fill,
    moments,
    move,
    multiply,
    normalise,
    normalise_backward,
    row,
    zoneout,
    zoneout_backward,
)  # fmt: skip

EMPTY = np.float32(-np.inf)  # the REST of an empty state

Place = namedtuple("Place", "step continues last next_continues at earlier state rest unit gates z n")
"""Where a tile is.

    step              the step
    continues         whether the sequence begins the step with the state of the step before
    last              whether the step is the last one of the sequence
    next_continues    whether the sequence begins the next step with the state of this one
    at, earlier       where the tile's units begin in [T*B, H], at this step and at the step before
    state, rest       where they begin in [B, H], and in the second [B, H] of [K, B, H]
    unit, gates, z    where they begin in [H], in [T*B, 4H], and in z
    n                 the number of units
"""


@compiled
def position(a, step, b):
    """Return a sequence's row in [T*B, *], whether it has the step, and `continues` and `last` of a Place."""
    length = numbers(a.lengths)[b] if a.lengths else a.T
    valid = step < length
    time = length - 1 - step if a.reverse and valid else step
    # A reset at t separates t from t - 1 in both directions; the reverse direction comes from t + 1.
    later = time + 1 if a.reverse else time
    reset = a.resets != 0 and later < length and flags(a.resets)[later * a.B + b] != 0
    return time * a.B + b, valid, valid and not reset, step == length - 1


@compiled
def load_before(tile, states, there, initial, reset_to, p):
    """Load the state before the step into BEFORE: from all states, the initial states, or the states to reset to."""
    if not p.continues:
        move(tile, row.BEFORE, reset_to, p.at, p.n)
    elif p.step == 0:
        move(tile, row.BEFORE, initial, p.state, p.n)
    else:
        move(tile, row.BEFORE, states, there, p.n)


@compiled
def load_c_before(a, tile, p):
    """Load c before the step. In inference the step before stored it in c_n."""
    states, there = (a.c, p.earlier) if a.c else (a.c_n, p.state)
    load_before(tile, states, there, a.c0, a.reset_c, p)


@compiled
def load_constants(a, tile, p):
    """Load the peepholes, or a GRU's biases of h, into CONSTANTS."""
    for k in range(3):
        move(tile, CONSTANTS[k], a.bias_hh if a.h_start else a.weight_peephole, k * a.H + p.unit, p.n)


@compiled
def load_shares(a, tile, at, stays, p):
    """Load the shares of the state before the step that zoneout keeps: 0 or 1 by the mask, or the rate."""
    if a.masks:
        mask, shares = flags(stays), floats(tile)
        for j in range(p.n):
            shares[at + j] = F(mask[p.at + j])
    else:
        fill(tile, at, floats(stays)[0], p.n)


@compiled
def gates_and_cell(a, tile, p):
    """Compute and store the gates and c of a step. C keeps c as it is before zoneout."""
    units = a.H // a.heads
    for k in range(4):
        move(tile, GATES[k], a.gates if k < a.from_x else 0, p.gates + k * a.H, p.n)
        if k < a.from_x:
            add(tile, GATES[k], a.bias_ih, k * a.H + p.unit, p.n)
            add(tile, GATES[k], 0 if a.h_start else a.bias_hh, k * a.H + p.unit, p.n)
        for u in range(0, p.n, units):
            move(tile, OF_H[k] + u, a.z, p.z + 4 * u + k * units, min(units, p.n - u))
    load_c_before(a, tile, p)
    move(tile, row.C, tile, row.BEFORE, p.n)
    load_constants(a, tile, p)
    if a.kept > 1:
        move(tile, row.REST, a.c_n if p.step else a.c0, p.rest, p.n)
        if not p.continues:
            fill(tile, row.REST, EMPTY, p.n)
    equations.forward(tile, p.n, a.cell, a.weight_peephole != 0)
    move(a.c_n if a.kept > 1 else 0, p.rest, tile, row.REST, p.n)
    move(tile, row.DV, tile, row.C, p.n)
    if a.zoneout_c:
        load_shares(a, tile, row.M, a.zoneout_c, p)
        zoneout(tile, row.DV, row.M, row.BEFORE, p.n)
    move(a.c, p.at, tile, row.DV, p.n)
    if p.last or not a.c:
        move(a.c_n, p.state, tile, row.DV, p.n)
    for k in range(4):
        move(a.gates if a.c else 0, p.gates + k * a.H, tile, GATES[k], p.n)


@compiled
def store_h(a, tile, p):
    """Compute h from M, and store it. Store the factor of the next product in h_next."""
    if a.zoneout_h and tile:
        load_before(tile, a.h, p.earlier, a.h0, a.reset_h, p)
        load_shares(a, tile, row.DV, a.zoneout_h, p)
        zoneout(tile, row.M, row.DV, row.BEFORE, p.n)
    move(a.h, p.at, tile, row.M, p.n)
    if p.last:
        move(a.h_n, p.state, tile, row.M, p.n)
    multiply(tile, row.M, a.dropout_h, p.state, p.n)
    move(a.h_next, p.state, tile if p.next_continues else 0, row.M, p.n)


@compiled
def after(a, tile, p, start, end):
    """Run a step of a tile after its product. In padding there is no tile, and h and c are 0."""
    if start == OF_Z and tile:
        gates_and_cell(a, tile, p)
    elif start == OF_Z:
        move(a.c, p.at, tile, row.C, p.n)
    elif start == OF_C:
        move(tile, GATES[3], a.o, p.state, p.n)
        move(tile, row.C, a.v, p.state, p.n)
    if end == OF_C:
        move(a.o, p.state, tile, GATES[3], p.n)
        move(a.v, p.state, tile, row.C, p.n)
        return
    if start == OF_M:
        move(tile, row.M, a.m, p.state, p.n)
    elif tile:
        equations.output(tile, p.n, a.cell, False)
    if end == OF_M:
        move(a.m, p.state, tile, row.M, p.n)
    else:
        store_h(a, tile, p)


@compiled
def gradient_of_m(a, tile, p):
    """Compute the gradient of m, or of W_hr m, in M."""
    move(tile, row.M, a.dh_next if p.next_continues else 0, p.state, p.n)
    multiply(tile, row.M, a.dropout_h, p.state, p.n)
    add(tile, row.M, a.dh, p.at, p.n)
    if p.last:
        add(tile, row.M, a.dh_n, p.state, p.n)
    if a.zoneout_h:
        add(tile, row.M, a.dh_from_zoneout, p.state, p.n)
        load_shares(a, tile, row.DV, a.zoneout_h, p)
        zoneout_backward(tile, row.DV, row.M, p.n)
        pass_on(a.dh_from_zoneout, p.state, a.dreset_h, tile, row.DV, p)


@compiled
def pass_on(gradient, state, of_reset, tile, at, p):
    """Store a gradient of the state before the step. At a reset it is zero: the state to reset to has the gradient."""
    move(gradient, state, tile if p.continues else 0, at, p.n)
    if not p.continues:
        move(of_reset, p.at, tile, at, p.n)


@compiled
def gates_and_cell_backward(a, tile, p):
    """Compute the gradients of the pre-activations and of c before the step from the gradients of z_o and v."""
    move(tile, row.C, a.dc, p.state, p.n)
    if a.zoneout_c:
        load_shares(a, tile, row.M, a.zoneout_c, p)
        zoneout_backward(tile, row.M, row.C, p.n)
    add(tile, row.C, tile, row.DV, p.n)
    load_constants(a, tile, p)
    if a.kept > 1:
        move(tile, row.REST, a.dc, p.rest, p.n)
    equations.backward(tile, p.n, a.cell, a.weight_peephole != 0)
    if a.kept > 1:
        pass_on(a.dc, p.rest, 0, tile, row.REST, p)
    add(tile, row.C, tile if a.zoneout_c else 0, row.M, p.n)
    pass_on(a.dc, p.state, a.dreset_c, tile, row.C, p)


@compiled
def before(a, tile, p, start, end):
    """Run a step of a tile backward, before its product. In padding all gradients are 0."""
    if start == OF_HIDDEN:
        if tile:
            gradient_of_m(a, tile, p)
        move(a.dh_total, p.at, tile, row.M, p.n)
    elif start == OF_M:
        move(tile, row.M, a.m, p.state, p.n)
    if end == OF_M:
        move(a.m, p.state, tile, row.M, p.n)
        return
    if tile:
        for k in range(4):
            move(tile, GATES[k], a.gates, p.gates + k * a.H, p.n)
        load_c_before(a, tile, p)
        if start != OF_C:
            move(tile, row.DV, a.v_c, p.at, p.n)
            if a.gain_c:
                mean, scale = floats(a.mean_c)[p.at // a.H], floats(a.scale_c)[p.at // a.H]
                normalise(tile, row.DV, mean, scale, a.gain_c, a.bias_c, p.unit, p.n)
            equations.output_backward(tile, p.n, a.cell, a.gain_c != 0)
    if start == OF_C:
        move(tile, row.DZ_O, a.o, p.state, p.n)
        move(tile, row.DV, a.v, p.state, p.n)
    if end == OF_C:
        move(a.o, p.state, tile, row.DZ_O, p.n)
        move(a.v, p.state, tile, row.DV, p.n)
        return
    if tile:
        gates_and_cell_backward(a, tile, p)
    units = a.H // a.heads
    for k in range(4):
        move(a.dgates, p.gates + k * a.H, tile, OF_H[k], p.n)
        for u in range(0, p.n, units):
            move(a.dz, p.z + 4 * u + k * units, tile, OF_H[k] + u, min(units, p.n - u))


@compiled
def last_with(a, step, first, end):
    """Return the end of the sequences from `first` to `end` that have to be processed. All after it are in padding."""
    if a.multiplies and a.lengths:
        while end > first and numbers(a.lengths)[end - 1] <= step:
            end -= 1
    return end


@compiled
def pad(a, step, first, end):
    """Write zeros for sequences that are all in padding, where the time is the step."""
    at, count = (step * a.B + first) * a.H, (end - first) * a.H
    move(a.h, at, 0, 0, count)
    move(a.c if a.h else 0, at, 0, 0, count)
    move(a.dh_total, at, 0, 0, count)
    move(a.dgates, 4 * at, 0, 0, 4 * count)


# Numba compiles each function below twice: for `backward` = None, where it leaves out the backward pass, and for True.


@compiled
def tiles_of(a, step, b, start, end, scratch, origin, backward):
    """Run a step of sequence b from `start` to `end`, in tiles. `origin` is the result of product_of_x, or 0."""
    units, all_units = a.H // a.heads, a.B * a.H
    span = max(units, UNITS // units * units)  # the units of one head, or of as many heads as fit a tile
    visited, valid, continues, last = position(a, step, b)
    tile, next_continues = scratch if valid else 0, position(a, step + 1, b)[2]
    for head in range(0, a.H, span):
        for u in range(0, span, UNITS):
            at, state, z = visited * a.H + head + u, b * a.H + head + u, (b * a.H + head) * 4 + u
            earlier = at + all_units if a.reverse else at - all_units
            gates = (step % a.chunk * a.B + b if origin < 0 else visited - origin) * 4 * a.H + head + u
            n = min(UNITS, span - u, a.H - head - u)
            p = Place(
                step, continues, last, next_continues, at, earlier, state, state + all_units, head + u, gates, z, n
            )
            if backward is None:
                after(a, tile, p, start, end)
            else:
                before(a, tile, p, start, end)


@compiled
def norm_backward(gradient, width, b, visited, v, mean, scale, gain):
    """Replace the gradient of a layer norm, row b of [B, width], by the gradient of its input."""
    moments = floats(mean)[visited], floats(scale)[visited]
    normalise_backward(gradient, b * width, v, visited * width, *moments, gain, width)


@compiled
def each(a, step, first, end, scratch, origin, backward):
    """Run a step of the sequences from `first` to `end`. LN(c) needs all units of a sequence, and divides its step."""
    middle = OF_C if a.gain_c else a.end
    for b in range(first, end):
        visited = position(a, step, b)[0]
        if backward is None and a.gain_hh:
            normalise(a.z, 4 * b * a.H, *moments(a.z, 4 * b * a.H, 4 * a.H), a.gain_hh, 0, 0, 4 * a.H)
        tiles_of(a, step, b, a.start, middle, scratch, origin, backward)
        if middle != a.end:
            if backward is None:
                normalise(a.v, b * a.H, *moments(a.v, b * a.H, a.H), a.gain_c, a.bias_c, 0, a.H)
            else:
                norm_backward(a.v, a.H, b, visited, a.v_c, a.mean_c, a.scale_c, a.gain_c)
            tiles_of(a, step, b, middle, a.end, scratch, origin, backward)
        if backward is not None and a.gain_hh:
            norm_backward(a.dz, 4 * a.H, b, visited, a.v_hh, a.mean_hh, a.scale_hh, a.gain_hh)


@compiled
def sizes_of_product(a, backward):
    """Return K and N of the product of a head, and the bytes of its panels."""
    units = a.H // a.heads
    gates = (4 - a.h_start) * units
    K, N = (units, gates) if backward is None else (gates, units)
    return K, N, SIZE * K * vectors_of(N)


@compiled
def make_panels(a, backward):
    """Copy W_hh of each head [K, N], by the strides of weight_hh, and then W_ih into panels."""
    K, N, size = sizes_of_product(a, backward)
    for head in range(a.heads):
        weight = a.weight_hh + SIZE * head * a.stride_head
        into_panels(weight, a.stride_k, a.stride_n, a.panels + head * size, K, N)
    if a.x:
        into_panels(a.weight_ih, 1, a.I, a.panels + a.heads * size, a.I, N * a.heads)


@compiled
def product_of_x(a, step, first, end, scratch):
    """Compute W_ih x of a chunk of steps in gates.

    Return the row in [T*B, *] of the first row of gates, if gates are in the order of time. Gates that are saved have
    all rows. Else return -1: gates are in the order of steps, because sequences visit different times at a step, or
    because other threads have some of the sequences.
    """
    _, N, size = sizes_of_product(a, None)
    N, panels, steps = N * a.heads, a.panels + a.heads * size, min(a.chunk, a.T - step)
    if a.lengths == 0 and (a.chunk == 1 or end - first == a.B):
        start = position(a, step + steps - 1 if a.reverse else step, first)[0]
        origin = 0 if a.c else start - first
        x, to, count = a.x + SIZE * start * a.I, a.gates + SIZE * 4 * (start - origin) * a.H, steps * (end - first)
        if step >= a.by_rows:
            by_panels(x, a.I, panels, to, 4 * a.H, count, a.I, N, scratch)
        else:
            by_rows(x, a.I, a.weight_ih, a.I, to, 4 * a.H, count, a.I, N, scratch)
        return origin
    apart = -a.B if a.reverse else a.B
    gates_apart = 4 * a.H * (apart if a.c else a.B)
    for b in range(first, end):
        row = position(a, step, b)[0]
        x, to = a.x + SIZE * row * a.I, a.gates + SIZE * 4 * (row if a.c else b) * a.H
        count = min(steps, numbers(a.lengths)[b] - step) if a.lengths else steps
        if step >= a.by_rows:
            by_panels(x, apart * a.I, panels, to, gates_apart, count, a.I, N, scratch)
        else:
            by_rows(x, apart * a.I, a.weight_ih, a.I, to, gates_apart, count, a.I, N, scratch)
    return 0 if a.c else -1


@compiled
def begin(a, first, end):
    """Store the factor of the first product in h_next."""
    for b in range(first, end):
        move(a.h_next, b * a.H, a.h0 if position(a, 0, b)[2] else 0, b * a.H, a.H)
        multiply(a.h_next, b * a.H, a.dropout_h, b * a.H, a.H)


@compiled
def product(a, step, first, end, scratch, backward):
    """Compute z = W_hh h_next of the sequences from `first` to `end`, or backward dh_next = W_hh^T dz."""
    K, N, size = sizes_of_product(a, backward)
    units, count = a.H // a.heads, end - first
    for head in range(a.heads):
        h, panels = SIZE * (first * a.H + head * units), a.panels + head * size
        z = 4 * h + SIZE * a.h_start * units
        if backward is not None:
            by_panels(a.dz + z, 4 * a.H, panels, a.dh_next + h, a.H, count, K, N, scratch)
        elif step >= a.by_rows:
            by_panels(a.h_next + h, a.H, panels, a.z + z, 4 * a.H, count, K, N, scratch)
        else:
            for gate in range(4 - a.h_start):
                weight = a.weight_hh + SIZE * (gate * a.heads + head) * units * units
                to = a.z + z + SIZE * gate * units
                by_rows(a.h_next + h, a.H, weight, units, to, 4 * a.H, count, units, units, scratch)


@compiled
def run(a, backward):
    """Run all steps with their products, or one step without, of shares of sequences, until all shares are taken.

    A thread takes a share at a time. Forward a step is the product, then the tiles. Backward the product comes first,
    too: W_hh^T dz of the step after. A call that `makes_panels` runs no step.
    """
    if a.makes_panels:
        make_panels(a, backward)
        return
    number = take(a.taken) if a.taken else 0
    while number * a.share < a.B:
        first, end, scratch = number * a.share, min((number + 1) * a.share, a.B), a.scratch + SIZE * number * SCRATCH
        origin, active = 0, first
        if a.multiplies and backward is None:
            begin(a, first, end)
        for n in range(a.T if a.multiplies else 1):
            step, multiplied = a.step + n if backward is None else a.step - n, active
            active = last_with(a, step, first, end)
            if backward is None and a.x and n % a.chunk == 0:
                origin = product_of_x(a, n, first, active, scratch)
            if a.multiplies and (backward is None or n):
                product(a, n, first, active if backward is None else multiplied, scratch, backward)
            each(a, step, first, active, scratch, origin, backward)
            pad(a, step, active, end)
        number = take(a.taken) if a.taken else number + 1


def forward(address):
    """Run a call, which is at an address."""
    run(call_at(address), None)


def backward(address):
    """Run a call of the backward pass, which is at an address."""
    run(call_at(address), True)


def matmul(address):
    """Compute a product of two matrices, whose record.MATMUL is at an address. A thread takes a share at a time."""
    p = product_at(address)
    number = take(p.taken)
    while number * p.share < p.M:
        matrices(p, number * p.share, min((number + 1) * p.share, p.M), p.memory + SIZE * number * p.size)
        number = take(p.taken)
