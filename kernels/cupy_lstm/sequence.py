"""The family whose blocks walk whole sequences: lstm_sequence_*, cuda/sequence.cu."""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from ..recurrence import Recurrence
from .planning import CELL, MULTIPLY_ADDS, PACK, Card, Family, Launch, Plan, Problem

GATES = BATCH_TILE = 4  # of a block
MAX_THREADS = 512  # of a block


def plans(problem: Problem, card: Card) -> Iterator[Plan]:
    """The plan, if the shared memory of a block can hold W_hh.

    As many threads as there can be share the products: each of the 4H columns is summed in as many slices.
    """
    width, size = GATES * problem.hidden, PACK // problem.dtype.itemsize
    for slices in range(min(MAX_THREADS // width, ceil(problem.hidden / size)), 0, -1):
        threads = slices * width
        packs = ceil(problem.hidden / (slices * size))  # of a thread's weights
        vectors = GATES if problem.backward else 2  # dz of every gate, or h of two steps
        floats = BATCH_TILE * (vectors * slices * packs * size + threads)
        shared = packs * threads * PACK + 4 * floats
        if shared <= card.shared:
            blocks = ceil(problem.batch / BATCH_TILE)
            products = BATCH_TILE * threads * packs * size / MULTIPLY_ADDS
            waves = ceil(blocks / (card.multiprocessors // problem.side_by_side or 1))
            yield Plan(Family.SEQUENCE, (blocks, 1), threads, shared, waves * (1.5 * products + CELL))
            return


def forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As launch.layer_forward."""
    r = recurrence
    steps, batch, _ = gates.shape
    h = gates.new_empty(steps, batch, r.hidden)
    h_n, c_n = r.h0.clone(), r.c0.clone()  # the initial states going in, the final ones coming out
    c = r.c0.new_empty((steps, batch, r.hidden) if save else 0)
    launch(
        "lstm_sequence_forward", gates.dtype, plan,
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
) -> tuple[Tensor, Tensor]:
    """dgates [T, B, 4H] and dc0 [B, H], as launch.layer_backward."""
    r = recurrence
    steps, batch, _ = gates.shape
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
    launch(
        "lstm_sequence_backward", gates.dtype, plan,
        dh=dh, dh_n=dh_n, gates=gates, c=c, c0=r.c0, weight_hh=r.weight_hh, dgates=dgates, dc=dc,
        lengths=r.lengths, resets=r.resets, T=steps, B=batch, H=r.hidden, reverse=r.reverse,
    )  # fmt: skip
    return dgates, dc
