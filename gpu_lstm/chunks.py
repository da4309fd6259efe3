"""Chunks of time: they bound the memory for pre-activations, and let layers run side by side.

Only for backends with kernels of their own. States are handed from chunk to chunk, cell states in float32, so that
chunks change nothing in the recurrence.
"""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from . import streams
from .streams import Streams
from .weights import Weights

WORKSPACE = 64 << 20  # bytes of pre-activations at once, where they are not kept for backward
WAVEFRONT = 8  # chunks that a sequence falls into where layers run side by side
SHORTEST = 64  # steps of a chunk of the wavefront


Span = slice | None
"""From which time to which a chunk goes; None: all times."""


def cut(t: Tensor, span: Span) -> Tensor:
    """The times of a span of t [T, ...]."""
    return t if span is None else t[span]


class Schedule(NamedTuple):
    """How a stack of layers is taken."""

    spans: list[Span]  # of the chunks, in time
    streams: Streams  # one for each layer, or, of layers with two directions, for each direction

    @property
    def side_by_side(self) -> int:
        """How many layers or directions run at once."""
        return max(1, sum(stream is not None for stream in self.streams))


def in_one_piece(weights: list[list[Weights]]) -> Schedule:
    """All steps at once, nothing side by side."""
    return Schedule([None], (None,) * max(len(weights), len(weights[0])))


def schedule(x: Tensor, weights: list[list[Weights]], recompute: bool) -> Schedule:
    """Chunks whose pre-activations fit the workspace, and shorter ones where that lets layers run side by side."""
    if torch.compiler.is_compiling():
        return in_one_piece(weights)
    steps, layers, directions = x.shape[0], len(weights), len(weights[0])
    length = min(_steps_at_once(x, layer[0], recompute) for layer in weights)
    if directions == 1 and steps < 2 * SHORTEST:
        side_by_side: Streams = (None,) * layers
    else:
        side_by_side = streams.for_work_on(x, layers if directions == 1 else directions)
        if directions == 1 and side_by_side[0] is not None:
            length = min(length, max(SHORTEST, ceil(steps / WAVEFRONT)))
    if length >= steps:
        return Schedule([None], side_by_side)
    return Schedule([slice(start, min(start + length, steps)) for start in range(0, steps, length)], side_by_side)


def _steps_at_once(x: Tensor, weights: Weights, recompute: bool) -> int:
    if torch.is_grad_enabled() and (x.requires_grad or weights.weight_hh.requires_grad) and not recompute:
        return x.shape[0]  # they are kept for backward anyway
    step = x.shape[1] * weights.weight_hh.shape[0] * x.element_size()  # bytes
    return max(1, WORKSPACE // max(step, 1))


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
