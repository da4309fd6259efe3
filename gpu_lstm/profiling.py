"""What profilers see of a layer: its name in torch.profiler, and its operations in FlopCounterMode."""

import contextlib
import sys
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.autograd.profiler as profiler

from .backends import Backend

_COUNTER = "torch.utils.flop_counter"


def named(layer: int, direction: int | None, run: partial | None) -> contextlib.AbstractContextManager:
    """A block that torch.profiler shows as, say, "gpu_lstm layer 0 forward, triton"; without a profiler, nothing.

    Args:
        layer: counted from the bottom.
        direction: 0 or 1, the reverse one; None: all.
        run: with the keyword `backend`; None: torch. It is not looked at before it matters: torch.compile cannot.
    """
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return contextlib.nullcontext()
    way = {None: "", 0: " forward", 1: " reverse"}[direction]
    backend = Backend.TORCH if run is None else run.keywords["backend"]
    return profiler.record_function(f"gpu_lstm layer {layer}{way}, {backend.value}")


def forward_flops(gates: torch.Size, recurrence: list[torch.Size], which: list[int], *others, **options) -> int:
    """Of the recurrence's products alone, two for each multiply-add, as torch counts them.

    The product with W_hh [4H, P] takes 2 T B 4H P, that with W_hr [P, H] 2 T B P H.
    """
    steps, batch = gates[:2]
    weights = [size for size, place in zip(recurrence, which) if place < 2]  # W_hh, and W_hr if there is a projection
    return 2 * steps * batch * sum(map(prod, weights))


def backward_flops(gradients, gates, c, recurrence, which, *others, **options) -> int:  # shapes
    """As many: gradients of weights, and all that concerns x, are products of torch's own, over all steps."""
    return forward_flops(gates, recurrence, which)


def register_flops() -> None:
    """Have FlopCounterMode know the operators: now, if its module is there, else as soon as somebody imports it.

    Imported here it would bring Triton along, a quarter of a second, for those who count nothing.
    """
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if getattr(finder, "__name__", "") != _CounterFinder.__name__
    ]
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _CounterFinder)


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.gpu_lstm.layer_forward)(forward_flops)
    counter.register_flop_formula(torch.ops.gpu_lstm.layer_backward)(backward_flops)


class _CounterFinder:
    """Finds torch's counter where it is, and sees to it that the operators are registered once it is imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
