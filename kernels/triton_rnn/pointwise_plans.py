"""The plan of the pointwise family, and what the launcher must know of it."""

from math import ceil

from .. import by_steps
from ..problem import Problem, power_of_two
from .planning import Family, Plan, Pointwise
from .pointwise import pointwise_backward_kernel, pointwise_forward_kernel


def pointwise_plan(problem: Problem) -> Plan:
    """16 bytes of every tensor for each of 128 threads."""
    units = min(256, power_of_two(problem.hidden))
    rows = max(1, 2048 // problem.size // units)
    return Plan(
        Pointwise(), rows, units, ceil(problem.hidden / units), ceil(problem.batch / rows), num_warps=4, shared=0,
        why="a product by cuBLAS and one more launch for each step, where a step takes much longer than two launches",
    )  # fmt: skip


FAMILY = Family(
    (pointwise_forward_kernel, pointwise_backward_kernel), buffers=lambda p, plan, pass_: by_steps.buffers(p, pass_),
    loops=(by_steps.forward_steps, by_steps.backward_steps), projects=by_steps.keeps_projection,
)  # fmt: skip
