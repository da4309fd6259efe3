"""What a module's arguments ask of every call: checked when they are given, read again at each call."""

import numbers
from typing import Any, NamedTuple

REGULARISERS = ("recurrent_dropout", "zoneout", "weight_drop")  # attributes of the modules


class Settings(NamedTuple):
    """How a stack of layers is called."""

    training: bool
    dropout: float = 0.0  # between layers; 0 unless training
    residual: bool = False  # a layer whose output is as wide as its input adds the two
    recompute: bool = False  # backends with kernels of their own keep no gates for backward
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and c

    @classmethod
    def of(cls, module: Any) -> "Settings":
        """Those of an LSTM or StackedLSTM as its attributes are now."""
        return cls(
            module.training, module.dropout if module.training else 0.0, getattr(module, "residual", False),
            module.recompute, module.recurrent_dropout, of_h_and_c(module.zoneout),
        )  # fmt: skip


def set_regularisers(
    module: Any, recurrent_dropout: float, zoneout: float | tuple[float, float], weight_drop: float
) -> None:
    """The arguments as attributes, checked; zoneout as one number where it is the same for h and c.

    Raises:
        ValueError: no probability.
    """
    for name, value in (("recurrent_dropout", recurrent_dropout), ("weight_drop", weight_drop)):
        if not is_probability(value):
            raise ValueError(
                f"{name} should be a number in range [0, 1] representing the probability of an element being zeroed, "
                f"got {value!r}"
            )
    pair = of_h_and_c(zoneout)
    if len(pair) != 2 or not all(map(is_probability, pair)):
        raise ValueError(
            "zoneout should be a number in range [0, 1] representing the probability of an element staying as it was, "
            f"or a pair of them for h and c, got {zoneout!r}"
        )
    h, c = map(float, pair)
    module.recurrent_dropout, module.weight_drop = float(recurrent_dropout), float(weight_drop)
    module.zoneout = h if h == c else (h, c)


def is_probability(value: object) -> bool:
    """Whether it is a number from 0 to 1."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def of_h_and_c(zoneout: float | tuple[float, float]) -> tuple[float, float]:
    """The module's attribute as a pair."""
    return zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)


def regulariser_of(module: Any) -> str | None:
    """The name of what regularises the recurrence of a call, if anything does."""
    if any(of_h_and_c(module.zoneout)):
        return "zoneout"
    return "recurrent_dropout" if module.training and module.recurrent_dropout else None
