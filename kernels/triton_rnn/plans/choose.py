"""Which plan runs a pass of a problem: the fastest of the first that compile and fit, or the one that was so before."""

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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ... import cache
from ...cards import Card, driver
from ...contract import NoKernel, Times
from ...layer import plans_in_use
from ...ordering import in_order
from ...private import load_kernel
from ...problem import Pass, Problem, power_of_two
from ...timeouts import DEVICE_ERRORS, spare_multiprocessors
from ..features import OPTIONS
from ..parameters import in_tuples
from . import threads, tiles
from .planning import INTERPRETER, Cooperative, Held, Plan, Pointwise, Resident, Step, card_with, rank

MOST = 3  # plans that a first call compiles, and times, before it falls back on the step family's
MOST_LONGER = 1.25  # a plan that batches share may have so many times the rank of the best for one of them
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
    """The plans to try, in this order, before any is timed. The one that always works is among them."""
    of_all = shared(problem, card, backward)
    found = _plans(of_all, card, backward)
    return list(found) if of_all == problem else [plan.fitted(problem) for plan in found]


def shared(problem: Problem, card: Card, backward: bool) -> Problem:
    """The problem that the plans are made for: of the next power of two of sequences, unless these promise to be much
    slower than plans for this batch alone."""
    if problem.batch in (0, most := power_of_two(problem.batch)):
        return problem
    of_all = problem._replace(batch=most)
    first, best = (_plans(p, card, backward)[0].fitted(problem) for p in (of_all, problem))
    longer = rank(problem, card, first, backward) > MOST_LONGER * rank(problem, card, best, backward)
    return problem if longer else of_all


@functools.lru_cache(256)
def _plans(problem: Problem, card: Card, backward: bool) -> Sequence[Plan]:
    """The plans for this batch alone, by `rank`."""
    head = problem.of_head
    found = [always(head, card, backward)]
    if not problem.only_by_steps:
        found += [tiles.pointwise_plan(head, backward)]
    if problem.steps > 1 and not problem.only_by_steps:  # holding W_hh on chip pays off from the second step on
        # Where W_hh does not fit a share of the card, layers or directions run one after another, on all of it.
        alone = problem._replace(side_by_side=1).of_head
        apart = problem.heads > 1
        found += [*threads.cooperative_plans(head, card, backward, apart)] or threads.cooperative_plans(
            alone, card, backward, apart
        )
        found += [*tiles.held_plans(head, card, backward), *tiles.split_plans(head, card, backward)]
        found += threads.resident_plans(head, card, backward)
    order = partial(rank, problem, card, backward=backward)
    return sorted((dataclasses.replace(plan, heads=problem.heads) for plan in found), key=order)


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
    measured = measured_plan(problem, card, pass_.backward)
    return sorted(plans(problem, card, pass_.backward), key=lambda plan: plan != measured)


