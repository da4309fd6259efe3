"""A call in a graph, an exported program or a dispatch mode: every layer as one operator, see operators.py."""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.layer_loop import cast, run_layers, without_autocast
from ..backends.torch_rnn import joined, split
from ..call.choices import Backend
from ..call.modes import Recording, constant_when_traced
from ..call.request import Call
from ..call.roles import Function
from ..call.weights import State
from ..kernels import private
from ..kernels.tensors import Inputs
from .operators import OPERATOR

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

    call = cast(call, dtype)

    def run_layer(inputs: Inputs, row: int, reverse: bool) -> tuple[Tensor, State]:
        return _ask(call, name, inputs, reverse)

    def run_directions(k: int, inputs: list[Inputs]) -> tuple[Tensor, list[State]]:
        h0, c0 = joined([(each.h0, each.c0) for each in inputs])
        second = [t for weights in call.weights[k][1:] for t in weights]
        y, final = _ask(call, name, [*inputs[0]._replace(h0=h0, c0=c0), *second], False)
        return y, split(final)

    is_torchs = backend is Backend.TORCH and call.traversal.is_plain() and not isinstance(call.options.role, Function)
    return run_layers(call, dtype, backend, run_layer, run_directions if is_torchs else None)


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
