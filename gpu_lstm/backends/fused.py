"""One layer in one direction by the kernels of a backend: forward and its gradients.

The kernels compute only the recurrence. The input product and every weight gradient are products over all steps.
"""

from collections.abc import Sequence, Set
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.noise import NO_NOISE, scaled
from ..call.sequences import Traversal, without_padding
from ..call.weights import Weights
from ..equations import EQUATIONS
from ..kernels import heads, layer_norm
from ..kernels.cells import CELLS, Cell
from ..kernels.layer import Layer
from ..kernels.problem import Inputs, Normed, Problem, Recurrence
from ..kernels.tensors import Noise
from .layer_loop import Part

_weights, _noise = attrgetter(*Weights._fields), attrgetter(*Noise._fields)


def inputs_of(part: Part) -> Inputs:
    """The tensors of a layer, all in the dtype of x except cell states."""
    _, x, state, weights, (lengths, resets, _, reset_states), noise = part
    reset_h = reset_c = None
    if reset_states is not None:
        reset_h, reset_c = reset_states[0][0].to(x.dtype), reset_states[0][1]
        reset_c = reset_c if x.dtype is torch.float64 else reset_c.float()
    return Inputs(x, *state, *weights, reset_h, reset_c, *noise, lengths, resets)


def part_of(inputs: Inputs, reverse: bool) -> Part:
    """The Part, of row 0, that these are the Inputs of."""
    i = inputs
    return Part(0, i.x, (i.h0, i.c0), Weights(*_weights(i)), traversal_of(i, reverse), Noise(*_noise(i)))


def traversal_of(inputs: Inputs, reverse: bool) -> Traversal:
    """How a layer with these Inputs goes through the batch."""
    states = None if inputs.reset_h is None else [(inputs.reset_h, inputs.reset_c)]
    return Traversal(inputs.lengths, inputs.resets, reverse, states)


