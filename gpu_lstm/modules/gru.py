"""GRU: a drop-in for torch.nn.GRU."""

import torch
from torch import Tensor
from torch.nn.modules.rnn import GRU as TorchGRU
from torch.nn.modules.rnn import RNNBase

from ..call.choices import Backend, BackendName
from ..kernels.cells import GRU as CELL
from .arguments import Called
from .recurrent import Recurrent


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
        heads: as for LSTM; weight_hh_l{k} is (3H, H / heads). Default: 1

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
    _cell, _torchs = CELL, TorchGRU
    __call__: Called[Tensor, Tensor]
    forward: Called[Tensor, Tensor]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, recompute: bool = False,
        recurrent_dropout: float = 0.0, zoneout: float = 0.0, weight_drop: float = 0.0, heads: int = 1,
        proj_size: None = None,
    ) -> None:  # fmt: skip
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")  # torch's words
        self._make(locals() | {"proj_size": 0})
