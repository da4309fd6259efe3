"""Layers run by kernels, in chunks of time and side by side on CUDA streams.

Chunks bound the memory for pre-activations, and let layers run side by side; cell states go from chunk to chunk in
float32. A tensor that is read on another stream is held for it, so that its memory is not reused too early: in backward
autograd releases what was saved as soon as a node is queued.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.noise import Noise, draw
from ..call.prepare import Call
from ..call.weights import State
from .layers import Direction, connect, named

WORKSPACE = 64 << 20  # bytes of pre-activations at once, where they are not saved for backward
WAVEFRONT = 8  # chunks of a sequence where layers run side by side
SHORTEST = 64  # the fewest steps of a chunk of the wavefront

Stream = torch.cuda.Stream | None  # None: work stays on the current stream
Streams = tuple[Stream, ...]
Span = slice | None  # the times of a chunk; None: all


class Schedule(NamedTuple):
    """How a stack of layers runs, for calls of one kind."""

    longest: int  # steps of a chunk
    streams: Streams  # one for each layer or, where layers have two directions, for each direction
    side_by_side: int  # layers or directions that share the card

    def in_one_piece(self, steps: int) -> bool:
        """Whether a sequence is one chunk on the current stream."""
        return steps <= self.longest and self.streams[0] is None

    def spans(self, steps: int, directions: int) -> list[Span]:
        """The times of each chunk, in order."""
        length = self.longest
        if directions == 1 and self.streams[0] is not None:
            length = min(length, max(SHORTEST, ceil(steps / WAVEFRONT)))
        if length >= steps:
            return [None]
        return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]


def schedule_of(call: Call, steps: int, size: int) -> Schedule:
    """For calls of up to `steps` steps, with elements of `size` bytes. Layers run side by side where that may pay."""
    options = call.options
    widest = max(hidden for _, hidden, _ in options.sizes)
    kept = call.learns and not options.recompute
    longest = 2**31 if kept else max(1, WORKSPACE // max(4 * call.batch * widest * size, 1))  # fits in the workspace
    count = len(options.sizes) if options.directions == 1 else options.directions
    if not call.x.is_cuda or count == 1 or (options.directions == 1 and steps <= 2 * SHORTEST):
        return Schedule(longest, (None,) * count, 1)
    # While a graph is captured, what was launched before it cannot be waited for. So all goes to one stream, with the
    # plans of the calls before: older drivers load no other kernel into a capture.
    return Schedule(longest, (None,) * count if call.modes.capturing else _streams(call.x.device, count), count)


def run(call: Call, direction: Direction, schedule: Schedule, backend: str) -> tuple[Tensor, list[State]]:
    """As layers.one_after_another."""
    noise, kept = draw(call.weights, (call.steps, call.batch), call.x.dtype, call.options)
    layers, x, states = range(len(call.weights)), call.x, list(call.kernel_rows())
    given = call, direction, schedule, backend, (noise, kept)
    if call.options.directions == 1:
        return _through(*given, layers, x, states), states
    for k in layers:
        y = _through(*given, layers[k : k + 1], x, states)
        x = connect(x, y, call.traversal.lengths, kept[k], call.options)
    return x, states


def _through(
    call: Call, direction: Direction, schedule: Schedule, backend: str,
    drawn: tuple[list[list[Noise]], list[Tensor | None]], layers: range, x: Tensor, states: list[State],
) -> Tensor:  # fmt: skip
    """x [T, B, I] -> [T, B, D*P], chunk by chunk, through several layers of one direction or one layer of two.

    `drawn` is what noise.draw returns; `states` [L*D] of ([1, B, P], [1, B, H]) are updated. Where
    each layer has a stream, it computes a chunk while the layer above computes the previous one; where each direction
    has one, the reverse one starts at the end.
    """
    directions, (noise, kept), streams = call.options.directions, drawn, schedule.streams
    all_spans, width = schedule.spans(call.steps, directions), states[directions * layers[-1]][0].shape[2]
    pieces: list[list[Tensor]] = [[] for _ in range(directions)]
    whole = None
    if not torch.is_grad_enabled() and len(all_spans) > 1:
        # Chunks are copied into place as they come, so that there is never a second output. It is allocated here, on
        # the stream that all others wait for, since several of them write to it.
        whole = x.new_empty(*x.shape[:2], directions * width)
    for k in layers:  # whatever was made on the current stream; views share the memory
        for d, weights in enumerate(call.weights[k]):
            n, (lengths, resets, *_) = directions * k + d, call.traversal
            given = *states[n], *weights, lengths, resets, *call.traversal.of(n).reset_to(), *noise[k][d], kept[k]
            hold(streams[d if directions == 2 else k], (whole, *given))
    for spans in zip(all_spans, reversed(all_spans)):
        parts = [call.traversal.within(span) for span in spans[:directions]]
        h = x
        for k in layers:
            for d, weights in enumerate(call.weights[k]):
                n, span = directions * k + d, spans[d]
                part, own, mask = parts[d].of(n), noise[k][d].within(span), cut(kept[k], span)
                y = cut(x, span) if k == layers[0] else h
                stream = streams[d if directions == 2 else k]
                hold(stream, (y, part.lengths))  # those of a chunk
                with on(stream, streams[k - 1] if k > layers[0] else None):
                    if d:
                        part = part.backwards()
                        states[n] = call.traversal.of(n).reset_at_end_of(span, *states[n])
                    with named(k, d, backend):
                        h, states[n] = direction(n, y, states[n], weights, part, own)
                    if directions == 1:
                        h = connect(y, h, part.lengths, mask, call.options)
                    if k == layers[-1] and whole is not None:
                        whole[span, :, d * width : (d + 1) * width] = h
                    elif k == layers[-1]:
                        pieces[d].insert(0 if d else len(pieces[d]), h)
    finals = states[directions * layers[0] : directions * (layers[-1] + 1)]
    join(streams, [*itertools.chain(*pieces), *itertools.chain(*finals)])
    return _cat([_cat(each, 0) for each in pieces], 2) if whole is None else whole


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def cut(t: Any, span: Span) -> Any:
    """The times of a span of t [T, ...], which may be None."""
    return t if t is None or span is None else t[span]


_made: dict[tuple[torch.device, int], Streams] = {}


def _streams(device: torch.device, count: int) -> Streams:
    """The same at every call, in all threads: launches that share the card are planned for so many streams."""
    if (device, count) not in _made:
        _made.setdefault((device, count), tuple(torch.cuda.Stream(device) for _ in range(count)))
    return _made[device, count]


@contextlib.contextmanager
def on(stream: Stream, after: Stream) -> Iterator[None]:
    """Work on `stream`, once what is queued on `after` (by default the current stream) is done."""
    if stream is None:
        yield
        return
    stream.wait_stream(after or torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def hold(stream: Stream, tensors: Iterable[Tensor | None]) -> None:
    """Keep the memory of tensors, once they are released, until what is queued on `stream` by then is done."""
    if stream is None:
        return
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)


def join(streams: Streams, results: Sequence[Tensor]) -> None:
    """Make the current stream wait for all others, and hold their results for it."""
    for stream in streams:
        if stream is not None:
            current = torch.cuda.current_stream(stream.device)
            current.wait_stream(stream)
            hold(current, results)
