"""The Triton backend's two entry points. One layer, one direction; the input product is already in `gates`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .. import projection
from ..giving_up import raise_if_gave_up
from ..initial_gradient import initial_hidden_gradient
from ..ordering import await_others
from ..recurrence import Recurrence, check_counts
from . import plan_cache, step
from .families import FAMILIES, plans
from .planning import INTERPRETER, Family, Launch, Plan, Problem, device_of
from .trial import Attempt, first_that_fits

Distrust = Callable[..., str | None]

INTERPRETED = not isinstance(step.lstm_step_forward_kernel, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when triton was imported."""


def layer_forward(
    gates: Tensor,
    recurrence: Recurrence,
    *,
    save: bool,
    plan: Plan | None = None,
    launch: Launch | None = None,
    distrust: Distrust | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of one layer in one direction.

    Args:
        gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`; with a projection, and
            without `save`, at every sequence's first step.
        recurrence: weights, initial states, lengths and the rest.
        save: keep what layer_backward needs.
        plan: how to run it; by default the best that fits.
        launch: launches one kernel; by default `launch_kernel`.
        distrust: distrust(plan, recurrence, save=..., given=...) says why a plan's numbers are not trusted on the
            device, or None; by default all are. `given`: whether there are gradients of h and h_n; None forward.

    Returns:
        h [T, B, P], h_n [B, P], c_n float32 [B, H], and c: float32 [T, B, H] if `save`, else empty.

    Raises:
        RuntimeError: programs of an earlier launch waited in vain for each other.
        ValueError: T, B, H or P is more than the kernels can count to.
    """
    raise_if_gave_up(gates.device)
    check_counts(gates)

    def attempt(plan: Plan, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        forward = partial(FAMILIES[plan.family].forward, gates, save=save, plan=plan, launch=launch)
        if not _projects_outside(plan, recurrence):
            return forward(recurrence)
        m, _, c_n, c = forward(projection.recurrence_of_m(recurrence))
        return *projection.project(m, recurrence), c_n, c

    if plan is None:
        check = partial(distrust, like=recurrence, save=save) if distrust else None
        plan = choose_plan(_problem(gates, recurrence), gates.device, False, _variant(recurrence, save), attempt, check)
    if plan.family is not Family.RESIDENT:
        await_others(plan.side_by_side, gates.device)
    if _projects_outside(plan, recurrence):
        projection.add_initial_product(gates, recurrence)  # here, since a call may be attempted by several plans
    return attempt(plan, launch or launch_kernel)


def layer_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    recurrence: Recurrence,
    *,
    plan: Plan | None = None,
    launch: Launch | None = None,
    distrust: Distrust | None = None,
) -> tuple[Tensor, ...]:
    """Gradients through the recurrence of one layer in one direction.

    Args:
        dh, dh_n, dc_n: gradients of layer_forward's first three results; None counts as zero.
        gates, c: what layer_forward saved: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
        recurrence, plan, launch, distrust: as for layer_forward.

    Returns:
        dgates [T, B, 4H], gradient of the pre-activations; dh0 [B, P]; dc0 float32 [B, H]; and, with a projection,
        the whole gradient of W_hr m [T, B, P], from which dW_hr is taken; with a layer norm of c, that of m (without
        either, an empty tensor). And, float32,
        zero but at resets, empty without such states: what zoneout hands back to reset_h [T, B, P]; dreset_c [T, B, H].

    Raises:
        RuntimeError: programs of an earlier launch waited in vain for each other.
    """
    raise_if_gave_up(gates.device)

    def attempt(plan: Plan, launch: Launch) -> tuple[Tensor, ...]:
        backward = partial(FAMILIES[plan.family].backward, plan=plan, launch=launch)
        if _projects_outside(plan, recurrence):
            dh_total = projection.gradient_of_output(dh, dh_n, len(gates), recurrence)
            dm, of_m = projection.gradient_of_m(dh_total, recurrence), projection.recurrence_of_m(recurrence)
            found = backward(dm, None, dc_n, gates, c, of_m)
            found = found._replace(dh_total=projection.add_gradient_of_next(dh_total, found.dgates, recurrence))
        else:
            found = backward(dh, dh_n, dc_n, gates, c, recurrence)
        dh0 = initial_hidden_gradient(found.dgates, dh_n, found.dh_from_zoneout, recurrence)
        results = found.dgates, dh0, found.dc0, found.dh_total, found.dreset_h, found.dreset_c
        return tuple(c.new_empty(0) if t is None else t for t in results)

    if plan is None:
        given = dh is not None, dh_n is not None
        check = partial(distrust, like=recurrence, given=given) if distrust and any(given) else None
        variant = (*_variant(recurrence, True), *given)
        plan = choose_plan(_problem(gates, recurrence), gates.device, True, variant, attempt, check)
    if plan.family is not Family.RESIDENT:
        await_others(plan.side_by_side, gates.device)
    return attempt(plan, launch or launch_kernel)


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch one kernel, every argument by its parameter's name.

    The seam at which a report or a test can look at every launch instead.
    """
    if 0 not in grid:  # as it is for an empty batch
        kernel[grid](**arguments)


def choose_plan(
    problem: Problem,
    device: torch.device,
    backward: bool,
    variant: tuple,
    attempt: Attempt,
    distrust: Callable[[Plan], str | None] | None = None,
) -> Plan:
    """The best plan whose kernels the device can take, found once for each kind of problem and call.

    Args:
        problem, device, backward: what is to be run.
        variant: what else tells one compiled kernel from another.
        attempt: the call itself, by a plan.
        distrust: why a plan that compiles is not taken all the same. Not asked while a CUDA graph is captured, of
            which its work would become part; what is chosen there is not kept.

    Raises:
        RuntimeError: no kernel can be compiled, or none is trusted.
    """
    if device.type != "cuda":
        return plans(problem, INTERPRETER, backward)[-1]  # the others say thread by thread what takes no time there
    problem = dataclasses.replace(problem, steps=min(problem.steps, 2))  # more steps take the same kernel
    key = problem, device, backward, variant
    if key not in _chosen:
        card = device_of(torch.cuda.get_device_properties(device))
        measured = plan_cache.remembered(problem, card, backward)
        proposed = plans(problem, card, backward)
        proposed = [*([measured] if measured else []), *proposed]
        if torch.cuda.is_current_stream_capturing():
            return first_that_fits(proposed, attempt, None)
        _chosen[key] = first_that_fits(proposed, attempt, distrust)
    return _chosen[key]


_chosen: dict[tuple, Plan] = {}


def expected_plan(problem: Problem, device: torch.device, backward: bool) -> Plan:
    """The plan that was chosen for a kind of problem, else the one that would be tried first."""
    problem = dataclasses.replace(problem, steps=min(problem.steps, 2))
    for (chosen_problem, chosen_device, chosen_backward, _), plan in list(_chosen.items()):
        if (chosen_problem, chosen_device, chosen_backward) == (problem, device, backward):
            return plan
    if device.type != "cuda":
        return plans(problem, INTERPRETER, backward)[-1]
    card = device_of(torch.cuda.get_device_properties(device))
    return plan_cache.remembered(problem, card, backward) or plans(problem, card, backward)[0]


def choose_anew() -> None:
    """Forget what was chosen, since more has been measured."""
    _chosen.clear()


def _projects_outside(plan: Plan, r: Recurrence) -> bool:
    """Whether the projection is taken out of the time loop (projection.py); the step family has it there."""
    return r.projected and plan.family is not Family.STEP


def _problem(gates: Tensor, r: Recurrence) -> Problem:
    steps, batch, _ = gates.shape
    projected = r.width if r.projected else 0
    return Problem(
        steps, batch, r.hidden, gates.dtype, projected, r.precision, r.side_by_side, regularised=r.regularised,
        normalised=r.normalised,
    )  # fmt: skip


def _variant(r: Recurrence, save: bool) -> tuple:
    optional = r.lengths, r.resets, r.dropout_h, r.zoneout_h, r.zoneout_c, r.reset_h, r.reset_c, r.weight_peephole
    return save, r.reverse, *(t is None for t in (*optional, *r.norms[:3]))
