"""The cooperative family: the whole sequence in one launch, W_hh spread over many programs, h exchanged at each step.

The programs of one batch tile are a group, which never waits for another. Each owns UNITS hidden units, and keeps its
part of W_hh in registers. A group may have several batch tiles: forward requests the words of one before it computes
the cell of the other. All programs of a launch must be resident at once.

forward    A program holds the four gates' rows of its units, [4 UNITS, H], and publishes h of its units.
backward   PARTS programs, 1, 2 or 4, are partners and own PARTS UNITS units together. Each holds W_hh^T of 4 / PARTS
           gates for all of these, [PARTS UNITS, 4 / PARTS H], and reads only the dgates of these gates. With partners
           it publishes its partial sums in a second, small exchange, and adds up all partners' for its own units.

In the product a thread's column is a sequence, and K is split over the warps (fragments.py); afterwards it owns a cell,
one unit of one sequence. With layer norms, ROW threads of one warp have the cells of a sequence, sum them up in two
numbers, exchange these with all programs, and add up by shuffles. Words (exchange.py) have PER units: a row of H units
is W = ceil(H / PER) words, of which the last may be half empty; so the weights are passed as words, too.
"""

from collections.abc import Iterator
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import KB
from ..memory import EVERY_BIT, Buffer
from ..operands import as_words, transposed_gates
from ..problem import Problem, Recurrence
from . import indexing
from .cell import cell_forward, gates_backward, normed_output_backward, output, output_backward
from .exchange import collect, in_phase, look, pack, publish
from .fragments import SEQUENCES, load_weights, product, scale, sum_over_warps, threads
from .norm import (
    EPS,
    gates_of_unit,
    normalise,
    normalise_backward,
    normalise_gates,
    normalise_gates_backward,
    squares_about,
    units_of,
)
from .planning import Device, Family, Plan, expected

SENTINEL = tl.constexpr(EVERY_BIT)  # as int32: the word for data that are not there yet, which `pack` never returns


@triton.jit
def tiles_of_group(B):
    """How many batch tiles the group has."""
    return tl.cdiv(tl.cdiv(B, SEQUENCES) - tl.program_id(1), tl.num_programs(1))


@triton.jit
def next_turn(step, tile, steps: tl.constexpr, B):
    """(step, tile) of the turn after this one: a group processes its batch tiles in turn, then advances by `steps`."""
    tile += tl.num_programs(1)
    last = tile * SEQUENCES >= B
    return tl.where(last, step + steps, step), tl.where(last, tl.program_id(1), tile)


@triton.jit
def sum_of_row(x, WARPS: tl.constexpr):
    """[THREADS] float32 -> the sum over the threads of each sequence, for all of them: without a barrier."""
    total = tl.sum(tl.reshape(x, (SEQUENCES, 4 * WARPS)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (SEQUENCES, 4 * WARPS)), (32 * WARPS,))


