"""The time loop over a share of a batch, and its step, as cupy_rnn/cuda/steps.cu computes it: tiles of units for cells.

Tensors are arrays of one dimension, empty where a call has none, and are indexed by unsigned numbers: of a signed one
Numba asks whether it counts from the end, and LLVM then vectorises nothing. A step counts in the order of processing.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from . import equations as tile
from .equations import BEFORE, CONSTANTS, DV, DZ_O, GATES, GRU, LSTM, REST, ROWS, SLSTM, UNITS, C, M, Z
from .functions import HOW, F

FLOATS = (  # [T*B, 4H]; of a step [B, 4H], with heads [B, heads, 4 D]; [T*B, H]; [B, H]; [3H]; [K, B, H]; of a rate [1]
    "gates", "dgates", "z", "dz", "h", "dh", "dh_total", "reset_h", "c", "reset_c", "dreset_h", "dreset_c", "normed_c",
    "h0", "h_n", "dh_n", "h_next", "dh_next", "dropout_h", "m", "o", "v", "dh_from_zoneout", "weight_peephole",
    "bias_hh", "c0", "c_n", "dc", "rate_h", "rate_c",
)  # fmt: skip
BOOLS = "zoneout_h", "zoneout_c", "resets"  # [T*B, H], [T*B, H], [T*B]
SIZES = "T", "B", "H", "heads", "from_x", "h_start", "reverse", "cell", "start", "end"
Call = namedtuple("Call", (*FLOATS, *BOOLS, "lengths", *SIZES))
"""What all functions are given; lengths is int64 [B]. Of a divided step they compute the part from `start` to `end`:"""
STOPS = OF_Z, OF_C, OF_M, OF_H = range(4)

U = np.uintp
SEQUENCES, COLUMNS = 4, 128  # of a product's tile


@njit(**HOW)
def product(x, x_at, x_row, weight, weight_at, out, out_at, out_row, count, K, N, sums):
    """out [count, N] = x [count, K] weight [K, N], from where each begins, with rows of x_row and out_row elements."""
    last = x_at + (count - 1) * x_row
    for n in range(0, N, COLUMNS):
        columns = min(COLUMNS, N - n)
        for b in range(0, count, SEQUENCES):
            at = x_at + b * x_row  # past the last sequence the last again, for nothing
            at_1, at_2, at_3 = min(at + x_row, last), min(at + 2 * x_row, last), min(at + 3 * x_row, last)
            for j in range(SEQUENCES * COLUMNS):
                sums[j] = F(0)
            for k in range(0, K, 2):
                one = min(k + 1, K - 1)
                a0, b0, c0, d0 = x[U(at + k)], x[U(at_1 + k)], x[U(at_2 + k)], x[U(at_3 + k)]
                a1, b1, c1, d1 = x[U(at + one)], x[U(at_1 + one)], x[U(at_2 + one)], x[U(at_3 + one)]
                if k + 1 == K:
                    a1, b1, c1, d1 = F(0), F(0), F(0), F(0)
                row_0, row_1 = weight_at + k * N + n, weight_at + one * N + n
                for j in range(columns):
                    w0, w1 = weight[U(row_0 + j)], weight[U(row_1 + j)]
                    sums[j] += a0 * w0 + a1 * w1
                    sums[COLUMNS + j] += b0 * w0 + b1 * w1
                    sums[2 * COLUMNS + j] += c0 * w0 + c1 * w1
                    sums[3 * COLUMNS + j] += d0 * w0 + d1 * w1
            for s in range(min(SEQUENCES, count - b)):
                to = out_at + (b + s) * out_row + n
                for j in range(columns):
                    out[U(to + j)] = sums[U(s * COLUMNS + j)]


@njit(**HOW)
def load(w, row, x, at, n):
    """A row of the tile from x; zeros where there is no x."""
    if x.size:
        for j in range(n):
            w[U(row + j)] = x[U(at + j)]
    else:
        zero(w, row, n)


@njit(**HOW)
def store(x, at, w, row, n):
    """A row of the tile to x, if there is an x."""
    if x.size:
        for j in range(n):
            x[U(at + j)] = w[U(row + j)]


@njit(**HOW)
def zero(x, at, n):
    if x.size:
        for j in range(n):
            x[U(at + j)] = F(0)


@njit(**HOW)
def add(w, row, x, at, n):
    if x.size:
        for j in range(n):
            w[U(row + j)] += x[U(at + j)]


@njit(**HOW)
def multiply(w, row, x, at, n):
    if x.size:
        for j in range(n):
            w[U(row + j)] *= x[U(at + j)]


@njit(**HOW)
def load_shares(w, row, mask, rate, at, n):
    """What share of the state before stays."""
    for j in range(n):
        w[U(row + j)] = rate[0] if rate.size else F(1) if mask[U(at + j)] else F(0)


@njit(**HOW)
def where(a, step, b):
    """(The sequence is not in padding, its row in [T*B, *], the state before is that of the step before, it ends)."""
    length = a.lengths[b] if a.lengths.size else a.T
    valid = step < length
    time = length - 1 - step if a.reverse and valid else step
    row = time * a.B + b
    # A reset at t separates t from t - 1 in both directions; the reverse direction comes from t + 1.
    later, there = (time + 1, row + a.B) if a.reverse else (time, row)
    reset = a.resets.size > 0 and later < length and a.resets[there]
    return valid, row, valid and not reset, step == length - 1


@njit(**HOW)
def load_c_before(a, w, row, step, continues, at, state, n):
    """c before a step: of an inference it lies where that of the step before was stored."""
    if not continues:
        load(w, row, a.reset_c, at, n)
    elif step == 0:
        load(w, row, a.c0, state, n)
    elif a.c.size:
        load(w, row, a.c, at + (a.B if a.reverse else -a.B) * a.H, n)
    else:
        load(w, row, a.c_n, state, n)


@njit(**HOW)
def load_h_before(a, w, row, step, continues, at, state, n):
    if not continues:
        load(w, row, a.reset_h, at, n)
    elif step == 0:
        load(w, row, a.h0, state, n)
    else:
        load(w, row, a.h, at + (a.B if a.reverse else -a.B) * a.H, n)


@njit(**HOW)
def gates_and_cell(a, w, step, continues, last, row, at, state, z_at, unit, n):
    """o in the last row of gates, and c before zoneout."""
    H, width, full = a.H, a.H // a.heads, min(UNITS, (n + 15) // 16 * 16)  # whole vectors; what is past n is not stored
    gates_at = row * 4 * H + unit
    for k in range(4):
        if k < a.from_x:
            load(w, GATES + k * UNITS, a.gates, gates_at + k * H, n)
        else:
            zero(w, GATES + k * UNITS, n)
        load(w, Z + k * UNITS, a.z, z_at + k * width, n)
    load_c_before(a, w, C, step, continues, at, state, n)
    for j in range(n):
        w[BEFORE + j] = w[C + j]
    rest_at = a.B * H + state
    if a.cell == GRU:
        for k in range(3):
            load(w, CONSTANTS + k * UNITS, a.bias_hh, k * H + unit, n)
        tile.gru(w, full)
    elif a.cell == SLSTM:
        if continues:
            load(w, REST, a.c_n if step else a.c0, rest_at, n)
        else:
            for j in range(n):
                w[REST + j] = -F(np.inf)
        tile.slstm(w, full)
        store(a.c_n, rest_at, w, REST, n)
    else:
        for k in range(3):
            load(w, CONSTANTS + k * UNITS, a.weight_peephole, k * H + unit, n)
        tile.lstm(w, full, a.weight_peephole.size > 0)
    for j in range(n):
        w[DV + j] = w[C + j]
    if a.zoneout_c.size or a.rate_c.size:
        load_shares(w, DZ_O, a.zoneout_c, a.rate_c, at, n)
        blend(w, DV, BEFORE, DZ_O, n)
    if last or not a.c.size:
        store(a.c_n, state, w, DV, n)
    store(a.c, at, w, DV, n)
    if a.c.size:
        for k in range(4):
            store(a.gates, gates_at + k * H, w, GATES + k * UNITS, n)


@njit(**HOW)
def blend(w, row, before, shares, n):
    for j in range(n):
        x, share = w[U(row + j)], w[U(shares + j)]
        w[U(row + j)] = x if share == F(0) else share * w[U(before + j)] + (F(1) - share) * x


@njit(**HOW)
def tile_after_product(a, w, step, b, unit, z_at, n):
    valid, row, continues, last = where(a, step, b)
    at, state, full = row * a.H + unit, b * a.H + unit, min(UNITS, (n + 15) // 16 * 16)
    o = GATES + 3 * UNITS
    if not valid:
        for to in (o, C, M):
            zero(w, to, n)
        if a.start == OF_Z:
            zero(a.c, at, n)
    elif a.start == OF_Z:
        gates_and_cell(a, w, step, continues, last, row, at, state, z_at, unit, n)
    elif a.start == OF_C:
        load(w, o, a.o, state, n)
        load(w, C, a.v, state, n)
    if a.end == OF_C:
        store(a.o, state, w, o, n)
        store(a.v, state, w, C, n)
        return
    if valid and a.start == OF_M:
        load(w, M, a.m, state, n)
    elif valid:
        tile.output(w, full, a.cell)
    if a.end == OF_M:
        store(a.m, state, w, M, n)
        return
    if valid and (a.zoneout_h.size or a.rate_h.size):
        load_h_before(a, w, BEFORE, step, continues, at, state, n)
        load_shares(w, DZ_O, a.zoneout_h, a.rate_h, at, n)
        blend(w, M, BEFORE, DZ_O, n)
    store(a.h, at, w, M, n)
    if last:
        store(a.h_n, state, w, M, n)
    if where(a, step + 1, b)[2]:
        multiply(w, M, a.dropout_h, state, n)
        store(a.h_next, state, w, M, n)
    else:
        zero(a.h_next, state, n)


@njit(**HOW)
def after_product(a, w, step, first, end):
    """A step of the sequences from `first` to `end`, after its product."""
    width = a.H // a.heads
    for b in range(first, end):
        for head in range(a.heads):
            for u in range(0, width, UNITS):
                z_at = (b * a.heads + head) * 4 * width + u
                tile_after_product(a, w, step, b, head * width + u, z_at, min(UNITS, width - u))


@njit(**HOW)
def gradient_of_m(a, w, step, b, continues, last, at, state, n):
    """The gradient of m, or of W_hr m, in M."""
    if where(a, step + 1, b)[2]:
        load(w, M, a.dh_next, state, n)
        multiply(w, M, a.dropout_h, state, n)
    else:
        zero(w, M, n)
    add(w, M, a.dh, at, n)
    if last:
        add(w, M, a.dh_n, state, n)
    if not (a.zoneout_h.size or a.rate_h.size):
        return
    add(w, M, a.dh_from_zoneout, state, n)
    load_shares(w, DV, a.zoneout_h, a.rate_h, at, n)
    for j in range(n):
        share, d = w[DV + j], w[M + j]
        w[DV + j], w[M + j] = share * d, (F(1) - share) * d
    pass_on(a.dh_from_zoneout, a.dreset_h, continues, at, state, w, DV, n)


@njit(**HOW)
def pass_on(gradient, of_reset, continues, at, state, w, row, n):
    """To the state before a step; none flows past a reset."""
    if continues:
        store(gradient, state, w, row, n)
    else:
        zero(gradient, state, n)
        store(of_reset, at, w, row, n)


@njit(**HOW)
def gradients_of_gates_and_cell(a, w, continues, at, state, unit, n):
    """From GATES, BEFORE, DZ_O and DV."""
    full, rest_at = min(UNITS, (n + 15) // 16 * 16), a.B * a.H + state
    zones = a.zoneout_c.size > 0 or a.rate_c.size > 0
    load(w, C, a.dc, state, n)
    if zones:
        load_shares(w, M, a.zoneout_c, a.rate_c, at, n)
        for j in range(n):
            share, dc = w[M + j], w[C + j]
            w[M + j], w[C + j] = share * dc, (F(1) - share) * dc
    for j in range(n):
        w[C + j] += w[DV + j]
    if a.cell == GRU:
        tile.gru_backward(w, full)
    elif a.cell == SLSTM:
        load(w, REST, a.dc, rest_at, n)
        tile.slstm_backward(w, full)
        pass_on(a.dc, a.dreset_c[:0], continues, at, rest_at, w, REST, n)
    else:
        for k in range(3):
            load(w, CONSTANTS + k * UNITS, a.weight_peephole, k * a.H + unit, n)
        tile.lstm_backward(w, full, a.weight_peephole.size > 0)
    if zones:
        for j in range(n):
            w[C + j] += w[M + j]
    pass_on(a.dc, a.dreset_c, continues, at, state, w, C, n)


@njit(**HOW)
def tile_before_product(a, w, step, b, unit, z_at, n):
    valid, row, continues, last = where(a, step, b)
    at, state, full = row * a.H + unit, b * a.H + unit, min(UNITS, (n + 15) // 16 * 16)
    if not valid:
        for to in (M, DZ_O, DV, Z, Z + UNITS, Z + 2 * UNITS, Z + 3 * UNITS):
            zero(w, to, n)
    elif a.start == OF_H:
        gradient_of_m(a, w, step, b, continues, last, at, state, n)
    elif a.start == OF_M:
        load(w, M, a.m, state, n)
    if a.start == OF_H:
        store(a.dh_total, at, w, M, n)
    if a.end == OF_M:
        store(a.m, state, w, M, n)
        return
    if valid:
        for k in range(4):
            load(w, GATES + k * UNITS, a.gates, row * 4 * a.H + k * a.H + unit, n)
        load_c_before(a, w, BEFORE, step, continues, at, state, n)
        if a.start == OF_C:
            load(w, DZ_O, a.o, state, n)
            load(w, DV, a.v, state, n)
        else:
            if a.end == OF_C:
                load(w, DV, a.normed_c, at, n)
            else:
                tile.next_cell(w, full, a.cell)
            tile.output_backward(w, full, a.cell)
    if a.end == OF_C:
        store(a.o, state, w, DZ_O, n)
        store(a.v, state, w, DV, n)
        return
    if valid:
        gradients_of_gates_and_cell(a, w, continues, at, state, unit, n)
    for k in range(4):
        store(a.dgates, row * 4 * a.H + k * a.H + unit, w, Z + k * UNITS, n)
        store(a.dz, z_at + k * (a.H // a.heads), w, Z + k * UNITS, n)


@njit(**HOW)
def before_product(a, w, step, first, end):
    """Backward of a step of the sequences from `first` to `end`, before its product."""
    width = a.H // a.heads
    for b in range(first, end):
        for head in range(a.heads):
            for u in range(0, width, UNITS):
                z_at = (b * a.heads + head) * 4 * width + u
                tile_before_product(a, w, step, b, head * width + u, z_at, min(UNITS, width - u))


@njit(**HOW)
def forward(a, weight, first, end):
    """All steps of the sequences from `first` to `end`; weight [heads, D, GATES D]; h_next has what step 0 multiplies."""
    w, sums = np.zeros(ROWS, F), np.empty(SEQUENCES * COLUMNS, F)
    width, gates = a.H // a.heads, 4 - a.h_start
    for step in range(a.T):
        for head in range(a.heads):
            z_at = (first * a.heads + head) * 4 * width + a.h_start * width
            product(
                a.h_next, first * a.H + head * width, a.H, weight, head * width * gates * width,
                a.z, z_at, 4 * a.H, end - first, width, gates * width, sums,
            )  # fmt: skip
        after_product(a, w, step, first, end)


@njit(**HOW)
def backward(a, weight, first, end):
    """As forward, from the last step to the first; weight [heads, GATES D, D]."""
    w, sums = np.zeros(ROWS, F), np.empty(SEQUENCES * COLUMNS, F)
    width, gates = a.H // a.heads, 4 - a.h_start
    for step in range(a.T - 1, -1, -1):
        before_product(a, w, step, first, end)
        for head in range(a.heads if step else 0):
            z_at = (first * a.heads + head) * 4 * width + a.h_start * width
            product(
                a.dz, z_at, 4 * a.H, weight, head * width * gates * width,
                a.dh_next, first * a.H + head * width, a.H, end - first, gates * width, width, sums,
            )  # fmt: skip
