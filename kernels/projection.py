"""A projection, h = W_hr m, without one in the time loop: the product is W_hh h = (W_hh W_hr) m.

So the recurrence of m is that of a cell without a projection, whose weights are W_hh W_hr; h and what flows back into
it are products over all steps. Only h0 comes from no m: its share is added to the gates of the first step. With zoneout
of h or recurrent dropout the step is not linear in m, and this does not hold.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Recurrence, end_index


def recurrence_of_m(r: Recurrence) -> Recurrence:
    """The recurrence of m [T, B, H], that starts from zeros."""
    assert r.dropout_h is r.zoneout_h is None
    with products_in(r.precision):
        weight_hh = r.weight_hh @ r.weight_hr
    return r._replace(weight_hh=weight_hh, weight_hr=None, h0=r.h0.new_zeros(r.c0.shape))


def add_initial_product(gates: Tensor, r: Recurrence) -> None:
    """gates [T, B, 4H] of every sequence's first step += W_hh h0, unless a reset stands before it."""
    with products_in(r.precision):
        share = r.h0 @ r.weight_hh.T  # [B, 4H]
    if r.resets is not None and not r.reverse:
        share = share.masked_fill(r.resets[0, :, None], 0)
    if r.lengths is not None:
        share = share.masked_fill((r.lengths == 0)[:, None], 0)
    gates[end_index(r, first=True)] += share


def project(m: Tensor, r: Recurrence) -> tuple[Tensor, Tensor]:
    """m [T, B, H] -> h [T, B, P], h_n [B, P]."""
    with products_in(r.precision):
        h = m @ r.weight_hr.T
    h_n = h[end_index(r, first=False)]
    if r.lengths is not None:
        h_n = torch.where((r.lengths == 0)[:, None], r.h0, h_n)
    return h, h_n


def gradient_of_output(dh: Tensor | None, dh_n: Tensor | None, steps: int, r: Recurrence) -> Tensor:
    """Gradient of h [T, B, P] from outside: from the output and the final state; zero in padding."""
    dh = r.h0.new_zeros(steps, *r.h0.shape) if dh is None else dh.clone()
    if r.lengths is not None:
        dh.masked_fill_(_padding(steps, r), 0)
    if dh_n is not None:
        if r.lengths is not None:
            dh_n = dh_n.masked_fill((r.lengths == 0)[:, None], 0)
        dh[end_index(r, first=False)] += dh_n
    return dh


def gradient_of_m(dh: Tensor, r: Recurrence) -> Tensor:
    """Gradient of h [T, B, P] from outside -> of m [T, B, H]."""
    with products_in(r.precision):
        return dh @ r.weight_hr


def add_gradient_of_next(dh: Tensor, dgates: Tensor, r: Recurrence) -> Tensor:
    """Gradient of h [T, B, P] from outside += the gradient through the step after: the whole gradient of h."""
    with products_in(r.precision):
        from_next = dgates @ r.weight_hh
    to, of = (slice(1, None), slice(-1)) if r.reverse else (slice(-1), slice(1, None))
    from_next = from_next[of]
    if r.resets is not None:
        from_next = from_next.masked_fill(r.resets[1:, :, None], 0)
    if r.lengths is not None and r.reverse:
        from_next = from_next.masked_fill(_padding(len(dh), r)[1:], 0)
    dh[to] += from_next
    return dh


def _padding(steps: int, r: Recurrence) -> Tensor:
    """Where there is none of a sequence, [T, B, 1]."""
    return (torch.arange(steps, device=r.h0.device)[:, None] >= r.lengths)[..., None]


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 tensors by cuBLAS in `precision`, whatever torch's switch for the others says."""
    matmul = torch.backends.cuda.matmul
    value: str | bool
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        switch, value = "fp32_precision", precision
    else:
        switch, value = "allow_tf32", precision == "tf32"
    before = getattr(matmul, switch)
    setattr(matmul, switch, value)
    try:
        yield
    finally:
        setattr(matmul, switch, before)
