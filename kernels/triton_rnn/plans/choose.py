"""Which plan runs a pass of a problem: the first that compiles and fits, of those proposed or measured."""

import bisect
import contextlib
import ctypes
import dataclasses
import functools
import io
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ... import cache
from ...cards import Card, driver
from ...contract import NoKernel
from ...layer import plans_in_use
from ...ordering import in_order
from ...private import load_kernel
from ...problem import Pass, Problem, power_of_two
from ...timeouts import DEVICE_ERRORS, spare_multiprocessors
from ..features import OPTIONS
from ..parameters import in_tuples
from . import threads, tiles
from .planning import INTERPRETER, Cooperative, Held, Plan, Pointwise, Resident, Step, card_with, expected_seconds

MOST = 3  # plans that a first call compiles before it falls back on the step family's
MOST_LONGER = 1.25  # a plan that batches share may take so many times the estimated time of the best for one of them
SLOW_S = 2.0  # after which a log line says what a user waits for
EMPTY = OPTIONS | {"num_warps": 32, "launch_cooperative_grid": True}  # of the empty kernel: the most threads of a block

FAMILIES = {
    Resident: threads.RESIDENT, Cooperative: threads.COOPERATIVE, Pointwise: tiles.POINTWISE,
    Step: tiles.STEP, Held: tiles.HELD,
}  # fmt: skip

logger = logging.getLogger("gpu_lstm")

_multiprocessors: dict[tuple[torch.device, int | None], int] = {}
"""Of each context that planned for a device."""

CURES = {  # remedies for errors of Triton, its driver and the file system, by a part of the message
    "C compiler": "Triton builds its launchers with a C compiler: install gcc, or name one in CC",
    "non-zero exit status": "Triton builds its launchers with Python's headers: install python3-dev",
    "kernel image": "the driver is older than what this Triton compiles for: use a newer driver, or an older Triton",
    "operation not supported": "the kernels need cooperative launches, which this driver refuses",
    "unsupported toolchain": "the driver is older than this Triton: use a newer driver, or an older Triton",
    **dict.fromkeys(
        ("Permission denied", "Read-only file system", "No space left", "Disk quota exceeded"),
        "Triton keeps kernels in ~/.triton: name a folder that can be written in TRITON_CACHE_DIR",
    ),
}


class RecordedLaunch(NamedTuple):
    """One kernel launch as the launcher would make it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters, and Triton's options


@triton.jit
def empty_kernel():
    pass


def plans(problem: Problem, card: Card, backward: bool) -> list[Plan]:
    """The plans to try, in this order, before any is measured. The one that always works is among them.

    They are made for the next power of two of sequences, or for this batch alone, if that is estimated much faster.
    """
    alone = _plans(problem, card, backward)
    if problem.batch in (0, most := power_of_two(problem.batch)):
        return list(alone)
    shared = [plan.fitted(problem) for plan in _plans(problem._replace(batch=most), card, backward)]
    seconds, best = (expected_seconds(problem, card, each[0], backward) for each in (shared, alone))
    return shared if seconds <= MOST_LONGER * best else list(alone)


@functools.lru_cache(256)
def _plans(problem: Problem, card: Card, backward: bool) -> Sequence[Plan]:
    """The plans for this batch alone, by estimated time."""
    seconds, head = partial(expected_seconds, problem, card, backward=backward), problem.of_head
    found, by_product = [always(head, card, backward)], tiles.pointwise_plan(head, backward)
    if seconds(by_product) < seconds(found[0]):
        found += [by_product]
    if problem.steps > 1 and not problem.only_by_steps:  # holding W_hh on chip pays off from the second step on
        # Where W_hh does not fit a share of the card, layers or directions run one after another, on all of it.
        alone = problem._replace(side_by_side=1).of_head
        apart = problem.heads > 1
        found += [*threads.cooperative_plans(head, card, backward, apart)] or threads.cooperative_plans(
            alone, card, backward, apart
        )
        found += [*tiles.held_plans(head, card, backward), *tiles.split_plans(head, card, backward)]
        found += threads.resident_plans(head, card, backward)
    return sorted((dataclasses.replace(plan, heads=problem.heads) for plan in found), key=seconds)


def always(problem: Problem, card: Card, backward: bool) -> Plan:
    """The plan that works for every size."""
    if problem.only_by_steps:
        return tiles.pointwise_plan(problem, backward)
    return tiles.step_plan(problem, card, backward)


def card_of(device: torch.device) -> Card:
    """See layer.Launcher. Tests replace it to simulate a card."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    card, count = card_with(properties), properties.multi_processor_count
    with torch.cuda.device(device):
        key = device, _context()
        if key not in _multiprocessors and not torch.cuda.is_current_stream_capturing():
            of_all = device, count, properties.max_threads_per_multi_processor
            _multiprocessors[key] = in_order(1, device, _multiprocessors_of_context, *of_all)
    count = _multiprocessors.get(key, count)
    return dataclasses.replace(card, multiprocessors=count - spare_multiprocessors(count))


