"""Results as pictures: the speed at every case, the usual workarounds."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib import style
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from . import report
from .providers import OURS, YARDSTICK
from .report import digits
from .results import BROKEN

NAMES = "T steps, B batch, H hidden, L layers, D directions. A dash: the provider does not do this case."
LOOK: Any = {
    "font.size": 8, "legend.frameon": False, "figure.constrained_layout.use": True, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "axes.titlesize": 8.5,
}  # fmt: skip


def draw(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Save the figures of each device as NAME-DEVICE.png in `folder`, which may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, its in rows.groupby("device", sort=False):
        for name, figure in figures(its).items():
            paths.append(folder / f"{name}-{report.slug(device)}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def figures(rows: pd.DataFrame) -> dict[str, Figure]:
    """The figures of one device by name; none where there are fewer than two points to compare."""
    rows = report.measured(rows)
    with style.context(LOOK):
        drawn = {"speed": _speed(rows), "instead": _instead(rows)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _speed(rows: pd.DataFrame) -> Figure | None:
    """How many times as fast as torch.nn.LSTM each contender is at each case: a number, and a colour."""
    base, lines, starred = report.headline_of(rows), report.by_case(rows), set(rows["case"][report.stars(rows) == "*"])
    rows = _side_by_side(rows)
    lines = lines[lines.index.isin(rows["case"])]
    names = [f"{case.mode} {report.sizes(case, base)}{'*' * (case.name in starred)}" for case in lines["object"]]
    status = rows.pivot(index="case", columns="contender", values="status").loc[lines.index]
    speeds = rows.pivot(index="case", columns="contender", values="speed").loc[lines.index].where(status == "measured")
    columns = [name for name in rows["contender"].unique() if speeds[name].any() and name != YARDSTICK]
    columns.sort(key=lambda name: not name.startswith(OURS))
    if not columns or len(names) < 2:
        return None
    figure = Figure(figsize=(max(4.5, 2.7 + 0.55 * len(columns)), max(3.0, 1.9 + 0.19 * len(names))))
    axes = figure.subplots()
    # This map runs from dark to light through grey: slower and faster differ in print without colour, too.
    image = axes.imshow(speeds[columns], "cividis", norm=LogNorm(1 / 4, 4), aspect="auto")
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
    title, words = "Times as fast as torch.nn.LSTM", f"Named by what differs from {report.sizes(base)}: {NAMES}"
    return _described(figure, title, rows[rows["median_s"].notna()], words)


def _side_by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of contenders that were timed at many cases, and of cases at which several of them were."""
    timed = rows["status"].isin(["measured", *BROKEN]) & (rows["contender"] != YARDSTICK)
    several = timed & (rows["case"].map(rows["case"][timed].value_counts()) > 1)
    many = rows["contender"].map(rows["contender"][several].value_counts()) >= several.sum() / 20
    left = rows["case"].map(rows["case"][timed & many].value_counts()) > 1
    return rows[left & (many | (rows["contender"] == YARDSTICK))]


def _instead(rows: pd.DataFrame) -> Figure | None:
    """The usual workarounds around torch.nn.LSTM, and ours, as bars for equally many steps, so that they compare."""
    lines, base = report.instead(rows), report.headline_of(rows)
    lines = lines[lines["steps"] == base.steps]
    if not len(lines):
        return None
    figure, places = Figure(figsize=(7.2, 1.1 + 0.62 * len(lines))), np.arange(len(lines))
    axes, names = figure.subplots(), lines["provider"].map(report.WRITTEN)
    for offset, column, colour in ((-0.19, "median_s", "0.7"), (0.19, "ours_s", "black")):
        bars = axes.barh(places + offset, 1e3 * lines[column], 0.34, color=colour)
        written = names if column == "median_s" else ["gpu_lstm"] * len(lines)
        axes.bar_label(bars, [f"{digits(1e3 * s)} ms, {name}" for s, name in zip(lines[column], written)], padding=4)
    axes.set_yticks(places, [report.sizes(case, base) for case in lines["object"]])
    axes.set(xlabel="time a call, forward and backward (ms)", xlim=(0, 2.0e3 * lines["median_s"].max()))
    axes.invert_yaxis()
    axes.grid(False)  # it would run through the labels
    return _described(figure, "Where torch.nn.LSTM needs help", lines, f"All: {report.sizes(base)}. Medians.")


def _described(figure: Figure, title: str, rows: pd.DataFrame, words: str) -> Figure:
    """Add a title, and a caption that says where the figures come from."""
    starred = report.STARRED if "*" in set(report.stars(rows)) else ""
    figure.suptitle(title, fontsize=10)
    caption = "\n".join(filter(None, (words, starred, report.origin(rows))))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=6.5, color="0.35", wrap=True)
    return figure
