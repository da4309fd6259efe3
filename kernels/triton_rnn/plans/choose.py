"""The choice of a plan for a pass of a problem.

A first call compiles the first proposals, and times those that fit and are right. The fastest one is kept on disk, and
later processes take it without a measurement.
"""

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
from ...memory import Arguments
from ...ordering import in_order
from ...private import load_kernel
from ...problem import Pass, Problem, power_of_two
from ...timeouts import DEVICE_ERRORS, spare_multiprocessors
from ..features import OPTIONS
from ..parameters import in_tuples
from . import threads, tiles
from .planning import INTERPRETER, Cooperative, Held, Plan, Pointwise, Resident, Step, card_with, rank

MOST = 3  # plans that a first call compiles and times, before it falls back on the plan that always works
MOST_LONGER = 1.25  # the most rank of a plan that batch sizes share, as a multiple of the rank of the best plan
SLOW_S = 2.0  # the seconds of silence before a log line explains the wait
WARPS = 32  # the warps of a block of the empty kernel, the most that CUDA allows

FAMILIES = {
    Resident: threads.RESIDENT, Cooperative: threads.COOPERATIVE, Pointwise: tiles.POINTWISE,
    Step: tiles.STEP, Held: tiles.HELD,
}  # fmt: skip

logger = logging.getLogger("gpu_lstm")

_multiprocessors: dict[tuple[torch.device, int | None], int] = {}
"""How many multiprocessors a context has, by (device, context)."""

