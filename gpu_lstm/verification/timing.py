"""Plans of kernels, timed in turns on the present card."""

import os
import time
from math import inf
from typing import Any

import torch

from ..call.choices import Racing, requested_racing
from ..call.settings import alone
from ..kernels.contract import Prepare, Timer
from ..kernels.private import is_profiled
from ..kernels.timeouts import wait_and_check

ROUNDS = 8  # of which the fastest counts: others may be those in which another job has the card, or that load kernels


def timer() -> Timer | None:
    """`least_seconds`, where times are to be taken now, and would say something."""
    return least_seconds if requested_racing() is Racing.ON and not is_disturbed() else None


def is_disturbed() -> bool:
    """Whether the host records or waits for each launch, so that times would mislead later processes."""
    return is_profiled() or os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"


def least_seconds(
    device: torch.device, prepare: Prepare, plans: list[Any]
) -> tuple[dict[Any, float], dict[Any, RuntimeError]]:
    """See contract.Timer. A torch.OutOfMemoryError if memory is full for some plan and no other one can be timed."""
    runs: dict[Any, Any] = {}
    seconds: dict[Any, float] = dict.fromkeys(plans, inf)
    failed: dict[Any, RuntimeError] = {}
    wait_and_check(device)  # for errors of earlier launches
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
                except torch.AcceleratorError:  # of the device, which runs nothing from then on
                    raise
                except RuntimeError as error:  # it timed out, or memory is full: the others may run
                    failed[plan] = error
                    del seconds[plan]
    full = [error for error in failed.values() if isinstance(error, torch.OutOfMemoryError)]
    if full and not seconds:
        raise full[0]
    return seconds, failed
