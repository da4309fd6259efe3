"""One layer in one direction by kernels, for autograd: what is saved, backward, and gradients of gradients."""

from typing import Any

import torch
from torch import Tensor

from ..call.modes import gradients_are_differentiated, is_transformed
from ..call.noise import Noise
from ..call.sequences import Traversal
from ..call.weights import State, Weights
from ..kernels.problem import Inputs
from . import fused, graph
from .fused import Saved, inputs_of
from .layers import NOTHING


def layer(
    kernels: Any,  # the Layer of a backend, kernels/layer.py
    x: Tensor,  # [T, B, I]
    state: State,  # ([1, B, P], [1, B, H])
    weights: Weights,
    traversal: Traversal,
    noise: Noise,
    recompute: bool,
) -> tuple[Tensor, State]:
    """h [T, B, P], and h_n and c_n as `state`, in its dtypes; differentiable to any order.

    The activated gates [T, B, 4H] are saved for backward; with `recompute` they are recomputed from x and h.
    """
    given = inputs_of(x, state, weights, traversal, noise)
    # Asked here, since autograd is off inside Function.forward.
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in given):
        h, h_n, c_n, *_ = fused.forward(kernels, given, save=False)
        return h, (h_n, c_n if c_n.dtype is state[1].dtype else c_n.to(state[1].dtype))
    if is_transformed():
        h, h_n, c_n, *_ = graph.InTransforms.apply(kernels.problem.reverse, kernels.backend, True, recompute, *given)
    else:
        count = len(given)
        while given[count - 1] is None:  # each argument of a Function costs time; those at the end have defaults
            count -= 1
        h, h_n, c_n = _apply(kernels, recompute, *given[:count])
    return h, (h_n, c_n)


class LSTMLayer(torch.autograd.Function):
    """Forward saves gates and cell states for backward; gradients of gradients are computed by reference.py."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, recompute: bool, *given: Tensor | None) -> tuple[Tensor, ...]:
        """h, h_n and c_n in the dtypes of h0 and c0."""
        inputs = Inputs(*given)
        h, h_n, c_n, gates, c = fused.forward(kernels, inputs, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, gates.new_empty(0) if recompute else gates, c, *given)
        ctx.kernels = kernels
        return h, h_n, c_n if c_n.dtype is inputs.c0.dtype else c_n.to(inputs.c0.dtype)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple:
        """None where no gradient is needed."""
        (h, gates, c, *given), (_, _, *needed) = ctx.saved_tensors, ctx.needs_input_grad
        kernels, names = ctx.kernels, Inputs._fields[: len(given)]
        tensors = h, gates, c, *given, *output_gradients
        if is_transformed() or graph.are_batched(output_gradients) or gradients_are_differentiated(h, tensors):
            kept, how = (h, gates, c), (kernels.problem.reverse, kernels.backend)
            return None, None, *graph.gradients_of(*how, output_gradients, kept, needed, given)
        wanted = {name for name, need in zip(names, needed) if need}
        with torch.no_grad() if torch.is_grad_enabled() else NOTHING:
            found = fused.gradients(kernels, Saved(Inputs(*given), h, gates, c), output_gradients, wanted)
        return None, None, *map(found.get, names)


# Skips what Function.apply does for transforms, argument by argument.
_apply = super(torch.autograd.Function, LSTMLayer).apply
