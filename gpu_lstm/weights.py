"""The tensors of one layer, named as in torch.nn.LSTM."""

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import cast

State = tuple[Tensor, Tensor]
"""(h, c): [B, P] and [B, H] of one direction, [D, B, P] and [D, B, H] of a layer with D directions."""


NAMES = (
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "weight_peephole",
    "gain_ih",
    "gain_hh",
    "gain_c",
    "bias_c",
)  # torch 2.8 does not trace Weights._fields

PEEPHOLES, LAYER_NORM = "peepholes", "layer_norm"  # variants of the cell, as arguments and in errors


class Weights(NamedTuple):
    """One layer, one direction. H hidden units, I input features, P projected features (H without projection)."""

    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, P]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H], to the gates i, f and o
    gain_ih: Tensor | None = None  # [4H], of the layer norm of W_ih x, whose bias is bias_ih
    gain_hh: Tensor | None = None  # [4H], of that of W_hh h, whose bias is bias_hh
    gain_c: Tensor | None = None  # [H], of that of c
    bias_c: Tensor | None = None  # [H]

    @property
    def variant(self) -> str | None:
        """What torch's own cell has not: of two such things, that which the fewest backends take."""
        if not self.gain_ih is self.gain_hh is self.gain_c is None:
            return LAYER_NORM
        return None if self.weight_peephole is None else PEEPHOLES

    def present(self) -> list[Tensor]:
        """Those that are there, in torch's order."""
        return [tensor for tensor in self if tensor is not None]

    def given(self) -> list[bool]:
        """Which of NAMES those are."""
        return [tensor is not None for tensor in self]

    @classmethod
    def of_present(cls, tensors: list[Tensor], given: list[bool]) -> "Weights":
        """The reverse of `present` and `given`."""
        left = iter(tensors)
        return cls(*(next(left) if there else None for there in given))  # type: ignore[arg-type]

    def check_sizes(self, features: int, hidden: int, projected: int) -> None:
        """Raise unless every tensor has the size of a layer with I, H and P as given.

        Raises:
            RuntimeError: one has not.
            TypeError: weight_ih or weight_hh is None.
            ValueError: there is a layer norm, and a projection, with which none is defined.
        """
        rows = 4 * hidden
        sizes = (
            (rows, features), (rows, projected), (rows,), (rows,), (projected, hidden), (3 * hidden,),
            (rows,), (rows,), (hidden,), (hidden,),
        )  # fmt: skip
        for name, tensor, size in zip(NAMES, self, sizes):
            if tensor is None and name in ("weight_ih", "weight_hh"):
                raise TypeError(f"{name} should be a tensor, got: NoneType")
            if tensor is not None and tensor.shape != size:
                raise RuntimeError(f"Expected {name} size {size}, got {list(tensor.shape)}")
        if (self.bias_ih is None) != (self.bias_hh is None):
            raise RuntimeError("bias_ih and bias_hh should be given together")
        if self.bias_c is not None and self.gain_c is None:
            raise RuntimeError("bias_c should be given together with gain_c")
        if self.weight_hr is not None:
            check_unprojected(self.variant == LAYER_NORM, projected)

    def to(self, dtype: torch.dtype) -> "Weights":
        """The same in another dtype; under autocast cast once for all calls of a block."""
        return Weights(*cast(self, dtype))  # type: ignore[arg-type]

    def detached(self, need_gradients: bool) -> "Weights":
        """The same tensors for a computation of its own."""
        return Weights(*(None if t is None else t.detach().requires_grad_(need_gradients) for t in self))  # type: ignore[arg-type]

    def with_one(self, name: str, tensor: Tensor) -> "Weights":
        """The same with another tensor of that name."""
        return Weights(*[tensor if own == name else t for own, t in zip(NAMES, self)])  # type: ignore[arg-type]


def check_unprojected(layer_norm: bool, projected: int) -> None:
    """Raise unless one of the two is off.

    Raises:
        ValueError: Ba et al. (2016) have no projection, and nobody has said which of its sides is normalised.
    """
    if layer_norm and projected:
        raise ValueError(f"layer_norm is not defined with a projection: expected proj_size 0, got {projected}")
