"""Gradients of a layer, to any order: by kernels in eager mode, and of the operator in graphs.

First ones come from the kernels, or from the operator's backward. What may itself be differentiated, and several
gradients at once, are computed by the reference, from the inputs.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..backends import fused
from ..backends.fused import Saved
from ..backends.layer_loop import NOTHING
from ..call.choices import Backend, chosen_backends, requested_backend
from ..call.modes import Transforms, are_differentiated, is_transformed
from ..call.request import Call
from ..call.weights import State
from ..kernels import private
from ..kernels.contract import NoKernel
from ..kernels.layer import Layer
from ..kernels.problem import Inputs, Pass
from .operators import BACKWARD, LIBRARY, OPERATOR, How, operator_name, without_kernels

Tensors = Sequence[Tensor | None]


def layer_by_kernels(
    layers: Sequence[Layer], call: Call, inputs: Inputs, row: int, reverse: bool
) -> tuple[Tensor, State]:
    """As layer_loop.RunLayer, by `layers` [L*D], differentiable to any order; states in the dtypes of h0 and c0."""
    layer, modes, options = layers[row], call.modes, call.options
    learns = modes.grad and any([t is not None and t.requires_grad for t in inputs])
    if not learns and modes.transforms == Transforms.NONE:
        h, h_n, c_n, *_ = fused.forward(layer, inputs, save=False)
        return h, (h_n, c_n)
    if modes.transforms != Transforms.NONE:
        h, h_n, c_n, *_ = InTransforms.apply(*how_of(layer, options.backend, learns, options.recompute), *inputs)
    else:
        count = len(inputs)
        while inputs[count - 1] is None:  # each argument of a Function costs time; those at the end have defaults
            count -= 1
        h, h_n, c_n = _apply(layer, options.recompute, options.backend or chosen_backends[0].value, *inputs[:count])
    return h, (h_n, c_n)


def how_of(layer: Layer, backend: Any, save: bool = False, recompute: bool = False) -> How:
    """What operators are told of a layer; `backend`: the one that was asked for."""
    name = operator_name(Backend(layer.backend), requested_backend(backend) is not Backend.AUTO)
    return How(layer.problem.cell, layer.problem.reverse, name, save, recompute)


class RecurrentLayer(torch.autograd.Function):
    """Forward saves gates and cell states for backward."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, recompute: bool, backend: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """h, h_n and c_n in the dtypes of h0 and c0, from the first of the Inputs; `backend`: that was asked for."""
        h, h_n, c_n, gates, c = fused.forward(layer, Inputs(*tensors), save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, gates.new_empty(0) if recompute else gates, c, *tensors)
        ctx.layer, ctx.backend = layer, backend
        return h, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple:
        """None where no gradient is needed."""
        (h, gates, c, *tensors), (_, _, _, *needed), layer = ctx.saved_tensors, ctx.needs_input_grad, ctx.layer
        if is_transformed() or are_differentiated(h, (gates, c, *tensors), output_gradients):
            how = How(layer.problem.cell, layer.problem.reverse, layer.backend)
            return None, None, None, *gradients(how, output_gradients, (h, gates, c), needed, tensors)
        names = Inputs._fields[: len(tensors)]
        wanted = set(compress(names, needed))
        saved = Saved(Inputs(*tensors), h, gates, c)
        try:
            with torch.no_grad() if torch.is_grad_enabled() else NOTHING:
                by_name = fused.gradients(layer, saved, output_gradients, wanted)
        except (NoKernel, torch.OutOfMemoryError):  # forward ran by a kernel, and this pass is met here first
            how, (dh, dh_n, _) = how_of(layer, ctx.backend), output_gradients
            pass_ = Pass(True, True, dh is not None, dh_n is not None)
            if how.asked or layer.has_kernel(pass_, saved.inputs):
                raise
            return None, None, None, *gradients(how, output_gradients, (h, gates, c), needed, tensors)
        return None, None, None, *map(by_name.get, names)


# Skips what Function.apply does for transforms, argument by argument.
_apply = super(torch.autograd.Function, RecurrentLayer).apply


def gradients(
    how: How, output_gradients: Tensors, saved: Sequence[Tensor], needed: Sequence[bool], tensors: Tensors
) -> list[Tensor | None]:
    """Gradients of the operator's `tensors` where `needed`, from those of h, h_n and c_n; `saved`: h, gates and c."""
    h, *others = saved
    if not are_differentiated(h, (*others, *tensors), output_gradients):
        with torch.no_grad():
            lists = (list(each) for each in (output_gradients, saved, needed, tensors))
            those_needed = iter(BACKWARD(how.cell, how.reverse, how.backend, *lists))
        return [next(those_needed) if need else None for need in needed]
    # By the reference, to any order. Other transforms do not accept the wrappers of those that have ended.
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


_HOW = (None,) * len(How._fields)  # which have no gradients


class InTransforms(torch.autograd.Function):
    """The operator for transforms of torch.func, which refuse what is registered below."""

    forward = staticmethod(OPERATOR)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        h, _, _, gates, c = output
        ctx.how = How(*inputs[: len(_HOW)])
        ctx.mark_non_differentiable(gates, c)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, gates, c, *inputs[len(_HOW) :])

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
        (h, gates, c, *tensors), needed = ctx.saved_tensors, ctx.needs_input_grad[len(_HOW) :]
        return *_HOW, *gradients(ctx.how, (dh, dh_n, dc_n), (h, gates, c), needed, tensors)


torch.library.register_autograd(OPERATOR, InTransforms.backward, setup_context=InTransforms.setup_context, lib=LIBRARY)
