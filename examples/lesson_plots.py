"""The plots of lstm_explained.ipynb. Each shows the results of a cell of the notebook. `heat_maps` draws any trace."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from gpu_lstm.tools.trace import Trace

# One hue for each gate and state, in every picture of the project.
HUES = {
    "input": "#3f7d0a", "forget": "#2060a8", "output": "#d9730d",
    "candidate": "#7b3fa0", "cell": "#c0392b", "hidden": "#7a5230", "reset": "#c2247f", "update": "#8a7a00",
}  # fmt: skip
NEGATIVE = "#0f766e"  # a state below 0
STATES = ("candidate", "cell", "hidden")  # from -1 to 1; gates go from 0 to 1
INK, GREY, PALE = "#22303c", "0.6", "0.85"
OTHER = ("#b8860b", "#6c757d", "#3a9ca0", "#111111")  # networks; gates and states have other colours


def colour_map(field: str) -> LinearSegmentedColormap:
    """Return a colour map. White is a shut gate or a state at 0. Full colour is an open gate or a state from 1 on."""
    below = [NEGATIVE] if field in STATES else []
    return LinearSegmentedColormap.from_list(field, [*below, "white", HUES[field]])


def heat_maps(trace: Trace, sequence: int = 0) -> Figure:
    """Draw one sequence as a row of heat maps for each layer and direction, units against time.

    Gates go from 0 to 1. States go from -1 to 1. A cell state outside of this range is drawn as -1 or 1.
    """
    rows = [(k, d, gates) for k, directions in enumerate(trace.layers) for d, gates in enumerate(directions)]
    steps = None if trace.lengths is None else int(trace.lengths[sequence])
    fields = rows[0][2]._fields
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
    colour_bar(figure.add_subplot(grid[:, len(open_or_shut)]), open_or_shut, {0: "0 shut", 1: "1 open"})
    colour_bar(figure.add_subplot(grid[:, -1]), states, {-1: "≤ -1", 0: "0", 1: "≥ 1"})
    return figure


def colour_bar(axes: Axes, fields: Sequence[str], labels: Mapping[int, str]) -> None:
    """Draw a strip in the colours of each field. `labels` gives the text at each height."""
    colours = [colour_map(field) for field in fields]
    strips = [[colour(k / 255) for colour in colours] for k in range(256)]  # [256, fields, RGBA]
    extent = (0, len(fields), min(labels), 1)
    axes.imshow(strips, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks(list(labels), list(labels.values()), fontsize=9)


def panels(rows: int, height: float, columns: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """Return a figure as wide as a page, and its axes, [rows, columns]."""
    figure = Figure(figsize=(8.8, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def gate_strips(axes: Axes, gates: Mapping[str, np.ndarray]) -> None:
    """Draw a strip for each gate, [T]. White means shut, and full colour means open."""
    for row, (name, values) in enumerate(gates.items()):
        edges = np.arange(len(values) + 1)
        axes.pcolormesh(edges, [row, row + 1], values[None], cmap=colour_map(name), vmin=0, vmax=1, edgecolors="white")
    axes.set_yticks(np.arange(len(gates)) + 0.5, list(gates))
    for text in axes.get_yticklabels():
        text.set_color(HUES[text.get_text()])
    axes.invert_yaxis()
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def vanishing(lengths: Sequence[int], norms: Mapping[str, Sequence[float]]) -> Figure:
    """Draw gradient norms against the length of the sequence, by the name of the network."""
    figure, ((axes,),) = panels(1, 3.2)
    for (name, norm), colour in zip(norms.items(), OTHER):
        axes.plot(lengths, norm, "o-", color=colour, markersize=4)
        axes.annotate(name, (lengths[-1], norm[-1]), (8, 0), textcoords="offset points", va="center", color=colour)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(yscale="log", xlabel="length of the sequence", ylabel="gradient norm at step 0")
    return figure


def gates_by_hand(
    x: np.ndarray, rnn: np.ndarray, cell: np.ndarray, hidden: np.ndarray, gates: Mapping[str, np.ndarray]
) -> Figure:
    """Draw the memory of a plain RNN, and a box whose gates are moved by hand. All series are [T]."""
    figure, ((top,), (middle,), (bottom,)) = panels(3, 5, sharex=True, height_ratios=[2, 2, 1.1])
    step = np.arange(len(x)) + 0.5
    top.bar(step, x, color=PALE, label="input $x$")
    top.plot(step, rnn, color=INK, drawstyle="steps-mid", label="memory of a plain RNN")
    middle.plot(step, cell, color=HUES["cell"], drawstyle="steps-mid", label="cell state $c$ of an LSTM")
    middle.bar(step, hidden, color=HUES["hidden"], alpha=0.8, width=0.6, label="what it shows, $h$")
    gate_strips(bottom, gates)
    for axes in (top, middle):
        axes.legend(loc="upper right", frameon=False, ncols=2)
        axes.set_ylim(-0.5, 1.4)
    bottom.set_xlabel("step")
    return figure


def slopes() -> Figure:
    """Draw the logistic function and tanh, each with its slope."""
    figure, ((left, right),) = panels(1, 3.2, columns=2, sharey=True)
    z = np.linspace(-6, 6, 241)
    s, t = 1 / (1 + np.exp(-z)), np.tanh(z)
    for axes, name, values, slope, formula, edge in (
        (left, r"$s = \sigma(z)$", s, s * (1 - s), "$s(1-s)$", 3.64),
        (right, r"$t = \tanh(z)$", t, 1 - t**2, "$1-t^2$", 1.82),
    ):
        axes.plot(z, values, color=INK, linewidth=2, label=name)
        axes.plot(z, slope, color=OTHER[0], linewidth=2, linestyle="--", label=f"its slope, {formula}")
        for side in (-1, 1):
            axes.axvspan(*sorted((side * edge, side * 6)), color=GREY, alpha=0.15, linewidth=0)
        axes.set(xlabel="$z$", xlim=(-6, 6), ylim=(-1.1, 1.55), yticks=np.arange(-1, 1.1, 0.5))
        axes.legend(loc="upper center", frameon=False, ncols=2)
    return figure


def keeper(
    x: np.ndarray, remembered: np.ndarray, cell: np.ndarray, gates: Mapping[str, np.ndarray], answers: np.ndarray
) -> Figure:
    """Draw the unit that keeps the value, with its cell state scaled to fit.

    x [T, 3] is value, store and ask. All other series are [T].
    """
    value, store, ask = x.T
    figure, axes = panels(4, 6.5, sharex=True, height_ratios=[2, 2, 1.1, 2])
    first, second, third, fourth = axes[:, 0]
    step, true = np.arange(len(x)) + 0.5, {"color": INK, "alpha": 0.3}
    first.bar(step, value, color=np.where(store, INK, PALE))
    first.plot(step[ask == 1], np.full(int(ask.sum()), 1.25), "v", color=INK, markersize=5)
    first.set_title("input: the value (dark: store), and ask ▼", loc="left", fontsize=10)
    second.step(step, remembered, where="mid", linewidth=4, **true)
    second.plot(step, cell * (cell @ remembered) / (cell @ cell), ".-", color=HUES["cell"], drawstyle="steps-mid")
    second.set_title("the unit's cell state, scaled, and the value to remember (grey)", loc="left", fontsize=10)
    gate_strips(third, gates)
    third.set_title("its gates", loc="left", fontsize=10)
    fourth.bar(step, remembered * ask, **true)
    fourth.plot(step, answers, ".", color="black")
    fourth.set_title("the answer, and the right answer (grey)", loc="left", fontsize=10)
    fourth.set_xlabel("step")
    for panel in (first, second, fourth):
        panel.set_ylim(-1.1, 1.4)
    return figure


def far_back(
    lengths: Sequence[int], norms: Mapping[str, np.ndarray], forget: Mapping[str, float], smallest: float = 1e-45
) -> Figure:
    """Draw gradient norms [seeds, lengths] by network, with the last network emphasised.

    The dashed line is the product of its forget gates.
    """
    figure, ((axes,),) = panels(1, 4.4)
    for (name, measured), colour in zip(norms.items(), OTHER):
        middle = np.exp(np.log(measured).mean(axis=0))
        axes.fill_between(lengths, measured.min(axis=0), measured.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        width, weight = (3.0, "bold") if name == list(norms)[-1] else (1.5, "normal")
        axes.plot(lengths, middle, "o-", color=colour, markersize=4, linewidth=width)
        axes.annotate(name, (lengths[-1], middle[-1]), (8, -3), textcoords="offset points", color=colour, weight=weight)
        if name in forget:
            product = middle[0] * forget[name] ** (np.array(lengths) - lengths[0])
            axes.plot(lengths, product, "--", color=colour, linewidth=1)
    axes.axhline(smallest, color=INK, linewidth=0.5)
    axes.annotate("float32 has nothing smaller", (10, smallest), (0, 3), textcoords="offset points", fontsize=8)
    axes.set(yscale="log", xlabel="length of the sequence", ylabel="gradient norm at step 0", ylim=(1e-65, 1e4))
    axes.set_title("lines and bands: 5 seeds; dashed: the product of the forget gates alone", loc="left", fontsize=10)
    return figure


def reset(without: np.ndarray, with_reset: np.ndarray) -> Figure:
    """Draw two series of answers, [T]."""
    figure, ((axes,),) = panels(1, 2.2)
    axes.plot(without, "o-", color=GREY, markersize=4, label="without")
    axes.plot(with_reset, "s-", color=HUES["cell"], markersize=4, label="with a reset at step 12")
    axes.set(xlabel="step", ylabel="answer", ylim=(-0.35, 1.2))
    axes.legend(frameon=False, ncols=2, loc="upper right")
    return figure


def losses(curve: Sequence[tuple[float, float]], baseline: float) -> Figure:
    """Draw the losses of each epoch, on the training years and on the held-out year."""
    figure, ((axes,),) = panels(1, 2.8)
    for values, name, colour in zip(zip(*curve), ("training years, with dropout", "2015, held out"), (GREY, INK)):
        axes.plot(np.arange(1, len(curve) + 1), values, color=colour, linewidth=2, label=name)
    axes.axhline(baseline, color=OTHER[0], linestyle="--", label="2015, forecast: same as today")
    axes.set(xlabel="epoch", ylabel="mean squared error", ylim=(None, 1.03 * baseline))
    axes.legend(frameon=False, loc="lower left")
    return figure
