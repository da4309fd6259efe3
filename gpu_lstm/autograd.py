"""Derivatives of one layer in one direction on a backend with kernels: what is saved, backward, double backward.

The kernels do only the recurrence. The input product and every weight gradient are products over all steps at
once, outside the time loop.
"""

import inspect
from typing import NamedTuple

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


def pre_activations(
    x: Tensor,  # [T, B, I]
    weights: Weights,
    traversal: Traversal,
    reset_h: Tensor | None,  # [T, B, P]
    dropout_h: Tensor | None,  # [B, P]
) -> Tensor:
    """What the kernels are given, [T, B, 4H]: the input product and, where a step is reset, that of h as it is then.

    The latter are known beforehand, so that the time loop takes h = 0 there.
    """
    z = input_product(x, weights)
    if reset_h is not None:
        taken = _at_resets(reset_h if dropout_h is None else dropout_h * reset_h, traversal)
        add_recurrent_product(z, taken, weights)
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
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        weight_peephole: Tensor | None,
        gain_ih: Tensor | None,
        gain_hh: Tensor | None,
        gain_c: Tensor | None,
        bias_c: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        dropout_h: Tensor | None,
        zoneout_h: Tensor | None,
        zoneout_c: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
        backend: str,
        recompute: bool,
        side_by_side: int,
    ) -> tuple[Tensor, ...]:
        weights = Weights(
            weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, gain_ih, gain_hh, gain_c, bias_c
        )
        gates = pre_activations(x, weights, Traversal(lengths, resets, reverse), reset_h, dropout_h)
        h, h_n, c_n, c = ops.layer_forward(
            gates, weight_hh, weight_hr, h0, c0.float(), lengths, resets, reverse, True, backend,
            weights.norms(), dropout_h, zoneout_h, zoneout_c, side_by_side,
            None if zoneout_h is None else reset_h, reset_c, weight_peephole,
        )  # fmt: skip
        return h, h_n, c_n.to(c0.dtype), gates.new_empty(0) if recompute else gates, c

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *tensors, reverse, backend, _, side_by_side = inputs
        h, _, _, gates, c = output
        ctx.mark_non_differentiable(gates, c)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, h, gates, c)
        ctx.reverse, ctx.backend, ctx.side_by_side, ctx.inputs = reverse, backend, side_by_side, len(inputs)

    @staticmethod
    def backward(ctx, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
        saved = Saved(*ctx.saved_tensors)
        if gradients_are_differentiated(saved.h, [*saved, dh, dh_n, dc_n]):
            gradients = _differentiable_gradients(ctx, Saved(*map(alive, saved)), (dh, dh_n, dc_n))  # type: ignore[arg-type]
        else:
            with torch.no_grad():
                gradients = _fused_gradients(ctx, saved, dh, dh_n, dc_n)
        return *gradients, *(None,) * (ctx.inputs - DIFFERENTIABLE)


# At every call torch binds the arguments to forward's signature, for defaults that it has not: a fast one will do.
LSTMLayerFunction.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]
)


def _traversal(
    lengths: Tensor | None, resets: Tensor | None, reverse: bool, reset_h: Tensor | None, reset_c: Tensor | None
) -> Traversal:
    states = None if reset_h is None or reset_c is None else [(reset_h, reset_c)]
    return Traversal(lengths, resets, reverse, states)


class Saved(NamedTuple):
    """What backward reads: the inputs, and what forward left."""

    x: Tensor  # [T, B, I]
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H]
    weight_ih: Tensor  # [4H, I]
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
    dropout_h: Tensor | None  # [B, P]
    zoneout_h: Tensor | None  # [T, B, P] or []
    zoneout_c: Tensor | None  # [T, B, H] or []
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B]
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be taken again
    c: Tensor  # [T, B, H] float32; zero in padding

    def weights(self) -> Weights:
        return Weights(*self[3 : DIFFERENTIABLE - 2])  # type: ignore[arg-type]

    def noise(self) -> Noise:
        return Noise(self.dropout_h, self.zoneout_h, self.zoneout_c)

    def traversal(self, reverse: bool) -> Traversal:
        return _traversal(self.lengths, self.resets, reverse, self.reset_h, self.reset_c)


