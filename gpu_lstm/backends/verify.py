"""The kernels of a backend, each verified on the present card before its results are used.

Before a call first launches a kernel, that kernel runs a small problem: with the call's layer, plan, dtypes, strides
and optional tensors, but few steps, and of a large batch only enough sequences for several batch tiles a program, where
the call has them. Lengths are from 0 to T, every second unit begins with an empty state, as all do in a call without
states, and there are resets and noise where the call has them. Each result and gradient is compared with the reference
in float64: its error may be at most twice that of torch's own in the same dtype. Nothing may be written outside a
launch's tensors. The verdict is cached on disk.
"""

import logging
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor

from ..call.choices import Backend
from ..call.settings import EXACT, alone, products
from ..kernels import cache
from ..kernels.cells import CELLS
from ..kernels.layer import Layer, kept_layer, launcher_of
from ..kernels.memory import WroteOutside, checked, checking
from ..kernels.problem import Inputs, Pass, Problem, sizes_of
from ..kernels.tensors import COMPARED, LEARNT
from ..kernels.timeouts import DEVICE_ERRORS, wait_and_check
from . import fused, reference, torch_rnn
from .fused import Saved, part_of
from .layer_loop import RunPart
from .reference import Steps

STEPS = 4  # T, where there is more than one
ENOUGH, MOST_SEEDS = 64, 16  # elements of a state, so that no single rounding decides; small problems that have them
AGAIN = "`python -m gpu_lstm races --clear` forgets that"
ENDED = f"the process that tried it ended meanwhile; {AGAIN}"
RATE = 0.25  # of zoneout, where it is the same for all elements
logger = logging.getLogger("gpu_lstm")


def layer_of(backend: Backend, problem: Problem, device: torch.device) -> Layer:
    """The kernels of a problem on a device."""
    return kept_layer(launcher_of(backend.value), problem, device, verify)


def verify(layer: Layer, pass_: Pass, inputs: Inputs, plan: Any) -> str | None:
    """Why a plan's kernel is not used for a pass of a layer; None if it computes the right numbers.

    `inputs` are those of the call that asks first. Only verdicts about the kernel are cached, also that it ended the
    process, or that the device failed: no other failure need happen again.

    Raises:
        RuntimeError: an earlier launch timed out.
        torch.AcceleratorError: an error of the device. If it comes with the kernel, it names it, which is then refused.
    """
    problem, device = layer.problem, layer.device
    verdict = cached_verdict(plan, problem, pass_, device)
    card = cache.machine(device)["card"]
    report = f" Please report this, with what `python -m gpu_lstm` prints and the plan: {plan}"
    if verdict is None:
        wait_and_check(device)  # for errors of earlier launches
        key, checking.kernel = _key(plan, problem, pass_, device), None
        try:
            with cache.trial(cache.CHECKS, key, ENDED), products.changed(EXACT):  # TF32 is no fault of the kernel
                verdict = _verdict(layer, pass_, inputs, plan)
                cache.write(cache.CHECKS, key, verdict)
        except torch.OutOfMemoryError:
            raise
        except torch.AcceleratorError as error:
            if checking.kernel is None or "captur" in str(error):  # by another thread, of a graph
                raise
            cache.write(cache.CHECKS, key, f"{str(error).splitlines()[0]}; {AGAIN}")
            tried = f"{error}\nThis came when {checking.kernel} was tried on {card}, for {problem}, {pass_}"
            named = torch.AcceleratorError(f"{tried}. The next process does not use it; {AGAIN}.{report}")
            named.__dict__ |= vars(error)  # CUDA's code
            raise named from error
        except RuntimeError as error:  # it timed out, say next to another process, or cannot be launched
            verdict, report = f"{type(error).__name__}: {error}", ""
    if verdict == "right":
        return None
    instead = "It is not used: another one is, or with backend 'auto' another backend."
    cache.warn_once(f"a kernel failed its verification on {card}: {verdict}. {instead}{report}")
    return verdict


def cached_verdict(plan: Any, problem: Problem, pass_: Pass, device: torch.device) -> str | None:
    """The cached verdict on a kernel on a device: "right", or what is wrong; None: it was not verified yet."""
    return cast("str | None", cache.read(cache.CHECKS, _key(plan, problem, pass_, device)))


def _key(plan: Any, problem: Problem, pass_: Pass, device: torch.device) -> cache.Key:
    problem = problem._replace(batch=0, side_by_side=1)  # plan.identity has what the launch needs of these two
    return cache.machine(device) | plan.identity | problem.as_json() | pass_._asdict()


def _verdict(layer: Layer, pass_: Pass, inputs: Inputs, plan: Any) -> str:
    """ "right", or what is wrong."""
    device, problem = layer.device, layer.problem._replace(batch=plan.sequences_enough(layer.problem))
    on_trial, runs = layer.with_plan(plan, problem), []
    for seed in range(min(MOST_SEEDS, ceil(ENOUGH / (problem.batch * problem.width)))):
        with alone(grad=True), torch.autocast(device.type, enabled=False):
            small = Small(problem, pass_, inputs, seed)
            truth, steps = small.by_reference(torch.float64)
            theirs = small.yardstick()
        try:
            with alone(grad=False), checked():
                runs.append((truth, theirs, small.by_kernels(on_trial, steps)))
                wait_and_check(device)
        except WroteOutside as error:
            return str(error)
    last_place = 2.0**-10 if problem.precision == "tf32" else torch.finfo(problem.dtype).eps  # of products
    for name in truth:
        true, their, our = (torch.cat([run[name].double().flatten() for run in each]) for each in zip(*runs))
        our_rms, their_rms = (
            float((each - true).where(each != true, 0).square().mean().sqrt())
            for each in (our, their)  # inf is inf
        )
        allowed = 2 * max(their_rms, last_place * float(true.where(true.isfinite(), 0).abs().max()))
        if not our_rms <= allowed:  # also where it is NaN
            return f"the RMS error of {name} is {our_rms:.2g}, where {allowed:.2g} is allowed"
    return "right"


