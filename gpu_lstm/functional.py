"""Functions that run one LSTM, GRU or sLSTM layer in one direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .call.checks import check_dimensions, check_heads, check_positive, check_tensor, named_weights
from .call.choices import AnyBackend
from .call.prepare import request_of_layer
from .call.weights import State, Weights
from .dispatch.route import run_call
from .kernels import heads as products
from .kernels.cells import GRU, LSTM, SLSTM

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none


class _How(TypedDict, total=False):
    """The keyword arguments that all three functions have. `lstm_layer` documents them."""

    lengths: Tensor | None
    resets: Tensor | None
    reset_states: Any
    reverse: bool
    backend: AnyBackend
    heads: int


def lstm_layer(
    x: Tensor, weights: Weights | Sequence[Tensor | None], hx: State | None = None, **how: Unpack[_How]
) -> tuple[Tensor, State]:
    """Apply one LSTM layer in one direction.

    Args:
        x: The input, floating point [T, B, I].
        weights: A sequence of the tensors below, in this order and in the dtype of x. From bias_ih on they may be None
            or left out.
        hx: The initial states (h0 [B, P], c0 [B, H]). Default: zeros
        lengths: The number of steps of each sequence, int32 or int64 [B], each from 0 to T, in any order. Default: T
        resets: True where the states are reset, bool [T, B]. A reset at t zeroes the states before the layer computes
            time t, or in the reverse direction before it computes time t - 1.
        reset_states: The states that a reset sets instead of zeros: h [B, P] and c [B, H], or one for each step, h
            [T, B, P] and c [T, B, H]. Only the states at resets are used. Every backend except "torch" supports them.
        reverse: If True, the layer runs from each sequence's last step to its first. Default: False
        backend, heads: See `LSTM`.

    The weights, where P = H without weight_hr::

        weight_ih        [4H, I]
        weight_hh        [4H, P], with heads [4H, H / heads]
        bias_ih          [4H]
        bias_hh          [4H]
        weight_hr        [P, H]      the projection
        weight_peephole  [3H]        the peepholes of the gates i, f and o
        gain_ih          [4H]        the layer norm of W_ih x, see `LSTM`
        gain_hh          [4H]        the layer norm of W_hh h
        gain_c           [H]         the layer norm of c
        bias_c           [H]         the bias of the layer norm of c

    A layer norm cannot be combined with weight_hr. Every backend except "torch" supports peepholes, layer norms, and a
    projection with P = H.

    Returns:
        h [T, B, P], which is zero past the end of a sequence, and the states (h_n [B, P], c_n [B, H]) after the last
        step of each sequence.

    Raises:
        RuntimeError: A tensor has a wrong shape, device or dtype, T is 0, or hx does not have two states.
        TypeError: An argument has a wrong type, or x is not floating point.
        ValueError: lengths, resets or reset_states have a wrong shape, dtype, device or value. On CUDA the values of
            lengths are asserted on the device.
        ValueError: The backend is unknown, or it does not support reset_states, peepholes or a layer norm.
        ValueError: There are fewer than two weights or more than ten, or H or P is 0.
        ValueError: A layer norm is combined with weight_hr, or `LSTM` refuses these heads.
        ValueError: There are more steps, sequences or units than the kernels of the backend can count.
        ImportError, RuntimeError, TypeError: A chosen backend cannot run. The message says why.
    """
    return run_call(request_of_layer(LSTM, x, named_weights(weights, LSTM), hx, **how))


def gru_layer(
    x: Tensor, weights: Weights | Sequence[Tensor | None], hx: Tensor | None = None, **how: Unpack[_How]
) -> tuple[Tensor, Tensor]:
    """Apply one GRU layer in one direction.

    Args:
        x: The input, floating point [T, B, I].
        weights: (weight_ih [3H, I], weight_hh [3H, H / heads], bias_ih [3H], bias_hh [3H]) in the dtype of x. The rows
            are in torch's order r, z, n. The biases may be None or left out.
        hx: The initial state h0 [B, H]. Default: zeros
        lengths, resets, reverse, backend, heads: See `lstm_layer`.
        reset_states: The states that a reset sets instead of zeros, [B, H] or [T, B, H].

    Returns:
        h [T, B, H], which is zero past the end of a sequence, and the state h_n [B, H] after the last step of each
        sequence.

    Raises:
        RuntimeError, TypeError, ValueError, ImportError: See `lstm_layer`.
    """
    return run_call(request_of_layer(GRU, x, named_weights(weights, GRU), hx, **how))


def slstm_layer(
    z: Tensor, weight_hh: Tensor, bias: Tensor | None = None,
    hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, **how: Unpack[_How],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Apply one sLSTM layer in one direction, after the input product. See `SLSTM` for the equations.

    Args:
        z: The input product W_ih x, floating point [T, B, 4H], in the order i, f, g, o. The paper calls g z.
        weight_hh: The recurrent weights [4H, H / heads], in the dtype of z.
        bias: The sum b_ih + b_hh, [4H], in the dtype of z. Default: zeros
        hx: The initial states (h, c, n, m), [B, H] each. Default: zeros
        lengths, resets, reverse, backend, heads: See `lstm_layer`.

    Returns:
        h [T, B, H], which is zero past the end of a sequence, and the states (h_n, c_n, n_n, m_n), [B, H] each, after
        the last step of each sequence.

    Raises:
        RuntimeError, TypeError, ValueError, ImportError: See `lstm_layer`.
    """
    for name, tensor, dimensions in (("z", z, 3), ("weight_hh", weight_hh, 2), ("bias", bias, 1)):
        if tensor is not None or name != "bias":
            check_tensor(tensor, name)
            check_dimensions(name, tensor, dimensions)  # type: ignore[arg-type]
    return run_call(request_of_layer(SLSTM, z, Weights(None, weight_hh, bias), hx, **how))


