"""The cooperative family: the whole sequence in one launch, W_hh spread over many programs, h exchanged at each step.

The programs of one batch tile are a group, which never waits for another. Each owns UNITS hidden units, and keeps its
rows of W_hh in registers. A group may have several batch tiles: forward requests the words of one before it computes
the cell of the other. All programs of a launch must be resident at once.

forward    A program holds the gates' rows of its units, [GATES UNITS, H], and publishes h of its units.
backward   PARTNERS programs, a divisor of GATES, own PARTNERS UNITS units together. Each holds W_hh^T of
           GATES / PARTNERS gates for all of these, [PARTNERS UNITS, GATES / PARTNERS H], and reads only the dgates of
           these gates. With partners it publishes its sums in a second, small exchange, and adds up those of all
           partners for its own units.

In the product a thread's column is a sequence, and K is split over the warps (fragments.py); afterwards it owns a cell,
one unit of one sequence. Words (exchange.py) have PER units: a row of H units is W = ceil(H / PER) words, of which the
last may be half empty; so the weights are passed as words, too. A step of one batch tile is a *turn*.

Each head has groups of its own, the last axis of the grid; what is said here of H is of its D units. A row has W words
of each head, in dgates of each gate: so a program multiplies a head's gates in pieces, each by a share of its warps.
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
from ..memory import EVERY_BIT, Buffer, buffers_of
from ..operands import as_words, transposed_gates
from ..problem import Pass, Problem, Recurrence
from . import indexing, noise, reset, states
from .equations import after_zeros, cell_backward, cell_forward, output, output_backward
from .exchange import Wait, Words, collect, in_phase, look, neighbours, pack, publish
from .features import nothing
from .fragments import SEQUENCES, load_weights, product, scale, sum_over_warps, threads
from .indexing import Batch
from .norm import Norm, load_affine, load_normed, normalised
from .norm_exchange import Group, backward_over_group, normalise_over_group
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, NormC, NormHH, Saved, name_in_profiles
from .planning import Cooperative, Family, Plan

SENTINEL = tl.constexpr(EVERY_BIT)  # as int32: the word for data that are not there yet, which `pack` never returns

# The cell of each thread, all [THREADS]: the number of its unit among the program's, its place in the head, its unit,
# the column of the batch tile that is its sequence, whether it has one, and whether it publishes a word.
Owned = namedtuple("Owned", "local place unit column is_cell is_word")
# Where that is in a turn: the number of the batch tile, and of all [THREADS] the unit, Sequences, Position and Cells.
Here = namedtuple("Here", "tile unit sequence position cells")
# The h that a turn starts from, of the sequence in each thread's column, [THREADS]: its Words, the sequence's index in
# the batch, whether h continues there, or is reset or padding; and 4 CHUNKS words as a look ahead found them, or
# `nothing`.
Before = namedtuple("Before", "words index continues seen")
# For each of a thread's sums over the warps' products, tuples of [THREADS]: its row and column in the product, its
# unit, and whether it is published to the partners; last, [THREADS], whether the thread has any.
Sums = namedtuple("Sums", "rows columns units published wanted")


@triton.jit
def tiles_of_group(B):
    """How many batch tiles the group has."""
    return tl.cdiv(tl.cdiv(B, SEQUENCES) - tl.program_id(1), tl.num_programs(1))


@triton.jit
def next_turn(step, tile, steps: tl.constexpr, B):
    """(step, tile) of the turn after this one: of the group's next batch tile, or `steps` later of the first."""
    tile += tl.num_programs(1)
    last = tile * SEQUENCES >= B
    return tl.where(last, step + steps, step), tl.where(last, tl.program_id(1), tile)


@triton.jit
def cell_of_thread(first_place, ROW: tl.constexpr, S: tl.constexpr):
    """What each thread owns where a sequence has ROW threads, and the program UNITS units from `first_place` on."""
    thread = tl.arange(0, 32 * S.WARPS)
    local, column = thread % ROW, thread // ROW
    place = first_place + local
    is_unit = (column < SEQUENCES) & (local < S.UNITS)
    is_word = is_unit & (place < S.W * S.PER) & (thread % S.PER == 0)
    unit, in_head = indexing.units_at(place, S)
    return Owned(local % S.UNITS, place, unit, column % SEQUENCES, is_unit & in_head, is_word)


