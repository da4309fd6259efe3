"""Rows as pictures: every provider at the headline, time and memory against each size, the speed at every case."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from . import tables
from .results import Row
from .tables import MIB, OURS, YARDSTICK, Cases, contender, digits

PASSES = ("training", "forward")  # a panel each
AXES = {"hidden": "hidden size H (units)", "batch": "batch size B (sequences)", "steps": "sequence length T (steps)"}
_TITLES = {"hidden": "the hidden size", "batch": "the batch size", "steps": "the sequence length"}
MEMORY = {"peak_bytes": "allocated at most during a call (MiB)", "kept_bytes": "kept for backward (MiB)"}
MOST_TICKS = 7  # with numbers, on an axis
STRONGEST = 4.0  # a speed of this, or of its inverse, has the last colour

_BARS = "Medians; bars from the 20th to the 80th percentile."

# Okabe and Ito's colours without yellow. Their number, the markers' and the lines' have no common divisor.
_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = ("^", "D", "v", "P", "X", "<", ">")
_DASHES: tuple[Any, ...] = ("-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (9, 2)))
_LOOK: Any = {
    "font.size": 8, "axes.titlesize": 8.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "figure.titlesize": 10, "figure.titleweight": "bold", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9", "grid.linewidth": 0.6,
}  # fmt: skip


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """PNG files in `folder`, which is made if need be: the figures of each device, which is in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device in dict.fromkeys(row.device for row in rows if row.status != "expected"):
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        for name, figure in figures([row for row in rows if row.device == device]).items():
            paths.append(folder / f"{slug}-{name}.png")
            figure.savefig(paths[-1], dpi=200)
    return paths


def figures(rows: list[Row]) -> dict[str, Figure]:
    """The figures of one device by name; none where there are fewer than two points to compare.

    Raises:
        ValueError: rows of several devices, or none but expected ones.
    """
    cases = tables.by_case(rows)
    with matplotlib.rc_context(_LOOK):
        drawn = {
            "headline": headline_figure(cases),
            **{name: time_figure(cases, name) for name in AXES},
            "speed": speed_figure(cases),
            "memory": memory_figure(cases),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def headline_figure(cases: Cases) -> Figure | None:
    """The time of every provider at the headline, the fastest on top."""
    base = tables.headline_case(cases)
    panels = {run: [row for line in _along(cases, base, run) for row in _timed(line)] for run in PASSES}
    panels = {run: rows for run, rows in panels.items() if len(rows) > 1}
    if not panels:
        return None
    longest = max(map(len, panels.values()))
    figure, styles = Figure(figsize=(7.2, 1.4 + 0.17 * longest), layout="constrained"), _styles(cases)
    for axes, (run, rows) in zip(_panels(figure, len(panels)), panels.items()):
        rows = sorted(rows, key=_seconds)
        for place, row in enumerate(rows):
            style = styles[contender(row)] | {"linestyle": "none", "elinewidth": 1}
            axes.errorbar([_seconds(row) * 1e3], [place], xerr=_spread([row], [1e3]), capsize=2, **style)
            where: Any = {"textcoords": "offset points", "xytext": (8, 0), "va": "center", "fontsize": 7}
            axes.annotate(digits(_seconds(row) * 1e3), ((row.p80_s or _seconds(row)) * 1e3, place), **where)
        axes.set_yticks(range(len(rows)), [contender(row) for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows):
            label.set_fontweight("bold" if row.provider == OURS else "normal")
        axes.set(title=run, xscale="log", xlabel="time a call (ms)", ylim=(longest - 0.3, -0.7))
        _plain_ticks(axes, "x")
        low, high = axes.xaxis.get_data_interval()
        axes.set_xlim(low / 1.3, high * (high / low) ** 0.25)  # room for the last number
    figure.suptitle(f"Every provider at {tables.sizes(base)}")
    _describe(figure, itertools.chain(*panels.values()), _BARS)
    return figure


def time_figure(cases: Cases, name: str) -> Figure | None:
    """The time of a step against a size; all others are the headline's."""
    return _lines(cases, [(run, name) for run in PASSES], "us_per_step", f"Time a step against {_TITLES[name]}")


def memory_figure(cases: Cases) -> Figure | None:
    """The memory that training takes, against the hidden size and the steps."""
    column = tables.memory_column(row for row in tables.all_rows(cases) if row.run == "training")
    return _lines(cases, [("training", name) for name in ("hidden", "steps")], column, "Memory of training")


def speed_figure(cases: Cases) -> Figure | None:
    """How many times as fast as torch.nn.LSTM each contender is at each case: a number, and a colour."""
    base = tables.headline_case(cases)
    lines = [line for group in tables.grouped(cases, base) for line in tables.by_size(group)]
    panels = {}
    for title, runs in {"training": ("training",), "forward": ("forward", "step")}.items():
        taken = {_place(line, base): line for line in lines if tables.first(line).run in runs}
        timed = [name for line in taken.values() for name, row in line.items() if _speed(row)]
        columns = [name for name in dict.fromkeys(timed) if timed.count(name) > 1 and name != YARDSTICK]
        if columns:
            panels[title] = (sorted(columns, key=lambda name: not name.startswith(OURS)), taken)
    if not panels:
        return None
    places = list(dict.fromkeys(place for _, taken in panels.values() for place in taken))
    places.sort(key=[_place(line, base) for line in lines].index)
    widths = [len(columns) for columns, _ in panels.values()]
    figure = Figure(
        figsize=(max(4.5, 2.2 + 0.55 * sum(widths)), max(3.0, 1.9 + 0.19 * len(places))), layout="constrained"
    )
    # This map runs from dark to light through grey: it tells slower from faster in print without colour, too.
    shades: Any = {"cmap": "cividis", "norm": LogNorm(1 / STRONGEST, STRONGEST)}
    for axes, (title, (columns, taken)) in zip(_panels(figure, len(panels), widths), panels.items()):
        entries = [[taken.get(place, {}).get(name) for name in columns] for place in places]
        speeds = [[_speed(row) or float("nan") for row in line] for line in entries]
        image = axes.pcolormesh(speeds, edgecolors="white", linewidth=1, **shades)
        for (y, line), (x, name) in itertools.product(enumerate(entries), enumerate(columns)):
            row, weight = line[x], "bold" if name == OURS else "normal"
            ink = "white" if (_speed(row) or 1) < 1 else "black"
            axes.text(x + 0.5, y + 0.52, _cell(row), color=ink, fontweight=weight, fontsize=7, ha="center", va="center")
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=40, ha="left", rotation_mode="anchor")
        axes.set_yticks([y + 0.5 for y in range(len(places))], places)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set(xlabel=title, ylim=(len(places), 0))
        axes.grid(False)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=figure.axes, extend="both", aspect=40, pad=0.02)
    bar.set_label("times as fast as torch.nn.LSTM")
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.ax.minorticks_off()
    words = (
        "Cases are named by what differs from the first: T steps, B batch, H hidden, L layers, D directions. "
        "A dash: the provider does not do this case."
    )
    figure.suptitle("Times as fast as torch.nn.LSTM")
    _describe(figure, [row for line in lines for row in _timed(line)], words)
    return figure