@triton.jit
def exchange_pairs(
    first, second,  # [THREADS] float32, the same in a sequence's whole row: of the program's units
    pairs_ptr,  # [B, programs, 2] int32: float32 words, whose last bits are one beforehand
    exchanged,  # a thread's sequence, whether there is one, the delay of `collect`, [THREADS]; phase, error_ptr, step
    H: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Of each of a thread's programs, place + n ROW: (first number, second number, number of its units); zeros where
    there is none. Programs without units do nothing. It is called at every step: no phase is skipped."""
    batch, in_batch, delay, phase, error_ptr, step = exchanged
    ROW: tl.constexpr = 4 * WARPS
    PROGRAMS: tl.constexpr = (H + UNITS - 1) // UNITS
    COUNT: tl.constexpr = (PROGRAMS + ROW - 1) // ROW
    place = tl.arange(0, 32 * WARPS) % ROW
    program = tl.zeros_like(place) + tl.program_id(0)
    here = in_batch & (program < PROGRAMS)
    pairs_at = pairs_ptr + batch.to(tl.int64) * (2 * PROGRAMS)
    own = in_phase(pack(tl.where(place == 0, first, second), tl.float32), phase)
    publish(pairs_at + 2 * program + place, own, here & (place < 2))
    left = tl.where(here, 2 * (PROGRAMS - place), 0)
    delay = tl.where(delay < 0, -1, 0)  # no delay, but what timed out before is no more waited for
    words = collect(pairs_at + 2 * place, left, phase, error_ptr, step, delay, COUNT, 2, 2 * ROW, 2, True)
    found = ()
    for n in tl.static_range(COUNT):
        one, other = words[2 * n].to(tl.float32, bitcast=True), words[2 * n + 1].to(tl.float32, bitcast=True)
        found = found + ((one, other, units_of(place + n * ROW, H, UNITS)),)
    return found


@triton.jit
def moments_of_group(
    v,  # tuple of [THREADS]: of the thread's cell
    is_cell,  # [THREADS]
    pairs_ptr, exchanged,  # as for `exchange_pairs`
    H: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """(mean, scale) of v of all units, [THREADS]."""
    GATES: tl.constexpr = len(v)
    zeros = tl.zeros((32 * WARPS,), tl.float32)
    total, squares = zeros, zeros
    for n in tl.static_range(GATES):
        total += tl.where(is_cell, v[n], 0.0)
    own = sum_of_row(total, WARPS) / (GATES * units_of(tl.program_id(0), H, UNITS))
    for n in tl.static_range(GATES):
        distance = tl.where(is_cell, v[n] - own, 0.0)
        squares += distance * distance
    of_programs = exchange_pairs(own, sum_of_row(squares, WARPS), pairs_ptr, exchanged, H, UNITS, WARPS)
    # About this program's mean, so that both sums can be computed at once. Little cancels: it is no further from the
    # mean of all than the square root of the number of programs times the deviation.
    shift, squares = zeros, zeros
    for n in tl.static_range(len(of_programs)):
        mean, its_squares, units = of_programs[n]
        shift += units * (mean - own)
        squares += squares_about(own, mean, its_squares, GATES * units)
    shift = sum_of_row(shift, WARPS) / H
    squares = sum_of_row(squares, WARPS) - GATES * H * shift * shift
    return own + shift, tl.rsqrt(squares / (GATES * H) + EPS)


@triton.jit
def means_of_group(
    d, d_unit,  # [THREADS] of the thread's cell, zero where there is none
    pairs_ptr, exchanged,  # as for `exchange_pairs`
    H: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Both sums over all units, divided by GATES * H, [THREADS]: the means of `normalise_backward`."""
    sums = sum_of_row(d, WARPS), sum_of_row(d_unit, WARPS)
    of_programs = exchange_pairs(*sums, pairs_ptr, exchanged, H, UNITS, WARPS)
    d, d_unit = tl.zeros((32 * WARPS,), tl.float32), tl.zeros((32 * WARPS,), tl.float32)
    for n in tl.static_range(len(of_programs)):
        d += of_programs[n][0]
        d_unit += of_programs[n][1]
    return sum_of_row(d, WARPS) / (GATES * H), sum_of_row(d_unit, WARPS) / (GATES * H)


@triton.jit
def is_of_a_timeout(x, error_ptr):
    """[THREADS]: whether x is NaN and a program timed out."""
    at = tl.zeros_like(x).to(tl.int32)
    return tl.load(error_ptr + at, mask=x != x, other=0, volatile=True) != 0


@triton.jit
def h_before(
    step, tile, words_ptr, batch, W: tl.constexpr, REVERSE: tl.constexpr, WARPS: tl.constexpr,
    PADDING: tl.constexpr,  # whether to wait for words of padding and before resets, too
):  # fmt: skip
    """Of the h that a turn starts from, for the thread's column: (where its words are, how many are left from there,
    its sequence, whether it is h and not a state to reset to), each [THREADS]."""
    _, warp, column, quarter = threads(WARPS)
    first_word = warp * 16 + quarter * 4
    sequence = indexing.sequences(tile * SEQUENCES + column, batch)
    from_h = indexing.position(step, sequence, batch, REVERSE).continues
    at = words_ptr + indexing.row_in_h_then_h0(step - 1, sequence, batch, REVERSE) * W + first_word
    return at, tl.where(sequence.in_batch if PADDING else from_h, W - first_word, 0), sequence.index, from_h


@triton.jit(do_not_specialize=["T", "B"])
def lstm_cooperative_forward_kernel(
    gates_ptr,
    weights_ptr,  # [4H, W] int32: W_hh
    weight_peephole_ptr, gain_hh_ptr, gain_c_ptr, bias_c_ptr,
    words_ptr,  # [T*B + B, W] int32: h of every step, out and the exchange, sentinels beforehand; then h0
    pairs_hh_ptr, pairs_c_ptr,  # see `exchange_pairs`, for the layer norms of W_hh h and of c; or None
    c_ptr, h0_ptr,
    h_n_ptr,  # [B, H] out: h after every step
    c_n_ptr,  # [B, H] float32 c0, becomes c after every step
    lengths_ptr, resets_ptr,
    dropout_h_ptr,  # [B, W] int32: factors of h, or None
    zoneout_h_ptr, zoneout_c_ptr, reset_h_ptr, reset_c_ptr, error_ptr, T, B, H: tl.constexpr, PEEPHOLES: tl.constexpr,
    REVERSE: tl.constexpr, SAVE: tl.constexpr, UNITS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr,  # whether groups have several batch tiles
):  # fmt: skip
    """All steps of the units of a program; grid (programs of a group, groups)."""
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    TOGETHER: tl.constexpr = 4 if W % 4 == 0 else 2 if W % 2 == 0 else 1
    STRIDE: tl.constexpr = 16 * WARPS  # words from one chunk of a warp to its next
    # With layer norms, words of padding and before resets are awaited, too: none overwrites what another waits for.
    PADDING: tl.constexpr = NORM_HH or NORM_C
    ROW: tl.constexpr = 4 * WARPS if PADDING else UNITS  # threads for the cells of a sequence
    thread, warp, column, quarter = threads(WARPS)
    first_unit = tl.program_id(0) * UNITS
    first_word = warp * 16 + quarter * 4

    # The rows of W_hh that belong to the program's units, once: row number r is gate r // UNITS of unit r % UNITS.
    rows = ()
    for n in tl.static_range(UNITS // 2):
        unit = first_unit + (8 * n + column) % UNITS
        rows = rows + (tl.where(unit < H, (8 * n + column) // UNITS * H + unit, -1),)
    weights = load_weights(weights_ptr, rows, first_word, W, STRIDE, DTYPE, CHUNKS)

    # The thread's cell, and the word of h that it publishes.
    place = thread % ROW
    unit = first_unit + place
    sequence = thread // ROW
    of_cell = sequence < SEQUENCES
    is_cell = of_cell & (place < UNITS) & (unit < H)
    is_word = of_cell & (place < UNITS) & (unit < W * PER) & (thread % PER == 0)
    sequence %= SEQUENCES
    place %= UNITS
    z_rows = (place, place + UNITS, place + 2 * UNITS, place + 3 * UNITS)

    peepholes = indexing.load_peepholes(weight_peephole_ptr, unit, H)
    gain_hh = indexing.load_gates(gain_hh_ptr, unit, unit < H, H) if NORM_HH else None
    affine_c = indexing.load_affine(gain_c_ptr, bias_c_ptr, unit, H) if NORM_C else None

    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    step, tile = 0, tl.program_id(1)
    seen, delay = None, tl.zeros_like(thread)
    if AHEAD:
        words = h_before(step, tile, words_ptr, batch, W, REVERSE, WARPS, PADDING)
        seen = look(words[0], words[1], CHUNKS, 4, STRIDE, TOGETHER)
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile.
        of_batch = indexing.sequences(tile * SEQUENCES + sequence, batch)
        position = indexing.position(step, of_batch, batch, REVERSE)
        cell = indexing.cells_at(of_batch, position, unit, is_cell, H)
        # As stored: to convert them is to wait for them.
        x = indexing.load_gates(gates_ptr, cell.gates_at, cell.valid, H, True)
        c_prev = indexing.load_state(c_n_ptr, reset_c_ptr, cell)

        # Collect what the group published at the step before, and multiply: the four gates of the thread's cell.
        if not AHEAD:
            words = h_before(step, tile, words_ptr, batch, W, REVERSE, WARPS, PADDING)
        words_at, left, of_column, from_h = words
        h_prev = collect(words_at, left, 0, error_ptr, step, delay, CHUNKS, 4, STRIDE, TOGETHER, False, seen)
        h_prev, delay = h_prev[: 4 * CHUNKS], h_prev[4 * CHUNKS]
        if PADDING:
            collected, h_prev = h_prev, ()
            for n in tl.static_range(4 * CHUNKS):
                # What never arrived is NaN even where it is not used, and so is what is published in its place.
                h_prev = h_prev + (tl.where(from_h | (collected[n] == SENTINEL), collected[n], 0),)
        if dropout_h_ptr is not None:
            h_prev = scale(h_prev, dropout_h_ptr + of_column.to(tl.int64) * W + first_word, left, STRIDE, DTYPE)
        parts = product(weights, h_prev, DTYPE)
        z = sum_over_warps(parts, z_rows, (sequence,), of_cell, turn % 2, WARPS)

        # The words of the next turn arrive while the cell of this one is computed.
        next_step, next_tile = next_turn(step, tile, 1, B)
        if AHEAD:
            words = h_before(next_step, next_tile, words_ptr, batch, W, REVERSE, WARPS, PADDING)
            seen = look(words[0], words[1], CHUNKS, 4, STRIDE, TOGETHER)

        # Gates and cell.
        exchanged = (of_batch.index, of_batch.in_batch, delay, step % 2, error_ptr, step)
        if NORM_HH:
            mean, scale_hh = moments_of_group(z, is_cell, pairs_hh_ptr, exchanged, H, UNITS, WARPS)
            z = normalise_gates(z, mean, scale_hh, gain_hh)
        gates, c, h = cell_forward(x, z, c_prev, peepholes, PEEPHOLES)
        if NORM_C:
            mean, scale_c = moments_of_group((c,), is_cell, pairs_c_ptr, exchanged, H, UNITS, WARPS)
            h = output(gates[3], normalise(c, mean, scale_c, *affine_c))
        c = indexing.zoneout(zoneout_c_ptr, cell, c_prev, c)
        if zoneout_h_ptr is not None:
            h_before_ptr = tl.where(step == 0, h0_ptr, h_n_ptr)
            h_of_cell = indexing.load_state(h_before_ptr, reset_h_ptr, cell)
            h = indexing.zoneout(zoneout_h_ptr, cell, h_of_cell, h)

        # Publish first: the others wait for it. Padding gets zeros.
        h = tl.where(cell.valid, h, 0.0)
        publish(words_ptr + position.row * W + unit // PER, pack(h, DTYPE), is_word & (sequence < B - tile * SEQUENCES))

        # Store.
        tl.store(h_n_ptr + cell.state_at, h, mask=cell.valid)
        tl.store(c_n_ptr + cell.state_at, c, mask=cell.valid)
        if SAVE:
            indexing.store_gates(gates_ptr, cell.gates_at, cell.valid, gates, H)
            tl.store(c_ptr + cell.at, tl.where(cell.valid, c, 0.0), mask=cell.in_tile)
        step, tile = next_step, next_tile


@triton.jit(do_not_specialize=["T", "B"])
def lstm_cooperative_backward_kernel(
    dh_ptr, dh_n_ptr, gates_ptr, c_ptr, c0_ptr,
    weights_ptr,  # [PARTS, H, 4 / PARTS * W] int32: W_hh^T of each part's gates
    weight_peephole_ptr, gain_hh_ptr, unit_hh_ptr, scale_hh_ptr, gain_c_ptr, bias_c_ptr, unit_c_ptr, scale_c_ptr,
    words_ptr,  # [T*B, 4, W] int32: dgates, or their gradient through the norm of W_hh h; sentinels beforehand
    dgates_ptr,  # None without that norm, where they are the words
    pairs_hh_ptr, pairs_c_ptr,  # see `exchange_pairs`, for the layer norms of W_hh h and of c; or None
    partials_ptr,  # [B, PARTS, H] int32: float32 words whose last bits are one beforehand; None if PARTS is 1
    dh_total_ptr, dc_ptr, lengths_ptr, resets_ptr, dropout_h_ptr, zoneout_h_ptr, zoneout_c_ptr,
    dh_from_zoneout_ptr,  # [B, H] float32 zeros, becomes the gradient of h before every step through zoneout; or None
    dreset_h_ptr, reset_c_ptr, dreset_c_ptr, error_ptr, T, B, H: tl.constexpr, PEEPHOLES: tl.constexpr,
    REVERSE: tl.constexpr, UNITS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first, of the units of a program; grid (programs of a group, groups)."""
    NORM_HH: tl.constexpr = gain_hh_ptr is not None
    NORM_C: tl.constexpr = gain_c_ptr is not None
    DTYPE: tl.constexpr = gates_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    W: tl.constexpr = (H + PER - 1) // PER
    K: tl.constexpr = 4 // PARTS * W  # words of dgates that the program multiplies
    TOGETHER: tl.constexpr = 4 if K % 4 == 0 else 2 if K % 2 == 0 else 1
    ROWS: tl.constexpr = PARTS * UNITS  # of W_hh^T: the units of all partners
    STRIDE: tl.constexpr = 16 * WARPS  # words from one chunk of a warp to its next
    ROW: tl.constexpr = 4 * WARPS if NORM_HH or NORM_C else UNITS  # threads for the cells of a sequence
    SUM_ROW: tl.constexpr = ROW if PARTS == 1 else ROWS  # threads, or turns of threads, for the sums of a sequence
    SUMS: tl.constexpr = (SUM_ROW + 4 * WARPS - 1) // (4 * WARPS)  # of a thread: that of its cell, or what it publishes
    thread, warp, column, quarter = threads(WARPS)
    part = tl.program_id(0) % PARTS
    first_unit = tl.program_id(0) // PARTS * ROWS
    first_word = warp * 16 + quarter * 4

    # W_hh^T of the part's gates for the units of all partners, once.
    rows = ()
    for n in tl.static_range(ROWS // 8):
        unit = first_unit + 8 * n + column
        rows = rows + (tl.where(unit < H, part * H + unit, -1),)
    weights = load_weights(weights_ptr, rows, first_word, K, STRIDE, DTYPE, CHUNKS)

    # The thread's cell, the word of dgates that it publishes, and its sums.
    unit = first_unit + part * UNITS + thread % ROW
    sequence = thread // ROW
    of_cell = (sequence < SEQUENCES) & (thread % ROW < UNITS)
    is_cell = of_cell & (unit < H)
    is_word = of_cell & (unit < W * PER) & (thread % PER == 0)
    sequence %= SEQUENCES
    sum_rows, sum_sequences = (), ()
    for n in tl.static_range(SUMS):
        sum_rows = sum_rows + ((thread + n * 32 * WARPS) % SUM_ROW % ROWS,)
        sum_sequences = sum_sequences + ((thread + n * 32 * WARPS) // SUM_ROW % SEQUENCES,)

    peepholes = indexing.load_peepholes(weight_peephole_ptr, unit, H)
    gain_hh = indexing.load_gates(gain_hh_ptr, unit, unit < H, H) if NORM_HH else None
    affine_c = indexing.load_affine(gain_c_ptr, bias_c_ptr, unit, H) if NORM_C else None

    batch, saved = indexing.Batch(lengths_ptr, resets_ptr, T, B), indexing.Saved(gates_ptr, c_ptr, c0_ptr, reset_c_ptr)
    step, tile = T - 1, tl.program_id(1)
    delay, delay_of_sums = tl.zeros_like(thread), tl.zeros_like(thread)
    lost = tl.zeros((32 * WARPS,), tl.int1)  # a program timed out: what depends on it is NaN, past resets, too
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile.
        of_batch = indexing.sequences(tile * SEQUENCES + sequence, batch)
        position = indexing.position(step, of_batch, batch, REVERSE)
        cell = indexing.cells_at(of_batch, position, unit, is_cell, H)
        row_prev = indexing.row_before(step, position.time, of_batch.index, B, REVERSE)
        gates, c, c_prev = indexing.load_saved(saved, step, row_prev, unit, cell, H, True)  # as stored, as forward
        dc = tl.load(dc_ptr + cell.state_at, mask=cell.valid, other=0.0)
        if NORM_HH:
            unit_hh = indexing.load_gates(unit_hh_ptr, cell.gates_at, cell.valid, H)
            scale_hh = tl.load(scale_hh_ptr + position.row, mask=cell.valid, other=0.0)
        if NORM_C:
            unit_c = tl.load(unit_c_ptr + cell.at, mask=cell.valid, other=0.0)
            scale_c = tl.load(scale_c_ptr + position.row, mask=cell.valid, other=0.0)
        dh_given = indexing.load_gradients_given(dh_ptr, dh_n_ptr, step == of_batch.length - 1, cell)
        next_continues = indexing.position(step + 1, of_batch, batch, REVERSE).continues

        # Product: dh of the partners' units, as far as it comes from the part's gates. Words of padding and after
        # resets are awaited, too: none overwrites sums that another waits for.
        of_column = indexing.sequences(tile * SEQUENCES + column, batch)
        row_next = indexing.row_of(indexing.time_of(step + 1, of_column.length, REVERSE), of_column.index, B)
        dgates_at = words_ptr + row_next * (4 * W) + part * K + first_word
        left = tl.where(of_column.in_batch & (step < T - 1), K - first_word, 0)
        dz = collect(dgates_at, left, 0, error_ptr, step, delay, CHUNKS, 4, STRIDE, TOGETHER, False)
        parts, delay = product(weights, dz[: 4 * CHUNKS], DTYPE), dz[4 * CHUNKS]
        has_sums = thread < SEQUENCES * SUM_ROW
        sums = sum_over_warps(parts, sum_rows, sum_sequences, has_sums, turn % 2, WARPS)
        phase = (T - 1 - step) % 2
        dh_next = sums[0]
        if PARTS > 1:  # publish them, and add up all parts for the thread's cell
            for n in tl.static_range(SUMS):
                to, sum_unit = tile * SEQUENCES + sum_sequences[n], first_unit + sum_rows[n]
                wanted = (thread + n * 32 * WARPS < SEQUENCES * ROWS) & (sum_unit < H) & (to < B)
                to_at = partials_ptr + (to.to(tl.int64) * PARTS + part) * H + sum_unit
                publish(to_at, in_phase(pack(sums[n], tl.float32), phase), wanted)
            parts_at = partials_ptr + of_batch.index.to(tl.int64) * (PARTS * H) + unit
            left = tl.where(cell.in_tile, PARTS * H, 0)  # at every step: no phase is skipped
            words = collect(parts_at, left, phase, error_ptr, step, delay_of_sums, PARTS, 1, H, 1, True)
            delay_of_sums = words[PARTS]
            dh_next = words[0].to(tl.float32, bitcast=True)
            for n in tl.static_range(1, PARTS):
                dh_next += words[n].to(tl.float32, bitcast=True)
        dh_next = tl.where(next_continues, dh_next, 0.0)
        if dropout_h_ptr is not None:
            dh_next *= tl.load(dropout_h_ptr + cell.state_at, mask=cell.valid, other=0.0).to(tl.float32)
        dh = indexing.add_as_float(dh_next, dh_given)
        dh = indexing.zoneout_h_backward(dh, zoneout_h_ptr, dh_from_zoneout_ptr, dreset_h_ptr, cell)

        # Cell.
        exchanged = (of_batch.index, of_batch.in_batch, delay, phase, error_ptr, step)
        gates = indexing.as_float(gates)
        dc, c, dc_from_zoneout = indexing.zoneout_c_backward(dc, zoneout_c_ptr, gates, c, c_prev, cell)
        if NORM_C:
            dz_o, d_unit = normed_output_backward(gates[3], unit_c, dh, *affine_c)
            summed = tl.where(lost, float("nan"), d_unit)
            mean_d, mean_d_unit = means_of_group(summed, d_unit * unit_c, pairs_c_ptr, exchanged, H, UNITS, WARPS, 1)
            lost |= is_of_a_timeout(mean_d, error_ptr)
            dc += normalise_backward(d_unit, unit_c, scale_c, mean_d, mean_d_unit)
        else:
            dz_o, dc_of_m = output_backward(gates[3], c, dh)
            dc += dc_of_m
        dz, dc_prev = gates_backward(gates, c_prev, dz_o, dc, peepholes, PEEPHOLES)
        if zoneout_c_ptr is not None:
            dc_prev += dc_from_zoneout

        # Through the layer norm of W_hh h, from dz as it is stored.
        if NORM_HH:
            indexing.store_gates(dgates_ptr, cell.gates_at, cell.in_tile, dz, H)
            d, sum_d, sum_d_unit = gates_of_unit(dz, gain_hh, unit_hh, DTYPE)
            sum_d = tl.where(lost, float("nan"), sum_d)
            mean_d, mean_d_unit = means_of_group(sum_d, sum_d_unit, pairs_hh_ptr, exchanged, H, UNITS, WARPS, 4)
            lost |= is_of_a_timeout(mean_d, error_ptr)
            dz = normalise_gates_backward(d, unit_hh, scale_hh, mean_d, mean_d_unit)

        # Publish. In padding every factor was loaded as zero, so its gradients are zero.
        for n in tl.static_range(4):
            word_at = words_ptr + position.row * (4 * W) + n * W + unit // PER
            publish(word_at, pack(dz[n], DTYPE), is_word & of_batch.in_batch)
        tl.store(dc_ptr + cell.state_at, tl.where(cell.continues, dc_prev, 0.0), mask=cell.valid)
        if NORM_C:
            tl.store(dh_total_ptr + cell.at, dh, mask=cell.in_tile)
        if dreset_c_ptr is not None:
            tl.store(dreset_c_ptr + cell.at, dc_prev, mask=cell.reset)
        step, tile = next_turn(step, tile, -1, B)


def plans(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    """Where the registers of all multiprocessors together hold W_hh as operands of tensor cores."""
    in_the_loop = problem.projected and problem.regularised  # see kernels/projection.py
    if in_the_loop or problem.batch == 0 or problem.exact_float32:
        return
    candidates = []
    for parts in (1, 2, 4) if backward else (1,):
        words = ceil(problem.hidden * problem.size / 4) * (4 // parts if backward else 1)
        warps = 8 if words > 64 else 4
        chunks = ceil(words / (16 * warps))
        for units in range(4, 4 * warps + 1, 4):
            rows = units * (parts if backward else 4)  # of weights; see the top of this file
            programs = parts * ceil(problem.hidden / (parts * units))
            registers = (rows // 2 + 4) * chunks + rows // 4  # of a thread: weights, words, sums
            tiles = ceil(problem.batch / 8)
            groups = min(tiles, device.multiprocessors // (programs * problem.side_by_side))
            shared = 2 * warps * rows * 8 * 4  # twice the sums of all warps
            if rows % 16 == 0 and groups and registers <= MOST_REGISTERS and shared <= STATIC_SHARED:
                what = ("dgates" if backward else "h") + ", and sums for layer norms" * problem.normalised
                why = f"{programs} programs hold W_hh in registers, {rows // 2 * chunks} a thread, and exchange {what}"
                candidates.append(Plan(
                    Family.COOPERATIVE, 8, units, chunks, programs, groups, warps, 1, shared, why,
                    tiles_per_group=ceil(tiles / groups), side_by_side=problem.side_by_side, parts=parts,
                    ahead=tiles > groups and not backward,
                ))  # fmt: skip
    yield from sorted(candidates, key=lambda plan: expected(problem, device, plan, backward).seconds)


MOST_REGISTERS = 190  # of a thread's 255 that may hold weights, words and sums
STATIC_SHARED = 48 * KB  # that a kernel may declare (CUDA C++ Programming Guide)

KERNELS = lstm_cooperative_forward_kernel, lstm_cooperative_backward_kernel


def forward_buffers(p: Problem, plan: Plan) -> dict[str, Buffer]:
    """What forward writes besides the results that all families share; h is one of those, but in rows of words."""
    return {"h_ptr": Buffer(p.dtype, (p.batch, _row(p)), 1, EVERY_BIT)} | _pairs(p, plan)  # and h0 at its end


def backward_buffers(p: Problem, plan: Plan) -> dict[str, Buffer]:
    """As forward_buffers, for backward, where dgates are the words, or come from them through the norm of W_hh h."""
    # What W_hh^T is multiplied with.
    buffers = {EXCHANGED: Buffer(p.dtype, (p.batch, 4, _row(p)), 0, EVERY_BIT)} | _pairs(p, plan)
    if plan.parts > 1:
        buffers["partials_ptr"] = Buffer(torch.int32, (p.batch, plan.parts, p.hidden), fill=EVERY_BIT)
    return buffers


BUFFERS = forward_buffers, backward_buffers
EXCHANGED = "exchanged"  # among the buffers: passed as words


def forward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """What forward reads besides the tensors of a call."""
    h0, h = r.given.h0[0], memory["h_ptr"][-1]  # [B, H], [B, H or one more]
    if _row(p) > p.hidden:
        h.zero_()
    h[:, : p.hidden] = torch.where(h0.isnan(), torch.nan, h0)  # any NaN but the sentinel
    found = {"weights_ptr": as_words(r.given.weight_hh, p.hidden), "words_ptr": memory["h_ptr"].view(torch.int32)}
    return found | ({"dropout_h_ptr": as_words(r.given.dropout_h, p.hidden)} if p.dropout_h else {})


def backward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """As forward_operands, for backward."""
    weights = transposed_gates(r.given.weight_hh, p.hidden, plan.parts)
    return {"weights_ptr": weights, "words_ptr": memory[EXCHANGED].view(torch.int32)}


OPERANDS = forward_operands, backward_operands


def _pairs(p: Problem, plan: Plan) -> dict[str, Buffer]:
    """Buffers of `exchange_pairs`, one for each layer norm."""
    pairs = Buffer(torch.int32, (p.batch, ceil(p.hidden / plan.columns), 2), fill=EVERY_BIT)
    return {name: pairs for name, there in zip(("pairs_hh_ptr", "pairs_c_ptr"), p.norms) if there}


def _row(p: Problem) -> int:
    """Elements of a row of H units that is a whole number of words."""
    return p.hidden + p.hidden * p.size % 4 // p.size
