"""All layers of a call by the kernels of a backend."""

import importlib
from typing import Any

import torch
from torch import Tensor

from ..call.checks import is_exact
from ..call.choices import Backend
from ..call.noise import NO_NOISE, Noise
from ..call.prepare import Call
from ..call.sequences import EVERY_STEP, Traversal
from ..call.weights import State, Weights
from . import autograd, schedule
from .layers import one_after_another, without_autocast
from .schedule import Schedule
from .verify import verify


def run(
    call: Call, dtype: torch.dtype, backend: Backend, layers: list[Any], plan: Schedule
) -> tuple[Tensor, list[State]]:
    """In `dtype`: output [T, B, D*P] and final states as Call.states; `layers` [L*D] are those of kernels/layer.py."""
    if dtype is torch.float32 and call.modes.autocast is None:
        return _run(call, backend, layers, plan)
    with without_autocast(call):
        call = _in_dtype(call, dtype)
        exact = call._replace(states=[(h, c.float()) for h, c in call.states])  # also from chunk to chunk
        y, states = _run(exact, backend, layers, plan)
    return y, [(h, c.to(given.dtype)) for (h, c), (_, given) in zip(states, call.states)]


def _run(call: Call, backend: Backend, layers: list[Any], plan: Schedule) -> tuple[Tensor, list[State]]:
    if call.options.kind == "LSTMCell":  # one step: there is nothing to schedule
        h, c = call.states[0]
        y, state = autograd.layer(layers[0], call.x[None], (h[None], c[None]), call.weights[0][0], EVERY_STEP, NO_NOISE)
        return y, [(state[0].squeeze(0), state[1].squeeze(0))]
    call, recompute = call.padded(), call.options.recompute

    def direction(
        row: int, x: Tensor, state: State, weights: Weights, traversal: Traversal, noise: Noise
    ) -> tuple[Tensor, State]:
        return autograd.layer(layers[row], x, state, weights, traversal, noise, recompute)

    if not plan.in_one_piece(call.steps):
        y, rows = schedule.run(call, direction, plan, backend.value)
    else:
        y, rows = one_after_another(call, direction, backend.value, call.x.dtype, call.kernel_rows())
    return y, call.pack_rows(rows)


def _in_dtype(call: Call, dtype: torch.dtype) -> Call:
    """The call with all tensors in the dtype that it is computed in, cast once rather than for every chunk."""
    states = [(h.to(dtype), c if is_exact(c, call.x) else c.to(dtype)) for h, c in call.states]
    weights = [[one.to(dtype) for one in layer] for layer in call.weights]
    return call._replace(x=call.x.to(dtype), states=states, weights=weights)


def layer_of(backend: Backend, problem: Any, device: torch.device) -> Any:
    """The kernels of a problem on a device: the one place where a launcher is imported."""
    launcher = importlib.import_module(f"gpu_lstm.kernels.{backend.value}_lstm.launch")
    layer = launcher.layer_of(problem, device, verify)
    layer.backend = backend.value  # as the operators of graph.py name it
    return layer
