"""All layers of a call by kernels: two directions side by side on CUDA streams, and inference in chunks of time.

Chunks bound the memory for pre-activations. The memory of a tensor that another stream reads is held until it has been
read. Otherwise it might be reused too early: in backward, autograd releases the saved tensors of a node as soon as the
node's work is queued.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.layer_loop import RunLayer, named, run_layers, traversal_of, within
from ..call.choices import Backend
from ..call.request import Call, Request
from ..call.weights import CallResult, LayerResult
from ..kernels.cells import Cell
from ..kernels.layer import Layer
from ..kernels.tensors import Inputs
from . import autograd

WORKSPACE = 64 << 20  # the most bytes of a layer's pre-activations in memory at once, without autograd

Streams = tuple[torch.cuda.Stream, ...]
_pairs: dict[torch.device, Streams] = {}  # all threads share a pair, since the card has no room for a third launch


class Schedule(NamedTuple):
    """How the layers of a kind of call run."""

    longest: int  # the most steps of a chunk
    streams: Streams  # one for each direction; empty if all work stays on the current stream
    side_by_side: int  # the number of directions that share the card


def schedule_of(request: Request, size: int) -> Schedule:
    """Return the schedule of a kind of call, whose layers compute with elements of `size` bytes."""
    hidden = max(each.hidden for each in request.options.sizes)
    row = 4 * request.batch * hidden * size  # bytes of one step's pre-activations
    longest = 2**31 if request.learns else max(1, WORKSPACE // max(1, row))
    if not request.x.is_cuda or request.options.directions == 1:
        return Schedule(longest, (), 1)
    # A graph that is being captured cannot wait for earlier launches, so everything goes to one stream. Two directions
    # still count as side by side, which selects the plans of earlier calls: older drivers cannot load another kernel
    # during a capture.
    pair = () if request.modes.capturing else (torch.cuda.Stream(request.x.device), torch.cuda.Stream(request.x.device))
    return Schedule(longest, pair and _pairs.setdefault(request.x.device, pair), 2)


def by_kernels(
    call: Call, dtype: torch.dtype, backend: Backend, layers: Sequence[Layer], schedule: Schedule
) -> CallResult:
    """Run all layers of a call in `dtype` by the kernels of `layers` [L*D]. Return the same as run_layers."""
    run: RunLayer = partial(autograd.layer_by_kernels, layers, call)
    if schedule.longest < call.steps:
        run = partial(_in_chunks, schedule.longest, call.options.cell, run)
    together = partial(_side_by_side, schedule.streams, backend, run) if schedule.streams else None
    return run_layers(call, dtype, backend, run, together)


def _in_chunks(longest: int, cell: Cell, run: RunLayer, given: Inputs, row: int, reverse: bool) -> LayerResult:
    """Run one layer in one direction in chunks of `longest` steps, without autograd, as a layer_loop.RunLayer does.

    `run` runs a chunk. The reverse direction begins with the last chunk. Between chunks c is float32.
    """
    x, h, c, traversal = given.x, given.h0, given.c0.float(), traversal_of(given, reverse)
    y = x.new_empty(*x.shape[:2], h.shape[2])
    starts = range(0, len(x), longest)
    for start in reversed(starts) if reverse else starts:
        end = min(start + longest, len(x))
        if reverse:
            h, c = traversal.entering(end, h, c, cell)
        y[start:end], (h, c) = run(within(given, slice(start, end))._replace(h0=h, c0=c), row, reverse)
    return y, (h, c.to(given.c0.dtype))


def _side_by_side(streams: Streams, backend: Backend, run: RunLayer, k: int, inputs: list[Inputs]) -> CallResult:
    """Run the two directions of layer k, each on its own stream, as a layer_loop.RunDirections does."""
    results, current = [], torch.cuda.current_stream(inputs[0].x.device)
    for d, stream in enumerate(streams):
        hold_memory(stream, inputs[d])
        stream.wait_stream(current)
        with torch.cuda.stream(stream), named(k, d, backend):
            results.append(run(inputs[d], 2 * k + d, d == 1))
    for stream, (h, final) in zip(streams, results):
        current.wait_stream(stream)
        hold_memory(current, (h, *final))
    return torch.cat([h for h, _ in results], 2), [final for _, final in results]


def hold_memory(stream: torch.cuda.Stream, tensors: Iterable[Tensor | None]) -> None:
    """Hold the memory of tensors after their release until the work queued on `stream` by then has finished."""
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)
