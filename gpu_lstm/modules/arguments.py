"""The arguments of the modules: checked when they are given or set."""

import numbers
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, overload

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..call.checks import check_bool
from ..call.choices import parse_backend_name
from ..call.options import NORMS
from ..call.weights import LAYER_NORM, PEEPHOLES

REGULARISERS = ("recurrent_dropout", "zoneout", "weight_drop")  # attributes of the modules
NOT_OF_TORCH = (*REGULARISERS, PEEPHOLES, LAYER_NORM)  # what torch.nn.LSTM cannot do, if it is on


def accepted(name: str, value: Any) -> Any:
    """What an argument becomes as the attribute `name` of a module, checked, whether it is given at once or set later.

    Attributes that are none of ours are taken as they are.

    Raises:
        ValueError: no probability, or an unknown backend.
        TypeError: `recompute` that is no bool.
    """
    match name:
        case "backend":
            return None if value is None else parse_backend_name(value)
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


def norms_of(layer_norm: object) -> tuple[str, ...]:
    """The argument of the modules, checked: those of NORMS that it asks for, in their order.

    Raises:
        TypeError, ValueError: neither a bool nor a tuple or list of some of NORMS.
    """
    if isinstance(layer_norm, bool):
        return NORMS if layer_norm else ()
    if not isinstance(layer_norm, (tuple, list)):
        raise TypeError(f"{LAYER_NORM} should be of type bool, or a tuple of names, got: {type(layer_norm).__name__}")
    if not all(norm in NORMS for norm in layer_norm):
        known = ", ".join(map(repr, NORMS))
        raise ValueError(f"{LAYER_NORM} should be a bool, or name some of {known}, got {layer_norm!r}")
    return tuple(norm for norm in NORMS if norm in layer_norm)


def layer_sizes(hidden_sizes: Sequence[int]) -> list[int]:
    """The argument of StackedLSTM as a list, checked."""
    if not isinstance(hidden_sizes, Sequence) or isinstance(hidden_sizes, str | bytes):
        raise TypeError(f"hidden_sizes should be a sequence of ints, got: {type(hidden_sizes).__name__}")
    if not hidden_sizes:
        raise ValueError("hidden_sizes must have at least one layer")
    for size in hidden_sizes:
        check_size("hidden_size", size)
    return list(hidden_sizes)


def check_size(name: str, size: object) -> None:
    """Raise, in torch's words, unless it is a positive int."""
    if not isinstance(size, int):
        raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{name} must be greater than zero")


class Checked:
    """A module whose attributes are held to what its arguments are held to, when they are set later, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, accepted(name, value))


Given = TypeVar("Given", contravariant=True)
Returned = TypeVar("Returned", covariant=True)


class Called(Protocol[Given, Returned]):
    """The types of `forward`, for a module that is called: nn.Module does not hand them on."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Given | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_states: Given | None = None,
    ) -> tuple[Tensor, Returned]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Given | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        reset_states: Given | None = None,
    ) -> tuple[PackedSequence, Returned]: ...


def scriptable(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """What torch.jit.script gets in the place of a module."""
    for name in NOT_OF_TORCH:
        if value := getattr(module, name, False):
            raise ValueError(
                f"the {type(module).__name__} has {name}={value!r}, and would be scripted as a torch.nn."
                f"{cls.__name__}, which takes none"
            )
    return recast(module, cls)


def recast(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """`module` as an instance of `cls`, which has the same parameters: the same Parameter objects, hooks, flags.

    What torch's classes have not is left behind, regularisers only where they are off.
    """
    twin = cls.__new__(cls)
    state = module.__dict__.copy()
    state.pop("_flat_weights", None)  # torch's cache; ours has none
    state.pop("_compiled_call_impl", None)  # of Module.compile(): it would go on calling `module`
    off = [name for name in REGULARISERS if not state.get(name)]
    for ours in ("backend", "recompute", *off):
        state.pop(ours, None)
    for own in ("_parameters", "_buffers", "_modules"):
        state[own] = state[own].copy()
    twin.__dict__.update(state)
    if isinstance(twin, RNNBase):
        twin._init_flat_weights()
    return twin


def repr_of(module: nn.Module, names: Sequence[str]) -> str:
    """The backend, if one was chosen, and of other arguments those that are on."""
    backend: Any = module.backend
    text = "" if backend is None else f", backend={backend!r}"
    return text + "".join(f", {name}={getattr(module, name)!r}" for name in names if getattr(module, name))
