"""torch's own LSTM and GRU (ATen on the CPU, cuDNN on CUDA), with lengths and resets added.

torch's own support neither, and packed batches are slow. But additional input features with huge weights saturate the
gates, and turn a step into one of these two.

    a step that   does this to the state    by gates of an LSTM   of a GRU         is used
    holds         leaves it as it is        i = 0, f = 1          z = 1            past the end of a sequence
    clears        sets it to zero           i = f = 0             r = z = n = 0    at a reset, between two steps

So one call over a plain padded batch computes a batch with lengths and resets. Saturated gates pass no gradient.
"""

from __future__ import annotations  # torch.compile tries to evaluate annotations of nested functions, and fails

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import onednn, roles
from ..call.checks import is_exact
from ..call.choices import Backend
from ..call.modes import Recording, autocast_dtype, is_transformed
from ..call.request import Call, Request
from ..call.sequences import EVERY_STEP, where
from ..call.weights import AllWeights, CallResult, LayerResult, State, Weights
from ..kernels.cells import GRU, Cell
from ..kernels.heads import dense
from ..kernels.private import storage_of
from ..kernels.tensors import NOISE, VARIANT, Inputs, names_of
from .layer_loop import in_steps, named, run_layers, weights_of
from .plain_inference import can_infer
from .torch_resets import with_resets

MOST_STEPS = 65_535  # the most steps that cuDNN supports
SQUARE = "a projection to as many features as units"  # torch.lstm sees a projection only if h and c differ in width
LEAST_HEAD, LEAST_OF_ALL = 64, 256  # with so many units in a head, and in all, a call per head is faster on a CPU
MOST_ROWS = 16  # the most sequences for which one step on a CPU is faster by the operator for a cell

lstm, gru, lstm_cell, gru_cell = torch.lstm, torch.gru, torch.lstm_cell, torch.gru_cell


def has(cell: Cell, inputs: Inputs) -> bool:
    """Whether torch's own layer of this cell supports these tensors."""
    more = (*names_of(VARIANT, NOISE), "reset_c")
    square = inputs.weight_hr is not None and inputs.h0.shape[-1] == inputs.c0.shape[-1]
    is_possible = cell.of_torch and not square and not too_long(inputs.x, len(inputs.x))
    return is_possible and all(getattr(inputs, name) is None for name in more)


def too_long(x: Tensor, steps: int) -> bool:
    """Whether a call on x has more steps than cuDNN supports. On a CPU any number is supported."""
    return x.is_cuda and steps > MOST_STEPS


def as_given(request: Request) -> CallResult | None:
    """Run torch's own operator on a request as a module or a cell received it.

    Returns the output and the states, or None if the operator does not support everything in the request.
    """
    options, (lengths, resets, *_) = request.options, request.traversal
    if isinstance(options.role, roles.Cell):
        state = step_of_cell(options.cell, request.x, request.states[0], request.weights[0][0])
        return state[0], [state]
    if resets is not None or type(options.role) is not roles.Module or not options.in_one_call:
        return None
    if lengths is None:
        return _every_step(request)
    one = request.modes.recording == Recording.NOBODY and request.steps == 1  # a recorded program may run more steps
    return _step_of_some(request, lengths) if one else None


def _every_step(request: Request) -> CallResult:
    """Compute `as_given` for a module without lengths."""
    options, weights, state = request.options, request.weights, request.states[0]
    one = request.steps == options.directions == 1 and not options.sizes[0].projected
    if one and request.batch <= MOST_ROWS and can_infer(request):
        return _cell_by_cell(options.cell, request.x, state, weights)
    sizes = None if request.form.packed is None else request.form.packed.batch_sizes
    y, state = stack(options.cell, request.x, state, weights, options.dropout, options.training, sizes)
    return y, [state]


