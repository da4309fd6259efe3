"""The readable oracle: one LSTM layer in plain torch. Any device, any dtype, differentiable to any order.

Every other backend is held to these numbers. Half-precision inputs are computed in float32 and rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .noise import NO_NOISE, Noise
from .sequences import positions_of_steps, resets_before_steps, valid_steps


class Gates(NamedTuple):
    """What one layer computes in one direction, at every step; zero past the end of a sequence."""

    input: Tensor  # [T, B, H] i, from 0 to 1
    forget: Tensor  # [T, B, H] f, from 0 to 1
    output: Tensor  # [T, B, H] o, from 0 to 1
    candidate: Tensor  # [T, B, H] g, from -1 to 1
    cell: Tensor  # [T, B, H] c, after the step
    hidden: Tensor  # [T, B, P] h, after the step; P = H without a projection


def lstm_layer(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, P]
    c0: Tensor,  # [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, P]
    bias_ih: Tensor | None,  # [4H]
    bias_hh: Tensor | None,  # [4H]
    weight_hr: Tensor | None,  # [P, H]
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B]
    reverse: bool,
    record: list[Gates] | None = None,
    noise: Noise = NO_NOISE,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction, step by step. The gates of all steps are appended to `record`, if there is one.

    With gates in the order i, f, g, o, as torch.nn.LSTM states them:

        z = W_ih x + b_ih + W_hh h + b_hh       i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)
        c' = f c + i g                          h' = o tanh(c'), or W_hr (o tanh(c')) with a projection

    With `noise`, W_hh takes mask_h h, and the states after the step are zone_c c + (1 - zone_c) c' and
    zone_h h + (1 - zone_h) h'.

    Returns:
        h [T, B, P], h_n [B, P] and c_n [B, H], in the dtypes of x, h0 and c0.
    """
    dtype, cell_dtype = x.dtype, c0.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x, h0, c0, weight_ih, weight_hh = (t.float() for t in (x, h0, c0, weight_ih, weight_hh))
        bias_ih, bias_hh, weight_hr = (None if t is None else t.float() for t in (bias_ih, bias_hh, weight_hr))
    mask_h, zone_h, zone_c = (None if t is None else t.to(x.dtype) for t in noise)

    steps, batch, _ = x.shape
    position = positions_of_steps(steps, batch, lengths, reverse, x.device)  # [T, B]
    valid = valid_steps(steps, lengths)  # [T, B] or None
    afresh = resets_before_steps(resets, position, valid, reverse)  # [T, B] or None
    if valid is not None:
        # In padding steps and positions are the same, and what stands there, NaN included, is left out.
        x = torch.where(valid[:, :, None], x, 0)

    def turned(t: Tensor) -> Tensor:
        """t [T, B, F] from the order of time to that of steps, or back."""
        return t.gather(0, position[:, :, None].expand_as(t))

    x = turned(x)
    zone_h = None if zone_h is None else turned(zone_h.expand(steps, *h0.shape))
    zone_c = None if zone_c is None else turned(zone_c.expand(steps, *c0.shape))

    h, c = h0, c0
    outputs = []
    gates = []
    for t in range(steps):
        h_prev, c_prev = h, c
        if afresh is not None:
            h_prev = torch.where(afresh[t, :, None], 0, h)
            c_prev = torch.where(afresh[t, :, None], 0, c)
        h_in = h_prev if mask_h is None else mask_h * h_prev
        z = F.linear(x[t], weight_ih, bias_ih) + F.linear(h_in, weight_hh, bias_hh)  # [B, 4H]
        i, f, g, o = z.chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_next = f * c_prev + i * g  # [B, H]
        h_next = o * c_next.tanh()
        if weight_hr is not None:
            h_next = F.linear(h_next, weight_hr)  # [B, P]
        if zone_c is not None:
            c_next = zone_c[t] * c_prev + (1 - zone_c[t]) * c_next
        if zone_h is not None:
            h_next = zone_h[t] * h_prev + (1 - zone_h[t]) * h_next
        if record is not None:
            gates.append((i, f, o, g, c_next, h_next))
        if valid is None:
            h, c = h_next, c_next
            outputs.append(h)
        else:
            h = torch.where(valid[t, :, None], h_next, h)
            c = torch.where(valid[t, :, None], c_next, c)
            outputs.append(torch.where(valid[t, :, None], h_next, 0))

    if record is not None:
        kept = [turned(torch.stack(every)).to(dtype) for every in zip(*gates)]
        record.append(Gates(*(t if valid is None else torch.where(valid[:, :, None], t, 0) for t in kept)))
    return turned(torch.stack(outputs)).to(dtype), h.to(dtype), c.to(cell_dtype)
