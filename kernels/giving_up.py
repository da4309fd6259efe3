"""Programs that waited in vain for each other: what a kernel writes then, and who is told.

A kernel whose programs wait for each other bounds its waiting. One that gives up writes the step + 1 into its device's
error word and ends; its results are wrong. The words lie in memory that the host reads without waiting for the device.
So looking costs nothing, but sees a launch only when it has ended: the next call looks, backward looks, a Stream looks,
`gpu_lstm.check` waits and looks, and so does the end of the interpreter.
"""

import atexit
import sys

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
APART = 4  # int32 from one word to the next: 16 bytes, as a pointer to it counts as aligned to

_words: dict[torch.device, Tensor] = {}  # int32 [kernels, APART] of each device that had a launch


def error_word(device: torch.device, kernel: str) -> Tensor:
    """The word of one of the KERNELS on a device, int32 [APART], of which the first counts."""
    if device.type == "meta":  # a launch that is only recorded
        return torch.empty(APART, dtype=torch.int32, device=device)
    if device not in _words:
        pinned = device.type == "cuda"
        _words[device] = torch.zeros(len(KERNELS), APART, dtype=torch.int32, pin_memory=pinned)
    return _words[device][KERNELS.index(kernel)]


def raise_if_gave_up(device: torch.device) -> None:
    """Raise if programs of an earlier launch on `device`, one that has ended, waited in vain for each other.

    Raises:
        RuntimeError: with the kernel, the step and the device. It is raised once.
    """
    text = _report(device)
    if text:
        raise RuntimeError(text)


def check() -> None:
    """Wait for every device that had a launch, and raise if programs on it waited in vain for each other.

    Raises:
        RuntimeError: as raise_if_gave_up.
    """
    for device in _words:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        raise_if_gave_up(device)


def _report(device: torch.device) -> str | None:
    """What happened on a device since the last look, which is then forgotten."""
    words = _words.get(device)
    if words is None:
        return None
    found = [(k, step) for k, step in enumerate(words[:, 0].tolist()) if step]
    if not found:
        return None
    for k, _ in found:  # and no others: one may be written at this moment
        words[k, 0] = 0
    told = " and ".join(f"{KERNELS[k]} gave up at step {step - 1}" for k, step in found)
    return (
        f"{told} on {device}: its programs waited in vain for each other, so that they were not all resident at once; "
        f"the results of {'that launch' if len(found) == 1 else 'those launches'} are wrong"
    )


@atexit.register
def _tell_at_exit() -> None:
    for device in _words:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        text = _report(device)
        if text:
            print(f"gpu_lstm: {text}", file=sys.stderr)
