"""The tensors of one layer, named as in torch.nn.LSTM and GRU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.tensors import BY_NAME
from .autocast_cache import cast

State = tuple[Tensor, Tensor]
"""(h, c): [B, P] and [B, H] of one direction, [D, B, P] and [D, B, H] of a layer with D directions."""

PEEPHOLES, LAYER_NORM = "peepholes", "layer_norm"  # variants of the cell, as arguments and in errors


class Weights(NamedTuple):
    """One layer, one direction. H hidden units, I input features, P projected features (H without projection).

    A GRU has the first four, of 3H rows.
    """

    weight_ih: Tensor | Any  # [4H, I]; None: x is W_ih x already
    weight_hh: Tensor  # [4H, P]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H], for the gates i, f and o
    gain_ih: Tensor | None = None  # [4H], of the layer norm of W_ih x, whose bias is bias_ih
    gain_hh: Tensor | None = None  # [4H], of that of W_hh h, whose bias is bias_hh
    gain_c: Tensor | None = None  # [H], of that of c
    bias_c: Tensor | None = None  # [H]

    def present(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def to(self, dtype: torch.dtype) -> "Weights":
        return Weights(*cast(self, dtype))  # type: ignore[arg-type]

    def detached(self, need_gradients: bool) -> "Weights":
        """The same tensors, detached, for a separate computation."""
        return Weights(*(None if t is None else t.detach().requires_grad_(need_gradients) for t in self))  # type: ignore[arg-type]


NAMES = Weights._fields


class Size(NamedTuple):
    """The sizes of one layer in one direction."""

    inputs: int | Any  # I; None: x is W_ih x already
    hidden: int  # H
    projected: int  # P; 0 without a projection
    heads: int = 1

    @property
    def width(self) -> int:
        """Features of h."""
        return self.projected or self.hidden

    def of(self, names: Sequence[str], rows: int) -> tuple[tuple[int, ...], ...]:
        """The sizes of the weights of these names, with `rows` to a unit."""
        hidden = self.hidden
        letters = {"I": self.inputs, "H": hidden, "P": self.width, "4H": rows * hidden, "3H": 3 * hidden}
        letters["D"] = self.width // self.heads
        return tuple([BY_NAME[name].sized(letters) for name in names])


def size_of(weights: Weights, rows: int) -> Size:
    """By the sizes of weights; without heads where none fit."""
    inputs = None if weights.weight_ih is None else weights.weight_ih.shape[1]
    count, columns = weights.weight_hh.shape
    hidden = columns if count % rows else count // rows
    if weights.weight_hr is not None:
        return Size(inputs, hidden, columns)
    return Size(inputs, hidden, 0, hidden // columns if columns and hidden % columns == 0 else 1)
