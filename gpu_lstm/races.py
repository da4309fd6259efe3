"""Which backend `auto` takes for a kind of problem on a card: the kernels, or torch's own LSTM.

The first call of a kind races them, once, on random data of its size; what came out is remembered
(kernels/remembered.py), and read by every later process. Where there may be no race, the expected winner runs.
"""

import contextlib
import enum
import functools
import importlib
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backends import Backend, parse
from .kernels import cache as remembered  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from .layers import compute_dtype, stack
from .precision import recurrent_precision
from .sequences import Traversal
from .settings import Settings
from .transforms import constant_when_traced, is_watched
from .weights import LAYER_NORM, State, Weights

ENVIRONMENT_VARIABLE = "GPU_LSTM_RACE"
KIND = "races"
FORMAT = 4  # raised whenever a field of Kind or the way of racing changes
BUDGET = 0.3  # seconds that a race may take, after everything is compiled
ROUND = 2e-3  # seconds of calls between two looks at the clock
LONGEST = 256  # steps of a race: with more, what a step takes is all that counts
BATCH_OF_A_GRAPH = 16  # that stands for any
UNTRUSTED = 0.5  # quartiles of a rival's times further apart than this share of their median: nothing is remembered

logger = logging.getLogger("gpu_lstm")


class Mode(enum.Enum):
    """Whether `auto` races, by the name a user gives."""

    ON = "on"  # race what was not raced yet, and remember it
    READ = "read"  # only use what is remembered
    OFF = "off"  # neither: the expected winner


class Kind(NamedTuple):
    """A kind of problem: what decides who is faster. Sizes that vary from call to call count by powers of two."""

    layers: tuple[tuple[int, int, int], ...]  # I, H and P (0 without projection) of each
    directions: int
    dtype: str
    precision: str  # of float32 products in the recurrence
    training: bool  # forward and backward
    recompute: bool
    steps: int  # T, up to the next power of two
    batch: int  # B, likewise
    lengths: bool
    resets: bool
    noise: bool  # recurrent dropout or zoneout
    reset_states: bool  # not zeros
    variant: str | None  # of the cell, see Weights.variant
    kernel: str  # the backend that has kernels for it

    @property
    def special(self) -> bool:
        """Whether torch's own LSTM cannot take it, and the reference can."""
        return self.noise or self.reset_states or self.variant is not None


@dataclass(frozen=True)
class Decision:
    """Who runs a kind of problem, and why."""

    backend: str
    why: str
    seconds: dict[str, float] | None = None  # a call of each rival, the median; None: there was no race

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in (self.seconds or {}).items())
        return f"{self.backend}: {self.why}" + (f" ({times})" if times else "")


_mode: Mode | None = None  # of the youngest block of `racing(...)`
_group: Any = None
_decided: dict[tuple, Decision] = {}
_lock = threading.RLock()


def racing(mode: Literal["on", "read", "off"], group: Any = None) -> contextlib.AbstractContextManager[None]:
    """Choose within a `with` block whether backend "auto" races; for the whole process, as the environment variable.

    Args:
        mode: "on", "read" (only use what is remembered, as on a cluster or in CI) or "off".
        group: ranks of a torch.distributed process group that are to agree: rank 0 decides. All of them must then
            make the same first calls.

    Raises:
        ValueError: another mode.
    """
    return _racing(_parse(mode), group)


@contextlib.contextmanager
def _racing(mode: Mode, group: Any) -> Iterator[None]:
    global _mode, _group
    before, (_mode, _group) = (_mode, _group), (mode, group)
    try:
        yield
    finally:
        _mode, _group = before


def _parse(mode: str, source: str = "") -> Mode:
    try:
        return Mode(mode)
    except ValueError:
        known = ", ".join(repr(m.value) for m in Mode)
        raise ValueError(f"unknown mode of racing {mode!r}{source}; expected one of {known}") from None


def mode() -> Mode:
    """By `with racing(...)`, else by environment variable, else on."""
    if _mode is not None:
        return _mode
    source = f" in the environment variable {ENVIRONMENT_VARIABLE}"
    return _parse(os.environ.get(ENVIRONMENT_VARIABLE) or Mode.ON.value, source)


