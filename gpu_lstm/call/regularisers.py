"""The regularisers of a layer. Each is a subclass of Regulariser with all of its code. REGULARISERS lists them."""

from __future__ import annotations  # torch.compile would fail to evaluate annotations of nested functions

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.cells import Cell
from ..kernels.tensors import Noise
from .weights import State


class Drawing(NamedTuple):
    """The layer and direction for which a regulariser draws its tensors."""

    sizes: tuple[int, int, int]  # T, B, P
    hidden: int  # H
    dtype: torch.dtype  # the dtype that the layer computes in
    device: torch.device
    training: bool
    one_state: bool  # whether the cell's only state is h, and c is h


class Regulariser:
    """The base class of the regularisers. It changes nothing, and each subclass overrides the methods that it needs.

    A module has an attribute of the regulariser's name. It is 0.0 if the regulariser is off.
    """

    name: str
    of_torch = False  # whether torch.nn.LSTM has it, too
    tensors: tuple[str, ...] = ()  # the names of its tensors in kernels/tensors.py

    def overrides(self, method: str) -> bool:
        """Whether the class has its own version of a method."""
        return getattr(type(self), method) is not getattr(Regulariser, method)

    def accepted(self, value: Any, cell: Cell) -> Any:
        """Return a user's value, checked."""
        if not is_probability(value):
            text = "should be a number in range [0, 1] representing the probability of an element being zeroed"
            got = "" if self.of_torch else f", got {value!r}"  # torch's message does not show the value
            raise ValueError(f"{self.name} {text}{got}")
        return float(value)

    def rate(self, value: Any, training: bool) -> Any:
        """Return the rate that a call uses. It is falsy if the regulariser is off."""
        return value if training else 0.0

    def flags(self, rate: Any, training: bool) -> dict[str, Any]:
        """Return the fields of Problem that tell kernels which of its tensors the time loop reads."""
        return {}

    def draw(self, rate: Any, of: Drawing) -> tuple[Tensor | None, ...]:
        """Return its tensors for one call, in the order of `tensors`."""
        return ()

    def weight_hh(self, weight: Tensor, rate: Any) -> Tensor:
        """Return the W_hh that one call uses."""
        return weight

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        """Return h times the factors that apply before the product with W_hh.

        Backward calls it with the gradient of the returned tensor, and gets the gradient of h.
        """
        return h

    def after(self, before: State, new: State, noise: Noise) -> State:
        """Return (h, c) after a step. `before` is the state before the step, `new` the state that the step computed.

        `noise` has the tensors of this step.
        """
        return new


def is_probability(value: object) -> bool:
    """Whether `value` is a number from 0 to 1, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


class Dropout(Regulariser):
    """Dropout on the output of every layer except the last one.

    noise.py draws the masks, and backends/layer_loop.py applies them.
    """

    name, of_torch = "dropout", True


class RecurrentDropout(Regulariser):
    """Dropout on h in the product with W_hh, with the same mask at every step (Gal & Ghahramani, 2016).

    Its tensor dropout_h contains the factors of h, 0 or 1 / (1 - p).
    """

    name, tensors = "recurrent_dropout", ("dropout_h",)

    def flags(self, rate: float, training: bool) -> dict[str, Any]:
        return {"dropout_h": True}

    def draw(self, rate: float, of: Drawing) -> tuple[Tensor | None, ...]:
        return (F.dropout(torch.ones(of.sizes[1:], dtype=of.dtype, device=of.device), rate),)

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        return h if noise.dropout_h is None else noise.dropout_h * h


class Zoneout(Regulariser):
    """Elements of h and c keep their previous values (Krueger et al., 2017).

    In training its tensors are masks, bool [T, B, P] for h and [T, B, H] for c. In eval() they are the two rates, of
    size []. A state whose rate is 0 has None.
    """

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

    def after(self, before: State, new: State, noise: Noise) -> State:
        (h, c), (h_next, c_next) = before, new
        if noise.zoneout_c is not None:
            c_next = noise.zoneout_c * c + (1 - noise.zoneout_c) * c_next
        if noise.zoneout_h is not None:
            h_next = noise.zoneout_h * h + (1 - noise.zoneout_h) * h_next
        return h_next, c_next


class WeightDrop(Regulariser):
    """DropConnect on W_hh, with the same mask at all steps of a call (Merity et al., 2018)."""

    name = "weight_drop"

    def weight_hh(self, weight: Tensor, rate: float) -> Tensor:
        return F.dropout(weight, rate)


REGULARISERS: tuple[Regulariser, ...] = (Dropout(), RecurrentDropout(), Zoneout(), WeightDrop())
"""All regularisers, in the order in which they draw their tensors and are applied."""
BY_NAME = {thing.name: thing for thing in REGULARISERS}
REGULARISER_NAMES = tuple(BY_NAME)
OURS = tuple(thing.name for thing in REGULARISERS if not thing.of_torch)
SCALING, AFTER = (tuple(thing for thing in REGULARISERS if thing.overrides(way)) for way in ("scaled", "after"))
REFERENCE_ONLY = tuple(thing.name for thing in (*SCALING, *AFTER) if not thing.overrides("flags"))
"""The regularisers that change the time loop without a flag in Problem. Kernels do not know them, so that only the
reference supports them."""
