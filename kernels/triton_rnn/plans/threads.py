"""The plans of the cooperative and the resident family, and the tensors that their kernels take.

The kernels of both are written thread by thread. They read weights and masks as words of 32 bits. A word is one element
of float32, or two elements of half precision.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from ...cards import KB, Card
from ...memory import EVERY_BIT, Arguments, Buffer, Buffers, Memory, buffers_of
from ...problem import Pass, Problem, Recurrence, power_of_two
from ..threads.cooperative import cooperative_backward_kernel, cooperative_forward_kernel
from ..threads.fragments import SEQUENCES
from ..threads.resident import resident_backward_kernel, resident_forward_kernel
from .planning import Cooperative, Family, Plan, Resident

# How many of a thread's 255 registers a kernel may use:
MOST_WEIGHTS = 160  # in the resident family, for weights
MOST_BESIDE_RAGGED = 96  # the same, backward in TF32 with lengths and resets, where sums and states need more
MOST_REGISTERS = 190  # in the cooperative family, for weights, words and sums
STATIC_SHARED = 48 * KB  # the shared memory that a kernel may declare (CUDA C++ Programming Guide)
ROWS = SEQUENCES.value


def cooperative_plans(problem: Problem, card: Card, backward: bool, apart: bool) -> Iterator[Plan]:
    """Yield plans if the registers of all multiprocessors together hold W_hh as operands of tensor cores.

    `apart` says that the problem is one of several heads. Then the gates of a unit are no neighbours in dgates, see
    `sizes`.
    """
    if problem.batch == 0 or problem.exact_float32:
        return
    gates = problem.gates
    for partners in [n for n in (1, 2, 3, 4) if gates % n == 0] if backward else (1,):
        own = gates // partners if backward else 1
        words = ceil(problem.hidden * problem.size / 4) * (4 if apart and own == 3 else own)
        warps = 8 if words > 64 else 4
        chunks = ceil(words / (16 * warps))
        for units in range(4, 4 * warps + 1, 4):
            own_rows = units * (partners if backward else gates)  # rows of weights, see threads/cooperative.py
            rows = ceil(own_rows / 16) * 16
            programs = partners * ceil(problem.hidden / (partners * units))
            registers = (rows // 2 + 4) * chunks + rows // 4  # of a thread, for weights, words and sums
            groups = card.multiprocessors // (programs * problem.side_by_side)
            shared = 2 * warps * rows * ROWS * 4  # twice the sums of all warps
            fits = groups > 0 and registers <= MOST_REGISTERS and shared <= STATIC_SHARED
            if fits and own_rows in (rows, 3 * units):  # with three rows a unit, a tile of 16 rows may be partly empty
                why = f"{programs} programs hold W_hh in registers, {rows // 2 * chunks} a thread, and exchange "
                why += "dgates" if backward else "h"
                ahead = problem.batch > groups * ROWS and not backward
                yield Plan(
                    Cooperative(chunks, partners, ahead), ROWS, units, programs, groups, warps, shared, why,
                    side_by_side=problem.side_by_side,
                ).fitted(problem)  # fmt: skip


def as_words(x: Tensor) -> Tensor:
    """Return the rows of x [*, D] as words [*, W] int32, with zeros past D."""
    units = x.shape[-1]
    missing = -units * x.itemsize % 4 // x.itemsize
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    # The strides of x must be multiples of a word. With D = 1 a tensor counts as contiguous whatever its strides are.
    if units == 1 or not x.is_contiguous() or x.storage_offset() * x.itemsize % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)


def transposed_gates(p: Problem, r: Recurrence, partners: int, own: int) -> Tensor:
    """Return the words of W_hh^T, [partners, H, own, W] int32, where each of the `partners` multiplies `own` gates.

    One of the two numbers may be -1, since their product is the number of gates.
    """
    weight_hh, units = r.inputs.weight_hh, r.inputs.weight_hh.shape[1]
    by_gate = weight_hh.view(partners, own, p.heads, units, units)
    return as_words(by_gate.permute(0, 2, 4, 1, 3))


def sizes(p: Problem, plan: Plan, backward: bool) -> dict[str, int]:
    """See planning.Family. The sizes say how K of a program's product, counted in words, is divided among its warps.

    In forward, K is a row of h. In backward, K is the rows of OWN gates in dgates. Without heads these rows are
    neighbours and make one piece. With heads, the rows of other heads lie between them. Then each row is a piece, which
    a share of the warps multiplies. Warps cannot be divided among three pieces. So a cell with three gates also
    multiplies the gate before them, by zeros (ZEROS).
    """
    partners, words = plan.family.partners, ceil(p.columns * p.size / 4)
    gates, apart = p.gates // partners, backward and p.heads > 1
    own = 4 if apart and gates == 3 else gates
    pieces = own if apart else 1
    k, stride = own * words // pieces if backward else words, 16 * plan.num_warps // pieces
    return dict(
        PARTNERS=partners, OWN=own, PIECES=pieces, ZEROS=own - gates, K=k, STRIDE=stride, CHUNKS=ceil(k / stride),
        AHEAD=plan.family.ahead,
    )  # fmt: skip


def buffers(p: Problem, plan: Plan, pass_: Pass) -> Buffers:
    """See planning.Family. The exchanged words are the rows of h in forward, and of dgates in backward."""
    written = buffers_of(p, pass_)
    if pass_.backward:
        written["dgates_ptr"] = Buffer(p.dtype, (p.batch, 4, _row(p)), 0, EVERY_BIT)
        if plan.family.partners > 1:
            written["partials_ptr"] = Buffer(torch.int32, (p.batch, plan.family.partners, p.hidden), fill=EVERY_BIT)
    else:
        written["h_ptr"] = Buffer(p.dtype, (p.batch, _row(p)), 1, EVERY_BIT)  # h of all steps, then h0
        written["c_n_ptr"] = written["c_n_ptr"]._replace(fill="c0")  # kernels read c from c_n at every step
    return written


def forward_arguments(p: Problem, plan: Plan, r: Recurrence, memory: Memory) -> Arguments:
    """Return the further tensors that the forward kernel reads, by the names of pointers."""
    h0, h = r.inputs.h0[0], memory["h_ptr"][-1]  # [B, H], [B, _row(p)]
    if _row(p) > p.hidden:
        h = _without_padding(p, h.zero_())
    if not h0.is_meta:  # on the meta device this would import torch's compiler, which takes seconds
        h.copy_(torch.where(h0.isnan(), torch.nan, h0).view_as(h))  # a NaN of h0 must not be the sentinel
    dropout_h = as_words(r.inputs.dropout_h.view(-1, p.columns)) if p.dropout_h else None  # [B heads, D]
    return {
        "weights_ptr": as_words(r.inputs.weight_hh), "words_ptr": memory["h_ptr"].view(torch.int32),
        "dropout_h_ptr": dropout_h, "h_ptr": None, "c0_ptr": None,  # h is in the words, and c_n begins as c0
    }  # fmt: skip


def backward_arguments(p: Problem, plan: Plan, r: Recurrence, memory: Memory) -> Arguments:
    """Return the further tensors that the backward kernel reads, by the names of pointers."""
    weights = transposed_gates(p, r, plan.family.partners, -1)
    return {"weights_ptr": weights, "words_ptr": memory["dgates_ptr"].view(torch.int32), "dgates_ptr": None}


def h_of(p: Problem, memory: Memory) -> Tensor:
    """Return h without h0 and without the padding of rows.

    It is no view: autograd forbids in-place changes of views.
    """
    h = memory["h_ptr"]
    if _row(p) > p.hidden:
        return _without_padding(p, h[:-1]).flatten(2).contiguous()
    return h.resize_(len(h) - 1, p.batch, p.hidden)


def dgates_of(p: Problem, memory: Memory) -> Tensor:
    """Return dgates [T, B, 4H] without the padding of rows."""
    dgates = memory["dgates_ptr"]  # [T, B, 4, _row(p)]
    return (dgates if _row(p) == p.hidden else _without_padding(p, dgates)).flatten(2)


def _row(p: Problem) -> int:
    """Return the elements of a row of H units, in which the units of each head are padded to whole words."""
    return p.heads * (p.columns + p.columns * p.size % 4 // p.size)


def _without_padding(p: Problem, rows: Tensor) -> Tensor:
    """Return the units [..., heads, D] of rows [..., _row(p)]."""
    return rows.unflatten(-1, (p.heads, -1))[..., : p.columns]


def resident_plans(problem: Problem, card: Card, backward: bool) -> Iterator[Plan]:
    """Yield a plan if the registers of one block hold W_hh as operands of tensor cores."""
    if problem.batch == 0 or problem.exact_float32:
        return
    units = max(128 // problem.size, power_of_two(problem.hidden))  # two chunks of K or more, as `share` requires
    warps = units // 16 if backward else min(8, units // 8)
    registers = problem.gates * units * units * problem.size // (4 * 32 * warps)  # of a thread, for weights
    ragged = backward and problem.size == 4 and problem.lengths is not None and problem.resets
    if warps <= 8 and registers <= (MOST_BESIDE_RAGGED if ragged else MOST_WEIGHTS):
        shared = 2 * ROWS * units * problem.size * (problem.gates if backward else 1)
        yield Plan(
            Resident(units * problem.size // 64), ROWS, units, 1, ceil(problem.batch / ROWS), warps, shared,
            f"one block holds W_hh in registers, {registers} a thread, so that no exchange is needed",
        )  # fmt: skip


COOPERATIVE = Family(
    (cooperative_forward_kernel, cooperative_backward_kernel), sizes, lambda *_: True, buffers,
    arguments=(forward_arguments, backward_arguments), results=(h_of, dgates_of),
)  # fmt: skip
RESIDENT = Family(
    (resident_forward_kernel, resident_backward_kernel),
    lambda p, plan, backward: {"CHUNKS": plan.family.chunks},
    arguments=(
        lambda p, plan, r, memory: {"weights_ptr": as_words(r.inputs.weight_hh)},
        lambda p, plan, r, memory: {"weights_ptr": transposed_gates(p, r, -1, 1)},
    ),
)
