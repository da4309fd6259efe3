"""What the backends share: layers one after another, and the directions of each."""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call.checks import is_exact
from ..call.noise import NO_NOISE, Noise, draw
from ..call.options import Options
from ..call.prepare import Call
from ..call.sequences import without_padding
from ..call.weights import State, Weights
from ..kernels.private import is_profiled

RunLayer = Callable[[int, Tensor, Sequence[Noise]], tuple[Tensor, list[State]]]
"""run(k, x [T, B, I], noise [D]): output [T, B, D*P] and final states [D] of layer k."""

RunDirection = Callable[..., tuple[Tensor, State]]
"""run(row, x, state, weights, traversal, noise): h [T, B, P] and (h_n, c_n) of one layer in one direction; `row` is its
number among [L*D]."""

NOTHING = contextlib.nullcontext()
_WITHOUT_NOISE = (NO_NOISE, NO_NOISE)  # of both directions


def one_after_another(call: Call, dtype: torch.dtype, run: RunLayer) -> tuple[Tensor, list[State]]:
    """All layers in order, dropout between, computed in `dtype`: output [T, B, D*P] and final states [L*D]."""
    options, x = call.options, call.x
    finals: list[State] = []
    noise, kept = draw(call.weights, (call.steps, call.batch), dtype, options) if options.noisy else (None, None)
    for k in range(len(call.weights)):
        y, states = run(k, x, noise[k] if noise else _WITHOUT_NOISE)
        x = connect(x, y, call.traversal.lengths, kept[k] if kept else None, options) if options.connects else y
        finals += states
    return x, finals


def by_direction(call: Call, backend: str, rows: list[State], run: RunDirection) -> RunLayer:
    """The directions of a layer in order. `rows` [L*D]: initial states, of Call.state_rows or kernel_rows."""
    traversal, directions = call.traversal, call.options.directions

    def run_layer(k: int, x: Tensor, noise: Sequence[Noise]) -> tuple[Tensor, list[State]]:
        outputs, finals = [], []
        for d, weights in enumerate(call.weights[k]):
            row = k * directions + d
            way = traversal if traversal.reset_states is None else traversal.of(row)
            if d:
                way = way.backwards()
            if is_profiled():
                with named(k, d, backend):
                    y, state = run(row, x, rows[row], weights, way, noise[d])
            else:  # a context that does nothing costs two calls
                y, state = run(row, x, rows[row], weights, way, noise[d])
            outputs.append(y)
            finals.append(state)
        return outputs[0] if directions == 1 else torch.cat(outputs, 2), finals

    return run_layer


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


def cast(x: Tensor, state: State, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, State, Weights]:
    """The same in `dtype`, but c stays float32 if the user passed a float32 c with a half-precision x."""
    h, c = state
    if all([t.dtype is dtype for t in (x, h, c, *weights) if t is not None]):
        return x, state, weights
    stays = is_exact(c, x) or (x.is_cpu and weights.weight_hr is not None)  # where torch's autocast casts no c either
    return x.to(dtype), (h.to(dtype), c if stays else c.to(dtype)), weights.to(dtype)


def without_autocast(call: Call) -> contextlib.AbstractContextManager:
    """A block with autocast off; nothing if it is off already."""
    return NOTHING if call.modes.autocast is None else torch.autocast(call.x.device.type, enabled=False)


def named(layer: int, direction: int | None, backend: str) -> contextlib.AbstractContextManager:
    """A block that torch.profiler shows as, say, "gpu_lstm layer 0 forward, triton"; without a profiler, nothing.

    Layers are numbered from the bottom. Direction 1 is the reverse one; None: all.
    """
    if not is_profiled() or torch.compiler.is_compiling():
        return NOTHING
    way = {None: "", 0: " forward", 1: " reverse"}[direction]
    return torch.profiler.record_function(f"gpu_lstm layer {layer}{way}, {backend}")
