"""All layers of a call by kernels: in one piece, or in chunks of time and side by side on CUDA streams.

Chunks bound the memory for pre-activations. A tensor that is read on another stream is held for it, so that its memory
is not reused too early: in backward autograd releases what was saved as soon as a node is queued.
"""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.checks import is_exact
from ..call.choices import Backend
from ..call.noise import Noise, draw, within
from ..call.request import Call, Request
from ..call.weights import State
from ..kernels.layer import Layer
from ..kernels.tensors import Inputs
from . import autograd
from .layer_loop import NOTHING, RunLayer, inputs_of, layer_by_layer, named, run_layers, without_autocast

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
    saved = call.learns and not options.recompute
    longest = 2**31 if saved else max(1, WORKSPACE // max(4 * call.batch * widest * size, 1))  # fits in the workspace
    count = len(options.sizes) if options.directions == 1 else options.directions
    if not call.x.is_cuda or count == 1 or (options.directions == 1 and steps <= 2 * SHORTEST):
        return Schedule(longest, (None,) * count, 1)
    # A graph that is being captured cannot wait for earlier launches, so everything goes to one stream, with the plans
    # of earlier calls: older drivers cannot load another kernel during a capture.
    return Schedule(longest, (None,) * count if call.modes.capturing else _streams(call.x.device, count), count)


def by_kernels(
    call: Call, dtype: torch.dtype, backend: Backend, layers: Sequence[Layer], schedule: Schedule
) -> tuple[Tensor, list[State]]:
    """All layers of a call, in `dtype`, by the kernels of `layers` [L*D]: as layer_loop.run_layers."""
    run_layer = partial(autograd.layer_by_kernels, layers, call)
    in_one_piece = schedule.longest >= call.steps and schedule.streams[0] is None
    run = run_layers if in_one_piece else partial(_in_chunks, schedule)
    if dtype is torch.float32 and call.modes.autocast is None:
        return run(call, dtype, backend, run_layer)
    states = [(h.to(dtype), c if is_exact(c, call.x) or len(c) > len(h) else c.to(dtype)) for h, c in call.states]
    weights = [[one.to(dtype) for one in layer] for layer in call.weights]
    # Cell states are float32, also from chunk to chunk.
    cast = call._replace(x=call.x.to(dtype), states=[(h, c.float()) for h, c in states], weights=weights)
    if (reset_to := call.traversal.reset_states) is not None:
        cast_to = [(h.to(dtype), c.float()) for h, c in reset_to]
        cast = cast._replace(traversal=call.traversal._replace(reset_states=cast_to))
    with without_autocast(call):  # everything is cast once, rather than for every chunk
        y, finals = run(cast, dtype, backend, run_layer)
    return y, [(h, c.to(c0.dtype)) for (h, c), (_, c0) in zip(finals, states)]


def _in_chunks(
    schedule: Schedule, call: Call, dtype: torch.dtype, backend: Backend, run: RunLayer
) -> tuple[Tensor, list[State]]:
    """As run_layers. Each chunk goes through all layers of one direction; where each has a stream, the next chunk
    follows on the first while this one is in the second."""
    if call.options.directions == 2:
        return layer_by_layer(call, dtype, partial(_both_directions, schedule, call, backend, run))
    noise, undropped = draw(call.weights, (call.steps, call.batch), dtype, call.options)
    spans, streams, traversal, states = schedule.spans(call.steps, 1), schedule.streams, call.traversal, call.states
    output = Output(call.x, states[-1][0].shape[2], spans)
    for k, stream in enumerate(streams):
        hold(stream, (*_given(call, k, 0, noise[k]), output.whole, undropped[k]))
    for span in reversed(spans) if traversal.reverse else spans:
        if traversal.reverse:
            states = [traversal.reset_at_end_of(span, *state, call.options.cell) for state in states]
        with contextlib.ExitStack() as entered:

            def on_its_stream(inputs: Inputs, row: int, reverse: bool) -> tuple[Tensor, State]:
                hold(streams[row], (inputs.x, inputs.lengths))
                entered.enter_context(on(streams[row]))  # for what comes after the layer, too
                return run(inputs, row, reverse)

            chunk = call._replace(x=cut(call.x, span), states=states, traversal=traversal.within(span))
            drawn = [[within(each, span) for each in layer] for layer in noise], [cut(t, span) for t in undropped]
            y, states = run_layers(chunk, dtype, backend, on_its_stream, drawn)
            output.put(y, span, 0)
    return output.joined(streams, states), states


def _both_directions(
    schedule: Schedule, call: Call, backend: Backend, run: RunLayer,
    k: int, x: Tensor, states: list[State], noise: list[Noise],
) -> tuple[Tensor, list[State]]:  # fmt: skip
    """Layer k, as layer_loop.RunDirections: chunk by chunk, the reverse direction from the end, each on its stream."""
    spans, streams, states = schedule.spans(call.steps, 2), schedule.streams, list(states)
    output = Output(x, 2 * states[0][0].shape[2], spans)
    for d, stream in enumerate(streams):
        hold(stream, (*_given(call, k, d, noise), output.whole))
    for turn in zip(spans, reversed(spans)):
        for d, span in enumerate(turn):
            chunk, below = call._replace(traversal=call.traversal.within(span)), cut(x, span)
            hold(streams[d], (below, chunk.traversal.lengths))
            with on(streams[d]), named(k, d, backend):
                h0, c0 = states[d]
                if d:
                    h0, c0 = call.traversal.of(2 * k + 1).reset_at_end_of(span, h0, c0, call.options.cell)
                inputs = inputs_of(chunk, k, d, below, within(noise[d], span))._replace(h0=h0, c0=c0)
                h, states[d] = run(inputs, 2 * k + d, d == 1)
                output.put(h, span, d)
    return output.joined(streams, states), states


def _given(call: Call, k: int, d: int, noise: list[Noise]) -> list[Tensor | None]:
    """What layer k reads in direction d at any time, but x; views share the memory."""
    row, (lengths, resets, *_) = call.options.directions * k + d, call.traversal
    return [*call.states[row], *call.weights[k][d], lengths, resets, *call.traversal.of(row).reset_to(), *noise[d]]


class Output:
    """What comes chunk by chunk, [T, B, D*P]: of one direction, or of both side by side."""

    def __init__(self, x: Tensor, features: int, spans: list[Span]) -> None:
        self.pieces: dict[tuple[int, int], Tensor] = {}  # by direction and start
        self.whole: Tensor | None = None
        if not torch.is_grad_enabled() and len(spans) > 1:  # chunks are copied into place, so it is there once
            self.whole = x.new_empty(*x.shape[:2], features)  # on the stream that all others wait for

    def put(self, h: Tensor, span: Span, d: int) -> None:
        """A chunk of direction d, [t, B, P]."""
        if self.whole is None:
            self.pieces[d, 0 if span is None else span.start] = h
        else:
            self.whole[span, :, d * h.shape[2] : (d + 1) * h.shape[2]] = h

    def joined(self, streams: Streams, states: list[State]) -> Tensor:
        """All of it. The current stream waits for all others, and holds their results, final states too."""
        for stream in streams:
            if stream is not None:
                current = torch.cuda.current_stream(stream.device)
                current.wait_stream(stream)
                hold(current, [*self.pieces.values(), *itertools.chain(*states)])
        if self.whole is not None:
            return self.whole
        by_direction = itertools.groupby(sorted(self.pieces), key=lambda place: place[0])
        return _cat([_cat([self.pieces[place] for place in places], 0) for _, places in by_direction], 2)


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


def on(stream: Stream) -> contextlib.AbstractContextManager:
    """A block of work on `stream`, once what is queued on the current one is done."""
    if stream is None:
        return NOTHING
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)


def hold(stream: Stream, tensors: Iterable[Tensor | None]) -> None:
    """Keep the memory of tensors, once they are released, until what is queued on `stream` by then is done."""
    for tensor in tensors:
        if tensor is not None and stream is not None:
            tensor.record_stream(stream)