def choose_plan(
    problem: Problem, device: torch.device, pass_: Pass, launches: Callable[[Plan], list[RecordedLaunch]],
    refuses: Callable[[Plan], str | None] | None = None, times: Times | None = None,
) -> Plan:  # fmt: skip
    """The best plan whose kernels, launches(plan), compile and fit, and for which refuses(plan) has no reason to refuse
    it: the fastest by `times` of the first ones, unless one was measured before. NoKernel if there is none."""
    card = card_of(device)
    tried = candidates(problem, card, pass_)
    if device.type != "cuda":
        return tried[0]
    last = always(problem, card, pass_.backward)
    tried = tried[:MOST] + [plan for plan in tried[MOST:] if plan == last]
    capturing = torch.cuda.is_current_stream_capturing()

    def identity(plan: Plan) -> tuple:  # what decides whether a plan can be used: all but how many sequences there are
        return problem._replace(batch=0, side_by_side=1), device, pass_, *plan.identity.values()

    def name(plan: Plan) -> str:
        return f"{plan.family.name} {plan.rows}x{plan.units}"

    if capturing:  # when nothing is verified
        tried.sort(key=lambda plan: identity(plan) not in plans_in_use)
    if measured_plan(problem, card, pass_.backward) is not None:
        times = None
    layer = f"{problem.cell.upper()}, H = {problem.hidden}, {problem.dtype}"
    refused: list[str] = []
    for group in [[plan] for plan in tried] if times is None else [tried[:MOST], tried[MOST:]]:
        new = [plan for plan in group if identity(plan) not in plans_in_use]
        found = [FAMILIES[type(plan.family)].kernels[pass_.backward].__name__ for plan in new]
        with _told_if_slow(f"compiling {len(new)} of at most {len(tried)} plans for {layer}; Triton keeps the result"):
            reasons = dict(zip(new, why_they_do_not_fit(device, [(launches(plan), plan.blocks) for plan in new])))
        for kernel, plan in zip(found, new):
            what = f"the trial of {kernel} for {layer}, plan {tried.index(plan) + 1} of at most {len(tried)}"
            if reasons[plan] is None and refuses is not None:
                with _told_if_slow(f"waiting for {what}; if it hangs, end this process: the next avoids it"):
                    reasons[plan] = refuses(plan)
        right = [plan for plan in group if reasons.get(plan) is None]
        if times is not None and len(right) > 1:
            seconds, failed = times(right)
            reasons |= {plan: f"{type(error).__name__}: {error}" for plan, error in failed.items()}
            right = sorted(seconds, key=seconds.__getitem__)
            logger.info("%s: %s", layer, ", ".join(f"{name(plan)} {seconds[plan] * 1e3:.3g} ms" for plan in right))
            if not failed:
                keep_measured(problem, card, pass_.backward, right[0])
        for plan, reason in reasons.items():
            if reason is not None:
                refused.append(f"{name(plan)}: {reason}")
                logger.info("a plan does not fit: %s", refused[-1])
        if right:
            plans_in_use.update(() if capturing else map(identity, right))
            return right[0]
    raise NoKernel(_with_cure(f"no Triton kernel can run this layer on this card: {'; '.join(refused)}"))


def why_they_do_not_fit(device: torch.device, plans: Sequence[tuple[list[RecordedLaunch], int]]) -> list[str | None]:
    """Why each plan, of launches and blocks, does not fit, or None. Kernels of several are compiled side by side."""
    if len(plans) < 2:
        return [why_it_does_not_fit(*plan) for plan in plans]
    with ThreadPoolExecutor(len(plans)) as pool:
        compiling = [pool.submit(compile_all, device, launches) for launches, _ in plans]
        return [why_it_does_not_fit(*plan, each.result) for plan, each in zip(plans, compiling)]


def why_it_does_not_fit(
    launches: Iterable[RecordedLaunch], blocks: int, compiled: Callable[[], None] = lambda: None
) -> str | None:
    """Why launches cannot run on the current device, `blocks` at once on a multiprocessor; None if they can.

    compiled() waits for another thread that compiles them.
    """
    try:
        compiled()
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


def compile_all(device: torch.device, launches: Iterable[RecordedLaunch]) -> None:
    """Compile kernels, which does not load them: contexts are a thread's own."""
    with torch.cuda.device(device):  # the thread's, too
        for kernel, grid, arguments in launches:
            kernel.warmup(grid=grid, **in_tuples(kernel, arguments))


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


def measured_plan(problem: Problem, card: Card, backward: bool) -> Plan | None:
    """The plan that was the fastest for problems like this on this card; None if none was measured. Whatever a file
    says, only a proposed plan is one."""
    of_all = shared(problem, card, backward)
    if (kept := cache.read(cache.PLANS, _key(of_all, card, backward))) is None:
        return None
    return next((p.fitted(problem) for p in _plans(of_all, card, backward) if p.as_json() == kept), None)


def keep_measured(problem: Problem, card: Card, backward: bool, plan: Plan) -> None:
    """Write a measured plan to the cache, for all batches that share it."""
    of_all = shared(problem, card, backward)
    kept = next(each for each in _plans(of_all, card, backward) if each.fitted(problem) == plan)
    cache.write(cache.PLANS, _key(of_all, card, backward), kept.as_json())


def _key(problem: Problem, card: Card, backward: bool) -> cache.Key:
    """What decides which plans there are, and which is the fastest: not the direction, lengths or resets alone."""
    return dict(
        sources=cache.sources("kernels"), triton=triton.__version__, card=card.name,
        multiprocessors=card.multiprocessors, cell=problem.cell, batch=problem.batch, hidden=problem.hidden,
        projected=problem.projected, dtype=str(problem.dtype), precision=problem.precision,
        heads=problem.heads, side_by_side=problem.side_by_side, regularised=problem.regularised,
        normalised=problem.normalised, backward=backward, steps=problem.steps,
        ragged=problem.lengths is not None and problem.resets,
    )  # fmt: skip
