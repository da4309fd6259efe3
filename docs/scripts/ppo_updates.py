"""A picture and two tables of docs/reinforcement_learning.md: iterations of recurrent PPO, and steps of acting.

python docs/scripts/ppo_updates.py draws docs/pictures/ppo_updates.png, and writes both tables. Their rows are
those that `python -m bench ppo --out` and `python -m bench acting --out` wrote into bench/results/cpu.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu"
PAGE = ROOT / "docs" / "reinforcement_learning.md"
PICTURE = ROOT / "docs" / "pictures" / "ppo_updates.png"
HIDDEN = 128  # H, the units of the rows that are drawn
COLOURS = {"LSTM": "#1f5fa8", "GRU": "#d9730d"}


def drawn(rows: pd.DataFrame) -> Figure:
    """Draw how many times as fast one call is: a bar for each number of environments and each cell, and percentiles."""
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.subplots()
    for offset, (cell, its) in zip((-0.2, 0.2), rows.groupby("cell", sort=False)):
        places, ratios = np.arange(len(its)) + offset, its["times as fast"]
        spread = [ratios - its["p20"], its["p80"] - ratios]
        axes.barh(places, ratios, 0.38, color=COLOURS[cell], xerr=spread, error_kw=dict(ecolor="0.4", lw=1))
        for place, ratio, high in zip(places, ratios, its["p80"]):
            axes.text(high, place, f"  {cell}: {ratio:.1f}", va="center", size=9, color=COLOURS[cell])
    axes.axvline(1, color="black", linewidth=0.8)
    sizes = rows["N"].unique()
    axes.set_yticks(range(len(sizes)), [f"{N} environments" for N in sizes], size=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.15 * rows["p80"].max())
    axes.invert_yaxis()
    axes.set_title("An update of recurrent PPO:\nthe loop's time over one call's", size=10, weight="bold", loc="left")
    first = rows.iloc[0]
    caption = (
        "loop: torch.nn's module called for every step, its state multiplied by 0 at a reset; 128 steps, 128 units,\n"
        f"float32, {first.device}, torch {first.torch}; medians, "
        "lines: from the 20th to the 80th percentile of the rounds"
    )
    figure.supxlabel(caption, x=0.01, ha="left", size=7, color="0.35")
    return figure


def speed(row: pd.Series, name: str) -> str:
    """Return how many times as fast one side is, and its percentiles."""
    ratios = (row[f"{name}{each}"] for each in ("times as fast", "p20", "p80"))
    median, low, high = (f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" for ratio in ratios)
    return f"{median} ({low} to {high})"


def iterations(rows: pd.DataFrame) -> list[list[str]]:
    """Return the lines of the table of iterations."""
    parts = "", "rollout, ", "iteration, "
    return [
        [f"{row['cell']}, {row['H']}", f"{row['N']}", *(speed(row, part) for part in parts)]
        for _, row in rows.iterrows()
    ]


def steps(rows: pd.DataFrame) -> list[list[str]]:
    """Return the lines of the table of acting. A line has the row without resets, and the row with them."""
    lines = []
    for (cell, N), its in rows.groupby(["cell", "N"], sort=False):
        line = [f"{cell}, {N:,}"]
        for _, row in its.sort_values("resets").iterrows():
            line += [f"{row['torch.nn us']:,.0f}", speed(row, "module, "), speed(row, "Stream, ")]
        lines.append(line)
    return lines


def write(page: str, head: str, lines: list[list[str]]) -> str:
    """Return a page with these lines in the one table whose first line begins with `head`."""
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    page, count = re.subn(rf"(?m)^({re.escape(head)}.*\n.*\n)(?:\|.*\n)+", lambda found: found[1] + text, page)
    if count != 1:
        raise ValueError(f"expected one table that begins with {head!r}, got {count}")
    return page


if __name__ == "__main__":
    measured, acting = (
        pd.read_csv(RESULTS / f"{name}.csv").query("device == 'AMD EPYC, 1 thread'") for name in ("ppo", "acting")
    )
    drawn(measured[measured["H"] == HIDDEN]).savefig(PICTURE, dpi=200)
    changed = write(PAGE.read_text(), "| cell, units | environments |", iterations(measured))
    PAGE.write_text(write(changed, "| cell, N |", steps(acting)))
