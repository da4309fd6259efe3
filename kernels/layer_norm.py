"""Layer norm (Ba, Kiros & Hinton, 2016) in torch's operators: what backward needs of it outside the time loop.

LN(v) = gain * unit + bias, where unit = (v - mean(v)) * scale and scale = 1 / sqrt(var(v) + EPS), over the last
dimension.
"""

import torch
from torch import Tensor

from .problem import Unit

EPS = 1e-5  # as torch.nn.LayerNorm


def unit_of(v: Tensor, features: int) -> Unit:
    """The Unit of v [..., N], N = `features`."""
    exact = torch.promote_types(v.dtype, torch.float32)
    unit, _, scale = torch.native_layer_norm(v.to(exact), (features,), None, None, EPS)
    return Unit(unit.to(v.dtype), scale[..., 0])


def gradient(d: Tensor, gain: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """Gradient d of LN(v) [..., N] -> of v, in the dtype of d."""
    exact = torch.promote_types(d.dtype, torch.float32)
    d_unit, unit = d.to(exact) * gain, unit.to(exact)
    of_v = d_unit - d_unit.mean(-1, keepdim=True) - unit * (d_unit * unit).mean(-1, keepdim=True)
    return (scale[..., None] * of_v).to(d.dtype)


def backward(d: Tensor, gain: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Gradient d of LN(v) [T, B, N] -> gradients of v and the gain [N]."""
    return gradient(d, gain, *unit), (d * unit.unit).sum((0, 1))
