"""SLSTM: xLSTM's cell with a hidden state that feeds back."""

import torch
from torch import Tensor
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import RNNBase

from ..call.choices import Backend, BackendName
from ..kernels.cells import SLSTM as CELL
from .arguments import Called
from .recurrent import Recurrent

States = tuple[Tensor, Tensor, Tensor, Tensor]


class SLSTM(Recurrent, RNNBase):
    """sLSTM layers (Beck et al., 2024, https://arxiv.org/abs/2405.04517): an LSTM with an exponential input gate.

    Each layer computes, at every step, with rows of weights in the order i, f, g, o, where the paper calls g z::

        i = exp(z_i)      f, o = sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)      of z = W_ih x + b_ih + W_hh h + b_hh
        c' = f c + i g    n' = f n + i                           h' = o c' / n'

    n, the normaliser, is the sum of the weights that g has in c. c and n may be too large to be written down: a state
    has them times e^-m, with a stabiliser m of each unit.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM, and
            initial weights, too.
        backend: as for LSTM. It runs on the backends "triton", "cupy" and "reference".
        heads: as for LSTM. Default: 1

    A call is that of an LSTM, see `forward`, but hx, and what is returned, is (h, c, n, m), each (D*L, N, H), unbatched
    without N; zeros by default: n = 0 is an empty state, whatever c and m are. h has the dtype of the input; c, n and m
    may be of any, and are float32 (float64 for a float64 input). What is returned has n = 1, c / n for c and m + log(n)
    for m: the same state in other numbers, since only c / n and m + log(n) matter. So gradients reach c and m of it.

    There are no reset_states, which would be four tensors, no zoneout, since c, n and m change together, and no
    recompute, since backward would need n and m of all steps. `recurrent_dropout` and `weight_drop` may be set as
    attributes.

    Raises:
        ValueError, TypeError: as LSTM for its arguments; ValueError if reset_states are given, or zoneout or recompute
            is set.
        RuntimeError, TypeError: in a call, hx that is not four tensors of these sizes.

    Example::

        slstm = gpu_lstm.SLSTM(10, 20, heads=4)
        output, (h_n, c_n, n_n, m_n) = slstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    _cell, _torchs = CELL, TorchLSTM
    __call__: Called[States, States]
    forward: Called[States, States]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())
