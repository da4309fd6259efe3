"""torch's own LSTM and GRU (ATen on the CPU, cuDNN on CUDA), with lengths and resets.

They support neither, and packed batches are slow. But a gate can be shut from outside: more input features, with huge
weights, turn a step into one that

    holds    LSTM i = 0, f = 1, GRU z = 1: the state stays as it is     steps past the end of a sequence
    clears   LSTM i = f = 0, GRU r = z = n = 0: it becomes zero         between two episodes, which a reset separates

so that a batch with lengths and resets is one call over a plain padded batch. Shut gates pass no gradient either.
"""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import onednn, roles
from ..call.checks import is_exact
from ..call.choices import Backend
from ..call.modes import Recording, autocast_dtype, is_transformed
from ..call.request import Call, Request
from ..call.sequences import where
from ..call.weights import State, Weights
from ..kernels.cells import GRU, Cell
from ..kernels.heads import dense
from ..kernels.private import storage_of
from ..kernels.tensors import NOISE, VARIANT, Inputs, names_of
from .layer_loop import cast, named, run_layers, traversal_of, weights_of, without_autocast
from .torch_resets import with_resets

MOST_STEPS = 65_535  # of cuDNN
LEAST_HEAD, LEAST_OF_ALL = 64, 256  # units from which on a CPU a call a head is faster than zeros between them
MOST_ROWS = 16  # sequences up to which on a CPU a step is faster by cells

lstm, gru, lstm_cell, gru_cell = torch.lstm, torch.gru, torch.lstm_cell, torch.gru_cell


def has(cell: Cell, inputs: Inputs) -> bool:
    """Whether torch has a layer of this cell with these tensors."""
    more = (*names_of(VARIANT, NOISE), "reset_c")
    return cell.of_torch and len(inputs.x) <= MOST_STEPS and all(getattr(inputs, name) is None for name in more)


def as_given(request: Request) -> tuple[Tensor, list[State]] | None:
    """What torch's own operator returns of what a module or a cell was given; None: it does not take all as it is."""
    options, (lengths, resets, *_) = request.options, request.traversal
    if isinstance(options.role, roles.Cell):
        state = one_step(options.cell, request.x, request.states[0], request.weights[0][0])
        return state[0], [state]
    if resets is not None or type(options.role) is not roles.Module or not options.in_one_call:
        return None
    if lengths is None:
        return _every_step(request)
    one = request.modes.recording == Recording.NOBODY and request.steps == 1  # a trace runs with more steps, too
    return _step_of_some(request, lengths) if one else None


def _every_step(request: Request) -> tuple[Tensor, list[State]]:
    """`as_given` of a module without lengths."""
    options, weights, state = request.options, request.weights, request.states[0]
    if request.steps == 1 and request.batch <= MOST_ROWS and _is_step(request):
        return _cell_by_cell(options.cell, request.x, state, weights)
    sizes = None if request.form.packed is None else request.form.packed.batch_sizes
    y, state = stack(options.cell, request.x, state, weights, options.dropout, options.training, sizes)
    return y, [state]


def _step_of_some(request: Request, lengths: Tensor) -> tuple[Tensor, list[State]]:
    """`as_given` of one step with lengths [B]: all sequences take the step, and those of length 0 keep their state."""
    there, before = (lengths > 0)[:, None], request.states[0]  # [B, 1]
    if request.learns:  # a NaN in padding would reach the gradients of weights
        x, h, c = [torch.where(there, t, 0) for t in (request.x, *before)]
        request = request._replace(x=x, states=[(h, c)])
    y, (after,) = _every_step(request)
    h_n, c_n = [torch.where(there, t, t0.to(t.dtype)) for t, t0 in zip(after, before)]
    return torch.where(there, y, 0), [(h_n, c_n)]


def one_step(cell: Cell, x: Tensor, state: State, w: Weights) -> State:
    """What torch's own operator of a cell returns of x [B, I] and ([B, H], [B, H]); of a GRU twice h."""
    weight_hh = dense(w.weight_hh, state[0].shape[1])
    if cell is GRU:
        h = gru_cell(x, state[0], w.weight_ih, weight_hh, w.bias_ih, w.bias_hh)
        return h, h
    return lstm_cell(x, state, w.weight_ih, weight_hh, w.bias_ih, w.bias_hh)


