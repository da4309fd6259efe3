"""The gradient of h0, which every family takes after its time loop."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import layer_norm
from .recurrence import Recurrence


class Gradients(NamedTuple):
    """What a family's backward returns; None where there is none."""

    dgates: Tensor  # [T, B, 4H]
    dc0: Tensor  # [B, H] float32
    dh_from_zoneout: Tensor | None = None  # [B, P] float32, handed back past the first step
    dh_total: Tensor | None = None  # [T, B, P] of a projection in the time loop, the whole gradient of W_hr m; or of m
    dreset_h: Tensor | None = None  # [T, B, P] float32, see `reset_gradients`
    dreset_c: Tensor | None = None  # [T, B, H] float32


def reset_gradients(recurrence: Recurrence) -> tuple[Tensor | None, Tensor | None]:
    """Zeros for the gradients of reset_h (what zoneout hands back) and reset_c, float32; None where there is none."""
    r = recurrence
    dreset_h, dreset_c = (
        None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in (r.reset_h, r.reset_c)
    )
    return dreset_h, dreset_c


def initial_hidden_gradient(
    dgates: Tensor,  # [T, B, 4H]
    dh_n: Tensor | None,  # [B, P]
    dh_from_zoneout: Tensor | None,  # [B, P] float32, see Gradients
    recurrence: Recurrence,
) -> Tensor:
    """dh0 [B, P]: through the first step, unless a reset stands before it; dh_n where there is no step at all."""
    r = recurrence
    first = _at_first_step(dgates, r)  # [B, 4H]; zero where length is 0
    if r.norms.gain_hh is not None:
        unit, scale = (_at_first_step(t, r) for t in (r.norms.unit_hh, r.norms.scale_hh[..., None]))
        first = layer_norm.gradient(first, r.norms.gain_hh, unit, scale[:, 0])
    if r.resets is not None and not r.reverse:
        first = first.masked_fill(r.resets[0, :, None], 0)
    dh0 = first @ r.weight_hh
    if r.dropout_h is not None:
        dh0 = r.dropout_h * dh0
    if dh_from_zoneout is not None:
        dh0 = dh0 + dh_from_zoneout.to(dh0.dtype)
    if r.lengths is not None and dh_n is not None:
        dh0 = torch.where((r.lengths == 0)[:, None], dh_n, dh0)
    return dh0


def _at_first_step(t: Tensor, r: Recurrence) -> Tensor:
    """t [T, B, F] at every sequence's first step, [B, F]; at time 0 where it has none."""
    if r.reverse and r.lengths is not None:
        first_time = (r.lengths.long() - 1).clamp(min=0)  # [B]
        return t.gather(0, first_time[None, :, None].expand(1, -1, t.shape[2]))[0]
    return t[-1 if r.reverse else 0]
