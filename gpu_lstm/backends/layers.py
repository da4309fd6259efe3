"""Layers on top of each other, every direction in one piece: what the backends share."""

import contextlib
from collections.abc import Callable

import torch
import torch.autograd.profiler as profiler
from torch import Tensor

from ..call.checks import is_exact
from ..call.noise import NO_NOISE, draw, dropped
from ..call.options import Options
from ..call.prepare import Call
from ..call.sequences import valid_steps
from ..call.weights import State, Weights

Direction = Callable[..., tuple[Tensor, State]]
"""direction(row, x, state, weights, traversal, noise): h [T, B, P] and (h_n, c_n) of one layer in one direction; `row`
is its number among [L*D]."""


def cast(x: Tensor, state: State, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, State, Weights]:
    """The same in `dtype`; but c stays float32 where it was given so together with an x in half precision."""
    h, c = state
    if all([t.dtype is dtype for t in (x, h, c, *weights) if t is not None]):
        return x, state, weights
    return x.to(dtype), (h.to(dtype), c if is_exact(c, x) else c.to(dtype)), weights.to(dtype)


def without_autocast(call: Call) -> contextlib.AbstractContextManager:
    """A block with autocast off; nothing if it is off already."""
    if call.modes.autocast is None:
        return NOTHING
    return torch.autocast(call.x.device.type, enabled=False)


NOTHING = contextlib.nullcontext()


def named(layer: int, direction: int | None, backend: str) -> contextlib.AbstractContextManager:
    """A block that torch.profiler shows as, say, "gpu_lstm layer 0 forward, triton"; without a profiler, nothing.

    Layers are numbered from the bottom. Direction 1 is the reverse one; None: all.
    """
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return NOTHING
    way = {None: "", 0: " forward", 1: " reverse"}[direction]
    return profiler.record_function(f"gpu_lstm layer {layer}{way}, {backend}")


def one_after_another(
    call: Call,
    run: Direction,
    backend: str,
    dtype: torch.dtype,
    rows: list[State],  # [L*D] initial states, of Call.state_rows or kernel_rows
) -> tuple[Tensor, list[State]]:
    """Layers in order, and the directions of each, dropout between: output [T, B, D*P] and final states [L*D]."""
    options, traversal, x = call.options, call.traversal, call.x
    noise, kept = draw(call.weights, (call.steps, call.batch), dtype, options) if options.noisy else (None, None)
    finals: list[State] = []
    for k, layer in enumerate(call.weights):
        parts = []
        for d, weights in enumerate(layer):
            n = len(finals)
            own = traversal if traversal.reset_states is None else traversal.of(n)
            if d:
                own = own.backwards()
            with named(k, d, backend) if profiler._is_profiler_enabled else NOTHING:
                y, state = run(n, x, rows[n], weights, own, NO_NOISE if noise is None else noise[k][d])
            parts.append(y)
            finals.append(state)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        x = connect(x, y, traversal.lengths, kept[k] if kept else None, options) if options.connects else y
    return x, finals


def connect(
    x: Tensor,  # [t, B, I], a layer's input
    y: Tensor,  # [t, B, F], its output
    lengths: Tensor | None,  # [B], within these t steps
    kept: Tensor | None,  # bool [t, B, F]
    options: Options,
) -> Tensor:
    """The next layer's input: the output, plus the input if it is residual and equally wide, after dropout."""
    if options.residual and y.shape == x.shape:
        valid = valid_steps(x.shape[0], lengths)
        y = y + (x if valid is None else torch.where(valid[:, :, None], x, 0))
    return dropped(y, kept, options.dropout)
