"""Derivatives of one layer in one direction on a backend with kernels: what is saved, backward, double backward.

The kernels do only the recurrence. The input product and every weight gradient are products over all steps at
once, outside the time loop.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cell, ops, reference
from .kernels import layer_norm  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from .kernels.layer_norm import NO_UNIT, Unit  # type: ignore[import-not-found]
from .noise import Noise
from .sequences import Traversal, valid_steps
from .transforms import alive, gradients_are_differentiated
from .weights import Weights


def input_product(x: Tensor, weights: Weights) -> Tensor:
    """The part of the pre-activations that does not depend on h: x W_ih^T + b_ih + b_hh, [T, B, 4H]."""
    bias = None if weights.bias_ih is None or weights.bias_hh is None else weights.bias_ih + weights.bias_hh
    return cell.linear(x, weights.weight_ih, bias, weights.gain_ih).contiguous()


def pre_activations(given: "Inputs", traversal: Traversal) -> Tensor:
    """What the kernels are given, [T, B, 4H]: the input product and, where a step is reset, that of h as it is then.

    The latter are known beforehand, so that the time loop takes h = 0 there.
    """
    z = input_product(given.x, given.weights())
    if given.reset_h is not None:
        taken = given.reset_h if given.dropout_h is None else given.dropout_h * given.reset_h
        add_recurrent_product(z, _at_resets(taken, traversal), given.weights())
    return z


def add_recurrent_product(z: Tensor, taken: Tensor, weights: Weights) -> None:
    """z [T, B, 4H] += W_hh h, where W_hh takes h [T, B, P]; nothing where h is zero."""
    if weights.gain_hh is None:
        z.flatten(0, 1).addmm_(taken.flatten(0, 1), weights.weight_hh.T)
    else:
        z += cell.linear(taken, weights.weight_hh, None, weights.gain_hh)


def _at_resets(t: Tensor, traversal: Traversal) -> Tensor:
    """t [T, B, F], with zeros where no step is reset."""
    anew = traversal.begins_anew()
    assert anew is not None, "states to reset to come with resets"
    return torch.where(anew[:, :, None], t, 0)


class Inputs(NamedTuple):
    """The tensors that a layer is given, first those of `Gradients`."""

    x: Tensor  # [T, B, I]
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H]
    weight_ih: Tensor  # [4H, I] and below: a layer's Weights
    weight_hh: Tensor  # [4H, P]
    bias_ih: Tensor | None  # [4H]
    bias_hh: Tensor | None  # [4H]
    weight_hr: Tensor | None  # [P, H]
    weight_peephole: Tensor | None  # [3H]
    gain_ih: Tensor | None  # [4H]
    gain_hh: Tensor | None  # [4H]
    gain_c: Tensor | None  # [H]
    bias_c: Tensor | None  # [H]
    reset_h: Tensor | None  # [T, B, P] what steps that are reset begin with, by the time of the step
    reset_c: Tensor | None  # [T, B, H] float32
    dropout_h: Tensor | None  # [B, P] and below: its Noise
    zoneout_h: Tensor | None  # [T, B, P] or []
    zoneout_c: Tensor | None  # [T, B, H] or []
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B]

    # By every field, since torch 2.8 traces no slice of them.

    def weights(self) -> Weights:
        """Those of the layer."""
        return Weights(
            self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr, self.weight_peephole,
            self.gain_ih, self.gain_hh, self.gain_c, self.bias_c,
        )  # fmt: skip

    def noise(self) -> Noise:
        """That of the call."""
        return Noise(self.dropout_h, self.zoneout_h, self.zoneout_c)

    def traversal(self, reverse: bool) -> Traversal:
        """How the layer goes through the batch."""
        states = None if self.reset_h is None or self.reset_c is None else [(self.reset_h, self.reset_c)]
        return Traversal(self.lengths, self.resets, reverse, states)

    def recurrence(self, *units: Tensor | None) -> ops.Flat:
        """What operators are given of it; `units` are the last of Norms."""
        kept_h = None if self.zoneout_h is None else self.reset_h
        return ops.flat([
            self.weight_hh, self.weight_hr, self.weight_peephole, self.h0, self.c0.float(), self.lengths, self.resets,
            self.dropout_h, self.zoneout_h, self.zoneout_c, kept_h, self.reset_c,
            self.gain_hh, self.gain_c, self.bias_c, *units,
        ])  # fmt: skip


def run(given: Inputs, reverse: bool, side_by_side: int, backend: str, *, save: bool) -> tuple[Tensor, ...]:
    """The recurrence by a backend's kernels: gates [T, B, 4H], activated if `save`, h, h_n, c_n and c of ops.py."""
    gates = pre_activations(given, given.traversal(reverse))
    return gates, *ops.layer_forward(gates, *given.recurrence(), reverse, side_by_side, backend, save)


