"""Measured plans: all plans of a problem are timed on the present card, and the fastest is cached."""

import logging
from collections.abc import Callable
from functools import partial

import torch
import triton

from ...layer import Layer, Verify, forget_layers
from ...problem import Inputs, Pass, Problem
from ...timeouts import raise_if_timed_out
from .. import launch
from ..launch import call_of, recorded_launches
from .choose import card_of, keep_measured, plans, why_it_does_not_fit
from .planning import Plan

logger = logging.getLogger("gpu_lstm")


def autotune(problem: Problem, device: torch.device, steps: int, verify: Verify | None = None) -> dict[str, Plan]:
    """Time the plans of a problem with T = `steps`, forward and backward, and keep the fastest of each. A RuntimeError
    if a CUDA graph is being captured, which would include the timing, or no plan can be timed.

    Plans that `verify` refuses are not timed. Its verdict is on disk before a plan runs: if a plan ends this process,
    the next one does not try it again.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("autotune cannot time kernels while a CUDA graph is captured; call it before the capture")
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    card = card_of(device)
    fastest = {}
    with torch.cuda.device(device):
        for name, pass_ in (("forward", Pass()), ("backward", Pass(backward=True, dh_n=False))):
            inputs, run = _call(problem, device, steps, fastest.get("forward"))
            refuses = verify and partial(verify, Layer(problem, device, launch), pass_, inputs)
            proposed = plans(problem, card, pass_.backward)
            milliseconds = {}
            for number, plan in enumerate(proposed, start=1):
                try:
                    result = why_it_does_not_fit(recorded_launches(problem, pass_, plan), plan.blocks)
                    result = result or (refuses and refuses(plan))
                    if result is None:
                        time = time_plan(plan, partial(run, Layer(problem, device, launch, trial=plan)))
                        raise_if_timed_out(device)
                        milliseconds[plan], result = time, f"{time:.3g} ms"
                except torch.AcceleratorError:
                    raise
                except RuntimeError as error:  # it times out, or memory is full: the others may be faster
                    result = f"{type(error).__name__}: {error}"
                tile = f"{plan.family.name} {plan.rows}x{plan.units}"
                logger.info("%s, plan %d of %d: %s: %s", name, number, len(proposed), tile, result)
            if not milliseconds:
                raise RuntimeError(f"no plan for the {name} pass of this layer can be timed on this card: {result}")
            fastest[name] = min(milliseconds, key=milliseconds.__getitem__)
            keep_measured(problem, card, pass_.backward, fastest[name])
    forget_layers()
    return fastest


def time_plan(plan: Plan, run: Callable[[], object]) -> float:
    """Milliseconds that a plan needs, the median of many runs."""
    return triton.testing.do_bench(run, return_mode="median")


def _call(problem: Problem, device: torch.device, steps: int, forward: Plan | None) -> tuple[Inputs, Callable]:
    """(Inputs, whose x has no features; what runs a Layer on them and random gates, and saves everything). With a plan
    `forward` it runs backward of what that one computed, with a gradient of every h."""
    gates = torch.randn(steps, problem.batch, 4 * problem.hidden, dtype=problem.dtype, device=device)
    _, r = call_of(problem, device)
    for weight, width in ((r.inputs.weight_hh, problem.columns), (r.inputs.weight_hr, problem.hidden)):
        if weight is not None:
            weight.normal_(std=width**-0.5)
    if forward is None:
        return r.inputs, partial(Layer.forward, gates=gates, r=r, save=True)
    h, _, _, c = Layer(problem, device, launch, trial=forward).forward(gates, r, save=True)
    return r.inputs, partial(Layer.backward, dh=h, dh_n=None, dc_n=None, gates=gates, c=c, r=r)
