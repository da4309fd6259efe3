"""One layer in one direction by the kernels of a backend: forward, its gradients, and what both share.

The kernels do only the recurrence. The input product and every weight gradient are products over all steps at
once, outside the time loop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call.noise import Noise
from ..call.sequences import Traversal, valid_steps
from ..call.weights import Weights
from ..cells import lstm as cell
from ..kernels import layer_norm  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from ..kernels.layer_norm import NO_UNIT, Unit  # type: ignore[import-not-found]
from ..kernels.problem import Recurrence  # type: ignore[import-not-found]


class Inputs(NamedTuple):
    """The tensors that a layer is given; gradients have the same names, up to reset_c."""

    x: Tensor  # [T, B, I]
    h0: Tensor  # [B, P]; the only row of an LSTM may be [1, B, P]
    c0: Tensor  # [B, H], alike
    weight_ih: Tensor  # [4H, I] and below: a layer's Weights
    weight_hh: Tensor  # [4H, P]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H]
    gain_ih: Tensor | None = None  # [4H]
    gain_hh: Tensor | None = None  # [4H]
    gain_c: Tensor | None = None  # [H]
    bias_c: Tensor | None = None  # [H]
    reset_h: Tensor | None = None  # [T, B, P] what steps that are reset begin with, by the time of the step
    reset_c: Tensor | None = None  # [T, B, H] float32; float64 with an x of float64
    dropout_h: Tensor | None = None  # [B, P] and below: its Noise
    zoneout_h: Tensor | None = None  # [T, B, P] or []
    zoneout_c: Tensor | None = None  # [T, B, H] or []
    lengths: Tensor | None = None  # [B]
    resets: Tensor | None = None  # [T, B]

    def weights(self) -> Weights:
        """Those of the layer."""
        return Weights(*self[3:13])

    def noise(self) -> Noise:
        """That of the call."""
        return Noise(*self[15:18])

    def traversal(self, reverse: bool) -> Traversal:
        """How the layer goes through the batch."""
        states = None if self.reset_h is None or self.reset_c is None else [(self.reset_h, self.reset_c)]
        return Traversal(self.lengths, self.resets, reverse, states)


DIFFERENTIABLE = 15
"""The first of Inputs, which have gradients."""


def inputs_of(
    x: Tensor,  # [T, B, I]
    state: tuple[Tensor, Tensor],  # ([B, P], [B, H])
    weights: Weights,
    traversal: Traversal,
    noise: Noise,
) -> Inputs:
    """The tensors of a layer, all in the dtype of x but for cell states."""
    lengths, resets, _, reset_states = traversal
    reset_h = reset_c = None
    if reset_states is not None:
        reset_h, reset_c = reset_states[0][0].to(x.dtype), reset_states[0][1]
        reset_c = reset_c if x.dtype is torch.float64 else reset_c.float()
    return Inputs(x, *state, *weights, reset_h, reset_c, *noise, lengths, resets)  # type: ignore[arg-type]


def forward(kernels: Any, given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """h [T, B, P], h_n [B, P], c_n [B, H] float32; gates [T, B, 4H], activated if `save`; c [T, B, H] float32, or None.

    `kernels` is the Layer of a backend, kernels/layer.py.
    """
    problem = kernels.problem
    gates = _pre_activations(given, problem.reverse)
    h, h_n, c_n, c = kernels.forward(gates, recurrence_of(given, problem.reverse, problem.precision), save)
    return h, h_n, c_n, gates, c


def recurrence_of(
    given: Inputs, reverse: bool, precision: str, of_hh: Unit = NO_UNIT, of_c: Unit = NO_UNIT
) -> Recurrence:
    """What the kernels are given."""
    _, h0, c0, _, weight_hh, _, _, weight_hr, weight_peephole, _, gain_hh, gain_c, bias_c, *others = given
    reset_h, reset_c, dropout_h, zoneout_h, zoneout_c, lengths, resets = others
    kept_h = None if zoneout_h is None else reset_h
    return Recurrence(
        weight_hh, h0, c0.float(), weight_hr, lengths, resets, dropout_h, zoneout_h, zoneout_c, kept_h, reset_c,
        weight_peephole, gain_hh, gain_c, bias_c, *of_hh, *of_c, reverse, precision,
    )  # fmt: skip


def _pre_activations(given: Inputs, reverse: bool) -> Tensor:
    """What the kernels are given, [T, B, 4H]: the input product and, where a step is reset, that of h as it is then.

    The latter are known beforehand, so that the time loop has h = 0 there.
    """
    z = _input_product(given)
    if given.reset_h is not None:
        taken = given.reset_h if given.dropout_h is None else given.dropout_h * given.reset_h
        _add_recurrent_product(z, _at_resets(taken, given.traversal(reverse)), given)
    return z


def _input_product(given: Inputs) -> Tensor:
    """The part of the pre-activations that does not depend on h: x W_ih^T + b_ih + b_hh, [T, B, 4H]."""
    bias = None if given.bias_ih is None or given.bias_hh is None else given.bias_ih + given.bias_hh
    if given.gain_ih is None:
        return F.linear(given.x, given.weight_ih, bias)
    return cell.linear(given.x, given.weight_ih, bias, given.gain_ih).contiguous()


def _add_recurrent_product(z: Tensor, taken: Tensor, given: Inputs) -> None:
    """z [T, B, 4H] += W_hh h, where W_hh is multiplied with h [T, B, P]; nothing where h is zero."""
    if given.gain_hh is None:
        z.flatten(0, 1).addmm_(taken.flatten(0, 1), given.weight_hh.T)
    else:
        z += cell.linear(taken, given.weight_hh, None, given.gain_hh)


def _at_resets(t: Tensor, traversal: Traversal) -> Tensor:
    """t [T, B, F], with zeros where no step is reset."""
    anew = traversal.begins_anew()
    assert anew is not None, "states to reset to come with resets"
    return torch.where(anew[:, :, None], t, 0)


class Saved(NamedTuple):
    """What backward reads: the inputs, and what forward left."""

    given: Inputs
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be recomputed
    c: Tensor  # [T, B, H] float32; zero in padding


def gradients(
    kernels: Any, saved: Saved, output_gradients: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of the first Inputs, those that are `needed`, from the gradients of h, h_n and c_n; None counts as zero."""
    given, need = saved.given, Inputs(*needed)  # type: ignore[arg-type]
    problem = kernels.problem
    traversal = given.traversal(problem.reverse)
    gates_were_dropped = saved.gates.dim() < saved.c.dim()  # not fewer elements: a batch of none has none
    h_prev = gates = saved.gates
    if gates_were_dropped or need.weight_hh or given.gain_hh is not None:
        h_prev = _multiplied_by_weight_hh(saved, traversal)
    if gates_were_dropped:
        gates = _recomputed_gates(saved, h_prev, traversal)
    of_hh = of_c = NO_UNIT
    if given.gain_hh is not None:
        of_hh = layer_norm.unit_of(h_prev @ given.weight_hh.T)
    if given.gain_c is not None:
        of_c = layer_norm.unit_of(_cell_after(saved, gates, traversal))
    dh, dh_n, dc_n = output_gradients
    r = recurrence_of(given, problem.reverse, problem.precision, of_hh, of_c)
    d = kernels.backward(dh, dh_n, None if dc_n is None else dc_n.float(), gates, saved.c, r, need.h0)
    dgates = d.dgates  # zero in padding, but zero times the NaN that may stand there is not

    found: dict[str, Tensor | None] = dict.fromkeys(Inputs._fields[:DIFFERENTIABLE])
    of_x, of_h = dgates, dgates  # [T, B, 4H] gradients of x W_ih^T and h W_hh^T
    if given.gain_ih is not None and (need.x or need.weight_ih or need.gain_ih):
        unit_ih = layer_norm.unit_of(_without_padding(given.x, given.lengths) @ given.weight_ih.T)
        of_x, found["gain_ih"] = _through_norm(dgates, given.gain_ih, unit_ih)
    if given.gain_hh is not None and (need.weight_hh or need.gain_hh or need.reset_h):
        of_h, found["gain_hh"] = _through_norm(dgates, given.gain_hh, of_hh)
    if given.gain_c is not None and (need.gain_c or need.bias_c):
        found["gain_c"], dbias_c = _gradients_of_norm_of_c(saved, given.gain_c, gates, of_c.unit, d.dh_total)
        found["bias_c"] = dbias_c if need.bias_c else None
    if need.x:
        found["x"] = of_x @ given.weight_ih
    if need.h0:
        found["h0"] = d.dh0
    if need.c0:
        found["c0"] = d.dc0.to(given.c0.dtype)
    rows_of_x = of_x.flatten(0, 1)  # [T*B, 4H]
    rows_of_h = rows_of_x if of_h is of_x else of_h.flatten(0, 1)
    if need.weight_ih:
        found["weight_ih"] = rows_of_x.T @ _without_padding(given.x, given.lengths).flatten(0, 1)
    if need.weight_hh:
        found["weight_hh"] = rows_of_h.T @ h_prev.flatten(0, 1)
    if need.bias_ih or need.bias_hh:
        dbias = dgates.sum((0, 1))
        found["bias_ih"], found["bias_hh"] = (dbias if needs else None for needs in (need.bias_ih, need.bias_hh))
    if need.weight_hr:
        m = cell.output(gates.chunk(4, dim=2)[3], _cell_after(saved, gates, traversal), None, None)  # [T, B, H]
        found["weight_hr"] = d.dh_total.flatten(0, 1).T @ _without_padding(m, given.lengths).flatten(0, 1)
    if need.weight_peephole:
        found["weight_peephole"] = _gradient_of_peepholes(saved, dgates, gates, traversal)
    if need.reset_h:
        found["reset_h"] = _gradient_of_reset_h(given, _at_resets(of_h, traversal), d.dreset_h)
    if need.reset_c:
        found["reset_c"] = d.dreset_c
    return list(found.values())


