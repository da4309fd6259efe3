"""The GRU cell (Cho et al., 2014) in torch's operators, as torch.nn.GRU states the equations:

    r, z = sigmoid(z_r), sigmoid(z_z)      n = tanh(z_n + r s)      h' = (1 - z) n + z h

where z_n = W_in x + b_in and s = W_hn h + b_hn. A unit has four pre-activations, in the order r, z, n, s; see
docs/design.md. The state c is h in float32: h is carried from step to step unrounded. It is rounded only as the operand
of W_hh.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import heads
from .lstm import FourGates


class Gates(NamedTuple):
    """The gates and states of every step of a layer in one direction. They are zero past the end of a sequence."""

    reset: Tensor  # [T, B, H] r, from 0 to 1
    update: Tensor  # [T, B, H] z, from 0 to 1: the part of h that stays
    candidate: Tensor  # [T, B, H] n, from -1 to 1
    hidden: Tensor  # [T, B, H] h, after the step


def gates_of(gates: Tensor, c: Tensor, h: Tensor) -> Gates:
    """Return the Gates, from the activated gates [T, B, 4H] and h [T, B, H]."""
    r, z, n, _ = gates.chunk(4, dim=2)
    return Gates(r, z, n, h)


def input_product(x: Tensor, weight: Tensor, bias_ih: Tensor | None, bias_hh: None, gain: None) -> Tensor:
    """Return [T, B, 4H]: W_ih x + b_ih for r, z and n, and uninitialised memory for s.

    The product is written into its place, so that nothing is copied.
    """
    rows, width = len(weight), len(weight) // 3 * 4
    z, x = x.new_empty(*x.shape[:2], width), x.flatten(0, 1)
    of_x = z.as_strided((len(x), rows), (width, 1))
    if bias_ih is None:
        torch.mm(x, weight.T, out=of_x)
    else:
        torch.addmm(bias_ih, x, weight.T, out=of_x)
    return z


def add_product(z: Tensor, h: Tensor, weight: Tensor, gain: None) -> None:
    """Add h W_hh^T to r and z in `z` [T, B, 4H], and write it to s, which is uninitialised. h is [T, B, H]."""
    r_z, s = heads.product(h, weight).tensor_split((2 * h.shape[2],), dim=2)
    z[:, :, : 2 * h.shape[2]] += r_z
    z[:, :, 3 * h.shape[2] :] = s


def pre_activations(of_x: Tensor, of_h: Tensor) -> Tensor:
    """Return r, z, n, s [B, 4H] from W_ih x + b_ih and W_hh h + b_hh, [B, 3H] each, in torch's order r, z, n."""
    (x_r, x_z, n), (h_r, h_z, s) = of_x.chunk(3, dim=1), of_h.chunk(3, dim=1)
    return torch.cat([x_r + h_r, x_z + h_z, n, s], dim=1)


def step(z: Tensor, c: Tensor, peephole: None) -> tuple[FourGates, Tensor]:
    """Return (r, z, n, s) and h', each [B, H], from the pre-activations z [B, 4H] and the previous h, which is c."""
    r, update, n, s = z.chunk(4, dim=1)
    r, update = r.sigmoid(), update.sigmoid()
    n = (n + r * s).tanh()
    return (r, update, n, s), n + update * (c - n)


def activate_in_place(z: Tensor, bias_hh: Tensor | None, c: Tensor) -> Tensor:
    """Turn the pre-activations z [T, B, 4H], to which b_hh has not been added, into gates in the same memory."""
    hidden = z.shape[2] // 4
    if bias_hh is not None:
        z[:, :, : 2 * hidden] += bias_hh[: 2 * hidden]
        z[:, :, 3 * hidden :] += bias_hh[2 * hidden :]
    r, update, n, s = z.chunk(4, dim=2)
    r.sigmoid_()
    update.sigmoid_()
    n.addcmul_(r, s).tanh_()
    return z


def output(gates: FourGates, c: Tensor, gain: None, bias: None) -> Tensor:
    """Return h' in the dtype of the gates."""
    return c.to(gates[0].dtype)
