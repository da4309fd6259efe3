"""The backend that `auto` chooses for a kind of call: the kernels, or torch's own LSTM or GRU, else the reference.

The first call of a kind races the two on random data of its size, and the result is cached on disk. Where no race is
allowed, the expected winner runs.
"""

import copy
import functools
import json
import logging
from collections.abc import Callable
from functools import partial

import torch

from ..backends.layer_loop import computes_in_float32
from ..call import choices
from ..call.choices import BACKEND_VARIABLE, KERNEL_BACKENDS, Backend, Racing, requested_backend, requested_racing
from ..call.isolation import alone
from ..call.modes import Recording, Transforms
from ..call.request import Request
from ..call.roles import TIME_FIRST
from ..execution.schedule import schedule_of
from ..kernels import cache
from ..kernels.contract import launcher_of, machine_of
from ..kernels.private import default_store
from ..kernels.process_settings import Setting
from ..kernels.timeouts import DEVICE_ERRORS, raise_if_timed_out, wait_and_check
from ..verification import verify
from ..verification.timing import is_disturbed
from . import available, cpu_rule
from .available import is_compiled_once
from .execute import Route, execute
from .kind import Kind, describe
from .stopwatch import Decision, clock, judge, times_of

LONGEST = 256  # the most steps of a race: with more, only the time per step matters
MOST_DECISIONS = 4096  # the number of decisions that are kept
FAILED = "the kernels fail"

logger = logging.getLogger("gpu_lstm")

decided: dict[tuple, Decision] = {}
"""The decisions of this process. Some of them are not on disk: noisy races, kernels that fail, and expected winners.
Since they are kept here, a batch of another size or a capture does not change a decision."""
_generators: dict[torch.device, Setting] = {}
_log_once = functools.lru_cache(MOST_DECISIONS)(logger.info)


def decide(request: Request, kind: Kind, able: Backend, dry: bool = False) -> Decision:
    """Decide which backend runs a kind of call. The candidates are `able` and the backend without kernels.

    A decision is looked up in this process, and then on disk. If there is none, the kernels are verified and raced. The
    result holds for all batch sizes that are rounded up to the same power of two (`alike`). If the kernels fail later
    for one of these sizes, that size gets a decision of its own (`own`).

    If `dry`, nothing is raced or kept. If there is no decision yet, the result is then the expected winner.

    Raises:
        ValueError: an environment variable names no backend or mode of racing.
        torch.OutOfMemoryError: memory is too full to verify the kernels, and nothing is decided.
    """
    requested_backend(None), requested_racing()  # a mistyped variable raises, even if it decides nothing here
    if (why := _why_nobody_races(request, kind, able)) is not None:
        if not dry:
            _log_once(f"{describe(kind, request.x.device)}: {Decision(able, why)}")
        return Decision(able, why)
    device, mode = request.x.device, requested_racing()
    own, alike = ((each, able, device, mode) for each in (kind, kind.rounded()))
    known = decided.get(own) or decided.get(alike)
    decision = known or _cached(kind, able, device, mode)
    if dry or request.modes.capturing:  # nothing may be raced now, and nothing is kept, so that a later call races
        if decision is not None:
            return decision
        expected = expected_winner(kind, able, device)
        races = dry and mode is Racing.ON and _is_raced(kind, able)
        return expected._replace(why=f"{expected.why}; the first call races it") if races else expected
    if decision is None and mode is not Racing.ON and is_compiled_once(able):
        decision = expected_winner(kind, able, device)  # if it is torch's own, no kernel is compiled
    if decision is None or decision.backend is able:
        decision = _settle(request, kind, able, mode, decision)
    if decision is known:
        return decision
    if len(decided) >= MOST_DECISIONS:
        decided.clear()
    if known is None:
        decision = decided.setdefault(alike, _agreed(decision, _key(kind, able, device)))
    else:  # `known` names the kernels, and for this batch size they fail
        decided[own] = decision
    logger.info("%s: %s", describe(kind, device), decision)
    return decision


