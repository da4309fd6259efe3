"""The weights of one layer, with the names that torch.nn.LSTM and torch.nn.GRU use."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.tensors import BY_NAME, Shape
from .autocast_cache import cast

State = tuple[Tensor, Tensor]
"""(h, c): [B, P] and [B, H] for one direction, [D, B, P] and [D, B, H] for a layer with D directions."""

PEEPHOLES, LAYER_NORM = "peepholes", "layer_norm"  # the names of variants of the cell in arguments and errors


class Weights(NamedTuple):
    """The weights of one layer in one direction.

    The sizes below are for an LSTM with H hidden units, I input features and P projected features. Without a projection
    P = H. A GRU has only the first four tensors, with 3H rows instead of 4H.
    """

    weight_ih: Tensor | Any  # [4H, I]; None: the caller computed W_ih x
    weight_hh: Tensor  # [4H, P]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H], for the gates i, f and o
    gain_ih: Tensor | None = None  # [4H], for the layer norm of W_ih x, whose bias is bias_ih
    gain_hh: Tensor | None = None  # [4H], for the layer norm of W_hh h, whose bias is bias_hh
    gain_c: Tensor | None = None  # [H], for the layer norm of c
    bias_c: Tensor | None = None  # [H], the bias of the layer norm of c

    def present(self) -> list[Tensor]:
        """Return all tensors that are not None."""
        return [tensor for tensor in self if tensor is not None]

    def to(self, dtype: torch.dtype) -> "Weights":
        """Return the weights in another dtype. Inside a block of autocast the casts are cached, see `cast`."""
        return Weights(*cast(self, dtype))  # type: ignore[arg-type]

    def detached(self, need_gradients: bool) -> "Weights":
        """Return the same tensors, detached from the caller's graph. `need_gradients` is their requires_grad."""
        return Weights(*(None if t is None else t.detach().requires_grad_(need_gradients) for t in self))  # type: ignore[arg-type]


NAMES = Weights._fields
AllWeights = list[list[Weights]]
"""The weights of a call by layer and direction, [L][D]."""
LayerResult = tuple[Tensor, State]
CallResult = tuple[Tensor, list[State]]
"""The output of a layer in one direction and its final state. The output of all layers and their final states."""


def weights_now(module: Any, names: tuple) -> AllWeights:
    """Return the current weights of a module by layer and direction, [L][D].

    `names` are the names of the parameters, see Options.names.
    """
    parameters = module._parameters
    try:
        return [[Weights(*[n and parameters[n] for n in tensors]) for tensors in layer] for layer in names]
    except KeyError:  # another tensor has taken the place of a parameter, for example by weight_norm
        return [[Weights(*[n and getattr(module, n) for n in tensors]) for tensors in layer] for layer in names]


class Size(NamedTuple):
    """The sizes of one layer in one direction."""

    inputs: int | Any  # I; None: the caller computed W_ih x
    hidden: int  # H
    projected: int  # P; 0 without a projection
    heads: int = 1

    @property
    def width(self) -> int:
        """The number of features of h."""
        return self.projected or self.hidden

    def of(self, names: Sequence[str], rows: int) -> tuple[Shape, ...]:
        """Return the sizes of the weights with these names. Each weight has `rows` rows for each unit."""
        hidden = self.hidden
        letters = {"I": self.inputs, "H": hidden, "P": self.width, "4H": rows * hidden, "3H": 3 * hidden}
        letters["D"] = self.width // self.heads
        return tuple([BY_NAME[name].sized(letters) for name in names])


def size_of(weights: Weights, rows: int) -> Size:
    """Return the Size of a layer, from the shapes of its weights. W_hh must be a matrix.

    If the shapes contradict each other, the Size has one head. A call with such weights raises an error later.
    """
    inputs = None if weights.weight_ih is None else weights.weight_ih.shape[1]
    count, columns = weights.weight_hh.shape
    hidden = columns if count % rows else count // rows
    if weights.weight_hr is not None:
        return Size(inputs, hidden, columns)
    return Size(inputs, hidden, 0, hidden // columns if columns and hidden % columns == 0 else 1)
