"""The step family: cuBLAS takes the products of a step, and a kernel of lstm.cu, lstm_step_*, does the rest.

The products read and write dense [B, *] buffers, whatever time each sequence is at.
"""

import contextlib
from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from ..recurrence import Recurrence
from .planning import PACK, Family, Launch, Plan

STEP_PLAN = Plan(Family.STEP, threads=128)


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = gates.new_empty(steps, batch, r.width)
    h_n, c_n = r.h0.clone(), r.c0.clone()  # the running states
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    product = gates.new_empty(batch, 4 * r.hidden)
    m = gates.new_empty(batch, r.hidden) if r.projected else h_n
    sequences = dict(lengths=r.lengths, T=steps, B=batch, reverse=r.reverse)
    with _products_in(r.precision):
        for s in range(steps):
            torch.mm(h_n, r.weight_hh.T, out=product)
            launch(
                "lstm_step_forward", gates.dtype, _grid(plan, gates, r.hidden), plan,
                gates=gates, product=product, h=None if r.projected else h, m=m, c=c if save else None, c_n=c_n,
                resets=r.resets, step=s, H=r.hidden, **sequences,
            )  # fmt: skip
            if r.weight_hr is not None:
                launch(
                    "lstm_step_project_forward", gates.dtype, _grid(plan, gates, r.width), plan,
                    product=m @ r.weight_hr.T, h=h, h_n=h_n, step=s, P=r.width, **sequences,
                )  # fmt: skip
    return h, h_n, c_n, c


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    recurrence: Recurrence,
    *,
    plan: Plan,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_backward, but for dh0 of sequences without a step."""
    r = recurrence
    steps, batch, _ = gates.shape
    dgates = torch.empty_like(gates)
    dz = gates.new_empty(batch, 4 * r.hidden)  # dgates of one step
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; each step makes it that of the c before
    dh0 = torch.zeros_like(r.h0)  # what the step after hands back: after the first step, the gradient of h0
    dh_step = torch.empty_like(r.h0)  # with a projection, of one step
    dh_total = gates.new_empty((steps, batch, r.width) if r.projected else 0)
    sequences = dict(lengths=r.lengths, T=steps, B=batch, reverse=r.reverse)
    with _products_in(r.precision):
        for s in reversed(range(steps)):
            if r.projected:
                launch(
                    "lstm_step_project_backward", gates.dtype, _grid(plan, gates, r.width), plan,
                    dh=dh, dh_n=dh_n, product=dh0, dh_total=dh_total, dh_step=dh_step, step=s, P=r.width, **sequences,
                )  # fmt: skip
            launch(
                "lstm_step_backward", gates.dtype, _grid(plan, gates, r.hidden), plan,
                dh=None if r.projected else dh, dh_n=None if r.projected else dh_n,
                product=dh0 if r.weight_hr is None else dh_step @ r.weight_hr, gates=gates, c=c,
                c_prev=c if s else r.c0, dgates=dgates, dz=dz, dc=dc, resets=r.resets, step=s, H=r.hidden, **sequences,
            )  # fmt: skip
            torch.mm(dz, r.weight_hh, out=dh0)
    return dgates, dh0, dc, dh_total


def _grid(plan: Plan, gates: Tensor, width: int) -> int:
    """Blocks whose threads share a [B, width] matrix, a pack each."""
    return ceil(gates.shape[1] * ceil(width * gates.itemsize / PACK) / plan.threads)


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
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