def _gradient_of_reset_h(given: Inputs, of_h: Tensor, from_zoneout: Tensor | None) -> Tensor:
    """[T, B, P], from of_h [T, B, 4H], zero but at resets, and float32 [T, B, P]."""
    dreset_h = of_h @ given.weight_hh
    if given.dropout_h is not None:
        dreset_h = given.dropout_h * dreset_h
    return dreset_h if from_zoneout is None else dreset_h + from_zoneout.to(dreset_h.dtype)


def _multiplied_by_weight_hh(saved: Saved, traversal: Traversal) -> Tensor:
    """The hidden states [T, B, P] that each step's recurrent product had; anything finite in padding."""
    h_prev = traversal.states_before(saved.h, saved.given.h0, saved.given.reset_h)
    return h_prev if saved.given.dropout_h is None else saved.given.dropout_h * h_prev


def _cell_before(saved: Saved, traversal: Traversal) -> Tensor:
    """The cell states [T, B, H] that each step began with, float32; anything finite in padding."""
    return traversal.states_before(saved.c, saved.given.c0.float(), saved.given.reset_c)


def _recomputed_gates(saved: Saved, h_prev: Tensor, traversal: Traversal) -> Tensor:
    """The activated gates [T, B, 4H]: all h are known by now, so that one product does for all steps."""
    z = _input_product(saved.given)
    _add_recurrent_product(z, h_prev, saved.given)
    if saved.given.weight_peephole is None:
        return cell.activate_in_place(z)
    return cell.activate_with_peepholes_in_place(z, _cell_before(saved, traversal), saved.given.weight_peephole)


