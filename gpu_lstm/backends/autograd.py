"""One layer in one direction by kernels, for autograd: what is saved, and backward."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..call.choices import Backend, requested_backend
from ..call.modes import Transforms, are_differentiated, is_transformed
from ..call.request import Call
from ..call.weights import State
from ..kernels.layer import Layer
from ..kernels.problem import Inputs
from . import derivatives, fused
from .fused import Saved
from .layer_loop import NOTHING
from .operators import How, named


def layer_by_kernels(
    layers: Sequence[Layer], call: Call, inputs: Inputs, row: int, reverse: bool
) -> tuple[Tensor, State]:
    """As layer_loop.RunLayer, by `layers` [L*D], differentiable to any order; h_n and c_n in the dtypes of h0 and c0.

    The activated gates [T, B, 4H] are saved for backward; with `recompute` they are recomputed from x and h.
    """
    layer, modes, recompute = layers[row], call.modes, call.options.recompute
    if not modes.grad or not any([t is not None and t.requires_grad for t in inputs]):
        h, h_n, c_n, *_ = fused.forward(layer, inputs, save=False)
        return h, (h_n, c_n if c_n.dtype is inputs.c0.dtype else c_n.to(inputs.c0.dtype))
    if modes.transforms != Transforms.NONE:
        name = named(Backend(layer.backend), requested_backend(call.options.backend) is not Backend.AUTO)
        how = How(layer.problem.cell, layer.problem.reverse, name, save=True, recompute=recompute)
        h, h_n, c_n, *_ = derivatives.InTransforms.apply(*how, *inputs)
    else:
        count = len(inputs)
        while inputs[count - 1] is None:  # each argument of a Function costs time; those at the end have defaults
            count -= 1
        h, h_n, c_n = _apply(layer, recompute, *inputs[:count])
    return h, (h_n, c_n)


class RecurrentLayer(torch.autograd.Function):
    """Forward saves gates and cell states for backward."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, recompute: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """h, h_n and c_n in the dtypes of h0 and c0, from the first of the Inputs."""
        inputs = Inputs(*tensors)
        h, h_n, c_n, gates, c = fused.forward(layer, inputs, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, gates.new_empty(0) if recompute else gates, c, *tensors)
        ctx.layer = layer
        return h, h_n, c_n if c_n.dtype is inputs.c0.dtype else c_n.to(inputs.c0.dtype)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple:
        """None where no gradient is needed."""
        (h, gates, c, *tensors), (_, _, *needed), layer = ctx.saved_tensors, ctx.needs_input_grad, ctx.layer
        how = How(layer.problem.cell, layer.problem.reverse, layer.backend)
        if are_differentiated(h, (gates, c, *tensors), output_gradients):
            return None, None, *derivatives.by_reference(how, output_gradients, needed, tensors)
        if is_transformed():
            return None, None, *derivatives.by_operator(how, output_gradients, (h, gates, c), needed, tensors)
        names = Inputs._fields[: len(tensors)]
        wanted = set(compress(names, needed))
        with torch.no_grad() if torch.is_grad_enabled() else NOTHING:
            gradients = fused.gradients(layer, Saved(Inputs(*tensors), h, gates, c), output_gradients, wanted)
        return None, None, *map(gradients.get, names)


# Skips what Function.apply does for transforms, argument by argument.
_apply = super(torch.autograd.Function, RecurrentLayer).apply
