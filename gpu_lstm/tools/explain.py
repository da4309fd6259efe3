"""How a call runs, and why: backend, kernels, what was raced. Nothing is run."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..call.checks import check_tensor
from ..call.choices import KERNEL_BACKENDS, Backend, requested_backend
from ..call.modes import Transforms
from ..call.request import Request
from ..call.roles import Module
from ..dispatch import available, race
from ..dispatch.kind import Kind, describe, kind_of
from ..dispatch.route import able_to_run
from ..dispatch.run import Route
from ..modules import GRU, LSTM, SLSTM, StackedGRU, StackedLSTM
from ..modules.arguments import Layers
from ..verification.verify import cached_verdict
from .convert import check_layers
from .xlstm import ByOurs


@dataclass(frozen=True)
class PassPlan:
    """How one layer in one direction runs forward, or backward, by kernels."""

    name: str  # "forward" or "backward"
    family: str
    tiles: str  # how its programs share a layer
    why: str
    origin: str  # whether the plan was measured
    verdict: str | None  # what verification on this card said: "right", or what is wrong; None: nothing yet
    launches: int  # how often a call launches its kernels

    @property
    def checked(self) -> str:
        """Whether the kernel was verified on this card, in words."""
        return {None: "not checked yet", "right": "checked"}.get(self.verdict, f"failed: {self.verdict}")


@dataclass(frozen=True)
class Direction:
    """One layer in one direction."""

    layer: int
    name: str  # "forward" or "reverse": its way through time
    input_size: int
    hidden_size: int
    proj_size: int
    heads: int
    passes: list[PassPlan]  # [] without kernels


@dataclass(frozen=True)
class Explanation:
    """How a call runs, and why. `str()` is for readers, `dataclasses.asdict()` for programs."""

    problem: str
    backend: str  # which runs all its layers and directions
    why: str
    seconds: dict[str, float] | None  # a call of each rival in the race; None: there was none
    how: str  # in which way the backend runs it
    precision: str  # how products are computed
    others: dict[str, str]  # the backends that do not run it: why not
    launches: int | None  # of all kernels of the recurrence; None: the backend has no kernels
    layers: list[Direction]

    def __str__(self) -> str:
        lines = [self.problem, f"  backend    {race.Decision(Backend(self.backend), self.why, self.seconds)}"]
        lines += [f"  how        {self.how}", f"  products   {self.precision}"]
        lines += [f"  not used   {name}: {why_not}" for name, why_not in self.others.items()]
        for d in self.layers:
            projected = f", projected to {d.proj_size}" if d.proj_size else f" of {d.heads} heads" * (d.heads > 1)
            lines.append(f"  layer {d.layer}, {d.name}: {d.input_size} -> {d.hidden_size}{projected}")
            for each in d.passes:
                lines.append(f"    {each.name}: {each.family}, {each.tiles}; {each.origin}, {each.checked}")
                lines += [f"      {each.why}", f"      launches of the recurrence: {each.launches}"]
        if self.launches is not None:
            lines.append(f"  launches of the recurrence in all: {self.launches}, next to products over all steps")
        return "\n".join(lines)


def explain(
    module: LSTM | GRU | SLSTM | StackedLSTM | StackedGRU, x: Tensor | PackedSequence, hx: Any = None, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: Any = None,
) -> Explanation:  # fmt: skip
    """Say how a call made at the same place would run, and why: nothing is run, raced, or cached.

    The place matters: autograd on or off, training, autocast, `gpu_lstm.backend(...)` and `gpu_lstm.racing(...)`.

    Args:
        module: an LSTM, GRU, SLSTM, StackedLSTM or StackedGRU, or a cell of `use_for_slstm`.
        x, hx, lengths, resets, reset_states: as `module` accepts them. Only the shape, dtype, device and requires_grad
            of x matter, whether lengths, resets and reset_states are given, and on a CPU whether a reset comes after
            the first step; hx is ignored.

    Returns:
        Text by `print`, data by `dataclasses.asdict`.

    Raises:
        TypeError: `module` is of none of these classes.
        ValueError, RuntimeError, TypeError, ImportError: as `module` itself for all but hx, and a chosen backend.
    """
    check_layers("explain", module, Layers | ByOurs)
    if not isinstance(x, PackedSequence):
        check_tensor(x, "x")
    if isinstance(module, Layers):
        call = module._request(x, None, lengths, resets, reset_states)
    elif (found := module.request(x)) is not None:
        call = found
    else:
        few = "few steps on a CPU: a call of slstm_layer would cost more than it computes"
        how = "a loop over steps in torch's operators"
        return Explanation("sLSTM cell", Backend.REFERENCE.value, few, None, how, f"in {x.dtype}", {}, None, [])
    kind = kind_of(call)
    decision = race.decide(call, kind, able_to_run(call, kind), dry=True)
    route, backend = race.build(call, kind, decision.backend), decision.backend
    layers = []
    for row, p in enumerate(kind.problems):
        (k, d), passes = divmod(row, kind.directions), _passes(call, kind, route, row)
        name = ("forward", "reverse")[d]
        layers.append(Direction(k, name, kind.inputs[k], p.hidden, p.projected, p.heads, passes))  # type: ignore[arg-type]
    launches = sum(each.launches for d in layers for each in d.passes) if backend in KERNEL_BACKENDS else None
    return Explanation(
        describe(kind, call.x.device, steps=call.steps, batch=call.batch).replace("<=", "="),
        backend.value, decision.why, decision.seconds, _how(call, backend), _precision(kind, call.x.device, backend),
        {b.value: _why_not(call, kind, decision, b) for b in Backend if b not in (Backend.AUTO, backend)},
        launches, layers,
    )  # fmt: skip


def _passes(call: Request, kind: Kind, route: Route, row: int) -> list[PassPlan]:
    """The passes of one layer and direction by kernels: with the chosen plans, or those that would be tried first."""
    if route.schedule is None:
        return []
    layer, launches = route.layers[row], ceil(call.steps / route.schedule.longest)
    passes = []
    for pass_ in kind.passes:
        chosen = layer.chosen(pass_)
        # Backward is verified for each set of gradients that it may be given.
        others = [pass_._replace(dh_n=False), pass_._replace(dh=False)] if pass_.backward else []
        verdicts = [cached_verdict(chosen.plan, layer.problem, each, layer.device) for each in (pass_, *others)]
        passes.append(PassPlan(
            "backward" if pass_.backward else "forward", chosen.family, chosen.tiles, chosen.why,
            "timed on this card" if chosen.measured else "the first to try, not timed",
            min(filter(None, verdicts), key="right".__eq__, default=None),  # what is wrong, if anything is
            chosen.each_step * call.steps or launches,
        ))  # fmt: skip
    return passes


def _why_not(call: Request, kind: Kind, decision: race.Decision, other: Backend) -> str:
    """Return why a backend does not run the call that `decision` gives to another one."""
    device, feature, times = call.x.device, kind.feature, decision.seconds or {}
    has_kernels = other in KERNEL_BACKENDS
    if (problem := available.why_unavailable(other, device, kind.dtype)) is not None:
        return str(problem)
    if not available.supports(other, feature):
        return f"it does not support {feature}"
    if has_kernels and (lacking := available.lacking(other, kind)) is not None:
        return f"it has no {lacking}"
    if requested_backend(call.options.backend) is not Backend.AUTO or call.modes.transforms == Transforms.REFERENCE:
        return f"{decision.backend.value!r} is {decision.why}"
    if {other.value, decision.backend.value} <= times.keys():
        return f"{times[other.value] / times[decision.backend.value]:.2f} times the time in the race"
    if other is Backend.REFERENCE:
        return "it is a plain loop over steps, for what the others cannot do"
    if has_kernels and other not in available.backends_for(device):
        return f"'auto' does not give {device.type} tensors to it"
    if has_kernels and (why := available.why_not(other, device, kind)) is not None:
        return why
    if has_kernels and other is not (first := able_to_run(call, kind)):
        return f"'auto' chooses its kernels only where those of {first.value!r} cannot run"
    return decision.why


def _how(call: Request, backend: Backend) -> str:
    if backend in KERNEL_BACKENDS:
        return "one product with all inputs of a layer, then its steps, or a chunk of them, by the kernels below"
    if backend is Backend.REFERENCE:
        return "a loop over steps in torch's operators"
    packed, theirs = call.form.packed is not None, f"torch's own {call.options.cell.name.upper()}"
    if packed and call.traversal.resets is None and type(call.options.role) is Module:
        return f"{theirs} runs the PackedSequence as it is"
    if packed or not call.traversal.is_plain():
        return f"{theirs}, a call for each layer and direction; gates are shut from outside at ends and resets"
    return f"{theirs}, {'all layers in one call' if call.options.in_one_call else 'a call for each layer'}"


def _precision(kind: Kind, device: torch.device, backend: Backend) -> str:
    name = str(kind.dtype).removeprefix("torch.")
    if kind.dtype is not torch.float32 or device.type != "cuda":
        return f"in {name}" if kind.dtype.itemsize > 2 else f"of {name} numbers, summed in float32"
    switches = kind.problems[0].precision, torch.backends.cuda.matmul.fp32_precision
    inner, wide = ("TF32" if switch == "tf32" else "float32, exactly" for switch in switches)
    text = f"in the recurrence {inner} (torch.backends.cudnn.rnn.fp32_precision)"
    if backend is Backend.TORCH:
        return f"{text}, and all others"
    return f"{text}, over all steps {wide} (torch.backends.cuda.matmul.fp32_precision)"