def forward(layer: Layer, inputs: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """h [T, B, P], h_n [1, B, P], c_n [1, B, H]; gates [T, B, 4H], activated if `save`; c [T, B, H], or None.

    c and c_n are float32.
    """
    i, problem = inputs, layer.problem
    gates: Tensor = EQUATIONS[problem.cell].input_product(i.x, i.weight_ih, i.bias_ih, i.bias_hh, i.gain_ih)
    if i.reset_h is not None:  # in the time loop h is 0 at resets, and so W_hh h
        known = _at_resets(scaled(i.reset_h, i), traversal_of(i, problem.reverse))
        EQUATIONS[problem.cell].add_product(gates, known, i.weight_hh, i.gain_hh)
    if i.c0.dtype is not torch.float32:
        i = i._replace(c0=i.c0.float())
    h, h_n, c_n, c = layer.forward(gates, Recurrence(i), save)
    return h, h_n, c_n, gates, c


def _at_resets(t: Tensor, traversal: Traversal) -> Tensor:
    """t [T, B, F], with zeros where no step is reset."""
    reset: Any = traversal.resets_in_time()  # there are some, where there are states to reset to
    return torch.where(reset[:, :, None], t, 0)


class Saved(NamedTuple):
    """What backward reads: the inputs, and what forward saved."""

    inputs: Inputs
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be recomputed
    c: Tensor  # [T, B, H] float32; zero in padding


class AllSteps:
    """What forward saved of all steps, and what follows from it."""

    def __init__(self, problem: Problem, saved: Saved) -> None:
        self.inputs, self.h, self.gates, self.c = saved
        self.equations, self.traversal = EQUATIONS[problem.cell], traversal_of(saved.inputs, problem.reverse)

    def c_before(self) -> Tensor:
        """The cell states [T, B, H] that each step began with, float32; anything finite in padding."""
        return self.traversal.states_before(self.c, self.inputs.c0.float(), self.inputs.reset_c)

    def c_after(self) -> Tensor:
        """c as each step computed it, before zoneout, [T, B, H] float32; anything in padding."""
        if self.inputs.zoneout_c is None:
            return self.c
        c: Tensor = self.equations.next_cell(self.gates.chunk(4, dim=2), self.c_before())
        return c

    def recompute_gates(self, cell: Cell, h_prev: Tensor) -> None:
        """All h are known by now, so that one product serves all steps."""
        i = self.inputs
        c_prev = None if i.weight_peephole is None else self.c_before()
        z = self.equations.input_product(i.x, i.weight_ih, i.bias_ih, i.bias_hh, i.gain_ih)
        self.equations.add_product(z, h_prev, i.weight_hh, i.gain_hh)
        constants = i.bias_hh if cell.has_constant else i.weight_peephole
        self.gates = self.equations.activate_in_place(z, constants, c_prev)


def gradients(
    layer: Layer, saved: Saved, output_gradients: Sequence[Tensor | None], needed: Set[str]
) -> dict[str, Tensor | None]:
    """Gradients of the Inputs that are `needed`, by name, from those of h, h_n and c_n, of which None means zero."""
    i, cell, hidden = saved.inputs, CELLS[layer.problem.cell], layer.problem.hidden
    steps, norm_hh, norm_c = AllSteps(layer.problem, saved), None, None

    # What forward did not keep.
    gates_were_dropped = saved.gates.dim() < saved.c.dim()  # not by elements: an empty batch has none
    h_prev = saved.h  # [T, B, P] the operand of W_hh at each step; anything finite in padding
    if gates_were_dropped or "weight_hh" in needed or i.gain_hh is not None:
        h_prev = steps.traversal.states_before(saved.h, i.h0, i.reset_h)
        h_prev = h_prev if _noise(i) == NO_NOISE else scaled(h_prev, i)  # which is two calls
    if gates_were_dropped:
        steps.recompute_gates(cell, h_prev)
    if i.gain_hh is not None:
        norm_hh = layer_norm.normed_of(heads.product(h_prev, i.weight_hh), i.gain_hh, 4 * hidden)
    if i.gain_c is not None:
        norm_c = layer_norm.normed_of(without_padding(steps.c_after(), i.lengths), i.gain_c, hidden)

    # The time loop.
    dh, dh_n, dc_n = output_gradients
    dc_n = None if dc_n is None else dc_n.float()
    r = Recurrence(i if i.c0.dtype is torch.float32 else i._replace(c0=i.c0.float()), norm_hh, norm_c)
    loop = layer.backward(dh, dh_n, dc_n, steps.gates, saved.c, r, "h0" in needed)

    # Products and sums over all steps. Gradients are zero in padding, but zero times a NaN in there is NaN.
    d: dict[str, Tensor | None] = {"h0": loop.dh0, "reset_c": loop.dreset_c}
    x = i.x if i.lengths is None else without_padding(i.x, i.lengths)
    dz_x, dz_h = cell.of_x(loop.dgates, hidden), cell.of_h(loop.dgates, hidden)  # of W_ih x and of W_hh h
    if i.gain_ih is not None:
        norm_ih = layer_norm.normed_of(x @ i.weight_ih.T, i.gain_ih, 4 * hidden)
        dz_x, d["gain_ih"] = layer_norm.gradients(dz_x, norm_ih, 4 * hidden)
    if norm_hh is not None:
        dz_h, d["gain_hh"] = layer_norm.gradients(dz_h, norm_hh, 4 * hidden)
    if norm_c is not None:
        d["gain_c"], d["bias_c"] = _of_norm_of_c(steps, norm_c, loop.dh_total)
    dz_x_rows = dz_x.flatten(0, 1).T  # [rows H, T*B]
    dz_h_rows = dz_x_rows if dz_h is dz_x else dz_h.flatten(0, 1).T
    if "x" in needed:
        d["x"] = dz_x if i.weight_ih is None else dz_x @ cell.from_torch(i.weight_ih, hidden)
    if "c0" in needed:
        d["c0"] = loop.dc0.to(i.c0.dtype)
    if "weight_ih" in needed:
        d["weight_ih"] = cell.to_torch(dz_x_rows @ x.flatten(0, 1), hidden)
    if "weight_hh" in needed:
        h_rows, count = h_prev.flatten(0, 1), layer.problem.heads
        d["weight_hh"] = dz_h_rows @ h_rows if count == 1 else heads.gradient_of_weight(dz_h_rows, h_rows, count)
    if "bias_ih" in needed or "bias_hh" in needed:
        dbias = loop.dgates.sum((0, 1))  # [4H]
        d["bias_ih"] = cell.to_torch(cell.of_x(dbias, hidden), hidden)
        d["bias_hh"] = None if i.bias_hh is None else cell.of_h(dbias, hidden)
    if "weight_hr" in needed:
        m = steps.equations.output(steps.gates.chunk(4, dim=2), steps.c_after(), None, None)  # [T, B, H]
        d["weight_hr"] = loop.dh_total.flatten(0, 1).T @ without_padding(m, i.lengths).flatten(0, 1)
    if "weight_peephole" in needed:
        d["weight_peephole"] = _of_peepholes(steps, loop.dgates)
    if "reset_h" in needed:
        d["reset_h"] = _of_reset_h(steps, dz_h, loop.dreset_h)
    return d


def _of_norm_of_c(steps: AllSteps, norm: Normed, dm: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of gain_c and bias_c, [H], from dm [T, B, H], where m = o tanh(LN(c))."""
    unit, bias = (norm.v - norm.mean) * norm.scale, steps.inputs.bias_c
    normed = unit * norm.gain if bias is None else unit * norm.gain + bias
    d = dm * steps.gates.chunk(4, dim=2)[3] * (1 - normed.tanh().square())  # [T, B, H] float32
    d = without_padding(d, steps.inputs.lengths)
    dgain, dbias = ((t.sum((0, 1))).to(dm.dtype) for t in (d * unit, d))
    return dgain, None if bias is None else dbias


def _of_peepholes(steps: AllSteps, dgates: Tensor) -> Tensor:
    """[3H]: the gradients of z_i and z_f times the c before each step, of z_o times the c after it, over all steps."""
    dz_i, dz_f, _, dz_o = dgates.chunk(4, dim=2)
    before, after = steps.c_before(), without_padding(steps.c_after(), steps.inputs.lengths)
    sums = [(dz * c).sum((0, 1)) for dz, c in ((dz_i, before), (dz_f, before), (dz_o, after))]
    return torch.cat(sums).to(dgates.dtype)


def _of_reset_h(steps: AllSteps, dz_h: Tensor, through_zoneout: Tensor | None) -> Tensor:
    """[T, B, P], from dz_h [T, B, 4H], that of W_hh h."""
    i = steps.inputs
    dreset_h = scaled(heads.gradient_of_h(_at_resets(dz_h, steps.traversal), i.weight_hh, i.h0.shape[2]), i)
    return dreset_h if through_zoneout is None else dreset_h + through_zoneout.to(dreset_h.dtype)
