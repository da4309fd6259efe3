"""The operators gpu_lstm::layer_forward and gpu_lstm::layer_backward, as torch.library knows them.

The recurrence of one layer in one direction, on the backends that have kernels of their own. Shapes and meanings
are those of kernels/recurrence.py and of the launchers, e.g. kernels/triton_lstm/launch.py; cell states and their
gradients are float32. This is the one place where a launcher is chosen. torch.compile sees the operators and their
fakes, and never the launchers. Schemas are flat, so only here does a recurrence travel as its fields.
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
    "layer_forward(Tensor(a!) gates, Tensor weight_hh, Tensor? weight_hr, Tensor h0, Tensor c0, Tensor? lengths, "
    "Tensor? resets, bool reverse, bool save, str backend, Tensor?[] norms, Tensor? dropout_h=None, "
    "Tensor? zoneout_h=None, Tensor? zoneout_c=None, int side_by_side=1, Tensor? reset_h=None, Tensor? reset_c=None, "
    "Tensor? weight_peephole=None) -> (Tensor h, Tensor h_n, Tensor c_n, Tensor c)",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.define(
    "layer_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor gates, Tensor c, Tensor weight_hh, "
    "Tensor? weight_hr, Tensor h0, Tensor c0, Tensor? lengths, Tensor? resets, bool reverse, str backend, "
    "Tensor?[] norms, Tensor? dropout_h=None, Tensor? zoneout_h=None, Tensor? zoneout_c=None, "
    "int side_by_side=1, Tensor? reset_h=None, Tensor? reset_c=None, Tensor? weight_peephole=None) "
    "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dh_total, Tensor dreset_h, Tensor dreset_c)",
    tags=(torch.Tag.needs_exact_strides,),
)

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


def _recurrence(
    dtype: torch.dtype,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    dropout_h: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    side_by_side: int,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    weight_peephole: Tensor | None,
    norms: Sequence[Tensor | None],
) -> Recurrence:
    return Recurrence(
        weight_hh=weight_hh.contiguous(),
        weight_hr=_contiguous(weight_hr),
        h0=h0.contiguous(),
        c0=c0.contiguous(),
        lengths=_contiguous(lengths),
        resets=_contiguous(resets),
        reverse=reverse,
        precision=recurrent_precision(dtype),
        dropout_h=_contiguous(dropout_h),
        zoneout_h=_contiguous(zoneout_h),
        zoneout_c=_contiguous(zoneout_c),
        side_by_side=side_by_side,
        reset_h=_contiguous(reset_h),
        reset_c=_contiguous(reset_c),
        weight_peephole=_contiguous(weight_peephole),
        norms=Norms(*map(_contiguous, norms)) if norms else NO_NORMS,
    )


def _layer_forward(
    gates, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, save, backend, norms,
    dropout_h=None, zoneout_h=None, zoneout_c=None, side_by_side=1, reset_h=None, reset_c=None,
    weight_peephole=None,
):  # fmt: skip
    recurrence = _recurrence(
        gates.dtype, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, dropout_h, zoneout_h, zoneout_c,
        side_by_side, reset_h, reset_c, weight_peephole, norms,
    )  # fmt: skip
    with on_the_device_of(gates):
        return _launcher(backend).layer_forward(gates, recurrence, save=save, **_checks(backend))


def _layer_forward_fake(
    gates, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, save, backend, norms,
    dropout_h=None, zoneout_h=None, zoneout_c=None, side_by_side=1, reset_h=None, reset_c=None,
    weight_peephole=None,
):  # fmt: skip
    h = gates.new_empty(*gates.shape[:2], h0.shape[1])
    c = c0.new_empty((gates.shape[0], *c0.shape) if save else 0)
    return h, torch.empty_like(h0), torch.empty_like(c0), c


def _layer_backward(
    dh, dh_n, dc_n, gates, c, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, backend, norms,
    dropout_h=None, zoneout_h=None, zoneout_c=None, side_by_side=1, reset_h=None, reset_c=None,
    weight_peephole=None,
):  # fmt: skip
    recurrence = _recurrence(
        gates.dtype, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, dropout_h, zoneout_h, zoneout_c,
        side_by_side, reset_h, reset_c, weight_peephole, norms,
    )  # fmt: skip
    dh, dh_n, dc_n = map(_contiguous, (dh, dh_n, dc_n))
    with on_the_device_of(gates):
        return _launcher(backend).layer_backward(dh, dh_n, dc_n, gates, c, recurrence, **_checks(backend))


def _layer_backward_fake(
    dh, dh_n, dc_n, gates, c, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, backend, norms,
    dropout_h=None, zoneout_h=None, zoneout_c=None, side_by_side=1, reset_h=None, reset_c=None,
    weight_peephole=None,
):  # fmt: skip
    of_states = (c0.new_empty(0 if t is None else t.shape) for t in (reset_h, reset_c))
    has_total = weight_hr is not None or (norms and norms[1] is not None)
    dh_total = gates.new_empty((*gates.shape[:2], h0.shape[1]) if has_total else (0,))
    return torch.empty_like(gates), torch.empty_like(h0), torch.empty_like(c0), dh_total, *of_states


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