def _why_nobody_races(request: Request, kind: Kind, able: Backend) -> str | None:
    """Return the reason why `able` runs a call without a race, or None if `auto` decides."""
    if request.modes.transforms == Transforms.REFERENCE:
        return "only it runs inside vmap and forward-mode derivatives"
    if requested_backend(request.options.backend) is not Backend.AUTO:
        who = "gpu_lstm.backend(...)" if choices.chosen_backends[0].value else f"the variable {BACKEND_VARIABLE}"
        return f"asked for by {who if request.options.backend is None else 'the argument `backend`'}"
    if able not in KERNEL_BACKENDS:
        return available.why_no_kernels(request.x.device, kind)
    if request.modes.recording != Recording.NOBODY or request.modes.transforms != Transforms.NONE:
        return "nothing is raced while a call is watched"
    return None


def _cached(kind: Kind, able: Backend, device: torch.device, mode: Racing) -> Decision | None:
    """Return the decision of a race that is cached on disk, or None."""
    entry = None if mode is Racing.OFF else cache.read(cache.RACES, _key(kind, able, device))
    if entry is None:
        return None
    rivals = [able.value, kind.fallback.value]
    if entry["backend"] not in rivals:
        cache.warn_once(f"a race is ignored: expected {' or '.join(rivals)}, got {entry!r}")
        return None
    return Decision(Backend(entry["backend"]), entry["why"], entry["seconds"])


def _key(kind: Kind, able: Backend, device: torch.device) -> cache.Key:
    """Return the key of a race on disk."""
    how = {"kernel": able.value, "multiprocessors": launcher_of(able.value).card_of(device).multiprocessors}
    return machine_of(able.value, device) | how | kind.as_json()


def expected_winner(kind: Kind, able: Backend, device: torch.device) -> Decision:
    """Return the decision for a kind that was not raced. It measures nothing.

    If plans were timed before, the chosen plan decides, otherwise the first proposal.

    The kernels are expected to win where torch's own cannot run the call. For calls on a CPU that it can run, cpu_rule
    decides. On a card the kernels are expected to win in two more cases: torch's own would run the call more slowly
    than a plain batch, or no layer's plan is expected to be slower than torch's own. (Triton's plans are not, where
    W_hh stays on chip.) Otherwise torch's own is expected to win.
    """
    if kind.torch_lacks:
        return Decision(able, f"torch's own does not support {kind.torch_lacks}")
    if is_compiled_once(able):
        why = cpu_rule.without_loops(kind)
        return Decision(able, cpu_rule.EXPECTED) if why is None else Decision(Backend.TORCH, f"expected: {why}")
    first, *_ = kind.problems
    slow = {"lengths": first.lengths, "resets": first.resets, "a projection": any(p.projected for p in kind.problems)}
    if words := [word for word, is_there in slow.items() if is_there]:
        return Decision(able, f"expected: torch's {first.cell.upper()} is slow with {' and '.join(words)}")
    for problem in kind.problems[:: kind.directions]:
        layer = verify.verified_layer(able, problem._replace(side_by_side=kind.directions), device)
        for pass_ in kind.passes:
            if (slower := layer.chosen(pass_).plan.slower) is not None:
                return Decision(Backend.TORCH, f"expected: {slower}")
    return Decision(able, "expected: W_hh stays on chip")


def _settle(request: Request, kind: Kind, able: Backend, mode: Racing, decision: Decision | None) -> Decision:
    """Run the kernels once, and return `decision`, or without one the decision of a race.

    If the kernels fail, the other backend is chosen. They are run even if there is a decision, since a batch of another
    size may have other kernels.

    There is no lock: a race waits for autograd's thread, and that thread may be deciding as well, in a checkpoint that
    it recomputes. Threads that decide at the same time do so independently, and the first result is kept.
    """
    other = kind.fallback
    with _generator(torch.device("cpu")).changed(), _generator(request.x.device).changed(), alone(grad=kind.training):
        try:
            _sample(request, kind, able, 2)()  # compiles and verifies the kernels
            wait_and_check(request.x.device)
            return decision or _race(request, kind, able, mode)
        except DEVICE_ERRORS:
            raise
        except (RivalFailed, RuntimeError) as error:  # a RuntimeError if kernels time out, which shows after the launch
            why = error.__cause__ or error
            if error.args[:1] == (other.value,):
                return Decision(able, f"torch's {kind.problems[0].cell.upper()} fails: {why}")
            cache.warn_once(f"backend 'auto' uses {other.value!r} for {describe(kind, request.x.device)}: {why}")
            return Decision(other, f"{FAILED}: {why}")


