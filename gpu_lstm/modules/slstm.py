"""SLSTM: xLSTM's cell with a hidden state that feeds back."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase

from ..call.choices import Backend, BackendName
from ..kernels.cells import SLSTM as CELL
from .arguments import Called, check_heads
from .recurrent import Recurrent

States = tuple[Tensor, Tensor, Tensor, Tensor]


class SLSTM(Recurrent, RNNBase):
    """sLSTM layers (Beck et al., 2024): an LSTM with an exponential input gate, and a normaliser n for it.

    Each layer computes, at every step, with gates in the order i, f, z, o, where the paper's z is an LSTM's g::

        i = exp(z_i)      f, o = sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)      of z = W_ih x + b_ih + W_hh h + b_hh
        c' = f c + i g    n' = f n + i                           h' = o c' / n'

    c and n are kept times e^-m, with a stabiliser m, so that nothing overflows.
    """

    _cell = CELL

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, heads: int = 1,
    ) -> None:  # fmt: skip
        check_heads(heads, hidden_size)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
        self._make((*sizes, device, dtype), heads, backend=backend)

    if TYPE_CHECKING:
        __call__: Called[States, States]
        forward: Called[States, States]  # type: ignore[assignment]
