"""Plans tried without launching anything: which launches they would make, and whether their kernels fit a card."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..recurrence import Recurrence
from .binary import RecordedLaunch, resources
from .families import FAMILIES, plans
from .planning import Device, Plan, Problem


def recorded_launches(
    problem: Problem, backward: bool, plan: Plan, ragged: bool = False, reverse: bool = False, training: bool = True
) -> list[RecordedLaunch]:
    """The distinct launches that a plan makes, everything saved and every gradient given, without making them.

    A problem that is regularised has masks in training, else zoneout's probabilities.
    """
    launches: dict[str, RecordedLaunch] = {}

    def record(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        launches.setdefault(kernel.__name__, RecordedLaunch(kernel, grid, arguments))

    def meta(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    steps, batch, hidden = problem.steps, problem.batch, problem.hidden
    width = problem.projected or hidden
    gates, h, h0 = meta(steps, batch, 4 * hidden), meta(steps, batch, width), meta(batch, width)
    c, c0 = meta(steps, batch, hidden, dtype=torch.float32), meta(batch, hidden, dtype=torch.float32)
    noise: dict[str, Tensor] = {}
    if problem.regularised and training:
        noise = dict(
            dropout_h=meta(batch, width),
            zoneout_h=meta(steps, batch, width, dtype=torch.bool),
            zoneout_c=meta(steps, batch, hidden, dtype=torch.bool),
        )
    elif problem.regularised:
        noise = dict(zoneout_h=meta(dtype=torch.float32), zoneout_c=meta(dtype=torch.float32))
    recurrence = Recurrence(
        weight_hh=meta(4 * hidden, width),
        weight_hr=meta(width, hidden) if problem.projected else None,
        h0=h0,
        c0=c0,
        lengths=meta(batch, dtype=torch.int64) if ragged else None,
        resets=meta(steps, batch, dtype=torch.bool) if ragged else None,
        reverse=reverse,
        precision=problem.precision,
        **noise,
    )
    family = FAMILIES[plan.family]
    if backward:
        family.backward(h, h0, c0, gates, c, recurrence, plan=plan, launch=record)
    else:
        family.forward(gates, recurrence, save=True, plan=plan, launch=record)
    return list(launches.values())


def fits(problem: Problem, device: Device, backward: bool, plan: Plan) -> bool:
    """Whether every kernel of a plan compiles for the device without spills, and takes no more than a block may."""
    return all(
        resources(launch, device.architecture).fit(plan.threads, device.shared)
        for launch in recorded_launches(problem, backward, plan)
    )


@functools.cache
def fitting_plan(problem: Problem, device: Device, backward: bool) -> Plan:
    """The first plan that fits; the step family's is not asked."""
    *tried, last = plans(problem, device, backward)
    return next((plan for plan in tried if fits(problem, device, backward, plan)), last)
