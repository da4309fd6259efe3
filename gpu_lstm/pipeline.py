"""The backends with kernels of their own: layers, directions and chunks of time, side by side.

The kernels take one layer in one direction over one chunk of time; states are handed on, cell states in float32, so
that chunks change nothing in the recurrence. Chunks bound the memory for pre-activations, and let a layer work on one
chunk while the layer above works on the chunk before: a wavefront, with a CUDA stream for each layer. The two
directions of a layer have a stream each.
"""

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd
from .noise import Noise
from .sequences import valid_steps
from .weights import Weights

State = tuple[Tensor, Tensor]

WORKSPACE = 64 << 20  # bytes of pre-activations at once, where they are not kept for backward
WAVEFRONT = 8  # chunks that a sequence falls into where layers run side by side
SHORTEST = 64  # steps of a chunk of the wavefront


def lstm_stack(
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L] of ([D, B, P], [D, B, H])
    layers: list[list[Weights]],  # [L][D], in the dtype of x
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B]
    backend: str,
    dropout: float,
    residual: bool,
    recompute: bool,
    noise: list[list[Noise]],  # [L][D]
) -> tuple[Tensor, list[State]]:
    """Output [T, B, D*P] and the final states, one pair a layer, in the dtype of x."""
    run = partial(_chunk, steps=len(x), lengths=lengths, resets=resets, backend=backend, recompute=recompute)
    connect = partial(_connect, lengths=lengths, residual=residual)
    if len(layers[0]) == 1:
        return _wavefront(run, connect, x, states, layers, dropout, recompute, noise)
    finals = []
    for k, (layer, state) in enumerate(zip(layers, states)):
        y, final = _both_directions(run, x, state, layer, recompute, noise[k])
        x = connect(x, y, start=0, dropout=dropout if k + 1 < len(layers) else 0.0)
        finals.append(final)
    return x, finals


def _wavefront(
    run: partial,
    connect: partial,
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L] of ([1, B, P], [1, B, H])
    layers: list[list[Weights]],  # [L][1]
    dropout: float,
    recompute: bool,
    noise: list[list[Noise]],  # [L][1]
) -> tuple[Tensor, list[State]]:
    """A stack in the forward direction, chunk by chunk through all layers."""
    steps, top = len(x), len(layers) - 1
    length = min(_chunk_length(x, weights, recompute) for (weights,) in layers)
    side_by_side = _has_streams(x) and top > 0 and steps >= 2 * SHORTEST
    if side_by_side:
        length = min(length, max(SHORTEST, ceil(steps / WAVEFRONT)))
    streams = _streams(x.device, len(layers)) if side_by_side else (None,) * len(layers)

    cell_dtype = states[0][1].dtype
    states = [(h[0], c[0].float()) for h, c in states]
    outputs = _Outputs(x, length, 1, states[top][0].shape[-1])
    for start in range(0, steps, length):
        y = x[start : start + length]
        for k, (weights,) in enumerate(layers):
            (own,) = noise[k]
            with _on(streams[k], after=streams[k - 1] if k else None, reads=(y, *states[k], *own.present())):
                h, *final = run(y, *states[k], weights, own, start=start, reverse=False)
                y = connect(y, h, start=start, dropout=dropout if k < top else 0.0)
                states[k] = (final[0], final[1])
                if k == top:
                    outputs.add(y, start, 0)
    _join(streams, [*outputs.parts(), *(tensor for state in states for tensor in state)])
    return outputs.whole(), [(h[None], c.to(cell_dtype)[None]) for h, c in states]


