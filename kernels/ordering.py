"""Cooperative launches from several streams: which may run at once.

Two launches whose programs wait for each other, each holding half the card, would wait for ever. So launches run at
once only if they were planned to share it. In a graph that is being captured all work goes to one stream.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

R = TypeVar("R")


@dataclass
class _Launched:
    """What was launched on a device."""

    group: Hashable = None  # of the latest launch
    # The streams that the group's launches went to, with an event after the latest of each; None: none was recorded.
    streams: dict[torch.cuda.Stream, torch.cuda.Event | None] = field(default_factory=dict)
    before: list[torch.cuda.Event] = field(default_factory=list)  # after the groups before it
    several: bool = False  # whether there was more than one group, so that events are recorded
    # Held from waiting for others to recording the event: no other thread may launch in between.
    lock: Any = field(default_factory=threading.RLock)


# All copies of the library in this process share it: Hugging Face's `kernels` loads one, and a reload leaves one.
# Raise the number when the fields of _Launched change: copies with two numbers do not know each other's launches.
_launched: dict[torch.device, _Launched] = vars(torch.cuda).setdefault("_gpu_lstm_launched_1", {})


def in_order(at_once: int, device: torch.device, launch: Callable[..., R], *arguments: Any) -> R:
    """launch(*arguments) on the current stream, which first waits for launches that must not run at the same time.

    It was planned as one of `at_once` that share the card, and its programs wait for each other.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return launch(*arguments)
    latest = _launched.get(device) or _launched.setdefault(device, _Launched())
    stream = torch.cuda.current_stream(device)
    with latest.lock:
        # Only launches of one copy share the card; in_order stands for the copy.
        group: Hashable = stream if at_once == 1 else (in_order, at_once)
        if group != latest.group:
            events = [event for earlier, event in latest.streams.items() if earlier != stream]
            if None in events:  # the first switch of a program, or a launch that raised; the stream may be gone by now
                torch.cuda.synchronize(device)
            latest.before = [event for event in events if event is not None]
            latest.several = latest.several or latest.group is not None
            latest.group, latest.streams = group, {}
        if stream not in latest.streams:
            for event in latest.before:
                stream.wait_event(event)
        latest.streams[stream] = None  # last: a call that is interrupted must not count as having waited
        results = launch(*arguments)
        if latest.several:
            latest.streams[stream] = stream.record_event()
    return results
