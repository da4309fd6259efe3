"""Gradients of a layer to any order: of the operator in graphs, and of kernels in eager mode.

The first are the backward operator's or, in eager mode, the kernels'. What may itself be differentiated, or comes for
several gradients at once, is computed by the reference, from the inputs.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..call.modes import are_differentiated
from ..kernels import private
from .operators import BACKWARD, LIBRARY, OPERATOR, How, without_kernels

Tensors = Sequence[Tensor | None]
_HOW = (None,) * len(How._fields)  # which no gradient belongs to


def by_operator(
    how: How, output_gradients: Tensors, saved: Sequence[Tensor], needed: Sequence[bool], tensors: Tensors
) -> list[Tensor | None]:
    """Gradients of the operator's `tensors` where `needed`, from those of h, h_n and c_n; `saved`: h, gates and c."""
    with torch.no_grad():
        lists = (list(each) for each in (output_gradients, saved, needed, tensors))
        those_needed = iter(BACKWARD(how.cell, how.reverse, how.backend, *lists))
    return [next(those_needed) if need else None for need in needed]


def by_reference(how: How, output_gradients: Tensors, needed: Sequence[bool], tensors: Tensors) -> list[Tensor | None]:
    """The same, differentiable to any order, or several of each at once."""
    # Other transforms do not accept the wrappers of those that have ended.
    tensors = [None if t is None else private.unwrapped_if_ended(t) for t in tensors]
    wanted = list(compress(range(len(tensors)), needed))
    present = [k for k, gradient in enumerate(output_gradients) if gradient is not None]

    def recomputed(*those_wanted: Tensor) -> tuple[Tensor, ...]:
        every: list[Any] = list(tensors)
        for k, tensor in zip(wanted, those_wanted):
            every[k] = tensor
        outputs = without_kernels(every, how)
        return tuple(outputs[k] for k in present)

    # torch.func.vjp, not autograd.grad: inputs may be one tensor, depend on each other, or belong to a transform.
    _, pull = torch.func.vjp(recomputed, *(tensors[k] for k in wanted))[:2]
    by_place = dict(zip(wanted, pull(tuple(output_gradients[k] for k in present))))
    return [by_place.get(k) for k in range(len(needed))]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    h, _, _, gates, c = output
    ctx.how = How(*inputs[: len(_HOW)])
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, gates, c, *inputs[len(_HOW) :])


def _gradients(ctx: Any, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
    (h, gates, c, *tensors), needed = ctx.saved_tensors, ctx.needs_input_grad[len(_HOW) :]
    output_gradients = dh, dh_n, dc_n
    if are_differentiated(h, (gates, c, *tensors), output_gradients):
        return *_HOW, *by_reference(ctx.how, output_gradients, needed, tensors)
    return *_HOW, *by_operator(ctx.how, output_gradients, (h, gates, c), needed, tensors)


class InTransforms(torch.autograd.Function):
    """The operator for transforms of torch.func, which refuse what is registered below."""

    forward = staticmethod(OPERATOR)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


torch.library.register_autograd(OPERATOR, _gradients, setup_context=_setup_context, lib=LIBRARY)
