"""Measured plans: those of a problem are timed on the card at hand, and the fastest is remembered."""

import dataclasses
import itertools
from typing import Any

import torch
import triton

from ..recurrence import Recurrence
from . import plan_cache
from .families import plans
from .launch import layer_backward, layer_forward
from .planning import Family, Plan, Problem, device_of
from .trial import fits


def autotune(problem: Problem, device: torch.device) -> dict[str, Plan]:
    """Time the plans of a problem on `device`, forward and backward, and remember the fastest of each.

    Raises:
        RuntimeError: a CUDA graph is being captured; timing would become part of it.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("autotune cannot time kernels while a CUDA graph is captured; call it before the capture")
    card = device_of(torch.cuda.get_device_properties(device))
    fastest = {}
    for name, backward in (("forward", False), ("backward", True)):
        milliseconds = {
            plan: time_plan(problem, plan, backward, device)
            for plan in candidates(plans(problem, card, backward))
            if fits(problem, card, backward, plan)
        }
        fastest[name] = min(milliseconds, key=milliseconds.__getitem__)
        plan_cache.remember(dataclasses.replace(problem, steps=2), card, backward, fastest[name])
    return fastest


def candidates(plans: list[Plan]) -> list[Plan]:
    """What is worth timing: every plan, and the cooperative ones with both exchanges."""
    both = (True, False)
    return [
        dataclasses.replace(plan, flagged=flagged)
        for plan, flagged in itertools.product(plans, both)
        if flagged or plan.family is Family.COOPERATIVE
    ]


def time_plan(problem: Problem, plan: Plan, backward: bool, device: torch.device) -> float:
    """Milliseconds that a plan takes for the recurrence of a random problem, the median of many runs."""
    steps, batch, hidden = problem.steps, problem.batch, problem.hidden
    width = problem.projected or hidden
    with torch.cuda.device(device):
        options: Any = {"dtype": problem.dtype, "device": device}
        gates = torch.randn(steps, batch, 4 * hidden, **options)
        recurrence = Recurrence(
            weight_hh=torch.randn(4 * hidden, width, **options) / width**0.5,
            weight_hr=torch.randn(width, hidden, **options) / hidden**0.5 if problem.projected else None,
            h0=torch.zeros(batch, width, **options),
            c0=torch.zeros(batch, hidden, device=device),
            precision=problem.precision,
        )
        if backward:
            h, _, _, c = layer_forward(gates, recurrence, save=True)

        def run() -> None:
            if backward:
                layer_backward(h, None, None, gates, c, recurrence, plan=plan)
            else:
                layer_forward(gates, recurrence, save=True, plan=plan)

        return triton.testing.do_bench(run, return_mode="median")
