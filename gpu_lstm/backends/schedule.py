"""Layers by kernels, in chunks of time and side by side on CUDA streams.

Chunks bound the memory for pre-activations, and let layers run side by side. States are handed from chunk to chunk,
cell states in float32, so that chunks change nothing in the recurrence. A tensor that another stream reads than the one
that made it is recorded on that other, so that its memory is not handed out again too early.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ..call.noise import Noise, draw
from ..call.prepare import Call
from ..call.weights import State
from .layers import Direction, connect, named

WORKSPACE = 64 << 20  # bytes of pre-activations at once, where they are not kept for backward
WAVEFRONT = 8  # chunks that a sequence falls into where layers run side by side
SHORTEST = 64  # steps of a chunk of the wavefront

Streams = tuple[torch.cuda.Stream | None, ...]
"""One for each layer or direction; None where work stays on the current stream."""

Span = slice | None
"""From which time to which a chunk goes; None: all times."""


class Schedule(NamedTuple):
    """How a stack of layers runs, for calls of one kind."""

    longest: int  # steps of a chunk
    streams: Streams  # one for each layer or, of layers with two directions, for each direction

    @property
    def side_by_side(self) -> int:
        """How many layers or directions run at once."""
        return max(1, sum(stream is not None for stream in self.streams))

    def in_one_piece(self, steps: int) -> bool:
        """Whether a sequence is one chunk on the current stream."""
        return steps <= self.longest and self.streams[0] is None

    def spans(self, steps: int, directions: int) -> list[Span]:
        """Of the chunks, in time."""
        length = self.longest
        if directions == 1 and self.streams[0] is not None:
            length = min(length, max(SHORTEST, ceil(steps / WAVEFRONT)))
        if length >= steps:
            return [None]
        return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]


def schedule_of(call: Call, steps: int, size: int) -> Schedule:
    """For calls of up to `steps` steps, in elements of `size` bytes. Layers run side by side where that may pay.

    Chunks are such that pre-activations fit the workspace, but where they are kept for backward anyway.
    """
    options = call.options
    widest = max(hidden for _, hidden, _ in options.sizes)
    kept = call.learns and not options.recompute
    longest = 2**31 if kept else max(1, WORKSPACE // max(4 * call.batch * widest * size, 1))
    count = len(options.sizes) if options.directions == 1 else options.directions
    # While a graph is captured launches of several streams are kept apart by what ran before the capture, too.
    alone = (
        not call.x.is_cuda or call.modes.capturing or count == 1 or (options.directions == 1 and steps <= 2 * SHORTEST)
    )
    return Schedule(longest, (None,) * count if alone else _streams(call.x.device, count))


def run(call: Call, direction: Direction, schedule: Schedule, backend: str) -> tuple[Tensor, list[State]]:
    """As layers.one_after_another."""
    noise, kept = draw(call.weights, (call.steps, call.batch), call.x.dtype, call.options)
    spans = schedule.spans(call.steps, call.options.directions)
    if call.options.directions == 1:
        chunks = _Chunks(call, direction, schedule.streams, spans, backend)
        return chunks.wavefront([each[0] for each in noise], kept)
    x, finals = call.x, []
    for k in range(len(call.weights)):
        chunks = _Chunks(call, direction, schedule.streams, spans, backend)
        y, states = chunks.both_directions(k, x, noise[k])
        x = connect(x, y, call.traversal.lengths, kept[k], call.options)
        finals += states
    return x, finals


class _Chunks(NamedTuple):
    """A call cut in time."""

    call: Call
    direction: Direction
    streams: Streams
    spans: list[Span]
    backend: str

    def wavefront(self, noise: list[Noise], kept: list[Tensor | None]) -> tuple[Tensor, list[State]]:
        """Layers of one direction, chunk by chunk through all of them.

        Where each has a stream, a layer computes a chunk while the layer above computes the chunk before.
        """
        call, states, top = self.call, self.call.state_rows(), len(self.call.weights) - 1
        outputs = Outputs(call.x, self.spans, 1, states[top][0].shape[1])
        for span in self.spans:
            y, chunk = cut(call.x, span), call.traversal.within(span)
            for k, (weights,) in enumerate(call.weights):
                own, part = noise[k].within(span), chunk.of(k)
                mask = kept[k]
                mask = None if mask is None else cut(mask, span)
                reads = (y, *states[k], *part.reset_tensors(), *own.present(), *([] if mask is None else [mask]))
                with on(self.streams[k], self.streams[k - 1] if k else None, reads):
                    with named(k, 0, self.backend):
                        h, states[k] = self.direction(k, y, states[k], weights, part, own)
                    y = connect(y, h, part.lengths, mask, call.options)
                    if k == top:
                        outputs.add(y, span, 0)
        join(self.streams, [*outputs.parts(), *(tensor for state in states for tensor in state)])
        return outputs.whole(), states

    def both_directions(self, k: int, x: Tensor, noise: list[Noise]) -> tuple[Tensor, list[State]]:
        """Layer k, its directions side by side where there are streams: [T, B, D*P] and the final states [D]."""
        call, rows = self.call, self.call.state_rows()
        outputs = Outputs(x, self.spans, 2, rows[2 * k][0].shape[1])
        finals: list[State] = []
        for d, weights in enumerate(call.weights[k]):
            n = 2 * k + d
            (h, c), own = rows[n], call.traversal.of(n)
            with on(self.streams[d], None, (x, h, c, *own.reset_tensors(), *noise[d].present())):
                for span in reversed(self.spans) if d else self.spans:
                    part = own.within(span)
                    if d:
                        part = part.backwards()
                        h, c = own.reset_at_end_of(span, h, c)
                    with named(k, d, self.backend):
                        y, (h, c) = self.direction(n, cut(x, span), (h, c), weights, part, noise[d].within(span))
                    outputs.add(y, span, d)
            finals.append((h, c))
        join(self.streams, [*outputs.parts(), *(tensor for final in finals for tensor in final)])
        return outputs.whole(), finals


def cut(t: Tensor, span: Span) -> Tensor:
    """The times of a span of t [T, ...]."""
    return t if span is None else t[span]


class Outputs:
    """Chunks of a layer's output, put together in time and over directions.

    Without autograd they are copied into place as they come, so that no second output is ever held.
    """

    def __init__(self, x: Tensor, spans: list[Span], directions: int, width: int) -> None:
        self._parts: list[dict[int, Tensor]] = [{} for _ in range(directions)]  # by their start
        self._whole: Tensor | None = None
        if not torch.is_grad_enabled() and len(spans) > 1:
            # Made here, on the stream that all others wait for, since several of them write to it.
            self._whole = x.new_empty(*x.shape[:2], directions * width)

    def add(self, h: Tensor, span: Span, direction: int) -> None:
        """One chunk of one direction, [t, B, P]."""
        if self._whole is None:
            self._parts[direction][0 if span is None else span.start] = h
        else:
            width = h.shape[2]
            self._whole[span, :, direction * width : (direction + 1) * width] = h

    def parts(self) -> list[Tensor]:
        """All tensors held."""
        return [h for parts in self._parts for h in parts.values()] if self._whole is None else [self._whole]

    def whole(self) -> Tensor:
        """[T, B, D*P]."""
        if self._whole is not None:
            return self._whole
        in_time = [[parts[start] for start in sorted(parts)] for parts in self._parts]
        directions = [torch.cat(chunks) if len(chunks) > 1 else chunks[0] for chunks in in_time]
        return torch.cat(directions, dim=2) if len(directions) > 1 else directions[0]


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
