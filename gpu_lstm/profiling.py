"""What profilers see of a layer: its name in torch.profiler, and its operations in FlopCounterMode."""

import contextlib
import importlib.util
from functools import partial
from math import prod

import torch
import torch.autograd.profiler as profiler

from .backends import Backend


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


def forward_flops(gates: torch.Size, weight_hh: torch.Size, weight_hr: torch.Size | None, *others, **options) -> int:
    """Of the recurrence's products alone, two for each multiply-add, as torch counts them.

    The product with W_hh [4H, P] takes 2 T B 4H P, that with W_hr [P, H] 2 T B P H.
    """
    steps, batch = gates[:2]
    return 2 * steps * batch * (prod(weight_hh) + (0 if weight_hr is None else prod(weight_hr)))


def backward_flops(dh, dh_n, dc_n, gates, c, weight_hh, weight_hr, *others, **options) -> int:  # shapes
    """As many: gradients of weights, and all that concerns x, are products of torch's own, over all steps."""
    return forward_flops(gates, weight_hh, weight_hr)


def register_flops() -> None:
    """Have FlopCounterMode know the operators, if it can be imported: without Triton it warns, and no kernel runs."""
    if importlib.util.find_spec("triton") is None:
        return
    try:
        from torch.utils.flop_counter import register_flop_formula
    except Exception:  # from a Triton that is broken: whoever wants to count is told, all others need not know
        return
    register_flop_formula(torch.ops.gpu_lstm.layer_forward)(forward_flops)
    register_flop_formula(torch.ops.gpu_lstm.layer_backward)(backward_flops)
