"""Cooperative launches of several streams: which may run at once.

All programs of a cooperative launch must be resident, since they wait for each other. Two launches of different streams
of which each holds half the card would wait for ever. So launches run at once only if they were planned to share the
card; all others wait for those before them. In a graph that is being captured all work goes to one stream.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch


@dataclass
class _Launched:  # on a device
    group: Hashable = None  # of the latest launch
    streams: set[torch.cuda.Stream] = field(default_factory=set)  # that the group's launches went to
    before: list[torch.cuda.Event] = field(default_factory=list)  # after the groups before it


_launched: dict[torch.device, _Launched] = {}
_lock = threading.Lock()


def await_others(side_by_side: int, device: torch.device) -> None:
    """Have the current stream wait for launches on other streams that must not run at the same time as the next one.

    `side_by_side` launches were planned to share the card.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    stream = torch.cuda.current_stream(device)
    group = stream if side_by_side == 1 else side_by_side
    with _lock:
        latest = _launched.setdefault(device, _Launched())
        if group != latest.group:
            latest.before = [earlier.record_event() for earlier in latest.streams if earlier != stream]
            latest.group, latest.streams = group, set()
        if stream not in latest.streams:
            for event in latest.before:
                stream.wait_event(event)
            latest.streams.add(stream)  # last: whoever is interrupted here has not waited
