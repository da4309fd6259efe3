"""Layer norm, as in gpu_lstm/equations/lstm.py, by torch's own operators: what backward needs of it."""

from typing import Any

import torch
from torch import Tensor

from .problem import Normed

EPS = 1e-5  # as torch.nn.LayerNorm


def normed_of(v: Tensor, gain: Tensor) -> Normed:
    """What backward reads of LN(v), v [..., N]."""
    _, mean, scale = torch.native_layer_norm(v.float(), (len(gain),), None, None, EPS)
    # Beside moments in float32 torch's operator wants gains in the dtype of v on CUDA, in float32 on a CPU.
    return Normed(v, mean, scale, gain.to(v.dtype) if v.is_cuda else gain.float())


def gradient(d: Tensor, of: Normed, times: Any) -> Tensor:
    """Gradient d of LN(v) [B, N] -> of v, at some times: an index, or several and that of each sequence."""
    given = d, of.v[times], (len(of.gain),), of.mean[times], of.scale[times], of.gain
    return torch.ops.aten.native_layer_norm_backward(*given, None, [True, False, False])[0]


def gradients(d: Tensor, of: Normed) -> tuple[Tensor, Tensor]:
    """Gradient d of LN(v) [T, B, N] -> of v, and of the gain [N], in the dtype of d; sums are in float32."""
    given = d.float(), of.v.float(), (len(of.gain),), of.mean, of.scale, of.gain.float()
    dv, dgain, _ = torch.ops.aten.native_layer_norm_backward(*given, None, [True, True, False])
    return dv.to(d.dtype), dgain.to(d.dtype)
