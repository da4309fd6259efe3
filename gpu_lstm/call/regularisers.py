"""What regularises a layer: subclasses that know all about themselves, and the list of all that there are."""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import numbers
from typing import Any, NamedTuple

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
    tensors: tuple[str, ...] = ()  # its tensors for a layer and direction, in kernels/tensors.py

    def overrides(self, method: str) -> bool:
        """Whether its class has this method of its own."""
        return getattr(type(self), method) is not getattr(Regulariser, method)

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
    """Whether `value` is a number from 0 to 1, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


class Dropout(Regulariser):
    """On each layer's output but the last one's: drawn in noise.py, applied in backends/layer_loop.py."""

    name, of_torch = "dropout", True


class RecurrentDropout(Regulariser):
    """On h in the product with W_hh, the same at every step (Gal & Ghahramani, 2016): dropout_h, 0 or 1 / (1 - p)."""

    name, tensors = "recurrent_dropout", ("dropout_h",)

    def flags(self, rate: float, training: bool) -> dict[str, Any]:
        return {"dropout_h": True}

    def draw(self, rate: float, of: Drawing) -> tuple[Tensor | None, ...]:
        return (F.dropout(torch.ones(of.sizes[1:], dtype=of.dtype, device=of.device), rate),)

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        return h if noise.dropout_h is None else noise.dropout_h * h


class Zoneout(Regulariser):
    """Elements of h and of c stay as they were (Krueger et al., 2017). In eval() its tensors are the two rates, []."""

    name, tensors = "zoneout", ("zoneout_h", "zoneout_c")

    def accepted(self, value: Any, cell: Cell) -> Any:
        name, count = cell.name.upper(), len(cell.states)
        if cell.kept > 1 and value != 0:
            raise ValueError(f"zoneout is not supported by {name}: it would have to choose among {count} states")
        if count == 1 and isinstance(value, tuple):
            one = "one number in range [0, 1], for its one state"
            raise ValueError(f"zoneout of a {name} should be {one}, got {value!r}")
        pair = value if isinstance(value, tuple) else (value, value)
        if len(pair) != 2 or not all(map(is_probability, pair)):
            text = "a number in range [0, 1] representing the probability of an element staying as it was"
            raise ValueError(f"zoneout should be {text}, or a pair of them for h and c, got {value!r}")
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

    name = "weight_drop"

    def weight_hh(self, weight: Tensor, rate: float) -> Tensor:
        return F.dropout(weight, rate)


REGULARISERS: tuple[Regulariser, ...] = (Dropout(), RecurrentDropout(), Zoneout(), WeightDrop())
"""In the order in which they draw, and are applied."""
BY_NAME = {thing.name: thing for thing in REGULARISERS}
REGULARISER_NAMES = tuple(BY_NAME)
OURS = tuple(thing.name for thing in REGULARISERS if not thing.of_torch)
SCALING, AFTER = (tuple(thing for thing in REGULARISERS if thing.overrides(way)) for way in ("scaled", "after"))
REFERENCE_ONLY = tuple(thing.name for thing in (*SCALING, *AFTER) if not thing.overrides("flags"))
"""Those that change the time loop, and no flag of a Problem tells kernels so: only the reference runs them."""
