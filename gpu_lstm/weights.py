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
)  # torch 2.8 does not trace Weights._fields


class Weights(NamedTuple):
    """One layer, one direction. H hidden units, I input features, P projected features (H without projection)."""

    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, P]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H], to the gates i, f and o

    def present(self) -> list[Tensor]:
        """Those that are there, in torch's order."""
        return [tensor for tensor in self if tensor is not None]

    def check_sizes(self, features: int, hidden: int, projected: int) -> None:
        """Raise unless every tensor has the size of a layer with I, H and P as given.

        Raises:
            RuntimeError: one has not.
            TypeError: weight_ih or weight_hh is None.
        """
        rows = 4 * hidden
        sizes = (rows, features), (rows, projected), (rows,), (rows,), (projected, hidden), (3 * hidden,)
        for name, tensor, size in zip(NAMES, self, sizes):
            if tensor is None and name in ("weight_ih", "weight_hh"):
                raise TypeError(f"{name} should be a tensor, got: NoneType")
            if tensor is not None and tensor.shape != size:
                raise RuntimeError(f"Expected {name} size {size}, got {list(tensor.shape)}")
        if (self.bias_ih is None) != (self.bias_hh is None):
            raise RuntimeError("bias_ih and bias_hh should be given together")

    def to(self, dtype: torch.dtype) -> "Weights":
        """The same in another dtype; under autocast cast once for all calls of a block."""
        return Weights(*cast(self, dtype))  # type: ignore[arg-type]

    def detached(self, need_gradients: bool) -> "Weights":
        """The same tensors for a computation of its own."""
        return Weights(*(None if t is None else t.detach().requires_grad_(need_gradients) for t in self))  # type: ignore[arg-type]

    # By every field, since torch 2.8 traces neither _replace nor a slice.

    def with_weight_ih(self, weight_ih: Tensor) -> "Weights":
        """The same with another weight_ih."""
        return Weights(weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr, self.weight_peephole)

    def with_weight_hh(self, weight_hh: Tensor) -> "Weights":
        """The same with another weight_hh."""
        return Weights(self.weight_ih, weight_hh, self.bias_ih, self.bias_hh, self.weight_hr, self.weight_peephole)
