"""The operators gpu_lstm::layer_forward and gpu_lstm::layer_backward, as torch.library knows them.

The recurrence of one layer in one direction, on the backends that have kernels of their own. Shapes and meanings
are those of kernels/recurrence.py and of the launchers, e.g. kernels/triton_lstm/launch.py; cell states and their
gradients are float32. This is the one place where a launcher is chosen. torch.compile sees the operators and their
fakes, and never the launchers. Schemas are flat, so only here does a recurrence travel as its tensors.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import trust
from .backends import Backend
from .kernels.recurrence import NO_NORMS, Norms, Recurrence  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from .library import library_of
from .precision import recurrent_precision
from .profiling import register_flops

_LIBRARY = library_of(__name__)
_LIBRARY.define(
    "layer_forward(Tensor(a!) gates, Tensor?[] recurrence, bool reverse, int side_by_side, str backend, bool save) "
    "-> (Tensor h, Tensor h_n, Tensor c_n, Tensor c)",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.define(
    "layer_backward(Tensor?[] gradients, Tensor gates, Tensor c, Tensor?[] recurrence, bool reverse, int side_by_side, "
    "str backend) "
    "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dh_total, Tensor dreset_h, Tensor dreset_c)",
    tags=(torch.Tag.needs_exact_strides,),
)

TENSORS = (
    "weight_hh", "weight_hr", "weight_peephole", "h0", "c0", "lengths", "resets",
    "dropout_h", "zoneout_h", "zoneout_c", "reset_h", "reset_c",
)  # fmt: skip
"""A recurrence in the order in which its tensors travel; those of its norms follow."""

layer_forward = torch.ops.gpu_lstm.layer_forward.default
layer_backward = torch.ops.gpu_lstm.layer_backward.default


@functools.cache
def _launcher(backend: str) -> ModuleType:
    match Backend(backend):
        case Backend.TRITON:
            return importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
        case Backend.CUPY:
            return importlib.import_module("gpu_lstm.kernels.cupy_lstm.launch")
        case other:
            raise AssertionError(f"backend {other.value!r} has no kernels of its own")


def _checks(backend: str) -> dict[str, Any]:
    # Kernels in CUDA C++ are compiled from one source for all problems; Triton's differ by plan.
    return {"distrust": trust.distrust} if backend == Backend.TRITON.value else {}


def on_the_device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, and torch sets none for operators that are written in Python."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _contiguous(t: Tensor | None) -> Tensor | None:
    # The kernels take contiguous tensors. Gradients often come expanded: sum() hands back stride 0.
    return None if t is None else t.contiguous()


def _named(recurrence: Sequence[Tensor | None]) -> dict[str, Any]:
    norms = recurrence[len(TENSORS) :]
    return dict(zip(TENSORS, recurrence)) | {"norms": Norms(*norms) if norms else NO_NORMS}


def _recurrence(tensors: Sequence[Tensor | None], dtype: torch.dtype, reverse: bool, side_by_side: int) -> Recurrence:
    precision = recurrent_precision(dtype)
    return Recurrence(
        **_named([*map(_contiguous, tensors)]), reverse=reverse, precision=precision, side_by_side=side_by_side
    )


def _layer_forward(gates, recurrence, reverse, side_by_side, backend, save):
    given = _recurrence(recurrence, gates.dtype, reverse, side_by_side)
    with on_the_device_of(gates):
        return _launcher(backend).layer_forward(gates, given, save=save, **_checks(backend))


def _layer_forward_fake(gates, recurrence, reverse, side_by_side, backend, save):
    h0, c0 = (_named(recurrence)[name] for name in ("h0", "c0"))
    h = gates.new_empty(*gates.shape[:2], h0.shape[1])
    c = c0.new_empty((gates.shape[0], *c0.shape) if save else 0)
    return h, torch.empty_like(h0), torch.empty_like(c0), c


def _layer_backward(gradients, gates, c, recurrence, reverse, side_by_side, backend):
    given = _recurrence(recurrence, gates.dtype, reverse, side_by_side)
    with on_the_device_of(gates):
        return _launcher(backend).layer_backward(*map(_contiguous, gradients), gates, c, given, **_checks(backend))


def _layer_backward_fake(gradients, gates, c, recurrence, reverse, side_by_side, backend):
    given = _named(recurrence)
    of_states = (c.new_empty(0 if given[name] is None else given[name].shape) for name in ("reset_h", "reset_c"))
    has_total = given["weight_hr"] is not None or given["norms"].gain_c is not None
    dh_total = gates.new_empty((*gates.shape[:2], given["h0"].shape[1]) if has_total else (0,))
    dh0, dc0 = (torch.empty_like(given[name]) for name in ("h0", "c0"))
    return torch.empty_like(gates), dh0, dc0, dh_total, *of_states


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("layer_forward", _layer_forward, _key)
    _LIBRARY.impl("layer_backward", _layer_backward, _key)
torch.library.register_fake("gpu_lstm::layer_forward", _layer_forward_fake, lib=_LIBRARY)
torch.library.register_fake("gpu_lstm::layer_backward", _layer_backward_fake, lib=_LIBRARY)


def one_after_another(operator: Any) -> Callable[..., tuple]:
    """How an operator is vmapped: one call after another, say for Jacobians row by row."""

    def at(k: int, argument: Any, dim: Any) -> Any:
        if isinstance(argument, list):
            return [at(k, *each) for each in zip(argument, dim or [None] * len(argument))]
        return argument.select(dim, k) if isinstance(argument, Tensor) and dim is not None else argument

    def call_each(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        each = [operator(*(at(k, *both) for both in zip(arguments, in_dims))) for k in range(info.batch_size)]
        results = [torch.stack(tensors) for tensors in zip(*each)]
        if isinstance(each[0], list):
            return results, [0] * len(results)
        return tuple(results), (0,) * len(results)

    return call_each


torch.library.register_vmap("gpu_lstm::layer_backward", one_after_another(layer_backward), lib=_LIBRARY)
register_flops()
