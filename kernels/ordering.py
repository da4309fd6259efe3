"""The order of launches whose programs wait for each other.

If two such launches each held a half of the card, and each needed more, they would wait for ever. So two of them run at
once only if they were planned to share the card. A graph that is being captured has all work on one stream, which
orders its launches.
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

    at_once: int  # the number of streams that they were planned for
    streams: dict[Any, Any] = field(default_factory=dict)  # the event after each stream's launches, None if unrecorded
    before: list[Any] | None = None  # the events that these launches wait for; None for the first, which record none
    lock: Any = field(default_factory=threading.RLock)  # held from waiting to recording, while no other thread launches


# All copies of the library in this process share this dict: Hugging Face's `kernels` loads a copy, and a reload leaves
# one. Raise the number in the name when the fields of _Launched change. Copies with different numbers do not know each
# other's launches.
_launched: dict[torch.device, _Launched] = vars(torch.cuda).setdefault("_gpu_lstm_launched_2", {})


def in_order(at_once: int, device: torch.device, launch: Callable[..., R], *arguments: Any) -> R:
    """Call launch(*arguments) on the current stream, as one of `at_once` launches that share the card.

    It waits on the stream for all earlier launches that it does not share the card with.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return launch(*arguments)
    latest = _launched.get(device) or _launched.setdefault(device, _Launched(at_once))
    stream = torch.cuda.current_stream(device)
    with latest.lock:
        if at_once != latest.at_once or len({*latest.streams, stream}) > at_once:
            if None in latest.streams.values():  # after the first launches, or an error; the stream may be gone by now
                torch.cuda.synchronize(device)
            latest.before = [*filter(None, latest.streams.values())]
            latest.at_once, latest.streams = at_once, {}
        if stream not in latest.streams:
            for event in latest.before or ():
                stream.wait_event(event)
        latest.streams[stream] = None  # set only now, since a call that is interrupted above has not waited
        results = launch(*arguments)
        if latest.before is not None:
            latest.streams[stream] = stream.record_event()
    return results
