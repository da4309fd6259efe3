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
from .kernels.problem import Recurrence, problem_of  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from .library import library_of
from .precision import recurrent_precision
from .profiling import register_flops

_LIBRARY = library_of(__name__)
_LIBRARY.define(
    "layer_forward(Tensor(a!) gates, Tensor[] recurrence, int[] which, bool reverse, int side_by_side, str backend, "
    "bool save) "
    "-> (Tensor h, Tensor h_n, Tensor c_n, Tensor c)",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.define(
    "layer_backward(Tensor?[] gradients, Tensor gates, Tensor c, Tensor[] recurrence, int[] which, bool reverse, "
    "int side_by_side, str backend) "
    "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dh_total, Tensor dreset_h, Tensor dreset_c)",
    tags=(torch.Tag.needs_exact_strides,),
)

TENSORS = (
    "weight_hh", "weight_hr", "weight_peephole", "h0", "c0", "lengths", "resets",
    "dropout_h", "zoneout_h", "zoneout_c", "reset_h", "reset_c",
    "gain_hh", "gain_c", "bias_c", "unit_hh", "scale_hh", "unit_c", "scale_c",
)  # fmt: skip
"""A recurrence in the order in which its tensors travel; those of its norms follow."""

Flat = tuple[list[Tensor], list[int]]


def flat(tensors: Sequence[Tensor | None]) -> Flat:
    """Those that are there and their places: torch.jit.trace takes no list with None in it, and none of bools."""
    return [t for t in tensors if t is not None], [k for k, t in enumerate(tensors) if t is not None]


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
    return {"verify": trust.verify} if backend == Backend.TRITON.value else {}


def on_the_device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, and torch sets none for operators that are written in Python."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _named(recurrence: Sequence[Tensor], which: Sequence[int]) -> dict[str, Any]:
    there = dict(zip(which, recurrence))
    return {name: there.get(k) for k, name in enumerate(TENSORS)}


def _recurrence(flat: Flat, dtype: torch.dtype, reverse: bool, side_by_side: int) -> Recurrence:
    tensors, which = flat
    named = _named([t.contiguous() for t in tensors], which)
    return Recurrence(**named, reverse=reverse, precision=recurrent_precision(dtype), side_by_side=side_by_side)


def _layer_forward(gates, recurrence, which, reverse, side_by_side, backend, save):
    r = _recurrence((recurrence, which), gates.dtype, reverse, side_by_side)
    layer = _launcher(backend).layer_of(problem_of(gates, r), gates.device, **_checks(backend))
    h, h_n, c_n, c = layer.forward(gates, r, save)
    return h, h_n, c_n, c_n.new_empty(0) if c is None else c


def _layer_forward_fake(gates, recurrence, which, reverse, side_by_side, backend, save):
    h0, c0 = (_named(recurrence, which)[name] for name in ("h0", "c0"))
    h = gates.new_empty(*gates.shape[:2], h0.shape[1])
    c = c0.new_empty((gates.shape[0], *c0.shape) if save else 0)
    return h, torch.empty_like(h0), torch.empty_like(c0), c


def _layer_backward(gradients, gates, c, recurrence, which, reverse, side_by_side, backend):
    r = _recurrence((recurrence, which), gates.dtype, reverse, side_by_side)
    gradients = (None if d is None else d.contiguous() for d in gradients)  # often expanded: sum() hands back stride 0
    layer = _launcher(backend).layer_of(problem_of(gates, r), gates.device, **_checks(backend))
    return tuple(c.new_empty(0) if t is None else t for t in layer.backward(*gradients, gates, c, r))


def _layer_backward_fake(gradients, gates, c, recurrence, which, reverse, side_by_side, backend):
    named = _named(recurrence, which)
    of_states = (c.new_empty(0 if named[name] is None else named[name].shape) for name in ("reset_h", "reset_c"))
    has_total = named["weight_hr"] is not None or named["gain_c"] is not None
    dh_total = gates.new_empty((*gates.shape[:2], named["h0"].shape[1]) if has_total else (0,))
    dh0, dc0 = (torch.empty_like(named[name]) for name in ("h0", "c0"))
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