def _fused_gradients(
    ctx,
    saved: Saved,
    dh: Tensor | None,  # [T, B, P]
    dh_n: Tensor | None,  # [B, P]
    dc_n: Tensor | None,  # [B, H]
) -> Gradients:
    """By the kernels; None where none is needed."""
    need = Gradients(*ctx.needs_input_grad[:DIFFERENTIABLE])
    traversal = saved.traversal(ctx.reverse)
    gates_were_dropped = saved.gates.dim() < saved.c.dim()  # not fewer elements: a batch of none has none
    h_prev = gates = saved.gates
    if gates_were_dropped or need.weight_hh or saved.gain_hh is not None:
        h_prev = _taken_by_weight_hh(saved, traversal)
    if gates_were_dropped:
        gates = _gates_again(saved, h_prev, traversal)
    norms, of_hh, of_c = saved.weights().norms(), NO_UNIT, NO_UNIT
    if saved.gain_hh is not None:
        of_hh = layer_norm.unit_of(h_prev @ saved.weight_hh.T)
    if saved.gain_c is not None:
        of_c = layer_norm.unit_of(_cell_after(saved, gates, traversal))
    if norms:
        norms = [*norms, *of_hh, *of_c]
    kept_h = None if saved.zoneout_h is None else saved.reset_h
    dgates, dh0, dc0, dh_total, dkept_h, dreset_c = ops.layer_backward(
        dh, dh_n, None if dc_n is None else dc_n.float(), gates, saved.c, saved.weight_hh, saved.weight_hr,
        saved.h0, saved.c0.float(), saved.lengths, saved.resets, ctx.reverse, ctx.backend, norms, *saved.noise(),
        ctx.side_by_side, kept_h, saved.reset_c, saved.weight_peephole,
    )  # fmt: skip

    # dgates are zero in padding, but zero times the NaN that may stand there is not.
    dweight_ih = dweight_hh = dweight_hr = dweight_peephole = dbias = dreset_h = None
    dgain_ih = dgain_hh = dgain_c = dbias_c = None
    of_x, of_h = dgates, dgates  # [T, B, 4H] gradients of x W_ih^T and h W_hh^T
    if saved.gain_ih is not None:
        unit_ih = layer_norm.unit_of(_without_padding(saved.x, saved.lengths) @ saved.weight_ih.T)
        of_x, dgain_ih = _through_norm(dgates, saved.gain_ih, unit_ih)
    if saved.gain_hh is not None:
        of_h, dgain_hh = _through_norm(dgates, saved.gain_hh, of_hh)
    if saved.gain_c is not None:
        dgain_c, dbias_c = _gradients_of_norm_of_c(saved, saved.gain_c, gates, of_c.unit, dh_total)
    if need.weight_ih:
        dweight_ih = of_x.flatten(0, 1).T @ _without_padding(saved.x, saved.lengths).flatten(0, 1)
    if need.weight_hh:
        dweight_hh = of_h.flatten(0, 1).T @ h_prev.flatten(0, 1)
    if need.bias_ih or need.bias_hh:
        dbias = dgates.sum((0, 1))
    if need.weight_hr:
        m = _without_padding(_outputs_again(saved, gates, traversal), saved.lengths)
        dweight_hr = dh_total.flatten(0, 1).T @ m.flatten(0, 1)
    if need.weight_peephole:
        dweight_peephole = _gradient_of_peepholes(saved, dgates, gates, traversal)
    if need.reset_h:
        dreset_h = _at_resets(of_h, traversal) @ saved.weight_hh
        if saved.dropout_h is not None:
            dreset_h = saved.dropout_h * dreset_h
        if kept_h is not None:
            dreset_h = dreset_h + dkept_h.to(dreset_h.dtype)
    return Gradients(
        x=of_x @ saved.weight_ih if need.x else None,
        h0=dh0 if need.h0 else None,
        c0=dc0.to(saved.c0.dtype) if need.c0 else None,
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
    h_prev = traversal.states_before(saved.h, saved.h0, saved.reset_h)
    return h_prev if saved.dropout_h is None else saved.dropout_h * h_prev


def _cell_before(saved: Saved, traversal: Traversal) -> Tensor:
    """The cell states [T, B, H] that each step began with, float32; anything finite in padding."""
    return traversal.states_before(saved.c, saved.c0.float(), saved.reset_c)


def _gates_again(saved: Saved, h_prev: Tensor, traversal: Traversal) -> Tensor:
    """The activated gates [T, B, 4H] once more: all h are known by now, so that one product does for all steps."""
    z = input_product(saved.x, saved.weights())
    add_recurrent_product(z, h_prev, saved.weights())
    if saved.weight_peephole is None:
        return cell.activate_in_place(z)
    return cell.activate_with_peepholes_in_place(z, _cell_before(saved, traversal), saved.weight_peephole)


def _outputs_again(saved: Saved, gates: Tensor, traversal: Traversal) -> Tensor:
    """What W_hr took: m of every step, [T, B, H]; anything in padding."""
    return cell.output(gates.chunk(4, dim=2)[3], _cell_after(saved, gates, traversal), None, None)


def _cell_after(saved: Saved, gates: Tensor, traversal: Traversal) -> Tensor:
    """c as each step computed it, before zoneout, [T, B, H] float32; anything in padding."""
    if saved.zoneout_c is None:
        return saved.c
    i, f, g, _ = gates.chunk(4, dim=2)
    return cell.next_cell(i, f, g, _cell_before(saved, traversal))


def _gradient_of_peepholes(saved: Saved, dgates: Tensor, gates: Tensor, traversal: Traversal) -> Tensor:
    """[3H]: the gradients of z_i and z_f times the c before each step, of z_o times the c after it, over all steps."""
    dz_i, dz_f, _, dz_o = dgates.chunk(4, dim=2)
    before = _cell_before(saved, traversal)
    after = _without_padding(_cell_after(saved, gates, traversal), saved.lengths)
    sums = [(dz * c).sum((0, 1)) for dz, c in ((dz_i, before), (dz_f, before), (dz_o, after))]
    return torch.cat(sums).to(dgates.dtype)


def _through_norm(d: Tensor, gain: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Gradient d [T, B, N] of a layer norm's result -> (of what was normalised, of the gain [N])."""
    return layer_norm.gradient(d, gain, *unit), (d * unit.unit).sum((0, 1))


def _gradients_of_norm_of_c(
    saved: Saved, gain: Tensor, gates: Tensor, unit: Tensor, dm: Tensor
) -> tuple[Tensor, Tensor]:
    """Of its gain and bias [H]; from unit [T, B, H] float32, and dm [T, B, H], the gradient of m = o tanh(LN(c))."""
    seen = unit * gain if saved.bias_c is None else unit * gain + saved.bias_c
    d_seen = _without_padding(dm * gates.chunk(4, dim=2)[3] * (1 - seen.tanh().square()), saved.lengths)
    return ((d_seen * unit).sum((0, 1)).to(dm.dtype), d_seen.sum((0, 1)).to(dm.dtype))


def _without_padding(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t [T, B, F] with zeros past the end of each sequence."""
    valid = valid_steps(t.shape[0], lengths)
    return t if valid is None else torch.where(valid[:, :, None], t, 0)


def _differentiable_gradients(ctx, saved: Saved, output_gradients: tuple[Tensor | None, ...]) -> Gradients:
    """The same gradients, themselves differentiable: the layer is taken again through reference.py."""
    needed = [k for k, need in enumerate(ctx.needs_input_grad[:DIFFERENTIABLE]) if need]
    given = [k for k, gradient in enumerate(output_gradients) if gradient is not None]

    def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs: list[Tensor | None] = list(saved[:DIFFERENTIABLE])
        for k, tensor in zip(needed, tensors):
            inputs[k] = tensor
        x, h0, c0, *weights, reset_h, reset_c = inputs
        traversal = _traversal(saved.lengths, saved.resets, ctx.reverse, reset_h, reset_c)
        h, state = reference.layer(x, (h0, c0), Weights(*weights), traversal, saved.noise())  # type: ignore[arg-type]
        outputs = h, *state
        return tuple(outputs[k] for k in given)

    # torch.func.vjp, not autograd.grad: inputs may be one tensor or depend on each other, and be those of a transform.
    _, pull = torch.func.vjp(layer, *(saved[k] for k in needed))[:2]
    gradients = dict(zip(needed, pull(tuple(output_gradients[k] for k in given))))
    return Gradients(*(gradients.get(k) for k in range(DIFFERENTIABLE)))
