"""CUDA streams, for layers and directions side by side.

A tensor that another stream reads than the one that made it is recorded on that other, so that its memory is not
handed out again too early.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Streams = tuple[torch.cuda.Stream | None, ...]
"""One for each layer or direction; None where work stays on the current stream."""


def for_work_on(x: Tensor, count: int) -> Streams:
    """`count` streams on the device of x; None for all of them where there are no streams, or one would do.

    Nor while a graph is captured: launches of several streams are kept apart by what ran before the capture, too.
    """
    if count == 1 or not x.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return (None,) * count
    return _streams(x.device, count)


@functools.cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))


@contextlib.contextmanager
def on(stream: torch.cuda.Stream | None, after: torch.cuda.Stream | None, reads: Sequence[Tensor]) -> Iterator[None]:
    """Work on `stream`, once what is queued on `after` (by default the current stream) is done."""
    if stream is None:
        yield
        return
    stream.wait_stream(after or torch.cuda.current_stream(stream.device))
    for tensor in reads:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def join(streams: Streams, results: Sequence[Tensor]) -> None:
    """Have the current stream wait for all others, and read their results."""
    for stream in streams:
        if stream is not None:
            current = torch.cuda.current_stream(stream.device)
            current.wait_stream(stream)
            for tensor in results:
                tensor.record_stream(current)
