"""The GRU cell (Cho et al., 2014) in torch's operators, as torch.nn.GRU states the equations:

    r, z = sigmoid(z_r), sigmoid(z_z)      n = tanh(z_n + r s)      h' = (1 - z) n + z h

where z_n = W_in x + b_in and s = W_hn h + b_hn. A unit has four pre-activations, like that of an LSTM: n, r, z, s. Of
these x reaches the first three, and h the last three: no product over all steps has rows of zeros. c is h in float32:
h is carried from step to step unrounded, and rounded where it is an operand of W_hh.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .lstm import FourGates


class Gates(NamedTuple):
    """What one layer computes in one direction, at every step; zero past the end of a sequence."""

    reset: Tensor  # [T, B, H] r, from 0 to 1
    update: Tensor  # [T, B, H] z, from 0 to 1: the share of h that stays
    candidate: Tensor  # [T, B, H] n, from -1 to 1
    hidden: Tensor  # [T, B, H] h, after the step


def gates_of(gates: Tensor, c: Tensor, h: Tensor) -> Gates:
    """The Gates of [T, B, 4H] and h [T, B, H]."""
    n, r, z, _ = gates.chunk(4, dim=2)
    return Gates(r, z, n, h)


def input_product(x: Tensor, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, gain: None) -> Tensor:
    """What is known of the pre-activations before the time loop, [T, B, 4H]: for s its bias."""
    steps, batch, features = x.shape
    hidden = len(weight) // 3
    parts, z = (2 * hidden,), x.new_empty(steps * batch, 4 * hidden)
    n, r_z, s = z.tensor_split((hidden, 3 * hidden), 1)
    x, (of_r_z, of_n) = x.reshape(steps * batch, features), weight.tensor_split(parts)
    # By two products, since W_ih in the order of z would be a copy.
    if bias_ih is None or bias_hh is None:
        torch.mm(x, of_n.T, out=n)
        torch.mm(x, of_r_z.T, out=r_z)
        s.zero_()
    else:
        (x_r_z, x_n), (h_r_z, h_s) = bias_ih.tensor_split(parts), bias_hh.tensor_split(parts)
        torch.addmm(x_n, x, of_n.T, out=n)
        torch.addmm(x_r_z + h_r_z, x, of_r_z.T, out=r_z)
        s.copy_(h_s)
    return z.view(steps, batch, 4 * hidden)


def pre_activations(of_x: Tensor, of_h: Tensor) -> Tensor:
    """n, r, z, s [B, 4H] from W_ih x + b_ih and W_hh h + b_hh, [B, 3H] each, r, z, n in torch's order."""
    (x_r, x_z, n), (h_r, h_z, s) = of_x.chunk(3, dim=1), of_h.chunk(3, dim=1)
    return torch.cat([n, x_r + h_r, x_z + h_z, s], dim=1)


def step(z: Tensor, c: Tensor, peephole: None) -> tuple[FourGates, Tensor]:
    """Pre-activations [B, 4H] and h before -> (n, r, z, s) and h', each [B, H]."""
    n, r, update, s = z.chunk(4, dim=1)
    r, update = r.sigmoid(), update.sigmoid()
    gates = (n + r * s).tanh(), r, update, s
    return gates, next_cell(gates, c)


def activate_in_place(z: Tensor, peephole: None, c: None) -> Tensor:
    """Pre-activations [T, B, 4H] -> gates in the same memory."""
    n, r, update, s = z.chunk(4, dim=2)
    r.sigmoid_()
    update.sigmoid_()
    n.addcmul_(r, s).tanh_()
    return z


def next_cell(gates: FourGates, c: Tensor) -> Tensor:
    """h' in the dtype of c, each [..., H]."""
    n, _, update, _ = gates
    return n.to(c.dtype) + update * (c - n)


def output(gates: FourGates, c: Tensor, gain: None, bias: None) -> Tensor:
    """h' in the dtype of the gates."""
    return c.to(gates[0].dtype)
