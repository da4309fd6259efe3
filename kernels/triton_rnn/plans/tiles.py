"""The plans of the step, the held and the pointwise family, and the facts about them that the launcher needs.

The kernels of all three are written in Triton's tiles.
"""

import itertools
from functools import partial
from math import ceil

import torch

from ... import by_steps
from ...cards import Card
from ...memory import Buffer, Buffers, buffers_of
from ...problem import Pass, Problem, power_of_two
from ..features import MOST_ROWS
from ..tiles.held import held_backward_kernel, held_forward_kernel
from ..tiles.pointwise import pointwise_backward_kernel, pointwise_forward_kernel
from ..tiles.step import step_backward_kernel, step_forward_kernel
from .planning import Family, Held, Plan, Pointwise, Step, rank


def step_plan(problem: Problem, card: Card, backward: bool) -> Plan:
    """Return a plan that works for every size.

    It has no more programs than the card keeps resident at once. If the card has room for fewer programs than heads,
    each head has one program, which waits for no other one. Many programs share the small product of a step. So tiles
    are the narrowest that fill tensor cores.
    """
    most, stages = (32, 2) if problem.regularised else (MOST_ROWS, 3)  # masks need registers
    if problem.exact_float32:
        most //= 2  # products without tensor cores need registers, too
    rows = max(16, min(power_of_two(problem.batch), most))
    units = 16  # with four gates, a forward product has 64 columns
    k = 128 // problem.size  # 128 bytes of each row at a time
    stage = (rows + units * (1 if backward else 4)) * k * problem.size
    side_by_side = problem.of_head.side_by_side
    return Plan(
        Step(k), rows, units, card.multiprocessors // side_by_side, 1, 8 if problem.exact_float32 else 4,
        2 * stage, "W_hh is read from L2 at every step", num_stages=stages, side_by_side=side_by_side,
        heads=problem.heads,
    ).fitted(problem)  # fmt: skip


# (Sequences, units) of the tiles of the held family. wgmma takes a multiple of 64 columns of the product. In forward a
# unit has four columns.
HELD_FORWARD = [*itertools.product((16, 32, 64), (16, 32))]
# With more than 64 units in backward, wgmma would read W_hh from wrong addresses (dev/compile_table/triton_issue.md).
HELD_BACKWARD = [(16, 64), (32, 64)]