def _lines(cases: Cases, panels: list[tuple[str, str]], column: str, title: str) -> Figure | None:
    """A column of the rows against a size: a panel for each pass and size, a line for each contender."""
    base = tables.headline_case(cases)
    drawn = {(run, name): _series(cases, base, run, name, column) for run, name in panels}
    drawn = {panel: series for panel, series in drawn.items() if series}
    if not drawn:
        return None
    figure, styles = Figure(figsize=(7.2 if len(drawn) > 1 else 4.4, 3.5), layout="constrained"), _styles(cases)
    time = column == "us_per_step"
    legend: dict[str, Artist] = {}
    for axes, ((run, name), series) in zip(_panels(figure, len(drawn)), drawn.items()):
        for contestant, rows in series.items():
            at = [getattr(row, name) for row in rows]
            values = [getattr(row, column) / (1 if time else MIB) for row in rows]
            bars = _spread(rows, [1e6 / row.steps for row in rows]) if time else None
            style = styles[contestant] | {"elinewidth": 1}
            legend[contestant] = axes.errorbar(at, values, yerr=bars, capsize=2, **style)  # type: ignore[assignment]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=f"{run}, {_fixed(base, name)}", xlabel=_axis(base, name))
        axes.xaxis.set_major_formatter("{x:g}")
        _plain_ticks(axes, "y")
    figure.axes[0].set_ylabel("time a step (µs)" if time else MEMORY[column])
    names = sorted(legend, key=lambda name: not name.startswith(OURS))
    title_look: Any = {"title": title, "title_fontproperties": {"weight": "bold", "size": 10}}
    figure.legend(
        [legend[name] for name in names],
        names,
        loc="outside upper center",
        ncols=5 if len(drawn) > 1 else 3,
        handlelength=4,
        columnspacing=1.5,
        **title_look,
    )
    rows = [row for series in drawn.values() for rows in series.values() for row in rows]
    _describe(figure, rows, _BARS if time else "")
    return figure


def _series(cases: Cases, base: Row, run: str, name: str, column: str) -> dict[str, list[Row]]:
    """The rows that have the column, by contender and in the order of a size; at least two of each."""
    series: dict[str, list[Row]] = {}
    for line in sorted(_along(cases, base, run, name), key=lambda line: getattr(tables.first(line), name)):
        for row in _timed(line):
            if getattr(row, column) and (column == "us_per_step" or not row.graph):  # no place for 0 on the axis
                series.setdefault(contender(row), []).append(row)
    return {contestant: rows for contestant, rows in series.items() if len(rows) > 1}


