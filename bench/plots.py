"""Results as pictures: every provider at the headline, time and memory against each size, the speed at every case."""

import itertools
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib import style
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from . import report
from .cases import Case
from .providers import OURS, YARDSTICK
from .report import MIB, digits
from .results import BROKEN, CASE

MODES = ("training", "forward")  # a panel each
SIZES = {"hidden_size": ("hidden size", "H", "units"), "batch": ("batch size", "B", "sequences"),
         "steps": ("sequence length", "T", "steps")}  # fmt: skip
MEMORY = {"peak_bytes": "allocated at most during a call (MiB)", "kept_bytes": "kept for backward (MiB)"}
STRONGEST = 4.0  # a speed of this, or of its inverse, has the last colour
BARS = "Medians; bars from the 20th to the 80th percentile."
NAMES = "T steps, B batch, H hidden, L layers, D directions"
MARKERS = "^Dv<>PXphHd*8+x1234|_"  # distinguish the contenders in print without colour, too
COLOURS = style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
LOOK: Any = {
    "font.size": 8, "legend.frameon": False, "figure.constrained_layout.use": True, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "lines.markersize": 4.5, "lines.linewidth": 1.2, "errorbar.capsize": 2, "axes.titlesize": 8.5,
}  # fmt: skip


def draw(rows: pd.DataFrame, folder: Path, names: Collection[str] = (), dpi: int = 200) -> list[Path]:
    """NAME-DEVICE.png in a new or old `folder`: the figures of each device, all or those of `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, its in rows.groupby("device", sort=False):
        for name, figure in figures(its).items():
            if not names or name in names:
                paths.append(folder / f"{name}-{report.slug(device)}.png")
                figure.savefig(paths[-1], dpi=dpi)
    return paths


def figures(rows: pd.DataFrame) -> dict[str, Figure]:
    """The figures of one device by name; none where there are fewer than two points to compare."""
    rows = report.measured(rows)
    memory = report.memory_column(rows[rows["mode"] == "training"])
    with style.context(LOOK):
        drawn = {"headline": _headline(rows)}
        for name, size in {"hidden": "hidden_size", "batch": "batch", "steps": "steps"}.items():
            drawn[name] = _lines(rows, itertools.product(MODES, [size]))
        drawn["speed"] = _speed(rows)
        drawn["memory"] = _lines(rows, [("training", "hidden_size"), ("training", "steps")], memory)
        drawn["instead"] = _instead(rows)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _headline(rows: pd.DataFrame) -> Figure | None:
    """The time of every provider at the headline, the fastest on top."""
    base, looks = report.headline_of(rows), _looks(rows)
    panels = {mode: _along(rows, replace(base, mode=mode), "median_s") for mode in MODES}
    panels = {mode: its for mode, its in panels.items() if len(its) > 1}
    if not panels:
        return None
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(7.2, 1.4 + 0.17 * longest))
    for axes, (mode, its) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for place, row in enumerate(its.itertuples()):
            low, middle, high = 1e3 * row.p20_s, 1e3 * row.median_s, 1e3 * row.p80_s
            axes.errorbar([middle], [place], xerr=[[middle - low], [high - middle]], **looks[row.contender])
            axes.text(1.1 * high, place, digits(middle), va="center", fontsize=7)
        axes.set_yticks(range(len(its)), its["contender"] + report.stars(its))
        axes.set(title=mode, xscale="log", xlabel="time a call (ms)", ylim=(longest - 0.3, -0.7))
        axes.margins(x=0.3)  # room for the last number
        _plain_ticks(axes.xaxis)
    return _described(figure, f"Every provider at {report.sizes(base)}", pd.concat(panels.values()), BARS)


def _lines(rows: pd.DataFrame, panels: Any, memory: str | None = None) -> Figure | None:
    """The time of a step, or a column of memory, against a size: a panel for each mode and size, a line a contender."""
    base, looks, drawn = report.headline_of(rows), _looks(rows), {}
    for mode, size in panels:
        its = _along(rows, replace(base, mode=mode), size)
        its = its[(its[memory] > 0) & ~its["graph"]] if memory else its  # a logarithmic axis has no place for 0
        if its[size].nunique() > 1:
            drawn[mode, size] = its
    if not drawn:
        return None
    figure = Figure(figsize=(7.2 if len(drawn) > 1 else 4.4, 3.5))
    for axes, ((mode, size), lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items()):
        for contender, its in lines.groupby("contender", sort=False):
            low, time, high = (1e6 * its[column] / its["steps"] for column in ("p20_s", "median_s", "p80_s"))
            values, bars = (its[memory] / MIB, None) if memory else (time, np.array([time - low, high - time]))
            axes.errorbar(its[size], values, bars, label=contender + max(report.stars(its)), **looks[contender])
        name, letter, unit = SIZES[size]
        fixed = " ".join(part for part in report.sizes(base).split() if not part.startswith(letter))
        follows = " = input size I" if size == "hidden_size" and base.input_size == base.hidden_size else ""
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", title=f"{mode}, {fixed}", xlabel=f"{name} {letter}{follows} ({unit})")
        axes.xaxis.set_major_formatter("{x:g}")
        _plain_ticks(axes.yaxis)
    figure.axes[0].set_ylabel(MEMORY[memory] if memory else "time a step (µs)")
    legend = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="outside right upper")
    title = "Memory of training" if memory else f"Time a step against the {name}"
    return _described(figure, title, pd.concat(drawn.values()), "" if memory else BARS)


def _speed(rows: pd.DataFrame) -> Figure | None:
    """How many times as fast as torch.nn.LSTM each contender is at each case: a number, and a colour."""
    base, lines, starred = report.headline_of(rows), report.by_case(rows), set(rows["case"][report.stars(rows) == "*"])
    rows = _side_by_side(rows)
    lines = lines[lines.index.isin(rows["case"])]
    names = [f"{case.mode} {report.sizes(case, base)}{'*' * (case.name in starred)}" for case in lines["object"]]
    known = rows.assign(speed=rows["speed"].where(rows["status"] == "measured"))
    speeds, status = (known.pivot(index="case", columns="contender", values=of).loc[lines.index]
                      for of in ("speed", "status"))  # fmt: skip
    columns = [name for name in rows["contender"].unique() if speeds[name].any() and name != YARDSTICK]
    columns.sort(key=lambda name: not name.startswith(OURS))
    if not columns or len(names) < 2:
        return None
    figure = Figure(figsize=(max(4.5, 2.7 + 0.55 * len(columns)), max(3.0, 1.9 + 0.19 * len(names))))
    axes = figure.subplots()
    # This map runs from dark to light through grey: slower and faster differ in print without colour, too.
    image = axes.imshow(speeds[columns], "cividis", norm=LogNorm(1 / STRONGEST, STRONGEST), aspect="auto")
    for (y, case), (x, name) in itertools.product(enumerate(lines.index), enumerate(columns)):
        speed, state = speeds.at[case, name], status.at[case, name]
        text = digits(speed) if speed > 0 else "" if pd.isna(state) else state if state in BROKEN else "-"
        axes.text(x, y, text, color="white" if speed < 1 else "black", fontsize=7, ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    bar = figure.colorbar(image, extend="both", aspect=40, pad=0.02, label="times as fast as torch.nn.LSTM")
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    words = f"Named by what differs from {report.sizes(base)}: {NAMES}. A dash: the provider does not do this case."
    return _described(figure, "Times as fast as torch.nn.LSTM", rows[rows["median_s"].notna()], words)


def _side_by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of contenders that were timed at many cases, and of cases at which several of them were."""
    timed = rows["status"].isin(["measured", *BROKEN]) & (rows["contender"] != YARDSTICK)
    several = timed & (rows["case"].map(rows["case"][timed].value_counts()) > 1)
    many = rows["contender"].map(rows["contender"][several].value_counts()) >= several.sum() / 20
    left = rows["case"].map(rows["case"][timed & many].value_counts()) > 1
    return rows[left & (many | (rows["contender"] == YARDSTICK))]


