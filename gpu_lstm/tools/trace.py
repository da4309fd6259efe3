"""Record every gate and state of every step, for plots and for losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from torch import Tensor
from torch.nn.modules import rnn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..backends.reference import Steps
from ..call.checks import check_tensor
from ..call.choices import Backend
from ..call.sequences import without_padding
from ..call.weights import State
from ..dispatch.execute import Route, execute
from ..dispatch.kind import dtype_of
from ..equations import EQUATIONS, gru, lstm, slstm
from ..modules import GRU, LSTM, SLSTM, StackedGRU, StackedLSTM
from ..modules.arguments import recast
from .convert import OURS, check_layers

Gates = TypeVar("Gates", lstm.Gates, gru.Gates, slstm.Gates)


@dataclass(frozen=True)
class Trace(Generic[Gates]):
    """All results, gates and states of a call of an LSTM, a GRU or an SLSTM. They are differentiable."""

    output: Tensor | PackedSequence  # output and states are the results of the call
    states: Any
    layers: list[list[Gates]]  # [L][D]; each gate is [T, B, H], even with batch_first, with B = 1 if unbatched
    lengths: Tensor | None  # [B]

    def __repr__(self) -> str:
        """Return the names of the gates and their sizes. The numbers would fill the screen."""
        (first, *_), *_ = self.layers
        sizes = [[list(each[0].shape) for each in layer] for layer in self.layers]
        return f"Trace of {', '.join(first._fields)}; layers[k][d] of sizes [T, B, H] {sizes}"


@overload
def trace(
    module: rnn.LSTM | LSTM | StackedLSTM, x: Tensor | PackedSequence, hx: State | Sequence[State] | None = None, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: State | Sequence[State] | None = None,
) -> Trace[lstm.Gates]: ...  # fmt: skip


@overload
def trace(
    module: rnn.GRU | GRU | StackedGRU, x: Tensor | PackedSequence, hx: Tensor | Sequence[Tensor] | None = None, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: Tensor | Sequence[Tensor] | None = None,
) -> Trace[gru.Gates]: ...  # fmt: skip


@overload
def trace(
    module: SLSTM, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: None = None,
) -> Trace[slstm.Gates]: ...  # fmt: skip


def trace(
    module: Any, x: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None,
    resets: Tensor | None = None, reset_states: Any = None,
) -> Trace[Any]:  # fmt: skip
    """Call an LSTM, a GRU or an SLSTM with backend "reference", and record all gates and states.

    Dropout is applied as in any call. To trace inference, call `eval()` first.

    Args:
        module: A gpu_lstm.LSTM, GRU, SLSTM, StackedLSTM or StackedGRU, or a torch.nn.LSTM or GRU. A layer of Keras
            has to be converted first by `gpu_lstm.keras.from_keras`.
        x, hx, lengths, resets, reset_states: As `module` accepts them.

    Returns:
        A Trace. It has the results, and in `layers[k][d]` the gates of layer k in direction d. Each gate is [T, B, H],
        and zero past the end of a sequence.

    Raises:
        TypeError: `module` is of none of these classes.
        ValueError, RuntimeError: The same errors as in a call of `module`.

    Example::

        gates = gpu_lstm.trace(lstm, x).layers[0][0]
        loss = loss + 0.01 * (1 - gates.forget).mean()
    """
    if ours := OURS.get(type(module)):
        module = recast(module, ours)
    check_layers("trace", module)
    if not isinstance(x, PackedSequence):
        check_tensor(x, "x")
    record: list[Steps] = []
    call = module._request(x, hx, lengths, resets, reset_states)
    output, states = execute(Route(Backend.REFERENCE, dtype_of(call)), call, record.append)
    directions = call.options.directions
    named = [EQUATIONS[call.options.cell.name].gates_of(*steps) for steps in record]
    ends = call.padded()[1].lengths
    named = [type(gates)(*[without_padding(t, ends) for t in gates]) for gates in named]
    layers = [named[k : k + directions] for k in range(0, len(named), directions)]
    if isinstance(x, PackedSequence):
        lengths = pad_packed_sequence(x)[1].to(x.data.device)
        layers = [[type(gates)(*map(call.form.state_out, gates)) for gates in layer] for layer in layers]
    return Trace(output, states, layers, None if lengths is None else lengths.reshape(-1))
