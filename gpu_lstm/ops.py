"""The operators gpu_lstm::layer_forward and gpu_lstm::layer_backward, as torch.library knows them.

The recurrence of one layer in one direction, on the backends that have kernels of their own. Shapes and meanings
are those of the launchers, e.g. kernels/triton_lstm/launch.py; cell states and their gradients are float32. This is
the one place where a launcher is chosen.
torch.compile sees the operators and their fakes, and never the launchers.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from .backends import Backend
from .precision import recurrent_precision

_LIBRARY = torch.library.Library("gpu_lstm", "DEF")
_LIBRARY.define(
    "layer_forward(Tensor(a!) gates, Tensor weight_hh, Tensor? weight_hr, Tensor h0, Tensor c0, Tensor? lengths, "
    "Tensor? resets, bool reverse, bool save, str backend, Tensor? mask_h=None, Tensor? zone_h=None, "
    "Tensor? zone_c=None) -> (Tensor h, Tensor h_n, Tensor c_n, Tensor c)",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.define(
    "layer_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor gates, Tensor c, Tensor weight_hh, "
    "Tensor? weight_hr, Tensor h0, Tensor c0, Tensor? lengths, Tensor? resets, bool reverse, str backend, "
    "Tensor? mask_h=None, Tensor? zone_h=None, Tensor? zone_c=None) "
    "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dh_total)",
    tags=(torch.Tag.needs_exact_strides,),
)

layer_forward = torch.ops.gpu_lstm.layer_forward.default
layer_backward = torch.ops.gpu_lstm.layer_backward.default


def _launcher(backend: str) -> ModuleType:
    match Backend(backend):
        case Backend.TRITON:
            return importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
        case Backend.CUPY:
            return importlib.import_module("gpu_lstm.kernels.cupy_lstm.launch")
        case other:
            raise AssertionError(f"backend {other.value!r} has no kernels of its own")


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    # The kernels take contiguous tensors. Gradients often come expanded: sum() hands back stride 0.
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _layer_forward(gates, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, save, backend, *noise):
    weight_hh, weight_hr, h0, c0, lengths, resets = _contiguous(weight_hh, weight_hr, h0, c0, lengths, resets)
    precision = recurrent_precision(gates.dtype)
    return _launcher(backend).layer_forward(
        gates, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, precision, *_contiguous(*noise), save=save
    )


def _layer_forward_fake(gates, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, save, backend, *noise):
    h = gates.new_empty(*gates.shape[:2], h0.shape[1])
    c = c0.new_empty((gates.shape[0], *c0.shape) if save else 0)
    return h, torch.empty_like(h0), torch.empty_like(c0), c


def _layer_backward(dh, dh_n, dc_n, gates, c, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, backend, *noise):
    dh, dh_n, dc_n, weight_hh, weight_hr, h0, c0, lengths, resets = _contiguous(
        dh, dh_n, dc_n, weight_hh, weight_hr, h0, c0, lengths, resets
    )
    return _launcher(backend).layer_backward(
        dh, dh_n, dc_n, gates, c, weight_hh, weight_hr, h0, c0, lengths, resets, reverse,
        recurrent_precision(gates.dtype), *_contiguous(*noise),
    )  # fmt: skip


def _layer_backward_fake(
    dh, dh_n, dc_n, gates, c, weight_hh, weight_hr, h0, c0, lengths, resets, reverse, backend, *noise
):
    dh_total = gates.new_empty((0,) if weight_hr is None else (*gates.shape[:2], h0.shape[1]))
    return torch.empty_like(gates), torch.empty_like(h0), torch.empty_like(c0), dh_total


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("layer_forward", _layer_forward, _key)
    _LIBRARY.impl("layer_backward", _layer_backward, _key)
torch.library.register_fake("gpu_lstm::layer_forward", _layer_forward_fake, lib=_LIBRARY)
torch.library.register_fake("gpu_lstm::layer_backward", _layer_backward_fake, lib=_LIBRARY)


def _layer_backward_vmap(info, in_dims, *arguments):
    """One launch after another, for Jacobians row by row."""
    each = []
    for k in range(info.batch_size):
        chosen = (
            a.select(dim, k) if isinstance(a, Tensor) and dim is not None else a for a, dim in zip(arguments, in_dims)
        )
        each.append(layer_backward(*chosen))
    return tuple(torch.stack(results) for results in zip(*each)), (0, 0, 0, 0)


torch.library.register_vmap("gpu_lstm::layer_backward", _layer_backward_vmap, lib=_LIBRARY)