def _both_directions(
    run: partial,
    x: Tensor,  # [T, B, I]
    state: State,  # ([2, B, P], [2, B, H])
    layer: list[Weights],  # [2]
    recompute: bool,
    noise: list[Noise],  # [2]
) -> tuple[Tensor, State]:
    """Both directions of one layer: [T, B, 2P] and the final ([2, B, P], [2, B, H])."""
    length = _chunk_length(x, layer[0], recompute)
    streams = _streams(x.device, 2) if _has_streams(x) else (None, None)
    outputs = _Outputs(x, length, 2, state[0].shape[-1])
    finals = []
    for d, (weights, own) in enumerate(zip(layer, noise)):
        starts = range(0, len(x), length)
        h_n, c_n = state[0][d], state[1][d].float()
        with _on(streams[d], after=None, reads=(x, h_n, c_n, *own.present())):
            for start in reversed(starts) if d else starts:
                h, h_n, c_n = run(x[start : start + length], h_n, c_n, weights, own, start=start, reverse=bool(d))
                outputs.add(h, start, d)
        finals.append((h_n, c_n))
    _join(streams, [*outputs.parts(), *(tensor for final in finals for tensor in final)])
    h_n, c_n = (torch.stack(tensors) for tensors in zip(*finals))
    return outputs.whole(), (h_n, c_n.to(state[1].dtype))


def _chunk(
    x: Tensor,  # [t, B, I], the times from `start` on
    h: Tensor,  # [B, P]
    c: Tensor,  # [B, H] float32
    weights: Weights,
    noise: Noise,  # of the whole sequence
    *,
    start: int,
    reverse: bool,
    steps: int,  # T
    lengths: Tensor | None,  # [B] of the whole sequence
    resets: Tensor | None,  # [T, B]
    backend: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction, over one chunk: h [t, B, P], and the states after it."""
    stop = start + len(x)
    if reverse and resets is not None and stop < steps:
        # A reset at `stop` separates this chunk from the later one that it continues.
        separated = resets[stop] if lengths is None else resets[stop] & (lengths > stop)  # [B]
        h, c = (torch.where(separated[:, None], 0, state) for state in (h, c))
    lengths = None if lengths is None else (lengths - start).clamp(0, len(x))
    resets = None if resets is None else resets[start:stop]
    noise = noise.within(start, stop)
    return autograd.lstm_layer(x, h, c, *weights, lengths, resets, reverse, backend, recompute, noise)


def _connect(
    x: Tensor,  # [t, B, I], a layer's input at the times from `start` on
    y: Tensor,  # [t, B, F], its output
    *,
    start: int,
    dropout: float,
    lengths: Tensor | None,
    residual: bool,
) -> Tensor:
    """What the next layer gets: the output, with the input added where `residual` and widths allow, and dropout."""
    if residual and y.shape == x.shape:
        valid = None if lengths is None else valid_steps(len(x), lengths - start)
        y = y + (x if valid is None else torch.where(valid[:, :, None], x, 0))
    return F.dropout(y, dropout) if dropout else y


def _chunk_length(x: Tensor, weights: Weights, recompute: bool) -> int:
    """Steps whose pre-activations fit the workspace; all steps where they are kept for backward anyway."""
    kept = torch.is_grad_enabled() and (x.requires_grad or weights.weight_hh.requires_grad) and not recompute
    if kept or torch.compiler.is_compiling():
        return max(len(x), 1)
    step = x.shape[1] * weights.weight_hh.shape[0] * x.element_size()  # bytes
    return max(1, WORKSPACE // max(step, 1))


class _Outputs:
    """Chunks of a layer's output, put together in time and over directions.

    Without autograd they are copied into place as they come, so that no second output is ever held.
    """

    def __init__(self, x: Tensor, length: int, directions: int, width: int) -> None:
        self._parts: list[list[tuple[int, Tensor]]] = [[] for _ in range(directions)]
        self._whole: Tensor | None = None
        if not torch.is_grad_enabled() and length < len(x):
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


# CUDA streams. A tensor that another stream reads than the one that made it is recorded on that other, so that its
# memory is not handed out again too early.


def _has_streams(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


@functools.cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None, after: torch.cuda.Stream | None, reads: tuple[Tensor, ...]) -> Iterator[None]:
    """Work on `stream`, once what is queued on `after` (by default the current stream) is done."""
    if stream is None:
        yield
        return
    stream.wait_stream(after or torch.cuda.current_stream(stream.device))
    for tensor in reads:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def _join(streams: tuple[torch.cuda.Stream | None, ...], results: list[Tensor]) -> None:
    """Have the current stream wait for all others, and read their results."""
    for stream in streams:
        if stream is not None:
            current = torch.cuda.current_stream(stream.device)
            current.wait_stream(stream)
            for tensor in results:
                tensor.record_stream(current)