CURES = {  # remedies for errors of Triton, its driver and the file system, by a part of the error's message
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
    """The description of a launch that the launcher would make."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments  # tensors by the names of pointers, numbers by the names of parameters, Triton's options


@triton.jit
def empty_kernel():
    pass


def plans(problem: Problem, card: Card, backward: bool) -> list[Plan]:
    """Return the plans to try, in this order if none is measured. The plan that always works is among them."""
    found = _plans(shared(problem, card, backward), card, backward)
    return [plan.fitted(problem) if problem.batch else plan for plan in found]


def shared(problem: Problem, card: Card, backward: bool) -> Problem:
    """Return the problem for which the plans are made, so that batches of many sizes share kernels.

    It has the next power of two of sequences, unless its best plan would be much slower than the best plan for this
    batch alone.
    """
    if problem.batch in (0, most := power_of_two(problem.batch)):
        return problem
    of_all = problem._replace(batch=most)
    first, best = (_plans(p, card, backward)[0].fitted(problem) for p in (of_all, problem))
    longer = rank(problem, card, first, backward) > MOST_LONGER * rank(problem, card, best, backward)
    return problem if longer else of_all


@functools.lru_cache(256)
def _plans(problem: Problem, card: Card, backward: bool) -> Sequence[Plan]:
    """Return the plans for this batch size, in the order of `rank`."""
    head = problem.of_head
    found = [always(head, card, backward)]
    if not problem.only_by_steps:
        found += [tiles.pointwise_plan(head, backward)]
        if problem.steps > 1:  # holding W_hh on chip should pay off from the second step on
            # Where W_hh does not fit a share of the card, layers or directions run one after another on the whole card.
            cooperative = partial(threads.cooperative_plans, card=card, backward=backward, apart=problem.heads > 1)
            found += [*cooperative(head)] or cooperative(problem._replace(side_by_side=1).of_head)
            for propose in tiles.held_plans, tiles.split_plans, threads.resident_plans:
                found += propose(head, card, backward)
    order = partial(rank, problem, card, backward=backward)
    return sorted((dataclasses.replace(plan, heads=problem.heads) for plan in found), key=order)


def always(problem: Problem, card: Card, backward: bool) -> Plan:
    """Return the plan that works for every size."""
    if problem.only_by_steps:
        return tiles.pointwise_plan(problem, backward)
    return tiles.step_plan(problem, card, backward)


def card_of(device: torch.device) -> Card:
    """See contract.Launcher. Tests replace this function to simulate a card."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    card = card_with(properties)
    with torch.cuda.device(device):
        key = device, _context()
        if key not in _multiprocessors and not torch.cuda.is_current_stream_capturing():
            _multiprocessors[key] = in_order(1, device, _multiprocessors_of_context, device, properties)
    count = _multiprocessors.get(key, card.multiprocessors)
    return dataclasses.replace(card, multiprocessors=count - spare_multiprocessors(count))


def _context() -> int | None:
    """Return the driver's current context. torch and Triton have loaded the driver before."""
    context = ctypes.c_void_p()
    driver().cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def _multiprocessors_of_context(device: torch.device, properties: Any) -> int:
    """Return how many of a card's multiprocessors the current context has.

    A green context, or a client of MPS with a share of the card, has fewer. The driver refuses a cooperative grid that
    is larger than the context. So the largest grid of an empty kernel that it accepts tells the number.
    """
    count = properties.multi_processor_count
    blocks = properties.max_threads_per_multi_processor // (32 * WARPS)  # of a multiprocessor
    empty = load(empty_kernel, (1,), OPTIONS | {"num_warps": WARPS, "launch_cooperative_grid": True})

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
    """Return the plans of a pass to try. The measured plan is the first."""
    if card is INTERPRETER:
        return [always(problem, card, pass_.backward)]  # kernels written thread by thread are slow there
    measured = measured_plan(problem, card, pass_.backward)
    return sorted(plans(problem, card, pass_.backward), key=lambda plan: plan != measured)


def choose_plan(
    problem: Problem, device: torch.device, pass_: Pass, launches: Callable[[Plan], list[RecordedLaunch]],
    refuses: Callable[[Plan], str | None] | None = None, times: Times | None = None,
) -> Plan:  # fmt: skip
    """Return the best plan whose kernels compile and fit, and that is not refused. Raise NoKernel if there is none.

    launches(plan) returns the launches of a plan, and refuses(plan) the reason not to use it, or None. With `times`,
    and if no plan was measured before, the fastest of the first plans is the best. Otherwise the first one in order is.
    """
    card = card_of(device)
    tried = candidates(problem, card, pass_)
    if device.type != "cuda":
        return tried[0]
    last = always(problem, card, pass_.backward)
    tried = tried[:MOST] + [plan for plan in tried[MOST:] if plan == last]
    capturing = torch.cuda.is_current_stream_capturing()

    def identity(plan: Plan) -> tuple:  # all that decides whether a plan can be used; the batch size does not
        return problem._replace(batch=0, side_by_side=1), device, pass_, *plan.identity.values()

    def name(plan: Plan) -> str:
        return f"{plan.family.name} {plan.rows}x{plan.units}"

    if capturing:  # nothing is verified during a capture, so plans that were verified before it come first
        tried.sort(key=lambda plan: identity(plan) not in plans_in_use)
    if measured_plan(problem, card, pass_.backward) is not None:
        times = None
    layer = f"{problem.cell.upper()}, H = {problem.hidden}, {problem.dtype}"
    refused: list[str] = []
    for group in [[plan] for plan in tried] if times is None else [tried[:MOST], tried[MOST:]]:
        new = [plan for plan in group if identity(plan) not in plans_in_use]
        with _logged_if_slow(
            f"compiling {len(new)} of at most {len(tried)} plans for {layer}; Triton keeps the result"
        ):
            reasons = dict(zip(new, why_they_do_not_fit(device, [(launches(plan), plan.blocks) for plan in new])))
        for plan in new:
            if reasons[plan] is None and refuses is not None:
                kernel = FAMILIES[type(plan.family)].kernels[pass_.backward].__name__
                what = f"the trial of {kernel} for {layer}, plan {tried.index(plan) + 1} of at most {len(tried)}"
                with _logged_if_slow(f"waiting for {what}; if it hangs, end this process: the next avoids it"):
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
    """Return for each plan the reason why it does not fit, or None.

    A plan is given as its launches and its blocks of a multiprocessor. Several plans are compiled side by side.
    """
    if len(plans) < 2:  # always so in a capture, when other threads should not use the device
        return [why_it_does_not_fit(*plan) for plan in plans]
    with ThreadPoolExecutor(len(plans)) as pool:
        compiling = [pool.submit(compile_all, device, launches) for launches, _ in plans]
        return [why_it_does_not_fit(*plan, each.result) for plan, each in zip(plans, compiling)]


def why_it_does_not_fit(
    launches: Iterable[RecordedLaunch], blocks: int, compiled: Callable[[], None] = lambda: None
) -> str | None:
    """Return why launches cannot run on the current device with `blocks` on a multiprocessor, or None if they can.

    compiled() waits for another thread that compiles their kernels.
    """
    try:
        compiled()
        for kernel, grid, arguments in launches:
            loaded = load(kernel, grid, arguments)
            if loaded.n_spills:
                return f"{kernel.__name__} spills {4 * loaded.n_spills} bytes a thread"
            if blocks > 1:  # Triton only checks whether one fits
                card, shared = Card(loaded.metadata.target.arch, 1), loaded.metadata.shared
                if not card.has_room(blocks, shared):
                    return f"{blocks} blocks of {kernel.__name__} want {shared} bytes of {card.shared} each"
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # of many classes: from Triton's front end, LLVM, ptxas, the driver
        return f"{type(error).__name__}: {error}"
    return None


def compile_all(device: torch.device, launches: Iterable[RecordedLaunch]) -> None:
    """Compile kernels without loading them, since a kernel is loaded into the context of its thread."""
    with torch.cuda.device(device):  # each thread has its own current device
        for kernel, grid, arguments in launches:
            kernel.warmup(grid=grid, **in_tuples(kernel, arguments))


def load(kernel: Any, grid: tuple[int, ...], arguments: Arguments) -> Any:
    """Compile a kernel and load it on the current device. Tests replace this function to simulate a driver.

    Errors of the driver are converted by `errors_as_of_torch`. If the kernel does not compile, or if it needs more
    shared memory than a block may have, Triton raises errors of many classes.
    """
    with errors_as_of_torch():
        compiled = kernel.warmup(grid=grid, **in_tuples(kernel, arguments))
        load_kernel(compiled)
    return compiled


@contextlib.contextmanager
def errors_as_of_torch() -> Iterator[None]:
    """Convert errors of Triton's driver, which are all RuntimeErrors, to the classes that torch has for them.

    Where memory is full, the block raises an OutOfMemoryError. Where an earlier operation failed, or a CUDA graph is
    being captured, it raises an AcceleratorError.
    """
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
    """Return why this Triton cannot compile for an architecture, or None if it can. A card may be newer than ptxas."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # after an error Triton would print the whole kernel
            triton.compile(ASTSource(empty_kernel, {}), target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
    except Exception as error:  # of many classes: from LLVM, ptxas, or the folder of Triton's cache
        lines = [line for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "fatal" in line), f"{type(error).__name__}: {lines[0] if lines else ''}")
    return None


def launch_problem(device: torch.device, architecture: int) -> str | None:
    """Return why Triton cannot launch an empty kernel on a device, with a remedy, or None if it can."""
    problem = compile_problem(architecture)
    if problem is None and not torch.cuda.is_current_stream_capturing():  # older drivers load nothing in a capture
        problem = _load_problem(device)
    return problem and _with_cure(problem)


@functools.cache
def _load_problem(device: torch.device) -> str | None:
    try:
        card_of(device)  # launches an empty kernel whose programs may wait for each other
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # from the C compiler or the driver
        return str(error)
    return None


def _with_cure(problem: str) -> str:
    cure = next((cure for text, cure in CURES.items() if text in problem), None)
    return f"{problem} ({cure})" if cure else problem


@contextlib.contextmanager
def _logged_if_slow(what: str) -> Iterator[None]:
    """Log the reason of a wait if the block takes longer than SLOW_S, and again each time the wait has doubled."""
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(max(SLOW_S, time.monotonic() - start)):
            logger.warning("%s: %.0f s so far", what, time.monotonic() - start)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def measured_plan(problem: Problem, card: Card, backward: bool) -> Plan | None:
    """Return the plan that was the fastest for such problems on this card, or None if none was measured.

    The plan is read from the cache, and ignored if it is not among the proposals.
    """
    of_all = shared(problem, card, backward)
    kept = cache.read(cache.PLANS, _key(of_all, card, backward))
    return next((p.fitted(problem) for p in _plans(of_all, card, backward) if p.as_json() == kept), None)


def keep_measured(problem: Problem, card: Card, backward: bool, plan: Plan) -> None:
    """Write a measured plan to the cache, for all batch sizes that share it."""
    of_all = shared(problem, card, backward)
    kept = next(each for each in _plans(of_all, card, backward) if each.fitted(problem) == plan)
    cache.write(cache.PLANS, _key(of_all, card, backward), kept.as_json())


def _key(problem: Problem, card: Card, backward: bool) -> cache.Key:
    """Return the facts that decide which plans are proposed, and which of them is the fastest.

    The direction is not among them. Lengths and resets count only if both are there.
    """
    names = "cell", "batch", "hidden", "projected", "precision", "heads", "side_by_side", "regularised", "normalised"
    return {name: getattr(problem, name) for name in (*names, "steps")} | dict(
        sources=cache.sources("kernels"), triton=triton.__version__, card=card.name, backward=backward,
        multiprocessors=card.multiprocessors, dtype=str(problem.dtype),
        ragged=problem.lengths is not None and problem.resets,
    )  # fmt: skip
