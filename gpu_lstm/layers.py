"""Layers on a chosen backend: one direction of one layer, and layers on top of each other."""

import contextlib
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunks, fused, native, reference, streams, whole_layer
from .backends import KERNEL_BACKENDS, Backend
from .chunks import Outputs, Schedule, cut
from .noise import NO_NOISE, Noise, draw, dropped
from .precision import autocasts, is_exact
from .profiling import named
from .reference import Gates
from .sequences import Traversal, valid_steps
from .settings import Settings
from .transforms import in_a_graph
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
    if backend is Backend.TORCH and not in_a_graph():
        # It knows autocast by itself, but the weights that shut gates are of a size that their dtype must hold.
        return native.layer(x, state, weights.to(compute_dtype(x)) if autocasts(x) else weights, traversal)
    x, state, weights = _computed(x, state, weights)
    with _without_autocast(x):
        if backend is Backend.TORCH:
            return _as_one_operator(x, state, weights, traversal, backend)
        if backend is Backend.REFERENCE:
            return reference.layer(x, state, weights, traversal, noise, record)
        return _by_kernel(x, state, weights, traversal, backend=backend, noise=noise, recompute=recompute)


def _by_kernel(
    x: Tensor, state: State, weights: Weights, traversal: Traversal, *, backend: Backend, noise: Noise, **options: Any
) -> tuple[Tensor, State]:
    if torch.jit.is_tracing() and torch.is_grad_enabled() and weights.weight_hh.requires_grad:
        raise RuntimeError(
            f"torch.jit.trace cannot record the gradients of backend {backend.value!r}: trace within torch.no_grad(), "
            "or with backend 'torch'"
        )
    if torch.compiler.is_exporting() and not noise.present():
        return _as_one_operator(x, state, weights, traversal, backend)
    return fused.layer(x, state, weights, traversal, backend, noise, **options)


def _as_one_operator(
    x: Tensor, state: State, weights: Weights, traversal: Traversal, backend: Backend
) -> tuple[Tensor, State]:
    h, (h_n, c_n) = whole_layer.layer(x, (state[0][None], state[1][None]), [weights], traversal, backend)
    return h, (h_n[0], c_n[0])


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def _computed(x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State, Weights]:
    """The same in the dtype that x is computed in; c in float32 where it was given so beside an x of half precision."""
    dtype = compute_dtype(x)
    h, c = state
    if all(t.dtype is dtype for t in (x, h, c, *weights.present())):
        return x, state, weights
    return x.to(dtype), (h.to(dtype), c if is_exact(c, x) else c.to(dtype)), weights.to(dtype)


class Layer(NamedTuple):
    """One layer in one call: what each of its D directions has, and what follows it."""

    weights: list[Weights]
    noise: list[Noise]
    kept: Tensor | None  # bool [T, B, D*P]: what dropout leaves of its output
    number: int  # from the bottom


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
    plain = backend is Backend.TORCH and traversal.is_plain()
    if plain and not settings.residual and not in_a_graph() and _same_sizes(weights):
        return _in_one_call(x, states, weights, settings)
    drawn = draw(weights, x, compute_dtype(x), settings)
    layers = [Layer(*parts) for parts in zip(weights, *drawn, range(len(weights)))]
    connect = partial(_connect, residual=settings.residual, dropout=settings.dropout)
    if backend in KERNEL_BACKENDS:
        run_direction = partial(_by_kernel, backend=backend, recompute=settings.recompute)
        return _by_kernels(run_direction, connect, x, states, layers, traversal, settings.recompute)
    if plain:
        run_layer = partial(_by_torch, training=settings.training)
    else:
        run_direction = partial(one_direction, backend=backend, record=record)
        run_layer = partial(_directions, run_direction, schedule=chunks.in_one_piece(weights))
    return _layer_by_layer(run_layer, connect, x, states, layers, traversal)


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


def _by_torch(x: Tensor, state: State, layer: Layer, traversal: Traversal, *, training: bool) -> tuple[Tensor, State]:
    if in_a_graph():
        computed = [_computed(x, state, weights) for weights in layer.weights]
        x, state, _ = computed[0]
        with _without_autocast(x):
            return whole_layer.layer(x, state, [weights for *_, weights in computed], traversal, Backend.TORCH)
    with named(layer.number, None, None):
        return native.stack(x, state, [layer.weights], training=training)


