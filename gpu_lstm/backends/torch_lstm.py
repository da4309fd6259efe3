"""torch's own LSTM (ATen on the CPU, cuDNN on CUDA), with lengths and resets.

It takes neither, and its packed batches are slow. But a gate can be shut from outside: two more input features,
whose weights are huge, turn a step into one that

    holds    i = 0, f = 1: c stays as it is          steps past the end of a sequence
    clears   i = 0, f = 0: c and h become zero       a step of its own, put in before a reset

so that a batch with lengths and resets is one call over a plain padded batch. Shut gates pass no gradient either.
"""

from collections.abc import Callable

import torch
from torch import _VF, Tensor

from ..call.checks import is_exact
from ..call.noise import draw
from ..call.prepare import Call
from ..call.sequences import Traversal
from ..call.weights import State, Weights
from . import reference
from .layers import connect, named, one_after_another


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
    """All layers of a call, computed in `dtype`: the output and the final states, both as the call has them."""
    options, packed = call.options, call.form.packed
    if options.kind == "LSTMCell":
        h, c = _VF.lstm_cell(call.x, call.states[0], *call.weights[0][0][:4])
        return h, [(h, c)]
    if options.kind == "LSTM" and call.traversal.is_plain():
        batch_sizes = None if packed is None else packed.batch_sizes
        y, state = stack(call.x, call.states[0], call.weights, options.dropout, options.training, batch_sizes)
        return y, [state]
    call = call.padded()
    if not call.traversal.is_plain() or options.kind == "lstm_layer":
        if call.modes.autocast is not None:  # the weights that shut gates are of a size that their dtype must hold
            call = call._replace(weights=[[one.to(dtype) for one in each] for each in call.weights])
        y, rows = one_after_another(call, _direction, "torch", dtype, call.state_rows())
        return y, call.pack_rows(rows)
    if options.in_one_call:
        h0, c0 = (torch.cat(state) for state in zip(*call.layer_states()))  # [L*D, B, *]
        y, (h_n, c_n) = stack(call.x, (h0, c0), call.weights, options.dropout, options.training)
        count = options.directions
        return y, call.pack_layers(list(zip(h_n.split(count), c_n.split(count))))
    return layer_by_layer(call, dtype, lambda x, state, layer: stack(x, state, [layer], training=options.training))


def _direction(_: int, x: Tensor, state: State, weights: Weights, traversal: Traversal, noise: object) -> tuple:
    return layer(x, state, weights, traversal)


def layer_by_layer(
    call: Call, dtype: torch.dtype, run: Callable[[Tensor, State, list[Weights]], tuple[Tensor, State]]
) -> tuple[Tensor, list[State]]:
    """Layers in order, each by run(x, ([D, B, P], [D, B, H]), weights [D])."""
    _, kept = draw(call.weights, (call.steps, call.batch), dtype, call.options)
    x = call.x
    finals: list[State] = []
    for k, (state, layer) in enumerate(zip(call.layer_states(), call.weights)):
        with named(k, None, "torch"):
            y, final = run(x, state, layer)
        x = connect(x, y, None, kept[k], call.options)
        finals.append(final)
    return x, call.pack_layers(finals)


def stack(
    x: Tensor,  # [T, B, I]; packed [N, I] with batch_sizes
    state: State,  # ([L*D, B, P], [L*D, B, H])
    layers: list[list[Weights]],  # [L][D], all of one size
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,  # as in a PackedSequence
) -> tuple[Tensor, State]:
    """torch's own LSTM over layers of one size: output [T, B, D*P] (packed [N, D*P]) and the final states."""
    h0, c0 = state
    flat = [tensor for layer in layers for weights in layer for tensor in weights if tensor is not None]
    bias = layers[0][0].bias_ih is not None
    if not training:
        dropout = 0.0
        training = x.is_cuda and torch.is_grad_enabled()  # to cuDNN this says whether there will be a backward
    exact = c0.dtype is not x.dtype and is_exact(c0, x)
    hx = h0, c0.to(x.dtype) if exact else c0
    options = flat, bias, len(layers), dropout, training, len(layers[0]) == 2  # both directions
    if batch_sizes is None:
        y, h_n, c_n = _VF.lstm(x, hx, *options, False)
    else:
        y, h_n, c_n = _VF.lstm(x, batch_sizes, hx, *options)
    return y, (h_n, c_n.float() if exact else c_n)


def layer(x: Tensor, state: State, weights: Weights, traversal: Traversal) -> tuple[Tensor, State]:
    """One layer, one direction, in one call: x [T, B, I] -> h [T, B, P] and (h_n [B, P], c_n [B, H]), as `state` is.

    torch has the reverse direction only combined with the forward one, so for that time is reversed and restored.
    """
    h0, c0 = state
    steps, batch, _ = x.shape
    lengths = traversal.lengths
    time, valid, reset = traversal.steps(x)  # [T, B] each, or None
    if valid is None:
        valid = torch.ones_like(time, dtype=torch.bool)

    # Each step goes behind the clearing steps before it; S is the number of steps with them.
    place = torch.arange(steps, device=x.device)[:, None].expand(steps, batch)
    extended = steps
    if reset is not None:
        place = place + reset.cumsum(0)
        extended += int(reset.sum(0).max()) if batch else 0
    clears = torch.zeros(extended, batch, dtype=torch.bool, device=x.device)
    if reset is not None:
        clears = clears.scatter(0, (place - 1).clamp(min=0), reset)
    holds = torch.ones_like(clears).scatter(0, place, ~valid) & ~clears
    place = place.gather(0, time)  # of each time

    inside = torch.where(valid[:, :, None], x, 0)
    gates_shut = torch.stack([holds, clears], dim=2).to(x.dtype)  # [S, B, 2]
    x_extended = x.new_zeros(extended, *x.shape[1:]).scatter(0, place[:, :, None].expand_as(x), inside)
    weight_ih = torch.cat([weights.weight_ih, _shut_gates(weights.weight_ih)], dim=1)  # [4H, I + 2]
    y, (_, c_n) = stack(
        torch.cat([x_extended, gates_shut], dim=2), (h0[None], c0[None]), [[weights._replace(weight_ih=weight_ih)]]
    )  # [S, B, P], [1, B, H]
    if reset is not None and bool((y[clears] != 0).any()):
        # A NaN is not cleared by multiplying it with zero. It is cleared where there is a choice at every step.
        return reference.layer(x, state, weights, traversal)

    h = y.gather(0, place[:, :, None].expand(-1, -1, y.shape[2]))
    h = torch.where(valid[:, :, None], h, 0)
    last_time = time[-1] if lengths is None else time.gather(0, (lengths[None].long() - 1).clamp(min=0))[0]
    h_n = h.gather(0, last_time[None, :, None].expand(1, -1, h.shape[2]))[0]
    if lengths is not None:
        h_n = torch.where((lengths == 0)[:, None], h0.to(h_n.dtype), h_n)  # dtypes differ under autocast
    return h, (h_n.contiguous(), c_n[0].contiguous())


def _shut_gates(weight_ih: Tensor) -> Tensor:
    """Weights [4H, 2] of the features that hold and clear, for gates i, f, g, o; like `weight_ih` [4H, I]."""
    huge = 3e4 if weight_ih.dtype is torch.float16 else 1e30
    shut = weight_ih.new_tensor([[-huge, -huge], [huge, -huge], [0.0, 0.0], [0.0, 0.0]])
    return shut.repeat_interleave(weight_ih.shape[0] // 4, dim=0)