def _context() -> int | None:
    """The driver's current context. torch and Triton have loaded the driver."""
    context = ctypes.c_void_p()
    driver().cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def _multiprocessors_of_context(device: torch.device, count: int, threads: int) -> int:
    """How many of a card's multiprocessors the current context has: fewer in a green context, or with a share of MPS.
    So many blocks are in the largest cooperative grid of an empty kernel that the driver accepts."""
    blocks = threads // (32 * EMPTY["num_warps"])  # of a multiprocessor
    empty = load(empty_kernel, (1,), EMPTY)

    def is_too_large(multiprocessors: int) -> bool:
        try:
            with errors_as_of_torch():
                empty[(multiprocessors * blocks, 1, 1)]()
            return False
        except RuntimeError as error:
            if "too many blocks" not in str(error):
                raise
            return True

    if not is_too_large(count):
        return count
    largest = max(1, bisect.bisect(range(1, count), False, key=is_too_large))
    cache.warn_once(f"kernels use {largest} of the {count} multiprocessors of {device}: the context has no more")
    return largest


def candidates(problem: Problem, card: Card, pass_: Pass) -> list[Plan]:
    """The plans of a pass to try, the measured one first."""
    if card is INTERPRETER:
        return [always(problem, card, pass_.backward)]  # others are written thread by thread: slow there
    measured, proposed = measured_plan(problem, card, pass_.backward), plans(problem, card, pass_.backward)
    # Whatever a file says, only a proposed and verified plan runs.
    return [plan for plan in proposed if measured and plan.as_json() == measured] + proposed


def choose_plan(
    problem: Problem, device: torch.device, pass_: Pass, launches: Callable[[Plan], Iterable[RecordedLaunch]],
    refuses: Callable[[Plan], str | None] | None = None,
) -> Plan:  # fmt: skip
    """The best plan whose kernels, launches(plan), compile and fit, and for which refuses(plan) has no reason to refuse
    it. NoKernel if there is none."""
    card = card_of(device)
    proposed = candidates(problem, card, pass_)
    if device.type != "cuda":
        return proposed[0]
    last = always(problem, card, pass_.backward)
    tried = [*proposed[:MOST], *(plan for plan in proposed[MOST:] if plan == last)]
    capturing, refused = torch.cuda.is_current_stream_capturing(), []

    def identity(plan: Plan) -> tuple:  # what decides whether a plan can be used: all but how many sequences there are
        return problem._replace(batch=0, side_by_side=1), device, pass_, *plan.identity.values()

    if capturing:  # when nothing is verified
        tried.sort(key=lambda plan: identity(plan) not in plans_in_use)
    for number, plan in enumerate(tried, start=1):
        if (key := identity(plan)) in plans_in_use:
            return plan
        kernel = FAMILIES[type(plan.family)].kernels[pass_.backward].__name__
        layer = f"{problem.cell.upper()}, H = {problem.hidden}, {problem.dtype}"
        what = f"{kernel} for {layer}, plan {number} of at most {len(tried)}"
        with _told_if_slow(f"compiling {what}; Triton keeps the result"):
            reason = why_it_does_not_fit(launches(plan), plan.blocks)
        if reason is None and refuses is not None:
            with _told_if_slow(f"waiting for the trial of {what}; if it hangs, end this process: the next avoids it"):
                reason = refuses(plan)
        if reason is None:
            if not capturing:
                plans_in_use.add(key)
            return plan
        refused.append(f"{plan.family.name} {plan.rows}x{plan.units}: {reason}")
        logger.info("a plan does not fit: %s", refused[-1])
    raise NoKernel(_with_cure(f"no Triton kernel can run this layer on this card: {'; '.join(refused)}"))


