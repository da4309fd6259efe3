"""Layers on a chosen backend: one direction of one layer, and layers on top of each other."""

import contextlib
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunks, fused, native, reference, streams
from .backends import KERNEL_BACKENDS, Backend
from .chunks import Outputs, Schedule
from .noise import NO_NOISE, Noise, draw, dropped
from .precision import autocasts, is_exact
from .reference import Gates
from .sequences import Traversal, valid_steps
from .settings import Settings
from .weights import State, Weights


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a layer computes x in: x's own or, for float32 and narrower, autocast's where that is on."""
    if autocasts(x) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def one_direction(
    x: Tensor,  # [T, B, I]
    state: State,  # ([B, P], [B, H])
    weights: Weights,
    traversal: Traversal,
    backend: Backend,
    noise: Noise = NO_NOISE,
    recompute: bool = False,
    record: list[Gates] | None = None,
) -> tuple[Tensor, State]:
    """One layer in one direction: h [T, B, P] and (h_n [B, P], c_n [B, H])."""
    if backend is Backend.TORCH:  # which knows autocast by itself
        return native.layer(x, state, weights, traversal)
    x, state, weights = _computed(x, state, weights)
    with torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext():
        if backend is Backend.REFERENCE:
            return reference.layer(x, state, weights, traversal, noise, record)
        return fused.layer(x, state, weights, traversal, backend, noise, recompute)


def _computed(x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State, Weights]:
    """The same in the dtype that x is computed in; c in float32 where it was given so beside an x of half precision."""
    dtype = compute_dtype(x)
    h, c = state
    return x.to(dtype), (h.to(dtype), c if is_exact(c, x) else c.to(dtype)), weights.to(dtype)


class Layer(NamedTuple):
    """One layer in one call: what each of its D directions has, and what follows it."""

    weights: list[Weights]
    noise: list[Noise]
    kept: Tensor | None  # bool [T, B, D*P]: what dropout leaves of its output


def stack(
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L]
    weights: list[list[Weights]],  # [L][D]
    traversal: Traversal,  # of the forward direction
    backend: Backend,
    settings: Settings,
    record: list[Gates] | None = None,
) -> tuple[Tensor, list[State]]:
    """Layers on top of each other, dropout between them: output [T, B, D*P] and the final states, one pair a layer.

    Recurrent dropout and zoneout are for the Triton backend and the reference. The reference appends the gates of every
    layer and direction to `record`, if there is one. Arguments are not checked.
    """
    plain = backend is Backend.TORCH and traversal.is_plain
    if plain and not settings.residual and _same_sizes(weights):
        return _in_one_call(x, states, weights, settings)
    noise, kept = draw(weights, x, compute_dtype(x), settings)
    has_kernels = backend in KERNEL_BACKENDS
    schedule = chunks.in_one_piece(weights)
    if has_kernels:
        # In the dtype that x is computed in once, and not for every chunk of time.
        computed = [[_computed(x, state, one) for one in layer] for layer, state in zip(weights, states)]
        weights = [[one for *_, one in layer] for layer in computed]
        x, states = computed[0][0][0], [layer[0][1] for layer in computed]
        schedule = chunks.schedule(x, weights, settings.recompute)
    cell_dtypes = [c.dtype for _, c in states]
    if has_kernels:
        states = [(h, c.float()) for h, c in states]

    run_direction = partial(one_direction, backend=backend, recompute=settings.recompute, record=record)
    connect = partial(_connect, residual=settings.residual, dropout=settings.dropout)
    layers = [Layer(*parts) for parts in zip(weights, noise, kept)]
    if len(weights[0]) == 1 and not plain:
        x, finals = _wavefront(run_direction, connect, x, states, layers, traversal, schedule)
    else:
        finals = []
        for layer, state in zip(layers, states):
            if plain:
                y, final = native.stack(x, state, [layer.weights], training=settings.training)
            else:
                y, final = _both_directions(run_direction, x, state, layer, traversal, schedule)
            x = connect(x, y, traversal.lengths, layer.kept)
            finals.append(final)
    return x, [(h, c.to(dtype)) for (h, c), dtype in zip(finals, cell_dtypes)] if has_kernels else finals


def _same_sizes(weights: list[list[Weights]]) -> bool:
    return len({(layer[0].weight_hh.shape, layer[0].present()[-1].shape) for layer in weights}) == 1


def _in_one_call(
    x: Tensor, states: list[State], weights: list[list[Weights]], settings: Settings
) -> tuple[Tensor, list[State]]:
    """torch's own LSTM takes all layers, dropout included."""
    h0, c0 = (torch.cat(state) for state in zip(*states))  # [L*D, B, *]
    y, (h_n, c_n) = native.stack(x, (h0, c0), weights, settings.dropout, settings.training)
    directions = len(weights[0])
    return y, list(zip(h_n.split(directions), c_n.split(directions)))


