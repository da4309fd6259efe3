"""Which of the plans of a call its card can take: the kernels are compiled with the call's own arguments, and loaded.

What is compiled here is what is launched afterwards: Triton keeps it.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .planning import Launch, Plan

MOST = 3  # plans that a first call compiles, before it takes the one that comes last
SLOW_S = 2.0  # after which a log line says what is going on

logger = logging.getLogger("gpu_lstm")

Attempt = Callable[[Plan, Launch], object]
"""attempt(plan, launch): the call by a plan, with `launch` in the place of every launch."""


class DoesNotFit(Exception):
    """A kernel compiles to more than a thread or a block may have."""


def first_that_fits(plans: Sequence[Plan], attempt: Attempt, distrust: Callable[[Plan], str | None] | None) -> Plan:
    """The first of a call's plans whose kernels compile without spills, load on the current device, and are trusted.

    Raises:
        RuntimeError: none does, and why not.
    """
    *proposed, last = plans
    with _a_line_if_it_takes_long():
        refused = []
        for plan in (*proposed[:MOST], last):
            reason = obstacle(plan, attempt)
            if reason is None and distrust is not None:
                reason = distrust(plan)
            if reason is None:
                return plan
            refused.append(f"{plan.family.value} {plan.rows}x{plan.columns}: {reason}")
            logger.info("a plan does not fit: %s", refused[-1])
    raise RuntimeError(f"no Triton kernel can run this layer on this card: {'; '.join(refused)}")


def obstacle(plan: Plan, attempt: Attempt) -> str | None:
    """Why a plan cannot run a call; None if it can."""
    compiled: set[str] = set()

    def prepare(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if kernel.__name__ not in compiled:  # a family may launch one kernel many times
            compiled.add(kernel.__name__)
            load(kernel, grid, arguments)

    try:
        attempt(plan, prepare)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: from Triton's front end, LLVM, ptxas, the driver
        return f"{type(error).__name__}: {error}"
    return None


def load(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Compile and load a kernel for the current device: the seam at which a test can be a driver.

    Raises:
        DoesNotFit: it spills.
        Exception: it cannot be compiled, or takes more shared memory than a block may have.
    """
    binary = kernel.warmup(grid=grid, **arguments)
    binary._init_handles()
    if binary.n_spills:
        raise DoesNotFit(f"{kernel.__name__} spills {4 * binary.n_spills} bytes a thread")


@contextlib.contextmanager
def _a_line_if_it_takes_long() -> Iterator[None]:
    """Kernels take seconds to compile, once for a kind of layer: somebody who waits wants to know."""
    text = "compiling the kernels of a layer; this happens once for each kind of layer, and Triton keeps the result"
    timer = threading.Timer(SLOW_S, logger.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
