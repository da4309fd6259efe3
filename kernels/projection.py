"""A projection, h = W_hr m, moved out of the time loop, where the product is W_hh h = (W_hh W_hr) m.

So the recurrence of m is that of a cell without a projection, whose weights are W_hh W_hr; h and the gradient of m are
products over all steps. Only h0 is not computed from an m: its share is added to the gates of the first step. With
zoneout of h or recurrent dropout the step is not linear in m, and this does not hold.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .problem import Inputs, Problem, Recurrence, end_index, steps_of

if TYPE_CHECKING:
    from .layer import Gradients, Prepared


def forward(
    prepared: "Prepared", p: Problem, gates: Tensor, r: Recurrence
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As layer.Layer.forward, with a plan that runs the recurrence of m; gates of the first steps are overwritten."""
    given = r.given
    with products_in(p.precision):
        share = given.h0[0] @ given.weight_hh.T  # [B, 4H], unless a reset is before the first step
        if given.resets is not None and not p.reverse:
            share = share.masked_fill(given.resets[0, :, None], 0)
        gates[end_index(p, given.lengths, first=True)] += _of_sequences_with_steps(share, given)
        m, _, c_n, c = prepared.forward(gates, _recurrence_of_m(p, r))  # [T, B, H]
        h = m @ given.weight_hr.T  # [T, B, P]
    h_n = h[end_index(p, given.lengths, first=False)][None]
    if given.lengths is not None:
        h_n = torch.where((given.lengths == 0)[:, None], given.h0, h_n)
    return h, h_n, c_n, c


def backward(
    prepared: "Prepared", p: Problem, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor,
    c: Tensor, r: Recurrence,
) -> "Gradients":  # fmt: skip
    """As Prepared.backward, with a plan that runs the recurrence of m."""
    given, steps = r.given, steps_of(gates)
    # Of h from outside, [T, B, P], zero in padding: from the output and the final state.
    dh = gates.new_zeros(steps, p.batch, p.width) if dh is None else dh.clone()
    if given.lengths is not None:
        padding = (torch.arange(steps, device=dh.device)[:, None] >= given.lengths)[..., None]  # [T, B, 1]
        dh.masked_fill_(padding, 0)
    if dh_n is not None:
        dh[end_index(p, given.lengths, first=False)] += _of_sequences_with_steps(dh_n[0], given)
    with products_in(p.precision):
        found = prepared.backward(dh @ given.weight_hr, None, dc_n, gates, c, _recurrence_of_m(p, r))
        from_next = found.dgates @ given.weight_hh  # and through the step after
    to, of = (slice(1, None), slice(-1)) if p.reverse else (slice(-1), slice(1, None))
    from_next = from_next[of]
    if given.resets is not None:
        from_next = from_next.masked_fill(given.resets[1:, :, None], 0)
    if given.lengths is not None and p.reverse:
        from_next = from_next.masked_fill(padding[1:], 0)
    dh[to] += from_next
    return found._replace(dh_total=dh)


def _recurrence_of_m(p: Problem, r: Recurrence) -> Recurrence:
    """The recurrence of m, starting from zeros."""
    given = r.given
    zeros = given.h0.new_zeros(1, p.batch, p.hidden)
    return r._replace(given=given._replace(weight_hh=given.weight_hh @ given.weight_hr, weight_hr=None, h0=zeros))


def _of_sequences_with_steps(t: Tensor, given: Inputs) -> Tensor:
    """t [B, *], zero where the length is 0."""
    return t if given.lengths is None else t.masked_fill((given.lengths == 0)[:, None], 0)


_lock = threading.RLock()


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 tensors by cuBLAS in `precision`, whatever torch's own setting is.

    That setting is the whole process's: one thread at a time has it, and the user's products in others obey it, too.
    """
    matmul = torch.backends.cuda.matmul
    with _lock:
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = precision
            yield
        finally:
            matmul.fp32_precision = before
