"""Every gate and state of every step, for plots, and for losses that use them."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import Tensor
from torch.nn.modules.rnn import GRU as TorchGRU
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..backends.reference import Steps
from ..call.checks import check_tensor
from ..call.choices import Backend
from ..call.prepare import prepare
from ..call.weights import State
from ..cells import EQUATIONS
from ..cells.gru import Gates as GRUGates
from ..cells.lstm import Gates as LSTMGates
from ..dispatch.kind import dtype_of
from ..dispatch.route import Route, run_by
from ..modules import GRU, LSTM, StackedGRU, StackedLSTM
from ..modules.arguments import recast

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# One hue for each gate and state, in every picture of the project.
HUES = {
    "input": "#3f7d0a", "forget": "#2060a8", "output": "#d9730d",
    "candidate": "#7b3fa0", "cell": "#c0392b", "hidden": "#7a5230", "reset": "#c2247f", "update": "#8a7a00",
}  # fmt: skip
NEGATIVE = "#0f766e"  # a state below 0
STATES = ("candidate", "cell", "hidden")  # from -1 to 1; gates go from 0 to 1
OF_GATES, OF_STATES = {0: "0 shut", 1: "1 open"}, {-1: "≤ -1", 0: "0", 1: "≥ 1"}  # what colour bars say

Gates = TypeVar("Gates", LSTMGates, GRUGates)


def colour_map(field: str) -> "Colormap":
    """White is a gate that is shut, or a state at 0; full colour is a gate that is open, or a state at 1 or beyond."""
    from matplotlib.colors import LinearSegmentedColormap

    below = [NEGATIVE] if field in STATES else []
    return LinearSegmentedColormap.from_list(field, [*below, "white", HUES[field]])


@dataclass(frozen=True)
class Trace(Generic[Gates]):
    """Everything that a call of an LSTM or a GRU computes, differentiable."""

    output: Tensor | PackedSequence  # the call's results
    states: Any
    layers: list[list[Gates]]  # [L][D]; each gate is [T, B, H], time first whatever batch_first says, B = 1 unbatched
    lengths: Tensor | None  # [B]

    def plot(self, sequence: int = 0) -> "Figure":
        """Draw one sequence: a row of heat maps a layer and direction, units against time.

        Gates go from 0 to 1. States go from -1 to 1, and a cell state beyond is drawn as -1 or 1.

        Raises:
            ImportError: matplotlib is missing.
            TypeError, IndexError, ValueError: `sequence` is not an int, is not in the batch, or has no steps.
        """
        try:
            from matplotlib.figure import Figure  # not a dependency of the package, and slow to import
        except ImportError as error:
            raise ImportError(f"plot needs matplotlib: pip install matplotlib ({error})") from error
        batch, sequence = self.layers[0][0].hidden.shape[1], operator.index(sequence)
        if not 0 <= sequence < batch:
            raise IndexError(f"sequence {sequence} of a batch of {batch}")
        steps = None if self.lengths is None else int(self.lengths[sequence])
        if steps == 0:
            raise ValueError(f"sequence {sequence} has no steps")
        rows = [(k, d, gates) for k, directions in enumerate(self.layers) for d, gates in enumerate(directions)]
        fields = self.layers[0][0]._fields
        open_or_shut, states = (tuple(f for f in fields if (f in STATES) == wanted) for wanted in (False, True))
        figure = Figure(figsize=(0.7 + 1.3 * len(fields), 0.9 + 2.1 * len(rows)), layout="constrained")
        widths = [1.0] * len(open_or_shut) + [0.12] + [1.0] * len(states) + [0.12]
        grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths)
        for r, (layer, direction, gates) in enumerate(rows):
            for k, (field, values) in enumerate(gates._asdict().items()):
                shown = values[:steps, sequence].detach().float().cpu().T.numpy()  # [H, T]
                panel = figure.add_subplot(grid[r, k + (field in states)])  # behind the colour bar of the gates
                low = -1 if field in states else 0
                panel.imshow(shown, aspect="auto", interpolation="nearest", vmin=low, vmax=1, cmap=colour_map(field))
                panel.locator_params(integer=True, nbins=5)
                panel.tick_params(labelleft=k == 0 or len(shown) != gates[0].shape[2], labelbottom=r == len(rows) - 1)
                if r == 0:
                    panel.set_title(field, fontsize=11, color=HUES[field])
                if r == len(rows) - 1:
                    panel.set_xlabel("step")
                if k == 0:
                    panel.set_ylabel(f"layer {layer}{', reverse' * direction}\nunit")
        for column, those, labels in ((len(open_or_shut), open_or_shut, OF_GATES), (-1, states, OF_STATES)):
            # A strip in the colours of each.
            bar, colours = figure.add_subplot(grid[:, column]), [colour_map(field) for field in those]
            strips = [[colour(k / 255) for colour in colours] for k in range(256)]  # [256, 3, RGBA]
            extent = (0, len(those), min(labels), 1)
            bar.imshow(strips, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
            bar.set_xticks([])
            bar.yaxis.tick_right()
            bar.set_yticks(list(labels), list(labels.values()), fontsize=9)
        return figure


@overload
def trace(
    module: TorchLSTM | LSTM | StackedLSTM, x: Tensor | PackedSequence, hx: State | Sequence[State] | None = None, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: State | Sequence[State] | None = None,
) -> Trace[LSTMGates]:  # fmt: skip
    ...


@overload
def trace(
    module: TorchGRU | GRU | StackedGRU, x: Tensor | PackedSequence, hx: Tensor | Sequence[Tensor] | None = None, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: Tensor | Sequence[Tensor] | None = None,
) -> Trace[GRUGates]:  # fmt: skip
    ...


def trace(
    module: Any, x: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None,
    resets: Tensor | None = None, reset_states: Any = None,
) -> Trace[Any]:  # fmt: skip
    """Call an LSTM or a GRU, on the reference, and record gates and states of every step, layer and direction.

    Dropout is applied as in any call: to trace inference, call `eval()` first.

    Args:
        module: a gpu_lstm.LSTM, GRU, StackedLSTM or StackedGRU, or a torch.nn.LSTM or GRU.
        x, hx, lengths, resets, reset_states: as `module` accepts them.

    Returns:
        The results, and in `layers[k][d]` the gates of layer k in direction d, [T, B, H], zero past a sequence's end.

    Raises:
        TypeError: `module` is of none of these classes.
        ValueError, RuntimeError: as `module` itself raises.

    Example::

        gates = gpu_lstm.trace(lstm, x).layers[0][0]
        loss = loss + 0.01 * (1 - gates.forget).mean()
    """
    if ours := {TorchLSTM: LSTM, TorchGRU: GRU}.get(type(module)):
        module = recast(module, ours)
    if not isinstance(module, LSTM | GRU | StackedLSTM | StackedGRU):
        raise TypeError(f"trace accepts an LSTM, a GRU or a stack of either, got {type(module).__name__}")
    if not isinstance(x, PackedSequence):
        check_tensor(x, "x")
    record: list[Steps] = []
    call = prepare(module._options(), module._weights(), x, hx, lengths, resets, reset_states)
    y, states = run_by(Route(Backend.REFERENCE, dtype_of(call)), call, record)
    directions = call.options.directions
    named = [EQUATIONS[call.options.cell.name].gates_of(*steps) for steps in record]
    layers = [named[k : k + directions] for k in range(0, len(named), directions)]
    if isinstance(x, PackedSequence):
        lengths = pad_packed_sequence(x)[1].to(x.data.device)
        layers = [[type(gates)(*map(call.form.state_out, gates)) for gates in layer] for layer in layers]
    return Trace(call.form.output(y), call.states_out(states), layers, None if lengths is None else lengths.reshape(-1))
