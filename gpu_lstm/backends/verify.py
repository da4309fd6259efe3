"""Kernels are verified on the present card before their results are used.

The very kernel that a call launches first runs a small problem: several batch tiles, the last one partial, and, where
the call has them, lengths from 0 to T, resets and noise. Each result and gradient is compared with the reference in
float64: its error may be at most twice that of torch's own LSTM in the same dtype. The verdict is cached on disk.
"""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..call.modes import alone
from ..kernels import cache  # type: ignore[import-not-found]  # a folder next to gpu_lstm/ in a checkout
from ..kernels.problem import Pass, Problem  # type: ignore[import-not-found]
from ..kernels.timeouts import DEVICE_ERRORS, raise_if_timed_out  # type: ignore[import-not-found]
from . import fused, reference, torch_lstm
from .fused import DIFFERENTIABLE, Inputs, Saved
from .reference import Gates

KIND = "checks"
STEPS, FEATURES = 4, 8  # T, I
FORMAT = 5  # raised whenever the small problem or the rule changes
RATE = 0.25  # of zoneout, where it is the same for all elements
TILES = ("rows", "columns", "k", "num_warps", "num_stages", "parts", "held", "ahead")  # of a plan
logger = logging.getLogger("gpu_lstm")
COMPARED = ("x", "h0", "c0", "weight_hh", "reset_h", "reset_c")  # whose gradients come from the recurrence


def verify(plan: Any, problem: Problem, which: Pass, device: torch.device) -> str | None:
    """Why a plan's kernel is not used for a pass of a problem on a device; None if it computes the right numbers.

    Only verdicts about numbers are cached: any other failure may not happen again.

    Raises:
        RuntimeError: an earlier launch timed out.
        torch.AcceleratorError: an error of the device, of an earlier operation or by the kernel.
    """
    verdict = cached_verdict(plan, problem, which, device)
    report = f" Please report this, with what `python -m gpu_lstm` prints and the plan: {plan}"
    if verdict is None:
        _raise_earlier_errors(device)
        try:
            verdict = _verdict(plan, problem, which, device)
            cache.write(KIND, _key(plan, problem, which, device), verdict)
        except DEVICE_ERRORS:
            raise
        except RuntimeError as error:  # it timed out, say next to another process, or cannot be launched
            verdict, report = f"{type(error).__name__}: {error}", ""
    if verdict == "right":
        return None
    card = cache.machine(device)["card"]
    cache.warn_once(f"a kernel failed its verification on {card}: {verdict}. Backend 'auto' does without it.{report}")
    return verdict


def cached_verdict(plan: Any, problem: Problem, which: Pass, device: torch.device) -> str | None:
    """The cached verdict on a kernel on a device: "right", or what is wrong; None: it was not verified yet."""
    verdict: str | None = cache.read(KIND, _key(plan, problem, which, device))
    return verdict


def _key(plan: Any, problem: Problem, which: Pass, device: torch.device) -> cache.Key:
    kernel = {name: getattr(plan, name) for name in TILES} | {"family": plan.family.value}
    problem = problem._replace(batch=0, steps=0, side_by_side=1)  # they do not change the kernel
    return cache.machine(device) | {"format": FORMAT} | kernel | problem.as_json() | which._asdict()


def _verdict(plan: Any, problem: Problem, which: Pass, device: torch.device) -> str:
    """ "right", or what is wrong."""
    batch = 2 * plan.rows + 3
    if plan.family.value in ("resident", "pointwise"):
        plan = dataclasses.replace(plan, groups=3)  # a program, or several, for each batch tile
    elif plan.family.value == "cooperative" or plan.ahead:
        plan = dataclasses.replace(plan, groups=min(2, plan.groups))  # one of them computes two
    with alone(grad=True), torch.autocast(device.type, enabled=False):
        small = Small(problem._replace(steps=2, batch=batch), which, device)
        truth, gates = small.by_reference(torch.float64)
        theirs = small.yardstick()
    with alone(grad=False):
        ours = small.by_kernels(plan, gates)
        _raise_earlier_errors(device)
    last_place = 2.0**-10 if problem.precision == "tf32" else torch.finfo(problem.dtype).eps  # of products
    for name, true in truth.items():
        found = _rms(ours[name].double() - true)
        allowed = 2 * max(_rms(theirs[name].double() - true), last_place * float(true.abs().max()))
        if not found <= allowed:  # also where it is NaN
            return f"the RMS error of {name} is {found:.2g}, where {allowed:.2g} is allowed"
    return "right"


