"""The families of kernels, and what they propose for a problem."""

from types import ModuleType

from . import cooperative, resident, step
from .planning import Device, Family, Plan, Problem

FAMILIES: dict[Family, ModuleType] = {
    Family.RESIDENT: resident,
    Family.COOPERATIVE: cooperative,
    Family.STEP: step,
}
"""Each has `forward` and `backward`: launch.layer_forward and launch.layer_backward, by one of the family's plans."""


def plans(problem: Problem, device: Device, backward: bool) -> list[Plan]:
    """What to try, best first (expected, until it is measured); the step family last."""
    last = step.step_plan(problem, backward)
    if problem.steps == 1 or problem.regularised:
        return [last]  # holding W_hh on chip pays from the second step on
    return [*resident.plans(problem, device, backward), *cooperative.plans(problem, device, backward), last]
