"""The families that walk whole sequences in one launch: by a block (lstm_sequence_*), or a cluster (lstm_cluster_*)."""

from math import ceil

import torch
from torch import Tensor

from ..recurrence import Recurrence
from .planning import PACK, Family, Launch, Plan

GATES = BATCH_TILE = 4  # of a block
MAX_THREADS = 512  # of a block


def sequence_plan(hidden: int, dtype: torch.dtype, limit: int, backward: bool = False, blocks: int = 1) -> Plan | None:
    """A plan for whole sequences, if `blocks` blocks of at most `limit` bytes of shared memory can hold W_hh.

    As many threads as there can be share the products: each of the 4H columns is summed in as many slices.
    """
    width = GATES * ceil(hidden / blocks)
    size = PACK // dtype.itemsize
    for slices in range(min(MAX_THREADS // width, ceil(hidden / size)), 0, -1):
        threads = slices * width
        packs = ceil(hidden / (slices * size))  # of a thread's weights
        vectors = GATES if backward else 2  # dz of every gate, or h of two steps
        floats = BATCH_TILE * (vectors * slices * packs * size + threads)
        shared = packs * threads * PACK + 4 * floats
        if shared <= limit:
            return Plan(Family.SEQUENCE if blocks == 1 else Family.CLUSTER, threads, shared, blocks)
    return None


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = gates.new_empty(steps, batch, r.hidden)
    h_n, c_n = r.h0.clone(), r.c0.clone()  # the initial states going in, the final ones coming out
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    kernel = "lstm_sequence_forward" if plan.family is Family.SEQUENCE else f"lstm_cluster_forward<{plan.blocks}>"
    grid = ceil(batch / BATCH_TILE) * plan.blocks
    launch(
        kernel, gates.dtype, grid, plan,
        gates=gates, weight_hh=r.weight_hh, h=h, h_n=h_n, c=c if save else None, c_n=c_n,
        lengths=r.lengths, resets=r.resets, T=steps, B=batch, H=r.hidden, reverse=r.reverse,
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
    dgates, dh0 = torch.empty_like(gates), torch.empty_like(r.h0)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
    grid = ceil(batch / BATCH_TILE)
    launch(
        "lstm_sequence_backward", gates.dtype, grid, plan,
        dh=dh, dh_n=dh_n, gates=gates, c=c, c0=r.c0, weight_hh=r.weight_hh, dgates=dgates, dh0=dh0, dc=dc,
        lengths=r.lengths, resets=r.resets, T=steps, B=batch, H=r.hidden, reverse=r.reverse,
    )  # fmt: skip
    return dgates, dh0, dc, gates.new_empty(0)
