"""The sLSTM cell (Beck et al., 2024) in torch's operators, with two numbers per unit instead of three:

    k = l + log sigmoid(z_f)    a = z_i - k    u = sigmoid(a)      q' = q + u (tanh(z_g) - q)
    l' = log(e^k + e^z_i) = max(k, z_i) + log(1 + e^-|a|)    o = sigmoid(z_o)    h' = o q'

The paper has c' = f c + i g, n' = f n + i and h' = o c' / n', where i = exp(z_i) and f = sigmoid(z_f). It keeps c and n
multiplied by e^-m, so that they are finite. Here q = c / n is the weighted mean of all g so far. l is the logarithm of
the sum of the weights, which is m + log n for the n that the paper keeps. u is the share of the new g in that sum.

The gates are u, v = sigmoid(-z_f), g and o. v = 1 - f takes the place of f, since half precision is fine near 0 and
coarse near 1: in a unit that keeps its state, u and v are near 0, but f is near 1. See docs/design.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import lstm
from .lstm import FourGates
from .lstm import add_product as add_product
from .lstm import pre_activations as pre_activations


class Gates(NamedTuple):
    """The gates and states of every step of a layer in one direction. They are zero past the end of a sequence."""

    share: Tensor  # [T, B, H] u, from 0 to 1: how much of the new mean is the candidate
    forget: Tensor  # [T, B, H] f = sigmoid(z_f), from 0 to 1
    output: Tensor  # [T, B, H] o, from 0 to 1
    candidate: Tensor  # [T, B, H] g, from -1 to 1
    mean: Tensor  # [T, B, H] q = c / n, after the step
    hidden: Tensor  # [T, B, H] h, after the step


def gates_of(gates: Tensor, c: Tensor, h: Tensor) -> Gates:
    """Return the Gates, from the activated gates [T, B, 4H], q [T, B, H] as c, and h [T, B, H]."""
    u, v, g, o = gates.chunk(4, dim=2)
    return Gates(u, 1 - v, o, g, c, h)


def input_product(x: Tensor, weight: Tensor | None, bias: Tensor | None, bias_hh: Tensor | None, gain: None) -> Tensor:
    """Return W_ih x and the biases, [T, B, 4H], in new memory. If `weight` is None, x is the product W_ih x itself."""
    if weight is not None:
        return lstm.input_product(x, weight, bias, bias_hh, gain)
    z = x.new_empty(x.shape)  # contiguous, since kernels would copy any other tensor
    return z.copy_(x) if bias is None else torch.add(x, bias, out=z)


def step(z: Tensor, c: Tensor, peephole: None) -> tuple[FourGates, Tensor]:
    """Return the gates (u, v, g, o), [B, H] each, and the next state [2, B, H].

    z [B, 4H] has the pre-activations, and c [2, B, H] the previous state, q and l.
    """
    (i, f, g, o), (q, l) = z.chunk(4, dim=1), c
    (u, l), g = next_sum(i, f, l), g.tanh()
    return (u, (-f).sigmoid(), g, o.sigmoid()), torch.stack([q + u * (g - q), l])


def next_sum(i: Tensor, f: Tensor, l: Tensor, learns: bool = True) -> tuple[Tensor, Tensor]:
    """Return u and l' from z_i, z_f and the previous l, all of one size.

    If not `learns`, fewer operators are used. Their second derivatives are wrong.
    """
    k = l + F.logsigmoid(f)
    a = i - k.clamp(min=torch.finfo(k.dtype).min)  # -inf, not NaN, where both are -inf
    if not learns:
        return a.sigmoid(), torch.logaddexp(i, k)
    # The second derivatives of torch.logaddexp are NaN where i and k are far apart. The second
    # derivatives of torch.maximum and torch.abs are wrong where i = k. This sum has correct derivatives of any order.
    newer = a > 0
    return a.sigmoid(), torch.where(newer, i, k) + F.softplus(torch.where(newer, -a, a))


def output(gates: FourGates, c: Tensor, gain: None, bias: None) -> Tensor:
    """Return h' [..., H] in the dtype of o. c [2, ..., H] has q and l after the step."""
    o = gates[3]
    return o * c[0].to(o.dtype)


def states_from(c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and l of the paper's c, n and m. Where n = 0 the state is empty: q = 0 and l = -inf."""
    there = n != 0
    n = torch.where(there, n, 1)
    return torch.where(there, c / n, 0), torch.where(there, m + n.log(), -float("inf"))


def states_of(q: Tensor, l: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c, n and m of an equal state, with n = 1 and m = l. They are zeros where the state is empty."""
    # A state with l = -inf is not empty if q is not 0: after z_i = z_f = -inf, the weight of the mean q is 0. A state
    # with NaN is not empty either.
    there = (l != -float("inf")) | (q != 0)
    return q, there.to(q.dtype), torch.where(there, l, 0)
