"""What the backends share: layers one after another, and the directions of each."""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..call.checks import is_exact
from ..call.choices import Backend
from ..call.noise import NO_NOISE, Noise, draw
from ..call.options import Options
from ..call.request import Call
from ..call.sequences import Traversal, without_padding
from ..call.weights import State, Weights
from ..kernels.private import is_profiled

NOTHING = contextlib.nullcontext()


class Part(NamedTuple):
    """What a call asks of one layer in one direction."""

    row: int  # its number among [L*D]
    x: Tensor  # [T, B, I]
    state: State  # ([1, B, P], [1, B, H])
    weights: Weights
    traversal: Traversal
    noise: Noise

    def to(self, dtype: torch.dtype) -> Part:
        """The same in `dtype`, but c stays float32 if the user passed a float32 c with a half-precision x."""
        row, x, (h, c), weights, traversal, noise = self
        if all([t.dtype is dtype for t in (x, h, c, *weights) if t is not None]):
            return self
        # On a CPU torch's autocast casts no c of a projection. Several numbers of a unit need float32.
        stays = is_exact(c, x) or len(c) > len(h) or (x.is_cpu and weights.weight_hr is not None)
        state = h.to(dtype), c if stays else c.to(dtype)
        return Part(row, x.to(dtype), state, weights.to(dtype), traversal, noise)


RunPart = Callable[[Part], tuple[Tensor, State]]
"""run(part): h [T, B, P] and the final state. Each backend has one such function."""


def run_layers(call: Call, dtype: torch.dtype, backend: Backend, run: RunPart) -> tuple[Tensor, list[State]]:
    """All layers in order, dropout between, computed in `dtype`: output [T, B, D*P] and final states as Call.states."""
    options, traversal, x = call.options, call.traversal, call.x
    noise, kept = draw(call.weights, (call.steps, call.batch), dtype, options) if options.noisy else (None, None)
    finals: list[State] = []
    for k, directions in enumerate(call.weights):
        outputs = []
        for d, weights in enumerate(directions):
            row = len(finals)
            way = traversal if traversal.reset_states is None else traversal.of(row)
            if d:
                way = way.backwards()
            part = Part(row, x, call.states[row], weights, way, noise[k][d] if noise else NO_NOISE)
            if is_profiled():
                with named(k, d, backend):
                    h, final = run(part)
            else:  # a context that does nothing costs two calls
                h, final = run(part)
            outputs.append(h)
            finals.append(final)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        x = connect(x, y, traversal.lengths, kept[k] if kept else None, options) if options.connects else y
    return x, finals


def connect(
    x: Tensor,  # [t, B, I], a layer's input
    y: Tensor,  # [t, B, F], its output
    lengths: Tensor | None,  # [B], within these t steps
    kept: Tensor | None,  # bool [t, B, F], as noise.draw returns it
    options: Options,
) -> Tensor:
    """The next layer's input: the output, plus the input if it is residual and equally wide, after dropout."""
    if options.residual and y.shape == x.shape:
        y = y + without_padding(x, lengths)
    if kept is None:
        return y
    return y * (kept.to(y.dtype) / (1 - options.dropout) if options.dropout < 1 else 0)


def without_autocast(call: Call) -> contextlib.AbstractContextManager:
    """A block with autocast off; nothing if it is off already."""
    return NOTHING if call.modes.autocast is None else torch.autocast(call.x.device.type, enabled=False)


def named(layer: int, direction: int | None, backend: Backend) -> contextlib.AbstractContextManager:
    """A block that torch.profiler shows as, say, "gpu_lstm layer 0 forward, triton"; without a profiler, nothing.

    Layers are numbered from the bottom. Direction 1 is the reverse one; None: all.
    """
    if not is_profiled() or torch.compiler.is_compiling():
        return NOTHING
    way = {None: "", 0: " forward", 1: " reverse"}[direction]
    return torch.profiler.record_function(f"gpu_lstm layer {layer}{way}, {backend.value}")
