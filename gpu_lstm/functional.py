"""LSTM layers as functions: `lstm_layer` for users, `lstm_stack` for the modules.

Here a backend, once chosen, is handed its work.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd, native, pipeline, reference
from .backends import KERNEL_BACKENDS, Backend, select
from .noise import NO_NOISE, Noise, draw
from .precision import autocasts, is_exact
from .reference import Gates
from .sequences import check_lengths, check_resets, valid_steps
from .weights import Weights

State = tuple[Tensor, Tensor]
"""(h, c) of one layer with D directions: [D, B, P] and [D, B, H]."""


def lstm_layer(
    x: Tensor,
    weights: Weights | Sequence[Tensor | None],
    hx: State | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str | Backend | None = None,
) -> tuple[Tensor, State]:
    """One LSTM layer in one direction.

    Args:
        x: input, floating point [T, B, I].
        weights: (weight_ih [4H, I], weight_hh [4H, P], bias_ih [4H], bias_hh [4H], weight_hr [P, H]) in the dtype
            of x; from bias_ih on they may be None or left out. P = H without weight_hr.
        hx: initial states (h0 [B, P], c0 [B, H]); zeros if None.
        lengths: int32 or int64 [B], each from 0 to T, in any order: how many steps each sequence has.
        resets: bool [T, B]; where True, the state is zeroed before that step is taken. A reset at t separates time
            t from t - 1, for the reverse direction too.
        reverse: from each sequence's last step to its first.
        backend: "auto", "triton", "cupy", "torch" or "reference"; None: as chosen by `gpu_lstm.backend` or by the
            environment.

    Returns:
        h [T, B, P], zero past the end of a sequence, and (h_n [B, P], c_n [B, H]) after its last step.

    Raises:
        RuntimeError: a tensor of the wrong shape, device or dtype; T = 0.
        ValueError: wrong lengths or resets; an unknown backend.
        ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
    """
    weights = Weights(*weights)  # type: ignore[arg-type]
    if x.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {x.dim()}")
    steps, batch, features = x.shape
    hidden, projected = _checked_sizes(weights, features)
    h0, c0 = (x.new_zeros(batch, projected), x.new_zeros(batch, hidden)) if hx is None else hx
    for i, (state, size) in enumerate(((h0, projected), (c0, hidden))):
        if state.shape != (batch, size):
            raise RuntimeError(f"Expected hidden[{i}] size {(batch, size)}, got {list(state.shape)}")
    check_tensors(x, (h0, c0), weights.present())
    if lengths is not None:
        check_lengths(lengths, steps, (batch,), x.device)
    if resets is not None:
        check_resets(resets, (steps, batch), x.device)
    chosen = select(backend, x.device, compute_dtype(x))
    h, h_n, c_n = _one_direction(x, h0, c0, weights, lengths, resets, reverse, chosen)
    return h, (h_n, c_n)


def _checked_sizes(weights: Weights, features: int) -> tuple[int, int]:
    """(H, P) of weights whose shapes agree."""
    hidden = weights.weight_hh.shape[0] // 4
    projected = hidden if weights.weight_hr is None else weights.weight_hr.shape[0]
    expected = {
        "weight_ih": (4 * hidden, features),
        "weight_hh": (4 * hidden, projected),
        "bias_ih": (4 * hidden,),
        "bias_hh": (4 * hidden,),
        "weight_hr": (projected, hidden),
    }
    for (name, shape), tensor in zip(expected.items(), weights):
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"Expected {name} size {shape}, got {list(tensor.shape)}")
    if (weights.bias_ih is None) != (weights.bias_hh is None):
        raise RuntimeError("bias_ih and bias_hh should be given together")
    return hidden, projected


def check_tensors(x: Tensor, hx: State, weights: list[Tensor]) -> None:
    """Raise, in torch's own words, unless all tensors are of one device and dtype and there is a step to take.

    Under autocast dtypes may differ, and a cell state may be float32 beside half precision.
    """
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    mixed_allowed = autocasts(x)
    for kind, tensors in (("parameter", weights), ("hidden", hx)):
        for tensor in tensors:
            if tensor.device != x.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, "
                    f"found input tensor at {x.device} and {kind} tensor at {tensor.device}"
                )
            if tensor.dtype != x.dtype and not mixed_allowed and not (tensor is hx[1] and is_exact(tensor, x)):
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, "
                    f"found input tensor with {x.dtype} and {kind} tensor with {tensor.dtype}"
                )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a layer computes x in: x's own or, for float32 and narrower, autocast's where that is on."""
    if autocasts(x) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def lstm_stack(
    x: Tensor,  # [T, B, I]
    states: list[State],  # [L]
    layers: list[list[Weights]],  # [L][D]
    *,
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B]
    backend: Backend,
    dropout: float,
    training: bool,
    residual: bool = False,
    recompute: bool = False,
    record: list[Gates] | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, list[State]]:
    """Layers on top of each other, dropout between them: output [T, B, D*P] and the final states, one pair a layer.

    With `residual`, a layer whose output is as wide as its input adds the two. With `recompute`, a backend with kernels
    of its own keeps less for backward. The reference appends the gates of every layer and direction to `record`, if
    there is one. `recurrent_dropout` and `zoneout` of (h, c) are for the Triton backend and the reference. Arguments
    are not checked.
    """
    steps, batch, _ = x.shape
    noise = draw(layers, steps, batch, compute_dtype(x), recurrent_dropout, zoneout, training)  # [L][D]
    if backend in KERNEL_BACKENDS:
        dtype = compute_dtype(x)
        with _without_autocast(x):
            return pipeline.lstm_stack(
                x.to(dtype), [(h.to(dtype), _cell_state(c, x, dtype)) for h, c in states],
                [[weights.to(dtype) for weights in layer] for layer in layers],
                lengths, resets, backend.value, dropout if training else 0.0, residual, recompute, noise,
            )  # fmt: skip
    plain = backend is Backend.TORCH and lengths is None and resets is None
    if plain and not residual and _same_sizes(layers):
        groups = [layers]  # torch's own LSTM takes them all in one call, dropout included
    else:
        groups = [[layer] for layer in layers]
    finals: list[State] = []
    for group in groups:
        h0, c0 = (torch.cat(state) for state in zip(*states[len(finals) : len(finals) + len(group)]))  # [L*D, B, *]
        if plain:
            y, h_n, c_n = native.lstm(x, h0, c0, group, dropout=dropout, training=training)
        else:
            y, h_n, c_n = _one_layer(x, h0, c0, group[0], lengths, resets, backend, record, noise[len(finals)])
        finals += zip(h_n.split(len(group[0])), c_n.split(len(group[0])))
        if residual and y.shape == x.shape:
            valid = valid_steps(x.shape[0], lengths)
            y = y + (x if valid is None else torch.where(valid[:, :, None], x, 0))
        x = F.dropout(y, dropout, training) if len(finals) < len(layers) else y
    return x, finals


