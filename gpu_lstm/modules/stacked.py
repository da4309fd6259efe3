"""The modules StackedLSTM and StackedGRU: stacks of layers with different sizes."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..call import roles
from ..call.checks import check_bool, check_heads, check_positive
from ..call.choices import AnyBackend
from ..call.weights import LAYER_NORM, PEEPHOLES, AllWeights, State, weights_now
from .arguments import Called, HasVariants, OverSequences, norms_of, repr_of
from .recurrent import GRU, LSTM


class Stack(OverSequences, nn.Module):
    """The base class of StackedLSTM and StackedGRU. The state of a layer is a pair (h, c), or h alone."""

    input_size: int
    hidden_sizes: list[int]
    dropout: float
    proj_size = 0
    _role = roles.Stack
    _layer: type[nn.Module]

    def _make(self, given: dict[str, Any]) -> None:
        """Initialize the stack from the locals() of its constructor.

        All arguments are checked before the weights are drawn.
        """
        nn.Module.__init__(self)
        del given["self"]
        of_layers = {name: given.pop(name) for name in ("device", "dtype", PEEPHOLES, LAYER_NORM) if name in given}
        given |= {"_peepholes": of_layers.get(PEEPHOLES, False), "_norms": norms_of(of_layers.get(LAYER_NORM, False))}
        sizes = given["hidden_sizes"]
        if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
            raise TypeError(f"hidden_sizes should be a sequence of ints, got: {type(sizes).__name__}")
        if not sizes:
            raise ValueError("hidden_sizes must have at least one layer")
        given["hidden_sizes"] = list(sizes)
        check_positive("input_size", given["input_size"])
        for size in sizes:
            check_positive("hidden_size", size)
            check_heads(given["heads"], size)
        for name in ("batch_first", "bidirectional", "residual"):
            check_bool(name, given[name])
        outputs = [2 * size if given["bidirectional"] else size for size in sizes]
        inputs = [given["input_size"], *outputs[:-1]]
        if given["residual"] and not any(i == o for i, o in zip(inputs, outputs)):
            got = f"inputs of {inputs} and outputs of {outputs} features"
            raise ValueError(f"residual=True needs a layer whose output is as wide as its input, got {got}")
        for name, value in given.items():
            setattr(self, name, value)  # a Backend is stored as its name
        if self.dropout > 0 and len(sizes) == 1:
            adds = "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects"
            got = f"num_layers greater than 1, but got dropout={self.dropout} and num_layers=1"
            warnings.warn(f"{adds} {got}", stacklevel=3)
        of_layers |= {name: given[name] for name in ("bias", "bidirectional", "heads")}
        self.layers = nn.ModuleList([self._layer(i, size, **of_layers) for i, size in zip(inputs, sizes)])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "residual":
            check_bool(name, value)
        super().__setattr__(name, value)

    def _weights(self, names: tuple) -> AllWeights:
        """Return the current weights by layer and direction, [L][D]. See `weights_now` for `names`."""
        return [weights_now(module, (of_layer,))[0] for module, of_layer in zip(self.layers, names)]

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(f"a {type(self).__name__} has no counterpart in torch.nn, and cannot be scripted")

    def extra_repr(self) -> str:
        changed = repr_of(self, "bias", "batch_first", "dropout", "bidirectional", "residual")
        return f"{self.input_size}, {self.hidden_sizes}{changed}"


class StackedLSTM(Stack, HasVariants):
    """Apply LSTM layers of different sizes to a sequence, one on top of the other.

    Layer k is an LSTM in ``layers``. It has hidden_sizes[k] units, and its input is the output of layer k - 1. If all
    sizes are equal, the stack gives the same results as an LSTM with the same weights. A call takes and returns a list
    of states, one pair (h, c) for each layer. See `forward` for calls.

    Args:
        input_size: The number of features in the input, I.
        hidden_sizes: The number of hidden units of each layer, H_k.
        bias, batch_first, dropout, bidirectional, device, dtype: See `LSTM`.
        backend, recompute, recurrent_dropout, zoneout, weight_drop, peepholes, layer_norm, heads: See `LSTM`.
        residual: If True, the input of a layer is added to its output wherever both have the same number of features.
            The sum is computed before dropout. At least one layer must have an output as wide as its input. Default:
            False

    Raises:
        ValueError, TypeError: The same errors as in `LSTM` for the same arguments.
        TypeError: `hidden_sizes` is not a sequence of ints, or `residual` is not a bool.
        ValueError: `hidden_sizes` is empty, or `residual` is True and no layer has an output as wide as its input.

    Example::

        stack = gpu_lstm.StackedLSTM(6, [32, 16], batch_first=True)
        output, [(h1, c1), (h2, c2)] = stack(torch.randn(2, 3, 6))
    """

    _cell, _layer = LSTM._cell, LSTM
    __call__: Called[Sequence[State], list[State]]
    forward: Called[Sequence[State], list[State]]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_sizes: Sequence[int], bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, residual: bool = False,
        device: Device = None, dtype: torch.dtype | None = None, *,
        backend: AnyBackend = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())


class StackedGRU(Stack):
    """Apply GRU layers of different sizes to a sequence, one on top of the other.

    A call takes and returns a list of states, one h for each layer. See `forward` for calls.

    Args:
        input_size, hidden_sizes, bias, batch_first, dropout, bidirectional, residual, device, dtype: See `StackedLSTM`.
            Each layer is a GRU.
        backend, recompute, recurrent_dropout, zoneout, weight_drop, heads: See `GRU`.

    Raises:
        ValueError, TypeError: The same errors as in `StackedLSTM` and `GRU` for the same arguments.

    Example::

        stack = gpu_lstm.StackedGRU(6, [32, 16], batch_first=True)
        output, [h1, h2] = stack(torch.randn(2, 3, 6))
    """

    _cell, _layer = GRU._cell, GRU
    __call__: Called[Sequence[Tensor], list[Tensor]]
    forward: Called[Sequence[Tensor], list[Tensor]]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_sizes: Sequence[int], bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, residual: bool = False,
        device: Device = None, dtype: torch.dtype | None = None, *,
        backend: AnyBackend = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float = 0.0, weight_drop: float = 0.0, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())
