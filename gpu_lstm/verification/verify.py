"""Verification: each kernel of a backend is tried on the present card before its results are used.

Before a call first launches a kernel, the kernel runs small problems, see docs/design.md. Each result and gradient is
compared with the reference in float64. The error is the root mean square over all small problems. It may be at most
twice the error of torch's own layer in the same dtype, or twice the unit in the last place of the largest value. Where
terms cancel, the error of torch's own is a matter of luck. A larger error is therefore compared with random roundings
in that dtype: it may be at most three times the largest error that they cause in the reference. A launch may write
nothing outside its tensors. The verdict is cached on disk.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor

from ..backends import fused, reference, torch_rnn
from ..backends.fused import Saved
from ..backends.reference import Steps
from ..call.choices import Backend
from ..call.isolation import alone
from ..kernels import cache
from ..kernels.cells import CELLS
from ..kernels.contract import launcher_of, machine_of
from ..kernels.layer import Layer, kept_layer
from ..kernels.memory import WroteOutside, checked, checking
from ..kernels.private import TorchDispatchMode
from ..kernels.problem import Inputs, Pass, Problem, sizes_of
from ..kernels.process_settings import accumulation, precision
from ..kernels.tensors import BY_NAME, COMPARED, LEARNT
from ..kernels.timeouts import DEVICE_ERRORS, wait_and_check
from .timing import timer

STEPS = 4  # T of a small problem, if the call has more than one step
ENOUGH = 64  # the least elements of h in all small problems together, so that no single rounding decides
MOST_SEEDS = 16  # the most small problems
DRAWS = 8  # how often the reference runs with random roundings
AGAIN = "`python -m gpu_lstm races --clear` forgets that"
ENDED = f"the process that tried it ended meanwhile; {AGAIN}"
RATE = 0.25  # the rate of zoneout in eval()
logger = logging.getLogger("gpu_lstm")

Results = dict[str, Tensor]
"""Results of a forward pass or gradients of a backward pass, by name."""


def verified_layer(backend: Backend, problem: Problem, device: torch.device) -> Layer:
    """Return the kept Layer of a backend for a problem on a device. It verifies each plan before its first use."""
    return kept_layer(launcher_of(backend.value), problem, device, verify, timer)


def verify(layer: Layer, pass_: Pass, inputs: Inputs, plan: Any) -> str | None:
    """Return the reason why a plan's kernel is not used for a pass of a layer, or None if it computes right numbers.

    `inputs` are the Inputs of the call that uses the kernel first. A verdict is cached if it is about the kernel. That
    includes a kernel that ended the process and one with which the device failed. Other failures may not happen again.

    Raises:
        RuntimeError: an earlier launch timed out.
        torch.AcceleratorError: the device failed. The message names the kernel, which the next process refuses.
        torch.OutOfMemoryError: memory is too full to verify the kernel.
    """
    problem, device = layer.problem, layer.device
    verdict = cached_verdict(plan, problem, pass_, device)
    card = cache.machine(device)["card"]
    report = f" Please report this, with what `python -m gpu_lstm` prints and the plan: {plan}"
    if verdict is None:
        wait_and_check(device)  # raises errors of earlier launches
        key, checking.kernel = _key(plan, problem, pass_, device), None
        try:  # with exact products: the rounding of TF32 is no fault of the kernel
            with cache.trial(cache.CHECKS, key, ENDED), precision.changed("ieee"), accumulation.changed(False):
                verdict = _verdict(layer, pass_, inputs, plan)
                cache.write(cache.CHECKS, key, verdict)
        except torch.OutOfMemoryError:
            raise
        except torch.AcceleratorError as error:
            if checking.kernel is None or "captur" in str(error):  # no kernel ran, or another thread captures a graph
                raise
            cache.write(cache.CHECKS, key, f"{str(error).splitlines()[0]}; {AGAIN}")
            tried = f"{error}\nThis came when {checking.kernel} was tried on {card}, for {problem}, {pass_}"
            named = torch.AcceleratorError(f"{tried}. The next process does not use it; {AGAIN}.{report}")
            named.__dict__ |= vars(error)  # the error code of CUDA
            raise named from error
        except RuntimeError as error:  # it timed out, for example next to another process, or cannot be launched
            verdict, report = f"{type(error).__name__}: {error}", ""
    if verdict == "right":
        return None
    instead = "It is not used: another one is, or with backend 'auto' another backend."
    cache.warn_once(f"a kernel failed its verification on {card}: {verdict}. {instead}{report}")
    return verdict


def cached_verdict(plan: Any, problem: Problem, pass_: Pass, device: torch.device) -> str | None:
    """Return the cached verdict on a kernel on a device: "right", an error, or None if it was not verified yet."""
    return cast("str | None", cache.read(cache.CHECKS, _key(plan, problem, pass_, device)))


def _key(plan: Any, problem: Problem, pass_: Pass, device: torch.device) -> cache.Key:
    """Return the key of a verdict on disk."""
    problem = problem._replace(batch=0, side_by_side=1)  # plan.identity has the facts of a launch that depend on these
    return machine_of(plan.backend, device) | plan.identity | problem.as_json() | pass_._asdict()


def _verdict(layer: Layer, pass_: Pass, inputs: Inputs, plan: Any) -> str:
    """Try a plan, and return "right" or a description of its error."""
    device, problem = layer.device, layer.problem._replace(batch=plan.sequences_enough(layer.problem))
    on_trial, smalls, runs = Layer(problem, device, layer.launcher, trial=plan), [], []
    for seed in range(min(MOST_SEEDS, ceil(ENOUGH / (problem.batch * problem.width)))):
        with alone(grad=True), torch.autocast(device.type, enabled=False):
            smalls.append(small := Small(problem, pass_, inputs, seed))
            truth, steps = small.by_reference(torch.float64)
            theirs = small.yardstick()
        try:
            with alone(grad=False), torch.autocast(device.type, enabled=False), checked():
                runs.append((truth, theirs, small.by_kernels(on_trial, steps)))
                wait_and_check(device)
        except WroteOutside as error:
            return str(error)
    truths, theirs_, ours = zip(*runs)
    rounds = problem.precision == "tf32" and device.type == "cuda"  # a CPU has no TF32, whatever cuDNN's switch says
    last_place = 2.0**-10 if rounds else torch.finfo(problem.dtype).eps  # the unit in the last place of products
    rounded: list[list[Results]] = []
    for name in truths[0]:
        true = torch.cat([each[name].flatten() for each in truths])
        our_rms, scale = _rms_error(ours, name, true), float(true.where(true.isfinite(), 0).abs().max())
        allowed = 2 * max(_rms_error(theirs_, name, true), last_place * scale)
        for draw in range(DRAWS):  # most often the first one is enough, and with many units each one takes a second
            if our_rms <= allowed:
                break
            if draw == len(rounded):
                rounded.append([small.with_roundings(draw) for small in smalls])
            allowed = max(allowed, 3 * _rms_error(rounded[draw], name, true))
        if not our_rms <= allowed:  # true for NaN, too
            return f"the RMS error of {name} is {our_rms:.2g}, where {allowed:.2g} is allowed"
    return "right"


def _rms_error(results: Sequence[Results], name: str, true: Tensor) -> float:
    """Return the root mean square error of a result in all small problems."""
    found = torch.cat([each[name].double().flatten() for each in results])
    return float((found - true).where(found != true, 0).square().mean().sqrt())  # inf - inf is NaN, but no error


class Rounded(TorchDispatchMode):
    """A block in which results of torch's operators in float64 get random errors as large as roundings of `dtype`.

    This is Monte Carlo arithmetic (Parker, 1997): the results spread as far as roundings in any order may move them.
    Some operators round more than once:

    - A product adds up K terms in float32, possibly one after another. The k-th partial sum is about sqrt(k / K) of the
      last one, and each partial sum has an error of at most half a unit in the last place.
    - A layer norm subtracts means. The differences have the absolute errors of the terms, also where they are small.
    - Kernels compute sigmoid and tanh to 2 units in the last place.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self._eps, self._generator = torch.finfo(dtype).eps, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if any(each.alias_info is not None for each in function._schema.returns):  # a view, or an operator in place
            return results
        error: Any = 0.0
        if function.overloadpacket in PRODUCTS:
            terms = [t for t in args if t.dim() > 1][-2].shape[-1]
            error = torch.finfo(torch.float32).eps * (terms / 2) ** 0.5 * results.square().mean().sqrt()
        elif function.overloadpacket is _aten.native_layer_norm:
            error = self._eps * args[0].abs().amax(-1, keepdim=True) * results[2]
        elif function.overloadpacket is _aten.native_layer_norm_backward:
            dy, v, _, _, scale, gain, *_ = args
            largest, of_v = ((t * scale).abs().amax(-1, keepdim=True) for t in (dy * gain, v))
            error = self._eps * largest * (1 + of_v)
        elif function.overloadpacket in (_aten.sigmoid, _aten.tanh):
            error = 3 * self._eps * results
        if isinstance(results, tuple):
            return self._rounded(results[0], error), *results[1:]
        return self._rounded(results, error)

    def _rounded(self, t: Any, error: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        noise = torch.rand(2, *t.shape, generator=self._generator, dtype=t.dtype).to(t.device) - 0.5
        return t * (1 + self._eps * noise[0]) + error * noise[1]


_aten = torch.ops.aten
PRODUCTS = _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm


class Small:
    """A small problem with random Inputs, which are exact in the dtype of the problem.

    It has the same tensors as the Inputs `like` of a call, in the same dtypes.
    """

    def __init__(self, problem: Problem, pass_: Pass, like: Inputs, seed: int = 0) -> None:
        self.problem, self.pass_, self.cell = p, _, cell = problem, pass_, CELLS[problem.cell]
        generator, steps = torch.Generator().manual_seed(seed), 1 if p.steps == 1 else STEPS

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(p.dtype)

        samples = {  # by Row.sample
            "normal": lambda size: normal(*size),
            "matrix": lambda size: normal(*size, scale=max(1, size[1]) ** -0.5),
            "near one": lambda size: 1 + normal(*size, scale=0.3),
            "factors": lambda size: (normal(*size) > 0) * 2,
            "mask": lambda size: normal(*size) > 0 if size else torch.tensor(RATE),
            "lengths": lambda size: (steps - torch.arange(*size)) % (steps + 1),
            "resets": lambda size: (torch.arange(steps)[:, None] + torch.arange(size[1])) % 3 == 1,
        }
        # Kernels do not read x, and any number of features would do for them. But with many units and few features,
        # torch's products have errors of their own on a CPU.
        sizes, tensors = sizes_of(p, steps, features=max(1, like.x.shape[-1], p.hidden // 16)), {}
        for name, tensor in like._asdict().items():
            if tensor is None:
                continue
            values = samples[BY_NAME[name].sample](sizes[name] if tensor.dim() else ())
            if name == "c0":  # every second unit is empty, as all units are in a call without hx
                is_empty = (torch.arange(p.hidden) + torch.arange(p.batch)[:, None] + seed) % 2 == 0
                values = values.where(~is_empty, cell.empty_like(values))
            tensors[name] = values.to(tensor.device, tensor.dtype)
        if cell.one_state:
            for h, c in (("h0", "c0"), ("reset_h", "reset_c"), ("zoneout_h", "zoneout_c")):
                if c in tensors:
                    tensors[c] = tensors[h].to(tensors[c].dtype)
        self.inputs = like._replace(**tensors)
        self.compared = tuple([name for name in COMPARED if name in tensors])  # the Inputs whose gradients are compared
        dh, dh_n = (normal(*size, p.batch, p.width).to(like.x.device) for size in ((steps,), (1,)))
        self.output_gradients = dh if pass_.dh else None, dh_n if pass_.dh_n else None

    def by_reference(self, dtype: torch.dtype) -> tuple[Results, Steps]:
        """Return the reference's results in a dtype, and its Steps."""
        record: list[Steps] = []
        run = partial(reference.layer_by_reference, self.cell, record=record.append)
        return self.results(run, dtype), record[0]

    def with_roundings(self, draw: int) -> Results:
        """Return the reference's results in float64, with random roundings of the problem's dtype."""
        device = self.inputs.x.device.type
        with alone(grad=True), torch.autocast(device, enabled=False), Rounded(self.problem.dtype, draw):
            return self.by_reference(torch.float64)[0]

    def yardstick(self) -> Results:
        """Return the results of torch's own layer, or of the reference in the same dtype if torch has no such layer.

        The reference also replaces torch's own where cuDNN fails, and for gradients of a GRU. Two gradients of its
        state are compared, one by way of h and one by way of c, and torch has only their sum.
        """
        p, cell = self.problem, self.cell
        if torch_rnn.has(cell, self.inputs) and not (cell.one_state and self.pass_.backward):
            try:
                return self.results(partial(torch_rnn.layer_by_torch, cell), p.dtype)
            except DEVICE_ERRORS:
                raise
            except RuntimeError as error:
                logger.info("torch's own is no yardstick for %s: %s", p, error)
        return self.by_reference(p.dtype)[0]

    def results(self, run: Callable[..., Any], dtype: torch.dtype) -> Results:
        """Return the results of run(inputs, reverse) in a dtype, or in a backward pass its gradients, by name."""
        learns = self.pass_.backward
        learnt = {name: t for name in LEARNT if (t := getattr(self.inputs, name)) is not None}
        g = self.inputs._replace(**{name: t.to(dtype).requires_grad_(learns) for name, t in learnt.items()})
        h, (h_n, c_n) = run(g, self.problem.reverse)
        if not learns:
            return dict(h=h, h_n=h_n, c_n=c_n)
        pairs = [(y, d.to(dtype)) for y, d in zip((h, h_n), self.output_gradients) if d is not None]
        wanted = [getattr(g, name) for name in self.compared]
        gradients = torch.autograd.grad([y for y, _ in pairs], wanted, [d for _, d in pairs])
        return {f"the gradient of {name}": gradient for name, gradient in zip(self.compared, gradients)}

    def by_kernels(self, layer: Layer, steps: Steps) -> Results:
        """Return the results or gradients by a Layer. Backward reads the gates and states of the reference."""
        dtype, inputs = self.problem.dtype, self.inputs
        if not self.pass_.backward:
            h, h_n, c_n, *_ = fused.forward(layer, inputs, self.pass_.save)
            return dict(h=h, h_n=h_n, c_n=c_n)
        saved = Saved(inputs, steps.h.to(dtype), steps.gates.to(dtype), steps.c.float())
        gradients = fused.gradients(layer, saved, (*self.output_gradients, None), set(self.compared))
        return {f"the gradient of {name}": gradients[name] for name in self.compared}  # type: ignore[misc]
