"""Cooperative launches from several streams: which may run at once.

All programs of a cooperative launch must be resident, since they wait for each other. Two launches from different
streams, each holding half the card, would wait for ever. So launches run at once only if they were planned to share the
card; all others wait for those before them. In a graph that is being captured all work goes to one stream.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch


@dataclass
class _Launched:  # on a device
    group: Hashable = None  # of the latest launch
    # The streams that the group's launches went to, with an event after the latest of each; None: none was recorded.
    streams: dict[torch.cuda.Stream, torch.cuda.Event | None] = field(default_factory=dict)
    before: list[torch.cuda.Event] = field(default_factory=list)  # after the groups before it
    several: bool = False  # whether there was more than one group, so that events are recorded


_launched: dict[torch.device, _Launched] = {}
_lock = threading.Lock()


def await_others(side_by_side: int, device: torch.device) -> None:
    """Have the current stream wait for launches that must not run at the same time as the next one.

    That one was planned as one of `side_by_side` that share the card; `record_launch` follows it.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    stream = torch.cuda.current_stream(device)
    group = stream if side_by_side == 1 else side_by_side
    with _lock:
        latest = _launched.setdefault(device, _Launched())
        if group != latest.group:
            events = [event for earlier, event in latest.streams.items() if earlier != stream]
            if None in events:  # the first switch of a program; the stream may be gone by now
                torch.cuda.synchronize(device)
            latest.before = [event for event in events if event is not None]
            latest.several = latest.several or latest.group is not None
            latest.group, latest.streams = group, {}
        if stream not in latest.streams:
            for event in latest.before:
                stream.wait_event(event)
            latest.streams[stream] = None  # last: a call that is interrupted must not count as having waited


def record_launch(device: torch.device) -> None:
    """Note that a launch was made on the current stream, where others may have to wait for it."""
    latest = _launched.get(device)
    if latest is not None and latest.several and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device)
        with _lock:
            if stream in latest.streams:
                latest.streams[stream] = stream.record_event()