def _by_kernels(
    run_direction: partial,
    connect: partial,
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L]
    layers: list[Layer],
    traversal: Traversal,
    recompute: bool,
) -> tuple[Tensor, list[State]]:
    """All in the dtype that x is computed in, once and not for every chunk; c goes from chunk to chunk in float32."""
    computed = [[_computed(x, state, one) for one in layer.weights] for layer, state in zip(layers, states)]
    layers = [  # by every field, since torch 2.8 does not trace _replace
        Layer([one for *_, one in each], layer.noise, layer.kept, layer.number) for each, layer in zip(computed, layers)
    ]
    x, states = computed[0][0][0], [state for (_, state, _), *_ in computed]
    exact = [(h, c.float()) for h, c in states]
    schedule = chunks.schedule(x, [layer.weights for layer in layers], recompute)
    run_direction = partial(run_direction, side_by_side=schedule.side_by_side)
    with _without_autocast(x):
        if len(layers[0].weights) == 1:
            y, finals = _wavefront(run_direction, connect, x, exact, layers, traversal, schedule)
        else:
            run_layer = partial(_directions, run_direction, schedule=schedule)
            y, finals = _layer_by_layer(run_layer, connect, x, exact, layers, traversal)
    return y, [(h, c.to(c0.dtype)) for (h, c), (_, c0) in zip(finals, states)]


def _layer_by_layer(
    run_layer: partial,
    connect: partial,
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L]
    layers: list[Layer],
    traversal: Traversal,
) -> tuple[Tensor, list[State]]:
    finals = []
    for layer, state in zip(layers, states):
        y, final = run_layer(x, state, layer, traversal)
        x = connect(x, y, traversal.lengths, layer.kept)
        finals.append(final)
    return x, finals


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
    outputs = Outputs(x, schedule.spans, 1, states[top][0].shape[1])
    for span in schedule.spans:
        y, chunk = cut(x, span), traversal.within(span)
        for k, layer in enumerate(layers):
            noise, part = layer.noise[0].within(span), chunk.of(k)
            kept = [] if layer.kept is None else [cut(layer.kept, span)]
            below = schedule.streams[k - 1] if k else None
            with streams.on(
                schedule.streams[k], below, (y, *states[k], *part.reset_tensors(), *noise.present(), *kept)
            ):
                with named(k, 0, run_direction):
                    h, states[k] = run_direction(y, states[k], layer.weights[0], part, noise=noise)
                y = connect(y, h, part.lengths, *kept)
                if k == top:
                    outputs.add(y, span, 0)
    streams.join(schedule.streams, [*outputs.parts(), *(tensor for state in states for tensor in state)])
    return outputs.whole(), [(h[None], c[None]) for h, c in states]


def _directions(
    run_direction: partial,
    x: Tensor,  # [T, B, I]
    state: State,  # ([D, B, P], [D, B, H])
    layer: Layer,
    traversal: Traversal,
    *,
    schedule: Schedule,
) -> tuple[Tensor, State]:
    """All directions of one layer, side by side where there are streams: [T, B, D*P] and the final state."""
    outputs = Outputs(x, schedule.spans, len(layer.weights), state[0].shape[2])
    finals: list[State] = []
    for d, (weights, noise) in enumerate(zip(layer.weights, layer.noise)):
        h, c, own = state[0][d], state[1][d], traversal.of(layer.number * len(layer.weights) + d)
        with streams.on(schedule.streams[d], None, (x, h, c, *own.reset_tensors(), *noise.present())):
            for span in reversed(schedule.spans) if d else schedule.spans:
                part = own.within(span)
                if d:
                    part = part.backwards()
                    h, c = own.reset_at_end_of(span, h, c)
                with named(layer.number, d, run_direction):
                    y, (h, c) = run_direction(cut(x, span), (h, c), weights, part, noise=noise.within(span))
                outputs.add(y, span, d)
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