def held_plans(problem: Problem, card: Card, backward: bool) -> list[Plan]:
    """Return the best three plans, by `rank`, whose programs hold W_hh of some units in shared memory, for wgmma.

    Up to 128 units a resident program holds all of W_hh. From 513 units on these plans should gain nothing.
    """
    if card.architecture != 90 or problem.exact_float32 or not 128 < problem.hidden <= 512:
        return []
    plans, multiprocessors = [], card.multiprocessors // problem.side_by_side
    for rows, units in HELD_BACKWARD if backward else HELD_FORWARD:
        inner = problem.hidden * (problem.gates if backward else 1)
        k = power_of_two(inner)
        batch_tiles, programs = ceil(problem.batch / rows), ceil(problem.hidden / units)
        shared = (rows + units * (1 if backward else 4)) * k * problem.size
        # With two blocks of a multiprocessor, one computes while the other waits.
        blocks = 2 if programs * batch_tiles > multiprocessors and card.has_room(2, shared) else 1
        groups = min(batch_tiles, blocks * multiprocessors // programs)
        warps = 4 if rows * units == 256 else 8
        if (rows, units, blocks) == (64, 32, 1):
            warps = 16
        # `ahead` needs a further 128 bytes of registers at most, in a thread with four cells at most. It should gain
        # nothing if K is padded.
        room = rows * k * problem.size <= 128 * 32 * warps and rows * units <= 4 * 32 * warps
        ahead = batch_tiles > groups and blocks == 1 and room and k == inner
        if groups > 0 and shared <= card.shared:
            plans.append(Plan(
                Held(k, ahead), rows, units, programs, groups, warps, shared,
                "programs hold W_hh in shared memory", blocks=blocks, side_by_side=problem.side_by_side,
            ).fitted(problem))  # fmt: skip
    return sorted(plans, key=partial(rank, problem, card, backward=backward))[:3]


def split_plans(problem: Problem, card: Card, backward: bool) -> list[Plan]:
    """Return the best two plans, by `rank`, that split the product of backward into parts of K.

    A program multiplies one part of K for the units of all parts: 64 or 128 units instead of 8, 16 or 32. With all of K
    for 16 units, it would read far more of dgates than of W_hh.
    """
    if not backward or problem.side_by_side > card.multiprocessors or problem.exact_float32:
        return []
    plans, inner = [], problem.gates * problem.hidden
    for rows, (units, parts) in itertools.product((16, 32, 64, 128), ((8, 8), (16, 4), (16, 8), (32, 4))):
        shared = 3 * 128 * (rows + parts * units)
        in_loads = inner * problem.size % (16 * parts) == 0  # a part is loaded 16 bytes at a time
        fits = rows <= max(16, power_of_two(problem.batch)) and rows * units <= 2048 and shared <= card.shared
        if in_loads and fits:
            plans.append(Plan(
                Step(128 // problem.size, parts), rows, units, card.multiprocessors // problem.side_by_side, 1,
                max(4, rows * units // 128), shared, "W_hh is read from L2 at every step, for products of parts of K",
                num_stages=3, side_by_side=problem.side_by_side,
            ).fitted(problem))  # fmt: skip
    return sorted(plans, key=partial(rank, problem, card, backward=backward))[:2]


def waits(p: Problem, plan: Plan) -> bool:
    """See planning.Family.

    Without parts of K, no program of the step family waits if T = 1, or if each of several heads has one program. So
    there is a plan for any number of heads.
    """
    alone = p.heads > 1 and plan.programs == 1
    return isinstance(plan.family, Held) or plan.family.parts > 1 or (p.steps > 1 and not alone)


def buffers(p: Problem, plan: Plan, pass_: Pass) -> Buffers:
    """See planning.Family."""
    written = buffers_of(p, pass_)
    if waits(p, plan):  # how many programs of each head and batch tile have arrived
        written["arrivals_ptr"] = Buffer(torch.int32, (p.heads * ceil(p.batch / plan.rows),), fill=0)
    if plan.family.parts > 1:
        written["sums_ptr"] = Buffer(torch.float32, (plan.family.parts, p.batch, p.hidden))
    return written


def sizes(p: Problem, plan: Plan, backward: bool) -> dict[str, int]:
    """See planning.Family."""
    k, parts, ahead = plan.family.k, plan.family.parts, plan.family.ahead
    return dict(K=p.gates * p.columns // parts, BLOCK_K=k, PARTS=parts, AHEAD=ahead)


def pointwise_plan(problem: Problem, backward: bool) -> Plan:
    """Return the plan of the pointwise family. Each of 128 threads of a program has 16 bytes of every tensor."""
    count = by_steps.launches_of(problem, backward)
    why = f"{count} launches for each step, with the product by cuBLAS, where a step takes much longer than they do"
    if problem.only_by_steps:
        what = "layer norms of all units" if problem.normalised else "a projection of h that has noise"
        why = f"{count} launches for each step, with products by cuBLAS: {what} are not in the loops of other families"
    units = min(256, power_of_two(problem.hidden))
    rows = max(1, 2048 // problem.size // units)
    return Plan(Pointwise(), rows, units, ceil(problem.hidden / units), ceil(problem.batch / rows), 4, 0, why)


STEP = Family((step_forward_kernel, step_backward_kernel), sizes, waits, buffers)
HELD = STEP._replace(kernels=(held_forward_kernel, held_backward_kernel))
POINTWISE = Family(
    (pointwise_forward_kernel, pointwise_backward_kernel), buffers=lambda p, plan, pass_: by_steps.buffers(p, pass_),
    loop=by_steps.run_steps, within=by_steps.within,
)  # fmt: skip
