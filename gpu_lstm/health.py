"""Whether a kernel gave up: whether its programs waited for each other in vain. That should never happen."""

import sys

import torch

_MODULE = "gpu_lstm.kernels.timeouts"  # not imported before a kernel was launched


def check() -> None:
    """Wait for the GPU, and raise if a kernel gave up, so that the results of that launch are wrong.

    The next call on that device and backward raise it, too, and it is told on stderr at the end of the program. Call
    this after a graph was replayed, or before results are kept.

    Raises:
        RuntimeError: a kernel gave up; which, where, and at which step. It is raised once.
    """
    if _MODULE in sys.modules:
        sys.modules[_MODULE].check()


def raise_if_gave_up(device: torch.device) -> None:
    """As `check` for launches on `device` that have ended, without waiting for others.

    Raises:
        RuntimeError: as check.
    """
    if _MODULE in sys.modules:
        sys.modules[_MODULE].raise_if_timed_out(device)
