"""The families of kernels, and what they propose for a problem."""

import dataclasses
import heapq
from types import ModuleType

from . import cooperative, resident, step
from .planning import Device, Family, Plan, Problem, expected

FAMILIES: dict[Family, ModuleType] = {
    Family.RESIDENT: resident,
    Family.COOPERATIVE: cooperative,
    Family.STEP: step,
}
"""Each has `forward` and `backward`: launch.layer_forward and launch.layer_backward, by one of the family's plans."""


def plans(problem: Problem, device: Device, backward: bool) -> list[Plan]:
    """What to try, best first (expected, until it is measured); the step family last."""
    last = step.step_plan(problem, device, backward)
    if problem.steps == 1:
        return [last]  # holding W_hh on chip pays from the second step on
    shared = list(cooperative.plans(problem, device, backward))
    if not shared and problem.side_by_side > 1:  # W_hh does not fit a part of the card: one after another, on all of it
        shared = list(cooperative.plans(dataclasses.replace(problem, side_by_side=1), device, backward))

    def seconds(plan: Plan) -> float:
        return expected(problem, device, plan, backward).seconds

    if problem.normalised:  # exchanges in the middle of a step hide behind no other batch tile
        shared = [plan for plan in shared if seconds(plan) < seconds(last)]
    return [*heapq.merge(resident.plans(problem, device, backward), shared, key=seconds), last]
