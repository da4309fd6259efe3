"""LSTM: a drop-in for torch.nn.LSTM."""

from collections.abc import Sequence

import torch
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import RNNBase

from ..call.choices import Backend, BackendName
from ..call.weights import State
from ..kernels.cells import LSTM as CELL
from .arguments import Called
from .recurrent import Recurrent
from .variants import HasVariants

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

        heads: groups of H / heads units, of which W_hh connects each with itself alone: weight_hh_l{k} is (4H, H /
            heads). Its rows are torch's, each with the weights of the units of its own head, drawn like those of an
            LSTM with H / heads units. Divides `hidden_size`. Not with proj_size, nor with a layer norm of "hh" or
            "c". Default: 1

    Recurrent dropout, zoneout, peepholes and layer norms run on the backends "triton", "cupy" and "reference"; "auto"
    chooses among these. See `forward` for calls.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM for its arguments, in its words; ValueError for an unknown backend, a
            regulariser that is not a probability, or a layer norm of something else or with proj_size, or heads that
            do not go with the rest; TypeError for `recompute` or `peepholes` that is not a bool. `dropout` and these,
            except `peepholes`, `layer_norm` and `heads`, may be set later as attributes, and raise the same errors
            then.

    Example::

        lstm = gpu_lstm.LSTM(10, 20, num_layers=2)
        output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    _cell, _torchs = CELL, TorchLSTM
    __call__: Called[State, State]
    forward: Called[State, State]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        backend: BackendName | Backend | None = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())

    # The rest of torch.nn.LSTM's public methods, which RNNBase has for a single state only.
    get_expected_cell_size = TorchLSTM.get_expected_cell_size
    check_forward_args = TorchLSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = TorchLSTM.permute_hidden  # type: ignore[assignment]