class Small:
    """Inputs of a small `problem` like those of a call (`like`): random numbers that are exact in its dtype."""

    def __init__(self, problem: Problem, pass_: Pass, like: Inputs, seed: int = 0) -> None:
        self.problem, self.pass_ = p, _ = problem, pass_
        batch, device = p.batch, like.x.device
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, p.dtype)

        steps, features = (1 if p.steps == 1 else STEPS), max(1, like.x.shape[-1])  # kernels read no x
        sizes = sizes_of(p, steps, features)
        time, sequence = torch.arange(steps, device=device)[:, None], torch.arange(batch, device=device)
        tensors = {}
        for name, tensor in like._asdict().items():
            if tensor is None:
                continue
            if name == "lengths":
                values = (steps - sequence) % (steps + 1)
            elif name == "resets":
                values = (time + sequence) % 3 == 1
            elif name.startswith("zoneout"):
                values = normal(*sizes[name]) > 0 if tensor.dim() else torch.tensor(RATE, device=device)
            elif name == "dropout_h":
                values = (normal(*sizes[name]) > 0) * 2
            elif name.startswith("gain") or name == "bias_c":
                values = 1 + normal(*sizes[name], scale=0.3)
            else:
                is_matrix = name.startswith("weight") and tensor.dim() == 2
                values = normal(*sizes[name], scale=max(1, sizes[name][1]) ** -0.5 if is_matrix else 1.0)
            if name == "c0":  # every second unit is empty, as all are where a call is given no state
                is_empty = (torch.arange(p.hidden, device=device) + sequence[:, None] + seed) % 2 == 0
                values = values.where(~is_empty, CELLS[p.cell].empty_like(values))
            tensors[name] = laid_out(values.to(tensor.dtype), tensor)
        self.one_state = len(CELLS[p.cell].states) == 1
        if self.one_state:  # c is h
            for h, c in (("h0", "c0"), ("reset_h", "reset_c"), ("zoneout_h", "zoneout_c")):
                if c in tensors:
                    tensors[c] = laid_out(tensors[h].to(tensors[c].dtype), tensors[c])
        self.inputs = Inputs(**{"weight_ih": None} | tensors)  # which a problem may lack
        dh, dh_n = normal(steps, batch, p.width), normal(1, batch, p.width)
        self.output_gradients = dh if pass_.dh else None, dh_n if pass_.dh_n else None

    def by_reference(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Steps]:
        record: list[Steps] = []
        cell = self.problem.cell
        return self.results(lambda part: reference.run_layer(cell, *part[1:], record=record), dtype), record[0]

    def yardstick(self) -> dict[str, Tensor]:
        """Results of torch's own operator; of the reference where torch has no such cell, or cuDNN fails.

        And of the reference for gradients of a GRU, which are compared by way of h and of c; torch has their sum.
        """
        p, cell = self.problem, CELLS[self.problem.cell]
        if torch_rnn.has(cell, self.inputs) and not (self.one_state and self.pass_.backward):
            try:
                return self.results(lambda part: torch_rnn.run_layer(cell, *part[1:5]))
            except DEVICE_ERRORS:
                raise
            except RuntimeError as error:
                logger.info("torch's own is no yardstick for %s: %s", p, error)
        return self.by_reference(p.dtype)[0]

    def results(self, run: RunPart, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results of forward, or gradients of backward, by run(part); in any dtype."""
        learns, dtype = self.pass_.backward, dtype or self.problem.dtype
        learnt = {name: t for name in LEARNT if (t := getattr(self.inputs, name)) is not None}
        g = self.inputs._replace(**{name: t.to(dtype).requires_grad_(learns) for name, t in learnt.items()})
        h, (h_n, c_n) = run(part_of(g, self.problem.reverse))
        if not learns:
            return dict(h=h, h_n=h_n, c_n=c_n)
        pairs = [(y, d.to(dtype)) for y, d in zip((h, h_n), self.output_gradients) if d is not None]
        wanted = {name: t for name in COMPARED if (t := getattr(g, name)) is not None}
        gradients = torch.autograd.grad([y for y, _ in pairs], list(wanted.values()), [d for _, d in pairs])
        return {f"the gradient of {name}": gradient for name, gradient in zip(wanted, gradients)}

    def by_kernels(self, layer: Layer, steps: Steps) -> dict[str, Tensor]:
        """The same by a Layer; backward reads the reference's gates and states."""
        dtype, inputs = self.problem.dtype, self.inputs
        if not self.pass_.backward:
            h, h_n, c_n, *_ = fused.forward(layer, inputs, self.pass_.save)
            return dict(h=h, h_n=h_n, c_n=c_n)
        saved = Saved(inputs, steps.hidden.to(dtype), steps.gates.to(dtype), steps.cell.float())
        needed = {name for name in COMPARED if getattr(inputs, name) is not None}
        gradients = fused.gradients(layer, saved, (*self.output_gradients, None), needed)
        return {f"the gradient of {name}": gradients[name] for name in needed}  # type: ignore[misc]


def laid_out(values: Tensor, like: Tensor) -> Tensor:
    """The values with strides in the order of those of `like`; where these are 0, the first values for all."""
    for dim, stride in enumerate(like.stride()):
        if stride == 0 and values.shape[dim] > 1:
            values = values.narrow(dim, 0, 1).expand_as(values)
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    if 0 in like.stride() or order == sorted(order):
        return values
    return values.permute(order).contiguous().permute(*(order.index(dim) for dim in range(like.dim())))
