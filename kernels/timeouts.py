"""Timeouts of kernels whose programs wait for each other.

Their waits are bounded. A kernel that times out writes the step + 1 into its error word and ends, with wrong results.
The words are in pinned host memory: reading them costs nothing, but detects a launch only when it has ended. They are
read by the next call, by backward, by a Stream, by `gpu_lstm.check`, which waits for the device first, and at exit.
"""

import atexit
import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

KERNELS = (
    "lstm_cooperative_forward_kernel",
    "lstm_cooperative_backward_kernel",
    "lstm_step_forward_kernel",
    "lstm_step_backward_kernel",
    "lstm_cooperative_forward",  # in CUDA C++
    "lstm_cooperative_backward",
)
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""RuntimeErrors that say nothing about what was run when they were raised: the caller gets them as they are."""

APART = 4  # int32 from one word to the next: 16 bytes, the alignment that kernels are compiled for
_NONE = bytes(4 * APART * len(KERNELS))  # no kernel timed out


class _Words:
    """The error words of a device."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(len(KERNELS), APART, dtype=torch.int32, pin_memory=device.type == "cuda")
        # The same memory: read at every call, which takes microseconds through the tensor.
        self.memory: Any = (ctypes.c_char * len(_NONE)).from_address(self.tensor.data_ptr())


_words: dict[torch.device, _Words] = {}  # of each device that had a launch


def error_word(device: torch.device, kernel: str) -> Tensor:
    """The word of one of the KERNELS on a device, int32 [APART], of which the first counts."""
    if device.type == "meta":  # a launch that is only recorded
        return torch.empty(APART, dtype=torch.int32, device=device)
    if device not in _words:
        _words[device] = _Words(device)
    return _words[device].tensor[KERNELS.index(kernel)]


def raise_if_timed_out(device: torch.device) -> None:
    """Raise if an earlier launch on `device`, one that has ended, timed out.

    Raises:
        RuntimeError: with the kernel, the step and the device. It is raised once.
    """
    words = _words.get(device)
    if words is None or words.memory.raw == _NONE:
        return
    found = [(k, step) for k, step in enumerate(words.tensor[:, 0].tolist()) if step]
    if not found:  # another thread was faster
        return
    for k, _ in found:  # and no others: one may be written at this moment
        words.tensor[k, 0] = 0
    texts = " and ".join(f"{KERNELS[k]} timed out at step {step - 1}" for k, step in found)
    raise RuntimeError(
        f"{texts} on {device}: its programs wait for each other, and were not all resident at once; "
        f"the results of {'that launch' if len(found) == 1 else 'those launches'} are wrong"
    )


def check() -> None:
    """Wait for every device that had a launch, and raise if one timed out.

    Raises:
        RuntimeError: as raise_if_timed_out.
    """
    for device in _words:
        _check(device)


def _check(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    raise_if_timed_out(device)


@atexit.register
def _report_at_exit() -> None:
    for device in _words:
        try:
            _check(device)
        except RuntimeError as error:
            print(f"gpu_lstm: {error}", file=sys.stderr)