def _step_of_some(request: Request, lengths: Tensor) -> CallResult:
    """Compute `as_given` for one step with lengths [B].

    All sequences take the step, and afterwards sequences of length 0 get their previous state back.
    """
    there, before = (lengths > 0)[:, None], request.states[0]  # [B, 1]
    request = request._replace(traversal=EVERY_STEP)
    if request.learns:  # a NaN in padding would reach the gradients of weights
        x, h, c = [torch.where(there, t, 0) for t in (request.x, *before)]
        request = request._replace(x=x, states=[(h, c)])
    y, (after,) = _every_step(request)
    h_n, c_n = [torch.where(there, t, t0.to(t.dtype)) for t, t0 in zip(after, before)]
    return torch.where(there, y, 0), [(h_n, c_n)]


def step_of_cell(cell: Cell, x: Tensor, state: State, w: Weights) -> State:
    """Run torch's own operator for a cell on x [B, I] and the state ([B, H], [B, H]). A GRU's result is (h, h)."""
    weight_hh = dense(w.weight_hh, state[0].shape[1])
    if cell is GRU:
        h = gru_cell(x, state[0], w.weight_ih, weight_hh, w.bias_ih, w.bias_hh)
        return h, h
    return lstm_cell(x, state, w.weight_ih, weight_hh, w.bias_ih, w.bias_hh)


def by_torch(call: Call, dtype: torch.dtype) -> CallResult:
    """Run all layers of a call that `as_given` does not support, in `dtype`. Return the same as run_layers."""
    options, cell = call.options, call.options.cell
    is_plain = call.traversal.is_plain() and not isinstance(options.role, roles.Function)
    if is_plain and options.in_one_call and len({c.dtype for _, c in call.states}) == 1:
        y, final = stack(cell, call.x, joined(call.states), call.weights, options.dropout, options.training)
        return y, split(final)

    def as_first(x: Tensor) -> Tensor:
        """Return a later layer's input in the dtype of the first layer's input.

        On a CPU that dtype decides whether autocast casts a whole LSTM or only its products.
        """
        return x.to(call.x.dtype) if x.is_cpu else x

    def run_directions(k: int, inputs: list[Inputs]) -> CallResult:
        x, state = as_first(inputs[0].x), joined([(each.h0, each.c0) for each in inputs])
        with named(k, None, Backend.TORCH):
            y, final = stack(cell, x, state, [call.weights[k]], training=options.training)
        return y, split(final)

    cast_to = None
    if not is_plain and call.x.is_cuda:  # autocast would cast cuDNN's layers to float16, where huge weights overflow
        cast_to = dtype
    elif not is_plain:  # autocast casts the other tensors
        call = call._replace(weights=[[w.to(call.modes.autocast or dtype) for w in layer] for layer in call.weights])
    return run_layers(
        call, cast_to, Backend.TORCH,
        lambda inputs, row, reverse: layer_by_torch(cell, inputs._replace(x=as_first(inputs.x)), reverse),
        run_directions if is_plain else None,
    )  # fmt: skip


def joined(rows: list[State]) -> State:
    """Concatenate the states of n layers and directions: ([n, B, P], [n, B, H])."""
    h, c = zip(*rows)
    return torch.cat(h), torch.cat(c)


def split(state: State) -> list[State]:
    """Split a state by layers and directions, the reverse of `joined`."""
    return list(zip(*[t.split(1) for t in state]))


