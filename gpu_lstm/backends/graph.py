"""A call in a graph, an exported program or a dispatch mode: every layer as one operator, see operators.py."""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..call.choices import Backend
from ..call.modes import Recording, constant_when_traced
from ..call.noise import Noise
from ..call.request import Call
from ..call.roles import Function
from ..call.weights import State
from ..kernels import private
from ..kernels.tensors import Inputs
from .layer_loop import in_dtype, layer_by_layer, run_layers, without_autocast
from .operators import OPERATOR
from .torch_rnn import joined, split

_log_once = functools.cache(logging.getLogger("gpu_lstm").warning)


def by_operators(call: Call, dtype: torch.dtype, backend: Backend, name: str) -> tuple[Tensor, list[State]]:
    """As layer_loop.run_layers, by operators, which are told of the backend by its `name`, see operators.named."""
    if call.learns and call.modes.recording == Recording.WATCHED and torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace cannot record the gradients of backend {backend.value!r}: trace within torch.no_grad(), "
            "or with backend 'torch'"
        )
    if private.is_exporting():
        _tell_what_a_program_needs()

    def run_layer(inputs: Inputs, row: int, reverse: bool) -> tuple[Tensor, State]:
        if inputs.reset_h is not None:
            exact = torch.promote_types(dtype, torch.float32)
            inputs = inputs._replace(reset_h=inputs.reset_h.to(dtype), reset_c=inputs.reset_c.to(exact))
        return _ask(call, name, in_dtype(inputs, dtype), reverse)

    def run_directions(k: int, x: Tensor, states: list[State], noise: list[Noise]) -> tuple[Tensor, list[State]]:
        first, *others = call.weights[k]
        tensors = [*in_dtype(Inputs(x, *joined(states), *first), dtype), *(t for w in others for t in w.to(dtype))]
        y, final = _ask(call, Backend.TORCH.value, tensors, False)
        return y, split(final)

    if backend is Backend.TORCH and call.traversal.is_plain() and not isinstance(call.options.role, Function):
        return layer_by_layer(call._replace(x=call.x.to(dtype)), dtype, run_directions)
    return run_layers(call, dtype, backend, run_layer)


def _ask(call: Call, backend: str, tensors: Sequence[Tensor | None], reverse: bool) -> tuple[Tensor, State]:
    save = call.modes.grad and any([t is not None and t.requires_grad for t in tensors])
    with without_autocast(call):
        h, h_n, c_n, *_ = OPERATOR(call.options.cell.name, reverse, backend, save, call.options.recompute, *tensors)
    return h, (h_n, c_n)


@constant_when_traced
def _tell_what_a_program_needs() -> None:
    """Log it once a process; not as a warning, since nothing is wrong."""
    _log_once(
        "the exported program calls operators of gpu_lstm: it loads only where that was imported before; export "
        "gpu_lstm.to_torch(model) for one that needs torch alone"
    )