def _wavefront(
    run_direction: partial,
    connect: partial,
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L] of ([1, B, P], [1, B, H])
    layers: list[Layer],
    traversal: Traversal,
    schedule: Schedule,
) -> tuple[Tensor, list[State]]:
    """Layers of one direction, chunk by chunk through all of them.

    Where each has a stream, a layer takes a chunk while the layer above takes the chunk before.
    """
    states, top = [(h[0], c[0]) for h, c in states], len(layers) - 1
    spans = schedule.spans(x)
    outputs = Outputs(x, len(spans), 1, states[top][0].shape[1])
    for start, stop in spans:
        y, part = x[start:stop], traversal.within(start, stop)
        for k, layer in enumerate(layers):
            noise = layer.noise[0].within(start, stop)
            kept = [] if layer.kept is None else [layer.kept[start:stop]]
            below = schedule.streams[k - 1] if k else None
            with streams.on(schedule.streams[k], below, (y, *states[k], *noise.present(), *kept)):
                h, states[k] = run_direction(y, states[k], layer.weights[0], part, noise=noise)
                y = connect(y, h, part.lengths, *kept)
                if k == top:
                    outputs.add(y, start, 0)
    streams.join(schedule.streams, [*outputs.parts(), *(tensor for state in states for tensor in state)])
    return outputs.whole(), [(h[None], c[None]) for h, c in states]


def _both_directions(
    run_direction: partial,
    x: Tensor,  # [T, B, I]
    state: State,  # ([2, B, P], [2, B, H])
    layer: Layer,
    traversal: Traversal,
    schedule: Schedule,
) -> tuple[Tensor, State]:
    """Both directions of one layer, side by side: [T, B, 2P] and the final state."""
    spans = schedule.spans(x)
    outputs = Outputs(x, len(spans), 2, state[0].shape[2])
    finals: list[State] = []
    for d, (weights, noise) in enumerate(zip(layer.weights, layer.noise)):
        h, c = state[0][d], state[1][d]
        with streams.on(schedule.streams[d], None, (x, h, c, *noise.present())):
            for start, stop in reversed(spans) if d else spans:
                if d and stop < len(x):  # this chunk continues a later one
                    separated = traversal.separated_at(stop)  # [B]
                    if separated is not None:
                        h, c = (torch.where(separated[:, None], 0, s) for s in (h, c))
                part = traversal.within(start, stop)
                y, (h, c) = run_direction(
                    x[start:stop], (h, c), weights, part.backwards() if d else part, noise=noise.within(start, stop)
                )
                outputs.add(y, start, d)
        finals.append((h, c))
    streams.join(schedule.streams, [*outputs.parts(), *(tensor for final in finals for tensor in final)])
    h_n, c_n = (torch.stack(tensors) for tensors in zip(*finals))
    return outputs.whole(), (h_n, c_n)


def _connect(
    x: Tensor,  # [t, B, I], a layer's input
    y: Tensor,  # [t, B, F], its output
    lengths: Tensor | None,  # [B], within these t steps
    kept: Tensor | None = None,  # bool [t, B, F]
    *,
    residual: bool,
    dropout: float,
) -> Tensor:
    """What the next layer gets: the output, with the input added where `residual` and widths allow, and dropout."""
    if residual and y.shape == x.shape:
        valid = valid_steps(x.shape[0], lengths)
        y = y + (x if valid is None else torch.where(valid[:, :, None], x, 0))
    return dropped(y, kept, dropout)
