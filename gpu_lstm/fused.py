"""One layer in one direction on a backend with kernels of its own."""

import torch
from torch import Tensor

from . import ops
from .autograd import LSTMLayerFunction, input_product
from .backends import Backend
from .noise import NO_NOISE, Noise
from .sequences import Traversal
from .weights import State, Weights


def layer(
    x: Tensor,  # [T, B, I]
    state: State,  # ([B, P], [B, H])
    weights: Weights,
    traversal: Traversal,
    backend: Backend,
    noise: Noise = NO_NOISE,
    recompute: bool = False,
    side_by_side: int = 1,  # as many such layers or directions run at once, on streams of their own
) -> tuple[Tensor, State]:
    """h [T, B, P], and h_n [B, P] and c_n [B, H] in the dtypes of h0 and c0; differentiable to any order.

    For backward the activated gates are kept, [T, B, 4H]; with `recompute` they are taken again from x and h.
    """
    h0, c0 = state
    if h0 is c0:  # as zeros for both may be; torch.compile takes no tensor twice
        c0 = c0.view_as(c0)
    # Asked here, since autograd is off inside Function.forward.
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights))
    if save:
        h, h_n, c_n, *_ = LSTMLayerFunction.apply(
            x, h0, c0, *weights, *noise, *traversal, backend.value, recompute, side_by_side
        )
    else:
        gates = input_product(x, weights.weight_ih, weights.bias_ih, weights.bias_hh)
        h, h_n, c_n, _ = ops.layer_forward(
            gates,
            weights.weight_hh,
            weights.weight_hr,
            h0,
            c0.float(),
            *traversal,
            False,
            backend.value,
            *noise,
            side_by_side,
        )
        c_n = c_n.to(c0.dtype)
    return h, (h_n, c_n)
