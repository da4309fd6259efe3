"""The plan of the pointwise family, and what the launcher must know of it."""

from math import ceil

from ... import by_steps
from ...problem import Problem, power_of_two
from ..tiles.pointwise import pointwise_backward_kernel, pointwise_forward_kernel
from .planning import Family, Plan, Pointwise


def pointwise_plan(problem: Problem, backward: bool) -> Plan:
    """16 bytes of every tensor for each of 128 threads."""
    count = by_steps.launches_of(problem, backward)
    why = f"{count} launches for each step, with the product by cuBLAS, where a step takes much longer than they do"
    if problem.only_by_steps:
        what = "layer norms of all units" if problem.normalised else "a projection of h that has noise"
        why = f"{count} launches for each step, with products by cuBLAS: {what} are not in the loops of other families"
    units = min(256, power_of_two(problem.hidden))
    rows = max(1, 2048 // problem.size // units)
    return Plan(
        Pointwise(), rows, units, ceil(problem.hidden / units), ceil(problem.batch / rows), 4, 0, why,
    )  # fmt: skip


FAMILY = Family(
    (pointwise_forward_kernel, pointwise_backward_kernel), buffers=lambda p, plan, pass_: by_steps.buffers(p, pass_),
    loops=(by_steps.forward_steps, by_steps.backward_steps), within=by_steps.within,
)  # fmt: skip