def stack(
    cell: Cell,
    x: Tensor,  # [T, B, I]; packed [N, I] with batch_sizes
    state: State,  # ([L*D, B, P], [L*D, B, H])
    layers: AllWeights,  # [L][D], all layers of one size
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,  # as in a PackedSequence
) -> LayerResult:
    """Run torch's own LSTM or GRU over layers of one size.

    Returns the output, [T, B, D*P] or packed [N, D*P], and the final states.
    """
    h0, c0 = state
    if x.is_cpu and batch_sizes is None and cell is not GRU and layers[0][0].weight_hr is None:
        half = autocast_dtype(x)  # the dtype that autocast uses for oneDNN, which may not support it on this CPU
        grad = torch.is_grad_enabled()
        if half is not None and onednn.takes_whole_lstms(x.dtype, grad) and not onednn.has_lstm(half, grad):
            state, layers = (h0.to(half), c0.to(half)), [[w.to(half) for w in layer] for layer in layers]
            with torch.autocast("cpu", enabled=False):
                return stack(cell, x.to(half), state, layers, dropout, training)
    if (columns := layers[0][0].weight_hh.shape[1]) != h0.shape[2]:  # there are heads, and therefore one layer
        if x.is_cpu and columns >= LEAST_HEAD and h0.shape[2] >= LEAST_OF_ALL:
            return _head_by_head(cell, x, state, layers[0], columns)
        layers = [[w._replace(weight_hh=dense(w.weight_hh, h0.shape[2])) for w in layer] for layer in layers]
    flat = [tensor for layer in layers for weights in layer for tensor in weights if tensor is not None]
    if x.is_cuda and not is_transformed() and len({storage_of(t) for t in flat}) > 1:  # a module's weights share one
        flat = packed(flat)
    bias = layers[0][0].bias_ih is not None
    if not training:
        dropout = 0.0
        training = x.is_cuda and torch.is_grad_enabled()  # tells cuDNN whether backward will follow
    options = flat, bias, len(layers), dropout, training, len(layers[0]) == 2  # whether bidirectional
    exact = c0.dtype is not x.dtype and is_exact(c0, x)
    hx = h0 if cell is GRU else (h0, c0.to(x.dtype) if exact else c0)
    given = (x, hx, *options, False) if batch_sizes is None else (x, batch_sizes, hx, *options)
    if cell is GRU:
        y, h_n = gru(*given)
        c_n = h_n
    else:
        y, h_n, c_n = lstm(*given)
    return y, (h_n, c_n.float() if exact else c_n)


def _cell_by_cell(cell: Cell, x: Tensor, state: State, layers: AllWeights) -> CallResult:
    """Run one step of all layers by torch's operator for a cell.

    It is faster than torch's operator for whole layers, which packs all weights of an LSTM for oneDNN at every call.
    """
    h, final = x[0], []
    for k, (weights,) in enumerate(layers):
        h0 = state[0][k]  # [B, H]
        h, c = step_of_cell(cell, h, (h0, h0 if cell is GRU else state[1][k]), weights)
        final.append((h, c))
    hs, cs = zip(*final)
    h_n = torch.stack(hs)  # [L, B, H], in new memory, since a user may change the output in place
    return h[None], [(h_n, h_n if cell is GRU else torch.stack(cs))]


def _head_by_head(cell: Cell, x: Tensor, state: State, layer: list[Weights], columns: int) -> LayerResult:
    """Compute `stack` for one layer of heads of `columns` units, with each head as a layer of its own."""

    def of_head(weights: Weights, n: int) -> Weights:
        rows = [t if t is None else t.unflatten(0, (cell.rows, -1, columns))[:, n].flatten(0, 1) for t in weights]
        return Weights(*rows)  # type: ignore[arg-type]

    parts = []
    for n, own in enumerate(zip(*[t.split(columns, 2) for t in state])):
        y, final = stack(cell, x, own, [[of_head(weights, n) for weights in layer]])
        parts.append((y.unflatten(2, (len(layer), columns)), *final))
    y, h_n, c_n = [torch.cat(each, -1) for each in zip(*parts)]  # y [T, B, D, H]
    return y.flatten(2), (h_n, c_n)


