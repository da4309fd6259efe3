"""StackedLSTM: layers of different sizes."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..call.checks import check_bool
from ..call.choices import Backend, BackendName
from ..call.options import Options, options_of
from ..call.prepare import prepare
from ..call.weights import PEEPHOLES, State, Weights
from ..dispatch.run import run
from .arguments import REGULARISERS, Called, Checked, check_size, layer_sizes, norms_of
from .lstm import LSTM
from .tracing import traced
from .variants import OF_LAYERS, weights_of


class StackedLSTM(Checked, nn.Module):
    """LSTM layers of different sizes on top of each other, with one pair of states per layer.

    Layer k, an LSTM in ``layers``, has hidden_sizes[k] units; its input is the output of layer k - 1. A stack of equal
    sizes gives the results of an LSTM with the same weights.

    Args:
        input_size: features of the input, I.
        hidden_sizes: hidden units of each layer, H_k.
        bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM.
        backend, recompute, recurrent_dropout, zoneout, weight_drop, peepholes, layer_norm: as for LSTM.
        residual: add a layer's input to its output wherever both have the same number of features (before dropout).
            At least one layer must allow it. Default: False

    See `forward` for calls.

    Raises:
        ValueError, TypeError: as LSTM; hidden_sizes that is not a sequence of ints, or empty; `residual` that is not a
            bool, or True where no layer allows it.

    Example::

        stack = gpu_lstm.StackedLSTM(6, [32, 16], batch_first=True)
        output, [(h1, c1), (h2, c2)] = stack(torch.randn(2, 3, 6))
    """

    # On the class, so that modules pickled by older versions have them.
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0

    def __init__(
        self, input_size: int, hidden_sizes: Sequence[int], bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, residual: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        backend: BackendName | Backend | None = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_bool(PEEPHOLES, peepholes)
        norms_of(layer_norm)
        # All arguments are checked before initial weights are drawn.
        sizes = layer_sizes(hidden_sizes)
        check_size("input_size", input_size)
        for name, flag in dict(batch_first=batch_first, bidirectional=bidirectional, residual=residual).items():
            check_bool(name, flag)
        directions = 2 if bidirectional else 1
        layer_inputs = [input_size, *(directions * size for size in sizes[:-1])]
        outputs = [directions * size for size in sizes]
        if residual and not any(i == o for i, o in zip(layer_inputs, outputs)):
            raise ValueError(
                "residual=True needs a layer whose output is as wide as its input, "
                f"got inputs of {layer_inputs} and outputs of {outputs} features"
            )
        self.input_size, self.hidden_sizes, self.bias, self.batch_first = input_size, sizes, bias, batch_first
        self.dropout, self.bidirectional, self.residual = dropout, bidirectional, residual
        self.backend, self.recompute = backend, recompute  # type: ignore[assignment]  # becomes the backend's name
        self.recurrent_dropout, self.zoneout, self.weight_drop = recurrent_dropout, zoneout, weight_drop
        if self.dropout > 0 and len(sizes) == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers=1",
                stacklevel=2,
            )
        shared: Any = dict(bias=bias, bidirectional=bidirectional, device=device, dtype=dtype, peepholes=peepholes)
        self.layers = nn.ModuleList(
            LSTM(features, size, layer_norm=layer_norm, **shared) for features, size in zip(layer_inputs, sizes)
        )

    @property
    def peepholes(self) -> bool:
        """As for LSTM."""
        return cast(LSTM, self.layers[0]).peepholes

    @property
    def layer_norm(self) -> bool | tuple[str, ...]:
        """As for LSTM."""
        return cast(LSTM, self.layers[0]).layer_norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "residual":
            check_bool(name, value)
        super().__setattr__(name, value)

    if TYPE_CHECKING:
        __call__: Called[Sequence[State], list[State]]

    def forward(
        self, input: Tensor | PackedSequence, hx: Sequence[State] | None = None, *, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: Sequence[State] | None = None,
    ) -> tuple[Tensor | PackedSequence, list[State]]:  # fmt: skip
        """Run all layers over all steps. D = 2 if bidirectional, else 1.

        Args:
            input, lengths, resets: as for `LSTM.forward`.
            hx: [(h, c), ...], one pair per layer, each (N, H_k), or (2, N, H_k) if bidirectional; unbatched without N.
                Default: zeros.
            reset_states: as for `LSTM.forward`, one pair per layer, each as in hx, or with (T, N) or (N, T) for N.

        Returns:
            output: as the input, with D * H_k features of the last layer; zero past the end of a sequence.
            states: as hx, after the last step of each sequence.

        Raises:
            ValueError, RuntimeError, ImportError, TypeError: as `LSTM.forward`; TypeError for hx that is not a list of
                pairs, such as torch's (h_0, c_0); RuntimeError for a wrong number of them, or wrong sizes.
        """
        if type(input) is not Tensor:
            instead = traced(self, input, hx, lengths=lengths, resets=resets, reset_states=reset_states)
            if instead is not None:
                return instead
        call = prepare(self._options(), self._weights(), input, hx, lengths, resets, reset_states)
        y, states = run(call)
        return call.form.output(y), call.states_out(states)

    def _options(self) -> Options:
        """From the attributes as they are now."""
        first, sizes = cast(LSTM, self.layers[0]), tuple(self.hidden_sizes)
        of_layers = [getattr(self, name) for name in OF_LAYERS]
        return options_of("StackedLSTM", sizes, first._peepholes, first._norms, *of_layers, 0, self.residual)

    def _weights(self) -> list[list[Weights]]:
        """[L][D], as the layers have them now."""
        return [weights_of(module, (names,))[0] for module, names in zip(self.layers, self._options().names)]

    def extra_repr(self) -> str:
        """The arguments that were not left at their defaults."""
        parts = [f"{self.input_size}, {self.hidden_sizes}"]
        defaults = dict(
            bias=True, batch_first=False, dropout=0.0, bidirectional=False, residual=False, backend=None,
            recompute=False, **dict.fromkeys(REGULARISERS, 0.0), peepholes=False, layer_norm=False,
        )  # fmt: skip
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)