@triton.jit
def here_at(step, tile, owned, batch, S: tl.constexpr):
    """Where the thread's cell is at a step of a batch tile."""
    sequence = indexing.sequences(tile * SEQUENCES + owned.column, batch)
    position = indexing.position(step, sequence, batch, S.REVERSE)
    cells = indexing.cells_at(sequence, position, owned.unit, owned.is_cell, S.H)
    return Here(tile, owned.unit, sequence, position, cells)


@triton.jit
def of_head(words_ptr, S: tl.constexpr):
    """Where the words of the program's head begin in a row of all heads."""
    if S.HEADS > 1:
        words_ptr += tl.program_id(2) * S.W
    return words_ptr


@triton.jit
def first_word(S: tl.constexpr, PIECES: tl.constexpr = 1):
    """The first word of a piece of a row that a thread has, four of every 16 WARPS / PIECES; see fragments.py."""
    thread = threads(S.WARPS)
    warp = thread.warp if PIECES == 1 else thread.warp % (S.WARPS // PIECES)
    return warp * 16 + thread.quarter * 4


@triton.jit
def piece_of_thread(PIECES: tl.constexpr, S: tl.constexpr):
    """Which piece that is: each is for as many warps."""
    return 0 if PIECES == 1 else threads(S.WARPS).warp // (S.WARPS // PIECES)


@triton.jit
def load_rows(
    weights_ptr, first_place, K: tl.constexpr, PIECES: tl.constexpr, GATES: tl.constexpr, DTYPE: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """The program's weights, rows of PIECES of K words: W_hh, where row r is gate r // UNITS, unit r % UNITS, GATES
    gates in all. Backward GATES is 1, for one W_hh^T, and the units are those of all partners."""
    UNITS: tl.constexpr = S.PARTNERS * S.UNITS
    THERE: tl.constexpr = S.GATES // S.PARTNERS if PIECES > 1 else 1  # pieces, the last ones; else there are zeros
    STRIDE: tl.constexpr = 16 * S.WARPS // PIECES
    piece = piece_of_thread(PIECES, S) - (PIECES - THERE)
    rows = ()
    for n in tl.static_range((GATES * UNITS + 15) // 16 * 2):
        row = 8 * n + threads(S.WARPS).column
        unit, is_row = indexing.units_at(first_place + row % UNITS if GATES > 1 else first_place + row, S)
        if GATES * UNITS % 16 > 0:
            is_row &= row < GATES * UNITS
        gate = row // UNITS if GATES > 1 else tl.program_id(0) % S.PARTNERS
        rows = rows + (tl.where(is_row & (piece >= 0), (gate * S.H + unit) * THERE + piece, -1),)
    return load_weights(weights_ptr, rows, first_word(S, PIECES), K, STRIDE, DTYPE, (K + STRIDE - 1) // STRIDE)


@triton.jit
def h_before(step, tile, words_ptr, batch, NORMED: tl.constexpr, S: tl.constexpr):
    """The h Before a turn. With layer norms words of padding and before resets are awaited, too: none overwrites the
    numbers of a program that another has yet to read."""
    sequence = indexing.sequences(tile * SEQUENCES + threads(S.WARPS).column, batch)
    continues = indexing.position(step, sequence, batch, S.REVERSE).continues
    row = indexing.row_in_h_then_h0(step - 1, sequence, batch, S.REVERSE)
    left = tl.where(sequence.in_batch if NORMED else continues, S.W - first_word(S), 0)
    words = Words(words_ptr + row * (S.HEADS * S.W) + first_word(S), left)
    seen = look(words, S.CHUNKS, 4, 16 * S.WARPS, neighbours(S.W)) if S.AHEAD else nothing()
    return Before(words, sequence.index, continues, seen)


@triton.jit
def collect_h(before, wait, dropout_h_ptr, NORMED: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr):
    """(Words of h as W_hh multiplies it, the delay of the next wait for h). What never arrived stays NaN even where h
    is reset, and so does what is published then."""
    h, delay = collect(before.words, wait, before.seen, S.CHUNKS, 4, 16 * S.WARPS, neighbours(S.W))
    if NORMED:
        zeroed = ()
        for n in tl.static_range(len(h)):
            zeroed = zeroed + (tl.where(before.continues | (h[n] == SENTINEL), h[n], 0),)
        h = zeroed
    if dropout_h_ptr is not None:
        factors_ptr = of_head(dropout_h_ptr, S) + before.index.to(tl.int64) * (S.HEADS * S.W) + first_word(S)
        h = scale(h, factors_ptr, before.words.left, 16 * S.WARPS, DTYPE)
    return h, delay


@triton.jit
def gates_of_cell(products, owned, turn, ROW: tl.constexpr, S: tl.constexpr):
    """W_hh h of the thread's cell, of all four gates, from the warps' products."""
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    rows = ()
    for n in tl.static_range(GATES):
        rows = rows + (owned.local + n * S.UNITS,)
    wanted = threads(S.WARPS).number < SEQUENCES * ROW
    return after_zeros(sum_over_warps(products, rows, (owned.column,), wanted, turn % 2, S.WARPS))


@triton.jit(repr=name_in_profiles("cooperative_forward_kernel"), do_not_specialize=["T", "B"])
def cooperative_forward_kernel(
    weights_ptr,  # [4H, W] int32: W_hh
    words_ptr,  # [T*B + B, HEADS W] int32: h of every step, out and the exchange, sentinels beforehand; then h0
    hidden: Hidden,  # h_ptr is None, for the words; h_n is h after every step; dropout_h is [B, HEADS W] int32
    cell: Cell, norm_hh: NormHH, norm_c: NormC, lengths_ptr, resets_ptr, error_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps of a program's units; grid (programs of a group, groups, heads)."""
    DTYPE: tl.constexpr = cell.gates_ptr.dtype.element_ty
    norm_hh, norm_c = Norm(*norm_hh), Norm(*norm_c)
    NORMED: tl.constexpr = norm_hh.gain_ptr is not None or norm_c.gain_ptr is not None
    ROW: tl.constexpr = 4 * S.WARPS if NORMED else S.UNITS  # threads for the cells of a sequence

    # W_hh of the program's units, once.
    first_place = tl.program_id(0) * S.UNITS
    weights = load_rows(weights_ptr, first_place, S.W, 1, S.GATES, DTYPE, S)
    owned, words_ptr = cell_of_thread(first_place, ROW, S), of_head(words_ptr, S)
    constants = states.load_constants_forward(cell, owned.unit, S)
    affine_hh, affine_c = load_affine(norm_hh, owned.unit, 4, S.H), load_affine(norm_c, owned.unit, 1, S.H)

    batch = Batch(lengths_ptr, resets_ptr, T, B)
    step, tile, delay = 0, tl.program_id(1), tl.zeros_like(owned.unit)
    if S.AHEAD:
        before = h_before(step, tile, words_ptr, batch, NORMED, S)
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile. As stored, since to convert them is to wait for them.
        here = here_at(step, tile, owned, batch, S)
        cells = here.cells
        x = states.load_gates(cell.gates_ptr, cells.gates_at, cells.valid, S.H, True, S.FROM_X)
        c_prev = reset.load_state(cell.c_n_ptr, cells.state_at, cell.reset_c_ptr, cells)
        rest_prev = states.load_rest_before(cell.c_n_ptr, cells, B, S)
        share_c = noise.load_share(cell.zoneout_c_ptr, cells)
        h_kept = noise.load_h_before(hidden, tl.where(step == 0, hidden.h0_ptr, hidden.h_n_ptr), cells.state_at, cells)

        # Collect what the group published in the turn before, and multiply: the four gates of the thread's cell.
        if not S.AHEAD:
            before = h_before(step, tile, words_ptr, batch, NORMED, S)
        h_prev, delay = collect_h(before, Wait(error_ptr, step, delay, None), hidden.dropout_h_ptr, NORMED, DTYPE, S)
        z = gates_of_cell(product(weights, h_prev, DTYPE), owned, turn, ROW, S)

        # The words of the next turn arrive while the cell of this one is computed.
        next_step, next_tile = next_turn(step, tile, 1, B)
        if S.AHEAD:
            before = h_before(next_step, next_tile, words_ptr, batch, NORMED, S)

        # Gates, cell and output.
        group = Group(here.sequence, owned.is_cell, Wait(error_ptr, step, delay, step % 2))
        z = normalise_over_group(z, norm_hh, affine_hh, group, S)
        gates, c, rest = cell_forward(x, z, c_prev, rest_prev, constants, S)
        h = output(gates[3], normalise_over_group((c,), norm_c, affine_c, group, S)[0], S)
        c, h = noise.zoneout(c, c_prev, share_c), noise.zoneout_of_h(h, h_kept)

        # Publish first: the others wait for it. Padding gets zeros.
        h = tl.where(cells.valid, h, 0.0)
        word_ptr = words_ptr + here.position.row * (S.HEADS * S.W) + owned.place // S.PER
        publish(word_ptr, pack(h, DTYPE), owned.is_word & here.sequence.in_batch)

        # Store.
        tl.store(hidden.h_n_ptr + cells.state_at, h, mask=cells.valid)
        tl.store(cell.c_n_ptr + cells.state_at, c, mask=cells.valid)
        states.store_rest(cell.c_n_ptr, rest, cells, cells.valid, B, S)
        states.save(gates, c, cell, cells, S.H)
        step, tile = next_step, next_tile


@triton.jit
def dgates_after(step, tile, words_ptr, batch, K: tl.constexpr, PIECES: tl.constexpr, S: tl.constexpr):
    """The Words of the next step's dgates, PIECES of K for each sequence. Padding, and what resets cut off, is awaited,
    too: so none overwrites sums that another waits for."""
    sequence = indexing.sequences(tile * SEQUENCES + threads(S.WARPS).column, batch)
    row = indexing.row_of(indexing.time_of(step + 1, sequence.length, S.REVERSE), sequence.index, batch.B)
    left = tl.where(sequence.in_batch & (step < batch.T - 1), K - first_word(S, PIECES), 0)
    first_ptr = words_ptr + (4 * row + piece_of_thread(PIECES, S)) * (S.HEADS * S.W) + first_word(S, PIECES)
    return Words(first_ptr, left)


@triton.jit
def sums_of_thread(first_place, ROW: tl.constexpr, S: tl.constexpr):
    """Every thread's Sums: its cell's, or with partners those that it publishes, for the units of all."""
    ROWS: tl.constexpr = S.PARTNERS * S.UNITS
    SUM_ROW: tl.constexpr = ROW if S.PARTNERS == 1 else ROWS  # sums of a sequence, with those that nobody needs
    rows, columns, units, published = (), (), (), ()
    for n in tl.static_range((SUM_ROW + 4 * S.WARPS - 1) // (4 * S.WARPS)):
        number = tl.arange(0, 32 * S.WARPS) + n * 32 * S.WARPS
        rows = rows + (number % SUM_ROW % ROWS,)
        columns = columns + (number // SUM_ROW % SEQUENCES,)
        unit, in_head = indexing.units_at(first_place + rows[n], S)
        units = units + (unit,)
        published = published + ((number < SEQUENCES * ROWS) & in_head,)
    return Sums(rows, columns, units, published, threads(S.WARPS).number < SEQUENCES * SUM_ROW)


@triton.jit
def sum_of_partners(found, sums, partials_ptr, here, wait, B, S: tl.constexpr):
    """(What all partners found for the thread's cell, the delay of the next wait for that); `found` are this program's
    Sums, which it publishes for its partners, if it has any."""
    PARTNERS: tl.constexpr = S.PARTNERS  # Triton 3.4 takes no field of a tuple for static_range
    total, delay = found[0], wait.delay
    if PARTNERS > 1:
        ROW: tl.constexpr = PARTNERS * S.H  # of a sequence, in partials
        own_ptr = partials_ptr + tl.program_id(0) % PARTNERS * S.H
        for n in tl.static_range(len(found)):
            index = here.tile * SEQUENCES + sums.columns[n]
            word_ptr = own_ptr + index.to(tl.int64) * ROW + sums.units[n]
            publish(word_ptr, in_phase(pack(found[n], tl.float32), wait.phase), sums.published[n] & (index < B))
        first_ptr = partials_ptr + here.sequence.index.to(tl.int64) * ROW + here.unit
        words = Words(first_ptr, tl.where(here.cells.in_tile, ROW, 0))  # at every step: no phase is skipped
        of_partners, delay = collect(words, wait, nothing(), PARTNERS, 1, S.H, 1)
        total = of_partners[0].to(tl.float32, bitcast=True)
        for n in tl.static_range(1, PARTNERS):
            total += of_partners[n].to(tl.float32, bitcast=True)
    return total, delay


@triton.jit(repr=name_in_profiles("cooperative_backward_kernel"), do_not_specialize=["T", "B"])
def cooperative_backward_kernel(
    weights_ptr,  # [PARTNERS, H, GATES / PARTNERS * W] int32: W_hh^T of each partner's gates
    words_ptr,  # [T*B, 4, HEADS W] int32: dgates, or their gradient through the norm of W_hh h; sentinels beforehand
    partials_ptr,  # [B, PARTNERS, H] int32: float32 words whose last bits are one beforehand; None without partners
    hidden: HiddenBackward,
    cell: CellBackward,  # dgates_ptr is None, for the words, without a norm of W_hh h
    saved: Saved, norm_hh: NormHH, norm_c: NormC, dh_total_ptr, lengths_ptr, resets_ptr, error_ptr, T, B,
    S: tl.constexpr,
):  # fmt: skip
    """All steps of a program's units, from the last to the first; grid (programs of a group, groups, heads)."""
    DTYPE: tl.constexpr = saved.gates_ptr.dtype.element_ty
    norm_hh, norm_c = Norm(*norm_hh), Norm(*norm_c)
    NORMED: tl.constexpr = norm_hh.gain_ptr is not None or norm_c.gain_ptr is not None
    ROW: tl.constexpr = 4 * S.WARPS if NORMED else S.UNITS  # threads for the cells of a sequence
    # Gates whose words of dgates the program multiplies, in pieces of K. Three pieces would not share out the warps: of
    # the heads of a GRU the first gate is there, too, multiplied by zeros.
    OWN: tl.constexpr = 4 if S.HEADS > 1 and S.GATES // S.PARTNERS == 3 else S.GATES // S.PARTNERS
    PIECES: tl.constexpr = 1 if S.HEADS == 1 else OWN
    K: tl.constexpr = OWN * S.W // PIECES
    STRIDE: tl.constexpr = 16 * S.WARPS // PIECES

    # W_hh^T of the program's gates for the units of all partners, once.
    partner, first_place = tl.program_id(0) % S.PARTNERS, tl.program_id(0) // S.PARTNERS * (S.PARTNERS * S.UNITS)
    weights = load_rows(weights_ptr, first_place, K, PIECES, 1, DTYPE, S)
    owned, sums = cell_of_thread(first_place + partner * S.UNITS, ROW, S), sums_of_thread(first_place, ROW, S)
    peepholes = states.load_constants(cell.weight_peephole_ptr, owned.unit, S.H)
    affine_hh, affine_c = load_affine(norm_hh, owned.unit, 4, S.H), load_affine(norm_c, owned.unit, 1, S.H)
    words_ptr = of_head(words_ptr, S)
    dgates_ptr = words_ptr + (4 - (S.PARTNERS - partner) * OWN) * (S.HEADS * S.W)  # of the program's gates

    batch = Batch(lengths_ptr, resets_ptr, T, B)
    step, tile = T - 1, tl.program_id(1)
    delay, delay_of_sums = tl.zeros_like(owned.unit), tl.zeros_like(owned.unit)
    lost = tl.zeros((32 * S.WARPS,), tl.int1)  # a program timed out
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile. As stored, as forward.
        here = here_at(step, tile, owned, batch, S)
        cells, position = here.cells, here.position
        gates, c, c_prev = states.load_saved(saved, step, cells, S.H)
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        drest = states.load_gradient_of_rest(cell.dc_ptr, cells, B, S)
        normed_hh = load_normed(norm_hh, affine_hh, position, cells, S.H)
        normed_c = load_normed(norm_c, affine_c, position, cells, S.H)
        dh_given, share_c = states.load_gradients_given(hidden, cells), noise.load_share(cell.zoneout_c_ptr, cells)
        next_continues = indexing.position(step + 1, here.sequence, batch, S.REVERSE).continues

        # Collect dgates of the step after, and multiply: dh of the partners' units, as far as it comes from this
        # program's gates. Add up what the warps found, then the partners.
        words = dgates_after(step, tile, dgates_ptr, batch, K, PIECES, S)
        wait = Wait(error_ptr, step, delay, None)
        dgates, delay = collect(words, wait, nothing(), (K + STRIDE - 1) // STRIDE, 4, STRIDE, neighbours(K))
        products = product(weights, dgates, DTYPE)
        found = sum_over_warps(products, sums.rows, sums.columns, sums.wanted, turn % 2, S.WARPS)
        wait = Wait(error_ptr, step, delay_of_sums, (T - 1 - step) % 2)
        dh, delay_of_sums = sum_of_partners(found, sums, partials_ptr, here, wait, B, S)
        dh = states.gradient_of_h(tl.where(next_continues, dh, 0.0), dh_given, hidden, cells)

        # Output and cell. In padding every factor was loaded as zero, so its gradients are zero.
        group = Group(here.sequence, owned.is_cell, Wait(error_ptr, step, delay, wait.phase))
        gates, c, c_prev = states.as_float(gates, c, c_prev)
        dc, dc_stayed = noise.zoneout_backward(dc, share_c)
        c = noise.without_zoneout(c, gates, c_prev, cell.zoneout_c_ptr, S)
        dz_o, d = output_backward(gates[3], normalised((c,), norm_c, normed_c)[0], dh, S)
        dc_by_m, lost = backward_over_group((d,), norm_c, normed_c, group, lost, tl.float32, S)
        dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m[0], drest, peepholes, S)
        dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)

        # Publish dgates; with a layer norm of W_hh h store them, and publish their gradient through it. Then store.
        states.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, S.H)
        dz, lost = backward_over_group(dz, norm_hh, normed_hh, group, lost, DTYPE, S)
        word_ptr = words_ptr + position.row * (4 * S.HEADS * S.W) + owned.place // S.PER
        for n in tl.static_range(4):
            publish(word_ptr + n * (S.HEADS * S.W), pack(dz[n], DTYPE), owned.is_word & here.sequence.in_batch)
        reset.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
        states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)
        states.store_gradient_of_m(dh, dh_total_ptr, cells)
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
            own_rows = units * (partners if backward else gates)  # of weights; see the top of this file
            rows = ceil(own_rows / 16) * 16
            programs = partners * ceil(problem.hidden / (partners * units))
            registers = (rows // 2 + 4) * chunks + rows // 4  # of a thread: weights, words, sums
            tiles = ceil(problem.batch / SEQUENCES.value)
            groups = min(tiles, card.multiprocessors // (programs * problem.side_by_side))
            shared = 2 * warps * rows * SEQUENCES.value * 4  # twice the sums of all warps
            fits = groups > 0 and registers <= MOST_REGISTERS and shared <= STATIC_SHARED
            if fits and own_rows in (rows, 3 * units):  # three rows a unit leave some of a tile empty, others need not
                what = ("dgates" if backward else "h") + ", and sums for layer norms" * problem.normalised
                why = f"{programs} programs hold W_hh in registers, {rows // 2 * chunks} a thread, and exchange {what}"
                family = Cooperative(chunks, partners, ahead=tiles > groups and not backward)
                yield Plan(
                    family, SEQUENCES.value, units, programs, groups, warps, shared, why,
                    side_by_side=problem.side_by_side,
                ).fitted(problem)  # fmt: skip


MOST_REGISTERS = 190  # of a thread's 255 that may hold weights, words and sums
STATIC_SHARED = 48 * KB  # that a kernel may declare (CUDA C++ Programming Guide)


def buffers(p: Problem, plan: Plan, pass_: Pass) -> dict[str, Buffer]:
    """See planning.Family. Rows of words are forward h; backward what W_hh^T is multiplied with: dgates, or with a norm
    of W_hh h their gradient through it.
    """
    written = buffers_of(p, pass_)
    pairs = Buffer(torch.int32, (p.batch, ceil(p.hidden / plan.units), 2), fill=EVERY_BIT)  # see norm_exchange.py
    written |= {name: pairs for name, there in (("pairs_hh_ptr", p.gain_hh), ("pairs_c_ptr", p.gain_c)) if there}
    if not pass_.backward:
        written["h_ptr"] = Buffer(p.dtype, (p.batch, _row(p)), 1, EVERY_BIT)  # and h0 at its end
        written["c_n_ptr"] = written["c_n_ptr"]._replace(fill="c0")  # where kernels read c at every step
        return written
    written["words_ptr" if p.gain_hh else "dgates_ptr"] = Buffer(p.dtype, (p.batch, 4, _row(p)), 0, EVERY_BIT)
    if plan.family.partners > 1:
        written["partials_ptr"] = Buffer(torch.int32, (p.batch, plan.family.partners, p.hidden), fill=EVERY_BIT)
    return written


def forward_arguments(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """What forward reads besides the tensors of a call."""
    h0, h = r.inputs.h0[0], memory["h_ptr"][-1]  # [B, H], [B, _row(p)]
    if _row(p) > p.hidden:
        h = _without_padding(p, h.zero_())
    if not h0.is_meta:  # where this would import torch's compiler, which takes seconds
        h.copy_(torch.where(h0.isnan(), torch.nan, h0).view_as(h))  # any NaN but the sentinel
    arguments = {"weights_ptr": as_words(r.inputs.weight_hh, p.columns), "words_ptr": memory["h_ptr"].view(torch.int32)}
    arguments |= dict(h_ptr=None, c0_ptr=None)  # which the words are, and c_n beforehand
    of_heads = r.inputs.dropout_h.view(-1, p.columns) if p.dropout_h else None  # [B heads, D]
    return arguments | ({"dropout_h_ptr": as_words(of_heads, p.columns)} if p.dropout_h else {})


def backward_arguments(p: Problem, plan: Plan, r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """As forward_arguments, for backward."""
    weights = transposed_gates(r.inputs.weight_hh, plan.family.partners, CELLS[p.cell].rows, p.columns)
    words = memory["words_ptr" if p.gain_hh else "dgates_ptr"].view(torch.int32)
    return {"weights_ptr": weights, "words_ptr": words} | ({} if p.gain_hh else {"dgates_ptr": None})


def h_of(p: Problem, memory: dict[str, Tensor]) -> Tensor:
    """h without h0 and padding of rows. It is no view, since autograd forbids changing one in place."""
    h = memory["h_ptr"]
    if _row(p) > p.hidden:
        return _without_padding(p, h[:-1]).flatten(2).contiguous()
    return h.resize_(len(h) - 1, p.batch, p.hidden)


def dgates_of(p: Problem, memory: dict[str, Tensor]) -> Tensor:
    """dgates without padding of rows."""
    dgates = memory["dgates_ptr"]  # [T, B, 4, _row(p)], but with a norm of W_hh h
    return (dgates if p.gain_hh or _row(p) == p.hidden else _without_padding(p, dgates)).flatten(2)


FAMILY = Family(
    (cooperative_forward_kernel, cooperative_backward_kernel), lambda *_: True, buffers,
    arguments=(forward_arguments, backward_arguments), results=(h_of, dgates_of),
)  # fmt: skip


def _row(p: Problem) -> int:
    """Elements of a row of H units, those of each head in whole words."""
    return p.heads * (p.columns + p.columns * p.size % 4 // p.size)


def _without_padding(p: Problem, rows: Tensor) -> Tensor:
    """The units of rows [..., _row(p)], [..., heads, D]."""
    return rows.unflatten(-1, (p.heads, -1))[..., : p.columns]
