"""Explain how a call runs, and why: the backend, the kernels, the result of the race. Nothing is run."""

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
from ..dispatch.execute import Route
from ..dispatch.kind import Kind, describe, kind_of
from ..dispatch.route import able_to_run
from ..modules import GRU, LSTM, SLSTM, StackedGRU, StackedLSTM
from ..modules.arguments import OverSequences
from ..verification.verify import cached_verdict
from .convert import check_layers
from .xlstm import ByOurs


@dataclass(frozen=True)
class PassPlan:
    """The plan by which kernels run one pass, forward or backward, of one layer in one direction."""

    name: str  # "forward" or "backward"
    family: str
    tiles: str  # how the programs share the layer
    why: str  # why this plan
    origin: str  # whether the plan was measured
    verdict: str | None  # the verdict on this card: "right", or the fault; None if it was not verified yet
    launches: int  # how many launches a call makes

    @property
    def checked(self) -> str:
        """The state of the verification on this card, in words."""
        return {None: "not checked yet", "right": "checked"}.get(self.verdict, f"failed: {self.verdict}")


@dataclass(frozen=True)
class Direction:
    """One layer in one direction, and its plans."""

    layer: int
    name: str  # "forward" or "reverse": the direction in time
    input_size: int | None  # None: the caller computes W_ih x
    hidden_size: int
    proj_size: int
    heads: int
    passes: list[PassPlan]  # empty if the backend has no kernels


@dataclass(frozen=True)
class Explanation:
    """How a call runs, and why. `str()` returns text for readers, `dataclasses.asdict()` data for programs."""

    problem: str  # the kind of call, in words
    backend: str  # the backend of all layers and directions
    why: str  # why this backend
    seconds: dict[str, float] | None  # time of a call by each rival in the race; None if there was no race
    how: str  # in which way the backend runs the call
    precision: str  # how products are computed
    others: dict[str, str]  # for each backend that does not run the call, the reason
    launches: int | None  # the sum over all passes; None if the backend has no kernels
    layers: list[Direction]

    def __str__(self) -> str:
        lines = [self.problem, f"  backend    {race.Decision(Backend(self.backend), self.why, self.seconds)}"]
        lines += [f"  how        {self.how}", f"  products   {self.precision}"]
        lines += [f"  not used   {name}: {why_not}" for name, why_not in self.others.items()]
        for d in self.layers:
            projected = f", projected to {d.proj_size}" if d.proj_size else f" of {d.heads} heads" * (d.heads > 1)
            lines.append(f"  layer {d.layer}, {d.name}: {d.input_size or 'W_ih x'} -> {d.hidden_size}{projected}")
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
    """Explain how a call made at the same place would run, and why. Nothing is run, raced or cached.

    The answer depends on the state at that place: autograd on or off, training mode, autocast, and the blocks
    `gpu_lstm.backend(...)` and `gpu_lstm.racing(...)`.

    Args:
        module: An LSTM, GRU, SLSTM, StackedLSTM or StackedGRU, or a cell of `use_for_slstm`. For a model that contains
            one of them, give that module and its input.
        x: As `module` accepts it. Only its shape, dtype, device and requires_grad matter.
        hx: Ignored.
        lengths, resets, reset_states: As `module` accepts them. It matters only whether they are given and, on a CPU,
            whether a reset comes after the first step. For a cell of `use_for_slstm` they are ignored.

    Returns:
        An Explanation. `print` shows it as text, `dataclasses.asdict` turns it into data.

    Raises:
        TypeError: `module` is of none of these classes.
        ValueError, RuntimeError, TypeError, ImportError: The same errors as in a call of `module`, except for errors
            about hx. This includes the errors of a chosen backend that cannot run the call.
    """
    check_layers("explain", module, OverSequences | ByOurs)
    if not isinstance(x, PackedSequence):
        check_tensor(x, "x")
    if isinstance(module, OverSequences):
        request = module._request(x, None, lengths, resets, reset_states)
    elif (found := module.request(x)) is not None:
        request = found
    else:
        few = "few steps on a CPU: a call of slstm_layer would cost more than it computes"
        how = "a loop over steps in torch's operators"
        return Explanation("sLSTM cell", Backend.REFERENCE.value, few, None, how, f"in {x.dtype}", {}, None, [])
    kind, device = kind_of(request), request.x.device
    decision = race.decide(request, kind, able_to_run(request, kind), dry=True)
    route, backend = race.build(request, kind, decision.backend), decision.backend
    layers = []
    for row, p in enumerate(kind.problems):
        k, d = divmod(row, kind.directions)
        name, inputs, passes = ("forward", "reverse")[d], kind.inputs[k], _passes(request, kind, route, row)
        layers.append(Direction(k, name, inputs, p.hidden, p.projected, p.heads, passes))  # type: ignore[arg-type]
    launches = sum(each.launches for d in layers for each in d.passes) if backend in KERNEL_BACKENDS else None
    return Explanation(
        describe(kind, device, steps=request.steps, batch=request.batch).replace("<=", "="),
        backend.value, decision.why, decision.seconds, _how(request, backend), _precision(kind, device, backend),
        {b.value: _why_not(request, kind, decision, b) for b in Backend if b not in (Backend.AUTO, backend)},
        launches, layers,
    )  # fmt: skip


