"""One layer in one direction by the kernels of a backend: forward and its gradients.

The kernels compute only the recurrence. The input product and every weight gradient are products over all steps.
"""

from collections.abc import Sequence, Set
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..call.noise import NO_NOISE, added, operand, scaled
from ..call.regularisers import ADDING
from ..call.sequences import Traversal, without_padding
from ..call.weights import Weights
from ..equations import EQUATIONS, lstm
from ..kernels import layer_norm
from ..kernels.cells import CELLS, Cell
from ..kernels.layer import Layer
from ..kernels.problem import NO_UNIT, Gradients, Inputs, Problem, Recurrence, Unit
from ..kernels.tensors import Noise
from .layer_loop import Part

_weights, _noise = attrgetter(*Weights._fields), attrgetter(*Noise._fields)


def weights_of(inputs: Inputs) -> Weights:
    """The Weights among the Inputs of a layer."""
    return Weights(*_weights(inputs))


def noise_of(inputs: Inputs) -> Noise:
    """The Noise among them."""
    return Noise(*_noise(inputs))


def traversal_of(inputs: Inputs, reverse: bool) -> Traversal:
    """How a layer with these Inputs goes through the batch."""
    states = None if inputs.reset_h is None or inputs.reset_c is None else [(inputs.reset_h, inputs.reset_c)]
    return Traversal(inputs.lengths, inputs.resets, reverse, states)


def inputs_of(part: Part) -> Inputs:
    """The tensors of a layer, all in the dtype of x except cell states."""
    _, x, state, weights, (lengths, resets, _, reset_states), noise = part
    reset_h = reset_c = None
    if reset_states is not None:
        reset_h, reset_c = reset_states[0][0].to(x.dtype), reset_states[0][1]
        reset_c = reset_c if x.dtype is torch.float64 else reset_c.float()
    return Inputs(x, *state, *weights, reset_h, reset_c, *noise, lengths, resets)


