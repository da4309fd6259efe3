"""An LSTM, GRU or sLSTM layer as a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .call.checks import check_dimensions, check_heads, check_tensor, named_weights
from .call.choices import Backend, BackendName
from .call.prepare import prepare_layer
from .call.weights import State, Weights
from .dispatch.route import run_call
from .kernels import heads as products
from .kernels.cells import GRU, LSTM, SLSTM, Cell

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none


class _How(TypedDict, total=False):
    """The keyword arguments of all functions here; `lstm_layer` documents them."""

    lengths: Tensor | None
    resets: Tensor | None
    reset_states: Any
    reverse: bool
    backend: BackendName | Backend | None
    heads: int


def _layer(cell: Cell, x: Tensor, weights: Weights, hx: Any, **how: Unpack[_How]) -> Any:
    """One layer of any cell in one direction: what the three functions below run."""
    return run_call(prepare_layer(cell, x, weights, hx, **how))


def lstm_layer(
    x: Tensor, weights: Weights | Sequence[Tensor | None], hx: State | None = None, **how: Unpack[_How]
) -> tuple[Tensor, State]:
    """One LSTM layer in one direction.

    Args:
        x: input, floating point [T, B, I].
        weights: (weight_ih [4H, I], weight_hh [4H, P], bias_ih [4H], bias_hh [4H], weight_hr [P, H],
            weight_peephole [3H], gain_ih [4H], gain_hh [4H], gain_c [H], bias_c [H]) in the dtype of x; from bias_ih
            on they may be None or left out. P = H without weight_hr; with heads weight_hh is [4H, H / heads].
            Peepholes are for the gates i, f and o; gains turn on a layer norm, see `LSTM`, not with weight_hr. Both
            run on every backend but "torch".
        hx: initial states (h0 [B, P], c0 [B, H]); zeros if None.
        lengths: int32 or int64 [B], each from 0 to T, in any order: how many steps each sequence has.
        resets: bool [T, B]; True at t zeroes the state before step t, or in the reverse direction before step t - 1.
        reset_states: the states that resets set instead of zeros: h [B, P] and c [B, H], or one per step, [T, B, P] and
            [T, B, H], of which only those at resets are used. On every backend but "torch".
        reverse: from each sequence's last step to its first.
        backend, heads: as for `LSTM`.

    Returns:
        h [T, B, P], zero past the end of a sequence, and (h_n [B, P], c_n [B, H]) after its last step.

    Raises:
        RuntimeError: a tensor of the wrong shape, device or dtype; T = 0; not exactly two states.
        TypeError: an argument that is not a tensor, or not a bool.
        ValueError: wrong lengths, resets or reset_states, or a backend that does not support these, peepholes or a
            layer norm; a layer norm with weight_hr; heads as `LSTM` refuses; fewer than two weights or more than ten;
            H = 0 or P = 0; more steps, sequences or units than the backend's kernels can count to; an unknown backend.
        ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
    """
    return _layer(LSTM, x, named_weights(weights, LSTM), hx, **how)


def gru_layer(
    x: Tensor, weights: Weights | Sequence[Tensor | None], hx: Tensor | None = None, **how: Unpack[_How]
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction.

    Args:
        x: input, floating point [T, B, I].
        weights: (weight_ih [3H, I], weight_hh [3H, H / heads], bias_ih [3H], bias_hh [3H]) in the dtype of x, with rows
            in torch's order r, z, n; the biases may be None or left out.
        hx: initial state h0 [B, H]; zeros if None.
        lengths, resets, reverse, backend, heads: as for `lstm_layer`.
        reset_states: the states that resets set instead of zeros, [B, H] or [T, B, H].

    Returns:
        h [T, B, H], zero past the end of a sequence, and h_n [B, H] after its last step.

    Raises:
        RuntimeError, TypeError, ValueError, ImportError: as `lstm_layer`.
    """
    return _layer(GRU, x, named_weights(weights, GRU), hx, **how)


def slstm_layer(
    z: Tensor, weight_hh: Tensor, bias: Tensor | None = None,
    hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, **how: Unpack[_How],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """One sLSTM layer in one direction, see `SLSTM`, whose input product W_ih x the caller has computed.

    Args:
        z: W_ih x, floating point [T, B, 4H], in the order i, f, g (the paper's z), o.
        weight_hh: [4H, H / heads]. As the bias, in the dtype of z.
        bias: [4H], of b_ih + b_hh. Default: zeros
        hx: initial states (h, c, n, m), [B, H] each; zeros if None.
        lengths, resets, reverse, backend, heads: as for `lstm_layer`.

    Returns:
        h [T, B, H], zero past the end of a sequence, and (h_n, c_n, n_n, m_n), [B, H] each, after its last step.

    Raises:
        RuntimeError, TypeError, ValueError, ImportError: as `lstm_layer`.
    """
    for name, tensor, dimensions in (("z", z, 3), ("weight_hh", weight_hh, 2), ("bias", bias, 1)):
        if tensor is not None or name != "bias":
            check_tensor(tensor, name)
            check_dimensions(name, tensor, dimensions)  # type: ignore[arg-type]
    return _layer(SLSTM, z, Weights(None, weight_hh, bias), hx, **how)


def of_heads(weight_hh: Tensor, heads: int) -> Tensor:
    """Cut a block-diagonal W_hh, [4H, H] or [3H, H], into that of heads, [4H, H / heads]; the reverse: `dense`.

    Raises:
        TypeError: `heads` is no int, or `weight_hh` no tensor.
        ValueError: `heads` does not divide H, or H the rows, or a weight between two heads is not zero.
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
    """W_hh of heads, [4H, H / heads] or [3H, H / heads] -> the block-diagonal one that computes the same, [4H, H].

    Raises:
        TypeError: `weight_hh` is no tensor.
        ValueError: it has no such size with H = `hidden_size`.
    """
    _hidden_of(weight_hh, hidden_size)
    return products.dense(weight_hh, hidden_size)


def _hidden_of(weight_hh: Tensor, hidden: int | None = None) -> int:
    """H, by default the columns of a W_hh; raise unless it divides the rows, and the columns H."""
    check_tensor(weight_hh, "weight_hh")
    rows, columns = weight_hh.shape if weight_hh.dim() == 2 else (0, 0)
    hidden = columns if hidden is None else hidden
    if not (rows and columns and hidden > 0) or rows % hidden or hidden % columns:
        raise ValueError(f"Expected weight_hh with a multiple of {hidden} rows, got {list(weight_hh.shape)}")
    return hidden
