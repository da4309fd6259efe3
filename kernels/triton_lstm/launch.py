"""The Triton backend's two entry points. One layer, one direction; the input product is already in `gates`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import cooperative, resident, step, tuning
from .binary import Launch, fits, resources
from .planning import INTERPRETER, Device, Family, Plan, Problem, device_of, plans

INTERPRETED = not isinstance(step.lstm_step_forward_kernel, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when triton was imported."""

PATIENCE = 1 << 22  # turns that a program waits for others before it gives up: seconds, where a step takes microseconds

PARTIALS_WORKSPACE = 256 << 20  # bytes for the partial sums that cooperative programs exchange backward

Run = Callable[..., None]


class Recurrence(NamedTuple):
    """What both passes are given: one layer in one direction."""

    weight_hh: Tensor  # [4H, P]
    weight_hr: Tensor | None  # [P, H]; None without projection, then P = H
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H] float32
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B]
    reverse: bool
    precision: str  # of float32 products, as tl.dot's input_precision
    mask_h: Tensor | None = None  # [B, P] factors of h in the recurrent product
    zone_h: Tensor | None = None  # the share of h that stays as it was: bool [T, B, P], or one float32 for all
    zone_c: Tensor | None = None  # of c: bool [T, B, H], or one float32 for all

    @property
    def regularised(self) -> bool:
        """Whether there is anything that only the step family takes."""
        return not self.mask_h is self.zone_h is self.zone_c is None


