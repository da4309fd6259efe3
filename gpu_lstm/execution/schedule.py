"""All layers of a call by kernels: two directions side by side on CUDA streams, and inference in chunks of time.

Chunks bound the memory for pre-activations. A tensor that is read on another stream is held for it, so that its memory
is not reused too early: in backward autograd releases what was saved as soon as a node is queued.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.layer_loop import RunLayer, cast, named, run_layers, traversal_of, within, without_autocast
from ..call.choices import Backend
from ..call.request import Call, Request
from ..call.weights import State
from ..kernels.cells import Cell
from ..kernels.layer import Layer
from ..kernels.tensors import Inputs
from . import autograd

WORKSPACE = 64 << 20  # bytes of a layer's pre-activations at once, without autograd

Streams = tuple[torch.cuda.Stream, ...]
_pairs: dict[torch.device, Streams] = {}  # one for all threads: a third launch would not fit the card beside two


class Schedule(NamedTuple):
    """How layers run, for calls of one kind."""

    longest: int  # steps of a chunk
    streams: Streams  # one for each direction; empty: all work stays on the current stream
    side_by_side: int  # directions that share the card


def schedule_of(call: Request, size: int) -> Schedule:
    """The schedule of a kind of call, of elements of `size` bytes."""
    row = 4 * call.batch * max(each.hidden for each in call.options.sizes) * size  # bytes of pre-activations of a step
    longest = 2**31 if call.learns else max(1, WORKSPACE // max(1, row))
    if not call.x.is_cuda or call.options.directions == 1:
        return Schedule(longest, (), 1)
    # A graph that is being captured cannot wait for earlier launches, so everything goes to one stream, with the plans
    # of earlier calls: older drivers cannot load another kernel during a capture.
    pair = () if call.modes.capturing else (torch.cuda.Stream(call.x.device), torch.cuda.Stream(call.x.device))
    return Schedule(longest, pair and _pairs.setdefault(call.x.device, pair), 2)


def by_kernels(
    call: Call, dtype: torch.dtype, backend: Backend, layers: Sequence[Layer], schedule: Schedule
) -> tuple[Tensor, list[State]]:
    """All layers of a call, in `dtype`, by the kernels of `layers` [L*D]: as layer_loop.run_layers."""
    run: RunLayer = partial(autograd.layer_by_kernels, layers, call)
    if schedule.longest < call.steps:
        run = partial(_in_chunks, schedule.longest, call.options.cell, run)
    if not (dtype is call.x.dtype is torch.float32 and call.modes.autocast is None):
        call = cast(call, dtype)
    together = partial(_side_by_side, schedule.streams, backend, run) if schedule.streams else None
    if call.modes.autocast is None:  # a context that does nothing costs two calls
        return run_layers(call, dtype, backend, run, together)
    with without_autocast(call):
        return run_layers(call, dtype, backend, run, together)


def _in_chunks(longest: int, cell: Cell, run: RunLayer, given: Inputs, row: int, reverse: bool) -> tuple[Tensor, State]:
    """As layer_loop.RunLayer, without autograd: in reverse from the last chunk on. c is float32 from chunk to chunk."""
    x, h, c, traversal = given.x, given.h0, given.c0.float(), traversal_of(given, reverse)
    y = x.new_empty(*x.shape[:2], h.shape[2])
    starts = range(0, len(x), longest)
    for start in reversed(starts) if reverse else starts:
        end = min(start + longest, len(x))
        if reverse:
            h, c = traversal.entering(end, h, c, cell)
        y[start:end], (h, c) = run(within(given, slice(start, end))._replace(h0=h, c0=c), row, reverse)
    return y, (h, c.to(given.c0.dtype))


def _side_by_side(
    streams: Streams, backend: Backend, run: RunLayer, k: int, inputs: list[Inputs]
) -> tuple[Tensor, list[State]]:
    """As layer_loop.RunDirections, each direction on its own stream."""
    results, current = [], torch.cuda.current_stream(inputs[0].x.device)
    for d, stream in enumerate(streams):
        hold(stream, inputs[d])
        stream.wait_stream(current)
        with torch.cuda.stream(stream), named(k, d, backend):
            results.append(run(inputs[d], 2 * k + d, d == 1))
    for stream, (h, final) in zip(streams, results):
        current.wait_stream(stream)
        hold(current, (h, *final))
    return torch.cat([h for h, _ in results], 2), [final for _, final in results]


def hold(stream: torch.cuda.Stream, tensors: Iterable[Tensor | None]) -> None:
    """Keep the memory of tensors, once they are released, until what is queued on `stream` by then is done."""
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)