def _instead(rows: pd.DataFrame) -> Figure | None:
    """The usual workarounds around torch.nn.LSTM, and ours, as bars; of as many steps, so that they can be compared."""
    lines, base = report.instead(rows), report.headline_of(rows)
    lines = lines[lines["steps"] == base.steps]
    if not len(lines):
        return None
    figure = Figure(figsize=(7.2, 1.1 + 0.62 * len(lines)))
    axes = figure.subplots()
    for place, line in enumerate(lines.itertuples()):
        theirs = -0.19, line.median_s, "0.7", report.WRITTEN[line.provider]
        for offset, seconds, colour, name in (theirs, (0.19, line.ours_s, "black", "gpu_lstm")):
            bar = axes.barh(place + offset, 1e3 * seconds, 0.34, color=colour)
            axes.bar_label(bar, [f"{digits(1e3 * seconds)} ms, {name}"], padding=4)
    axes.set_yticks(range(len(lines)), [report.sizes(case, base) for case in lines["object"]])
    axes.set(xlabel="time a call, forward and backward (ms)", xlim=(0, 2.0e3 * lines["median_s"].max()))
    axes.invert_yaxis()
    axes.grid(False)  # it would run through the labels
    return _described(figure, "Where torch.nn.LSTM needs help", lines, f"All: {report.sizes(base)}. Medians.")


def _along(rows: pd.DataFrame, base: Case, size: str) -> pd.DataFrame:
    """The timed rows that differ from a case in one size, from small to large; inputs follow the hidden size."""
    wanted = rows.assign(**{field: value for field, value in asdict(base).items() if field != size})
    if base.input_size == base.hidden_size:
        wanted["input_size"] = wanted["hidden_size"]
    same = (rows[CASE] == wanted[CASE]).all(axis=1)
    return rows[same & rows["median_s"].notna()].sort_values(size, kind="stable")


def _looks(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """One for each contender in all figures of a device; a replayed graph is its provider's, hollow and dotted."""
    rows = rows[rows["median_s"].notna()]
    others = [name for name in rows["provider"].unique() if name not in (OURS, YARDSTICK)]
    looks: dict[str, dict[str, Any]] = {
        name: {"color": colour, "marker": marker}
        for name, colour, marker in zip(others, itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    }
    looks[OURS] = {"color": "black", "marker": "o", "linewidth": 2.4, "elinewidth": 1, "zorder": 4}
    looks[YARDSTICK] = {"color": "#d55e00", "marker": "s", "linestyle": "--", "zorder": 5}
    hollow = {"markerfacecolor": "white", "linestyle": ":", "linewidth": 1.2}
    return {row.contender: looks[row.provider] | (hollow if row.graph else {}) for row in rows.itertuples()}


def _plain_ticks(axis: Any) -> None:
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _described(figure: Figure, title: str, rows: pd.DataFrame, words: str) -> Figure:
    """With a title, and a caption that says where the figures come from."""
    starred = report.STARRED if "*" in set(report.stars(rows)) else ""
    figure.suptitle(title, fontsize=10)
    caption = "\n".join(filter(None, (words, starred, report.origin(rows))))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=6.5, color="0.35", wrap=True)
    return figure
