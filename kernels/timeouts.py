"""Timeouts of kernels whose programs wait for each other.

A kernel that times out writes the step + 1 into its error word and ends. Error words are in pinned host memory. So the
host reads them without waiting for the device, but it sees a timeout only after the launch has ended.
"""

import atexit
import contextlib
import ctypes
import os
import sys
import threading
from math import inf
from typing import Any

import torch
from torch import Tensor

from . import cache

DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""RuntimeErrors that say nothing about the kernel that was running when they were raised."""

# Environment variables: about how many seconds programs wait, and how many multiprocessors plans leave to other
# kernels.
TIMEOUT, SPARE = "GPU_LSTM_TIMEOUT", "GPU_LSTM_SPARE_MULTIPROCESSORS"
SECONDS = 120.0  # so long because NCCL's kernels may hold multiprocessors while they wait for a slow rank
SECONDS_OF_TRIALS = 1.0
POLLS_A_SECOND = 4_000_000  # a poll takes an estimated 0.2 to 0.35 us
APART = 4  # int32 from one word to the next, so that each is aligned to 16 bytes, as kernels assume
MOST_KERNELS = 8  # the most kernels with words on a device, whose pinned memory is allocated once


class _Words:
    """The error words of a device.

    A kernel has one for users' calls and one for trials, each followed by a poll limit.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.zeros(
                2, MOST_KERNELS, APART, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
            )
            for words, seconds in zip(self.tensor, (timeout_seconds(), SECONDS_OF_TRIALS)):
                words[:, 1] = min(max(1, int(seconds * POLLS_A_SECOND)), 2**31 - 1)
        # The same memory as an array of ctypes. Every call reads it, and reading the tensor would take microseconds.
        self.memory: Any = (ctypes.c_int32 * self.tensor.numel()).from_address(self.tensor.data_ptr())
        self.process = os.getpid()
        self.none = bytes(self.memory)  # its content while no kernel has timed out
        self.kernels: list[str] = []  # the kernels that have words, in the order of the words

    def of(self, kernel: str, trial: bool = False) -> Tensor:
        """See `error_word`."""
        with _giving_out:
            if kernel not in self.kernels:
                self.kernels.append(kernel)
        return self.tensor[int(trial), self.kernels.index(kernel)]


_words: dict[torch.device, _Words] = {}  # of all devices that had a launch
_giving_out = threading.Lock()


def timeout_seconds() -> float:
    """Return the seconds that the programs of a launch wait for each other.

    Raises:
        ValueError: the environment variable is not a number of seconds above 0.
    """
    text = os.environ.get(TIMEOUT) or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < inf:
            return seconds
    raise ValueError(f"expected a number of seconds above 0 in the environment variable {TIMEOUT}, got {text!r}")


def spare_multiprocessors(count: int) -> int:
    """Return how many of a card's `count` multiprocessors plans leave to other kernels.

    Blocks of other kernels may hold a multiprocessor for a long time. The environment variable says how many are left.
    Without it, NCCL gets an eighth of them if torch.distributed has several ranks.

    Raises:
        ValueError: the environment variable is not a number below `count`.
    """
    global _whole_card
    text = os.environ.get(SPARE)
    if not text:
        several = _several_ranks()
        _whole_card |= count > 0 and not several and torch.distributed.is_available()
        return count // 8 if several else 0
    if not text.isdecimal() or int(text) >= count:
        raise ValueError(f"expected a number below {count} in the environment variable {SPARE}, got {text!r}")
    return int(text)


_whole_card = False  # whether a plan may use the whole card, because there was one rank when it was made


def _several_ranks() -> bool:
    d = torch.distributed
    return d.is_available() and d.is_initialized() and d.get_world_size() > 1


def error_word(device: torch.device, kernel: str, trial: bool = False) -> Tensor:
    """Return the error word of a kernel on a device, for users' calls or for a `trial`.

    It is an int32 [APART]: the step + 1 at which the kernel timed out, then the most polls of a wait.
    """
    if device.type == "meta":  # a launch that is only recorded
        return torch.empty(APART, dtype=torch.int32, device=device)
    if device not in _words:
        _words.setdefault(device, _Words(device))  # never replaced, since a kernel may have the words that are there
    return _words[device].of(kernel, trial)


def raise_if_timed_out(device: torch.device) -> None:
    """Raise if a launch on `device` that has ended timed out. Each timeout is raised once.

    Raises:
        RuntimeError: with the kernel, the step and the device.
    """
    global _whole_card
    if _whole_card and _several_ranks():
        _whole_card = False  # plans that are in use stay, since graphs and saved tensors hold them
        cache.warn_once(
            "kernels were chosen for the whole card before torch.distributed had several ranks, and leave none of it "
            f"to those of NCCL: call init_process_group before the first call of a layer, or set {SPARE}"
        )
    words = _words.get(device)
    if words is None or bytes(words.memory) == words.none:
        return
    timeouts = []
    for place, step in enumerate(words.memory[::APART]):  # of users' calls, then of trials
        if step:
            words.memory[place * APART] = 0  # only this word, since a kernel may be writing another one
            timeouts.append(f"{words.kernels[place % MOST_KERNELS]} timed out at step {step - 1}")
    if timeouts:  # none are left if another thread has read them before
        raise RuntimeError(
            f"{' and '.join(sorted(timeouts))} on {device}: its programs wait for each other, and were not all "
            "resident at once; the results of that launch, and of all launches since, are wrong. If other kernels hold "
            f"the card for long, {TIMEOUT} (seconds, now {timeout_seconds():g}) and {SPARE} in the environment help"
        )


def check() -> None:
    """Wait for every device that had a launch, and raise if one timed out.

    Raises:
        RuntimeError: with the kernel, the step and the device.
    """
    for device in list(_words):
        wait_and_check(device)


def wait_and_check(device: torch.device) -> None:
    """Do the same as `check` for one device. Other errors of the device are raised, too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    raise_if_timed_out(device)


@atexit.register
def _report_at_exit() -> None:
    for device, words in _words.items():
        if words.process != os.getpid():  # in a forked child, since the parent reports it
            continue
        # Do not wait: a kernel of NCCL whose peer is gone never ends. A launch that still runs has no results.
        try:
            raise_if_timed_out(device)
        except RuntimeError as error:
            print(f"gpu_lstm: {error}", file=sys.stderr)
