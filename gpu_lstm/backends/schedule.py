"""All layers of a call by kernels: in one piece, or in chunks of time and side by side on CUDA streams.

Chunks bound the memory for pre-activations, and let layers run side by side; cell states go from chunk to chunk in
float32. A tensor that is read on another stream is held for it, so that its memory is not reused too early: in backward
autograd releases what was saved as soon as a node is queued.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.checks import is_exact
from ..call.choices import Backend
from ..call.noise import draw, within
from ..call.request import Call, Request
from ..call.weights import State
from ..kernels.layer import Layer
from . import autograd
from .layer_loop import Part, RunPart, connect, named, run_layers, without_autocast

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

    def spans(self, steps: int, directions: int) -> list[Span]:
        """The times of each chunk, in order."""
        length = self.longest
        if directions == 1 and self.streams[0] is not None:
            length = min(length, max(SHORTEST, ceil(steps / WAVEFRONT)))
        if length >= steps:
            return [None]
        return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]


def schedule_of(call: Request, steps: int, size: int) -> Schedule:
    """The schedule for up to `steps` steps and `size`-byte elements. Layers run side by side if that may pay."""
    options = call.options
    widest = max(size.hidden for size in options.sizes)
    kept = call.learns and not options.recompute
    longest = 2**31 if kept else max(1, WORKSPACE // max(4 * call.batch * widest * size, 1))  # fits in the workspace
    count = len(options.sizes) if options.directions == 1 else options.directions
    if not call.x.is_cuda or count == 1 or (options.directions == 1 and steps <= 2 * SHORTEST):
        return Schedule(longest, (None,) * count, 1)
    # A graph that is being captured cannot wait for earlier launches, so everything goes to one stream, with the plans
    # of earlier calls: older drivers cannot load another kernel during a capture.
    return Schedule(longest, (None,) * count if call.modes.capturing else _streams(call.x.device, count), count)


def run_call(
    call: Call, dtype: torch.dtype, backend: Backend, layers: Sequence[Layer], schedule: Schedule
) -> tuple[Tensor, list[State]]:
    """All layers of a call, in `dtype`, by the kernels of `layers` [L*D]: as layer_loop.run_layers."""
    run_part = partial(autograd.run_layer, layers, call)
    in_one_piece = schedule.longest >= call.steps and schedule.streams[0] is None
    run = run_layers if in_one_piece else partial(_in_chunks, schedule)
    if dtype is torch.float32 and call.modes.autocast is None:
        return run(call, dtype, backend, run_part)
    states = [(h.to(dtype), c if is_exact(c, call.x) or len(c) > len(h) else c.to(dtype)) for h, c in call.states]
    weights = [[one.to(dtype) for one in layer] for layer in call.weights]
    # Cell states are float32, also from chunk to chunk.
    cast = call._replace(x=call.x.to(dtype), states=[(h, c.float()) for h, c in states], weights=weights)
    with without_autocast(call):  # everything is cast once, rather than for every chunk
        y, finals = run(cast, dtype, backend, run_part)
    return y, [(h, c.to(c0.dtype)) for (h, c), (_, c0) in zip(finals, states)]


def _in_chunks(
    schedule: Schedule, call: Call, dtype: torch.dtype, backend: Backend, run: RunPart
) -> tuple[Tensor, list[State]]:
    """As run_layers."""
    options, x, states = call.options, call.x, list(call.states)
    noise, kept = draw(call.weights, (call.steps, call.batch), dtype, options)
    through = partial(_through, call, run, schedule, backend, states)
    if options.directions == 1:
        return through(range(len(call.weights)), x, (noise, kept)), states
    for k in range(len(call.weights)):
        x = connect(x, through([k], x, (noise, {k: None})), call.traversal.lengths, kept[k], options)
    return x, states


def _through(
    call: Call, run: RunPart, schedule: Schedule, backend: Backend, states: list[State],
    layers: Sequence[int], x: Tensor, drawn: tuple[Any, Any],
) -> Tensor:  # fmt: skip
    """x [T, B, I] -> [T, B, D*P], chunk by chunk, through several layers of one direction or one layer of two.

    `states` [L*D] are updated; `drawn`, by layer: as noise.draw returns it. Where each layer has a stream, it computes
    a chunk while the layer above computes the previous one; where each direction has one, the reverse one starts at the
    end.
    """
    directions, streams, last, (noise, kept) = call.options.directions, schedule.streams, layers[-1], drawn
    all_spans, width = schedule.spans(call.steps, directions), states[directions * last][0].shape[2]
    pieces: list[list[Tensor]] = [[] for _ in range(directions)]
    whole = None
    if not torch.is_grad_enabled() and len(all_spans) > 1:
        # Chunks are copied into place as they come, so that there is never a second output. It is allocated on the
        # stream that all others wait for, since several of them write to it.
        whole = x.new_empty(*x.shape[:2], directions * width)
    parts = [
        (k, d, directions * k + d, weights, streams[d if directions == 2 else k])
        for k in layers for d, weights in enumerate(call.weights[k])
    ]  # fmt: skip
    lengths, resets, *_ = call.traversal
    for k, d, row, weights, stream in parts:  # whatever was made on the current stream; views share the memory
        reset_to = call.traversal.of(row).reset_to()
        hold(stream, (whole, *states[row], *weights, lengths, resets, *reset_to, *noise[k][d], kept[k]))
    for spans in zip(all_spans, reversed(all_spans)):
        ways = [call.traversal.within(span) for span in spans[:directions]]
        h = x
        for k, d, row, weights, stream in parts:
            span, way = spans[d], ways[d].of(row)
            below = cut(x, span) if k == layers[0] else h
            hold(stream, (below, way.lengths))  # those of a chunk
            with on(stream, streams[k - 1] if k > layers[0] else None):
                if d:
                    way = way.backwards()
                    states[row] = call.traversal.of(row).reset_at_end_of(span, *states[row], call.options.cell)
                with named(k, d, backend):
                    h, states[row] = run(Part(row, below, states[row], weights, way, within(noise[k][d], span)))
                if directions == 1:
                    h = connect(below, h, way.lengths, cut(kept[k], span), call.options)
                if k == last and whole is not None:
                    whole[span, :, d * width : (d + 1) * width] = h
                elif k == last:
                    pieces[d].insert(0 if d else len(pieces[d]), h)
    finals = states[directions * layers[0] : directions * (last + 1)]
    join(streams, [*itertools.chain(*pieces), *itertools.chain(*finals)])
    return _cat([_cat(each, 0) for each in pieces], 2) if whole is None else whole


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def cut(t: Any, span: Span) -> Any:
    """The times of a span of t [T, ...], which may be None."""
    return t if t is None or span is None else t[span]


_made: dict[tuple[torch.device, int], Streams] = {}


def _streams(device: torch.device, count: int) -> Streams:
    """The same streams at every call, in all threads: launches that share the card are planned for `count` of them."""
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
