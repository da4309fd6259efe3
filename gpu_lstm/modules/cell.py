"""LSTMCell and GRUCell: drop-ins for those of torch.nn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules import rnn
from torch.nn.modules.rnn import RNNCellBase

from ..backends.torch_rnn import step_of_cell
from ..call import roles
from ..call.choices import Backend, BackendName
from ..call.options import Options, options_of
from ..call.prepare import prepare, takes_torchs_cell
from ..call.weights import State
from ..dispatch.route import run_call
from ..kernels.cells import GRU, LSTM
from ..kernels.private import fx_is_tracing
from .arguments import OF_CELLS, DropIn, HasVariants
from .tracing import traced


class RecurrentCell(DropIn):
    """What LSTMCell and GRUCell share, next to torch's RNNCellBase."""

    _role = roles.Cell

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """Compute one step.

        Args:
            input: (N, I) or (I,).
            hx: (h, c), each (N, H) or (H,); of a GRUCell h. Default: zeros.

        Returns:
            (h', c') or h', as hx.

        Raises:
            ValueError, RuntimeError, TypeError: as torch.nn.LSTMCell or GRUCell, in its words; ValueError for a chosen
                backend that supports no peepholes or layer norm.
            ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
        """
        if (type(input) is not Tensor or fx_is_tracing()) and (instead := traced(self, input, hx)) is not None:
            return instead
        options = self._options()
        weights, state = self._weights(options.names), hx if type(hx) is tuple else (hx,)
        if takes_torchs_cell(options, input, state, weights[0][0]):
            found = step_of_cell(options.cell, input, (state[0], state[-1]), weights[0][0])
            return found[0] if options.one_state else found
        return run_call(prepare(options, weights, input, hx))[1]

    def _init_torchs(self: Any, **arguments: Any) -> None:
        RNNCellBase.__init__(self, num_chunks=self._cell.rows, **arguments)

    def _options(self: Any) -> Options:  # from the attributes as they are now
        return options_of(self._cell.name, self._role, (self.hidden_size,), *[getattr(self, name) for name in OF_CELLS])


class LSTMCell(RecurrentCell, HasVariants, RNNCellBase):
    """A drop-in for torch.nn.LSTMCell: one step of one layer, with the same parameters, results and errors.

    Args:
        input_size, hidden_size, bias, device, dtype, backend, peepholes, layer_norm, heads: as for LSTM. Names of
            parameters do not end in _l{k}.

    Raises:
        ValueError, TypeError: as LSTM for these.

    Example::

        cell = gpu_lstm.LSTMCell(10, 20)
        h, c = cell(torch.randn(3, 10))
    """

    _cell, _torchs = LSTM, rnn.LSTMCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: State | None = None) -> State: ...
        def forward(self, input: Tensor, hx: State | None = None) -> State: ...


class GRUCell(RecurrentCell, RNNCellBase):
    """A drop-in for torch.nn.GRUCell: one step of one layer, with the same parameters, results and errors.

    Args:
        input_size, hidden_size, bias, device, dtype, backend, heads: as for LSTMCell.

    Raises:
        ValueError, TypeError: as GRU for these.

    Example::

        cell = gpu_lstm.GRUCell(10, 20)
        h = cell(torch.randn(3, 10))
    """

    _cell, _torchs = GRU, rnn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...
