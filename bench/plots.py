"""Draw results as a picture: one call, and the usual workarounds."""

from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from . import report

LOOK: Any = {
    "font.size": 8, "legend.frameon": False, "figure.constrained_layout.use": True, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "lines.markersize": 4.5, "lines.linestyle": "none",
}  # fmt: skip
MARKERS = "sPoD^v"  # of the workarounds, in the order of report.WORKAROUNDS
FEWEST = 3  # the fewest cases that are worth a picture


def draw(rows: pd.DataFrame, path: Path) -> bool:
    """Save a picture of the results of one device. Return whether they have enough cases."""
    with style.context(LOOK):
        if (figure := instead(report.measured(rows))) is None:
            return False
        figure.savefig(path, dpi=150)
    few = Image.open(path).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)  # with few colours it has a third of the bytes
    return True


def instead(rows: pd.DataFrame) -> Figure | None:
    """Return a figure of the times of workarounds over the time of one call, or None for fewer than FEWEST cases.

    For each workaround it shows the cases where the workaround is fastest and slowest. The tables have the other cases.
    """
    lines, base = report.instead(rows), report.headline_of(rows)
    lines = lines[lines["mode"] == "training"]
    if lines["case"].nunique() < FEWEST:
        return None
    ratios = lines.groupby("provider")["ratio"]
    ends = lines.loc[[*ratios.idxmin(), *ratios.idxmax()], "case"]
    lines = lines[lines["case"].isin(ends)]
    cases = lines.drop_duplicates("case")
    places = {case: place for place, case in enumerate(cases["case"])}
    figure = Figure(figsize=(4.8, 1.9 + 0.21 * len(cases)))
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1, linestyle="-")
    for n, (provider, (column, _)) in enumerate(report.WORKAROUNDS.items()):
        its = lines[lines["provider"] == provider]
        if len(its):
            axes.plot(its["ratio"], its["case"].map(places), MARKERS[n], color=f"C{n}", label=column)
    axes.set_yticks(range(len(cases)), [report.sizes(case, base) for case in cases["object"]])
    axes.set(xscale="log", xlabel="the workaround's time over one call's")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    for side, text in ((0.98, "it is faster "), (1.02, " one call is faster")):
        axes.text(side, -0.9, text, ha="right" if side < 1 else "left", va="center", color="0.35")
    title, bold = "Workarounds for torch.nn, beside one call", {"weight": "bold", "size": 9}
    figure.legend(loc="outside upper center", ncols=3, title=title, title_fontproperties=bold)
    device, date = lines["device"].iloc[0], lines["date"].max()[:10]
    sizes = f"{report.sizes(base)} (steps, sequences, units), except where a row says another size"
    caption = f"{sizes}.\nTraining; each workaround's best and worst case.\n{device}, {date}"
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color="0.35")
    return figure