def layer_forward(
    gates: Tensor, *recurrence: Any, save: bool, plan: Plan | None = None, run: Run | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of one layer in one direction.

    Args:
        gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`.
        recurrence: the fields of Recurrence, in order.
        save: keep what layer_backward needs.
        plan: how to run it; by default the best that fits.
        run: launches one kernel; by default `launch_kernel`.

    Returns:
        h [T, B, P], h_n [B, P], c_n float32 [B, H], and c: float32 [T, B, H] if `save`, else empty.

    Raises:
        RuntimeError: programs of an earlier launch waited in vain for each other.
    """
    r = Recurrence(*recurrence)
    run = run or launch_kernel
    steps, batch, _ = gates.shape
    history = gates.new_empty(steps + 1, batch, r.h0.shape[1])  # h of every step, then h0
    h = history[:-1]
    h_n, c_n = r.h0.clone(), r.c0.clone()  # what a sequence of length 0 ends with
    c = r.c0.new_empty((steps, *r.c0.shape) if save else 0)
    if batch == 0:
        return h, h_n, c_n, c
    raise_if_gave_up()
    plan = plan or choose_plan(_problem(gates, r), gates.device, False)
    assert plan.family is Family.STEP or not r.regularised
    match plan.family:
        case Family.RESIDENT:
            _resident_forward(run, plan, gates, r, h, c if save else None, h_n, c_n)
        case Family.COOPERATIVE:
            _cooperative_forward(run, plan, gates, r, history, c if save else None, h_n, c_n)
        case Family.STEP:
            _step_forward(run, plan, gates, r, h, c if save else None, h_n, c_n)
    return h, h_n, c_n, c


def layer_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    *recurrence: Any,
    plan: Plan | None = None,
    run: Run | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the recurrence of one layer in one direction.

    Args:
        dh, dh_n, dc_n: gradients of layer_forward's first three results; None counts as zero.
        gates, c: what layer_forward saved: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
        recurrence, plan, run: as for layer_forward.

    Returns:
        dgates [T, B, 4H], gradient of the pre-activations; dh0 [B, P]; dc0 float32 [B, H]; and, with a projection,
        the whole gradient of W_hr m [T, B, P] (without one, an empty tensor), from which dW_hr is taken.

    Raises:
        RuntimeError: programs of an earlier launch waited in vain for each other.
    """
    r = Recurrence(*recurrence)
    run = run or launch_kernel
    batch = gates.shape[1]
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # [B, H], of c_n; the kernels make it that of c0
    dh_held = None if r.zone_h is None else torch.zeros_like(r.h0, dtype=torch.float32)  # [B, P], by zoneout
    dh_total = gates.new_empty(0 if r.weight_hr is None else (*gates.shape[:2], r.h0.shape[1]))
    if batch == 0:
        return dgates, torch.zeros_like(r.h0), dc, dh_total
    raise_if_gave_up()
    plan = plan or choose_plan(_problem(gates, r), gates.device, True)
    assert plan.family is Family.STEP or not r.regularised
    match plan.family:
        case Family.RESIDENT:
            _resident_backward(run, plan, dh, dh_n, gates, c, r, dgates, dc)
        case Family.COOPERATIVE:
            _cooperative_backward(run, plan, dh, dh_n, gates, c, r, dgates, dc)
        case Family.STEP:
            _step_backward(run, plan, dh, dh_n, gates, c, r, dgates, dc, dh_total, dh_held)
    return dgates, _initial_hidden_gradient(dgates, dh_n, dh_held, r), dc, dh_total


def launch_kernel(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """Launch one kernel: the seam at which a report or a test can look at every launch instead."""
    kernel[tuple(grid)](*args, **constants)


def choose_plan(problem: Problem, device: torch.device, backward: bool) -> Plan:
    """The best plan whose kernel compiles without spills for the device, found once for each kind of problem."""
    if device.type != "cuda":
        # The interpreter runs programs one after another, so that none may wait for another.
        return plans(problem, INTERPRETER, backward)[0]
    problem = dataclasses.replace(problem, steps=min(problem.steps, 2))  # more steps take the same kernel
    card = device_of(torch.cuda.get_device_properties(device))
    return tuning.remembered(problem, card, backward) or _fitting_plan(problem, card, backward)


def autotune(problem: Problem, device: torch.device) -> dict[str, Plan]:
    """Time the plans of a problem on `device`, forward and backward, and remember the fastest of each.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    tuning.refuse_capture()
    card = device_of(torch.cuda.get_device_properties(device))
    fastest = {}
    for name, backward in (("forward", False), ("backward", True)):
        seconds = {}
        for plan in tuning.candidates(plans(problem, card, backward)):
            launches = recorded_launches(problem, backward, plan)
            if all(fits(resources(launch, card.architecture), card.shared) for launch in launches):
                seconds[plan] = time_plan(problem, plan, backward, device)
        fastest[name] = min(seconds, key=seconds.__getitem__)
        tuning.remember(dataclasses.replace(problem, steps=2), card, backward, fastest[name])
    return fastest


def time_plan(problem: Problem, plan: Plan, backward: bool, device: torch.device) -> float:
    """Milliseconds that a plan takes for the recurrence of a random problem, the median of many runs."""
    steps, batch, hidden = problem.steps, problem.batch, problem.hidden
    width = problem.projected or hidden
    with torch.cuda.device(device):
        options = {"dtype": problem.dtype, "device": device}
        gates = torch.randn(steps, batch, 4 * hidden, **options)
        weight_hh = torch.randn(4 * hidden, width, **options) / width**0.5
        weight_hr = torch.randn(width, hidden, **options) / hidden**0.5 if problem.projected else None
        h0, c0 = torch.zeros(batch, width, **options), torch.zeros(batch, hidden, device=device)
        r = Recurrence(weight_hh, weight_hr, h0, c0, None, None, False, problem.precision)
        if not backward:
            return triton.testing.do_bench(lambda: layer_forward(gates, *r, save=True, plan=plan), return_mode="median")
        h, _, _, c = layer_forward(gates, *r, save=True)
        return triton.testing.do_bench(
            lambda: layer_backward(h, None, None, gates, c, *r, plan=plan), return_mode="median"
        )


@functools.cache
def _fitting_plan(problem: Problem, device: Device, backward: bool) -> Plan:
    *tried, last = plans(problem, device, backward)
    for plan in tried:
        launches = recorded_launches(problem, backward, plan)
        if all(fits(resources(launch, device.architecture), device.shared) for launch in launches):
            return plan
    return last


def recorded_launches(
    problem: Problem, backward: bool, plan: Plan, ragged: bool = False, reverse: bool = False, training: bool = True
) -> list[Launch]:
    """The distinct launches that a plan makes, everything saved and every gradient given, without making them.

    A problem that is regularised has masks in training, else zoneout's probabilities.
    """
    launches: dict[str, Launch] = {}

    def record(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
        launches.setdefault(kernel.__name__, Launch(kernel, tuple(grid), args, constants))

    def meta(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    steps, batch, hidden = problem.steps, problem.batch, problem.hidden
    width = problem.projected or hidden
    gates, h, h0 = meta(steps, batch, 4 * hidden), meta(steps, batch, width), meta(batch, width)
    c, c0 = meta(steps, batch, hidden, dtype=torch.float32), meta(batch, hidden, dtype=torch.float32)
    noise: tuple[Tensor | None, ...] = (None, None, None)
    if problem.regularised and training:
        zones = (meta(steps, batch, features, dtype=torch.bool) for features in (width, hidden))
        noise = (meta(batch, width), *zones)
    elif problem.regularised:
        noise = (None, meta(dtype=torch.float32), meta(dtype=torch.float32))
    r = Recurrence(
        meta(4 * hidden, width),
        meta(width, hidden) if problem.projected else None,
        h0,
        c0,
        meta(batch, dtype=torch.int64) if ragged else None,
        meta(steps, batch, dtype=torch.bool) if ragged else None,
        reverse,
        problem.precision,
        *noise,
    )
    if backward:
        layer_backward(h, h0, c0, gates, c, *r, plan=plan, run=record)
    else:
        layer_forward(gates, *r, save=True, plan=plan, run=record)
    return list(launches.values())


def _problem(gates: Tensor, r: Recurrence) -> Problem:
    steps, batch, _ = gates.shape
    projected = 0 if r.weight_hr is None else r.weight_hr.shape[0]
    return Problem(steps, batch, r.c0.shape[1], gates.dtype, projected, r.precision, regularised=r.regularised)


# The step family.


def _step_forward(run: Run, plan: Plan, gates, r: Recurrence, h, c, h_n, c_n) -> None:
    steps, batch, _ = gates.shape
    hidden, projected = r.c0.shape[1], r.h0.shape[1]
    project, save = r.weight_hr is not None, c is not None
    state = r.c0.clone() if c is None else c  # of c: updated in place, or with every step kept
    m = gates.new_empty(batch, hidden) if project else h
    constants = dict(
        H=hidden, P=projected, REVERSE=r.reverse, PRECISION=r.precision, BLOCK_B=plan.rows, BLOCK_K=plan.k,
        num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers,
    )  # fmt: skip
    rows = ceil(batch / plan.rows)
    h_prev, c_prev = r.h0, r.c0 if save else state
    for s in range(steps):
        run(
            step.lstm_step_forward_kernel, (rows, ceil(hidden / plan.columns)),
            gates, r.weight_hh, h_prev, c_prev, m, state, None if project else h_n, c_n, r.lengths, r.resets,
            r.mask_h, None if project else r.zone_h, r.zone_c, s, steps, batch,
            SAVE=save, PROJECT=project, BLOCK_H=plan.columns, **constants,
        )  # fmt: skip
        if project:
            run(
                step.lstm_step_project_kernel, (rows, ceil(projected / plan.columns)),
                m, r.weight_hr, h_prev, h, h_n, r.lengths, r.resets, r.zone_h, s, steps, batch,
                BLOCK_P=plan.columns, **constants,
            )  # fmt: skip
        h_prev, c_prev = h, state


def _step_backward(run: Run, plan: Plan, dh, dh_n, gates, c, r: Recurrence, dgates, dc, dh_total, dh_held) -> None:
    steps, batch, _ = gates.shape
    hidden, projected = r.c0.shape[1], r.h0.shape[1]
    project = r.weight_hr is not None
    constants = dict(
        H=hidden, P=projected, REVERSE=r.reverse, PRECISION=r.precision, BLOCK_B=plan.rows, BLOCK_K=plan.k,
        num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers,
    )  # fmt: skip
    rows = ceil(batch / plan.rows)
    for s in reversed(range(steps)):
        if project:
            run(
                step.lstm_step_project_backward_kernel, (rows, ceil(projected / plan.columns)),
                dh, dh_n, dgates, r.weight_hh, dh_total, r.lengths, r.resets, r.mask_h, r.zone_h, dh_held,
                s, steps, batch, BLOCK_P=plan.columns, **constants,
            )  # fmt: skip
        run(
            step.lstm_step_backward_kernel, (rows, ceil(hidden / plan.columns)),
            dh_total if project else dh, None if project else dh_n, gates, c, c if s else r.c0,
            r.weight_hr if project else r.weight_hh, dgates, dc, r.lengths, r.resets,
            *((None, None, r.zone_c, None) if project else (r.mask_h, r.zone_h, r.zone_c, dh_held)),
            s, steps, batch, PROJECT=project, BLOCK_H=plan.columns, **constants,
        )  # fmt: skip


# The resident family.


def _resident_forward(run: Run, plan: Plan, gates, r: Recurrence, h, c, h_n, c_n) -> None:
    steps, batch, _ = gates.shape
    run(
        resident.lstm_resident_forward_kernel, (ceil(batch / plan.rows),),
        gates, r.weight_hh, r.h0, r.c0, h, c, h_n, c_n, r.lengths, r.resets, steps, batch,
        H=r.c0.shape[1], REVERSE=r.reverse, SAVE=c is not None, PRECISION=r.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, num_warps=plan.num_warps, maxnreg=plan.registers,
    )  # fmt: skip


def _resident_backward(run: Run, plan: Plan, dh, dh_n, gates, c, r: Recurrence, dgates, dc) -> None:
    steps, batch, _ = gates.shape
    run(
        resident.lstm_resident_backward_kernel, (ceil(batch / plan.rows),),
        dh, dh_n, gates, c, r.c0, r.weight_hh, dgates, dc, r.lengths, r.resets, steps, batch,
        H=r.c0.shape[1], REVERSE=r.reverse, PRECISION=r.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, num_warps=plan.num_warps, maxnreg=plan.registers,
    )  # fmt: skip


# The cooperative family.


def _cooperative_forward(run: Run, plan: Plan, gates, r: Recurrence, history, c, h_n, c_n) -> None:
    steps, batch, _ = gates.shape
    if plan.flagged:
        _fill(history)
    history[-1] = torch.where(r.h0.isnan(), float("nan"), r.h0)  # whatever NaN it was: the fill is one, too
    for start, groups in _batches(batch, plan):
        run(
            cooperative.lstm_cooperative_forward_kernel, (plan.programs, groups),
            gates, r.weight_hh, r.c0, history, c, h_n, c_n, r.lengths, r.resets,
            _counters(gates, plan, groups), _error_word(gates.device, 0), steps, batch, start,
            H=r.c0.shape[1], REVERSE=r.reverse, SAVE=c is not None, **_cooperative_constants(plan, r),
        )  # fmt: skip


def _cooperative_backward(run: Run, plan: Plan, dh, dh_n, gates, c, r: Recurrence, dgates, dc) -> None:
    steps, batch, _ = gates.shape
    turns = min(steps, max(1, PARTIALS_WORKSPACE // (16 * dc.numel())))  # of one launch
    partials = gates.new_empty(turns, *gates.shape[1:], dtype=torch.float32)  # [turns, B, 4H]
    if plan.flagged:
        _fill(dgates)
    for first in range(0, steps, turns):
        if plan.flagged:
            _fill(partials)
        for start, groups in _batches(batch, plan):
            run(
                cooperative.lstm_cooperative_backward_kernel, (plan.programs, groups),
                dh, dh_n, gates, c, r.c0, r.weight_hh, dgates, partials, dc, r.lengths, r.resets,
                _counters(gates, plan, 2 * groups), _error_word(gates.device, 1), steps, batch, start,
                first, min(turns, steps - first),
                H=r.c0.shape[1], REVERSE=r.reverse, **_cooperative_constants(plan, r),
            )  # fmt: skip


def _cooperative_constants(plan: Plan, r: Recurrence) -> dict[str, Any]:
    return dict(
        FLAGGED=plan.flagged, PATIENCE=PATIENCE, PRECISION=r.precision, BLOCK_B=plan.rows, BLOCK_H=plan.columns,
        BLOCK_K=plan.k, K_SPLIT=plan.k_split, num_warps=plan.num_warps, maxnreg=plan.registers,
        launch_cooperative_grid=True,
    )  # fmt: skip


def _batches(batch: int, plan: Plan) -> list[tuple[int, int]]:
    """(first sequence, batch tiles) of each launch: no more programs at once than the device keeps resident."""
    step = plan.rows * plan.groups
    return [(start, min(plan.groups, ceil((batch - start) / plan.rows))) for start in range(0, batch, step)]


def _fill(t: Tensor) -> None:
    """All bits one: what `exchange.is_missing` looks for."""
    t.view(torch.uint8).fill_(0xFF)


def _counters(like: Tensor, plan: Plan, count: int) -> Tensor | None:
    return None if plan.flagged else torch.zeros(count, dtype=torch.int32, device=like.device)


_COOPERATIVE_KERNELS = ("lstm_cooperative_forward_kernel", "lstm_cooperative_backward_kernel")


@functools.cache
def _error_words() -> Tensor:
    """int32 [kernels]: the step + 1 at which a cooperative kernel gave up waiting; in memory that the host reads
    without waiting for the device."""
    return torch.zeros(len(_COOPERATIVE_KERNELS), dtype=torch.int32, pin_memory=torch.cuda.is_available())


def _error_word(device: torch.device, kernel: int) -> Tensor:
    words = _error_words()
    return words.to("meta")[kernel:] if device.type == "meta" else words[kernel:]


def raise_if_gave_up() -> None:
    """Raise if programs of an earlier launch waited in vain for each other.

    Raises:
        RuntimeError: with the kernel and the step.
    """
    words = _error_words()
    for kernel, word in zip(_COOPERATIVE_KERNELS, words.tolist()):
        if word:
            words.zero_()
            raise RuntimeError(
                f"{kernel} gave up at step {word - 1}: its programs waited in vain for each other, so that they were "
                "not all resident at once; the results of that launch are wrong"
            )


def _initial_hidden_gradient(
    dgates: Tensor,  # [T, B, 4H]
    dh_n: Tensor | None,  # [B, P]
    dh_held: Tensor | None,  # [B, P] float32
    r: Recurrence,
) -> Tensor:
    """dh0 [B, P]: through the first step, unless a reset stands before it; dh_n where there is no step at all."""
    if r.reverse and r.lengths is not None:
        first_time = (r.lengths.long() - 1).clamp(min=0)  # [B]
        first = dgates.gather(0, first_time[None, :, None].expand(1, -1, dgates.shape[2]))[0]
    else:
        first = dgates[-1 if r.reverse else 0]  # [B, 4H]; zero where length is 0
    if r.resets is not None and not r.reverse:
        first = first.masked_fill(r.resets[0, :, None], 0)
    dh0 = first @ r.weight_hh
    if r.mask_h is not None:
        dh0 = r.mask_h * dh0
    if dh_held is not None:
        dh0 = dh0 + dh_held.to(dh0.dtype)
    if r.lengths is not None and dh_n is not None:
        dh0 = torch.where((r.lengths == 0)[:, None], dh_n, dh0)
    return dh0
