"""What regularises a layer: each knows all of itself, and REGULARISERS of noise.py lists them."""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import numbers
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    changes_weights = False
    tensors: tuple[str, ...] = ()  # of kernels/tensors.py, that a layer and direction has of it
    backends: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # what can run it, or it beside something else, in words

    def accepted(self, value: Any, cell: Cell) -> Any:
        """A user's value, checked."""
        if not is_probability(value):
            text = "should be a number in range [0, 1] representing the probability of an element being zeroed"
            raise ValueError(f"{self.name} {text}" + f", got {value!r}" * (not self.of_torch))  # torch's own words
        return float(value)

    def rate(self, value: Any, training: bool) -> Any:
        """What a call uses of the value; false where it is off."""
        return value if training else 0.0

    def feature(self, norms: tuple[str, ...]) -> str | None:
        """Which entry of `backends` holds in a layer with these norms; None: all can run it."""
        return self.name if self.backends else None

    def flags(self, rate: Any, training: bool) -> dict[str, Any]:
        """Of a Problem, about its tensors in the time loop."""
        return {}

    def draw(self, rate: Any, of: Drawing) -> tuple[Tensor | None, ...]:
        """Its tensors for one call."""
        return ()

    def weight_hh(self, weight: Tensor, rate: Any) -> Tensor:
        """W_hh of one call."""
        return weight

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        """Factors of h in the product with W_hh; so also the gradient of h, from that of the product's operand."""
        return h

    def added(self, noise: Noise) -> Tensor | None:
        """What is added to the scaled h, [T, B, P], by time: its product with W_hh is known before the time loop."""
        return None

    def after(self, before: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], noise: Noise) -> tuple[Tensor, Tensor]:
        """(h, c) after a step that computed `new` from those `before`; `noise` is that of the step."""
        return new


def is_probability(value: object) -> bool:
    """Whether `value` is a number from 0 to 1."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


class Dropout(Regulariser):
    """Of each layer's output but the last one's: drawn in noise.py, applied in backends/layers.py."""

    name, of_torch = "dropout", True


class RecurrentDropout(Regulariser):
    """Of h in the product with W_hh, the same at every step (Gal & Ghahramani, 2016): dropout_h, 0 or 1 / (1 - p)."""

    name, tensors = "recurrent_dropout", ("dropout_h",)
    backends: ClassVar = {name: ("triton", "reference")}

    def flags(self, rate: float, training: bool) -> dict[str, Any]:
        return {"dropout_h": True}

    def draw(self, rate: float, of: Drawing) -> tuple[Tensor | None, ...]:
        return (F.dropout(torch.ones(of.sizes[1:], dtype=of.dtype, device=of.device), rate),)

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        return h if noise.dropout_h is None else noise.dropout_h * h


class Zoneout(Regulariser):
    """Elements of h and of c stay as they were (Krueger et al., 2017); in eval() the expectation, of rates []."""

    name, tensors = "zoneout", ("zoneout_h", "zoneout_c")
    backends: ClassVar = {name: ("triton", "reference")}

    def accepted(self, value: Any, cell: Cell) -> Any:
        if len(cell.states) == 1 and isinstance(value, tuple):
            raise ValueError(
                f"zoneout of a {cell.name.upper()} should be one number in range [0, 1], for its one state, "
                f"got {value!r}"
            )
        pair = value if isinstance(value, tuple) else (value, value)
        if len(pair) != 2 or not all(map(is_probability, pair)):
            raise ValueError(
                "zoneout should be a number in range [0, 1] representing the probability of an element staying as "
                f"it was, or a pair of them for h and c, got {value!r}"
            )
        h, c = map(float, pair)
        return h if h == c else (h, c)

    def rate(self, value: Any, training: bool) -> Any:
        pair = value if isinstance(value, tuple) else (value, value)
        return pair if pair != (0, 0) else None

    def flags(self, rate: tuple[float, float], training: bool) -> dict[str, Any]:
        return {name: 3 if training else 0 for name, p in zip(self.tensors, rate) if p}

    def draw(self, rate: tuple[float, float], of: Drawing) -> tuple[Tensor | None, ...]:
        steps, batch, width = of.sizes

        def stays(probability: float, features: int) -> Tensor | None:
            if not probability:
                return None
            if of.training:
                return torch.rand(steps, batch, features, dtype=torch.float32, device=of.device) < probability
            return torch.full((), probability, dtype=torch.promote_types(of.dtype, torch.float32), device=of.device)

        h = stays(rate[0], width)
        return h, h if of.one_state else stays(rate[1], of.hidden)

    def after(self, before: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], noise: Noise) -> tuple[Tensor, Tensor]:
        (h, c), (h_next, c_next) = before, new
        if noise.zoneout_c is not None:
            c_next = noise.zoneout_c * c + (1 - noise.zoneout_c) * c_next
        if noise.zoneout_h is not None:
            h_next = noise.zoneout_h * h + (1 - noise.zoneout_h) * h_next
        return h_next, c_next


class WeightDrop(Regulariser):
    """DropConnect on W_hh (Merity et al., 2018): the same at all steps of a call."""

    name, changes_weights = "weight_drop", True

    def weight_hh(self, weight: Tensor, rate: float) -> Tensor:
        return F.dropout(weight, rate)
