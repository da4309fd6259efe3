"""The readable oracle: one LSTM layer in plain torch. Any device, any dtype, differentiable to any order.

Every other backend is compared with it. Inputs in half precision are computed in float32, and results rounded once.
"""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call.choices import Backend
from ..call.noise import NO_NOISE, operand
from ..call.prepare import Call
from ..call.regularisers import AFTER
from ..call.sequences import Traversal
from ..call.weights import State, Weights
from ..equations import EQUATIONS
from ..equations.lstm import FourGates, linear
from ..kernels.problem import Inputs
from ..kernels.tensors import Noise
from .fused import noise_of, traversal_of, weights_of
from .layer_loop import Part, run_layers, without_autocast


class Steps(NamedTuple):
    """What one layer computes in one direction, at every step; zero past the end of a sequence."""

    gates: Tensor  # [T, B, 4H] in the order of the pre-activations
    cell: Tensor  # [T, B, H] c, after the step
    hidden: Tensor  # [T, B, P] h, after the step; P = H without a projection


def run_call(call: Call, dtype: torch.dtype, record: list[Steps] | None = None) -> tuple[Tensor, list[State]]:
    """All layers of a call that is laid out, in `dtype`: output [T, B, D*P] and final states as Call.states."""
    return run_layers(call, dtype, Backend.REFERENCE, partial(_run_part, call, dtype, record))


def _run_part(call: Call, dtype: torch.dtype, record: list[Steps] | None, part: Part) -> tuple[Tensor, State]:
    _, x, state, weights, traversal, noise = part.to(dtype)
    with without_autocast(call):
        return run_layer(call.options.cell.name, x, state, weights, traversal, noise, record)


def run_inputs(tensors: Sequence[Tensor | None], cell: str, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, h_n and c_n of one layer in one direction, from its Inputs."""
    i = Inputs(*tensors)
    h, (h_n, c_n) = run_layer(cell, i.x, (i.h0, i.c0), weights_of(i), traversal_of(i, reverse), noise_of(i))
    return h, h_n, c_n


def gradients(
    run: Callable[[list[Any]], tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],  # what `run` accepts
    output_gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the first `tensors`, where `needed`, themselves differentiable: run(tensors) is recomputed."""
    wanted = [k for k, need in enumerate(needed) if need]
    present = [k for k, gradient in enumerate(output_gradients) if gradient is not None]

    def recomputed(*those_wanted: Tensor) -> tuple[Tensor, ...]:
        every: list[Any] = list(tensors)
        for k, tensor in zip(wanted, those_wanted):
            every[k] = tensor
        outputs = run(every)
        return tuple(outputs[k] for k in present)

    # torch.func.vjp, not autograd.grad: inputs may be one tensor, depend on each other, or belong to a transform.
    _, pull = torch.func.vjp(recomputed, *(tensors[k] for k in wanted))[:2]
    by_place = dict(zip(wanted, pull(tuple(output_gradients[k] for k in present))))
    return [by_place.get(k) for k in range(len(needed))]


def run_layer(
    cell: str, x: Tensor, state: State, weights: Weights, traversal: Traversal,
    noise: Noise = NO_NOISE, record: list[Steps] | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """One layer, one direction, step by step, from x [T, B, I] and ([1, B, P], [1, B, H]). At each step, see
    equations/, for an LSTM:

        z = W_ih x + b_ih + W_hh h + b_hh       h' = m, or W_hr m with a projection

    With `noise`, see call/regularisers.py, W_hh multiplies another h, and other states follow the step.
    What all steps compute is appended to `record`, if there is one.

    Returns:
        h [T, B, P] and (h_n [1, B, P], c_n [1, B, H]), in the dtypes of x, h0 and c0.
    """
    h0, c0 = state[0][0], state[1][0]  # [B, P], [B, H]
    dtype, cell_dtype = x.dtype, c0.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x, h0, c0, weights = x.float(), h0.float(), c0.float(), weights.to(torch.float32)
    time, valid, reset = traversal.steps(x)  # [T, B] each, or None

    def inside(t: Tensor) -> Tensor:
        """t [T, B, F] with zeros past the end of a sequence, where it may be NaN, and steps and times are the same."""
        return t if valid is None else torch.where(valid[:, :, None], t, 0)

    def reordered(t: Tensor) -> Tensor:
        """t [T, B, F] from the order of time to that of steps, or back."""
        return t.gather(0, time[:, :, None].expand_as(t))

    steps, x = len(x), reordered(inside(x))
    reset_h, reset_c = (None if t is None else reordered(t.to(x.dtype)) for t in traversal.reset_to())
    noise = [None if t is None else reordered(t.to(x.dtype)) if t.dim() == 3 else t.to(x.dtype) for t in noise]
    noise = noise if any([t is not None for t in noise]) else None

    h, c = h0, c0
    outputs, every_step = [], []
    for t in range(steps):
        h_prev, c_prev = h, c
        if reset is not None:
            h_prev = torch.where(reset[t, :, None], 0 if reset_h is None else reset_h[t], h)
            c_prev = torch.where(reset[t, :, None], 0 if reset_c is None else reset_c[t], c)
        now = None if noise is None else Noise(*[n[t] if n is not None and n.dim() == 3 else n for n in noise])
        gates, c_next, h_next = _step(EQUATIONS[cell], x[t], h_prev, c_prev, weights, now)
        if record is not None:
            every_step.append((torch.cat(gates, 1), c_next, h_next))
        outputs.append(h_next)
        if valid is None:
            h, c = h_next, c_next
        else:
            h, c = (torch.where(valid[t, :, None], *both) for both in ((h_next, h), (c_next, c)))

    if record is not None:
        record.append(Steps(*(inside(reordered(torch.stack(each)).to(dtype)) for each in zip(*every_step))))
    return inside(reordered(torch.stack(outputs))).to(dtype), (h.to(dtype)[None], c.to(cell_dtype)[None])


def _step(
    cell: ModuleType, x: Tensor, h: Tensor, c: Tensor, weights: Weights, noise: Noise | None
) -> tuple[FourGates, Tensor, Tensor]:  # fmt: skip
    """One step of x [B, I], from the states before it: its gates, c and h, [B, *]; `noise` is that of the step."""
    w = weights
    h_in = h if noise is None else operand(h, noise)
    of_x, of_h = linear(x, w.weight_ih, w.bias_ih, w.gain_ih), linear(h_in, w.weight_hh, w.bias_hh, w.gain_hh)
    gates, c_next = cell.step(cell.pre_activations(of_x, of_h), c, w.weight_peephole)  # [B, H] each
    h_next = cell.output(gates, c_next, w.gain_c, w.bias_c)
    if w.weight_hr is not None:
        h_next = F.linear(h_next, w.weight_hr)
    for thing in () if noise is None else AFTER:
        h_next, c_next = thing.after((h, c), (h_next, c_next), noise)
    return gates, c_next, h_next