def of_heads(weight_hh: Tensor, heads: int) -> Tensor:
    """Return the weight_hh of a layer with heads that computes the same as a block-diagonal weight_hh.

    Args:
        weight_hh: The block-diagonal weights, [4H, H] or [3H, H].
        heads: The number of blocks.

    Returns:
        The blocks, [4H, H / heads] or [3H, H / heads]. `dense` is the reverse.

    Raises:
        TypeError: `heads` is not an int, or `weight_hh` is not a tensor.
        ValueError: `heads` is not positive, H is not divisible by `heads`, the number of rows is not divisible by H, or
            a weight between two heads is not zero.
    """
    hidden = _hidden_of(weight_hh)
    check_heads(heads, hidden)
    head = hidden // heads
    blocks = weight_hh.view(-1, heads, head, heads, head).diagonal(dim1=1, dim2=3)  # [GATES, D, D, heads]
    cut = blocks.permute(0, 3, 1, 2).flatten(0, 2)
    if (lost := int((weight_hh != 0).sum() - (cut != 0).sum())) > 0:
        raise ValueError(f"Expected zeros between the {heads} heads of weight_hh, got {lost} other weights")
    return cut


def dense(weight_hh: Tensor, hidden_size: int) -> Tensor:
    """Return the block-diagonal weight_hh that computes the same as the weight_hh of a layer with heads.

    Args:
        weight_hh: The weights of heads, [4H, H / heads] or [3H, H / heads].
        hidden_size: The number of hidden units, H.

    Returns:
        The block-diagonal weights, [4H, H] or [3H, H].

    Raises:
        TypeError: `hidden_size` is not an int, or `weight_hh` is not a tensor.
        ValueError: `hidden_size` is not positive, or `weight_hh` does not have such a size.
    """
    check_positive("hidden_size", hidden_size)
    _hidden_of(weight_hh, hidden_size)
    return products.dense(weight_hh, hidden_size)


def _hidden_of(weight_hh: Tensor, hidden: int | None = None) -> int:
    """Return H, which is `hidden` or, if that is None, the number of columns of weight_hh.

    Raise unless H divides the number of rows, and the number of columns divides H.
    """
    check_tensor(weight_hh, "weight_hh")
    rows, columns = weight_hh.shape if weight_hh.dim() == 2 else (0, 0)
    hidden = columns if hidden is None else hidden
    if not (rows and columns) or rows % hidden or hidden % columns:
        expected = f"a multiple of {hidden} rows and a divisor of {hidden} columns"
        raise ValueError(f"Expected weight_hh with {expected}, got {list(weight_hh.shape)}")
    return hidden
