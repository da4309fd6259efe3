"""The cells of a tile at a step, between the products of two steps. All families of tiles share them."""

import triton
import triton.language as tl

from ..cell import noise, states
from ..equations import cell_backward, cell_forward, output, output_backward


@triton.jit
def load_constants_and_h(h_prev_ptr, hidden, cell, tile, S: tl.constexpr):
    """Load what forward_cells and store_hidden need besides load_cells.

    Returns (the constants, the share of c that stays with zoneout, states.load_h_before).
    """
    constants = states.load_constants_forward(cell, tile.unit[None, :], S)
    h_before = states.load_h_before(hidden, h_prev_ptr, tile.cells.prev_at, tile.cells)
    return constants, noise.load_share(cell.zoneout_c_ptr, tile.cells), h_before


@triton.jit
def forward_cells(
    z_x, z_h, c_prev, rest_prev, constants, share_c, cell, tile, B, S: tl.constexpr, AT_END: tl.constexpr = False
):  # fmt: skip
    """Compute the cells of a step from z_x and z_h, the parts of the four pre-activations that come from x and from h.

    Each of them is [BB, BH].

    `constants` is a tuple: the peepholes p_i, p_f and p_o of an LSTM, b_hh of a GRU's gates, or empty. `share_c` is
    empty without zoneout of c. With zoneout it has one item, the share of c that stays: a mask [BB, BH], or a rate.

    Returns (m, the last gate, c before zoneout), each [BB, BH]. m is zero in padding. The other results are stored: the
    activated gates and c for the backward pass, the rest, and c_n. If AT_END, c_n is stored only where a sequence ends.
    """
    cells = tile.cells
    gates, c, rest = cell_forward(z_x, z_h, c_prev, rest_prev, constants, len(constants) > 0, S)
    m = tl.where(cells.valid, output(gates[3], c, S), 0.0)
    c_next = noise.zoneout(c, (c_prev,) + share_c)
    tl.store(cell.c_n_ptr + cells.state_at, c_next, mask=cells.valid & cells.is_last if AT_END else cells.valid)
    states.store_rest(cell.c_n_ptr, rest, cells, cells.valid, B, S)
    states.save(gates, c_next, cell, cells, S.H)
    return m, gates[3], c


@triton.jit
def backward_step(dh, loaded, hidden, cell, saved, tile, step, B, S: tl.constexpr):
    """Compute and store the gradients of a step's cells, as backward_cells does, from dh [BB, BH].

    `dh` is the product W_hh^T dgates of the next step. `loaded` is from states.load_saved. If it is empty, this loads
    it.
    """
    given = states.load_gradients_given(hidden, tile.cells)
    dm = states.gradient_of_h(dh, given, hidden, tile.cells)
    if len(loaded) == 0:
        loaded = states.load_saved(saved, step, tile.cells, S.H)
    gates, c, c_prev = states.as_float(loaded, cell.zoneout_c_ptr, S)
    dz_o, dc_by_m = output_backward(gates[3], c, dm, S)
    backward_cells(gates, c_prev, dz_o, dc_by_m, cell, tile, B, S)


@triton.jit
def backward_cells(gates, c_prev, dz_o, dc_by_m, cell, tile, B, S: tl.constexpr):
    """Compute, store and return the gradients dz of the four pre-activations, each [BB, BH].

    `dz_o` and `dc_by_m` are the gradients of the last pre-activation and of c before zoneout that come from m. The
    gradient of the state before the step is stored, too. In padding all inputs were loaded as zero, so all gradients
    are zero.
    """
    cells = tile.cells
    dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
    dc, dc_stayed = noise.zoneout_backward(dc, noise.load_share(cell.zoneout_c_ptr, cells))
    drest = states.load_rest(cell.dc_ptr, cells, cells.valid, B, 0.0, S)
    peepholes = states.load_constants(cell.weight_peephole_ptr, tile.unit[None, :], S.H)
    dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m, drest, peepholes, len(peepholes) > 0, S)
    dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)
    states.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, S.H)
    states.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
    states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)
    return dz
