"""The readable oracle: one layer of any cell in plain torch, on any device, in any dtype, differentiable to any order.

Every other backend is compared with it. Inputs in half precision are computed in float32, and results rounded once.
"""

from __future__ import annotations  # torch.compile tries to evaluate annotations of nested functions, and fails

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call.choices import Backend
from ..call.noise import scaled
from ..call.regularisers import AFTER
from ..call.request import Call
from ..call.sequences import where
from ..call.weights import CallResult, LayerResult, State, Weights
from ..equations import EQUATIONS
from ..equations.lstm import FourGates, linear
from ..kernels.cells import Cell
from ..kernels.heads import arranged
from ..kernels.tensors import Inputs, Noise
from .layer_loop import in_steps, run_layers, weights_of


class Steps(NamedTuple):
    """The results of all steps of one layer in one direction, ordered by time, zero past the end of a sequence."""

    gates: Tensor  # [T, B, 4H], activated, in the order of kernels/equations.py
    c: Tensor  # [T, B, H], after each step; where K > 1 the first of the K numbers
    h: Tensor  # [T, B, P], after each step


Record = Callable[[Steps], None]


def by_reference(call: Call, dtype: torch.dtype, record: Record | None = None) -> CallResult:
    """Run all layers of a call in `dtype`, and return the same as layer_loop.run_layers.

    `record` receives the Steps of each layer and direction.
    """
    return run_layers(
        call, dtype, Backend.REFERENCE,
        lambda inputs, row, reverse: layer_by_reference(call.options.cell, inputs, reverse, record),
    )  # fmt: skip


def layer_by_reference(cell: Cell, inputs: Inputs, reverse: bool, record: Record | None = None) -> LayerResult:
    """Run one layer in one direction, step by step. A step of an LSTM computes (equations/ has all cells):

        z = W_ih x + b_ih + W_hh h + b_hh       h' = m, or W_hr m with a projection

    With noise, W_hh multiplies h times the factors of recurrent dropout, and zoneout changes the states after the step,
    see call/regularisers.py. If `record` is given, it is called once, with the Steps.

    Returns:
        h: [T, B, P], in the dtype of x.
        h_n, c_n: [1, B, P] in the dtype of x, and [K, B, H] in the dtype of c0.
    """
    x, h0, c0, *_ = inputs
    dtype, kept = x.dtype, cell.kept
    h, c, weights = h0[0], c0[0] if kept == 1 else c0, weights_of(inputs)  # [B, P], and [B, H] or [K, B, H]
    if dtype in (torch.float16, torch.bfloat16):
        x, h, c, weights = x.float(), h.float(), c.float(), weights.to(torch.float32)
    weights = weights._replace(weight_hh=arranged(weights.weight_hh, h.shape[1]))
    empty, (reordered, ended, reset) = cell.empty_like(c), in_steps(inputs, reverse)
    x, others = reordered(x), [getattr(inputs, name) for name in ("reset_h", "reset_c", *Noise._fields)]
    given = [t if t is None else t.to(x.dtype) for t in others]
    given = [reordered(t) if t is not None and t.dim() == 3 else t for t in given]
    outputs, every_step = [], []
    for t in range(len(x)):
        reset_h, reset_c, *now = [each[t] if each is not None and each.dim() == 3 else each for each in given]
        to = 0.0 if reset_h is None else reset_h, empty if reset_c is None else reset_c
        before = where(None if reset is None else reset[t, :, None], to, (h, c))
        gates, after = _step(EQUATIONS[cell.name], x[t], before, weights, Noise(*now))
        if cell.one_state:  # c is h, also after zoneout has changed h
            after = after[0], after[0]
        outputs.append(after[0])
        if record is not None:
            every_step.append((torch.cat(gates, 1), after[1] if kept == 1 else after[1][0], after[0]))
        h, c = where(None if ended is None else ended[t, :, None], (h, c), after)

    if record is not None:
        record(Steps(*(reordered(torch.stack(each)).to(dtype) for each in zip(*every_step))))
    return reordered(torch.stack(outputs)).to(dtype), (h.to(dtype)[None], c.to(c0.dtype).view_as(c0))


def _step(equations: ModuleType, x: Tensor, state: State, w: Weights, noise: Noise) -> tuple[FourGates, State]:
    """Compute one step from x [B, I] and the state before the step. Returns the gates and the state after it."""
    h, c = state
    z_x = linear(x, w.weight_ih, w.bias_ih, w.gain_ih)
    z_h = linear(scaled(h, noise), w.weight_hh, w.bias_hh, w.gain_hh)
    gates, c = equations.step(equations.pre_activations(z_x, z_h), c, w.weight_peephole)
    h = equations.output(gates, c, w.gain_c, w.bias_c)
    after = h if w.weight_hr is None else F.linear(h, w.weight_hr), c
    for thing in AFTER:
        after = thing.after(state, after, noise)
    return gates, after
