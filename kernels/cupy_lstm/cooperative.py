"""The family whose blocks share W_hh and exchange h: lstm_cooperative_*, cuda/cooperative.cu."""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from ..giving_up import error_word
from ..recurrence import Recurrence
from .planning import (
    CELL,
    EXCHANGE,
    L2_BYTES,
    MULTIPLY_ADDS,
    SHARED_BYTES,
    STATIC_LIMIT,
    TENSOR_PRODUCTS,
    Card,
    Family,
    Launch,
    Plan,
    Problem,
)

SEQUENCES = 8  # of a batch tile
CHUNK = 16  # words of K that a warp takes at once
AHEAD = 4  # chunks that are on their way at once, where weights are not kept
FILL = -1  # the word, as int32, that stands for what is not there yet
MOST_REGISTERS = 192  # of a thread's 255, that may hold weights, words and sums


def plans(problem: Problem, card: Card) -> Iterator[Plan]:
    """All there are: weights held in registers where they fit those of the card together, and read at every step."""
    tensor_cores = card.architecture >= 80 and (problem.dtype.itemsize == 2 or problem.precision == "tf32")
    for parts in (1, 2, 4) if problem.backward else (1,):
        k = (4 // parts if problem.backward else 1) * problem.words
        for warps in (4, 8):
            chunks = ceil(k / (CHUNK * warps))
            for units in range(4, 4 * warps + 1, 4):
                rows = (parts if problem.backward else 4) * units
                if tensor_cores and rows % 16 == 0 and (rows // 2 + 4) * chunks + rows // 2 <= MOST_REGISTERS:
                    yield from _plan(problem, card, units, warps, chunks, parts, k)
                if warps == 8 and rows % 32 == 0 and rows <= 64:
                    yield from _plan(problem, card, units, warps, 0, parts, k)


def _plan(
    problem: Problem, card: Card, units: int, warps: int, chunks: int, parts: int, k: int
) -> Iterator[Plan]:
    """The plan of these sizes, if its blocks can all be resident at once."""
    rows = (parts if problem.backward else 4) * units
    shared = 8 * 2 * warps * SEQUENCES * (rows // 2 + 2) + (0 if chunks else 4 * warps * AHEAD * SEQUENCES * CHUNK)
    wanted = parts * ceil(problem.hidden / (parts * units))
    most = card.multiprocessors // problem.side_by_side // parts * parts
    blocks = min(wanted, most) if chunks == 0 else wanted
    if not 0 < blocks <= most:
        return
    tiles = ceil(problem.batch / SEQUENCES)
    groups = max(1, min(tiles, card.multiprocessors // problem.side_by_side // blocks))
    turns = ceil(tiles / groups) * ceil(wanted / blocks)
    shared += 4 * 32 * warps * turns
    if shared > card.shared:
        return
    turn = 4 * SEQUENCES * k / L2_BYTES + 16 * warps * SEQUENCES * rows / 2 / SHARED_BYTES + CELL
    if chunks:
        turn += rows / 16 * k / 8 / TENSOR_PRODUCTS / 4
    else:
        elements = 4 // problem.dtype.itemsize
        turn += max(4 * rows * k / L2_BYTES, rows * k * elements * SEQUENCES / MULTIPLY_ADDS)
    exchange = max(0.0, EXCHANGE - (turns - 1) * turn) + (EXCHANGE if parts > 1 else 0) * turns
    template = (problem.hidden, units, warps, chunks, *((parts,) if problem.backward else ()))
    yield Plan(
        Family.COOPERATIVE, (blocks, groups), 32 * warps, shared, turns * turn + exchange, template,
        side_by_side=problem.side_by_side,
    )  # fmt: skip


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = _rows_of_words(gates, steps + 1, batch)
    h[-1].zero_()
    h[-1, :, : r.hidden] = torch.where(r.h0.isnan(), torch.nan, r.h0)  # any NaN but the fill's
    h_n, c_n = r.h0.clone(), r.c0.clone()  # what a sequence of length 0 ends with
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    launch(
        "lstm_cooperative_forward", gates.dtype, plan,
        gates=gates, weights=_as_words(r.weight_hh), h=h, h_n=h_n, c=c if save else None, c_n=c_n, lengths=r.lengths,
        resets=r.resets, error=error_word(gates.device, "lstm_cooperative_forward"),
        T=steps, B=batch, reverse=r.reverse,
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
) -> tuple[Tensor, Tensor]:
    """dgates [T, B, 4H] and dc0 [B, H], as launch.layer_backward."""
    r = recurrence
    steps, batch, _ = gates.shape
    parts = plan.template[-1]
    dgates = _rows_of_words(gates, steps, batch, 4)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
    launch(
        "lstm_cooperative_backward", gates.dtype, plan,
        dh=dh, dh_n=dh_n, gates=gates, c=c, c0=r.c0, weights=_transposed(r.weight_hh, parts), dgates=dgates,
        partials=torch.full_like(r.c0[:, None].expand(-1, parts, -1), FILL, dtype=torch.int32), dc=dc,
        lengths=r.lengths, resets=r.resets, error=error_word(gates.device, "lstm_cooperative_backward"),
        T=steps, B=batch, reverse=r.reverse,
    )  # fmt: skip
    dgates = dgates[..., : r.hidden].reshape(gates.shape)
    return dgates, dc


def _rows_of_words(gates: Tensor, *rows: int) -> Tensor:
    """[*rows, H and up to 16 bytes] of the dtype of `gates` [T, B, 4H], filled; zeros in words that hold no unit."""
    hidden, size = gates.shape[-1] // 4, 16 // gates.itemsize
    filled = gates.new_empty(*rows, ceil(hidden / size) * size)
    words = filled.view(torch.int32).fill_(FILL)
    words[..., ceil(hidden * gates.itemsize / 4) :] = 0
    return filled


def _as_words(weights: Tensor) -> Tensor:
    """[*, H] -> [*, H and up to 16 bytes], which begins at 16 bytes."""
    missing = -weights.shape[-1] % (16 // weights.itemsize)
    weights = (torch.nn.functional.pad(weights, (0, missing)) if missing else weights).contiguous()
    return weights if weights.data_ptr() % 16 == 0 else weights.clone()


def _transposed(weight_hh: Tensor, parts: int) -> Tensor:
    """W_hh [4H, H] -> W_hh^T of each part's gates, [parts, H, 4 / parts, H and up to 16 bytes]."""
    hidden = weight_hh.shape[1]
    return _as_words(weight_hh.view(parts, 4 // parts, hidden, hidden).permute(0, 3, 1, 2))
