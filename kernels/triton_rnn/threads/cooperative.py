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

The backward pass exchanges dgates in place of h. One more exchange follows the sum over the warps:

    forward    A program holds the gates' rows of its units, [GATES UNITS, H], and publishes h of its units.
    backward   PARTNERS programs, a divisor of GATES, own PARTNERS UNITS units together. Each holds W_hh^T of
               GATES / PARTNERS gates for all of these units, [PARTNERS UNITS, GATES / PARTNERS H], and reads only the
               dgates of these gates. Partners publish their sums for each other, and each adds them up.

K is the dimension that the product sums over. It is split over the warps. The `column` of a thread (fragments.py)
is its sequence in the product. After the product each thread owns a cell, one unit of one sequence. A word
(exchange.py) has PER units. A row of H units is W = ceil(H / PER) words, and the last word may be half empty. The
weights are passed as words, too.

Each head has its own groups, along the last axis of the grid. H here means the D units of a head. A row of h has W
words for each head. A row of dgates has W words for each gate and head, so the gates of one head are not neighbours. A
program therefore multiplies the gates of its head in PIECES, each by a share of its warps. `sizes` in plans/threads.py
computes these sizes.
"""

from collections import namedtuple

import triton
import triton.language as tl

from ..cell import indexing, noise, states
from ..cell.indexing import Batch
from ..equations import after_zeros, cell_backward, cell_forward, output, output_backward
from ..exchange import Wait, Words, collect, in_phase, look, neighbours, pack, publish
from ..parameters import CellBackward, CellPointers, HiddenBackward, HiddenPointers, Saved, name_in_profiles
from .fragments import SEQUENCES, load_words, product, scale, sum_over_warps, threads

# The cell of each thread. All fields are [THREADS]:
#   local, place, unit    the number of the cell's unit among the program's units, in the head, and in the layer
#   slot                  the number of the cell's sequence in the batch tile
#   is_cell, is_word      whether the thread has a cell, and whether it publishes a word
Owned = namedtuple("Owned", "local place unit slot is_cell is_word")
# The cell of each thread in one turn: the number of the batch tile; and the unit, Sequences, Position and Offsets, each
# [THREADS].
Here = namedtuple("Here", "tile unit sequence position cells")
# h before a turn, for the sequence in each thread's column: its Words, the index of the sequence in the batch
# [THREADS], and the result of a look ahead at the words, a tuple of 4 CHUNKS [THREADS] int32, or an empty tuple.
Before = namedtuple("Before", "words index seen")
# The sums over all warps that each thread computes. The first four fields are tuples with a [THREADS] for each sum: its
# row in the product, the slot of its sequence, its unit, and whether it is published for the partners. The last field
# [THREADS] says whether the thread has any sum.
Sums = namedtuple("Sums", "rows slots units published wanted")


@triton.jit
def tiles_of_group(B):
    """Return the number of batch tiles of the program's group."""
    return tl.cdiv(tl.cdiv(B, SEQUENCES) - tl.program_id(1), tl.num_programs(1))


@triton.jit
def next_turn(step, tile, steps: tl.constexpr, B):
    """Return (step, tile) of the next turn: the group's next batch tile, or the first one `steps` steps later."""
    tile += tl.num_programs(1)
    last = tile * SEQUENCES >= B
    return tl.where(last, step + steps, step), tl.where(last, tl.program_id(1), tile)


@triton.jit
def cell_of_thread(first_place, S: tl.constexpr):
    """Return the cell that each thread owns, in a program with UNITS units from `first_place` on, as Owned."""
    thread = tl.arange(0, 32 * S.WARPS)
    local, slot = thread % S.UNITS, thread // S.UNITS
    place, in_tile = first_place + local, slot < SEQUENCES
    is_word = in_tile & (place < S.W * S.PER) & (thread % S.PER == 0)
    is_cell, unit = in_tile & (place < S.D), indexing.units_at(place, S)
    return Owned(local, place, unit, slot % SEQUENCES, is_cell, is_word)


@triton.jit
def here_at(step, tile, owned, batch, S: tl.constexpr):
    """Return the thread's cell at a step of a batch tile, as Here."""
    sequence = indexing.sequences(tile * SEQUENCES + owned.slot, batch)
    position = indexing.position(step, sequence, batch, S.REVERSE)
    cells = indexing.cells_at(sequence, position, owned.unit, owned.is_cell, S.H)
    return Here(tile, owned.unit, sequence, position, cells)


