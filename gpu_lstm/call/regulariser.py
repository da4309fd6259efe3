"""What regularises a layer: a subclass that knows all about itself, in the list in regularisers.py."""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.cells import Cell
from ..kernels.tensors import Noise


class Drawing(NamedTuple):
    """What is drawn for: one layer in one direction."""

    sizes: tuple[int, int, int]  # T, B, P
    hidden: int  # H
    dtype: torch.dtype  # that the layer computes in
    device: torch.device
    training: bool
    one_state: bool  # c is h


class Regulariser:
    """One that does nothing; each overrides what it does. Modules have an attribute of its name, 0.0 if it is off."""

    name: str
    of_torch = False  # torch.nn.LSTM has it, too
    tensors: tuple[str, ...] = ()  # its tensors for a layer and direction, in kernels/tensors.py

    def overrides(self, *hooks: str) -> bool:
        """Whether its class has one of these methods of its own."""
        return any([getattr(type(self), hook) is not getattr(Regulariser, hook) for hook in hooks])

    def accepted(self, value: Any, cell: Cell) -> Any:
        """A user's value, checked."""
        if not is_probability(value):
            text = "should be a number in range [0, 1] representing the probability of an element being zeroed"
            got = "" if self.of_torch else f", got {value!r}"  # torch's own words have not
            raise ValueError(f"{self.name} {text}{got}")
        return float(value)

    def rate(self, value: Any, training: bool) -> Any:
        """What a call uses of the value; false where it is off."""
        return value if training else 0.0

    def flags(self, rate: Any, training: bool) -> dict[str, Any]:
        """A Problem's flags for its tensors in the time loop."""
        return {}

    def draw(self, rate: Any, of: Drawing) -> tuple[Tensor | None, ...]:
        """Its tensors for one call."""
        return ()

    def weight_hh(self, weight: Tensor, rate: Any) -> Tensor:
        """W_hh of one call."""
        return weight

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        """h times its factors in the product with W_hh; likewise the gradient of h, from what that product returns."""
        return h

    def after(self, before: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], noise: Noise) -> tuple[Tensor, Tensor]:
        """(h, c) after a step that computed `new` from those `before`; `noise` is that of the step."""
        return new


def is_probability(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1
