"""GRU: a drop-in for torch.nn.GRU."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import GRU as TorchGRU
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..call.choices import Backend, BackendName
from ..call.options import Options, options_of
from ..call.prepare import prepare
from ..dispatch.run import run
from .arguments import REGULARISERS, Called, check_zoneout_of_one_state, no_mask, repr_of, scriptable
from .recurrent import Recurrent
from .tracing import traced
from .variants import OF_LAYERS, weights_of


class GRU(Recurrent, RNNBase):
    """A drop-in for torch.nn.GRU: the same arguments, parameters, initial weights, results and errors.

    Each layer computes, at every step, with rows of weights in the order r, z, n (Cho et al., 2014, with the reset gate
    after the product, as torch.nn.GRU, cuDNN and Keras with reset_after=True have it)::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z likewise
        n = tanh   (W_in x + b_in + r (W_hn h + b_hn))
        h' = (1 - z) n + z h

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM.
        backend, recompute, recurrent_dropout, weight_drop: as for LSTM.
        zoneout: as for LSTM, of the one state. Default: 0

    There is no projection, no peepholes and no layer norm. See `forward` for calls.

    Raises:
        ValueError, TypeError: as torch.nn.GRU for its arguments, in its words; ValueError for an unknown backend or a
            regulariser that is not a probability; TypeError for `recompute` that is not a bool. `dropout` and these may
            be set later as attributes, and raise the same errors then.

    Example::

        gru = gpu_lstm.GRU(10, 20, num_layers=2)
        output, h_n = gru(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    zoneout: float

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, recompute: bool = False,
        recurrent_dropout: float = 0.0, zoneout: float = 0.0, weight_drop: float = 0.0, proj_size: None = None,
    ) -> None:  # fmt: skip
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")  # torch's words
        check_zoneout_of_one_state(zoneout)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
        self._make(
            "GRU", (*sizes, device, dtype), backend=backend, recompute=recompute, recurrent_dropout=recurrent_dropout,
            zoneout=zoneout, weight_drop=weight_drop,
        )  # fmt: skip

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "zoneout":
            check_zoneout_of_one_state(value)
        super().__setattr__(name, value)

    if TYPE_CHECKING:
        __call__: Called[Tensor, Tensor]

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: Tensor | None = None, mask: None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:  # fmt: skip
        """Run all layers over all steps. D = 2 if bidirectional, else 1.

        Args:
            input, lengths, resets, mask: as for `LSTM.forward`.
            hx: h_0, (D*L, N, H), unbatched without N. Default: zeros.
            reset_states: h that resets set instead of zeros: one per sequence, as hx, or one per step, (D*L, T, N, H),
                with batch_first (D*L, N, T, H), unbatched (D*L, T, H). As for `LSTM.forward`.

        Returns:
            output: as the input, with D*H features; zero past the end of a sequence.
            h_n: as h_0; the states after the last step of each sequence. In half precision h_0 may be float32, as the
                kernels keep it, and then so is h_n: a sequence in pieces gives the results of the whole.

        Raises:
            ValueError, RuntimeError, TypeError: as torch.nn.GRU, in its words; else as `LSTM.forward`.
        """
        if type(input) is not Tensor:
            instead = traced(self, input, hx, lengths=lengths, resets=resets, reset_states=reset_states, mask=mask)
            if instead is not None:
                return instead
        if mask is not None:
            raise TypeError(no_mask("GRU"))
        options = self._options()
        call = prepare(options, weights_of(self, options.names), input, hx, lengths, resets, reset_states)
        y, states = run(call)
        return call.form.output(y), call.states_out(states)

    def _options(self) -> Options:
        """From the attributes as they are now."""
        sizes = (self.hidden_size,) * self.num_layers
        return options_of("GRU", sizes, False, (), *[getattr(self, name) for name in OF_LAYERS])

    def extra_repr(self) -> str:
        """As torch.nn.GRU, and our own arguments that are not at their defaults."""
        return RNNBase.extra_repr(self) + repr_of(self, ("recompute", *REGULARISERS))

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self, TorchGRU)
