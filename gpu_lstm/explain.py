"""What a call of an LSTM takes, and why: backend, kernels, what was raced, what bounds a step. Nothing is run."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.backends.cudnn.rnn as cudnn_rnn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import backends, chunks, races, trust
from .backends import KERNEL_BACKENDS, Backend, obstacle, requested, select, takers
from .kernels import cache as remembered  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from .layers import compute_dtype
from .modules import LSTM, StackedLSTM, _check_input
from .precision import recurrent_precision
from .races import Decision, Kind, Mode
from .sequences import Batch, Traversal, check_tensor
from .settings import Settings, special_of
from .transforms import need_the_reference
from .weights import State, Weights


@dataclass(frozen=True)
class Pass:
    """What one layer in one direction takes forward, or backward, from the Triton backend."""

    name: str  # "forward" or "backward"
    family: str
    tiles: str  # of its plan
    why: str
    origin: str  # how the plan was found
    verdict: str | None  # of the check on this card: "right", or what is wrong; None: it was not checked yet
    launches: int  # of the kernel of the recurrence
    bounds: dict[str, float]  # seconds of a step, by what takes them: expected, not measured; {} in the interpreter

    @property
    def checked(self) -> str:
        """Whether the kernel was checked here, in words."""
        if self.verdict is None:
            return "not checked yet"
        return "checked" if self.verdict == "right" else f"not trusted: {self.verdict}"


@dataclass(frozen=True)
class Direction:
    """One layer in one direction."""

    layer: int
    name: str  # "forward" or "reverse": the way it goes through time
    input_size: int
    hidden_size: int
    proj_size: int
    passes: list[Pass]  # [] but for the Triton backend


@dataclass(frozen=True)
class Explanation:
    """What a call takes, and why. `str()` is for readers, `dataclasses.asdict()` for programs."""

    problem: str
    backend: str  # of all its layers and directions
    why: str
    seconds: dict[str, float] | None  # a call of each rival in the race; None: there was none
    how: str  # the backend goes about it
    precision: str  # of products
    others: dict[str, str]  # the backends that do not run it: why not
    launches: int | None  # of kernels of the recurrence; None: it takes more than those, or others
    layers: list[Direction]

    def __str__(self) -> str:
        lines = [self.problem, f"  backend    {Decision(self.backend, self.why, self.seconds)}"]
        lines += [f"  how        {self.how}", f"  products   {self.precision}"]
        for name, why_not in self.others.items():
            lines.append(f"  not taken  {name}: {why_not}")
        for d in self.layers:
            projected = f", projected to {d.proj_size}" if d.proj_size else ""
            lines.append(f"  layer {d.layer}, {d.name}: {d.input_size} -> {d.hidden_size}{projected}")
            for each in d.passes:
                lines.append(f"    {each.name}: {each.family}, {each.tiles}; {each.origin}, {each.checked}")
                lines.append(f"      {each.why}")
                lines.append(f"      {each.launches} launch(es) of the recurrence")
                if each.bounds:
                    terms = sorted(each.bounds.items(), key=lambda item: -item[1])
                    most = ", ".join(f"{name} {seconds * 1e6:.2f} us" for name, seconds in terms[:3])
                    total = sum(each.bounds.values()) * 1e6
                    lines.append(f"      a step: {total:.2f} us (expected, not measured), most of it: {most}")
        if self.launches is not None:
            lines.append(f"  in all {self.launches} launch(es) of the recurrence, beside products over all steps")
        return "\n".join(lines)


def explain(
    lstm: LSTM | StackedLSTM,
    x: Tensor | PackedSequence,
    hx: State | Sequence[State] | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: Any = None,
) -> Explanation:
    """Say what a call would take and why, without the call: nothing is run, raced, or remembered.

    It holds for the call as it would be made here: with autograd on or off, in training or not, under autocast, and
    within `gpu_lstm.backend(...)` and `gpu_lstm.racing(...)`.

    Args:
        lstm: an LSTM or StackedLSTM.
        x, hx, lengths, resets, reset_states: as `lstm` takes them. Of x, shape, dtype, device and requires_grad count;
            of lengths, resets and reset_states, whether they are there; of hx, nothing.

    Returns:
        Readable by `print`, and as data by `dataclasses.asdict`. Times of a step are expected ones, in seconds.

    Raises:
        TypeError: `lstm` is of neither class.
        ValueError, RuntimeError, TypeError, ImportError: as `lstm` itself for all but hx, and a chosen backend.

    Example::

        print(gpu_lstm.explain(lstm, x))
    """
    if not isinstance(lstm, LSTM | StackedLSTM):
        cls = type(lstm)
        raise TypeError(f"explain takes a gpu_lstm.LSTM or StackedLSTM, got {cls.__module__}.{cls.__name__}")
    if not isinstance(x, PackedSequence):
        check_tensor(x, "x")
        _check_input(x, type(lstm).__name__)
    data = x.data if isinstance(x, PackedSequence) else x
    batch = Batch.of(x, lengths, resets, lstm.batch_first)
    if reset_states is not None:
        batch = batch.resetting_to(lstm._reset_states(batch, reset_states))
    dtype, special = compute_dtype(data), special_of(lstm, reset_states is not None)
    able = select(lstm.backend, data.device, dtype, special)
    first: Any = lstm if isinstance(lstm, LSTM) else lstm.layers[0]
    first.check_input(batch.x, None)
    weights = _weights(lstm)
    settings = Settings.of(lstm, isinstance(lstm, StackedLSTM) and lstm.residual)
    kind = races.kind_of(able, batch.x, weights, batch.traversal, settings)
    decision = _decision(lstm, able, kind, data.device)
    backend = Backend(decision.backend)
    layers = _layers(backend, kind, batch, weights, settings)
    launches = sum(each.launches for d in layers for each in d.passes) if backend is Backend.TRITON else None
    others = {
        other.value: _why_not(lstm, other, decision, data.device, dtype, special)
        for other in Backend
        if other not in (Backend.AUTO, backend)
    }
    return Explanation(
        races.describe(kind._replace(steps=batch.x.shape[0], batch=batch.x.shape[1])).replace("<=", "="),
        backend.value, decision.why, decision.seconds, _how(backend, batch, weights, settings),
        _precision(dtype, data.device, backend), others, launches, layers,
    )  # fmt: skip


def _weights(lstm: LSTM | StackedLSTM) -> list[list[Weights]]:
    """[L][D], without weight drop, which would draw random numbers."""
    if isinstance(lstm, LSTM):
        return lstm._weights()
    return [layer._weights()[0] for layer in lstm.layers]  # type: ignore[operator]


def _decision(lstm: LSTM | StackedLSTM, able: Backend, kind: Kind, device: torch.device) -> Decision:
    """Who would run the call, and why."""
    if need_the_reference():
        return Decision(able.value, "only it runs inside vmap and forward-mode derivatives")
    if requested(lstm.backend) is not Backend.AUTO:
        return Decision(able.value, f"asked for by {_who_asked(lstm)}")
    if able not in KERNEL_BACKENDS:
        return Decision(able.value, "backend 'auto' takes it where no kernels run")
    known = races._decided.get((kind, device, races.mode()))
    if known is None and races.mode() is not Mode.OFF:
        known = races.found(kind, device)
    if known is not None:
        return known
    expected = races.expected_winner(kind, device)
    then = "; the first call races it" if races.mode() is Mode.ON and not kind.special else ""
    return Decision(expected.backend, expected.why + then)


def _who_asked(lstm: LSTM | StackedLSTM) -> str:
    if lstm.backend is not None:
        return "the argument `backend`"
    return "gpu_lstm.backend(...)" if backends._chosen is not None else f"the variable {backends.ENVIRONMENT_VARIABLE}"


def _why_not(
    lstm: LSTM | StackedLSTM,
    other: Backend,
    decision: Decision,
    device: torch.device,
    dtype: torch.dtype,
    special: str | None,
) -> str:
    """Why a backend does not run the call."""
    problem = obstacle(other, device, dtype)
    if problem is not None:
        return str(problem)
    if special is not None and other not in takers(special):
        return f"it takes no {special}"
    if requested(lstm.backend) is not Backend.AUTO or need_the_reference():
        return f"{decision.backend!r} is {decision.why}"
    times = decision.seconds or {}
    if {other.value, decision.backend} <= times.keys():
        return f"{times[other.value] / times[decision.backend]:.2f} times the time in the race"
    if other is Backend.REFERENCE:
        return "it is a plain loop over steps, for what the others cannot do"
    if other in KERNEL_BACKENDS and device.type not in backends.KERNEL_DEVICES:
        return f"'auto' does not give {device.type} tensors to it"
    if other is Backend.CUPY:
        return "'auto' takes its kernels only where Triton's cannot run"
    return decision.why


def _how(backend: Backend, batch: Batch, weights: list[list[Weights]], settings: Settings) -> str:
    """How a backend goes about it."""
    match backend:
        case Backend.TRITON | Backend.CUPY:
            return "a layer's steps, or a chunk of them, in one launch, after one product with all inputs"
        case Backend.REFERENCE:
            return "a loop over steps in torch's operators"
    if batch.packed is not None and batch.traversal.resets is None:
        return "torch's own LSTM takes the PackedSequence as it is"
    if not batch.traversal.is_plain():
        return "torch's own LSTM, a call for each layer and direction; gates are shut from outside at ends and resets"
    alike = len({one.weight_hh.shape for layer in weights for one in layer}) == 1
    together = alike and not settings.residual
    return f"torch's own LSTM, {'all layers in one call' if together else 'a call for each layer'}"


def _precision(dtype: torch.dtype, device: torch.device, backend: Backend) -> str:
    """How products are taken, and by which switch."""
    name = str(dtype).removeprefix("torch.")
    if dtype in (torch.float16, torch.bfloat16):
        return f"of {name} numbers, summed in float32"
    if dtype is not torch.float32 or device.type != "cuda":
        return f"in {name}"
    words = {True: "TF32", False: "float32, exactly"}
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(cudnn_rnn, "fp32_precision"):  # torch 2.9 and newer
        recurrent, over_all = "torch.backends.cudnn.rnn.fp32_precision", "torch.backends.cuda.matmul.fp32_precision"
        wide = matmul.fp32_precision == "tf32"
    else:
        recurrent, over_all = "torch.backends.cudnn.allow_tf32", "torch.backends.cuda.matmul.allow_tf32"
        wide = matmul.allow_tf32
    text = f"in the recurrence {words[recurrent_precision(dtype) == 'tf32']} ({recurrent})"
    if backend is Backend.TORCH:
        return f"{text}, and all others"
    return f"{text}, over all steps {words[wide]} ({over_all})"


def _layers(
    backend: Backend, kind: Kind, batch: Batch, weights: list[list[Weights]], settings: Settings
) -> list[Direction]:
    spans, side_by_side = 1, 1
    if backend is Backend.TRITON:
        schedule = chunks.schedule(batch.x.to(compute_dtype(batch.x)), weights, settings.recompute)
        spans, side_by_side = len(schedule.spans), schedule.side_by_side
    described = []
    for number, (inputs, hidden, projected) in enumerate(kind.layers):
        for reverse in (False, True)[: kind.directions]:
            passes = []
            if backend is Backend.TRITON:
                problem = _problem(kind, batch, hidden, projected, side_by_side)
                backwards = (False, True) if kind.training else (False,)
                traversal = Traversal(batch.traversal.lengths, batch.traversal.resets, reverse)
                passes = [_pass(problem, batch.x.device, backward, traversal, spans) for backward in backwards]
            way = "reverse" if reverse else "forward"
            described.append(Direction(number, way, inputs, hidden, projected, passes))
    return described


def _problem(kind: Kind, batch: Batch, hidden: int, projected: int, side_by_side: int) -> Any:
    planning = importlib.import_module("gpu_lstm.kernels.problem")
    steps, sequences, _ = batch.x.shape
    dtype = getattr(torch, kind.dtype.removeprefix("torch."))
    return planning.Problem(
        steps, sequences, hidden, dtype, projected, kind.precision, side_by_side, dropout_h=kind.noise
    )


def _pass(problem: Any, device: torch.device, backward: bool, traversal: Traversal, launches: int) -> Pass:
    """By the plan that was chosen, else the one that would be tried first."""
    launch = importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
    planning = importlib.import_module("gpu_lstm.kernels.triton_lstm.planning")
    plan, measured = launch.layer_of(problem, device).chosen(
        importlib.import_module("gpu_lstm.kernels.problem").Pass(backward)
    )
    card = card_of(device)
    return Pass(
        "backward" if backward else "forward",
        plan.family.value,
        f"{plan.rows} sequences x {plan.columns} units, {plan.programs} programs x {plan.groups} groups",
        plan.why,
        "measured by autotune" if measured else "expected to be the fastest",
        _verdict(problem, device, plan, backward, traversal),
        launches,
        {} if card is planning.INTERPRETER else planning.expected(problem, card, plan, backward).terms,
    )


def card_of(device: torch.device) -> Any:
    """What planning knows of a device: the seam at which a test can be a card."""
    planning = importlib.import_module("gpu_lstm.kernels.triton_lstm.planning")
    if device.type != "cuda":
        return planning.INTERPRETER
    return planning.device_of(torch.cuda.get_device_properties(device))


def _verdict(problem: Any, device: torch.device, plan: Any, backward: bool, traversal: Traversal) -> str | None:
    """What a check of this kernel came to on this card: the worst, where several of its variants were checked."""
    kernel = {name: getattr(plan, name) for name in ("rows", "columns", "k", "num_warps", "num_stages")}
    wanted = remembered.machine(device) | kernel | dict(
        format=trust.FORMAT, family=plan.family.value, hidden=problem.hidden, projected=bool(problem.projected),
        dtype=str(problem.dtype), precision=problem.precision, reverse=traversal.reverse,
    )  # fmt: skip
    there = {name for name in ("lengths", "resets") if getattr(traversal, name) is not None}
    verdicts = {
        value
        for _, key, value in remembered.entries(trust.KIND)
        if isinstance(value, str)
        and key.items() >= wanted.items()
        and (key.get("given") is not None) is backward
        and {"lengths", "resets"} & set(key.get("there", ())) == there
    }
    return next((v for v in sorted(verdicts) if v != "right"), "right" if verdicts else None)
