"""The Triton backend's two entry points. One layer, one direction; the input product is already in `gates`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import step
from .planning import step_tiles

INTERPRETED = not isinstance(step.lstm_step_forward_kernel, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when triton was imported."""

Run = Callable[..., None]


def run(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """Launch one kernel: the seam at which a report or a test can look at every launch instead."""
    kernel[tuple(grid)](*args, **constants)


def layer_forward(
    gates: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    save: bool,
    precision: str,
    run: Run = run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of one layer in one direction.

    Args:
        gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`.
        weight_hh: [4H, P] in the same dtype; P = H without projection.
        weight_hr: [P, H], or None without projection.
        h0, c0: [B, P] and [B, H].
        lengths: int32 or int64 [B], or None.
        resets: bool [T, B], or None.
        reverse: from each sequence's last step to its first.
        save: keep what layer_backward needs.
        precision: of float32 products, as tl.dot's input_precision.
        run: launches one kernel.

    Returns:
        h [T, B, P], h_n [B, P], c_n [B, H], and c: float32 [T, B, H] if `save`, else the final [B, H].
    """
    steps, batch, _ = gates.shape
    hidden, projected = c0.shape[1], h0.shape[1]
    project = weight_hr is not None
    h = gates.new_empty(steps, batch, projected)
    h_n, c_n = h0.clone(), c0.clone()  # what a sequence of length 0 ends with
    c_first = c0.float().clone()  # its own memory: without `save` it is updated in place
    c = c_first.new_empty(steps, batch, hidden) if save else c_first
    m = gates.new_empty(batch, hidden) if project else h
    if batch == 0:
        return h, h_n, c_n, c

    tiles = step_tiles(batch, gates.element_size(), gates=4)
    grid = triton.cdiv(batch, tiles.rows), triton.cdiv(hidden, tiles.columns)
    shape = dict(H=hidden, P=projected, REVERSE=reverse, PRECISION=precision)
    tuning = dict(BLOCK_B=tiles.rows, BLOCK_K=tiles.k, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    h_prev, c_prev = h0, c_first
    for s in range(steps):
        run(
            step.lstm_step_forward_kernel, grid,
            gates, weight_hh, h_prev, c_prev, m, c, None if project else h_n, c_n, lengths, resets, s, steps, batch,
            SAVE=save, PROJECT=project, BLOCK_H=tiles.columns, **shape, **tuning,
        )  # fmt: skip
        if project:
            run(
                step.lstm_step_project_kernel, (grid[0], triton.cdiv(projected, tiles.columns)),
                m, weight_hr, h, h_n, lengths, s, steps, batch,
                BLOCK_P=tiles.columns, **shape, **tuning,
            )  # fmt: skip
        h_prev, c_prev = h, c
    return h, h_n, c_n, c


def layer_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    precision: str,
    run: Run = run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the recurrence of one layer in one direction.

    Args:
        dh, dh_n, dc_n: gradients of layer_forward's first three results; None counts as zero.
        gates, c: what layer_forward saved: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
        The rest: as given to layer_forward.

    Returns:
        dgates [T, B, 4H], gradient of the pre-activations; dh0 [B, P]; dc0 [B, H]; and, with a projection, the
        whole gradient of h [T, B, P] (without one, an empty tensor), from which dW_hr is taken.
    """
    steps, batch, _ = gates.shape
    hidden, projected = c0.shape[1], h0.shape[1]
    project = weight_hr is not None
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(c0, dtype=torch.float32) if dc_n is None else dc_n.float().clone()
    dh_total = gates.new_empty((steps, batch, projected) if project else (0,))
    if batch == 0:
        return dgates, torch.zeros_like(h0), torch.zeros_like(c0), dh_total

    tiles = step_tiles(batch, gates.element_size(), gates=1)
    rows = triton.cdiv(batch, tiles.rows)
    shape = dict(H=hidden, P=projected, REVERSE=reverse, PRECISION=precision)
    tuning = dict(BLOCK_B=tiles.rows, BLOCK_K=tiles.k, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    c_first = c0.float()
    for s in reversed(range(steps)):
        if project:
            run(
                step.lstm_step_project_backward_kernel, (rows, triton.cdiv(projected, tiles.columns)),
                dh, dh_n, dgates, weight_hh, dh_total, lengths, resets, s, steps, batch,
                BLOCK_P=tiles.columns, **shape, **tuning,
            )  # fmt: skip
        run(
            step.lstm_step_backward_kernel, (rows, triton.cdiv(hidden, tiles.columns)),
            dh_total if project else dh, None if project else dh_n, gates, c, c if s else c_first,
            weight_hr if project else weight_hh, dgates, dc, lengths, resets, s, steps, batch,
            PROJECT=project, BLOCK_H=tiles.columns, **shape, **tuning,
        )  # fmt: skip
    dh0 = _initial_hidden_gradient(dgates, dh_n, weight_hh, lengths, resets, reverse)
    return dgates, dh0, dc.to(c0.dtype), dh_total


def _initial_hidden_gradient(
    dgates: Tensor,  # [T, B, 4H]
    dh_n: Tensor | None,  # [B, P]
    weight_hh: Tensor,  # [4H, P]
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> Tensor:
    """dh0 [B, P]: through the first step, unless a reset stands before it; dh_n where there is no step at all."""
    if reverse and lengths is not None:
        first_time = (lengths.long() - 1).clamp(min=0)  # [B]
        first = dgates.gather(0, first_time[None, :, None].expand(1, -1, dgates.shape[2]))[0]
    else:
        first = dgates[-1 if reverse else 0]  # [B, 4H]; zero where length is 0
    if resets is not None and not reverse:
        first = first.masked_fill(resets[0, :, None], 0)
    dh0 = first @ weight_hh
    if lengths is not None and dh_n is not None:
        dh0 = torch.where((lengths == 0)[:, None], dh_n, dh0)
    return dh0