def by_torch(call: Call, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
    """All layers of any other call, in `dtype`: output [T, B, D*P] and the final states as Call.states."""
    options, cell = call.options, call.options.cell
    is_plain = call.traversal.is_plain() and not isinstance(options.role, roles.Function)
    if is_plain and options.in_one_call:
        y, final = stack(cell, call.x, joined(call.states), call.weights, options.dropout, options.training)
        return y, split(final)

    def as_first(x: Tensor) -> Tensor:
        """A later layer's input, whose dtype decides on a CPU whether autocast casts all of an LSTM or its products."""
        return x.to(call.x.dtype) if x.is_cpu else x

    def run_layer(inputs: Inputs, row: int, reverse: bool) -> tuple[Tensor, State]:
        return layer_by_torch(cell, inputs._replace(x=as_first(inputs.x)), reverse)

    def run_directions(k: int, inputs: list[Inputs]) -> tuple[Tensor, list[State]]:
        x, state = as_first(inputs[0].x), joined([(each.h0, each.c0) for each in inputs])
        with named(k, None, Backend.TORCH):
            y, final = stack(cell, x, state, [call.weights[k]], training=options.training)
        return y, split(final)

    if is_plain:
        return run_layers(call, dtype, Backend.TORCH, run_layer, run_directions)
    if call.x.is_cuda:
        in_dtype = cast(call, dtype)
        with without_autocast(call):  # cuDNN's is always to float16, in which the huge weights overflow
            return run_layers(in_dtype, dtype, Backend.TORCH, run_layer)
    weights = [[one.to(call.modes.autocast or dtype) for one in layer] for layer in call.weights]
    return run_layers(call._replace(weights=weights), dtype, Backend.TORCH, run_layer)  # torch casts all others


def joined(rows: list[State]) -> State:
    """([n, B, P], [n, B, H]) of n layers and directions."""
    h, c = zip(*rows)
    return torch.cat(h), torch.cat(c)


def split(state: State) -> list[State]:
    """The reverse of `joined`."""
    return list(zip(*[t.split(1) for t in state]))


def stack(
    cell: Cell,
    x: Tensor,  # [T, B, I]; packed [N, I] with batch_sizes
    state: State,  # ([L*D, B, P], [L*D, B, H])
    layers: list[list[Weights]],  # [L][D], all of one size
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,  # as in a PackedSequence
) -> tuple[Tensor, State]:
    """torch's own LSTM or GRU over layers of one size: output [T, B, D*P] (packed [N, D*P]) and the final states."""
    h0, c0 = state
    if x.is_cpu and batch_sizes is None and cell is not GRU and layers[0][0].weight_hr is None:
        half = autocast_dtype(x)  # to which autocast casts it for oneDNN, which may have no LSTM in it on this CPU
        grad = torch.is_grad_enabled()
        if half is not None and onednn.takes_whole_lstms(x.dtype, grad) and not onednn.has_lstm(half, grad):
            state, layers = (h0.to(half), c0.to(half)), [[w.to(half) for w in layer] for layer in layers]
            with torch.autocast("cpu", enabled=False):
                return stack(cell, x.to(half), state, layers, dropout, training)
    if (columns := layers[0][0].weight_hh.shape[1]) != h0.shape[2]:  # of heads, in one layer
        if x.is_cpu and columns >= LEAST_HEAD and h0.shape[2] >= LEAST_OF_ALL:
            return _head_by_head(cell, x, state, layers[0], columns)
        layers = [[w._replace(weight_hh=dense(w.weight_hh, h0.shape[2])) for w in layer] for layer in layers]
    flat = [tensor for layer in layers for weights in layer for tensor in weights if tensor is not None]
    if x.is_cuda and not is_transformed() and len({storage_of(t) for t in flat}) > 1:  # a module's have one
        flat = packed(flat)
    bias = layers[0][0].bias_ih is not None
    if not training:
        dropout = 0.0
        training = x.is_cuda and torch.is_grad_enabled()  # tells cuDNN whether there will be a backward
    options = flat, bias, len(layers), dropout, training, len(layers[0]) == 2  # both directions
    exact = c0.dtype is not x.dtype and is_exact(c0, x)
    if cell is GRU:
        y, h_n = gru(x, h0, *options, False) if batch_sizes is None else gru(x, batch_sizes, h0, *options)
        return y, (h_n, h_n.float() if exact else h_n)
    hx = h0, c0.to(x.dtype) if exact else c0
    y, h_n, c_n = lstm(x, hx, *options, False) if batch_sizes is None else lstm(x, batch_sizes, hx, *options)
    return y, (h_n, c_n.float() if exact else c_n)


def _is_step(request: Request) -> bool:
    """Whether `_cell_by_cell` can run a call: on a CPU, for inference, one direction."""
    options, dtype = request.options, request.x.dtype
    if not request.x.is_cpu or dtype not in (torch.float32, torch.float64) or request.learns:
        return False
    more = options.directions > 1 or options.sizes[0].projected or options.dropout or request.form.packed
    return request.modes.plain and not more


def _cell_by_cell(cell: Cell, x: Tensor, state: State, layers: list[list[Weights]]) -> tuple[Tensor, list[State]]:
    """A step by torch's operator for a cell: that for layers of an LSTM packs all weights for oneDNN at every call."""
    h, final = x[0], []
    for k, (weights,) in enumerate(layers):
        h0 = state[0][k]  # [B, H], as c
        h, c = one_step(cell, h, (h0, h0 if cell is GRU else state[1][k]), weights)
        final.append((h, c))
    hs, cs = zip(*final)
    h_n = torch.stack(hs)  # [L, B, H], apart from the output, which a user may change in place
    return h[None], [(h_n, h_n if cell is GRU else torch.stack(cs))]


def _head_by_head(cell: Cell, x: Tensor, state: State, layer: list[Weights], columns: int) -> tuple[Tensor, State]:
    """`stack` of one layer of heads, each of which has so many units and is a layer of its own."""

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
    """The same weights as parts of one buffer in cuDNN's order, matrices before biases: cuDNN copies other orders."""
    ordered = sorted(weights, key=Tensor.dim, reverse=True)
    if ordered[-1].dim() == 2:  # cuDNN always has biases
        ordered.append(ordered[0].new_zeros(sum(len(t) for t in weights if len(t) == len(weights[0]))))
    pieces = torch.cat([t.flatten() for t in ordered]).split([t.numel() for t in ordered])
    views = {t: piece.view_as(t) for t, piece in zip(ordered, pieces)}
    return [views[t] for t in weights]


def layer_by_torch(cell: Cell, inputs: Inputs, reverse: bool) -> tuple[Tensor, State]:
    """One layer, one direction, in one call: x [T, B, I] -> h [T, B, P] and states ([1, B, P], [1, B, H]).

    torch runs the reverse direction only together with the forward one, so here time is reversed before and after.
    """
    weights, x, lengths = weights_of(inputs), inputs.x, inputs.lengths
    h0, c0 = state = inputs.h0[0], inputs.c0[0]  # [B, P], [B, H]
    time, valid, reset = traversal_of(inputs, reverse).steps(x)  # [T, B] each, or None

    def reordered(t: Tensor) -> Tensor:
        """t [T, B, F] by time -> by step, or back; zero past the end of a sequence."""
        t = t if valid is None else torch.where(valid[:, :, None], t, 0)
        return t.gather(0, time[:, :, None].expand_as(t)) if reverse else t

    run = partial(_with_gates_shut, cell, weights)
    if reset is None:
        h, c_n = run(reordered(x), state, None if valid is None else ~valid, None)
    else:
        h, c_n = with_resets(run, reordered(x), state, weights, valid, reset)
    h_n = h[-1]
    if lengths is not None:
        last = (lengths.long() - 1).clamp(min=0)
        h_n = h.gather(0, last[None, :, None].expand_as(h[:1]))[0]
        h_n, c_n = where((lengths == 0)[:, None], (h0.to(h_n.dtype), c0.to(c_n.dtype)), (h_n, c_n))
    return reordered(h), (h_n.contiguous()[None], c_n.contiguous()[None])


def _with_gates_shut(
    cell: Cell, weights: Weights, x: Tensor, state: State, holds: Tensor | None, clears: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [S, B, P] and c_n [B, H] from x [S, B, I], where steps hold or clear the state, bool [S, B]; None: nowhere."""
    (h0, c0), inputs, hidden = state, x.shape[2], state[1].shape[1]
    if holds is not None or clears is not None:
        hold, clear = (x.new_zeros(x.shape[:2]) if t is None else t.to(x.dtype) for t in (holds, clears))
        weight = weights.weight_ih  # under autocast on the CPU in half precision, unlike x
        huge = weight.new_full((hidden,), 3e4 if weight.dtype is torch.float16 else 1e30)
        if cell is GRU:  # r, z, n
            shut = [(-clear, huge), (hold - clear, huge)]
            if weights.bias_ih is not None:  # and its gradient is cancelled, too
                shut.append((clear, -weights.bias_ih[2 * hidden :]))
        else:  # i, f
            shut = [(-hold - clear, huge), (hold - clear, huge)]
        multiple = 1
        if not x.is_cpu and x.dtype.itemsize == 2:
            # Tensor cores need rows of whole 16 bytes; in float16 torch lets cuDNN keep W_hh on chip if 128 divides I.
            multiple = 128 if x.dtype is torch.float16 and inputs % 128 == 0 else 8
        added = len(shut) + -(inputs + len(shut)) % multiple
        features = F.pad(torch.stack([feature for feature, _ in shut], dim=2), (0, added - len(shut)))  # [S, B, added]
        # Not in place: graph.py records views of no tensor.
        columns = [F.pad(w, (k * hidden, len(weight) - (k + 1) * hidden)) for k, (_, w) in enumerate(shut)]
        huge_weights = F.pad(torch.stack(columns, dim=1), (0, added - len(shut)))  # [4H or 3H, added]
        weights = weights._replace(weight_ih=torch.cat([weight, huge_weights], dim=1))
        x = torch.cat([x, features], dim=2)
    y, (_, c_n) = stack(cell, x, (h0[None], c0[None]), [[weights]])  # [S, B, P], [1, B, H]
    return y, c_n[0]
