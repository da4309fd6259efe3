"""The cooperative family: the whole sequence in one launch, W_hh spread over many programs, h exchanged at each step.

The programs of one batch tile are a group, which never waits for another. Each owns UNITS hidden units, and keeps its
part of W_hh in registers. A group may have several batch tiles: forward requests the words of one before it computes
the cell of the other. All programs of a launch must be resident at once.

forward    A program holds the gates' rows of its units, [GATES UNITS, H], and publishes h of its units.
backward   PARTNERS programs, a divisor of GATES, own PARTNERS UNITS units together. Each holds W_hh^T of
           GATES / PARTNERS gates for all of these, [PARTNERS UNITS, GATES / PARTNERS H], and reads only the dgates of
           these gates. With partners it publishes its partial sums in a second, small exchange, and adds up all
           partners' for its own units.

In the product a thread's column is a sequence, and K is split over the warps (fragments.py); afterwards it owns a cell,
one unit of one sequence. With layer norms, ROW threads of one warp have the cells of a sequence, sum them up in two
numbers, exchange these with all programs, and add up by shuffles. Words (exchange.py) have PER units: a row of H units
is W = ceil(H / PER) words, of which the last may be half empty; so the weights are passed as words, too.
"""

from collections import namedtuple
from collections.abc import Iterator
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cards import KB, Card
from ..cells import CELLS
from ..memory import EVERY_BIT, Buffer
from ..operands import as_words, transposed_gates
from ..problem import Problem, Recurrence
from . import indexing
from .cells import cell_backward, cell_forward
from .cells.lstm import gates_backward, normed_output_backward, output
from .exchange import Wait, Words, collect, collect_at_once, in_phase, look, pack, publish
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
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, NormC, NormHH, Saved
from .planning import Cooperative, Plan

SENTINEL = tl.constexpr(EVERY_BIT)  # as int32: the word for data that are not there yet, which `pack` never returns


# The cell of each thread: the place of its unit among the program's, the column of the batch tile that is its sequence,
# whether it has one, and whether it publishes a word.
Own = namedtuple("Own", "place unit column is_cell is_word")
# The h that a step starts from, of the sequence in each thread's column: its Words, the sequence's index in the batch,
# and whether h continues there, or is reset or padding.
Before = namedtuple("Before", "words index continues")
# Which sums over the warps' products each thread forms, tuples of SUMS: rows and columns of the product, the units, and
# whether its partners need them.
Sums = namedtuple("Sums", "rows columns units published")


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
def cell_of_thread(first_unit, ROW: tl.constexpr, S: tl.constexpr):
    """What each thread owns where a sequence has ROW threads, and the program UNITS units from `first_unit` on."""
    thread = tl.arange(0, 32 * S.WARPS)
    place, column = thread % ROW, thread // ROW
    unit = first_unit + place
    is_unit = (column < SEQUENCES) & (place < S.UNITS)
    is_word = is_unit & (unit < S.W * S.PER) & (thread % S.PER == 0)
    return Own(place % S.UNITS, unit, column % SEQUENCES, is_unit & (unit < S.H), is_word)


