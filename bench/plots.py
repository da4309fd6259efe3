"""Rows as pictures: every provider at the headline, time and memory against each size, the speed at every case."""

import itertools
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from . import report
from .cases import Case
from .providers import OURS, YARDSTICK
from .report import MIB, digits
from .results import BROKEN, CASE

MODES = ("training", "forward")  # a panel each
AXES = {  # sizes: title, label, letter
    "hidden_size": ("the hidden size", "hidden size H (units)", "H"),
    "batch": ("the batch size", "batch size B (sequences)", "B"),
    "steps": ("the sequence length", "sequence length T (steps)", "T"),
}
MEMORY = {"peak_bytes": "allocated at most during a call (MiB)", "kept_bytes": "kept for backward (MiB)"}
MOST_TICKS = 7  # with numbers, on an axis
STRONGEST = 4.0  # a speed of this, or of its inverse, has the last colour
BARS = "Medians; bars from the 20th to the 80th percentile."
DASH = """Cases are named by what differs from the first: T steps, B batch, H hidden, L layers, D directions. \
A dash: the provider does not do this case."""
# Okabe and Ito's colours without yellow. Their number, the markers' and the lines' have no common divisor.
COLOURS, MARKERS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"), "^DvPX<>"
DASHES: tuple[Any, ...] = ("-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (9, 2)))
LOOK: Any = {
    "font.size": 8, "axes.titlesize": 8.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "legend.frameon": False,
    "figure.titlesize": 10, "figure.titleweight": "bold", "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "grid.linewidth": 0.6,
}  # fmt: skip


def draw(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """PNG files in `folder`, which is made if need be: the figures of each device, which is in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, its in rows[rows["status"] != "expected"].groupby("device", sort=False):
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        for name, figure in figures(its).items():
            paths.append(folder / f"{slug}-{name}.png")
            figure.savefig(paths[-1], dpi=200)
    return paths


def figures(rows: pd.DataFrame) -> dict[str, Figure]:
    """The figures of one device by name; none where there are fewer than two points to compare."""
    rows = report.measured(rows)
    memory = report.memory_column(rows[rows["mode"] == "training"])
    with matplotlib.rc_context(LOOK):
        drawn = {
            "headline": headline_figure(rows),
            "hidden": lines_figure(rows, itertools.product(MODES, ["hidden_size"])),
            "batch": lines_figure(rows, itertools.product(MODES, ["batch"])),
            "steps": lines_figure(rows, itertools.product(MODES, ["steps"])),
            "speed": speed_figure(rows),
            "memory": lines_figure(rows, [("training", "hidden_size"), ("training", "steps")], memory),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def headline_figure(rows: pd.DataFrame) -> Figure | None:
    """The time of every provider at the headline, the fastest on top."""
    base, styles = report.headline_of(rows), _styles(rows)
    panels = {mode: _along(rows, replace(base, mode=mode), "median_s") for mode in MODES}
    panels = {mode: its for mode, its in panels.items() if len(its) > 1}
    if not panels:
        return None
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(7.2, 1.4 + 0.17 * longest))
    for axes, (mode, its) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for place, row in enumerate(its.itertuples()):
            low, middle, high = 1e3 * row.p20_s, 1e3 * row.median_s, 1e3 * row.p80_s
            bars: Any = styles[row.contender] | {"linestyle": "none", "elinewidth": 1, "capsize": 2}
            axes.errorbar([middle], [place], xerr=[[middle - low], [high - middle]], **bars)
            where: Any = {"textcoords": "offset points", "xytext": (8, 0), "va": "center", "fontsize": 7}
            axes.annotate(digits(middle), (high, place), **where)
        axes.set_yticks(range(len(its)), its["contender"])
        for label, provider in zip(axes.get_yticklabels(), its["provider"]):
            label.set_fontweight("bold" if provider == OURS else "normal")
        axes.set(title=mode, xscale="log", xlabel="time a call (ms)", ylim=(longest - 0.3, -0.7))
        _plain_ticks(axes.xaxis)
        lowest, highest = axes.xaxis.get_data_interval()
        axes.set_xlim(lowest / 1.3, highest * (highest / lowest) ** 0.25)  # room for the last number
    figure.suptitle(f"Every provider at {report.sizes(base)}")
    return _described(figure, pd.concat(panels.values()), BARS)


def lines_figure(rows: pd.DataFrame, panels: Any, memory: str | None = None) -> Figure | None:
    """The time of a step, or a column of memory, against a size: a panel for each mode and size, a line a contender."""
    base, styles, legend = report.headline_of(rows), _styles(rows), {}
    taken = {(mode, size): _lines(_along(rows, replace(base, mode=mode), size), memory) for mode, size in panels}
    taken = {panel: lines for panel, lines in taken.items() if lines}
    if not taken:
        return None
    figure = Figure(figsize=(7.2 if len(taken) > 1 else 4.4, 3.5))
    for axes, ((mode, size), lines) in zip(figure.subplots(1, len(taken), squeeze=False)[0], taken.items()):
        for contender, its in lines.items():
            low, time, high = (1e6 * its[column] / its["steps"] for column in ("p20_s", "median_s", "p80_s"))
            values, bars = (its[memory] / MIB, None) if memory else (time, np.array([time - low, high - time]))
            legend[contender] = axes.errorbar(its[size], values, bars, elinewidth=1, capsize=2, **styles[contender])
        _, label, letter = AXES[size]
        follows = size == "hidden_size" and base.input_size == base.hidden_size
        fixed = " ".join(part for part in report.sizes(base).split() if not part.startswith(letter))
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", title=f"{mode}, {fixed}")
        axes.set_xlabel(label.replace("H", "H = input size I") if follows else label)
        axes.xaxis.set_major_formatter("{x:g}")
        _plain_ticks(axes.yaxis)
    figure.axes[0].set_ylabel(MEMORY[memory] if memory else "time a step (µs)")
    names = sorted(legend, key=lambda name: not name.startswith(OURS))
    figure.legend(
        [legend[name] for name in names], names, loc="outside upper center", ncols=5 if len(taken) > 1 else 3,
        handlelength=4, columnspacing=1.5, title_fontproperties={"weight": "bold", "size": 10},
        title="Memory of training" if memory else f"Time a step against {AXES[size][0]}",
    )  # fmt: skip
    drawn = pd.concat([its for lines in taken.values() for its in lines.values()])
    return _described(figure, drawn, "" if memory else BARS)


def _lines(rows: pd.DataFrame, memory: str | None) -> dict[str, pd.DataFrame]:
    """Rows by contender, at least two of each; of memory those that have some, replayed graphs left out."""
    if memory:
        rows = rows[(rows[memory] > 0) & ~rows["graph"]]  # an axis has no place for 0
    return {contender: its for contender, its in rows.groupby("contender", sort=False) if len(its) > 1}


def speed_figure(rows: pd.DataFrame) -> Figure | None:
    """How many times as fast as torch.nn.LSTM each contender is at each case: a number, and a colour."""
    base, lines = report.headline_of(rows), report.by_case(rows)
    places = [f"{'one step, ' * (case.mode == 'step')}{report.sizes(case, base)}" for case in lines["object"]]
    rows = rows.assign(place=rows["case"].map(dict(zip(lines.index, places))))
    rows["shown"] = rows["speed"].where(rows["status"] == "measured")  # not the yardstick where it does not do the case
    panels = {}
    for title, modes in {"training": ["training"], "forward": ["forward", "step"]}.items():
        its = rows[rows["mode"].isin(modes)]
        timed = its.groupby("contender", sort=False)["shown"].count()
        columns = timed.index[(timed > 1) & (timed.index != YARDSTICK)]
        columns = sorted(columns, key=lambda name: not name.startswith(OURS))
        if columns:
            panels[title] = columns, its.set_index(["place", "contender"])
    if not panels:
        return None
    used = set().union(*(its.index.get_level_values("place") for _, its in panels.values()))
    places = [place for place in dict.fromkeys(places) if place in used]
    widths = [len(columns) for columns, _ in panels.values()]
    figure = Figure(figsize=(max(4.5, 2.2 + 0.55 * sum(widths)), max(3.0, 1.9 + 0.19 * len(places))))
    # This map runs from dark to light through grey: it tells slower from faster in print without colour, too.
    shades: Any = {"cmap": "cividis", "norm": LogNorm(1 / STRONGEST, STRONGEST), "edgecolors": "white", "linewidth": 1}
    panes = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes, (title, (columns, its)) in zip(panes, panels.items()):
        speeds = its["shown"].unstack().reindex(index=places, columns=columns)
        status = its["status"].unstack().reindex(index=places, columns=columns)
        image = axes.pcolormesh(speeds, **shades)
        for (y, place), (x, name) in itertools.product(enumerate(places), enumerate(columns)):
            speed, text = speeds.loc[place, name], status.loc[place, name]
            text = digits(speed) if speed > 0 else "" if pd.isna(text) else text if text in BROKEN else "-"
            look: Any = {"color": "white" if speed < 1 else "black", "fontweight": "bold" if name == OURS else "normal"}
            axes.text(x + 0.5, y + 0.52, text, fontsize=7, ha="center", va="center", **look)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="left", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(places)) + 0.5, places)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set(xlabel=title, ylim=(len(places), 0))
        axes.grid(False)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=figure.axes, extend="both", aspect=40, pad=0.02)
    bar.set_label("times as fast as torch.nn.LSTM")
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.ax.minorticks_off()
    figure.suptitle("Times as fast as torch.nn.LSTM")
    return _described(figure, rows[rows["median_s"].notna()], DASH)


def _along(rows: pd.DataFrame, base: Case, size: str) -> pd.DataFrame:
    """The timed rows that differ from a case in one size, from small to large; inputs follow the hidden size."""
    wanted = rows.assign(**{field: value for field, value in vars(base).items() if field != size})
    if base.input_size == base.hidden_size:
        wanted["input_size"] = wanted["hidden_size"]
    same = (rows[CASE] == wanted[CASE]).all(axis=1)
    return rows[same & rows["median_s"].notna()].sort_values(size, kind="stable")


def _styles(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """One look for each contender in all figures of a device; a replayed graph is its provider's, hollow and dotted."""
    others = [name for name in rows["provider"].unique() if name not in (OURS, YARDSTICK)]
    looks = {
        OURS: {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.4, "markersize": 5, "zorder": 4},
        YARDSTICK: {"color": "#d55e00", "marker": "s", "linestyle": "--", "linewidth": 1.6, "markersize": 4.5},
    }
    for name, colour, marker, dashes in zip(others, *map(itertools.cycle, (COLOURS, MARKERS, DASHES))):
        looks[name] = {"color": colour, "marker": marker, "linestyle": dashes, "linewidth": 1.2, "markersize": 4.5}
    hollow = {"markerfacecolor": "white", "linestyle": ":", "linewidth": 1.2}
    return {row.contender: looks[row.provider] | (hollow if row.graph else {}) for row in rows.itertuples()}


def _plain_ticks(axis: Any) -> None:
    """On a logarithmic axis, numbers without exponents, and one beyond the values at either end."""
    low, high = axis.get_data_interval()
    every = np.outer(10.0 ** np.arange(-9, 10), (1, 2, 5)).ravel()
    ticks = every[np.searchsorted(every, low, "right") - 1 : np.searchsorted(every, high) + 1]
    labelled = ticks if len(ticks) <= MOST_TICKS else [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axis.set_ticks(labelled, labels=[f"{tick:.10g}" for tick in labelled])
    axis.set_ticks([tick for tick in ticks if tick not in labelled], minor=True)
    axis.set_minor_formatter(NullFormatter())
    axis.axes.set(**{f"{axis.axis_name}lim": (ticks[0] * 0.95, ticks[-1] * 1.05)})


def _described(figure: Figure, rows: pd.DataFrame, words: str) -> Figure:
    """With a caption that says where the figures come from."""
    parts, width = filter(None, (words, report.origin(rows))), int(figure.get_figwidth() * 21)
    caption = "\n".join(textwrap.fill(part, width) for part in parts)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=6.5, color="0.35")
    return figure
