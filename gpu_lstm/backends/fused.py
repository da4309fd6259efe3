"""One layer in one direction by the kernels of a backend: forward and its gradients.

The kernels compute only the recurrence. The input product and every weight gradient are products over all steps.
"""

from collections.abc import Sequence, Set
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call.noise import Noise
from ..call.sequences import Traversal, valid_steps
from ..call.weights import State, Weights
from ..cells import lstm as cell
from ..kernels import layer_norm
from ..kernels.problem import NO_UNIT, Inputs, Recurrence, Unit


def weights_of(given: Inputs) -> Weights:
    """The weights of a layer."""
    return Weights(*attrgetter(*Weights._fields)(given))


def noise_of(given: Inputs) -> Noise:
    """Its noise."""
    return Noise(given.dropout_h, given.zoneout_h, given.zoneout_c)


def traversal_of(given: Inputs, reverse: bool) -> Traversal:
    """How it goes through the batch."""
    states = None if given.reset_h is None or given.reset_c is None else [(given.reset_h, given.reset_c)]
    return Traversal(given.lengths, given.resets, reverse, states)


def inputs_of(x: Tensor, state: State, weights: Weights, traversal: Traversal, noise: Noise) -> Inputs:
    """The tensors of a layer, all in the dtype of x except cell states."""
    lengths, resets, _, reset_states = traversal
    reset_h = reset_c = None
    if reset_states is not None:
        reset_h, reset_c = reset_states[0][0].to(x.dtype), reset_states[0][1]
        reset_c = reset_c if x.dtype is torch.float64 else reset_c.float()
    return Inputs(x, *state, *weights, reset_h, reset_c, *noise, lengths, resets)


