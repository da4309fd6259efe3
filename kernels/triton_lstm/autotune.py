"""Measured plans: those of a problem are timed on the card at hand, and the fastest is remembered."""

import dataclasses
import logging
from typing import Any

import torch
import triton

from ..recurrence import Recurrence
from . import plan_cache
from .families import plans
from .launch import choose_anew, launch_kernel, layer_backward, layer_forward
from .planning import Plan, Problem, device_of
from .trial import Attempt, obstacle

logger = logging.getLogger("gpu_lstm")


def autotune(problem: Problem, device: torch.device) -> dict[str, Plan]:
    """Time the plans of a problem on `device`, forward and backward, and remember the fastest of each.

    Raises:
        RuntimeError: a CUDA graph is being captured, of which timing would become part; or no plan can be compiled.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("autotune cannot time kernels while a CUDA graph is captured; call it before the capture")
    card = device_of(torch.cuda.get_device_properties(device))
    fastest = {}
    with torch.cuda.device(device):
        for name, backward in (("forward", False), ("backward", True)):
            attempt = _call(problem, backward, device)
            proposed = plans(problem, card, backward)
            milliseconds = {}
            for number, plan in enumerate(proposed, start=1):
                refused = obstacle(plan, attempt)
                if refused is None:
                    milliseconds[plan] = time_plan(plan, attempt)
                logger.info(
                    "%s, plan %d of %d: %s %dx%d: %s", name, number, len(proposed), plan.family.value, plan.rows,
                    plan.columns, f"{milliseconds[plan]:.3g} ms" if refused is None else refused,
                )  # fmt: skip
            fastest[name] = min(milliseconds, key=milliseconds.__getitem__)
            plan_cache.remember(dataclasses.replace(problem, steps=2), card, backward, fastest[name])
    choose_anew()
    return fastest


def time_plan(plan: Plan, attempt: Attempt) -> float:
    """Milliseconds that a plan takes, the median of many runs."""
    return triton.testing.do_bench(lambda: attempt(plan, launch_kernel), return_mode="median")


def _call(problem: Problem, backward: bool, device: torch.device) -> Attempt:
    """The recurrence of a random problem by a plan, all saved and the gradient of every h given."""
    steps, batch, hidden = problem.steps, problem.batch, problem.hidden
    width = problem.projected or hidden
    options: Any = {"dtype": problem.dtype, "device": device}
    gates = torch.randn(steps, batch, 4 * hidden, **options)
    recurrence = Recurrence(
        weight_hh=torch.randn(4 * hidden, width, **options) / width**0.5,
        weight_hr=torch.randn(width, hidden, **options) / hidden**0.5 if problem.projected else None,
        h0=torch.zeros(batch, width, **options),
        c0=torch.zeros(batch, hidden, device=device),
        precision=problem.precision,
    )
    if not backward:
        return lambda plan, launch: layer_forward(gates, recurrence, save=True, plan=plan, launch=launch)
    h, _, _, c = layer_forward(gates, recurrence, save=True)
    return lambda plan, launch: layer_backward(h, None, None, gates, c, recurrence, plan=plan, launch=launch)
