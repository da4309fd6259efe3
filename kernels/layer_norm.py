"""Layer norm (Ba, Kiros & Hinton, 2016) in torch's operators: what backward takes of it outside the time loop.

LN(v) = gain * unit + bias, where unit = (v - mean(v)) * scale and scale = 1 / sqrt(var(v) + EPS), over the last
dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .projection import products_in
from .recurrence import Recurrence

EPS = 1e-5  # as torch.nn.LayerNorm


class Unit(NamedTuple):
    """What was normalised, before the gain."""

    unit: Tensor  # [..., N] in the dtype of v
    scale: Tensor  # [...] float32


def unit_of(v: Tensor) -> Unit:
    """Of v [..., N]."""
    unit, _, scale = torch.native_layer_norm(v.float(), v.shape[-1:], None, None, EPS)
    return Unit(unit.to(v.dtype), scale[..., 0])


def gradient(d: Tensor, gain: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """Gradient d of LN(v) [..., N] -> of v, in the dtype of d."""
    d_unit, unit = d.float() * gain.float(), unit.float()
    of_v = d_unit - d_unit.mean(-1, keepdim=True) - unit * (d_unit * unit).mean(-1, keepdim=True)
    return (scale[..., None] * of_v).to(d.dtype)


class PassedOn(NamedTuple):
    """What takes dz [B, 4H] of a step through the norm of W_hh h to h, with one sum over its elements.

    dh = scale (dz weights - mean(dz * scaled) along)
    """

    weights: Tensor  # [4H, H]: gain W_hh, of which every column has the mean of W_hh's taken off
    scaled: Tensor  # [T, B, 4H]: gain unit
    along: Tensor  # [T, B, H]: unit W_hh


def passed_on(r: Recurrence) -> PassedOn:
    """For a recurrence that has a norm of W_hh h.

    With the column means of W_hh taken off, W_hh h has mean 0, and the mean of its gradient, which W_hh^T would take to
    h, is taken to 0.
    """
    n, weight_hh = r.norms, r.weight_hh.float()
    assert n.gain_hh is not None
    assert n.unit_hh is not None
    weights = n.gain_hh.float()[:, None] * (weight_hh - weight_hh.mean(0))
    with products_in(r.precision):
        along = n.unit_hh @ r.weight_hh
    return PassedOn(weights.to(r.weight_hh.dtype), n.gain_hh * n.unit_hh, along)