def why_it_does_not_fit(launches: Iterable[RecordedLaunch], blocks: int) -> str | None:
    """Why launches cannot run on the current device, `blocks` at once on a multiprocessor; None if they can."""
    try:
        for kernel, grid, arguments in launches:
            loaded = load(kernel, grid, arguments)
            if loaded.n_spills:
                return f"{kernel.__name__} spills {4 * loaded.n_spills} bytes a thread"
            if blocks > 1:  # Triton only looks whether one fits
                card, shared = Card(loaded.metadata.target.arch, 1), loaded.metadata.shared
                if not card.has_room(blocks, shared):
                    return f"{blocks} blocks of {kernel.__name__} want {shared} bytes of {card.shared} each"
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # of many kinds: from Triton's front end, LLVM, ptxas, the driver
        return f"{type(error).__name__}: {error}"
    return None


def load(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Any:
    """A kernel, compiled and loaded on the current device. Tests replace it to simulate a driver. Errors are those of
    errors_as_of_torch, or of any kind if it does not compile, or a block may not have so much shared memory."""
    with errors_as_of_torch():
        compiled = kernel.warmup(grid=grid, **in_tuples(kernel, arguments))
        load_kernel(compiled)
    return compiled


@contextlib.contextmanager
def errors_as_of_torch() -> Iterator[None]:
    """Around calls of Triton's driver, whose errors are all RuntimeErrors: where memory is full an OutOfMemoryError;
    where an earlier operation failed, or a CUDA graph is being captured, an AcceleratorError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        if torch.cuda.is_current_stream_capturing():
            text = "while a CUDA graph is captured; call the layer once before the capture, which loads its kernels"
            raise torch.AcceleratorError(f"{error}, {text}") from error
        torch.cuda.synchronize()
        raise


@functools.cache
def compile_problem(architecture: int) -> str | None:
    """Why this Triton cannot compile for an architecture, which may be newer than its ptxas; None if it can."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton would print the whole kernel
            triton.compile(ASTSource(empty_kernel, {}), target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
    except Exception as error:  # of many kinds: from LLVM, ptxas, or the folder of Triton's cache
        lines = [line for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "fatal" in line), f"{type(error).__name__}: {lines[0] if lines else ''}")
    return None


def launch_problem(device: torch.device, architecture: int) -> str | None:
    """Why Triton cannot launch kernels on a device, and what helps; None if it can, as far as an empty kernel shows."""
    problem = compile_problem(architecture)
    if problem is None and not torch.cuda.is_current_stream_capturing():  # when older drivers load nothing
        problem = _load_problem(device)
    return problem and _with_cure(problem)


@functools.cache
def _load_problem(device: torch.device) -> str | None:
    try:
        card_of(device)  # which launches an empty kernel whose programs may wait for each other
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # from the C compiler or the driver
        return str(error)
    return None


def _with_cure(problem: str) -> str:
    cure = next((cure for text, cure in CURES.items() if text in problem), None)
    return f"{problem} ({cure})" if cure else problem


@contextlib.contextmanager
def _told_if_slow(what: str) -> Iterator[None]:
    """Log what a user waits for after SLOW_S, and again whenever it has taken twice as long."""
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        seconds = 0.0
        while not ended.wait(max(SLOW_S, seconds)):
            seconds = time.monotonic() - start
            logger.warning("%s: %.0f s so far", what, seconds)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def measured_plan(problem: Problem, card: Card, backward: bool) -> dict[str, Any] | None:
    """The plan that was fastest for problems like this on this card, as JSON; None if none was measured."""
    return cache.read(cache.PLANS, _key(problem, card, backward))


def keep_measured(problem: Problem, card: Card, backward: bool, plan: Plan) -> None:
    """Write a measured plan to the cache."""
    cache.write(cache.PLANS, _key(problem, card, backward), plan.as_json())


def _key(problem: Problem, card: Card, backward: bool) -> cache.Key:
    """What decides which plan is fastest: not the direction, lengths, resets and the like."""
    return dict(
        sources=cache.sources("kernels"), triton=triton.__version__, card=card.name,
        multiprocessors=card.multiprocessors, cell=problem.cell, batch=problem.batch, hidden=problem.hidden,
        projected=problem.projected, dtype=str(problem.dtype), precision=problem.precision,
        heads=problem.heads, side_by_side=problem.side_by_side, regularised=problem.regularised,
        normalised=problem.normalised, backward=backward,
    )  # fmt: skip