class Gradients(NamedTuple):
    """Something for each differentiable input of a layer, in the order of LSTMLayerFunction.forward."""

    x: Tensor | None  # [T, B, I]
    h0: Tensor | None  # [B, P]
    c0: Tensor | None  # [B, H]
    weight_ih: Tensor | None  # [4H, I]
    weight_hh: Tensor | None  # [4H, P]
    bias_ih: Tensor | None  # [4H]
    bias_hh: Tensor | None  # [4H]
    weight_hr: Tensor | None  # [P, H]
    weight_peephole: Tensor | None  # [3H]
    gain_ih: Tensor | None  # [4H]
    gain_hh: Tensor | None  # [4H]
    gain_c: Tensor | None  # [H]
    bias_c: Tensor | None  # [H]
    reset_h: Tensor | None  # [T, B, P]
    reset_c: Tensor | None  # [T, B, H]


DIFFERENTIABLE = len(Gradients._fields)


class LSTMLayerFunction(torch.autograd.Function):
    """Forward saves the activated gates (over the input product) and the cell states; backward reads them.

    A gradient of a gradient goes through reference.py, which is differentiable to any order.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Those of `run`, one after another, and whether the gates are to be taken again."""
        *tensors, reverse, side_by_side, backend, recompute = arguments
        given = Inputs(*tensors)
        gates, h, h_n, c_n, c = run(given, reverse, side_by_side, backend, save=True)
        return h, h_n, c_n.to(given.c0.dtype), gates.new_empty(0) if recompute else gates, c

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.reverse, ctx.side_by_side, ctx.backend, _ = inputs
        h, _, _, gates, c = output
        ctx.mark_non_differentiable(gates, c)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, h, gates, c)
        ctx.inputs = len(inputs)

    @staticmethod
    def backward(ctx, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
        *tensors, h, gates, c = ctx.saved_tensors
        if gradients_are_differentiated(h, [*tensors, h, gates, c, dh, dh_n, dc_n]):
            gradients = _differentiable_gradients(ctx, Inputs(*map(alive, tensors)), (dh, dh_n, dc_n))  # type: ignore[arg-type]
        else:
            with torch.no_grad():
                gradients = _fused_gradients(ctx, Saved(Inputs(*tensors), h, gates, c), [dh, dh_n, dc_n])
        return *gradients, *(None,) * (ctx.inputs - DIFFERENTIABLE)


class Saved(NamedTuple):
    """What backward reads: the inputs, and what forward left."""

    given: Inputs
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be taken again
    c: Tensor  # [T, B, H] float32; zero in padding


def _fused_gradients(ctx, saved: Saved, output_gradients: list[Tensor | None]) -> Gradients:
    """By the kernels; None where none is needed."""
    need, given = Gradients(*ctx.needs_input_grad[:DIFFERENTIABLE]), saved.given
    traversal = given.traversal(ctx.reverse)
    gates_were_dropped = saved.gates.dim() < saved.c.dim()  # not fewer elements: a batch of none has none
    h_prev = gates = saved.gates
    if gates_were_dropped or need.weight_hh or given.gain_hh is not None:
        h_prev = _taken_by_weight_hh(saved, traversal)
    if gates_were_dropped:
        gates = _gates_again(saved, h_prev, traversal)
    of_hh = of_c = NO_UNIT
    if given.gain_hh is not None:
        of_hh = layer_norm.unit_of(h_prev @ given.weight_hh.T)
    if given.gain_c is not None:
        of_c = layer_norm.unit_of(_cell_after(saved, gates, traversal))
    dh, dh_n, dc_n = output_gradients
    dgates, dh0, dc0, dh_total, dkept_h, dreset_c = ops.layer_backward(
        [dh, dh_n, None if dc_n is None else dc_n.float()], gates, saved.c, *given.recurrence(*of_hh, *of_c),
        ctx.reverse, ctx.side_by_side, ctx.backend,
    )  # fmt: skip

    # dgates are zero in padding, but zero times the NaN that may stand there is not.
    dweight_ih = dweight_hh = dweight_hr = dweight_peephole = dbias = dreset_h = None
    dgain_ih = dgain_hh = dgain_c = dbias_c = None
    of_x, of_h = dgates, dgates  # [T, B, 4H] gradients of x W_ih^T and h W_hh^T
    if given.gain_ih is not None and (need.x or need.weight_ih or need.gain_ih):
        unit_ih = layer_norm.unit_of(_without_padding(given.x, given.lengths) @ given.weight_ih.T)
        of_x, dgain_ih = _through_norm(dgates, given.gain_ih, unit_ih)
    if given.gain_hh is not None and (need.weight_hh or need.gain_hh or need.reset_h):
        of_h, dgain_hh = _through_norm(dgates, given.gain_hh, of_hh)
    if given.gain_c is not None and (need.gain_c or need.bias_c):
        dgain_c, dbias_c = _gradients_of_norm_of_c(saved, given.gain_c, gates, of_c.unit, dh_total)
    if need.weight_ih:
        dweight_ih = of_x.flatten(0, 1).T @ _without_padding(given.x, given.lengths).flatten(0, 1)
    if need.weight_hh:
        dweight_hh = of_h.flatten(0, 1).T @ h_prev.flatten(0, 1)
    if need.bias_ih or need.bias_hh:
        dbias = dgates.sum((0, 1))
    if need.weight_hr:
        m = _without_padding(_outputs_again(saved, gates, traversal), given.lengths)
        dweight_hr = dh_total.flatten(0, 1).T @ m.flatten(0, 1)
    if need.weight_peephole:
        dweight_peephole = _gradient_of_peepholes(saved, dgates, gates, traversal)
    if need.reset_h:
        dreset_h = _at_resets(of_h, traversal) @ given.weight_hh
        if given.dropout_h is not None:
            dreset_h = given.dropout_h * dreset_h
        if given.zoneout_h is not None:
            dreset_h = dreset_h + dkept_h.to(dreset_h.dtype)
    return Gradients(
        x=of_x @ given.weight_ih if need.x else None,
        h0=dh0 if need.h0 else None,
        c0=dc0.to(given.c0.dtype) if need.c0 else None,
        weight_ih=dweight_ih,
        weight_hh=dweight_hh,
        bias_ih=dbias if need.bias_ih else None,
        bias_hh=dbias if need.bias_hh else None,
        weight_hr=dweight_hr,
        weight_peephole=dweight_peephole,
        gain_ih=dgain_ih,
        gain_hh=dgain_hh,
        gain_c=dgain_c,
        bias_c=dbias_c if need.bias_c else None,
        reset_h=dreset_h,
        reset_c=dreset_c if need.reset_c else None,
    )


def _taken_by_weight_hh(saved: Saved, traversal: Traversal) -> Tensor:
    """The hidden states [T, B, P] that each step's recurrent product took; anything finite in padding."""
    h_prev = traversal.states_before(saved.h, saved.given.h0, saved.given.reset_h)
    return h_prev if saved.given.dropout_h is None else saved.given.dropout_h * h_prev


def _cell_before(saved: Saved, traversal: Traversal) -> Tensor:
    """The cell states [T, B, H] that each step began with, float32; anything finite in padding."""
    return traversal.states_before(saved.c, saved.given.c0.float(), saved.given.reset_c)


def _gates_again(saved: Saved, h_prev: Tensor, traversal: Traversal) -> Tensor:
    """The activated gates [T, B, 4H] once more: all h are known by now, so that one product does for all steps."""
    z = input_product(saved.given.x, saved.given.weights())
    add_recurrent_product(z, h_prev, saved.given.weights())
    if saved.given.weight_peephole is None:
        return cell.activate_in_place(z)
    return cell.activate_with_peepholes_in_place(z, _cell_before(saved, traversal), saved.given.weight_peephole)


def _outputs_again(saved: Saved, gates: Tensor, traversal: Traversal) -> Tensor:
    """What W_hr took: m of every step, [T, B, H]; anything in padding."""
    return cell.output(gates.chunk(4, dim=2)[3], _cell_after(saved, gates, traversal), None, None)


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


def _differentiable_gradients(ctx, given: Inputs, output_gradients: tuple[Tensor | None, ...]) -> Gradients:
    """The same gradients, themselves differentiable: the layer is taken again through reference.py."""
    needed = [k for k, need in enumerate(ctx.needs_input_grad[:DIFFERENTIABLE]) if need]
    there = [k for k, gradient in enumerate(output_gradients) if gradient is not None]

    def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs: list[Any] = list(given)
        for k, tensor in zip(needed, tensors):
            inputs[k] = tensor
        anew = Inputs(*inputs)
        h, state = reference.layer(
            anew.x, (anew.h0, anew.c0), anew.weights(), anew.traversal(ctx.reverse), anew.noise()
        )
        outputs = h, *state
        return tuple(outputs[k] for k in there)

    # torch.func.vjp, not autograd.grad: inputs may be one tensor or depend on each other, and be those of a transform.
    _, pull = torch.func.vjp(layer, *(given[k] for k in needed))[:2]
    gradients = dict(zip(needed, pull(tuple(output_gradients[k] for k in there))))
    return Gradients(*(gradients.get(k) for k in range(DIFFERENTIABLE)))