@triton.jit
def of_head(words_ptr, S: tl.constexpr):
    """Advance a pointer to a row of all heads to the words of the program's head."""
    if S.HEADS > 1:
        words_ptr += tl.program_id(2) * S.W
    return words_ptr


@triton.jit
def place_in_row(S: tl.constexpr):
    """Return (the piece of a row that a thread multiplies, its first word there). It has four of every STRIDE words."""
    thread, piece = threads(S.WARPS), 0
    warp = thread.warp
    if S.PIECES > 1:  # all pieces have the same number of warps
        piece, warp = warp // (S.WARPS // S.PIECES), warp % (S.WARPS // S.PIECES)
    return piece, warp * 16 + thread.quarter * 4


@triton.jit
def load_weights(weights_ptr, first_place, ROWS: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr):
    """Load the program's weights, ROWS rows of PIECES pieces of K words, as load_words returns them.

    forward     W_hh. Row r is gate r // UNITS of unit r % UNITS.
    backward    W_hh^T of the partner's gates. The rows are the units of all partners.
    """
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
    return load_words(weights_ptr, rows, first, S.K, S.STRIDE, DTYPE, S.CHUNKS)


@triton.jit
def h_before(step, tile, words_ptr, batch, S: tl.constexpr):
    """Return h before a turn, as Before.

    The rows of words are [T * B + B]: h of every step, then h0. There are no words at a reset and in padding, so h
    counts as zero there.
    """
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
    """Sum the products of all warps: return the four gates of W_hh h for the thread's cell, each [THREADS]."""
    GATES: tl.constexpr = S.GATES  # Triton 3.4 takes no field of a tuple for static_range
    rows = ()
    for n in tl.static_range(GATES):
        rows = rows + (owned.local + n * S.UNITS,)
    wanted = threads(S.WARPS).number < SEQUENCES * S.UNITS
    return after_zeros(sum_over_warps(products, rows, (owned.slot,), wanted, turn % 2, S.WARPS))