def _generator(device: torch.device) -> Setting:
    """Return the state of a device's random number generator, which a race changes."""
    if device not in _generators:
        cuda = device.type == "cuda"
        generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
        _generators.setdefault(device, Setting(generator.get_state, generator.set_state))
    return _generators[device]


def _is_raced(kind: Kind, able: Backend) -> bool:
    """Whether the winner is not known beforehand. On a card the reference never wins."""
    return is_compiled_once(able) or not kind.torch_lacks


def _race(request: Request, kind: Kind, able: Backend, mode: Racing) -> Decision:
    """Race kernels that are known to run. Where no race is allowed, return the expected decision."""
    device, other, expected = request.x.device, kind.fallback, expected_winner(kind, able, request.x.device)
    if mode is not Racing.ON or not _is_raced(kind, able):
        return expected
    most = cpu_rule.steps_of_a_race(kind, LONGEST) if is_compiled_once(able) else LONGEST
    try:
        rivals = {backend.value: _sample(request, kind, backend, most) for backend in (able, other)}
        rivals[other.value]()  # raises, for example, if cuDNN cannot be initialised
        times = times_of(rivals, partial(clock, device))
        raise_if_timed_out(device)  # the last launch may have timed out
    except torch.OutOfMemoryError:  # memory is too full for both; the kernels themselves were verified before
        return expected
    decision, is_certain = judge(times, expected)
    if is_certain and not is_disturbed():
        cache.write(cache.RACES, _key(kind, able, device), decision._asdict() | {"backend": decision.backend.value})
    return decision


class RivalFailed(Exception):
    """A rival raised an error, which is the cause of this one. The argument is the name of the rival."""


def build(request: Request, kind: Kind, backend: Backend) -> Route:
    """Return the route of a kind of call by a backend."""
    if backend not in KERNEL_BACKENDS:
        return Route(backend, kind.dtype)
    wide = computes_in_float32(backend, kind.dtype)
    dtype = torch.float32 if wide else kind.dtype
    schedule = schedule_of(request, dtype.itemsize)
    problems = [problem._replace(side_by_side=schedule.side_by_side, dtype=dtype) for problem in kind.problems]
    layers = [verify.verified_layer(backend, problem, request.x.device) for problem in problems]
    plain = kind.plain and backend is Backend.NUMBA  # the other backends' launches have no `inference`
    return Route(backend, kind.dtype, None, layers, schedule, plain, wide)


def _sample(request: Request, kind: Kind, backend: Backend, most: int) -> Callable[[], None]:
    """Return a function that runs the call by a backend on random data, with the weights of the call.

    The data has `most` steps at most. In training the function also runs backward.
    """
    x, traversal = request.padded()
    steps = min(request.steps, most)
    shape = x.shape if steps == request.steps else (steps, *x.shape[1:])
    # torch.rand changes the default generator. The caller restores its state.
    data = torch.rand(shape, dtype=torch.float32, device=x.device).to(x.dtype)
    data.requires_grad_(kind.training and request.x.requires_grad)
    weights = [[one.detached(kind.training) for one in layer] for layer in request.weights]
    states = [(torch.zeros_like(h), torch.zeros_like(c)) for h, c in request.states]
    options = copy.copy(request.options)
    options.backend = backend.value  # as if the user had chosen it, so that no other backend runs in its place
    sample = request._replace(
        x=data, steps=steps, states=states, weights=weights, traversal=traversal.first(steps), options=options,
        form=TIME_FIRST,
    )  # fmt: skip
    route = build(sample, kind, backend)

    def run() -> None:
        try:
            y, _ = execute(route, sample)
            if kind.training:
                inputs = [t for layer in weights for one in layer for t in one.present()] + [data] * data.requires_grad
                torch.autograd.grad(y, inputs, torch.ones_like(y))
        except DEVICE_ERRORS:
            raise
        except RuntimeError as error:
            raise RivalFailed(backend.value) from error

    return run


def _agreed(decision: Decision, key: cache.Key) -> Decision:
    """Return the decision of the rank of torch.distributed that decided first. A rank whose kernels fail keeps its own.

    The first decision is in the store of the process group, so no rank waits for another, whatever calls they make.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or decision.why.startswith(FAILED):
        return decision
    ours = json.dumps((decision.backend.value, *decision[1:]))
    backend, *rest = json.loads(default_store().compare_set(f"gpu_lstm/{json.dumps(key, sort_keys=True)}", "", ours))
    return Decision(Backend(backend), *rest)
