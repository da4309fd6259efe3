"""LSTM: a drop-in for torch.nn.LSTM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..call.checks import check_bool, check_unprojected
from ..call.choices import Backend, BackendName
from ..call.options import Options, options_of
from ..call.prepare import prepare
from ..call.weights import PEEPHOLES, State
from ..dispatch.run import run
from .arguments import NOT_OF_TORCH, Called, no_mask, norms_of, repr_of, scriptable
from .recurrent import Recurrent
from .tracing import traced
from .variants import OF_LAYERS, HasVariants, weights_of

# torch's classes are bound above, when this module is imported: `torch.nn.LSTM = gpu_lstm.LSTM` changes nothing here.


class LSTM(Recurrent, HasVariants, RNNBase):
    """A drop-in for torch.nn.LSTM: the same arguments, parameters, initial weights, results and errors.

    Each layer computes, at every step, with gates in the order i, f, g, o::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      f, o likewise
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)
        c' = f c + i g          h' = o tanh(c'), or W_hr (o tanh(c')) if proj_size > 0

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers on top of each other, L. Default: 1
        bias: whether there are bias_ih and bias_hh. Default: True
        batch_first: input and output are (N, T, features), not (T, N, features); states are not affected, and
            neither is unbatched input. Default: False
        dropout: probability of zeroing an element of the output of every layer but the last, when training.
            Default: 0
        bidirectional: a second direction runs from the end to the start; D = 2. Default: False
        proj_size: if > 0, h has this many features. Default: 0
        device, dtype: of the parameters.
        backend: "auto", "triton", "cupy", "torch" or "reference". Default: as chosen by `gpu_lstm.backend` or the
            environment variable GPU_LSTM_BACKEND, else "auto".
        recompute: save only h and c for backward, and recompute the gates with one product over all steps: about a
            third of the memory. On the backends "triton" and "cupy". Default: False
        recurrent_dropout: when training, probability of zeroing an element of h before the product with W_hh, the same
            for all gates and steps of a call (Gal & Ghahramani, 2016). Default: 0
        zoneout: probability that an element of a state stays as it was before the step, drawn again for every step
            (Krueger et al., 2017): a pair for h and c, or one for both. In eval() the expectation. Default: 0
        weight_drop: when training, probability of zeroing an element of W_hh, the same for all steps of a call
            (Merity et al., 2018). Default: 0
        peepholes: gates depend on the cell state of their own unit (Gers & Schmidhuber, 2000). Parameters
            weight_peephole_l{k} and, if bidirectional, weight_peephole_l{k}_reverse: p_i, p_f and p_o, (3H,). Default:
            False. With them, before the gates are computed::

                z_i += p_i c      z_f += p_f c      z_o += p_o c'

        layer_norm: normalise W_ih x, W_hh h and c (Ba, Kiros & Hinton, 2016), or those of "ih", "hh" and "c" that are
            named. Parameters gain_ih_l{k} and gain_hh_l{k} (4H,), gain_c_l{k} and, if `bias`, bias_c_l{k} (H,), each
            with _reverse if bidirectional; gains are initially one and bias_c zero. Not with proj_size. Default:
            False. With it, where LN(v) = gain (v - mean(v)) / sqrt(var(v) + 1e-5)::

                z = LN(W_ih x) + b_ih + LN(W_hh h) + b_hh      h' = o tanh(LN(c') + bias_c)

    Recurrent dropout, zoneout, peepholes and layer norms run on the backends "triton" and "reference"; "auto" chooses
    between these two. See `forward` for calls.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM for its arguments, in its words; ValueError for an unknown backend, a
            regulariser that is not a probability, or a layer norm of something else or with proj_size; TypeError for
            `recompute` or `peepholes` that is not a bool. `dropout` and these, except `peepholes` and `layer_norm`, may
            be set later as attributes, and raise the same errors then.

    Example::

        lstm = gpu_lstm.LSTM(10, 20, num_layers=2)
        output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        backend: BackendName | Backend | None = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False,
    ) -> None:  # fmt: skip
        check_bool(PEEPHOLES, peepholes)
        norms = norms_of(layer_norm)
        check_unprojected(bool(norms), proj_size)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        self._make(
            "LSTM", (*sizes, device, dtype), backend=backend, recompute=recompute, recurrent_dropout=recurrent_dropout,
            zoneout=zoneout, weight_drop=weight_drop,
        )  # fmt: skip
        for suffix in [name.removeprefix("weight_hh") for name, _ in self.named_parameters() if "weight_hh" in name]:
            self._add_variants(suffix, peepholes, norms)

    if TYPE_CHECKING:
        __call__: Called[State, State]

    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None, *, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: State | None = None, mask: None = None,
    ) -> tuple[Tensor | PackedSequence, State]:  # fmt: skip
        """Run all layers over all steps. P = proj_size or, if 0, H; D = 2 if bidirectional, else 1.

        Args:
            input: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0), (D*L, N, P) and (D*L, N, H), unbatched without N. Default: zeros.
            lengths: (N,), unbatched (). int32 or int64 on the input's device, each from 0 to T, in any order.
                Default: T.
            resets: (T, N), with batch_first (N, T), unbatched (T,). bool.
            reset_states: (h, c) that resets set instead of zeros: one per sequence, as hx, or one per step, of which
                only those at resets are used: (D*L, T, N, P) and (D*L, T, N, H), with batch_first (D*L, N, T, ...),
                unbatched (D*L, T, ...). Gradients flow into them. On the backends "triton", "cupy" and "reference".
            mask: None. TorchRL's LSTMModule passes one to what is not a torch.nn.LSTM: give it a compat.LSTM.

        ``lengths`` replaces packing: nothing is sorted or copied, and padding, NaN included, never affects results or
        gradients. ``resets`` zeroes the states before the steps where it is True, as at the start of an episode; one at
        t separates time t from time t - 1, for both directions. With ``reset_states`` the forward direction begins step
        t with the state given for t, and the reverse one step t - 1, each from its own rows.

        Returns:
            output: as the input, with D*P features; zero past the end of a sequence.
            (h_n, c_n): as h_0 and c_0; the states after the last step of each sequence. In half precision c_0 may be
            float32, as the kernels keep it, and then so is c_n: a sequence in pieces gives the results of the whole.

        Raises:
            ValueError, RuntimeError, TypeError: as torch.nn.LSTM, in its words. ValueError for lengths, resets or
                reset_states of a wrong shape, dtype or value (on CUDA values are asserted on the device), lengths
                with a PackedSequence, reset_states without resets, or a chosen backend that does not support
                these, recurrent dropout, zoneout or peepholes. TypeError for a mask.
            ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
        """
        if type(input) is not Tensor:
            instead = traced(self, input, hx, lengths=lengths, resets=resets, reset_states=reset_states, mask=mask)
            if instead is not None:
                return instead
        if mask is not None:
            raise TypeError(no_mask("LSTM"))
        options = self._options()
        call = prepare(options, weights_of(self, options.names), input, hx, lengths, resets, reset_states)
        y, states = run(call)
        return call.form.output(y), call.states_out(states)

    def _options(self) -> Options:
        """From the attributes as they are now."""
        sizes = (self.hidden_size,) * self.num_layers
        return options_of(
            "LSTM", sizes, self._peepholes, self._norms, *[getattr(self, name) for name in OF_LAYERS], self.proj_size
        )

    # The rest of torch.nn.LSTM's public methods, which RNNBase has for a single state only.
    get_expected_cell_size = TorchLSTM.get_expected_cell_size
    check_forward_args = TorchLSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = TorchLSTM.permute_hidden  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """As torch.nn.LSTM, and our own arguments that are not at their defaults."""
        return RNNBase.extra_repr(self) + repr_of(self, ("recompute", *NOT_OF_TORCH))

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self, TorchLSTM)
