"""A call in a graph, an exported program or a dispatch mode: every layer is one operator, see operators.py."""

from __future__ import annotations  # torch.compile tries to evaluate annotations of nested functions, and fails

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.layer_loop import run_layers, weights_of
from ..backends.torch_rnn import joined, split
from ..call.choices import Backend
from ..call.modes import Recording, constant_when_traced
from ..call.request import Call
from ..call.roles import Function
from ..call.weights import CallResult, LayerResult
from ..kernels import private
from ..kernels.tensors import Inputs
from .operators import OPERATOR

_log_once = functools.cache(logging.getLogger("gpu_lstm").warning)


def by_operators(call: Call, dtype: torch.dtype, backend: Backend, name: str) -> CallResult:
    """Run all layers of a call by operators, in `dtype`, and return the same as layer_loop.run_layers.

    `name` is the backend's operator_name.
    """
    if call.learns and call.modes.recording == Recording.WATCHED and torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace cannot record the gradients of backend {backend.value!r}: trace within torch.no_grad(), "
            "or with backend 'torch'"
        )
    if private.is_exporting():
        _tell_what_a_program_needs()

    def run_layer(tensors: Sequence[Tensor | None], row: int, reverse: bool) -> LayerResult:
        save = call.modes.grad and any([t is not None and t.requires_grad for t in tensors])
        h, h_n, c_n, *_ = OPERATOR(call.options.cell.name, reverse, name, save, call.options.recompute, *tensors)
        return h, (h_n, c_n)

    def run_directions(k: int, inputs: list[Inputs]) -> CallResult:
        h0, c0 = joined([(each.h0, each.c0) for each in inputs])
        second = [t for each in inputs[1:] for t in weights_of(each)]
        y, final = run_layer([*inputs[0]._replace(h0=h0, c0=c0), *second], 0, False)
        return y, split(final)

    is_torchs = backend is Backend.TORCH and call.traversal.is_plain() and not isinstance(call.options.role, Function)
    return run_layers(call, dtype, backend, run_layer, run_directions if is_torchs else None)


@constant_when_traced
def _tell_what_a_program_needs() -> None:
    """Log once per process what an exported program needs. It is no Python warning, since nothing is wrong."""
    _log_once(
        "the exported program calls operators of gpu_lstm: it loads only where that was imported before; export "
        "gpu_lstm.to_torch(model) for one that needs torch alone, unless the model has an SLSTM"
    )