def merge(*paths: str | Path) -> int:
    """Take over what `python -m gpu_lstm races --export FILE` wrote, for a program that ships such a file.

    Call it before the first call of a model. Findings of other cards or versions do no harm: they count only there.

    Returns:
        How many findings were new.

    Raises:
        OSError, ValueError: a file cannot be read, or is no such file.
    """
    return remembered.merge(paths)


def kind_of(kernel: Backend, x: Tensor, weights: list[list[Weights]], traversal: Traversal, settings: Settings) -> Kind:
    """The kind of a call; x is [T, B, I]."""
    dtype = compute_dtype(x)
    steps, batch, _ = x.shape
    needed = x.requires_grad or any(w.weight_hh.requires_grad for w, *_ in weights)
    noise = any(settings.zoneout) or bool(settings.training and settings.recurrent_dropout)
    return Kind(
        _layer_sizes(weights), len(weights[0]), str(dtype), recurrent_precision(dtype),
        torch.is_grad_enabled() and needed, settings.recompute, _size_class(steps), _size_class(batch),
        traversal.lengths is not None, traversal.resets is not None, noise, traversal.reset_states is not None,
        weights[0][0].variant, kernel.value,
    )  # fmt: skip


def _layer_sizes(weights: list[list[Weights]]) -> tuple[tuple[int, int, int], ...]:
    """I, H and P (0 without projection) of each layer."""
    first = [layer[0] for layer in weights]
    return tuple([
        (w.weight_ih.shape[1], w.weight_hh.shape[0] // 4, 0 if w.weight_hr is None else w.weight_hh.shape[1])
        for w in first
    ])  # fmt: skip


def _size_class(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def choose(
    kernel: Backend, x: Tensor, weights: list[list[Weights]], traversal: Traversal, settings: Settings
) -> Backend:
    """Who runs a call of `auto` that `kernel` can run: that backend, or torch; where that cannot, or the reference."""
    if torch.compiler.is_compiling():
        noise = settings.zoneout != (0.0, 0.0) or settings.recurrent_dropout != 0
        asked = (
            traversal.lengths is not None, traversal.resets is not None, noise, traversal.reset_states is not None,
            weights[0][0].variant,
        )  # fmt: skip
        sizes = _layer_sizes(weights), len(weights[0])
        return parse(_winner_in_a_graph(kernel.value, *sizes, compute_dtype(x), x.device, asked))
    if is_watched(x):
        return kernel
    kind = kind_of(kernel, x, weights, traversal, settings)
    decision = _decided.get((kind, x.device, mode()))
    if decision is None:
        decision = decide(kind, x, weights, traversal, settings)
    return Backend(decision.backend)


@constant_when_traced
def _winner_in_a_graph(
    kernel: str,
    layers: tuple[tuple[int, int, int], ...],
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    asked: tuple[bool, bool, bool, bool, str | None],  # whether there are lengths, resets, noise, reset_states; variant
) -> str:
    """The expected winner for long sequences: a graph of torch.compile is for all sizes, and nothing is raced there."""
    kind = Kind(
        layers, directions, str(dtype), recurrent_precision(dtype), True, False, LONGEST, BATCH_OF_A_GRAPH, *asked,
        kernel,
    )  # fmt: skip
    return expected_winner(kind, device).backend


def decide(kind: Kind, x: Tensor, weights: list[list[Weights]], traversal: Traversal, settings: Settings) -> Decision:
    """The decision about a kind of problem that was not made in this process yet."""
    with _lock, torch.random.fork_rng([x.device] if x.is_cuda else []):
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return found(kind, x.device) or expected_winner(kind, x.device)  # and the next call races
        decision = found(kind, x.device) if mode() is not Mode.OFF else None
        if decision is None and (_group is None or torch.distributed.get_rank(_group) == 0):
            decision = _judge(kind, x, weights, traversal, settings)
        if _group is not None:
            agreed = [decision]
            torch.distributed.broadcast_object_list(agreed, group=_group, group_src=0)
            (decision,) = agreed
        assert decision is not None
        _decided[kind, x.device, mode()] = decision
    logger.info("%s: %s", describe(kind), decision)
    return decision


def found(kind: Kind, device: torch.device) -> Decision | None:
    """What is remembered about a kind of problem on a device, if there is something."""
    entry = remembered.read(KIND, _key(kind, device))
    try:
        return None if entry is None else Decision(**entry)
    except TypeError:
        remembered.warn_once(f"a race is ignored: expected the fields of a decision, got {entry!r}")
        return None


def _key(kind: Kind, device: torch.device) -> remembered.Key:
    return remembered.machine(device) | {"format": FORMAT} | kind._asdict()


def _judge(kind: Kind, x: Tensor, weights: list[list[Weights]], traversal: Traversal, settings: Settings) -> Decision:
    """By a race, if there may be one; else by expectation, once the kernels have run at all."""
    race_it = mode() is Mode.ON and not kind.special
    run = _sample(kind, x, weights, traversal, settings)
    other = Backend.REFERENCE if kind.special else Backend.TORCH
    try:
        run(Backend(kind.kernel))  # compiles, and checks
    except torch.OutOfMemoryError:
        return expected_winner(kind, x.device)
    except RuntimeError as error:
        remembered.warn_once(f"backend 'auto' takes {other.value!r} for {describe(kind)}: {error}")
        return Decision(other.value, f"the kernels fail: {error}")
    if not race_it:
        return expected_winner(kind, x.device)
    rivals: dict[str, Callable[[], object]] = {
        name: functools.partial(run, Backend(name)) for name in (kind.kernel, other.value)
    }
    try:
        times = race(rivals, clock_of(x.device))
    except torch.OutOfMemoryError:
        return expected_winner(kind, x.device)
    decision, trusted = judge(times, expected_winner(kind, x.device))
    if trusted:
        remembered.write(KIND, _key(kind, x.device), asdict(decision))
    return decision


def _sample(
    kind: Kind, x: Tensor, weights: list[list[Weights]], traversal: Traversal, settings: Settings
) -> Callable[[Backend], None]:
    """run(backend): the call on random data of its size, with its own weights; and backward in training."""
    steps, batch, features = min(len(x), LONGEST), *x.shape[1:]
    # By uniform numbers of a generator that is forked off.
    data = torch.rand(steps, batch, features, dtype=torch.float32, device=x.device).to(x.dtype)
    data.requires_grad_(kind.training and x.requires_grad)
    own = [[w.detached(kind.training) for w in layer] for layer in weights]
    part = traversal.within(None if steps == len(x) else slice(0, steps))
    states: list[State] = []
    for layer in own:
        rows, width = layer[0].weight_hh.shape
        h, c = data.new_zeros(len(layer), batch, width), data.new_zeros(len(layer), batch, rows // 4)
        states.append((h.detach(), c.detach()))

    def run(backend: Backend) -> None:
        with torch.set_grad_enabled(kind.training):
            y, _ = stack(data, states, own, part, backend, settings)
            if kind.training:
                inputs = [t for layer in own for w in layer for t in w.present()]
                inputs += [data] if data.requires_grad else []
                torch.autograd.grad(y, inputs, torch.ones_like(y))

    return run


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, once a device has done all that it was given: the seam at which a test can be a card."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def race(rivals: dict[str, Callable[[], object]], now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds a call of each rival, by turns, until the budget is spent; at least three times each.

    The first call of each, which may compile, does not count. Host and device run at once, as they do for a user.
    """
    calls = {}
    for name, run in rivals.items():
        run()
        start = now()
        run()
        calls[name] = max(1, ceil(ROUND / max(now() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = now() + BUDGET
    for turn in range(1000):
        for name, run in rivals.items():
            start = now()
            for _ in range(calls[name]):
                run()
            times[name].append((now() - start) / calls[name])
        if turn >= 2 and now() >= end:
            break
    return times


def judge(times: dict[str, list[float]], expected: Decision) -> tuple[Decision, bool]:
    """Who won, and whether the clock is to be trusted. What is closer than the times are spread is a tie."""
    quartiles = {name: statistics.quantiles(seconds, n=4) for name, seconds in times.items()}
    medians = {name: middle for name, (_, middle, _) in quartiles.items()}
    spread = max(high - low for low, _, high in quartiles.values())
    first, second = sorted(medians, key=medians.__getitem__)
    if any(high - low > UNTRUSTED * middle for low, middle, high in quartiles.values()):
        return Decision(expected.backend, f"its times are too noisy; {expected.why}", medians), False
    if medians[second] - medians[first] <= spread:
        return Decision(expected.backend, f"a tie; {expected.why}", medians), True
    return Decision(first, f"won a race, {medians[second] / medians[first]:.2f} times as fast", medians), True


def expected_winner(kind: Kind, device: torch.device) -> Decision:
    """Who runs what was not raced. Nothing here was measured.

    kernels, where torch cannot do it, or not at the speed of a plain batch: noise, reset_states, a variant of the cell,
    lengths, resets, a projection
    kernels, where every layer's W_hh stays on chip and no group of programs walks several batch tiles
    torch, everywhere else
    """
    if kind.noise:
        return Decision(kind.kernel, "torch's LSTM has no recurrent dropout or zoneout")
    if kind.reset_states:
        return Decision(kind.kernel, "torch's LSTM has no states to reset to")
    if kind.variant is not None:
        return Decision(kind.kernel, f"torch's LSTM has no {kind.variant.replace('_', ' ')}")
    asked = (("lengths", kind.lengths), ("resets", kind.resets), ("a projection", any(p for *_, p in kind.layers)))
    slow = [name for name, there in asked if there]
    if slow:
        return Decision(kind.kernel, f"expected: torch's LSTM is slow with {' and '.join(slow)}")
    for plan in plans_of(kind, device):
        if plan.family.value == "step" or plan.walks > 1:
            return Decision(Backend.TORCH.value, f"expected: a kernel of the {plan.family.value} family is slower")
    if kind.kernel != Backend.TRITON.value:
        return Decision(Backend.TORCH.value, f"expected: {kind.kernel}'s kernels are slower")
    return Decision(kind.kernel, "expected: W_hh stays on chip")


def plans_of(kind: Kind, device: torch.device) -> list[Any]:
    """The first plan of each layer, forward and in training backward; none but for Triton on a card."""
    if kind.kernel != Backend.TRITON.value:
        return []
    launch = importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
    planning = importlib.import_module("gpu_lstm.kernels.problem")
    dtype = getattr(torch, kind.dtype.removeprefix("torch."))
    problems = [
        planning.Problem(
            kind.steps,
            kind.batch,
            hidden,
            dtype,
            projected,
            kind.precision,
            kind.directions,
            dropout_h=kind.noise,
            norms=(kind.variant == LAYER_NORM,) * 3,
        )
        for _, hidden, projected in kind.layers
    ]
    return [
        launch.layer_of(problem, device).chosen(importlib.import_module("gpu_lstm.kernels.problem").Pass(backward)).plan
        for problem in problems
        for backward in ((False, True) if kind.training else (False,))
    ]


def describe(kind: Kind) -> str:
    """A kind of problem in few words."""
    sizes = " -> ".join([str(kind.layers[0][0]), *(f"{h}" + f" (P={p})" * bool(p) for _, h, p in kind.layers)])
    words = ["both directions"] * (kind.directions - 1)
    words += [name for name in ("lengths", "resets", "noise", "reset_states", "recompute") if getattr(kind, name)]
    words += [kind.variant] if kind.variant else []
    words.append("training" if kind.training else "inference")
    dtype = kind.dtype.removeprefix("torch.") + f" ({kind.precision})" * (kind.dtype == "torch.float32")
    return f"LSTM {sizes}, T <= {kind.steps}, B <= {kind.batch}, {dtype}, {', '.join(words)}"
