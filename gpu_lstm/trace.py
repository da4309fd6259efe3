"""Looking inside: every gate and every cell state of every step, for plots, and for losses that use them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .modules import LSTM, StackedLSTM, recast
from .reference import Gates
from .weights import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trace:
    """What a call of an LSTM computes on its way. Everything is differentiable."""

    output: Tensor | PackedSequence  # the call's results
    states: State | list[State]
    layers: list[list[Gates]]  # [L][D]; each gate is [T, B, H], time first whatever batch_first says, B = 1 unbatched
    lengths: Tensor | None  # [B]

    def plot(self, sequence: int = 0) -> "Figure":
        """Draw one sequence: a row of heat maps a layer and direction, units against time; needs matplotlib.

        Raises:
            ImportError: matplotlib is missing.
            IndexError: there is no such sequence in the batch.
            ValueError: it has no steps.
        """
        try:
            from matplotlib.figure import Figure  # no dependency of the package, and slow to import
        except ImportError as error:
            raise ImportError(f"plot needs matplotlib: pip install matplotlib ({error})") from error

        batch = self.layers[0][0].cell.shape[1]
        if not 0 <= sequence < batch:
            raise IndexError(f"sequence {sequence} of a batch of {batch}")
        if self.lengths is not None and self.lengths[sequence] == 0:
            raise ValueError(f"sequence {sequence} has no steps")
        steps = None if self.lengths is None else int(self.lengths[sequence])
        rows = [
            (f"layer {k}" + ", reverse" * d, gates)
            for k, directions in enumerate(self.layers)
            for d, gates in enumerate(directions)
        ]
        figure = Figure(figsize=(2.2 * len(Gates._fields), 0.6 + 1.7 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), len(Gates._fields), squeeze=False, sharex=True)
        for panel, field in zip(axes[0], Gates._fields):
            panel.set_title(field, fontsize=10)
        for row, (name, gates) in zip(axes, rows):
            for panel, (field, values) in zip(row, gates._asdict().items()):
                shown = values[:steps, sequence].detach().float().cpu().T.numpy()  # [H, T]
                # i, f and o go from 0 to 1; g, h, and mostly c, around 0.
                if field in ("input", "forget", "output"):
                    limits, colours = (0.0, 1.0), "viridis"
                else:
                    most = max(1.0, abs(shown).max(initial=0.0))
                    limits, colours = (-most, most), "RdBu_r"
                image = panel.imshow(
                    shown, aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1], cmap=colours
                )
                figure.colorbar(image, ax=panel)
                panel.locator_params(integer=True)
            row[0].set_ylabel(f"{name}\nunit")
        for panel in axes[-1]:
            panel.set_xlabel("step")
        return figure


def trace(
    lstm: nn.Module,
    x: Tensor | PackedSequence,
    hx: State | Sequence[State] | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Trace:
    """Call an LSTM and keep all that it computes: gates, cell and hidden states of every step, layer and direction.

    The call goes through the reference whatever the backend, and its numbers are those of the other backends but for
    rounding. Dropout between layers is applied as in any call: for a picture of it as it will be used, call `eval()`
    first.

    Args:
        lstm: a gpu_lstm.LSTM or StackedLSTM, or a torch.nn.LSTM.
        x, hx, lengths, resets: as `lstm` takes them.

    Returns:
        The results, and `layers[k][d]` with the gates of layer k in direction d, each [T, B, H], zero past the end of
        a sequence.

    Raises:
        TypeError: `lstm` is of none of these classes.
        ValueError, RuntimeError: as `lstm` itself raises.

    Example::

        gates = gpu_lstm.trace(lstm, x).layers[0][0]
        loss = loss + 0.01 * (1 - gates.forget).mean()
    """
    if type(lstm) is TorchLSTM:
        lstm = recast(lstm, LSTM)
    if not isinstance(lstm, LSTM | StackedLSTM):
        raise TypeError(f"trace takes an LSTM or a StackedLSTM, got {type(lstm).__name__}")
    record: list[Gates] = []
    output, states = lstm._forward(x, hx, lengths, resets, record)  # type: ignore[arg-type]
    directions = 2 if lstm.bidirectional else 1
    layers = [record[k : k + directions] for k in range(0, len(record), directions)]
    if isinstance(x, PackedSequence):
        lengths = pad_packed_sequence(x)[1].to(x.data.device)
        if x.unsorted_indices is not None:  # inside, sequences went by length
            layers = [[Gates(*(t[:, x.unsorted_indices] for t in gates)) for gates in layer] for layer in layers]
    return Trace(output, states, layers, None if lengths is None else lengths.reshape(-1))