def _cell_state(c: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """c in the dtype that x is computed in; in float32 where it was given so beside an x of half precision."""
    return c if is_exact(c, x) else c.to(dtype)


def _same_sizes(layers: list[list[Weights]]) -> bool:
    return len({(layer[0].weight_hh.shape, layer[0].present()[-1].shape) for layer in layers}) == 1


def _one_layer(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [D, B, P]
    c0: Tensor,  # [D, B, H]
    layer: list[Weights],  # [D]
    lengths: Tensor | None,
    resets: Tensor | None,
    backend: Backend,
    record: list[Gates] | None,
    noise: list[Noise],  # [D]
) -> tuple[Tensor, Tensor, Tensor]:
    """All directions of one layer: [T, B, D*P], [D, B, P], [D, B, H]."""
    results = [
        _one_direction(x, h0[d], c0[d], weights, lengths, resets, d == 1, backend, record, noise[d])
        for d, weights in enumerate(layer)
    ]
    h, h_n, c_n = zip(*results)
    return torch.cat(h, dim=-1) if len(h) > 1 else h[0], torch.stack(h_n), torch.stack(c_n)


def _one_direction(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, P]
    c0: Tensor,  # [B, H]
    weights: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    backend: Backend,
    record: list[Gates] | None = None,
    noise: Noise = NO_NOISE,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction, on a chosen backend: h [T, B, P], h_n [B, P], c_n [B, H]."""
    if backend is Backend.TORCH:  # which knows autocast by itself
        return native.lstm_layer(x, h0, c0, weights, lengths, resets, reverse)
    dtype = compute_dtype(x)
    x, h0, c0, weights = x.to(dtype), h0.to(dtype), _cell_state(c0, x, dtype), weights.to(dtype)
    with _without_autocast(x):
        if backend is Backend.REFERENCE:
            return reference.lstm_layer(x, h0, c0, *weights, lengths, resets, reverse, record, noise)
        return autograd.lstm_layer(x, h0, c0, *weights, lengths, resets, reverse, backend.value, noise=noise)