def _cell_after(saved: Saved, gates: Tensor, traversal: Traversal) -> Tensor:
    """c as each step computed it, before zoneout, [T, B, H] float32; anything in padding."""
    if saved.given.zoneout_c is None:
        return saved.c
    i, f, g, _ = gates.chunk(4, dim=2)
    return cell.next_cell(i, f, g, _cell_before(saved, traversal))


def _gradient_of_peepholes(saved: Saved, dgates: Tensor, gates: Tensor, traversal: Traversal) -> Tensor:
    """[3H]: the gradients of z_i and z_f times the c before each step, of z_o times the c after it, over all steps."""
    dz_i, dz_f, _, dz_o = dgates.chunk(4, dim=2)
    before = _cell_before(saved, traversal)
    after = _without_padding(_cell_after(saved, gates, traversal), saved.given.lengths)
    sums = [(dz * c).sum((0, 1)) for dz, c in ((dz_i, before), (dz_f, before), (dz_o, after))]
    return torch.cat(sums).to(dgates.dtype)


def _through_norm(d: Tensor, gain: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Gradient d [T, B, N] of a layer norm's result -> (of what was normalised, of the gain [N])."""
    return layer_norm.gradient(d, gain, *unit), (d * unit.unit).sum((0, 1))


def _gradients_of_norm_of_c(
    saved: Saved, gain: Tensor, gates: Tensor, unit: Tensor, dm: Tensor
) -> tuple[Tensor, Tensor]:
    """Of its gain and bias [H]; from unit [T, B, H] float32, and dm [T, B, H], the gradient of m = o tanh(LN(c))."""
    seen = unit * gain if saved.given.bias_c is None else unit * gain + saved.given.bias_c
    d_seen = dm * gates.chunk(4, dim=2)[3] * (1 - seen.tanh().square())
    dgain, dbias = (_without_padding(t, saved.given.lengths).sum((0, 1)) for t in (d_seen * unit, d_seen))
    return dgain.to(dm.dtype), dbias.to(dm.dtype)


def _without_padding(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t [T, B, F] with zeros past the end of each sequence."""
    valid = valid_steps(t.shape[0], lengths)
    return t if valid is None else torch.where(valid[:, :, None], t, 0)
