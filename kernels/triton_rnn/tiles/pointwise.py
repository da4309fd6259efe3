"""The pointwise family: a step is a product by cuBLAS, and one kernel for everything else. kernels/by_steps.py launches
both.

A step of a plain LSTM is one part, from S.START "z" to S.END "h". In the forward kernel, it takes the first branch of
START and the last branch of END. A layer norm of c, or a projection in the loop, divides a step into parts. Each
launch then computes one part, see by_steps.Part.

At step 0, c before the step is c0. At later steps it is read from one of two tensors:

    with c_ptr, for backward     c_ptr [T*B, H], where every step stores its c
    without c_ptr                c_n_ptr [B, H], where every step overwrites the c of the step before
"""

import triton
import triton.language as tl

from ..cell import indexing, noise, states
from ..equations import next_cell, output, output_backward
from ..parameters import CellBackward, CellPointers, HiddenBackward, HiddenPointers, Saved, name_in_profiles
from .cells import backward_cells, forward_cells


@triton.jit
def at_in_z(tile, S: tl.constexpr):
    """Return the offsets [BB, BH] of a tile's first gates in z, which is [B, 4H], or [B, HEADS, 4 D] with heads."""
    others = tl.program_id(2) * (3 * S.D) if S.HEADS > 1 else 0  # the other three gates of all heads before this one
    return tile.sequence.index[:, None].to(tl.int64) * (4 * S.H) + tile.unit[None, :] + others


@triton.jit
def load_cell(ptr, cells):
    """Load one number of each cell from a tensor [B, H], in float32. In padding it is zero."""
    return tl.load(ptr + cells.state_at, mask=cells.valid, other=0.0).to(tl.float32)


@triton.jit
def gates_and_cell(z_ptr, cell, tile, step, B, S: tl.constexpr):
    """Load the inputs of the cells of a step, and return the result of cells.forward_cells."""
    SAVE: tl.constexpr = cell.c_ptr is not None
    cells = tile.cells
    z_x = states.load_gates(cell.gates_ptr, cells.gates_at, cells.valid, S.H, False, S.FROM_X)
    z_h = (0.0, 0.0, 0.0, 0.0)
    if z_ptr is not None:
        z_h = states.load_gates(z_ptr, at_in_z(tile, S), cells.valid, S.D)
    c_prev_ptr = cell.c0_ptr if step == 0 else cell.c_n_ptr
    if SAVE:
        saved = Saved(cell.gates_ptr, cell.c_ptr, cell.c0_ptr, cell.reset_c_ptr)
        c_prev = states.total(states.load_c_before(saved, step, cells))
    else:
        c_prev = states.load_state(c_prev_ptr, cells.state_at, cell.reset_c_ptr, cells)
    rest_prev = states.load_rest(c_prev_ptr, cells, cells.continues, B, S.EMPTY, S)
    constants = states.load_constants_forward(cell, tile.unit[None, :], S)
    share_c = noise.load_share(cell.zoneout_c_ptr, cells)
    return forward_cells(z_x, z_h, c_prev, rest_prev, constants, share_c, cell, tile, B, S, SAVE)


