"""What a module's arguments ask of every call: checked when they are given or set, read again at each call."""

import numbers
from typing import Any, NamedTuple

from .backends import RESET_STATES, parse_name
from .weights import LAYER_NORM, PEEPHOLES

REGULARISERS = ("recurrent_dropout", "zoneout", "weight_drop")  # attributes of the modules
NOT_OF_TORCH = (*REGULARISERS, PEEPHOLES, LAYER_NORM)  # what torch.nn.LSTM cannot do, if it is on


class Settings(NamedTuple):
    """How a stack of layers is called."""

    training: bool
    dropout: float = 0.0  # between layers; 0 unless training
    residual: bool = False  # a layer whose output is as wide as its input adds the two
    recompute: bool = False  # backends with kernels of their own keep no gates for backward
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and c

    @classmethod
    def of(cls, module: Any, residual: bool = False) -> "Settings":
        """Those of an LSTM or StackedLSTM as its attributes are now; only the latter has `residual`."""
        return cls(
            module.training, module.dropout if module.training else 0.0, residual,
            module.recompute, module.recurrent_dropout, of_h_and_c(module.zoneout),
        )  # fmt: skip


def accepted(name: str, value: Any) -> Any:
    """What an argument becomes as the attribute `name` of a module, checked, whether it is given at once or set later.

    Attributes that are none of ours are taken as they are.

    Raises:
        ValueError: no probability, or an unknown backend.
        TypeError: `recompute` that is no bool.
    """
    match name:
        case "backend":
            return None if value is None else parse_name(value)
        case "recompute":
            check_bool(name, value)
        case "dropout" | "recurrent_dropout" | "weight_drop":
            if not is_probability(value):
                raise ValueError(
                    f"{name} should be a number in range [0, 1] representing the probability of an element being zeroed"
                    + (f", got {value!r}" if name != "dropout" else "")  # torch's own words
                )
            return float(value)
        case "zoneout":
            return _zoneout(value)
    return value


def check_bool(name: str, value: object) -> None:
    """Raise TypeError, in torch's words, unless it is one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def _zoneout(value: Any) -> float | tuple[float, float]:
    """One number where it is the same for h and c."""
    pair = of_h_and_c(value)
    if len(pair) != 2 or not all(map(is_probability, pair)):
        raise ValueError(
            "zoneout should be a number in range [0, 1] representing the probability of an element staying as it was, "
            f"or a pair of them for h and c, got {value!r}"
        )
    h, c = map(float, pair)
    return h if h == c else (h, c)


def is_probability(value: object) -> bool:
    """Whether it is a number from 0 to 1."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def of_h_and_c(zoneout: float | tuple[float, float]) -> tuple[float, float]:
    """The module's attribute as a pair."""
    return zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)


def special_of(module: Any, with_reset_states: bool) -> str | None:
    """The name of what a call of an LSTM or StackedLSTM has that not all backends take, for `backends.select`."""
    if any(of_h_and_c(module.zoneout)):
        return "zoneout"
    if module.training and module.recurrent_dropout:
        return "recurrent_dropout"
    if module.layer_norm:
        return LAYER_NORM
    return PEEPHOLES if module.peepholes else RESET_STATES if with_reset_states else None
