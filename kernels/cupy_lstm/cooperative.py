"""The launches of cuda/cooperative.cu, and the words that its blocks exchange."""

from math import ceil

import torch
from torch import Tensor

from ..giving_up import error_word
from ..operands import as_words
from ..recurrence import Recurrence
from .planning import Launch, Plan

PACK = 16  # bytes that a thread reads at once
FILL = -1  # the word, as int32, that stands for what is not there yet


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward, without a projection."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = _rows_of_words(gates, steps + 1, batch)
    h[-1].zero_()
    h[-1, :, : r.hidden] = torch.where(r.h0.isnan(), torch.nan, r.h0)  # any NaN but the fill's
    h_n, c_n = r.h0.clone(), r.c0.clone()  # what a sequence of length 0 ends with
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    launch(
        "lstm_cooperative_forward", gates.dtype, plan,
        gates=gates, weights=as_words(r.weight_hh, PACK), h=h, h_n=h_n, c=c if save else None, c_n=c_n,
        lengths=r.lengths, resets=r.resets, reset_c=r.reset_c,
        error=error_word(gates.device, "lstm_cooperative_forward"), T=steps, B=batch, reverse=r.reverse,
    )  # fmt: skip
    return h[:-1, :, : r.hidden].contiguous(), h_n, c_n, c


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dgates [T, B, 4H], dc0 [B, H] and dreset_c [T, B, H] or empty, as launch.layer_backward without a projection."""
    r = recurrence
    steps, batch, _ = gates.shape
    dgates = _rows_of_words(gates, steps, batch, 4)
    partials = None
    if plan.parts > 1:
        partials = torch.full((batch, plan.parts, r.hidden), FILL, dtype=torch.int32, device=gates.device)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
    dreset_c = None if r.reset_c is None else torch.zeros_like(r.reset_c)
    launch(
        "lstm_cooperative_backward", gates.dtype, plan,
        dh=dh, dh_n=dh_n, gates=gates, c=c, c0=r.c0, weights=_transposed(r.weight_hh, plan.parts), dgates=dgates,
        partials=partials, dc=dc, lengths=r.lengths, resets=r.resets,
        reset_c=r.reset_c, dreset_c=dreset_c, error=error_word(gates.device, "lstm_cooperative_backward"),
        T=steps, B=batch, reverse=r.reverse,
    )  # fmt: skip
    return dgates[..., : r.hidden].reshape(gates.shape), dc, c.new_empty(0) if dreset_c is None else dreset_c


def _rows_of_words(gates: Tensor, *rows: int) -> Tensor:
    """[*rows, H and up to 16 bytes] of the dtype of `gates` [T, B, 4H], filled; zeros in words that hold no unit."""
    hidden, size = gates.shape[-1] // 4, PACK // gates.itemsize
    filled = gates.new_empty(*rows, ceil(hidden / size) * size)
    words = filled.view(torch.int32).fill_(FILL)
    words[..., ceil(hidden * gates.itemsize / 4) :] = 0
    return filled


def _transposed(weight_hh: Tensor, parts: int) -> Tensor:
    """W_hh [4H, H] -> W_hh^T of each part's gates, [parts, H, 4 / parts, H and up to 16 bytes]."""
    hidden = weight_hh.shape[1]
    return as_words(weight_hh.view(parts, 4 // parts, hidden, hidden).permute(0, 3, 1, 2), PACK)