def forward(layer: Layer, inputs: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """h [T, B, P], h_n [1, B, P], c_n [1, B, H]; gates [T, B, 4H], activated if `save`; c [T, B, H], or None.

    c and c_n are float32.
    """
    i, problem = inputs, layer.problem
    gates: Tensor = EQUATIONS[problem.cell].input_product(i.x, i.weight_ih, i.bias_ih, i.bias_hh, i.gain_ih)
    known = added(i) if ADDING else None  # of the operand of W_hh before the time loop, which has h = 0 at resets
    if i.reset_h is not None:
        at_resets = _at_resets(scaled(i.reset_h, i), traversal_of(i, problem.reverse))
        known = at_resets if known is None else known + at_resets
    if known is not None:
        _add_product(CELLS[problem.cell], gates, i, known)
    if inputs.c0.dtype is not torch.float32:
        inputs = inputs._replace(c0=inputs.c0.float())
    h, h_n, c_n, c = layer.forward(gates, Recurrence(inputs), save)
    return h, h_n, c_n, gates, c


def _add_product(cell: Cell, z: Tensor, i: Inputs, h: Tensor) -> None:
    """Add h W_hh^T to z [T, B, 4H]; `h` [T, B, P] is the operand of W_hh."""
    if i.gain_hh is None:
        cell.of_h(z, i.c0.shape[-1]).flatten(0, 1).addmm_(h.flatten(0, 1), i.weight_hh.T)
    else:
        z += lstm.linear(h, i.weight_hh, None, i.gain_hh)


def _at_resets(t: Tensor, traversal: Traversal) -> Tensor:
    """t [T, B, F], with zeros where no step is reset."""
    reset = traversal.resets_in_time()
    assert reset is not None, "states to reset to come with resets"
    return torch.where(reset[:, :, None], t, 0)


class Saved(NamedTuple):
    """What backward reads: the inputs, and what forward saved."""

    inputs: Inputs
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be recomputed
    c: Tensor  # [T, B, H] float32; zero in padding

    def cell_before(self, traversal: Traversal) -> Tensor:
        """The cell states [T, B, H] that each step began with, float32; anything finite in padding."""
        return traversal.states_before(self.c, self.inputs.c0.float(), self.inputs.reset_c)

    def cell_after(self, cell: str, traversal: Traversal) -> Tensor:
        """c as each step computed it, before zoneout, [T, B, H] float32; anything in padding."""
        if self.inputs.zoneout_c is None:
            return self.c
        c: Tensor = EQUATIONS[cell].next_cell(self.gates.chunk(4, dim=2), self.cell_before(traversal))
        return c

    def with_gates(self, cell: str, h_prev: Tensor, traversal: Traversal) -> "Saved":
        """With gates that forward did not keep: all h are known by now, so that one product serves all steps."""
        i, peephole = self.inputs, self.inputs.weight_peephole
        z = EQUATIONS[cell].input_product(i.x, i.weight_ih, i.bias_ih, i.bias_hh, i.gain_ih)
        _add_product(CELLS[cell], z, i, h_prev)
        c_prev = None if peephole is None else self.cell_before(traversal)
        return self._replace(gates=EQUATIONS[cell].activate_in_place(z, peephole, c_prev))


def gradients(
    layer: Layer, saved: Saved, output_gradients: Sequence[Tensor | None], needed: Set[str]
) -> dict[str, Tensor | None]:
    """Gradients of the Inputs that are `needed`, by name, from those of h, h_n and c_n, of which None means zero."""
    inputs, problem = saved.inputs, layer.problem
    traversal = traversal_of(inputs, problem.reverse)
    gates_were_dropped = saved.gates.dim() < saved.c.dim()  # not by elements: an empty batch has none
    h_prev = saved.h  # [T, B, P] the operand of W_hh at each step; anything finite in padding
    if gates_were_dropped or "weight_hh" in needed or inputs.gain_hh is not None:
        h_prev = traversal.states_before(saved.h, inputs.h0, inputs.reset_h)
        h_prev = h_prev if _noise(inputs) == NO_NOISE else operand(h_prev, inputs)  # which is four calls
    if gates_were_dropped:
        saved = saved.with_gates(problem.cell, h_prev, traversal)
    unit_hh = unit_c = NO_UNIT
    if inputs.gain_hh is not None:
        unit_hh = layer_norm.unit_of(h_prev @ inputs.weight_hh.T, 4 * problem.hidden)
    if inputs.gain_c is not None:
        unit_c = layer_norm.unit_of(saved.cell_after(problem.cell, traversal), problem.hidden)
    dh, dh_n, dc_n = output_gradients
    dc_n = None if dc_n is None else dc_n.float()
    exact = inputs if inputs.c0.dtype is torch.float32 else inputs._replace(c0=inputs.c0.float())
    r = Recurrence(exact, unit_hh, unit_c)
    loop = layer.backward(dh, dh_n, dc_n, saved.gates, saved.c, r, "h0" in needed)
    return _over_all_steps(problem, saved, h_prev, r, loop, needed)


def _over_all_steps(
    problem: Problem, saved: Saved, h_prev: Tensor, r: Recurrence, loop: Gradients, needed: Set[str]
) -> dict[str, Tensor | None]:
    """The gradients that are `needed`, from those of the time `loop`: products and sums over all steps."""
    inputs, cell, hidden = saved.inputs, CELLS[problem.cell], problem.hidden
    traversal = traversal_of(inputs, problem.reverse)
    d: dict[str, Tensor | None] = {"h0": loop.dh0, "reset_c": loop.dreset_c}
    # Of W_ih x and of W_hh h. Zero in padding, but zero times a NaN in there is NaN.
    dz_x, dz_h = cell.of_x(loop.dgates, hidden), cell.of_h(loop.dgates, hidden)
    if inputs.gain_ih is not None and not needed.isdisjoint(("x", "weight_ih", "gain_ih")):
        z_x = without_padding(inputs.x, inputs.lengths) @ inputs.weight_ih.T
        dz_x, d["gain_ih"] = _through_norm(dz_x, inputs.gain_ih, layer_norm.unit_of(z_x, 4 * hidden))
    if inputs.gain_hh is not None and not needed.isdisjoint(("weight_hh", "gain_hh", "reset_h")):
        dz_h, d["gain_hh"] = _through_norm(dz_h, inputs.gain_hh, r.unit_hh)
    if inputs.gain_c is not None and not needed.isdisjoint(("gain_c", "bias_c")):
        d["gain_c"], d["bias_c"] = _gradients_of_norm_of_c(saved, loop.dh_total, inputs.gain_c, r.unit_c.unit)
    dz_x_rows = dz_x.flatten(0, 1).T  # [4H, T*B]
    dz_h_rows = dz_x_rows if dz_h is dz_x else dz_h.flatten(0, 1).T
    if "x" in needed:
        d["x"] = dz_x @ cell.from_torch(inputs.weight_ih, hidden)
    if "c0" in needed:
        d["c0"] = loop.dc0.to(inputs.c0.dtype)
    if "weight_ih" in needed:
        x = inputs.x if inputs.lengths is None else without_padding(inputs.x, inputs.lengths)
        d["weight_ih"] = cell.to_torch(dz_x_rows @ x.flatten(0, 1), hidden)
    if "weight_hh" in needed:
        d["weight_hh"] = dz_h_rows @ h_prev.flatten(0, 1)
    if "bias_ih" in needed or "bias_hh" in needed:
        dbias = loop.dgates.sum((0, 1))  # [4H]
        d["bias_ih"], d["bias_hh"] = cell.to_torch(cell.of_x(dbias, hidden), hidden), cell.of_h(dbias, hidden)
    if "weight_hr" in needed:
        c = saved.cell_after(problem.cell, traversal)
        m = EQUATIONS[problem.cell].output(saved.gates.chunk(4, dim=2), c, None, None)  # [T, B, H]
        d["weight_hr"] = loop.dh_total.flatten(0, 1).T @ without_padding(m, inputs.lengths).flatten(0, 1)
    if "weight_peephole" in needed:
        d["weight_peephole"] = _gradient_of_peepholes(saved, problem.cell, loop.dgates, traversal)
    if "reset_h" in needed:
        dreset_h = scaled(_at_resets(dz_h, traversal) @ inputs.weight_hh, inputs)
        d["reset_h"] = dreset_h if loop.dreset_h is None else dreset_h + loop.dreset_h.to(dreset_h.dtype)
    return d


def _through_norm(d: Tensor, gain: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Gradient d [T, B, N] of a layer norm's result -> gradients of (its input, its gain [N])."""
    return layer_norm.gradient(d, gain, *unit), (d * unit.unit).sum((0, 1))


def _gradients_of_norm_of_c(saved: Saved, dm: Tensor, gain: Tensor, unit: Tensor) -> tuple[Tensor, Tensor | None]:
    """[H]: of gain_c and of bias_c, from dm [T, B, H], that of m = o tanh(LN(c))."""
    bias, lengths = saved.inputs.bias_c, saved.inputs.lengths
    normed = unit * gain if bias is None else unit * gain + bias
    d = dm * saved.gates.chunk(4, dim=2)[3] * (1 - normed.tanh().square())  # [T, B, H] float32
    dgain, dbias = (without_padding(t, lengths).sum((0, 1)).to(dm.dtype) for t in (d * unit, d))
    return dgain, None if bias is None else dbias


def _gradient_of_peepholes(saved: Saved, cell: str, dgates: Tensor, traversal: Traversal) -> Tensor:
    """[3H]: the gradients of z_i and z_f times the c before each step, of z_o times the c after it, over all steps."""
    dz_i, dz_f, _, dz_o = dgates.chunk(4, dim=2)
    before = saved.cell_before(traversal)
    after = without_padding(saved.cell_after(cell, traversal), saved.inputs.lengths)
    sums = [(dz * c).sum((0, 1)) for dz, c in ((dz_i, before), (dz_f, before), (dz_o, after))]
    return torch.cat(sums).to(dgates.dtype)
