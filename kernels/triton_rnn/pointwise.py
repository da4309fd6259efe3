"""The pointwise family: a step is a product by cuBLAS and one kernel, which does everything else.

For layers and batches so large that two launches are short compared with a step. Nothing synchronises, so all steps
become part of a CUDA graph. A product covers the whole batch, as contiguous rows [B, *]: where sequences visit
different times at the same step (reverse, with lengths), the kernel gathers and scatters them.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl

from ..cells import CELLS
from ..heads import arranged
from ..memory import Buffer, buffers_of
from ..problem import Pass, Problem, power_of_two
from ..projection import products_in
from . import indexing, noise, reset, states
from .equations import cell_backward, cell_forward, next_cell, output, output_backward
from .parameters import Cell, CellBackward, Hidden, HiddenBackward, Saved, name_in_profiles
from .planning import Family, Plan, Pointwise


@triton.jit
def at_in_z(tile, S: tl.constexpr):
    """Where a tile's first gates are in z [B, 4H], of heads [B, HEADS, 4 D]."""
    others = tl.program_id(2) * (3 * S.D) if S.HEADS > 1 else 0  # gates of the heads before
    return tile.sequence.index[:, None].to(tl.int64) * (4 * S.H) + tile.unit[None, :] + others


@triton.jit(repr=name_in_profiles("pointwise_forward_kernel"), do_not_specialize=["step", "T", "B"])
def pointwise_forward_kernel(
    z_ptr,  # [B, 4H], of heads [B, HEADS, 4 D], W_hh h of the step; None if the gates have it already
    h_next_ptr,  # [B, H] out: what the next step multiplies with W_hh, zero where it does not continue; None: as h
    hidden: Hidden,
    cell: Cell,  # c_n, where c is saved, only where a sequence ends
    lengths_ptr, resets_ptr, step, T, B, S: tl.constexpr,
):  # fmt: skip
    """One step, after its product."""
    SAVE: tl.constexpr = cell.c_ptr is not None
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    tile = indexing.tile_at(tl.program_id(0), step, batch, S.H, S)
    cells, sequence, unit = tile.cells, tile.sequence, tile.unit[None, :]
    x = states.load_gates(cell.gates_ptr, cells.gates_at, cells.valid, S.H, False, S.FROM_X)
    z = (0.0, 0.0, 0.0, 0.0)
    if z_ptr is not None:
        z = states.load_gates(z_ptr, at_in_z(tile, S), cells.valid, S.D)
    if SAVE:
        saved = Saved(cell.gates_ptr, cell.c_ptr, cell.c0_ptr, cell.reset_c_ptr)
        c_prev = states.total(states.load_c_before(saved, step, cells))
    else:
        c_prev = reset.load_state(cell.c0_ptr if step == 0 else cell.c_n_ptr, cells.state_at, cell.reset_c_ptr, cells)
    rest_prev = states.load_rest_before(cell.c0_ptr if step == 0 else cell.c_n_ptr, cells, B, S)
    constants = states.load_constants_forward(cell, unit, S)
    gates, c, rest = cell_forward(x, z, c_prev, rest_prev, constants, S)
    h = tl.where(cells.valid, output(gates[3], c, S), 0.0)
    c = noise.zoneout(c, c_prev, noise.load_share(cell.zoneout_c_ptr, cells))
    tl.store(cell.c_n_ptr + cells.state_at, c, mask=cells.valid & cells.is_last if SAVE else cells.valid)
    states.store_rest(cell.c_n_ptr, rest, cells, cells.valid, B, S)
    states.save(gates, c, cell, cells, S.H)
    h_kept = noise.load_h_before(hidden, hidden.h0_ptr if step == 0 else hidden.h_ptr, cells.prev_at, cells)
    h = states.store_hidden(h, hidden, h_kept, cells)
    if h_next_ptr is not None:
        next_continues = indexing.position(step + 1, sequence, batch, S.REVERSE).continues
        h = noise.dropout(h.to(hidden.h_ptr.dtype.element_ty), hidden.dropout_h_ptr, cells.state_at, cells.in_tile)
        tl.store(h_next_ptr + cells.state_at, tl.where(next_continues[:, None], h, 0.0), mask=cells.in_tile)


@triton.jit(repr=name_in_profiles("pointwise_backward_kernel"), do_not_specialize=["step", "T", "B"])
def pointwise_backward_kernel(
    dh_next_ptr,  # [B, H]: dgates of the step after, times W_hh
    dz_ptr,  # like z_ptr, out: dgates of the step, or None
    hidden: HiddenBackward, cell: CellBackward, saved: Saved, lengths_ptr, resets_ptr, step, T, B, S: tl.constexpr,
):  # fmt: skip
    """One step, before its product."""
    batch = indexing.Batch(lengths_ptr, resets_ptr, T, B)
    tile = indexing.tile_at(tl.program_id(0), step, batch, S.H, S)
    cells, sequence, unit = tile.cells, tile.sequence, tile.unit[None, :]
    from_next = indexing.position(step + 1, sequence, batch, S.REVERSE).continues[:, None] & cells.valid
    dh = tl.load(dh_next_ptr + cells.state_at, mask=from_next, other=0.0).to(tl.float32)
    dh = states.gradient_of_h(dh, states.load_gradients_given(hidden, cells), hidden, cells)
    gates = states.load_gates(saved.gates_ptr, cells.gates_at, cells.valid, S.H)
    c_prev = states.total(states.load_c_before(saved, step, cells))
    c = next_cell(gates, c_prev, S)  # not loaded: memory is what large batches wait for
    dc = tl.load(cell.dc_ptr + cells.state_at, mask=cells.valid, other=0.0)
    dc, dc_stayed = noise.zoneout_backward(dc, noise.load_share(cell.zoneout_c_ptr, cells))
    peepholes = states.load_constants(cell.weight_peephole_ptr, unit, S.H)
    dz_o, dc_by_m = output_backward(gates[3], c, dh, S)
    drest = states.load_gradient_of_rest(cell.dc_ptr, cells, B, S)
    dz, dc_prev, drest = cell_backward(gates, c_prev, dz_o, dc + dc_by_m, drest, peepholes, S)
    dc_prev = noise.add_stayed(dc_prev, dc_stayed, cell.zoneout_c_ptr)
    # In padding every factor was loaded as zero, so its gradients are zero.
    states.store_gates(cell.dgates_ptr, cells.gates_at, cells.in_tile, dz, S.H)
    states.store_gates(dz_ptr, at_in_z(tile, S), cells.in_tile, dz, S.D)
    reset.store_gradient(dc_prev, cell.dc_ptr, cell.dreset_c_ptr, cells)
    states.store_gradient_of_rest(cell.dc_ptr, drest, cells, B, S)


