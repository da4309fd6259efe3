"""The modules LSTMCell and GRUCell, which replace torch.nn.LSTMCell and torch.nn.GRUCell."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.modules import rnn
from torch.nn.modules.rnn import RNNCellBase
from torch.types import Device

from ..backends.torch_rnn import step_of_cell
from ..call import roles
from ..call.choices import AnyBackend
from ..call.options import Options, options_of
from ..call.prepare import request_of, takes_torchs_cell
from ..call.weights import State
from ..dispatch.route import run_call
from ..kernels.cells import GRU, LSTM
from ..kernels.private import fx_is_tracing
from .arguments import OF_CELLS, DropIn, HasVariants
from .tracing import traced

Of = TypeVar("Of", State, Tensor)


class CalledCell(Protocol[Of]):
    """The type of a call of a cell. nn.Module declares that a call returns Any."""

    def __call__(self, input: Tensor, hx: Of | None = None) -> Of: ...


class RecurrentCell(DropIn):
    """The base class of LSTMCell and GRUCell. It is a mixin for torch's RNNCellBase."""

    _role = roles.Cell

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """Compute one step.

        Args:
            input: The input (N, I), or (I,) if unbatched.
            hx: The state before the step. LSTMCell: (h, c), both of shape (N, H), or (H,) if unbatched. GRUCell: h.
                Default: zeros

        Returns:
            The state after the step, in the form of hx.

        Raises:
            ValueError, RuntimeError, TypeError: A call that torch's cell refuses, too, with torch's message.
            ValueError: The chosen backend does not support peepholes or a layer norm.
            ImportError, RuntimeError, TypeError: A chosen backend cannot run. The message says why.
        """
        if (type(input) is not Tensor or fx_is_tracing()) and (instead := traced(self, input, hx)) is not None:
            return instead
        options = self._options()
        weights, state = self._weights(options.names), hx if type(hx) is tuple else (hx,)
        if takes_torchs_cell(options, input, state, weights[0][0]):
            found = step_of_cell(options.cell, input, (state[0], state[-1]), weights[0][0])
            return found[0] if options.one_state else found
        return run_call(request_of(options, weights, input, hx))[1]

    def _init_torchs(self: Any, **arguments: Any) -> None:
        RNNCellBase.__init__(self, num_chunks=self._cell.rows, **arguments)

    def _options(self: Any) -> Options:
        """Return the Options that follow from the current attributes."""
        return options_of(self._cell.name, self._role, (self.hidden_size,), *[getattr(self, name) for name in OF_CELLS])


class LSTMCell(RecurrentCell, HasVariants, RNNCellBase):
    """Compute one step of one LSTM layer. It replaces torch.nn.LSTMCell, with the same parameters, results and errors.

    Args:
        input_size, hidden_size, bias, device, dtype, backend, peepholes, layer_norm, heads: See `LSTM`. The names of
            the parameters do not end in _l{k}.

    Raises:
        ValueError, TypeError: The same errors as in `LSTM` for the same arguments.

    Example::

        cell = gpu_lstm.LSTMCell(10, 20)
        h, c = cell(torch.randn(3, 10))
    """

    _cell, _torchs = LSTM, rnn.LSTMCell
    __call__: CalledCell[State]
    forward: CalledCell[State]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Device = None,
        dtype: torch.dtype | None = None, *, backend: AnyBackend = None, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())


class GRUCell(RecurrentCell, RNNCellBase):
    """Compute one step of one GRU layer. It replaces torch.nn.GRUCell, with the same parameters, results and errors.

    Args:
        input_size, hidden_size, bias, device, dtype, backend, heads: See `LSTMCell`, and `GRU` for the shape of W_hh.

    Raises:
        ValueError, TypeError: The same errors as in `GRU` for the same arguments.

    Example::

        cell = gpu_lstm.GRUCell(10, 20)
        h = cell(torch.randn(3, 10))
    """

    _cell, _torchs = GRU, rnn.GRUCell
    __call__: CalledCell[Tensor]
    forward: CalledCell[Tensor]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Device = None,
        dtype: torch.dtype | None = None, *, backend: AnyBackend = None, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())