@triton.jit(repr=name_in_profiles("cooperative_forward_kernel"), do_not_specialize=["T", "B"])
def cooperative_forward_kernel(
    weights_ptr,  # [GATES H, W] int32: W_hh
    words_ptr,  # [T*B + B, HEADS W] int32: h of every step, the result and the exchange, first sentinels. Then h0
    hidden: HiddenPointers,  # h_ptr is None, since words_ptr has h. h_n gets h of every step. dropout_h has int32 words
    cell: CellPointers, lengths_ptr, resets_ptr, error_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """Run all steps forward for a program's units. The grid is (programs of a group, groups, heads).

    Each tensor of cells is [THREADS]. h_prev is a tuple of 4 CHUNKS words [THREADS]. dropout_h is [B, HEADS W].
    """
    DTYPE: tl.constexpr = cell.gates_ptr.dtype.element_ty

    # Load W_hh of the program's units, once.
    first_place = tl.program_id(0) * S.UNITS
    weights = load_weights(weights_ptr, first_place, S.GATES * S.UNITS, DTYPE, S)
    owned, words_ptr = cell_of_thread(first_place, S), of_head(words_ptr, S)
    constants = states.load_constants_forward(cell, owned.unit, S)

    batch = Batch(lengths_ptr, resets_ptr, T, B)
    step, tile, delay = 0, tl.program_id(1), tl.zeros_like(owned.unit)
    if S.AHEAD:
        before = h_before(step, tile, words_ptr, batch, S)
    for turn in range(T * tiles_of_group(B)):
        # Load. The data arrive during the wait. They stay as stored, since a conversion would wait for them.
        here = here_at(step, tile, owned, batch, S)
        cells = here.cells
        z_x, c_prev, rest_prev = states.load_cells(cell.c_n_ptr, cell, cells, B, S)
        share_c = noise.load_share(cell.zoneout_c_ptr, cells)
        h_kept = states.load_h_before(hidden, tl.where(step == 0, hidden.h0_ptr, hidden.h_n_ptr), cells.state_at, cells)

        # Collect h before the step, which the group published, and multiply: z_h has the four gates of a thread's cell.
        if not S.AHEAD:
            before = h_before(step, tile, words_ptr, batch, S)
        wait = Wait(error_ptr, step, delay, None)
        h_prev, delay = collect(before.words, wait, before.seen, S.CHUNKS, 4, S.STRIDE, neighbours(S.K))
        if hidden.dropout_h_ptr is not None:
            _, first = place_in_row(S)
            factors_ptr = of_head(hidden.dropout_h_ptr, S) + before.index.to(tl.int64) * (S.HEADS * S.W) + first
            h_prev = scale(h_prev, factors_ptr, before.words.left, S.STRIDE, DTYPE)
        z_h = gates_of_cell(product(weights, h_prev, DTYPE), owned, turn, S)

        # Look ahead. The words of the next turn arrive while the cell of this turn is computed.
        next_step, next_tile = next_turn(step, tile, 1, B)
        if S.AHEAD:
            before = h_before(next_step, next_tile, words_ptr, batch, S)

        # Gates and cell.
        gates, c, rest = cell_forward(z_x, z_h, c_prev, rest_prev, constants, len(constants) > 0, S)
        h = output(gates[3], c, S)
        c, h = noise.zoneout(c, (c_prev,) + share_c), noise.zoneout(h, h_kept)

        # Publish h before anything is stored, since the other programs wait for it. In padding it is zero.
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
def dgates_after(step, tile, words_ptr, batch, S: tl.constexpr):
    """Return the Words of the next step's dgates: PIECES pieces of K words for each sequence.

    There are words in padding and at resets, too. Without that wait a program could run ahead and overwrite partial
    sums that a partner has not read.
    """
    piece, first = place_in_row(S)
    sequence = indexing.sequences(tile * SEQUENCES + threads(S.WARPS).column, batch)
    row = indexing.row_of(indexing.time_of(step + 1, sequence.length, S.REVERSE), sequence.index, batch.B)
    left = tl.where(sequence.in_batch & (step < batch.T - 1), S.K - first, 0)
    return Words(words_ptr + (4 * row + piece) * (S.HEADS * S.W) + first, left)


@triton.jit
def sums_of_thread(first_place, S: tl.constexpr):
    """Return the Sums of each thread: the sum of its own cell, or with partners the sums that it publishes.

    With partners the sums cover the units of all partners.
    """
    ROWS: tl.constexpr = S.PARTNERS * S.UNITS
    rows, slots, units, published = (), (), (), ()
    for n in tl.static_range((ROWS + 4 * S.WARPS - 1) // (4 * S.WARPS)):
        number = tl.arange(0, 32 * S.WARPS) + n * 32 * S.WARPS
        rows = rows + (number % ROWS,)
        slots = slots + (number // ROWS % SEQUENCES,)
        place = first_place + rows[n]
        units = units + (indexing.units_at(place, S),)
        published = published + ((number < SEQUENCES * ROWS) & (place < S.D),)
    return Sums(rows, slots, units, published, threads(S.WARPS).number < SEQUENCES * ROWS)


@triton.jit
def sum_of_partners(found, sums, partials_ptr, here, wait, B, S: tl.constexpr):
    """Return (the sum over all partners for the thread's cell, the delay of the next wait for such sums).

    `found` has the values of this program's Sums. A program without partners returns the first. A program with partners
    publishes all, collects the values of all partners for its own cells, and adds them up in a fixed order.
    """
    PARTNERS: tl.constexpr = S.PARTNERS  # Triton 3.4 takes no field of a tuple for static_range
    total, delay = found[0], wait.delay
    if PARTNERS > 1:
        ROW: tl.constexpr = PARTNERS * S.H  # words of a sequence in partials
        own_ptr = partials_ptr + tl.program_id(0) % PARTNERS * S.H
        for n in tl.static_range(len(found)):
            index = here.tile * SEQUENCES + sums.slots[n]
            word_ptr = own_ptr + index.to(tl.int64) * ROW + sums.units[n]
            publish(word_ptr, in_phase(pack(found[n], tl.float32), wait.phase), sums.published[n] & (index < B))
        first_ptr = partials_ptr + here.sequence.index.to(tl.int64) * ROW + here.unit
        words = Words(first_ptr, tl.where(here.cells.in_tile, ROW, 0))  # at every step, so that no phase is skipped
        of_partners, delay = collect(words, wait, (), PARTNERS, 1, S.H, 1)
        total = of_partners[0].to(tl.float32, bitcast=True)
        for n in tl.static_range(1, PARTNERS):
            total += of_partners[n].to(tl.float32, bitcast=True)
    return total, delay


@triton.jit(repr=name_in_profiles("cooperative_backward_kernel"), do_not_specialize=["T", "B"])
def cooperative_backward_kernel(
    weights_ptr,  # [PARTNERS, H, GATES / PARTNERS * W] int32: W_hh^T of each partner's gates
    words_ptr,  # [T*B, 4, HEADS W] int32: dgates, the result and the exchange, first sentinels
    partials_ptr,  # [B, PARTNERS, H] int32: words of float32, whose last bits are first one. None without partners
    hidden: HiddenBackward,
    cell: CellBackward,  # dgates_ptr is None, since words_ptr has dgates
    saved: Saved, lengths_ptr, resets_ptr, error_ptr, T, B, S: tl.constexpr,
):  # fmt: skip
    """Run all steps backward for a program's units, from the last to the first.

    The grid is (programs of a group, groups, heads). Each tensor of cells is [THREADS]. dgates is a tuple of 4 CHUNKS
    words [THREADS].
    """
    DTYPE: tl.constexpr = saved.gates_ptr.dtype.element_ty
    # Load W_hh^T of the program's gates for the units of all partners, once.
    partner, first_place = tl.program_id(0) % S.PARTNERS, tl.program_id(0) // S.PARTNERS * (S.PARTNERS * S.UNITS)
    weights = load_weights(weights_ptr, first_place, S.PARTNERS * S.UNITS, DTYPE, S)
    owned, sums = cell_of_thread(first_place + partner * S.UNITS, S), sums_of_thread(first_place, S)
    peepholes = states.load_constants(cell.weight_peephole_ptr, owned.unit, S.H)
    words_ptr = of_head(words_ptr, S)
    dgates_ptr = words_ptr + (4 - (S.PARTNERS - partner) * S.OWN) * (S.HEADS * S.W)  # dgates of the program's gates

    batch = Batch(lengths_ptr, resets_ptr, T, B)
    step, tile = T - 1, tl.program_id(1)
    delay, delay_of_sums = tl.zeros_like(owned.unit), tl.zeros_like(owned.unit)
    for turn in range(T * tiles_of_group(B)):
        # Load. The data arrive during the wait. They stay as stored, since a conversion would wait for them.
        here = here_at(step, tile, owned, batch, S)
        cells, position = here.cells, here.position
        loaded = states.load_saved(saved, step, cells, S.H)
        dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
        drest = states.load_rest(cell.dc_ptr, cells, cells.valid, B, 0.0, S)
        dh_given, share_c = states.load_gradients_given(hidden, cells), noise.load_share(cell.zoneout_c_ptr, cells)
        next_continues = indexing.position(step + 1, here.sequence, batch, S.REVERSE).continues

        # Collect dgates of the next step, and multiply. The products are the part of dh that comes from this program's
        # gates, for the units of all partners. Add up the products of the warps, then the sums of the partners.
        words = dgates_after(step, tile, dgates_ptr, batch, S)
        wait = Wait(error_ptr, step, delay, None)
        dgates, delay = collect(words, wait, (), S.CHUNKS, 4, S.STRIDE, neighbours(S.K))
        products = product(weights, dgates, DTYPE)
        found = sum_over_warps(products, sums.rows, sums.slots, sums.wanted, turn % 2, S.WARPS)
        wait = Wait(error_ptr, step, delay_of_sums, (T - 1 - step) % 2)
        dh, delay_of_sums = sum_of_partners(found, sums, partials_ptr, here, wait, B, S)
        dh = states.gradient_of_h(tl.where(next_continues, dh, 0.0), dh_given, hidden, cells)

        # Output and cell. In padding every factor was loaded as zero, so all gradients are zero.
        gates, c, c_prev = states.as_float(loaded, cell.zoneout_c_ptr, S)
        dc, dc_stayed = noise.zoneout_backward(dc, share_c)
        dz_o, dc_by_m = output_backward(gates[3], c, dh, S)
        dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m, drest, peepholes, len(peepholes) > 0, S)
        dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)

        # Publish dgates, then store.
        word_ptr = words_ptr + position.row * (4 * S.HEADS * S.W) + owned.place // S.PER
        for n in tl.static_range(4):
            publish(word_ptr + n * (S.HEADS * S.W), pack(dz[n], DTYPE), owned.is_word & here.sequence.in_batch)
        states.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
        states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)
        step, tile = next_turn(step, tile, -1, B)