def pointwise_plan(problem: Problem) -> Plan | None:
    """16 bytes of every tensor for each of 128 threads; None where a step has something between product and cells."""
    if problem.normalised or problem.projects_in_loop or problem.batch == 0:
        return None
    units = min(256, power_of_two(problem.hidden))
    rows = max(1, 2048 // problem.size // units)
    return Plan(
        Pointwise(), rows, units, ceil(problem.hidden / units), ceil(problem.batch / rows), num_warps=4, shared=0,
        why="a product by cuBLAS and one more launch for each step, where a step takes much longer than two launches",
    )  # fmt: skip


def buffers(p: Problem, plan: Plan, pass_: Pass) -> dict[str, Buffer]:
    """See planning.Family."""
    scattered = p.reverse and p.lengths is not None  # sequences visit different times at the same step
    written, backward = buffers_of(p, pass_), pass_.backward
    if scattered or (CELLS[p.cell].has_constant and not backward) or p.heads > 1:  # else in the gates
        written["dz_ptr" if backward else "z_ptr"] = Buffer(p.dtype, (p.batch, 4 * p.hidden))
    if backward or scattered or p.resets or p.dropout_h:  # else the next product's operand is h
        written["dh_next_ptr" if backward else "h_next_ptr"] = Buffer(p.dtype, (p.batch, p.hidden))
    return written


def by_head(weight_hh: torch.Tensor, p: Problem) -> tuple[Callable[..., Any], Callable[..., Any], torch.Tensor]:
    """(A product, the form that it takes [B, *] in, W_hh); of heads in batches of them, for which W_hh is copied."""
    if p.heads == 1:
        return torch.mm, lambda x: x, weight_hh
    weight = arranged(weight_hh, p.width).mT  # [heads, GATES D, D]
    return torch.bmm, lambda x: x.unflatten(1, (p.heads, -1)).transpose(0, 1), weight  # [heads, B, *]


def forward_steps(launch: Callable[[dict[str, Any]], None], arguments: dict[str, Any], p: Problem) -> None:
    """Run all steps; launch(arguments) launches the kernel. Of launches that are only recorded, the first.

    On the meta device products would import torch's compiler, which takes seconds.
    """
    if arguments["gates_ptr"].is_meta:
        return launch(arguments | {"step": 0})
    gates, z, h, h_next = (arguments.get(name) for name in ("gates_ptr", "z_ptr", "h_ptr", "h_next_ptr"))
    operand, (product, in_heads, weight) = arguments["h0_ptr"][0], by_head(arguments["weight_hh_ptr"], p)
    if p.dropout_h:
        operand = arguments["dropout_h_ptr"] * operand
    if p.resets and not p.reverse:  # in reverse none is before the first step
        operand = operand.masked_fill(arguments["resets_ptr"][0, :, None], 0)
    times, cell, weight = range(arguments["T"]), CELLS[p.cell], weight.mT
    with products_in(p.precision):
        for step, time in enumerate(reversed(times) if p.reverse else times):
            if z is None:
                cell.of_h(gates[time], p.hidden).addmm_(operand, weight)
            else:
                product(in_heads(operand), weight, out=cell.of_h(in_heads(z), p.columns))
            launch(arguments | {"step": step})
            operand = h[time] if h_next is None else h_next


def backward_steps(launch: Callable[[dict[str, Any]], None], arguments: dict[str, Any], p: Problem) -> None:
    """As forward_steps, from the last to the first."""
    if arguments["gates_ptr"].is_meta:
        return launch(arguments | {"step": 0})
    dgates, dz, dh_next = (arguments.get(name) for name in ("dgates_ptr", "dz_ptr", "dh_next_ptr"))
    times, cell = range(arguments["T"]), CELLS[p.cell]
    product, in_heads, weight = by_head(arguments["weight_hh_ptr"], p)
    with products_in(p.precision):
        for step, time in zip(reversed(times), times if p.reverse else reversed(times)):
            launch(arguments | {"step": step})
            if step:
                of_h = cell.of_h(in_heads(dgates[time] if dz is None else dz), p.columns)
                product(of_h, weight, out=in_heads(dh_next))


FAMILY = Family(
    (pointwise_forward_kernel, pointwise_backward_kernel), buffers=buffers,
    loops=(forward_steps, backward_steps),
)  # fmt: skip
