"""StackedLSTM and StackedGRU: layers of different sizes."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..call import roles
from ..call.checks import check_bool, check_heads, check_positive
from ..call.choices import Backend, BackendName
from ..call.options import Options, options_of
from ..call.regularisers import REGULARISER_NAMES
from ..call.weights import LAYER_NORM, PEEPHOLES, State, Weights
from ..dispatch.route import run_call
from ..kernels.private import fx_is_tracing
from .arguments import OF_LAYERS, Called, HasVariants, Layers, norms_of, repr_of, weights_now
from .recurrent import GRU, LSTM
from .tracing import traced


class Stack(Layers, nn.Module):
    """What StackedLSTM and StackedGRU share. A state of a layer is a pair (h, c), or h alone."""

    input_size: int
    hidden_sizes: list[int]
    dropout: float
    _role = roles.Stack
    _layer: type[nn.Module]

    def _make(self, given: dict[str, Any]) -> None:
        """Make a stack from its constructor's locals(). All arguments are checked before initial weights are drawn."""
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
            setattr(self, name, value)  # the backend becomes its name
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

    def forward(
        self, input: Tensor | PackedSequence, hx: Sequence[Any] | None = None, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: Sequence[Any] | None = None,
    ) -> tuple[Tensor | PackedSequence, list[Any]]:  # fmt: skip
        """Run all layers over all steps. D = 2 if bidirectional, else 1.

        Args:
            input, lengths, resets: as for `LSTM.forward`.
            hx: [(h, c), ...], one pair per layer, each (N, H_k), or (2, N, H_k) if bidirectional; unbatched without N.
                For a StackedGRU [h, ...]. Default: zeros.
            reset_states: as for `LSTM.forward`, one state per layer, each as in hx, or with (T, N) or (N, T) for N.

        Returns:
            output: as the input, with D * H_k features of the last layer; zero past the end of a sequence.
            states: as hx, after the last step of each sequence.

        Raises:
            ValueError, RuntimeError, ImportError, TypeError: as `LSTM.forward`; TypeError for hx that is not such
                a list, such as torch's (h_0, c_0); RuntimeError for a wrong number of them, or wrong sizes.
        """
        if type(input) is not Tensor or fx_is_tracing():
            instead = traced(self, input, hx, lengths=lengths, resets=resets, reset_states=reset_states)
            if instead is not None:
                return instead
        return run_call(self._request(input, hx, lengths, resets, reset_states))

    def _options(self) -> Options:
        sizes, of_all = tuple(self.hidden_sizes), [getattr(self, name) for name in OF_LAYERS]
        rates = tuple([getattr(self, name, 0.0) for name in REGULARISER_NAMES])
        return options_of(self._cell.name, self._role, sizes, *of_all, rates, 0, self.residual)

    def _weights(self, names: tuple) -> list[list[Weights]]:
        return [weights_now(module, (of_layer,))[0] for module, of_layer in zip(self.layers, names)]

    def extra_repr(self) -> str:
        changed = repr_of(self, "bias", "batch_first", "dropout", "bidirectional", "residual")
        return f"{self.input_size}, {self.hidden_sizes}{changed}"


class StackedLSTM(Stack, HasVariants):
    """LSTM layers of different sizes on top of each other, with one pair of states per layer.

    Layer k, an LSTM in ``layers``, has hidden_sizes[k] units; its input is the output of layer k - 1. A stack of equal
    sizes gives the results of an LSTM with the same weights. See `forward` for calls.

    Args:
        input_size: features of the input, I.
        hidden_sizes: hidden units of each layer, H_k.
        bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM.
        backend, recompute, recurrent_dropout, zoneout, weight_drop, peepholes, layer_norm, heads: as for LSTM.
        residual: add a layer's input to its output wherever both have the same number of features (before dropout).
            At least one layer must allow it. Default: False

    Raises:
        ValueError, TypeError: as LSTM; hidden_sizes that is not a sequence of ints, or empty; `residual` that is not a
            bool, or True where no layer allows it.

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
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        backend: BackendName | Backend | None = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())


class StackedGRU(Stack):
    """GRU layers of different sizes on top of each other, with one state per layer. See `forward` for calls.

    Args:
        input_size, hidden_sizes, bias, batch_first, dropout, bidirectional, residual, device, dtype: as for
            StackedLSTM, of layers that are a GRU each.
        backend, recompute, recurrent_dropout, zoneout, weight_drop, heads: as for GRU.

    Raises:
        ValueError, TypeError: as StackedLSTM, and as GRU.

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
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        backend: BackendName | Backend | None = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float = 0.0, weight_drop: float = 0.0, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())