def _along(cases: Cases, base: Row, run: str, name: str | None = None) -> list[dict[str, Row]]:
    """The cases of a pass that differ from the headline in nothing, or in one size; inputs follow the hidden size."""

    def differs_in_nothing_else(row: Row) -> bool:
        alike = replace(base, **({name: getattr(row, name)} if name else {}))
        if base.inputs == base.hidden:
            alike = replace(alike, inputs=alike.hidden)
        return row.run == run and all(getattr(row, field) == getattr(alike, field) for field in tables.TOPICS)

    return [line for line in cases.values() if differs_in_nothing_else(tables.first(line))]


def _timed(line: dict[str, Row]) -> list[Row]:
    return [row for row in line.values() if row.median_s is not None]


def _seconds(row: Row) -> float:
    assert row.median_s is not None  # only of timed rows
    return row.median_s


def _spread(rows: list[Row], scales: list[float]) -> list[list[float]]:
    """How far p20 lies below the median, and p80 above it."""
    below = [scale * (_seconds(row) - (row.p20_s or _seconds(row))) for row, scale in zip(rows, scales)]
    above = [scale * ((row.p80_s or _seconds(row)) - _seconds(row)) for row, scale in zip(rows, scales)]
    return [below, above]


def _styles(cases: Cases) -> dict[str, dict[str, Any]]:
    """One look for each contender in all figures of a device; a replayed graph is its provider's, hollow and dotted."""
    names = dict.fromkeys(row.provider for row in tables.all_rows(cases))
    others = [name for name in names if name not in (OURS, YARDSTICK)]
    looks = {
        OURS: {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.4, "markersize": 5, "zorder": 4},
        YARDSTICK: {"color": "#d55e00", "marker": "s", "linestyle": "--", "linewidth": 1.6, "markersize": 4.5},
    }
    for name, colour, marker, dashes in zip(others, *map(itertools.cycle, (_COLOURS, _MARKERS, _DASHES))):
        looks[name] = {"color": colour, "marker": marker, "linestyle": dashes, "linewidth": 1.2, "markersize": 4.5}
    hollow = {"markerfacecolor": "white", "linestyle": ":", "linewidth": 1.2}
    rows = {contender(row): row for row in tables.all_rows(cases)}
    return {name: looks[row.provider] | (hollow if row.graph else {}) for name, row in rows.items()}


def _panels(figure: Figure, count: int, widths: list[int] | None = None) -> Iterable[Axes]:
    """Panels side by side; those that are given widths share their cases."""
    sharing: Any = {"sharey": True, "width_ratios": widths} if widths else {}
    return figure.subplots(1, count, squeeze=False, **sharing)[0]


def _plain_ticks(axes: Axes, which: str) -> None:
    """On a logarithmic axis, numbers without exponents, and one beyond the values at either end."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    every = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
    ticks = [max(tick for tick in every if tick <= low), *(tick for tick in every if low < tick < high)]
    ticks.append(min(tick for tick in every if tick >= high))
    labelled = ticks if len(ticks) <= MOST_TICKS else [tick for tick in ticks if round(math.log10(tick), 6) % 1 == 0]
    axis.set_ticks(labelled, labels=[f"{tick:.10g}" for tick in labelled])
    axis.set_ticks([tick for tick in ticks if tick not in labelled], minor=True)
    axis.set_minor_formatter(NullFormatter())
    axes.set(**{f"{which}lim": (ticks[0] * 0.95, ticks[-1] * 1.05)})


def _place(line: dict[str, Row], base: Row) -> str:
    row = tables.first(line)
    return f"{'one step, ' * (row.run == 'step')}{tables.sizes(row, base)}"


def _speed(row: Row | None) -> float | None:
    """How fast a provider does a case, if it does; the yardstick without lengths and resets does not."""
    return row.speed if row is not None and row.status == "measured" else None


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if speed := _speed(row):
        return digits(speed)
    return row.status if row.status in ("wrong", "failed") else "-"


def _axis(base: Row, name: str) -> str:
    inputs_follow = name == "hidden" and base.inputs == base.hidden
    return AXES[name].replace("H", "H = input size I") if inputs_follow else AXES[name]


def _fixed(base: Row, name: str) -> str:
    """The headline's sizes but for one."""
    letter = {"hidden": "H", "batch": "B", "steps": "T"}[name]
    return " ".join(part for part in tables.sizes(base).split() if not part.startswith(letter))


def _describe(figure: Figure, rows: Iterable[Row], words: str) -> None:
    """A caption that says where the figures come from."""
    characters = int(figure.get_figwidth() * 21)
    caption = "\n".join(filter(None, (words, tables.origin(list(rows)))))
    lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, characters)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=6.5, color="0.35")