@triton.jit(repr=name_in_profiles("pointwise_forward_kernel"), do_not_specialize=["step", "T", "B"])
def pointwise_forward_kernel(
    z_ptr,  # [B, 4H], or [B, HEADS, 4 D] with heads: W_hh h of the step. None if it is added to the gates
    o_ptr, v_ptr,  # [B, H] float32, for LN(c). The part to "c" writes o and c. The part from "c" reads o and LN(c)
    m_ptr,  # [B, H], for a projection in the loop. The part to "m" writes m. The part from "m" reads W_hr m
    h_next_ptr,  # [B, H] out: h for the next product with W_hh, zero where no state continues. None: h itself
    hidden: HiddenPointers,
    cell: CellPointers,  # if c_ptr is given, c_n is written only where a sequence ends
    lengths_ptr, resets_ptr, step, T, B, S: tl.constexpr,
):  # fmt: skip
    """Compute one step forward, or a part of it, after its product W_hh h. Tensors of cells are [BB, BH]."""
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    tile = indexing.tile_of(tl.program_id(0), step, batch, S)
    cells = tile.cells
    if S.START == "z":
        m, o, v = gates_and_cell(z_ptr, cell, tile, step, B, S)
    elif S.START == "c":
        m = tl.where(cells.valid, output(load_cell(o_ptr, cells), load_cell(v_ptr, cells), S), 0.0)
    else:
        m = load_cell(m_ptr, cells)
    if S.END == "c":
        tl.store(o_ptr + cells.state_at, o, mask=cells.valid)
        tl.store(v_ptr + cells.state_at, v, mask=cells.valid)
    elif S.END == "m":
        tl.store(m_ptr + cells.state_at, m, mask=cells.in_tile)
    else:
        h_prev_ptr = hidden.h0_ptr if step == 0 else hidden.h_ptr
        h = states.store_hidden(m, hidden, states.load_h_before(hidden, h_prev_ptr, cells.prev_at, cells), cells)
        if h_next_ptr is not None:
            next_continues = indexing.position(step + 1, tile.sequence, batch, S.REVERSE).continues[:, None]
            h = noise.dropout(h.to(hidden.h_ptr.dtype.element_ty), hidden.dropout_h_ptr, cells.state_at, cells.in_tile)
            tl.store(h_next_ptr + cells.state_at, tl.where(next_continues, h, 0.0), mask=cells.in_tile)


@triton.jit(repr=name_in_profiles("pointwise_backward_kernel"), do_not_specialize=["step", "T", "B"])
def pointwise_backward_kernel(
    dh_next_ptr,  # [B, H]: the product W_hh^T dgates of the next step
    dh_total_ptr,  # [T*B, H] out: the gradient of m if c is normalised, of W_hr m with a projection. Else None
    m_ptr,  # [B, H], for a projection. The part to "m" writes the gradient of W_hr m. The part from "m" reads dm
    o_ptr, v_ptr,  # [B, H] float32, for LN(c). The part to "c" writes the gradients of z_o and LN(c). The other reads
    # the gradients of z_o and c
    normed_c_ptr,  # [T*B, H] float32: LN(c)
    dz_ptr,  # out: dgates of the step, with the shape of z_ptr, or None
    hidden: HiddenBackward, cell: CellBackward, saved: Saved, lengths_ptr, resets_ptr, step, T, B, S: tl.constexpr,
):  # fmt: skip
    """Compute one step backward, or a part of it, before its product W_hh^T dgates. Tensors of cells are [BB, BH]."""
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    tile = indexing.tile_of(tl.program_id(0), step, batch, S)
    cells = tile.cells
    if S.START == "h":
        next_continues = indexing.position(step + 1, tile.sequence, batch, S.REVERSE).continues[:, None]
        dh = tl.load(dh_next_ptr + cells.state_at, mask=next_continues & cells.valid, other=0.0).to(tl.float32)
        dm = states.gradient_of_h(dh, states.load_gradients_given(hidden, cells), hidden, cells)
        if dh_total_ptr is not None:
            tl.store(dh_total_ptr + cells.at, dm, mask=cells.in_tile)
    elif S.START == "m":
        dm = load_cell(m_ptr, cells)
    if S.END == "m":
        tl.store(m_ptr + cells.state_at, dm, mask=cells.in_tile)
    else:
        gates = states.load_gates(saved.gates_ptr, cells.gates_at, cells.valid, S.H)
        c_prev = states.total(states.load_c_before(saved, step, cells))
        if S.END == "c":
            dz_o, dv = output_backward(gates[3], tl.load(normed_c_ptr + cells.at, mask=cells.valid, other=0.0), dm, S)
            tl.store(o_ptr + cells.state_at, dz_o, mask=cells.valid)
            tl.store(v_ptr + cells.state_at, dv, mask=cells.valid)
        else:
            if S.START == "c":
                dz_o, dv = load_cell(o_ptr, cells), load_cell(v_ptr, cells)
            else:  # c is computed again instead of loaded, since memory should limit the speed here
                dz_o, dv = output_backward(gates[3], next_cell(gates, c_prev, S), dm, S)
            dz = backward_cells(gates, c_prev, dz_o, dv, cell, tile, B, S)
            states.store_gates(dz_ptr, at_in_z(tile, S), cells.in_tile, dz, S.D)
