"""Timeouts of kernels whose programs wait for each other.

A kernel that times out writes the step + 1 into its error word and ends. Error words are in pinned host memory: to read
one costs nothing, but a timeout shows only after the launch has ended.
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
"""RuntimeErrors that say nothing about what was run when they were raised."""

# Environment variables: about how many seconds programs wait, how many multiprocessors plans leave to other kernels.
TIMEOUT, SPARE = "GPU_LSTM_TIMEOUT", "GPU_LSTM_SPARE_MULTIPROCESSORS"
SECONDS = 120.0  # NCCL's kernels may hold multiprocessors as long, while they wait for a slow rank
SECONDS_OF_TRIALS = 1.0
POLLS_A_SECOND = 4_000_000  # a poll takes an estimated 0.2 to 0.35 us
APART = 4  # int32 from one word to the next: 16 bytes, the alignment that kernels are compiled for
MOST_KERNELS = 8  # that have words on a device; it is pinned memory, which stays where it is


class _Words:
    """The error words of a device, for users' calls and for trials, each followed by its poll limit."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            size = 2, MOST_KERNELS, APART
            self.tensor = torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
            for words, seconds in zip(self.tensor, (timeout_seconds(), SECONDS_OF_TRIALS)):
                words[:, 1] = min(max(1, int(seconds * POLLS_A_SECOND)), 2**31 - 1)
        # The same memory, since it is read at every call, and reading the tensor would take microseconds.
        self.memory: Any = (ctypes.c_int32 * self.tensor.numel()).from_address(self.tensor.data_ptr())
        self.as_bytes: Any = (ctypes.c_char * self.tensor.nbytes).from_address(self.tensor.data_ptr())
        self.process = os.getpid()
        self.none = self.as_bytes.raw  # their value while no kernel has timed out
        self.kernels: list[str] = []  # that have the first words

    def of(self, kernel: str, trial: bool = False) -> Tensor:
        """See error_word."""
        with _giving_out:
            if kernel not in self.kernels:
                self.kernels.append(kernel)
        return self.tensor[int(trial), self.kernels.index(kernel)]


_words: dict[torch.device, _Words] = {}  # of each device that had a launch
_giving_out = threading.Lock()


def timeout_seconds() -> float:
    """Seconds that the programs of a launch wait for each other, by the environment: a ValueError if that is wrong."""
    text = os.environ.get(TIMEOUT) or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < inf:
            return seconds
    raise ValueError(f"expected a number of seconds above 0 in the environment variable {TIMEOUT}, got {text!r}")


def spare_multiprocessors(count: int) -> int:
    """How many of a card's multiprocessors plans leave to other kernels, whose blocks may hold them for a long time: by
    the environment, a ValueError if that is wrong; else an eighth where torch.distributed has several ranks, for NCCL.
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


_whole_card = False  # whether a plan may use all of it, since there was one rank when it was made


def _several_ranks() -> bool:
    d = torch.distributed
    return d.is_available() and d.is_initialized() and d.get_world_size() > 1


def error_word(device: torch.device, kernel: str, trial: bool = False) -> Tensor:
    """A kernel's int32 [APART] on a device, for users' calls or a `trial`: the error, how many polls a wait takes."""
    if device.type == "meta":  # a launch that is only recorded
        return torch.empty(APART, dtype=torch.int32, device=device)
    if device not in _words:
        _words.setdefault(device, _Words(device))  # not replaced: another thread may have passed it to a kernel
    return _words[device].of(kernel, trial)


def raise_if_timed_out(device: torch.device) -> None:
    """Raise a RuntimeError, once, if a launch on `device` that has ended timed out: with kernel, step and device."""
    global _whole_card
    if _whole_card and _several_ranks():
        _whole_card = False  # plans that are in use keep theirs: graphs and saved tensors hold them
        cache.warn_once(
            "kernels were chosen for the whole card before torch.distributed had several ranks, and leave none of it "
            f"to those of NCCL: call init_process_group before the first call of a layer, or set {SPARE}"
        )
    words = _words.get(device)
    if words is None or words.as_bytes.raw == words.none:
        return
    timeouts = []
    for place, kernel in enumerate(words.kernels[:MOST_KERNELS]):
        for n in place * APART, (MOST_KERNELS + place) * APART:
            if step := words.memory[n]:
                words.memory[n] = 0  # and no others: one may be written at this moment
                timeouts.append(f"{kernel} timed out at step {step - 1}")
    if timeouts:  # else another thread was faster
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
    """As `check`, for one device; its other errors are raised, too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    raise_if_timed_out(device)


@atexit.register
def _report_at_exit() -> None:
    for device, words in _words.items():
        if words.process != os.getpid():  # a forked child, whose parent reports it
            continue
        # Without waiting: a kernel of NCCL whose peer is gone never ends. A launch that still runs has no results.
        try:
            raise_if_timed_out(device)
        except RuntimeError as error:
            print(f"gpu_lstm: {error}", file=sys.stderr)
