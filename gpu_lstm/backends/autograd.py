"""One layer in one direction by kernels, for autograd: what is saved, backward, and gradients of gradients."""

from typing import Any

import torch
from torch import Tensor

from ..call.modes import gradients_are_differentiated, is_transformed
from ..call.noise import Noise
from ..call.sequences import Traversal
from ..call.weights import State, Weights
from . import fused, graph
from .fused import DIFFERENTIABLE, Inputs, Saved, inputs_of
from .layers import NOTHING


def layer(
    kernels: Any,  # the Layer of a backend, kernels/layer.py
    x: Tensor,  # [T, B, I]
    state: State,  # ([B, P], [B, H]); the only row of an LSTM may be [1, B, *]
    weights: Weights,
    traversal: Traversal,
    noise: Noise,
    recompute: bool,
) -> tuple[Tensor, State]:
    """h [T, B, P], and h_n and c_n as h0 and c0; differentiable to any order.

    The activated gates [T, B, 4H] are saved for backward; with `recompute` they are recomputed from x and h.
    """
    transformed = is_transformed()
    if transformed:  # operators tell by its number of dimensions whether a state is for both directions
        state = state[0].flatten(0, -2), state[1].flatten(0, -2)  # [B, *] each
    given = inputs_of(x, state, weights, traversal, noise)
    # Asked here, since autograd is off inside Function.forward.
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in given):
        h, h_n, c_n, *_ = fused.forward(kernels, given, save=False)
        return h, (h_n, c_n if c_n.dtype is state[1].dtype else c_n.to(state[1].dtype))
    if transformed:
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
        inputs = Inputs(*given)  # type: ignore[arg-type]
        h, h_n, c_n, gates, c = fused.forward(kernels, inputs, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, h, gates.new_empty(0) if recompute else gates, c)
        ctx.kernels = kernels
        return h, h_n, c_n if c_n.dtype is inputs.c0.dtype else c_n.to(inputs.c0.dtype)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple:
        """None where no gradient is needed."""
        kernels, saved, count = ctx.kernels, ctx.saved_tensors, len(ctx.needs_input_grad) - 2
        *given, h, gates, c = saved
        needed = (*ctx.needs_input_grad[2:], *(False,) * DIFFERENTIABLE)[:DIFFERENTIABLE]
        if is_transformed() or gradients_are_differentiated(h, [*saved, *output_gradients]):
            kept, reverse = (h, gates, c), kernels.problem.reverse
            found = graph.gradients_of(reverse, kernels.backend, output_gradients, kept, needed, given)
        else:
            with torch.no_grad() if torch.is_grad_enabled() else NOTHING:
                found = fused.gradients(kernels, Saved(Inputs(*given), h, gates, c), output_gradients, needed)
        return None, None, *found[:count], *(None,) * (count - DIFFERENTIABLE)


# Skips what Function.apply does for transforms, argument by argument.
_apply = super(torch.autograd.Function, LSTMLayer).apply
