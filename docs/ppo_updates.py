"""A picture of docs/reinforcement_learning.md: an update of recurrent PPO in one call, and by a loop over the steps.

python docs/ppo_updates.py draws docs/pictures/ppo_updates.png from bench/results/cpu/ppo.csv, which
`python -m bench ppo --out` wrote.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "cpu" / "ppo.csv"
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
        f"float32, {first.device}, torch {first.torch}; medians,\n"
        "lines: from the 20th to the 80th percentile of the rounds"
    )
    figure.supxlabel(caption, x=0.01, ha="left", size=7, color="0.35")
    return figure


if __name__ == "__main__":
    measured = pd.read_csv(TABLE)
    drawn(measured[measured["H"] == HIDDEN]).savefig(PICTURE, dpi=200)
