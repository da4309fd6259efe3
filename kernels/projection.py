"""A projection h = W_hr m that is moved out of the time loop, where the product is W_hh h = (W_hh W_hr) m.

Only h0 is not computed from an m. Its product with W_hh is added to the gates of the first step. With recurrent dropout
or zoneout of h, the factor of W_hh is not W_hr times the previous m, so the projection cannot be moved
(`Problem.projects_in_loop`).
"""

from typing import Any

import torch
from torch import Tensor

from .problem import Gradients, Inputs, Problem, Recurrence, Results, end_index, unless_reset
from .process_settings import precision


def forward(launch: Any, p: Problem, gates: Tensor, r: Recurrence) -> Results:
    """Compute the same as layer.Layer.forward, where launch(gates, r) runs the recurrence of m.

    The gates of each sequence's first step are overwritten.
    """
    inputs = r.inputs
    with precision.held(p.precision):
        of_h0 = unless_reset(p, inputs.h0[0] @ inputs.weight_hh.T, inputs.resets)  # [B, 4H]
        gates[end_index(p, inputs.lengths, first=True)] += _where_empty(0, of_h0, inputs)
        m, _, c_n, c = launch(gates, _recurrence_of_m(p, r))  # [T, B, H]
        h = m @ inputs.weight_hr.T  # [T, B, P]
    h_n = _where_empty(inputs.h0[0], h[end_index(p, inputs.lengths, first=False)], inputs)
    return h, h_n[None], c_n, c


def backward(
    launch: Any, p: Problem, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor,
    c: Tensor, r: Recurrence,
) -> Gradients:  # fmt: skip
    """Compute the same as layer.Layer.backward, without dh0.

    launch(dh, dh_n, dc_n, gates, c, r) runs the recurrence of m.
    """
    inputs, steps = r.inputs, gates.shape[0]
    # The gradient of h [T, B, P] through the output and the final state, zero in padding.
    dh = gates.new_zeros(steps, p.batch, p.width) if dh is None else dh.clone()
    if inputs.lengths is not None:
        padding = (torch.arange(steps, device=dh.device)[:, None] >= inputs.lengths)[..., None]  # [T, B, 1]
        dh.masked_fill_(padding, 0)
    if dh_n is not None:
        dh[end_index(p, inputs.lengths, first=False)] += _where_empty(0, dh_n[0], inputs)
    earlier, later = (slice(1, None), slice(-1)) if p.reverse else (slice(-1), slice(1, None))
    with precision.held(p.precision):
        gradients = launch(dh @ inputs.weight_hr, None, dc_n, gates, c, _recurrence_of_m(p, r))
        through_next = (gradients.dgates @ inputs.weight_hh)[later]
    if inputs.resets is not None:
        through_next = through_next.masked_fill(inputs.resets[1:, :, None], 0)
    if inputs.lengths is not None and p.reverse:
        through_next = through_next.masked_fill(padding[1:], 0)
    dh[earlier] += through_next
    return gradients._replace(dh_total=dh)


def _recurrence_of_m(p: Problem, r: Recurrence) -> Recurrence:
    """Return the recurrence of m, which starts from zeros."""
    weight, zeros = r.inputs.weight_hh @ r.inputs.weight_hr, r.inputs.h0.new_zeros(1, p.batch, p.hidden)
    return r._replace(inputs=r.inputs._replace(weight_hh=weight, weight_hr=None, h0=zeros))


def _where_empty(these: Tensor | float, others: Tensor, inputs: Inputs) -> Tensor:
    """Return `these` for sequences of length 0, and `others` for all others, [B, *]."""
    return others if inputs.lengths is None else torch.where((inputs.lengths == 0)[:, None], these, others)