@triton.jit
def sum_of_row(x):
    """[THREADS] float32 -> the sum over the threads of each sequence, for all of them: without a barrier."""
    THREADS: tl.constexpr = x.shape[0]
    total = tl.sum(tl.reshape(x, (SEQUENCES, THREADS // SEQUENCES)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (SEQUENCES, THREADS // SEQUENCES)), (THREADS,))


@triton.jit
def exchange_pairs(
    first, second,  # [THREADS] float32, the same in a sequence's whole row: of the program's units
    pairs_ptr,  # [B, programs, 2] int32: float32 words, whose last bits are one beforehand
    sequence, wait, S: tl.constexpr,
):  # fmt: skip
    """Of each of a thread's programs, place + n ROW: (first number, second number, number of its units); zeros where
    there is none. Programs without units do nothing. It is called at every step: no phase is skipped."""
    THREADS: tl.constexpr = first.shape[0]
    ROW: tl.constexpr = THREADS // SEQUENCES
    PROGRAMS: tl.constexpr = (S.H + S.UNITS - 1) // S.UNITS
    COUNT: tl.constexpr = (PROGRAMS + ROW - 1) // ROW
    place = tl.arange(0, THREADS) % ROW
    program = tl.zeros_like(place) + tl.program_id(0)
    here = sequence.in_batch & (program < PROGRAMS)
    pairs_at = pairs_ptr + sequence.index.to(tl.int64) * (2 * PROGRAMS)
    own = in_phase(pack(tl.where(place == 0, first, second), tl.float32), wait.phase)
    publish(pairs_at + 2 * program + place, own, here & (place < 2))
    pairs = Words(pairs_at + 2 * place, tl.where(here, 2 * (PROGRAMS - place), 0))
    words = collect_at_once(pairs, wait, COUNT, 2, 2 * ROW, 2)
    found = ()
    for n in tl.static_range(COUNT):
        one, other = words[2 * n].to(tl.float32, bitcast=True), words[2 * n + 1].to(tl.float32, bitcast=True)
        found = found + ((one, other, units_of(place + n * ROW, S)),)
    return found


@triton.jit
def moments_of_group(v, is_cell, pairs_ptr, sequence, wait, S: tl.constexpr):
    """(mean, scale) over all units of v, a tuple of [THREADS] of the thread's cell; each [THREADS]."""
    GATES: tl.constexpr = len(v)
    zeros = tl.zeros(v[0].shape, tl.float32)
    total, squares = zeros, zeros
    for n in tl.static_range(GATES):
        total += tl.where(is_cell, v[n], 0.0)
    own = sum_of_row(total) / (GATES * units_of(tl.program_id(0), S))
    for n in tl.static_range(GATES):
        distance = tl.where(is_cell, v[n] - own, 0.0)
        squares += distance * distance
    of_programs = exchange_pairs(own, sum_of_row(squares), pairs_ptr, sequence, wait, S)
    # About this program's mean, so that both sums can be computed at once. Little cancels: it is no further from the
    # mean of all than the square root of the number of programs times the deviation.
    shift, squares = zeros, zeros
    for n in tl.static_range(len(of_programs)):
        mean, its_squares, units = of_programs[n]
        shift += units * (mean - own)
        squares += squares_about(own, mean, its_squares, GATES * units)
    shift = sum_of_row(shift) / S.H
    squares = sum_of_row(squares) - GATES * S.H * shift * shift
    return own + shift, tl.rsqrt(squares / (GATES * S.H) + EPS)


@triton.jit
def means_of_group(d, d_unit, pairs_ptr, sequence, wait, GATES: tl.constexpr, S: tl.constexpr):
    """The sums over all units of d and d_unit, [THREADS] of the thread's cell and zero where there is none, divided by
    GATES * H, [THREADS]: the means of `normalise_backward`."""
    of_programs = exchange_pairs(sum_of_row(d), sum_of_row(d_unit), pairs_ptr, sequence, wait, S)
    d, d_unit = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for n in tl.static_range(len(of_programs)):
        d += of_programs[n][0]
        d_unit += of_programs[n][1]
    return sum_of_row(d) / (GATES * S.H), sum_of_row(d_unit) / (GATES * S.H)


@triton.jit
def is_of_a_timeout(x, error_ptr):
    """[THREADS]: whether x is NaN and a program timed out."""
    at = tl.zeros_like(x).to(tl.int32)
    return tl.load(error_ptr + at, mask=x != x, other=0, volatile=True) != 0


@triton.jit
def h_before(step, tile, words_ptr, batch, PADDING: tl.constexpr, S: tl.constexpr):
    """Where the h that a step starts from lies. With PADDING words of padding and before resets are awaited, too."""
    thread = threads(S.WARPS)
    first_word = thread.warp * 16 + thread.quarter * 4
    sequence = indexing.sequences(tile * SEQUENCES + thread.column, batch)
    continues = indexing.position(step, sequence, batch, S.REVERSE).continues
    at = words_ptr + indexing.row_in_h_then_h0(step - 1, sequence, batch, S.REVERSE) * S.W + first_word
    left = tl.where(sequence.in_batch if PADDING else continues, S.W - first_word, 0)
    return Before(Words(at, left), sequence.index, continues)


@triton.jit
def zero_at_resets(h, continues):
    """Words of h, zero where it is reset. What never arrived is NaN even there, and so is what is published then."""
    zeroed = ()
    for n in tl.static_range(len(h)):
        zeroed = zeroed + (tl.where(continues | (h[n] == SENTINEL), h[n], 0),)
    return zeroed


@triton.jit(do_not_specialize=["T", "B"])
def lstm_cooperative_forward_kernel(
    weights_ptr,  # [4H, W] int32: W_hh
    words_ptr,  # [T*B + B, W] int32: h of every step, out and the exchange, sentinels beforehand; then h0
    hidden: Hidden,  # h_ptr is None, for the words; h_n is h after every step; dropout_h is [B, W] int32
    cell: Cell, norm_hh: NormHH, norm_c: NormC, lengths_ptr, resets_ptr, error_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps of the units of a program; grid (programs of a group, groups)."""
    H: tl.constexpr = S.H
    UNITS: tl.constexpr = S.UNITS
    GATES: tl.constexpr = S.GATES
    W: tl.constexpr = S.W
    NORM_HH: tl.constexpr = norm_hh.gain_hh_ptr is not None
    NORM_C: tl.constexpr = norm_c.gain_c_ptr is not None
    DTYPE: tl.constexpr = cell.gates_ptr.dtype.element_ty
    TOGETHER: tl.constexpr = 4 if W % 4 == 0 else 2 if W % 2 == 0 else 1
    STRIDE: tl.constexpr = 16 * S.WARPS  # words from one chunk of a warp to its next
    # With layer norms, words of padding and before resets are awaited, too: none overwrites what another waits for.
    PADDING: tl.constexpr = NORM_HH or NORM_C
    ROW: tl.constexpr = 4 * S.WARPS if PADDING else UNITS  # threads for the cells of a sequence
    thread = threads(S.WARPS)
    first_unit, first_word = tl.program_id(0) * UNITS, thread.warp * 16 + thread.quarter * 4

    # The rows of W_hh that belong to the program's units, once: row number r is gate r // UNITS of unit r % UNITS.
    rows = ()
    for n in tl.static_range((GATES * UNITS + 15) // 16 * 2):
        row = 8 * n + thread.column
        unit = first_unit + row % UNITS
        there = unit < H
        if GATES * UNITS % 16 > 0:
            there &= row < GATES * UNITS
        rows = rows + (tl.where(there, row // UNITS * H + unit, -1),)
    weights = load_weights(weights_ptr, rows, first_word, W, STRIDE, DTYPE, S.CHUNKS)

    own = cell_of_thread(first_unit, ROW, S)
    z_rows = ()
    for n in tl.static_range(GATES):
        z_rows = z_rows + (own.place + n * UNITS,)
    peepholes = indexing.load_peepholes(cell.weight_peephole_ptr, own.unit, H)
    gain_hh = indexing.load_gates(norm_hh.gain_hh_ptr, own.unit, own.unit < H, H) if NORM_HH else None
    affine_c = indexing.load_affine(norm_c.gain_c_ptr, norm_c.bias_c_ptr, own.unit, H) if NORM_C else None

    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    step, tile = 0, tl.program_id(1)
    seen, delay = None, tl.zeros_like(thread.number)
    if S.AHEAD:
        before = h_before(step, tile, words_ptr, batch, PADDING, S)
        seen = look(before.words, S.CHUNKS, 4, STRIDE, TOGETHER)
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile. As stored, since to convert them is to wait for them.
        sequence = indexing.sequences(tile * SEQUENCES + own.column, batch)
        position = indexing.position(step, sequence, batch, S.REVERSE)
        cells = indexing.cells_at(sequence, position, own.unit, own.is_cell, H)
        x = indexing.load_gates(cell.gates_ptr, cells.gates_at, cells.valid, H, True)
        c_prev = indexing.load_state(cell.c_n_ptr, cell.reset_c_ptr, cells)

        # Collect what the group published at the step before, and multiply: the four gates of the thread's cell.
        if not S.AHEAD:
            before = h_before(step, tile, words_ptr, batch, PADDING, S)
        wait = Wait(error_ptr, step, delay, None)
        h_prev, delay = collect(before.words, wait, S.CHUNKS, 4, STRIDE, TOGETHER, seen)
        if PADDING:
            h_prev = zero_at_resets(h_prev, before.continues)
        if hidden.dropout_h_ptr is not None:
            factors_at = hidden.dropout_h_ptr + before.index.to(tl.int64) * W + first_word
            h_prev = scale(h_prev, factors_at, before.words.left, STRIDE, DTYPE)
        parts = product(weights, h_prev, DTYPE)
        z = sum_over_warps(parts, z_rows, (own.column,), thread.number < SEQUENCES * ROW, turn % 2, S.WARPS)
        if GATES < 4:
            z = (0.0,) + z

        # The words of the next turn arrive while the cell of this one is computed.
        next_step, next_tile = next_turn(step, tile, 1, B)
        if S.AHEAD:
            before = h_before(next_step, next_tile, words_ptr, batch, PADDING, S)
            seen = look(before.words, S.CHUNKS, 4, STRIDE, TOGETHER)

        # Gates and cell.
        wait = Wait(error_ptr, step, delay, step % 2)
        if NORM_HH:
            mean, scale_hh = moments_of_group(z, own.is_cell, norm_hh.pairs_hh_ptr, sequence, wait, S)
            z = normalise_gates(z, mean, scale_hh, gain_hh)
        gates, c, h = cell_forward(x, z, c_prev, peepholes, S)
        if NORM_C:
            mean, scale_c = moments_of_group((c,), own.is_cell, norm_c.pairs_c_ptr, sequence, wait, S)
            h = output(gates[3], normalise(c, mean, scale_c, *affine_c))
        c = indexing.zoneout(cell.zoneout_c_ptr, cells, c_prev, c)
        if hidden.zoneout_h_ptr is not None:
            h_prev_ptr = tl.where(step == 0, hidden.h0_ptr, hidden.h_n_ptr)
            h_of_cell = indexing.load_state(h_prev_ptr, hidden.reset_h_ptr, cells)
            h = indexing.zoneout(hidden.zoneout_h_ptr, cells, h_of_cell, h)

        # Publish first: the others wait for it. Padding gets zeros.
        h = tl.where(cells.valid, h, 0.0)
        word_at = words_ptr + position.row * W + own.unit // S.PER
        publish(word_at, pack(h, DTYPE), own.is_word & sequence.in_batch)

        # Store.
        tl.store(hidden.h_n_ptr + cells.state_at, h, mask=cells.valid)
        tl.store(cell.c_n_ptr + cells.state_at, c, mask=cells.valid)
        if cell.c_ptr is not None:
            indexing.store_gates(cell.gates_ptr, cells.gates_at, cells.valid, gates, H)
            tl.store(cell.c_ptr + cells.at, tl.where(cells.valid, c, 0.0), mask=cells.in_tile)
        step, tile = next_step, next_tile


@triton.jit
def dgates_after(step, tile, words_ptr, batch, K: tl.constexpr, S: tl.constexpr):
    """The Words of dgates of the step after, K of each sequence. Those of padding and after resets are awaited, too:
    none overwrites sums that another waits for."""
    thread = threads(S.WARPS)
    first_word = thread.warp * 16 + thread.quarter * 4
    sequence = indexing.sequences(tile * SEQUENCES + thread.column, batch)
    row = indexing.row_of(indexing.time_of(step + 1, sequence.length, S.REVERSE), sequence.index, batch.B)
    left = tl.where(sequence.in_batch & (step < batch.T - 1), K - first_word, 0)
    return Words(words_ptr + row * (4 * S.W) + first_word, left)


@triton.jit
def sums_of_thread(first_unit, SUM_ROW: tl.constexpr, SUMS: tl.constexpr, S: tl.constexpr):
    """Where a sequence has SUM_ROW threads, or turns of threads, for the sums of the partners' units."""
    ROWS: tl.constexpr = S.PARTNERS * S.UNITS
    rows, columns, units, published = (), (), (), ()
    for n in tl.static_range(SUMS):
        number = tl.arange(0, 32 * S.WARPS) + n * 32 * S.WARPS
        rows = rows + (number % SUM_ROW % ROWS,)
        columns = columns + (number // SUM_ROW % SEQUENCES,)
        units = units + (first_unit + rows[n],)
        published = published + ((number < SEQUENCES * ROWS) & (units[n] < S.H),)
    return Sums(rows, columns, units, published)


@triton.jit
def publish_sums(sums, places, tile, partials_ptr, phase, B, S: tl.constexpr):
    """Publish one part's sums for all partners."""
    for n in tl.static_range(len(sums)):
        index = tile * SEQUENCES + places.columns[n]
        at = partials_ptr + index.to(tl.int64) * (S.PARTNERS * S.H) + places.units[n]
        publish(at, in_phase(pack(sums[n], tl.float32), phase), places.published[n] & (index < B))


@triton.jit
def add_sums(partials_ptr, sequence, unit, cells, wait, S: tl.constexpr):
    """(The sum of what all partners published for the thread's cell, the delay of the next wait for it)."""
    PARTNERS: tl.constexpr = S.PARTNERS  # Triton 3.4 takes no field of a tuple for static_range
    at = partials_ptr + sequence.index.to(tl.int64) * (PARTNERS * S.H) + unit
    words = Words(at, tl.where(cells.in_tile, PARTNERS * S.H, 0))  # at every step: no phase is skipped
    parts, delay = collect(words, wait, PARTNERS, 1, S.H, 1)
    total = parts[0].to(tl.float32, bitcast=True)
    for n in tl.static_range(1, PARTNERS):
        total += parts[n].to(tl.float32, bitcast=True)
    return total, delay


@triton.jit(do_not_specialize=["T", "B"])
def lstm_cooperative_backward_kernel(
    weights_ptr,  # [PARTNERS, H, GATES / PARTNERS * W] int32: W_hh^T of each partner's gates
    words_ptr,  # [T*B, 4, W] int32: dgates, or their gradient through the norm of W_hh h; sentinels beforehand
    partials_ptr,  # [B, PARTNERS, H] int32: float32 words whose last bits are one beforehand; None without partners
    hidden: HiddenBackward,
    cell: CellBackward,  # dgates_ptr is None, for the words, without a norm of W_hh h
    saved: Saved, norm_hh: NormHH, norm_c: NormC, dh_total_ptr, lengths_ptr, resets_ptr, error_ptr, T, B,
    S: tl.constexpr,
):  # fmt: skip
    """All steps, from the last to the first, of the units of a program; grid (programs of a group, groups)."""
    H: tl.constexpr = S.H
    UNITS: tl.constexpr = S.UNITS
    W: tl.constexpr = S.W
    PARTNERS: tl.constexpr = S.PARTNERS
    NORM_HH: tl.constexpr = norm_hh.gain_hh_ptr is not None
    NORM_C: tl.constexpr = norm_c.gain_c_ptr is not None
    DTYPE: tl.constexpr = saved.gates_ptr.dtype.element_ty
    K: tl.constexpr = S.GATES // PARTNERS * W  # words of dgates that the program multiplies
    TOGETHER: tl.constexpr = 4 if K % 4 == 0 else 2 if K % 2 == 0 else 1
    ROWS: tl.constexpr = PARTNERS * UNITS  # of W_hh^T: the units of all partners
    STRIDE: tl.constexpr = 16 * S.WARPS  # words from one chunk of a warp to its next
    ROW: tl.constexpr = 4 * S.WARPS if NORM_HH or NORM_C else UNITS  # threads for the cells of a sequence
    SUM_ROW: tl.constexpr = ROW if PARTNERS == 1 else ROWS  # threads, or turns of threads, for the sums of a sequence
    SUMS: tl.constexpr = (SUM_ROW + 4 * S.WARPS - 1) // (
        4 * S.WARPS
    )  # of a thread: that of its cell, or what it publishes
    thread = threads(S.WARPS)
    part = tl.program_id(0) % PARTNERS
    first_unit, first_word = tl.program_id(0) // PARTNERS * ROWS, thread.warp * 16 + thread.quarter * 4

    # W_hh^T of the part's gates for the units of all partners, once.
    rows = ()
    for n in tl.static_range((ROWS + 15) // 16 * 2):
        row = 8 * n + thread.column
        unit = first_unit + row
        there = unit < H
        if ROWS % 16 > 0:
            there &= row < ROWS
        rows = rows + (tl.where(there, part * H + unit, -1),)
    weights = load_weights(weights_ptr, rows, first_word, K, STRIDE, DTYPE, S.CHUNKS)
    of_part_ptr = words_ptr + part * K
    if S.GATES < 4:
        of_part_ptr += (4 - S.GATES) * W

    own = cell_of_thread(first_unit + part * UNITS, ROW, S)
    places = sums_of_thread(first_unit, SUM_ROW, SUMS, S)
    peepholes = indexing.load_peepholes(cell.weight_peephole_ptr, own.unit, H)
    gain_hh = indexing.load_gates(norm_hh.gain_hh_ptr, own.unit, own.unit < H, H) if NORM_HH else None
    affine_c = indexing.load_affine(norm_c.gain_c_ptr, norm_c.bias_c_ptr, own.unit, H) if NORM_C else None

    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    step, tile = T - 1, tl.program_id(1)
    delay, delay_of_sums = tl.zeros_like(thread.number), tl.zeros_like(thread.number)
    lost = tl.zeros((32 * S.WARPS,), tl.int1)  # a program timed out: what depends on it is NaN, past resets, too
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile.
        sequence = indexing.sequences(tile * SEQUENCES + own.column, batch)
        position = indexing.position(step, sequence, batch, S.REVERSE)
        cells = indexing.cells_at(sequence, position, own.unit, own.is_cell, H)
        row_prev = indexing.row_before(step, position.time, sequence.index, B, S.REVERSE)
        gates, c, c_prev = indexing.load_saved(saved, step, row_prev, own.unit, cells, H, True)  # as stored, as forward
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        if NORM_HH:
            unit_hh = indexing.load_gates(norm_hh.unit_hh_ptr, cells.gates_at, cells.valid, H)
            scale_hh = tl.load(norm_hh.scale_hh_ptr + position.row, mask=cells.valid, other=0.0)
        if NORM_C:
            unit_c = tl.load(norm_c.unit_c_ptr + cells.at, mask=cells.valid, other=0.0)
            scale_c = tl.load(norm_c.scale_c_ptr + position.row, mask=cells.valid, other=0.0)
        dh_given = indexing.load_gradients_given(hidden, step == sequence.length - 1, cells)
        next_continues = indexing.position(step + 1, sequence, batch, S.REVERSE).continues

        # Product: dh of the partners' units, as far as it comes from the part's gates.
        words = dgates_after(step, tile, of_part_ptr, batch, K, S)
        dz, delay = collect(words, Wait(error_ptr, step, delay, None), S.CHUNKS, 4, STRIDE, TOGETHER)
        parts = product(weights, dz, DTYPE)
        has_sums = thread.number < SEQUENCES * SUM_ROW
        sums = sum_over_warps(parts, places.rows, places.columns, has_sums, turn % 2, S.WARPS)
        phase = (T - 1 - step) % 2
        dh = sums[0]
        if PARTNERS > 1:
            publish_sums(sums, places, tile, partials_ptr + part * H, phase, B, S)
            wait = Wait(error_ptr, step, delay_of_sums, phase)
            dh, delay_of_sums = add_sums(partials_ptr, sequence, own.unit, cells, wait, S)
        dh = tl.where(next_continues, dh, 0.0)
        if hidden.dropout_h_ptr is not None:
            dh *= tl.load(hidden.dropout_h_ptr + cells.state_at, mask=cells.valid, other=0.0).to(tl.float32)
        dh = indexing.add_as_float(dh, dh_given)
        dh = indexing.zoneout_h_backward(dh, hidden, cells)

        # Cell.
        wait = Wait(error_ptr, step, delay, phase)
        gates = indexing.as_float(gates)
        dc, c, dc_from_zoneout = indexing.zoneout_c_backward(dc, cell.zoneout_c_ptr, gates, c, c_prev, cells, S)
        if NORM_C:
            dz_o, d_unit = normed_output_backward(gates[3], unit_c, dh, *affine_c)
            sum_d = tl.where(lost, float("nan"), d_unit)
            mean_d, mean_d_unit = means_of_group(sum_d, d_unit * unit_c, norm_c.pairs_c_ptr, sequence, wait, 1, S)
            lost |= is_of_a_timeout(mean_d, error_ptr)
            dc += normalise_backward(d_unit, unit_c, scale_c, mean_d, mean_d_unit)
            dz, dc_prev = gates_backward(gates, c_prev, dz_o, dc, peepholes)
        else:
            dz, dc_prev = cell_backward(gates, c_prev, c, dh, dc, peepholes, S)
        if cell.zoneout_c_ptr is not None:
            dc_prev += dc_from_zoneout

        # Through the layer norm of W_hh h, from dz as it is stored.
        if NORM_HH:
            indexing.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, H)
            d, sum_d, sum_d_unit = gates_of_unit(dz, gain_hh, unit_hh, DTYPE)
            sum_d = tl.where(lost, float("nan"), sum_d)
            mean_d, mean_d_unit = means_of_group(sum_d, sum_d_unit, norm_hh.pairs_hh_ptr, sequence, wait, 4, S)
            lost |= is_of_a_timeout(mean_d, error_ptr)
            dz = normalise_gates_backward(d, unit_hh, scale_hh, mean_d, mean_d_unit)

        # Publish. In padding every factor was loaded as zero, so its gradients are zero.
        word_at = words_ptr + position.row * (4 * W) + own.unit // S.PER
        for n in tl.static_range(4):
            publish(word_at + n * W, pack(dz[n], DTYPE), own.is_word & sequence.in_batch)
        tl.store(cell.dc_ptr + cells.state_at, tl.where(cells.continues, dc_prev, 0.0), mask=cells.valid)
        if NORM_C:
            tl.store(dh_total_ptr + cells.at, dh, mask=cells.in_tile)
        if cell.dreset_c_ptr is not None:
            tl.store(cell.dreset_c_ptr + cells.at, dc_prev, mask=cells.reset)
        step, tile = next_turn(step, tile, -1, B)


def plans(problem: Problem, card: Card, backward: bool) -> Iterator[Plan]:
    """Where the registers of all multiprocessors together hold W_hh as operands of tensor cores."""
    if problem.projects_in_loop or problem.batch == 0 or problem.exact_float32:
        return
    gates = CELLS[problem.cell].rows
    for partners in [n for n in (1, 2, 3, 4) if gates % n == 0] if backward else (1,):
        words = ceil(problem.hidden * problem.size / 4) * (gates // partners if backward else 1)
        warps = 8 if words > 64 else 4
        chunks = ceil(words / (16 * warps))
        for units in range(4, 4 * warps + 1, 4):
            held = units * (partners if backward else gates)  # rows of weights; see the top of this file
            rows = ceil(held / 16) * 16
            programs = partners * ceil(problem.hidden / (partners * units))
            registers = (rows // 2 + 4) * chunks + rows // 4  # of a thread: weights, words, sums
            tiles = ceil(problem.batch / 8)
            groups = min(tiles, card.multiprocessors // (programs * problem.side_by_side))
            shared = 2 * warps * rows * 8 * 4  # twice the sums of all warps
            fits = groups > 0 and registers <= MOST_REGISTERS and shared <= STATIC_SHARED
            if fits and held in (rows, 3 * units):  # three rows a unit leave some of a tile empty, others need not
                what = ("dgates" if backward else "h") + ", and sums for layer norms" * problem.normalised
                why = f"{programs} programs hold W_hh in registers, {rows // 2 * chunks} a thread, and exchange {what}"
                family = Cooperative(chunks, partners, ahead=tiles > groups and not backward)
                yield Plan(
                    family, 8, units, programs, groups, warps, shared, why, tiles_per_program=ceil(tiles / groups),
                    side_by_side=problem.side_by_side,
                )  # fmt: skip


MOST_REGISTERS = 190  # of a thread's 255 that may hold weights, words and sums
STATIC_SHARED = 48 * KB  # that a kernel may declare (CUDA C++ Programming Guide)

KERNELS = lstm_cooperative_forward_kernel, lstm_cooperative_backward_kernel
EXCHANGED = "exchanged"  # among the buffers: what W_hh^T is multiplied with, passed as words


def buffers(p: Problem, plan: Plan, backward: bool) -> dict[str, Buffer]:
    """What a pass writes besides the results that all families share; forward h is one of those, but in rows of words.
    Backward dgates are the words, or come from them through the norm of W_hh h.
    """
    pairs = Buffer(torch.int32, (p.batch, ceil(p.hidden / plan.units), 2), fill=EVERY_BIT)  # of exchange_pairs
    scratch = {name: pairs for name, there in zip(("pairs_hh_ptr", "pairs_c_ptr"), p.norms) if there}
    if not backward:
        return scratch | {"h_ptr": Buffer(p.dtype, (p.batch, _row(p)), 1, EVERY_BIT)}  # and h0 at its end
    if plan.family.partners > 1:
        scratch["partials_ptr"] = Buffer(torch.int32, (p.batch, plan.family.partners, p.hidden), fill=EVERY_BIT)
    return scratch | {EXCHANGED: Buffer(p.dtype, (p.batch, 4, _row(p)), 0, EVERY_BIT)}


def forward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """What forward reads besides the tensors of a call."""
    h0, h = r.inputs.h0[0], memory["h_ptr"][-1]  # [B, H], [B, H or one more]
    if _row(p) > p.hidden:
        h.zero_()
    if not h0.is_meta:  # where this would import torch's compiler, which takes seconds
        h[:, : p.hidden] = torch.where(h0.isnan(), torch.nan, h0)  # any NaN but the sentinel
    words = memory["h_ptr"].view(torch.int32)
    operands = {"weights_ptr": as_words(r.inputs.weight_hh, p.hidden), "words_ptr": words}
    operands |= dict(h_ptr=None, c0_ptr=None)  # which the words are, and c_n beforehand
    return operands | ({"dropout_h_ptr": as_words(r.inputs.dropout_h, p.hidden)} if p.dropout_h else {})


def backward_operands(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """As forward_operands, for backward."""
    weights = transposed_gates(r.inputs.weight_hh, plan.family.partners, p.hidden)
    return {"weights_ptr": weights, "words_ptr": memory[EXCHANGED].view(torch.int32)}


OPERANDS = forward_operands, backward_operands


def _row(p: Problem) -> int:
    """Elements of a row of H units that is a whole number of words."""
    return p.hidden + p.hidden * p.size % 4 // p.size