def packed(weights: list[Tensor]) -> list[Tensor]:
    """Return the weights as views of one buffer in cuDNN's order, matrices before biases.

    cuDNN would copy weights in any other order at every call.
    """
    ordered = sorted(weights, key=Tensor.dim, reverse=True)
    if ordered[-1].dim() == 2:  # cuDNN always has biases
        ordered.append(ordered[0].new_zeros(sum(len(t) for t in weights if len(t) == len(weights[0]))))
    pieces = torch.cat([t.flatten() for t in ordered]).split([t.numel() for t in ordered])
    views = {t: piece.view_as(t) for t, piece in zip(ordered, pieces)}
    return [views[t] for t in weights]


def layer_by_torch(cell: Cell, inputs: Inputs, reverse: bool) -> LayerResult:
    """Run one layer in one direction. Return h and the final state, as a layer_loop.RunLayer does.

    torch runs the reverse direction only together with the forward one. So here the input is reversed in time, the
    forward direction runs, and its output is reversed again.
    """
    weights, x, lengths = weights_of(inputs), inputs.x, inputs.lengths
    h0, c0 = state = inputs.h0[0], inputs.c0[0]  # [B, P], [B, H]
    reordered, ended, reset = in_steps(inputs, reverse)
    run = partial(_with_gates_shut, cell, weights)
    if reset is None:
        h, c_n = run(reordered(x), state, ended, None)
    else:
        h, c_n = with_resets(run, reordered(x), state, weights, ended, reset)
    h_n = h[-1]
    if lengths is not None:
        last = (lengths.long() - 1).clamp(min=0)
        h_n = h.gather(0, last[None, :, None].expand_as(h[:1]))[0]
        h_n, c_n = where((lengths == 0)[:, None], (h0.to(h_n.dtype), c0.to(c_n.dtype)), (h_n, c_n))
    return reordered(h), (h_n.contiguous()[None], c_n.contiguous()[None])


def _with_gates_shut(
    cell: Cell, weights: Weights, x: Tensor, state: State, holds: Tensor | None, clears: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one layer over x [S, B, I], in which steps may hold or clear the state. Return h [S, B, P] and c_n [B, H].

    `holds` and `clears` mark these steps. They are bool [S, B], or None if there is no such step.
    """
    (h0, c0), inputs, hidden = state, x.shape[2], state[1].shape[1]
    if holds is not None or clears is not None:
        hold, clear = (x.new_zeros(x.shape[:2]) if t is None else t.to(x.dtype) for t in (holds, clears))
        weight = weights.weight_ih  # under autocast on a CPU it is in half precision, but x is not
        huge = weight.new_full((hidden,), 3e4 if weight.dtype is torch.float16 else 1e30)
        shut = [(-clear if cell is GRU else -hold - clear, huge), (hold - clear, huge)]  # r and z, or i and f
        if cell is GRU and weights.bias_ih is not None:  # otherwise n would be tanh(b_in), with a gradient of b_in
            shut.append((clear, -weights.bias_ih[2 * hidden :]))
        multiple = 1
        if not x.is_cpu and x.dtype.itemsize == 2:
            # Tensor cores need rows of a multiple of 16 bytes. In float16, where I is a multiple of 128, torch lets
            # cuDNN keep W_hh on chip.
            multiple = 128 if x.dtype is torch.float16 and inputs % 128 == 0 else 8
        added = len(shut) + -(inputs + len(shut)) % multiple
        features = F.pad(torch.stack([feature for feature, _ in shut], dim=2), (0, added - len(shut)))  # [S, B, added]
        # F.pad makes each column. Writes into slices of a buffer must not be recorded in a graph.
        columns = [F.pad(w, (k * hidden, len(weight) - (k + 1) * hidden)) for k, (_, w) in enumerate(shut)]
        huge_weights = F.pad(torch.stack(columns, dim=1), (0, added - len(shut)))  # [4H or 3H, added]
        weights = weights._replace(weight_ih=torch.cat([weight, huge_weights], dim=1))
        x = torch.cat([x, features], dim=2)
    y, (_, c_n) = stack(cell, x, (h0[None], c0[None]), [[weights]])  # [S, B, P], [1, B, H]
    return y, c_n[0]
