"""The timing of plans: their kernels run in turns on the present card."""

import os
import time
from math import inf
from typing import Any

import torch

from ..call.choices import Racing, requested_racing
from ..call.isolation import alone
from ..kernels.contract import Prepare, Timed, Timer
from ..kernels.private import is_profiled
from ..kernels.timeouts import wait_and_check

ROUNDS = 8  # the fastest counts: in the others, another job may hold the card, or kernels may be loaded


def timer() -> Timer | None:
    """Return `least_seconds` if plans may be timed now and the times would be meaningful, else None."""
    return least_seconds if requested_racing() is Racing.ON and not is_disturbed() else None


def is_disturbed() -> bool:
    """Whether a profiler records each launch, or the host waits for it. Such times would mislead later processes."""
    return is_profiled() or os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"


def least_seconds(device: torch.device, prepare: Prepare, plans: list[Any]) -> Timed:
    """Time the plans, see contract.Timer.

    Raises:
        torch.OutOfMemoryError: every plan fails, and at least one of them because memory is full.
    """
    runs: dict[Any, Any] = {}
    seconds: dict[Any, float] = dict.fromkeys(plans, inf)
    failed: dict[Any, RuntimeError] = {}
    wait_and_check(device)  # raises errors of earlier launches
    with alone(grad=False), torch.autocast(device.type, enabled=False):
        for _ in range(ROUNDS):
            for plan in list(seconds):
                try:
                    run = runs.get(plan) or runs.setdefault(plan, prepare(plan))
                    wait_and_check(device)
                    start = time.perf_counter()
                    run()
                    wait_and_check(device)
                    seconds[plan] = min(seconds[plan], time.perf_counter() - start)
                except torch.AcceleratorError:  # the device failed, and runs nothing from now on
                    raise
                except RuntimeError as error:  # it timed out, or memory is full: other plans may run
                    failed[plan] = error
                    del seconds[plan]
    full = [error for error in failed.values() if isinstance(error, torch.OutOfMemoryError)]
    if full and not seconds:
        raise full[0]
    return seconds, failed
