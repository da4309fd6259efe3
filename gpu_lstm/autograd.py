"""One layer in one direction on a backend with kernels of its own: what is saved, backward, double backward.

The kernels do only the recurrence. The input product and every weight gradient are products over all steps at
once, outside the time loop.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, reference
from .noise import NO_NOISE, Noise
from .sequences import states_before, valid_steps
from .transforms import gradients_are_differentiated


def lstm_layer(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, P]
    c0: Tensor,  # [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, P]
    bias_ih: Tensor | None,  # [4H]
    bias_hh: Tensor | None,  # [4H]
    weight_hr: Tensor | None,  # [P, H]
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B]
    reverse: bool,
    backend: str,
    recompute: bool = False,
    noise: Noise = NO_NOISE,
) -> tuple[Tensor, Tensor, Tensor]:
    """h [T, B, P], h_n [B, P] and c_n [B, H] in the dtype of c0, differentiable to any order.

    For backward the activated gates are kept, [T, B, 4H]; with `recompute` they are taken again from x and h.
    """
    tensors = (x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    # Asked here, since autograd is off inside Function.forward.
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not save:
        gates = _input_product(x, weight_ih, bias_ih, bias_hh)
        h, h_n, c_n, _ = ops.layer_forward(
            gates, weight_hh, weight_hr, h0, c0.float(), lengths, resets, reverse, False, backend, *noise
        )
        return h, h_n, c_n.to(c0.dtype)
    return LSTMLayerFunction.apply(*tensors, lengths, resets, *noise, reverse, backend, recompute)[:3]


def _input_product(x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor:
    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
    return F.linear(x, weight_ih, bias).contiguous()  # [T, B, 4H]


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
        lengths: Tensor | None,
        resets: Tensor | None,
        mask_h: Tensor | None,
        zone_h: Tensor | None,
        zone_c: Tensor | None,
        reverse: bool,
        backend: str,
        recompute: bool,
    ) -> tuple[Tensor, ...]:
        gates = _input_product(x, weight_ih, bias_ih, bias_hh)
        h, h_n, c_n, c = ops.layer_forward(
            gates, weight_hh, weight_hr, h0, c0.float(), lengths, resets, reverse, True, backend,
            mask_h, zone_h, zone_c,
        )  # fmt: skip
        return h, h_n, c_n.to(c0.dtype), gates.new_empty(0) if recompute else gates, c

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *tensors, reverse, backend, _ = inputs
        h, _, _, gates, c = output
        ctx.mark_non_differentiable(gates, c)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, h, gates, c)
        ctx.reverse, ctx.backend = reverse, backend

    @staticmethod
    def backward(ctx, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
        saved = Saved(*ctx.saved_tensors)
        if gradients_are_differentiated([*saved, dh, dh_n, dc_n]):
            gradients = _differentiable_gradients(ctx, saved, (dh, dh_n, dc_n))
        else:
            with torch.no_grad():
                gradients = _fused_gradients(ctx, saved, dh, dh_n, dc_n)
        return *gradients, *(None,) * 8


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
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B]
    mask_h: Tensor | None  # [B, P]
    zone_h: Tensor | None  # [T, B, P] or []
    zone_c: Tensor | None  # [T, B, H] or []
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H] activated, anything in padding; empty if they are to be taken again
    c: Tensor  # [T, B, H] float32; zero in padding

    @property
    def noise(self) -> Noise:
        return Noise(self.mask_h, self.zone_h, self.zone_c)


def _fused_gradients(
    ctx,
    saved: Saved,
    dh: Tensor | None,  # [T, B, P]
    dh_n: Tensor | None,  # [B, P]
    dc_n: Tensor | None,  # [B, H]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; None where none is needed."""
    need_x, need_h0, need_c0, need_ih, need_hh, need_bias_ih, need_bias_hh, need_hr = ctx.needs_input_grad[:8]
    again = saved.gates.numel() < saved.c.numel()
    h_prev = gates = saved.gates
    if again or need_hh:
        h_prev = _taken_by_weight_hh(saved, ctx.reverse)
    if again:
        gates = _gates_again(saved, h_prev)
    dgates, dh0, dc0, dh_total = ops.layer_backward(
        dh, dh_n, None if dc_n is None else dc_n.float(), gates, saved.c, saved.weight_hh, saved.weight_hr,
        saved.h0, saved.c0.float(), saved.lengths, saved.resets, ctx.reverse, ctx.backend, *saved.noise,
    )  # fmt: skip
    over_steps = dgates.flatten(0, 1)  # [TB, 4H]; zero in padding, but zero times the NaN that may stand there is not

    dweight_ih = dweight_hh = dweight_hr = dbias = None
    if need_ih:
        dweight_ih = over_steps.T @ _without_padding(saved.x, saved.lengths).flatten(0, 1)
    if need_hh:
        dweight_hh = over_steps.T @ h_prev.flatten(0, 1)
    if need_bias_ih or need_bias_hh:
        dbias = over_steps.sum(0)
    if need_hr:
        output_gate = gates[:, :, -saved.c.shape[2] :]
        c = saved.c if saved.zone_c is None else _cells_before_zoneout(saved, gates, ctx.reverse)
        m = _without_padding(output_gate * c.tanh().to(output_gate.dtype), saved.lengths)  # [T, B, H]
        dweight_hr = dh_total.flatten(0, 1).T @ m.flatten(0, 1)
    return (
        dgates @ saved.weight_ih if need_x else None,
        dh0 if need_h0 else None,
        dc0.to(saved.c0.dtype) if need_c0 else None,
        dweight_ih,
        dweight_hh,
        dbias if need_bias_ih else None,
        dbias if need_bias_hh else None,
        dweight_hr,
    )


