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


class Schedule(NamedTuple):
    """How a stack of layers is taken."""

    length: int | None  # steps of a chunk; None: all of them
    streams: Streams  # one for each layer, or, of layers with two directions, for each direction

    def spans(self, x: Tensor) -> list[tuple[int, int]]:
        """From which time to which each chunk of x [T, B, I] goes."""
        steps = x.shape[0]
        if self.length is None:
            return [(0, steps)]
        return [(start, min(start + self.length, steps)) for start in range(0, steps, self.length)]


def in_one_piece(weights: list[list[Weights]]) -> Schedule:
    """All steps at once, nothing side by side."""
    return Schedule(None, (None,) * max(len(weights), len(weights[0])))


def schedule(x: Tensor, weights: list[list[Weights]], recompute: bool) -> Schedule:
    """Chunks whose pre-activations fit the workspace, and shorter ones where that lets layers run side by side."""
    steps, layers, directions = x.shape[0], len(weights), len(weights[0])
    if torch.compiler.is_compiling():
        return in_one_piece(weights)
    length = min(_steps_at_once(x, layer[0], recompute) for layer in weights)
    if directions == 2:
        return Schedule(length, streams.for_work_on(x, 2))
    if steps < 2 * SHORTEST:
        return Schedule(length, (None,) * layers)
    side_by_side = streams.for_work_on(x, layers)
    if side_by_side[0] is not None:
        length = min(length, max(SHORTEST, ceil(steps / WAVEFRONT)))
    return Schedule(length, side_by_side)


def _steps_at_once(x: Tensor, weights: Weights, recompute: bool) -> int:
    if torch.is_grad_enabled() and (x.requires_grad or weights.weight_hh.requires_grad) and not recompute:
        return max(x.shape[0], 1)  # they are kept for backward anyway
    step = x.shape[1] * weights.weight_hh.shape[0] * x.element_size()  # bytes
    return max(1, WORKSPACE // max(step, 1))


class Outputs:
    """Chunks of a layer's output, put together in time and over directions.

    Without autograd they are copied into place as they come, so that no second output is ever held.
    """

    def __init__(self, x: Tensor, chunks: int, directions: int, width: int) -> None:
        self._parts: list[list[tuple[int, Tensor]]] = [[] for _ in range(directions)]
        self._whole: Tensor | None = None
        if not torch.is_grad_enabled() and chunks > 1:
            # Made here, on the stream that all others wait for, since several of them write to it.
            self._whole = x.new_empty(*x.shape[:2], directions * width)

    def add(self, h: Tensor, start: int, direction: int) -> None:
        """One chunk of one direction, [t, B, P]."""
        if self._whole is None:
            self._parts[direction].append((start, h))
        else:
            width = h.shape[2]
            self._whole[start : start + len(h), :, direction * width : (direction + 1) * width] = h

    def parts(self) -> list[Tensor]:
        """All tensors held."""
        return [h for parts in self._parts for _, h in parts] if self._whole is None else [self._whole]

    def whole(self) -> Tensor:
        """[T, B, D*P]."""
        if self._whole is not None:
            return self._whole
        in_time = [[h for _, h in sorted(parts, key=lambda part: part[0])] for parts in self._parts]
        directions = [torch.cat(chunks) if len(chunks) > 1 else chunks[0] for chunks in in_time]
        return torch.cat(directions, dim=2) if len(directions) > 1 else directions[0]
