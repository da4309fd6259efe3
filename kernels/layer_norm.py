"""The backward pass of layer norms, by torch's own operators. gpu_lstm/equations/lstm.py has the forward pass."""

from typing import Any

import torch
from torch import Tensor

from .problem import Normed

EPS = 1e-5  # as torch.nn.LayerNorm


def normed_of(v: Tensor, gain: Tensor) -> Normed:
    """Return the tensors that backward reads of LN(v), for v [..., N]."""
    # On a CPU torch's operator takes longer without a gain, which the moments do not depend on.
    _, mean, scale = torch.native_layer_norm(v.float(), (len(gain),), gain.float(), None, EPS)
    # With moments in float32, torch's operator wants gains in the dtype of v on CUDA, and in float32 on a CPU.
    return Normed(v, mean, scale, gain.to(v.dtype) if v.is_cuda else gain.float())


def gradient(d: Tensor, of: Normed, times: Any) -> Tensor:
    """Return the gradient [B, N] of v from the gradient d [B, N] of LN(v).

    `times` is an index into [T, B] of v: one time, or a pair of tensors [B], the time and the number of each sequence.
    """
    given = d, of.v[times], (len(of.gain),), of.mean[times], of.scale[times], of.gain
    return torch.ops.aten.native_layer_norm_backward(*given, None, [True, False, False])[0]


def gradients(d: Tensor, of: Normed) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of v [T, B, N], the gain [N] and the bias [N] from the gradient d [T, B, N] of LN(v).

    They have the dtype of d, and sums are computed in float32.
    """
    given = d.float(), of.v.float(), (len(of.gain),), of.mean, of.scale, of.gain.float()
    # torch's operator asks for a bias to return its gradient, and reads no value of it.
    found = torch.ops.aten.native_layer_norm_backward(*given, given[-1], [True, True, True])
    dv, dgain, dbias = (t.to(d.dtype) for t in found)
    return dv, dgain, dbias