def _taken_by_weight_hh(saved: Saved, reverse: bool) -> Tensor:
    """The hidden states [T, B, P] that each step's recurrent product took; anything finite in padding."""
    h_prev = states_before(saved.h, saved.h0, saved.lengths, saved.resets, reverse)
    return h_prev if saved.mask_h is None else saved.mask_h * h_prev


def _gates_again(saved: Saved, h_prev: Tensor) -> Tensor:
    """The activated gates [T, B, 4H] once more: all h are known by now, so that one product does for all steps."""
    gates = _input_product(saved.x, saved.weight_ih, saved.bias_ih, saved.bias_hh)
    gates.flatten(0, 1).addmm_(h_prev.flatten(0, 1), saved.weight_hh.T)
    i_f, g, o = gates.tensor_split((2 * saved.c.shape[2], 3 * saved.c.shape[2]), dim=2)
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    return gates


def _cells_before_zoneout(saved: Saved, gates: Tensor, reverse: bool) -> Tensor:
    """f c + i g of every step, [T, B, H] float32; anything in padding."""
    c_prev = states_before(saved.c, saved.c0.float(), saved.lengths, saved.resets, reverse)
    i, f, g, _ = gates.chunk(4, dim=2)
    return f * c_prev + i.float() * g


def _without_padding(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t [T, B, F] with zeros past the end of each sequence."""
    valid = valid_steps(t.shape[0], lengths)
    return t if valid is None else torch.where(valid[:, :, None], t, 0)


def _differentiable_gradients(
    ctx,
    saved: Saved,
    output_gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The same gradients, themselves differentiable: the layer is taken again through reference.py."""
    needed = [k for k, need in enumerate(ctx.needs_input_grad[:8]) if need]
    given = [k for k, gradient in enumerate(output_gradients) if gradient is not None]

    def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs: list[Any] = list(saved[:8])
        for k, tensor in zip(needed, tensors):
            inputs[k] = tensor
        ragged = saved.lengths, saved.resets, ctx.reverse
        outputs = reference.lstm_layer(*inputs, *ragged, noise=saved.noise)  # type: ignore[misc, call-arg]
        return tuple(outputs[k] for k in given)

    # torch.func.vjp, not autograd.grad: inputs may be one tensor or depend on each other, and be those of a transform.
    _, pull = torch.func.vjp(layer, *(saved[k] for k in needed))[:2]
    gradients = dict(zip(needed, pull(tuple(output_gradients[k] for k in given))))
    return tuple(gradients.get(k) for k in range(8))
