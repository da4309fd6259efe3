"""Layer norm (Ba, Kiros & Hinton, 2016) in torch's operators: what backward takes of it outside the time loop.

LN(v) = gain * unit + bias, where unit = (v - mean(v)) * scale and scale = 1 / sqrt(var(v) + EPS), over the last
dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
