"""The cooperative family: one launch runs the whole sequence, W_hh is spread over programs, h is exchanged each step.

The programs of one batch tile are a group, and groups never wait for each other. A program owns UNITS hidden units, and
keeps its rows of W_hh in registers. A group may have several batch tiles, one after another: a step of one batch tile
is a *turn*. One turn of a program, forward:

    memory: gates, c, zoneout  ---load--->  inputs of the thread's own cell, which arrive during the wait
                                              |
    L2: h of all units         --collect->  h of all units of the tile, the operand B; a thread has some words of K
    (words of every program                   |  product with W_hh of the program's units, the operand A
     of the group)                            v
    shared memory              <---------   sums of each warp, over its own share of K
                               --------->   sum over the warps: z of the thread's own cell
                                              |  cell_forward, output, zoneout
                                              v
    L2: h of own units         <-publish-   one word for PER units: first, because all others wait for it
    memory: h_n, c, gates      <--store--   last, while the words of the others arrive

Backward, the words are dgates, and one more exchange follows the sum over the warps:

    forward    A program holds the gates' rows of its units, [GATES UNITS, H], and publishes h of its units.
    backward   PARTNERS programs, a divisor of GATES, own PARTNERS UNITS units together. Each holds W_hh^T of
               GATES / PARTNERS gates for all of these units, [PARTNERS UNITS, GATES / PARTNERS H], and reads only the
               dgates of these gates. Partners publish their sums for each other, and each adds them up.

In the product a thread's column is a sequence, and K is split over the warps (fragments.py). Afterwards a thread owns a
cell, one unit of one sequence. A word (exchange.py) has PER units. A row of H units is W = ceil(H / PER) words, and the
last word may be half empty. So the weights are passed as words, too.

Each head has groups of its own, along the last axis of the grid. H here means the D units of a head. A row has W words
for each head, in dgates for each gate. So a program multiplies the gates of a head in PIECES, each by a share of its
warps. `sizes` in plans/threads.py computes the sizes of K that follow.
"""

from collections import namedtuple

import triton
import triton.language as tl

from ..cell import indexing, noise, states
from ..cell.indexing import Batch
from ..equations import after_zeros, cell_backward, cell_forward, output, output_backward
from ..exchange import Wait, Words, collect, in_phase, look, neighbours, pack, publish
from ..parameters import CellBackward, CellPointers, HiddenBackward, HiddenPointers, Saved, name_in_profiles
from .fragments import SEQUENCES, load_weights, product, scale, sum_over_warps, threads

# The cell of each thread, all [THREADS]: the number of its unit among the program's, its place in the head, its unit,
# the column of the batch tile that is its sequence, whether it has one, and whether it publishes a word.
Owned = namedtuple("Owned", "local place unit column is_cell is_word")
# Where that cell is in a turn: the number of the batch tile; unit, Sequences, Position and Offsets [THREADS].
Here = namedtuple("Here", "tile unit sequence position cells")
# The h that a turn starts from, of the sequence in each thread's column: its Words, the sequence's index in the batch
# [THREADS], and what a look ahead found there, 4 CHUNKS words [THREADS] or none.
Before = namedtuple("Before", "words index seen")
# A thread's sums over the warps' products: for each its row and column in the product, its unit, and whether it is
# published to the partners, tuples of [THREADS]; last whether the thread has any sum, [THREADS].
Sums = namedtuple("Sums", "rows columns units published wanted")


@triton.jit
def tiles_of_group(B):
    """How many batch tiles a group of programs has."""
    return tl.cdiv(tl.cdiv(B, SEQUENCES) - tl.program_id(1), tl.num_programs(1))


@triton.jit
def next_turn(step, tile, steps: tl.constexpr, B):
    """(step, tile) of the turn after this one: of the group's next batch tile, or `steps` later of the first."""
    tile += tl.num_programs(1)
    last = tile * SEQUENCES >= B
    return tl.where(last, step + steps, step), tl.where(last, tl.program_id(1), tile)


