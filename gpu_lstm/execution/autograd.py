"""Gradients of a layer, to any order, in eager mode, and for the operator of graphs.

Gradients of first order come from the kernels, or from the operator's backward. The reference computes gradients that
may be differentiated again, and batches of gradients (`is_grads_batched`). For these it runs the layer again.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..backends import fused
from ..backends.fused import Saved
from ..backends.layer_loop import NOTHING
from ..call.choices import Backend, chosen_backends
from ..call.modes import Transforms, are_differentiated, is_transformed
from ..call.request import Call
from ..call.weights import LayerResult
from ..kernels import private
from ..kernels.contract import NoKernel
from ..kernels.layer import Layer
from ..kernels.problem import Inputs, Pass
from .operators import BACKWARD, LIBRARY, OPERATOR, How, operator_name, without_kernels

Tensors = Sequence[Tensor | None]


def layer_by_kernels(layers: Sequence[Layer], call: Call, inputs: Inputs, row: int, reverse: bool) -> LayerResult:
    """Run one layer in one direction by kernels, differentiable to any order, as a layer_loop.RunLayer does.

    `layers` [L*D] has its kernels at `row`. The final states have the dtypes of h0 and c0.
    """
    layer, modes, options = layers[row], call.modes, call.options
    learns = modes.grad and any([t is not None and t.requires_grad for t in inputs])
    if modes.transforms != Transforms.NONE:
        h, h_n, c_n, *_ = InTransforms.apply(*how_of(layer, options.backend, learns, options.recompute), *inputs)
    elif not learns:
        h, h_n, c_n, *_ = fused.forward(layer, inputs, save=False)
    else:
        count = len(inputs)
        while inputs[count - 1] is None:  # the last Nones are left out, since each argument of a Function costs time
            count -= 1
        h, h_n, c_n = _apply(layer, options.recompute, options.backend or chosen_backends[0].value, *inputs[:count])
    return h, (h_n, c_n)


def how_of(layer: Layer, backend: Any, save: bool = False, recompute: bool = False) -> How:
    """Return the operator's arguments for a layer. `backend` is the user's choice or None, see operator_name."""
    name = operator_name(Backend(layer.backend), backend)
    return How(layer.problem.cell, layer.problem.reverse, name, save, recompute)


class RecurrentLayer(torch.autograd.Function):
    """The autograd Function of one layer in one direction in eager mode. Forward saves gates and c for backward."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, recompute: bool, backend: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Return h, h_n and c_n.

        `backend` is the user's choice or None. `tensors` are the Inputs without the Nones at the end.
        """
        h, h_n, c_n, gates, c = fused.forward(layer, Inputs(*tensors), save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, gates.new_empty(0) if recompute else gates, c, *tensors)
        ctx.layer, ctx.backend = layer, backend
        return h, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple:
        """Return the gradients of forward's arguments, None for those that need no gradient."""
        (h, gates, c, *tensors), (_, _, _, *needed), layer = ctx.saved_tensors, ctx.needs_input_grad, ctx.layer
        if not (is_transformed() or are_differentiated(h, (gates, c, *tensors), output_gradients)):
            names, saved = Inputs._fields[: len(tensors)], Saved(Inputs(*tensors), h, gates, c)
            try:
                with torch.no_grad() if torch.is_grad_enabled() else NOTHING:
                    by_name = fused.gradients(layer, saved, output_gradients, set(compress(names, needed)))
                return None, None, None, *map(by_name.get, names)
            except (NoKernel, torch.OutOfMemoryError):  # forward had a kernel, but backward may have none
                dh, dh_n, _ = output_gradients
                pass_ = Pass(True, True, dh is not None, dh_n is not None)
                if how_of(layer, ctx.backend).asked or layer.has_kernel(pass_, saved.inputs):
                    raise
        how = how_of(layer, ctx.backend)
        return None, None, None, *gradients(how, output_gradients, (h, gates, c), needed, tensors)


# Function.apply searches all arguments for tensors of torch.func's transforms, which takes time. The apply of its base
# class does not.
_apply = super(torch.autograd.Function, RecurrentLayer).apply


def gradients(
    how: How, output_gradients: Tensors, saved: Sequence[Tensor], needed: Sequence[bool], tensors: Tensors
) -> list[Tensor | None]:
    """Return the gradients of the operator's `tensors`, and None where a gradient is not `needed`.

    `output_gradients` are the gradients of h, h_n and c_n, where None stands for zeros. `saved` are h, gates and c.
    """
    h, *others = saved
    if not are_differentiated(h, (*others, *tensors), output_gradients):
        with torch.no_grad():
            lists = (list(each) for each in (output_gradients, saved, needed, tensors))
            found = BACKWARD(*how[:3], *lists)
    else:
        # The reference computes them, to any order. A transform does not accept tensors that are wrapped by a transform
        # that has ended.
        tensors = [None if t is None else private.unwrapped_if_ended(t) for t in tensors]
        given = [gradient is not None for gradient in output_gradients]

        def recomputed(*those_needed: Tensor) -> tuple[Tensor, ...]:
            remaining = iter(those_needed)
            every = [next(remaining) if need else t for need, t in zip(needed, tensors)]
            return tuple(compress(without_kernels(every, how), given))

        # torch.func.vjp, not autograd.grad: inputs may be one tensor, depend on each other, or be part of a transform.
        _, pull = torch.func.vjp(recomputed, *compress(tensors, needed))[:2]
        found = pull(tuple(compress(output_gradients, given)))
    remaining = iter(found)
    return [next(remaining) if need else None for need in needed]


_HOW = (None,) * len(How._fields)  # the gradients of the arguments that are no tensors


class InTransforms(torch.autograd.Function):
    """The operator as a Function, for calls inside transforms of torch.func.

    These transforms do not support gradients that are registered with an operator, as below.
    """

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
