"""The loop over layers and directions, which all backends share."""

from __future__ import annotations  # torch.compile tries to evaluate annotations of nested functions, and fails

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..call.checks import is_exact
from ..call.choices import KERNEL_BACKENDS, Backend
from ..call.noise import NO_NOISE, Noise, draw
from ..call.options import Options
from ..call.request import Call
from ..call.sequences import Traversal, without_padding
from ..call.weights import NAMES, CallResult, LayerResult, State, Weights
from ..kernels.contract import package_of
from ..kernels.private import is_profiled
from ..kernels.tensors import TENSORS, Inputs

NOTHING = contextlib.nullcontext()

RunLayer = Callable[[Inputs, int, bool], LayerResult]
"""run(inputs, row, reverse) runs one layer in one direction, number `row` of [L*D].

It returns h [T, B, P] and the final state. Each backend has one such function."""
RunDirections = Callable[[int, list[Inputs]], CallResult]
"""run(k, inputs [D]) runs all directions of layer k. It returns the output [T, B, D*P] and the final states [D]."""
_IN_TIME = tuple(row.name for row in TENSORS if row.size.startswith("T"))


def run_layers(
    call: Call, dtype: torch.dtype | None, backend: Backend, run: RunLayer, together: RunDirections | None = None
) -> CallResult:
    """Run all layers in order, with dropout and residual connections between them.

    All tensors are first cast to `dtype`, and the layers run without autocast. If `dtype` is None, nothing is cast, and
    autocast stays as it is. `run` runs the directions of a layer one after another. If `together` is given, it runs
    them instead.

    Returns:
        The output [T, B, D*P], and the final states, in the form of Call.states.
    """
    if dtype is not None and call.modes.autocast is not None:
        call = cast(call, dtype)  # autocast is still on, so that its cache keeps the cast weights
        with torch.autocast(call.x.device.type, enabled=False):
            return run_layers(call, None, backend, run, together)
    if dtype is not None and not (dtype is call.x.dtype is torch.float32):
        call = cast(call, dtype)
    options, traversal, x = call.options, call.traversal, call.x
    drawn = draw(call.weights, (call.steps, call.batch), x.dtype, options) if options.noisy else None
    finals: list[State] = []
    for k, directions in enumerate(call.weights):
        noise = drawn[0][k] if drawn else [NO_NOISE] * len(directions)
        inputs = [inputs_of(call, k, d, x, noise[d]) for d in range(len(directions))]
        if together is not None:
            y, states = together(k, inputs)
            finals += states
        else:
            outputs = []
            for d, each in enumerate(inputs):
                row, reverse = len(finals), traversal.reverse or d == 1
                if is_profiled():
                    with named(k, d, backend):
                        h, final = run(each, row, reverse)
                else:  # even a context that does nothing costs two calls
                    h, final = run(each, row, reverse)
                outputs.append(h)
                finals.append(final)
            y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        x = connect(x, y, traversal.lengths, drawn[1][k] if drawn else None, options) if options.connects else y
    return x, finals


def inputs_of(call: Call, k: int, d: int, x: Tensor, noise: Noise) -> Inputs:
    """Return the Inputs of layer k in direction d, where x [T, B, I] is the layer's input."""
    row, (lengths, resets, _, reset_to) = len(call.weights[0]) * k + d, call.traversal
    reset_h = reset_c = None
    if reset_to is not None:
        reset_h, reset_c = reset_to[row]
        if d == 1:  # for a reset at t + 1 the reverse direction restarts at t, see Traversal
            reset_h, reset_c = reset_h.roll(-1, 0), reset_c.roll(-1, 0)
    return Inputs(x, *call.states[row], *call.weights[k][d], reset_h, reset_c, *noise, lengths, resets)


def weights_of(inputs: Inputs) -> Weights:
    """Return the weights among the Inputs of a layer in one direction."""
    return Weights(*[getattr(inputs, name) for name in NAMES])


def traversal_of(inputs: Inputs, reverse: bool) -> Traversal:
    """Return the Traversal of a layer with these Inputs."""
    states = None if inputs.reset_h is None else [(inputs.reset_h, inputs.reset_c)]
    return Traversal(inputs.lengths, inputs.resets, reverse, states)