def _passes(request: Request, kind: Kind, route: Route, row: int) -> list[PassPlan]:
    """Return the passes of one layer in one direction, number `row` of [L*D]; [] if the route has no kernels.

    A pass has the plan that was chosen. If none was, it has the plan that would be tried first.
    """
    if route.schedule is None:
        return []
    layer, launches = route.layers[row], ceil(request.steps / route.schedule.longest)
    passes = []
    for pass_ in kind.passes:
        chosen = layer.chosen(pass_)
        # Backward is verified once for each set of gradients that it may be given.
        others = [pass_._replace(dh_n=False), pass_._replace(dh=False)] if pass_.backward else []
        verdicts = [cached_verdict(chosen.plan, layer.problem, each, layer.device) for each in (pass_, *others)]
        passes.append(PassPlan(
            "backward" if pass_.backward else "forward", chosen.family, chosen.tiles, chosen.why,
            "timed on this card" if chosen.measured else "the first to try, not timed",
            min(filter(None, verdicts), key="right".__eq__, default=None),  # a fault, if one is known, else "right"
            chosen.each_step * request.steps or launches,
        ))  # fmt: skip
    return passes


def _why_not(request: Request, kind: Kind, decision: race.Decision, other: Backend) -> str:
    """Return why a backend does not run the call that `decision` gives to another one."""
    device, feature, times = request.x.device, kind.feature, decision.seconds or {}
    chosen = requested_backend(request.options.backend) is not Backend.AUTO
    has_kernels = other in KERNEL_BACKENDS
    if (problem := available.why_unavailable(other, device, kind.dtype)) is not None:
        return str(problem)
    if not available.supports(other, feature):
        return f"it does not support {feature}"
    if has_kernels and (lacking := available.lacking(other, kind)) is not None:
        return f"it has no {lacking}"
    if chosen or request.modes.transforms == Transforms.REFERENCE:
        return f"{decision.backend.value!r} is {decision.why}"
    if {other.value, decision.backend.value} <= times.keys():
        return f"{times[other.value] / times[decision.backend.value]:.2f} times the time in the race"
    if other is Backend.REFERENCE:
        return "it is a plain loop over steps, for what the others cannot do"
    if has_kernels and other not in available.backends_for(device):
        return f"'auto' does not give {device.type} tensors to it"
    if has_kernels and (why := available.why_not(other, device, kind)) is not None:
        return why
    if has_kernels and other is not (first := able_to_run(request, kind)):
        return f"'auto' chooses its kernels only where those of {first.value!r} cannot run"
    return decision.why


def _how(request: Request, backend: Backend) -> str:
    """Return in which way the backend runs the call."""
    if backend in KERNEL_BACKENDS:
        return "products with a layer's inputs, then its steps, by the kernels below; both may run in chunks of time"
    if backend is Backend.REFERENCE:
        return "a loop over steps in torch's operators"
    packed, theirs = request.form.packed is not None, f"torch's own {request.options.cell.name.upper()}"
    if packed and request.traversal.resets is None and type(request.options.role) is Module:
        return f"{theirs} runs the PackedSequence as it is"
    if packed or not request.traversal.is_plain():
        return f"{theirs}, a call for each layer and direction; added input features hold or clear its state"
    return f"{theirs}, {'all layers in one call' if request.options.in_one_call else 'a call for each layer'}"


def _precision(kind: Kind, device: torch.device, backend: Backend) -> str:
    """Return how the matrix products are computed, with the switches of torch that decide it."""
    name = str(kind.dtype).removeprefix("torch.")
    if kind.dtype is not torch.float32 or device.type != "cuda":
        return f"in {name}" if kind.dtype.itemsize > 2 else f"of {name} numbers, summed in float32"
    switches = kind.problems[0].precision, torch.backends.cuda.matmul.fp32_precision
    inner, wide = ("TF32" if switch == "tf32" else "float32, exactly" for switch in switches)
    text = f"in the recurrence {inner} (torch.backends.cudnn.rnn.fp32_precision)"
    if backend is Backend.TORCH:
        return f"{text}, and all others"
    return f"{text}, over all steps {wide} (torch.backends.cuda.matmul.fp32_precision)"