@triton.jit
def cell_of_thread(first_place, S: tl.constexpr):
    """What each thread owns where the program has UNITS units from `first_place` on."""
    thread = tl.arange(0, 32 * S.WARPS)
    local, column = thread % S.UNITS, thread // S.UNITS
    place, in_tile = first_place + local, column < SEQUENCES
    is_word = in_tile & (place < S.W * S.PER) & (thread % S.PER == 0)
    is_cell, unit = in_tile & (place < S.D), indexing.units_at(place, S)
    return Owned(local, place, unit, column % SEQUENCES, is_cell, is_word)


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
def place_in_row(S: tl.constexpr):
    """(Which piece of a row a thread multiplies, its first word there): it has four words of every STRIDE."""
    thread, piece = threads(S.WARPS), 0
    warp = thread.warp
    if S.PIECES > 1:  # each is for as many warps
        piece, warp = warp // (S.WARPS // S.PIECES), warp % (S.WARPS // S.PIECES)
    return piece, warp * 16 + thread.quarter * 4


@triton.jit
def load_rows(weights_ptr, first_place, ROWS: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr):
    """The program's weights, ROWS rows of PIECES of K words: forward W_hh, where row r is gate r // UNITS, unit
    r % UNITS; backward a partner's W_hh^T, whose rows are the units of all partners."""
    BY_GATE: tl.constexpr = ROWS > S.PARTNERS * S.UNITS
    piece, first = place_in_row(S)
    piece, rows = piece - S.ZEROS, ()
    for n in tl.static_range((ROWS + 15) // 16 * 2):
        row = 8 * n + threads(S.WARPS).column
        place = first_place + (row % S.UNITS if BY_GATE else row)
        is_row = place < S.D
        if ROWS % 16 > 0:
            is_row &= row < ROWS
        number = (row // S.UNITS if BY_GATE else tl.program_id(0) % S.PARTNERS) * S.H + indexing.units_at(place, S)
        rows = rows + (tl.where(is_row & (piece >= 0), number * (S.PIECES - S.ZEROS) + piece, -1),)
    return load_weights(weights_ptr, rows, first, S.K, S.STRIDE, DTYPE, S.CHUNKS)


@triton.jit
def h_before(step, tile, words_ptr, batch, S: tl.constexpr):
    """The h Before a turn, in [T * B + B]: h of every step, and last h0; no words where it is reset, and in padding."""
    _, first = place_in_row(S)
    sequence = indexing.sequences(tile * SEQUENCES + threads(S.WARPS).column, batch)
    continues = indexing.position(step, sequence, batch, S.REVERSE).continues
    time = indexing.time_of(step - 1, sequence.length, S.REVERSE)
    of_h0 = indexing.row_of(tl.zeros_like(time) + batch.T, sequence.index, batch.B)
    row = tl.where(step < 1, of_h0, indexing.row_of(time, sequence.index, batch.B))
    words = Words(words_ptr + row * (S.HEADS * S.W) + first, tl.where(continues, S.K - first, 0))
    seen = look(words, S.CHUNKS, 4, S.STRIDE, neighbours(S.K)) if S.AHEAD else ()
    return Before(words, sequence.index, seen)


@triton.jit
def gates_of_cell(products, owned, turn, S: tl.constexpr):
    """W_hh h of the thread's cell, of all four gates, from the warps' products."""
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    rows = ()
    for n in tl.static_range(GATES):
        rows = rows + (owned.local + n * S.UNITS,)
    wanted = threads(S.WARPS).number < SEQUENCES * S.UNITS
    return after_zeros(sum_over_warps(products, rows, (owned.column,), wanted, turn % 2, S.WARPS))


@triton.jit(repr=name_in_profiles("cooperative_forward_kernel"), do_not_specialize=["T", "B"])
def cooperative_forward_kernel(
    weights_ptr,  # [4H, W] int32: W_hh
    words_ptr,  # [T*B + B, HEADS W] int32: h of every step, out and the exchange, sentinels beforehand; then h0
    hidden: HiddenPointers,  # h_ptr is None, for the words; h_n is h after every step; dropout_h is [B, HEADS W] int32
    cell: CellPointers, lengths_ptr, resets_ptr, error_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps of a program's units; grid (programs of a group, groups, heads)."""
    DTYPE: tl.constexpr = cell.gates_ptr.dtype.element_ty

    # W_hh of the program's units, once.
    first_place = tl.program_id(0) * S.UNITS
    weights = load_rows(weights_ptr, first_place, S.GATES * S.UNITS, DTYPE, S)
    owned, words_ptr = cell_of_thread(first_place, S), of_head(words_ptr, S)
    constants = states.load_constants_forward(cell, owned.unit, S)

    batch = Batch(lengths_ptr, resets_ptr, T, B)
    step, tile, delay = 0, tl.program_id(1), tl.zeros_like(owned.unit)
    if S.AHEAD:
        before = h_before(step, tile, words_ptr, batch, S)
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile. As stored, since to convert them is to wait for them.
        here = here_at(step, tile, owned, batch, S)
        cells = here.cells
        x, c_prev, rest_prev = states.load_cells(cell.c_n_ptr, cell, cells, B, S)
        share_c = noise.load_share(cell.zoneout_c_ptr, cells)
        h_kept = states.load_h_before(hidden, tl.where(step == 0, hidden.h0_ptr, hidden.h_n_ptr), cells.state_at, cells)

        # Collect what the group published in the turn before, and multiply: the four gates of the thread's cell.
        if not S.AHEAD:
            before = h_before(step, tile, words_ptr, batch, S)
        wait = Wait(error_ptr, step, delay, None)
        h_prev, delay = collect(before.words, wait, before.seen, S.CHUNKS, 4, S.STRIDE, neighbours(S.K))
        if hidden.dropout_h_ptr is not None:
            _, first = place_in_row(S)
            factors_ptr = of_head(hidden.dropout_h_ptr, S) + before.index.to(tl.int64) * (S.HEADS * S.W) + first
            h_prev = scale(h_prev, factors_ptr, before.words.left, S.STRIDE, DTYPE)
        z = gates_of_cell(product(weights, h_prev, DTYPE), owned, turn, S)

        # The words of the next turn arrive while the cell of this one is computed.
        next_step, next_tile = next_turn(step, tile, 1, B)
        if S.AHEAD:
            before = h_before(next_step, next_tile, words_ptr, batch, S)

        gates, c, rest = cell_forward(x, z, c_prev, rest_prev, constants, len(constants) > 0, S)
        h = output(gates[3], c, S)
        c, h = noise.zoneout(c, (c_prev,) + share_c), noise.zoneout(h, h_kept)

        # Publish first: the others wait for it. Padding gets zeros.
        h = tl.where(cells.valid, h, 0.0)
        word_ptr = words_ptr + here.position.row * (S.HEADS * S.W) + owned.place // S.PER
        publish(word_ptr, pack(h, DTYPE), owned.is_word & here.sequence.in_batch)

        tl.store(hidden.h_n_ptr + cells.state_at, h, mask=cells.valid)
        tl.store(cell.c_n_ptr + cells.state_at, c, mask=cells.valid)
        states.store_rest(cell.c_n_ptr, rest, cells, cells.valid, B, S)
        states.save(gates, c, cell, cells, S.H)
        step, tile = next_step, next_tile


@triton.jit
def dgates_after(step, tile, words_ptr, batch, S: tl.constexpr):
    """The Words of the next step's dgates, PIECES of K for each sequence. It waits in padding and at resets, too:
    otherwise it could run ahead and overwrite sums that another has not read."""
    piece, first = place_in_row(S)
    sequence = indexing.sequences(tile * SEQUENCES + threads(S.WARPS).column, batch)
    row = indexing.row_of(indexing.time_of(step + 1, sequence.length, S.REVERSE), sequence.index, batch.B)
    left = tl.where(sequence.in_batch & (step < batch.T - 1), S.K - first, 0)
    return Words(words_ptr + (4 * row + piece) * (S.HEADS * S.W) + first, left)


@triton.jit
def sums_of_thread(first_place, S: tl.constexpr):
    """Every thread's Sums: of its own cell, or with partners those that it publishes, for the units of all."""
    ROWS: tl.constexpr = S.PARTNERS * S.UNITS
    rows, columns, units, published = (), (), (), ()
    for n in tl.static_range((ROWS + 4 * S.WARPS - 1) // (4 * S.WARPS)):
        number = tl.arange(0, 32 * S.WARPS) + n * 32 * S.WARPS
        rows = rows + (number % ROWS,)
        columns = columns + (number // ROWS % SEQUENCES,)
        place = first_place + rows[n]
        units = units + (indexing.units_at(place, S),)
        published = published + ((number < SEQUENCES * ROWS) & (place < S.D),)
    return Sums(rows, columns, units, published, threads(S.WARPS).number < SEQUENCES * ROWS)


@triton.jit
def sum_of_partners(found, sums, partials_ptr, here, wait, B, S: tl.constexpr):
    """(What all partners found for the thread's cell, the delay of the next wait for that). A program that has partners
    publishes for them what it `found`, its Sums."""
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
        of_partners, delay = collect(words, wait, (), PARTNERS, 1, S.H, 1)
        total = of_partners[0].to(tl.float32, bitcast=True)
        for n in tl.static_range(1, PARTNERS):
            total += of_partners[n].to(tl.float32, bitcast=True)
    return total, delay


@triton.jit(repr=name_in_profiles("cooperative_backward_kernel"), do_not_specialize=["T", "B"])
def cooperative_backward_kernel(
    weights_ptr,  # [PARTNERS, H, GATES / PARTNERS * W] int32: W_hh^T of each partner's gates
    words_ptr,  # [T*B, 4, HEADS W] int32: dgates, out and the exchange, sentinels beforehand
    partials_ptr,  # [B, PARTNERS, H] int32: float32 words whose last bits are one beforehand; None without partners
    hidden: HiddenBackward,
    cell: CellBackward,  # dgates_ptr is None, for the words
    saved: Saved, lengths_ptr, resets_ptr, error_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """All steps of a program's units, from the last to the first; grid (programs of a group, groups, heads)."""
    DTYPE: tl.constexpr = saved.gates_ptr.dtype.element_ty
    # W_hh^T of the program's gates for the units of all partners, once.
    partner, first_place = tl.program_id(0) % S.PARTNERS, tl.program_id(0) // S.PARTNERS * (S.PARTNERS * S.UNITS)
    weights = load_rows(weights_ptr, first_place, S.PARTNERS * S.UNITS, DTYPE, S)
    owned, sums = cell_of_thread(first_place + partner * S.UNITS, S), sums_of_thread(first_place, S)
    peepholes = states.load_constants(cell.weight_peephole_ptr, owned.unit, S.H)
    words_ptr = of_head(words_ptr, S)
    dgates_ptr = words_ptr + (4 - (S.PARTNERS - partner) * S.OWN) * (S.HEADS * S.W)  # of the program's gates

    batch = Batch(lengths_ptr, resets_ptr, T, B)
    step, tile = T - 1, tl.program_id(1)
    delay, delay_of_sums = tl.zeros_like(owned.unit), tl.zeros_like(owned.unit)
    for turn in range(T * tiles_of_group(B)):
        # Load before waiting: the data arrive meanwhile. As stored, as forward.
        here = here_at(step, tile, owned, batch, S)
        cells, position = here.cells, here.position
        loaded = states.load_saved(saved, step, cells, S.H)
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        drest = states.load_rest(cell.dc_ptr, cells, cells.valid, B, 0.0, S)
        dh_given, share_c = states.load_gradients_given(hidden, cells), noise.load_share(cell.zoneout_c_ptr, cells)
        next_continues = indexing.position(step + 1, here.sequence, batch, S.REVERSE).continues

        # Collect dgates of the step after, and multiply: the part of dh of all partners' units that comes from this
        # program's gates. Add up what the warps found, then the partners.
        words = dgates_after(step, tile, dgates_ptr, batch, S)
        wait = Wait(error_ptr, step, delay, None)
        dgates, delay = collect(words, wait, (), S.CHUNKS, 4, S.STRIDE, neighbours(S.K))
        products = product(weights, dgates, DTYPE)
        found = sum_over_warps(products, sums.rows, sums.columns, sums.wanted, turn % 2, S.WARPS)
        wait = Wait(error_ptr, step, delay_of_sums, (T - 1 - step) % 2)
        dh, delay_of_sums = sum_of_partners(found, sums, partials_ptr, here, wait, B, S)
        dh = states.gradient_of_h(tl.where(next_continues, dh, 0.0), dh_given, hidden, cells)

        # Output and cell. In padding every factor was loaded as zero, so its gradients are zero.
        gates, c, c_prev = states.as_float(loaded, cell.zoneout_c_ptr, S)
        dc, dc_stayed = noise.zoneout_backward(dc, share_c)
        dz_o, dc_by_m = output_backward(gates[3], c, dh, S)
        dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m, drest, peepholes, len(peepholes) > 0, S)
        dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)

        # Publish first, then store.
        word_ptr = words_ptr + position.row * (4 * S.HEADS * S.W) + owned.place // S.PER
        for n in tl.static_range(4):
            publish(word_ptr + n * (S.HEADS * S.W), pack(dz[n], DTYPE), owned.is_word & here.sequence.in_batch)
        states.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
        states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)
        step, tile = next_turn(step, tile, -1, B)
