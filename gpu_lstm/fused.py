"""One layer in one direction on a backend with kernels of its own."""

import torch
from torch import Tensor

from .autograd import Inputs, LSTMLayerFunction, run
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
    reset_h, reset_c = traversal.reset_to()
    if reset_h is not None and reset_c is not None:
        reset_h, reset_c = reset_h.to(x.dtype), reset_c.float()
        if reset_h is reset_c:
            reset_c = reset_c.view_as(reset_c)
    given = Inputs(x, h0, c0, *weights, reset_h, reset_c, *noise, traversal.lengths, traversal.resets)
    how = traversal.reverse, side_by_side, backend.value
    # Asked here, since autograd is off inside Function.forward.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        h, h_n, c_n, *_ = LSTMLayerFunction.apply(*given, *how, recompute)
    else:
        _, h, h_n, c_n, _ = run(given, *how, save=False)
    return h, (h_n, c_n.to(c0.dtype))