def _raise_earlier_errors(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    raise_if_timed_out(device)


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


class Small:
    """A small problem: the inputs of a layer in one direction, random numbers that are exact in its dtype."""

    def __init__(self, problem: Problem, which: Pass, device: torch.device) -> None:
        self.problem, self.which, self.device = problem, which, device
        p, batch, hidden, width = problem, problem.batch, problem.hidden, problem.width
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, p.dtype)

        tensors = dict(
            x=normal(STEPS, batch, FEATURES), h0=normal(batch, width), c0=normal(batch, hidden).float(),
            weight_ih=normal(4 * hidden, FEATURES, scale=FEATURES**-0.5),
            weight_hh=normal(4 * hidden, width, scale=width**-0.5),
        )  # fmt: skip
        if p.projected:
            tensors["weight_hr"] = normal(width, hidden, scale=hidden**-0.5)
        if p.reset_c:
            tensors |= dict(reset_h=normal(STEPS, batch, width), reset_c=normal(STEPS, batch, hidden).float())
        if p.peepholes:
            tensors["weight_peephole"] = normal(3 * hidden)
        for name, size, there in zip(("gain_hh", "gain_c", "bias_c"), (4 * hidden, hidden, hidden), p.norms):
            if there:
                tensors[name] = 1 + normal(size, scale=0.3)
        number = torch.arange(batch, device=device)
        if p.lengths is not None:
            tensors["lengths"] = (number % (STEPS + 1)).flip(0).to(p.lengths)
        if p.resets:
            tensors["resets"] = (torch.arange(STEPS, device=device)[:, None] + number) % 3 == 1
        if p.dropout_h:
            tensors["dropout_h"] = (normal(batch, width) > 0).to(p.dtype) * 2
        for name, dimensions, size in (("zoneout_h", p.zoneout_h, width), ("zoneout_c", p.zoneout_c, hidden)):
            if dimensions is not None:
                tensors[name] = normal(STEPS, batch, size) > 0 if dimensions else torch.tensor(RATE, device=device)
        self.inputs = Inputs(**tensors)
        of_h, of_h_n = normal(STEPS, batch, width), normal(batch, width)
        self.output_gradients = of_h if which.dh else None, of_h_n if which.dh_n else None

    def by_reference(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Gates]:
        record: list[Gates] = []
        run = functools.partial(reference.layer, noise=self.inputs.noise(), record=record)
        return self.results(run, dtype), record[0]

    def yardstick(self) -> dict[str, Tensor]:
        """Results of torch's own LSTM; of the reference where torch has no such cell, or cuDNN fails."""
        p = self.problem
        if not (p.regularised or p.reset_c or p.peepholes or p.normalised):
            try:
                return self.results(torch_lstm.layer)
            except DEVICE_ERRORS:
                raise
            except RuntimeError as error:
                logger.info("torch's LSTM is no yardstick for %s: %s", p, error)
        return self.by_reference(p.dtype)[0]

    def results(self, run: Callable[..., Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results of forward, or gradients of backward, by run(x, state, weights, traversal); in any dtype."""
        learns, dtype = self.which.backward, dtype or self.problem.dtype
        own = [None if t is None else t.to(dtype).requires_grad_(learns) for t in self.inputs[:DIFFERENTIABLE]]
        g = Inputs(*own, *self.inputs[DIFFERENTIABLE:])  # type: ignore[arg-type]
        h, (h_n, c_n) = run(g.x, (g.h0, g.c0), g.weights(), g.traversal(self.problem.reverse))
        if not learns:
            return dict(h=h, h_n=h_n, c_n=c_n)
        pairs = [(y, d.to(dtype)) for y, d in zip((h, h_n), self.output_gradients) if d is not None]
        wanted = {name: t for name in COMPARED if (t := getattr(g, name)) is not None}
        found = torch.autograd.grad([y for y, _ in pairs], list(wanted.values()), [d for _, d in pairs])
        return {f"the gradient of {name}": gradient for name, gradient in zip(wanted, found)}

    def by_kernels(self, plan: Any, gates: Gates) -> dict[str, Tensor]:
        """The same by the kernel of a plan; backward reads the reference's gates and cell states."""
        launch = importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
        layer = launch.layer_by(self.problem, self.device, plan)
        dtype, inputs = self.problem.dtype, self.inputs
        if not self.which.backward:
            h, h_n, c_n, *_ = fused.forward(layer, inputs, self.which.save)
            return dict(h=h, h_n=h_n, c_n=c_n)
        activated = torch.cat([gates.input, gates.forget, gates.candidate, gates.output], dim=2).to(dtype)
        saved = Saved(inputs, gates.hidden.to(dtype), activated, gates.cell.float())
        needed = [name in COMPARED and t is not None for name, t in zip(Inputs._fields, inputs)]
        found = fused.gradients(layer, saved, (*self.output_gradients, None), needed[:DIFFERENTIABLE])
        return {f"the gradient of {name}": d for name, d in zip(Inputs._fields, found) if d is not None}