def forward(kernels: Any, given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """h [T, B, P], h_n [1, B, P], c_n [1, B, H]; gates [T, B, 4H], activated if `save`; c [T, B, H], or None.

    c and c_n are float32.

    `kernels` is the Layer of a backend, kernels/layer.py.
    """
    of_resets = None
    if given.reset_h is not None:  # known before the time loop, which has h = 0 at resets
        of_resets = _at_resets(_with_dropout(given.reset_h, given), traversal_of(given, kernels.problem.reverse))
    gates = _products(given, of_resets)
    h, h_n, c_n, c = kernels.forward(gates, Recurrence(_with_exact_c0(given)), save)
    return h, h_n, c_n, gates, c


def _with_exact_c0(given: Inputs) -> Inputs:
    """The same with c0 in float32, as kernels keep cell states."""
    return given if given.c0.dtype is torch.float32 else given._replace(c0=given.c0.float())


def _products(given: Inputs, h: Tensor | None) -> Tensor:
    """x W_ih^T + b_ih + b_hh + h W_hh^T, [T, B, 4H]; `h` [T, B, P] is the operand of W_hh, None if it is zero."""
    bias = None if given.bias_ih is None or given.bias_hh is None else given.bias_ih + given.bias_hh
    if given.gain_ih is None:
        z = F.linear(given.x, given.weight_ih, bias)
    else:
        z = cell.linear(given.x, given.weight_ih, bias, given.gain_ih).contiguous()
    if h is not None and given.gain_hh is None:
        z.flatten(0, 1).addmm_(h.flatten(0, 1), given.weight_hh.T)
    elif h is not None:
        z += cell.linear(h, given.weight_hh, None, given.gain_hh)
    return z


def _with_dropout(h: Tensor, given: Inputs) -> Tensor:
    """The operand of W_hh, from h [T, B, P]; also the gradient of h, from that of the operand."""
    return h if given.dropout_h is None else given.dropout_h * h


def _at_resets(t: Tensor, traversal: Traversal) -> Tensor:
    """t [T, B, F], with zeros where no step is reset."""
    reset = traversal.resets_in_time()
    assert reset is not None, "states to reset to come with resets"
    return torch.where(reset[:, :, None], t, 0)


class Saved(NamedTuple):
    """What backward reads: the inputs, and what forward saved."""

    given: Inputs
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be recomputed
    c: Tensor  # [T, B, H] float32; zero in padding

    def cell_before(self, traversal: Traversal) -> Tensor:
        """The cell states [T, B, H] that each step began with, float32; anything finite in padding."""
        return traversal.states_before(self.c, self.given.c0.float(), self.given.reset_c)

    def cell_after(self, traversal: Traversal) -> Tensor:
        """c as each step computed it, before zoneout, [T, B, H] float32; anything in padding."""
        if self.given.zoneout_c is None:
            return self.c
        i, f, g, _ = self.gates.chunk(4, dim=2)
        return cell.next_cell(i, f, g, self.cell_before(traversal))


def gradients(
    kernels: Any, saved: Saved, output_gradients: Sequence[Tensor | None], needed: Set[str]
) -> dict[str, Tensor | None]:
    """Gradients of the Inputs that are `needed`, by name, from those of h, h_n and c_n, of which None means zero."""
    given, problem = saved.given, kernels.problem
    traversal = traversal_of(given, problem.reverse)
    gates_were_dropped = saved.gates.dim() < saved.c.dim()  # not by elements: an empty batch has none
    h_prev = saved.h  # [T, B, P] the operand of W_hh at each step; anything finite in padding
    if gates_were_dropped or "weight_hh" in needed or given.gain_hh is not None:
        h_prev = _with_dropout(traversal.states_before(saved.h, given.h0, given.reset_h), given)
    if gates_were_dropped:  # all h are known by now, so that one product serves all steps
        z, peephole = _products(given, h_prev), given.weight_peephole
        c_prev = None if peephole is None else saved.cell_before(traversal)
        saved = saved._replace(gates=cell.activate_in_place(z, peephole, c_prev))
    of_hh = of_c = NO_UNIT
    if given.gain_hh is not None:
        of_hh = layer_norm.unit_of(h_prev @ given.weight_hh.T, 4 * problem.hidden)
    if given.gain_c is not None:
        of_c = layer_norm.unit_of(saved.cell_after(traversal), problem.hidden)
    dh, dh_n, dc_n = output_gradients
    r = Recurrence(_with_exact_c0(given), of_hh, of_c)
    dc_n = None if dc_n is None else dc_n.float()
    d = kernels.backward(dh, dh_n, dc_n, saved.gates, saved.c, r, "h0" in needed)

    found: dict[str, Tensor | None] = {}
    of_x = of_h = d.dgates  # of W_ih x and W_hh h; zero in padding, but zero times a NaN in there is NaN
    if given.gain_ih is not None and not needed.isdisjoint(("x", "weight_ih", "gain_ih")):
        z = _without_padding(given.x, given.lengths) @ given.weight_ih.T
        of_x, found["gain_ih"] = _through_norm(d.dgates, given.gain_ih, layer_norm.unit_of(z, 4 * problem.hidden))
    if given.gain_hh is not None and not needed.isdisjoint(("weight_hh", "gain_hh", "reset_h")):
        of_h, found["gain_hh"] = _through_norm(d.dgates, given.gain_hh, of_hh)
    if given.gain_c is not None and not needed.isdisjoint(("gain_c", "bias_c")):
        found["gain_c"], found["bias_c"] = _gradients_of_norm_of_c(saved, d.dh_total, given.gain_c, of_c.unit)
    columns_of_x = of_x.flatten(0, 1).T  # [4H, T*B]
    columns_of_h = columns_of_x if of_h is of_x else of_h.flatten(0, 1).T
    if "x" in needed:
        found["x"] = of_x @ given.weight_ih
    if "h0" in needed:
        found["h0"] = d.dh0
    if "c0" in needed:
        found["c0"] = d.dc0.to(given.c0.dtype)
    if "weight_ih" in needed:
        found["weight_ih"] = columns_of_x @ _without_padding(given.x, given.lengths).flatten(0, 1)
    if "weight_hh" in needed:
        found["weight_hh"] = columns_of_h @ h_prev.flatten(0, 1)
    if "bias_ih" in needed or "bias_hh" in needed:
        found["bias_ih"] = found["bias_hh"] = d.dgates.sum((0, 1))
    if "weight_hr" in needed:
        m = cell.output(saved.gates.chunk(4, dim=2)[3], saved.cell_after(traversal), None, None)  # [T, B, H]
        found["weight_hr"] = d.dh_total.flatten(0, 1).T @ _without_padding(m, given.lengths).flatten(0, 1)
    if "weight_peephole" in needed:
        found["weight_peephole"] = _gradient_of_peepholes(saved, d.dgates, traversal)
    if "reset_h" in needed:
        dreset_h = _with_dropout(_at_resets(of_h, traversal) @ given.weight_hh, given)
        found["reset_h"] = dreset_h if d.dreset_h is None else dreset_h + d.dreset_h.to(dreset_h.dtype)
    if "reset_c" in needed:
        found["reset_c"] = d.dreset_c
    return found


def _through_norm(d: Tensor, gain: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Gradient d [T, B, N] of a layer norm's result -> gradients of (its input, its gain [N])."""
    return layer_norm.gradient(d, gain, *unit), (d * unit.unit).sum((0, 1))


def _gradients_of_norm_of_c(saved: Saved, dm: Tensor, gain: Tensor, unit: Tensor) -> tuple[Tensor, Tensor | None]:
    """[H]: of gain_c and of bias_c, from dm [T, B, H], that of m = o tanh(LN(c))."""
    bias, lengths = saved.given.bias_c, saved.given.lengths
    normed = unit * gain if bias is None else unit * gain + bias
    d = dm * saved.gates.chunk(4, dim=2)[3] * (1 - normed.tanh().square())  # [T, B, H] float32
    dgain, dbias = (_without_padding(t, lengths).sum((0, 1)).to(dm.dtype) for t in (d * unit, d))
    return dgain, None if bias is None else dbias


def _gradient_of_peepholes(saved: Saved, dgates: Tensor, traversal: Traversal) -> Tensor:
    """[3H]: the gradients of z_i and z_f times the c before each step, of z_o times the c after it, over all steps."""
    dz_i, dz_f, _, dz_o = dgates.chunk(4, dim=2)
    before = saved.cell_before(traversal)
    after = _without_padding(saved.cell_after(traversal), saved.given.lengths)
    sums = [(dz * c).sum((0, 1)) for dz, c in ((dz_i, before), (dz_f, before), (dz_o, after))]
    return torch.cat(sums).to(dgates.dtype)


def _without_padding(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t [T, B, F] with zeros past the end of each sequence."""
    valid = valid_steps(t.shape[0], lengths)
    return t if valid is None else torch.where(valid[:, :, None], t, 0)