def in_steps(inputs: Inputs, reverse: bool) -> tuple[Callable[[Tensor], Tensor], Tensor | None, Tensor | None]:
    """Return a function and two masks, with which a backend runs either direction as a forward one, step after step.

    Returns:
        reordered: a function that brings t [T, B, F] from the order of time into the order of steps, or back. It writes
            zeros past the end of each sequence, where both orders are the same.
        ended: bool [T, B], True past the end of a sequence, or None if all sequences have T steps.
        reset: bool [T, B], True where the state is reset before the step, or None if there is no reset.
    """
    time, valid, reset = traversal_of(inputs, reverse).steps(inputs.x)  # [T, B] each, or None
    ended = None if valid is None else ~valid

    def reordered(t: Tensor) -> Tensor:
        t = t if ended is None else torch.where(ended[:, :, None], 0, t)
        if not reverse and not torch.jit.is_tracing():  # in a trace `gather` fails for any other T, as it has to
            return t
        return t.gather(0, time[:, :, None].expand_as(t))

    return reordered, ended, reset


def within(inputs: Inputs, span: slice) -> Inputs:
    """Return the Inputs at the times of a span. Tensors without times, such as h0 or a zoneout rate, stay the same."""
    cut = {name: t[span] for name in _IN_TIME if (t := getattr(inputs, name)) is not None and t.dim() > 0}
    if inputs.lengths is not None:
        cut["lengths"] = (inputs.lengths - span.start).clamp(0, span.stop - span.start)
    return inputs._replace(**cut)


def cast(call: Call, dtype: torch.dtype) -> Call:
    """Return the call with x, states and weights in `dtype`. Inside a block of autocast, its cache casts the weights.

    c keeps its dtype in three cases: the user gave float32 beside an x in half precision, the cell state has several
    numbers per unit, or there is a projection on a CPU, as in torch. In states to reset to, c becomes float32, or
    float64 if `dtype` is float64.
    """
    x, weights, traversal = call.x, call.weights, call.traversal
    states = [(h.to(dtype), c.to(of_c)) for (h, c), of_c in zip(call.states, _dtypes_of_c(call, dtype))]
    if traversal.reset_states is not None:
        exact = torch.promote_types(dtype, torch.float32)
        traversal = traversal._replace(reset_states=[(h.to(dtype), c.to(exact)) for h, c in traversal.reset_states])
    weights = [[one.to(dtype) for one in layer] for layer in weights]
    return call._replace(x=x.to(dtype), states=states, weights=weights, traversal=traversal)


def _dtypes_of_c(call: Call, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype of c in each row of states, see `cast`."""
    c_stays = call.options.cell.kept > 1 or (call.x.is_cpu and call.weights[0][0].weight_hr is not None)
    keeps = [(c_stays or is_exact(c, call.x)) and c.dtype.itemsize >= dtype.itemsize for _, c in call.states]
    return [c.dtype if keep else dtype for (_, c), keep in zip(call.states, keeps)]


def computes_in_float32(backend: Backend, dtype: torch.dtype) -> bool:
    """Whether a backend computes results in `dtype` in float32, and rounds them."""
    return backend in KERNEL_BACKENDS and dtype in package_of(backend.value).IN_FLOAT32


def rounded(call: Call, dtype: torch.dtype, y: Tensor, states: list[State]) -> CallResult:
    """The results of a call that was computed in float32, in the dtypes that results of a call in `dtype` have."""
    of_c = _dtypes_of_c(call, dtype)
    return y.to(dtype), [(h.to(dtype), c.to(each)) for (h, c), each in zip(states, of_c)]


def connect(
    x: Tensor,  # [T, B, I], the layer's input
    y: Tensor,  # [T, B, F], the layer's output
    lengths: Tensor | None,  # [B]
    undropped: Tensor | None,  # bool [T, B, F]: the elements that dropout keeps, from noise.draw
    options: Options,
) -> Tensor:
    """Return the next layer's input: the output, plus the input if residual and equally wide, with dropout applied."""
    if options.residual and y.shape == x.shape:
        y = y + without_padding(x, lengths)
    if undropped is None:
        return y
    return y * (undropped.to(y.dtype) / (1 - options.dropout) if options.dropout < 1 else 0)


def named(layer: int, direction: int | None, backend: Backend) -> contextlib.AbstractContextManager:
    """Return a block that torch.profiler shows as, for example, "gpu_lstm layer 0 forward, triton".

    If `direction` is None, the block is for both directions, and the name has none.
    """
    if not is_profiled() or torch.compiler.is_compiling():
        return NOTHING
    way = {None: "", 0: " forward", 1: " reverse"}[direction]
    return torch.profiler.record_function(f"gpu_lstm layer {layer}{way}, {backend.value}")
