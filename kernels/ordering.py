"""Launches whose programs wait for each other: they run at once only if they were planned to share the card.

Two of them, each holding half the card, would wait for ever. In a graph that is being captured all work goes to one
stream.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

R = TypeVar("R")


@dataclass
class _Launched:
    """The latest launches on a device, which share it."""

    at_once: int  # streams that they were planned for
    streams: dict[Any, Any] = field(default_factory=dict)  # each with an event after its launches; None: not recorded
    before: list[Any] | None = None  # events that they waited for; None: they are the first, and record none
    lock: Any = field(default_factory=threading.RLock)  # no other thread launches between waiting and recording


# All copies of the library in this process share it: Hugging Face's `kernels` loads one, and a reload leaves one.
# Raise the number when the fields of _Launched change: copies with two numbers do not know each other's launches.
_launched: dict[torch.device, _Launched] = vars(torch.cuda).setdefault("_gpu_lstm_launched_2", {})


def in_order(at_once: int, device: torch.device, launch: Callable[..., R], *arguments: Any) -> R:
    """launch(*arguments) on the current stream, as one of `at_once` that share the card, after all others."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return launch(*arguments)
    latest = _launched.get(device) or _launched.setdefault(device, _Launched(at_once))
    stream = torch.cuda.current_stream(device)
    with latest.lock:
        if at_once != latest.at_once or len(latest.streams.keys() | {stream}) > at_once:
            if None in latest.streams.values():  # of the first ones, or a launch raised; the stream may be gone by now
                torch.cuda.synchronize(device)
            latest.before = [event for event in latest.streams.values() if event is not None]
            latest.at_once, latest.streams = at_once, {}
        if stream not in latest.streams:
            for event in latest.before or ():
                stream.wait_event(event)
        latest.streams[stream] = None  # last: a call that is interrupted must not count as having waited
        results = launch(*arguments)
        if latest.before is not None:
            latest.streams[stream] = stream.record_event()
    return results
