"""A picture of docs/reinforcement_learning.md: an update of recurrent PPO in one call, and by a loop over the steps.

python docs/ppo_updates.py draws docs/pictures/ppo_updates.png from the figures in ppo_updates.csv beside it. With
--measure it first measures them on this machine, in about three minutes, and writes them there.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench, which is not installed

TABLE = ROOT / "docs" / "pictures" / "ppo_updates.csv"
PICTURE = TABLE.with_suffix(".png")
SIZES = [(128, B, 128) for B in (2, 8, 16, 64)]  # T, B environments, H
RUNS = 4  # one after another, since other programs on the machine come and go
COLOURS = {"LSTM": "#1f5fa8", "GRU": "#d9730d"}


def measured() -> pd.DataFrame:
    """Return a row for each size and cell, with medians over the rounds of all runs. The ratio is the median of the
    ratios of the rounds."""
    from bench import ppo, results

    torch.set_num_threads(1)  # as ppo.measure does, and as the name of the device says
    where = {name: results.provenance("cpu")[name] for name in ("device", "torch", "gpu_lstm", "commit", "date")}
    runs = [[ppo.measure("cpu", *sizes) for sizes in SIZES] for _ in range(RUNS)]
    rows = []
    for ((T, B, H), of_size), cell in itertools.product(zip(SIZES, zip(*runs)), ppo.CELLS):
        updates = ([seconds[cell, way, "update"] for seconds in of_size] for way in ppo.WAYS)
        loop, one_call = map(np.concatenate, updates)
        low, ratio, high = np.percentile(loop / one_call, [20, 50, 80])
        times = dict(loop_ms=1e3 * np.median(loop), one_call_ms=1e3 * np.median(one_call))
        sizes = dict(cell=cell, T=T, B=B, H=H, rounds=len(loop))
        rows.append(sizes | times | dict(times_as_fast=ratio, p20=low, p80=high) | where)
    return pd.DataFrame(rows)


def drawn(rows: pd.DataFrame) -> Figure:
    """Draw how many times as fast one call is: a bar for each number of environments and each cell, and percentiles."""
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.subplots()
    for offset, (cell, its) in zip((-0.2, 0.2), rows.groupby("cell", sort=False)):
        places, ratios = np.arange(len(its)) + offset, its["times_as_fast"]
        spread = [ratios - its["p20"], its["p80"] - ratios]
        axes.barh(places, ratios, 0.38, color=COLOURS[cell], xerr=spread, error_kw=dict(ecolor="0.4", lw=1))
        for place, row in zip(places, its.itertuples()):
            axes.text(row.p80, place, f"  {cell}: {row.times_as_fast:.1f}", va="center", size=9, color=COLOURS[cell])
    axes.axvline(1, color="black", linewidth=0.8)
    sizes = rows["B"].unique()
    axes.set_yticks(range(len(sizes)), [f"{B} environments" for B in sizes], size=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.15 * rows["p80"].max())
    axes.invert_yaxis()
    axes.set_title("An update of recurrent PPO:\nthe loop's time over one call's", size=10, weight="bold", loc="left")
    first = rows.iloc[0]
    caption = (
        "loop: torch.nn's module called for every step, its state multiplied by 0 at a reset; 128 steps, 128 units,\n"
        f"float32, {first.device}, torch {first.torch}; medians over at least {rows['rounds'].min()} rounds,\n"
        "lines: from the 20th to the 80th percentile"
    )
    figure.supxlabel(caption, x=0.01, ha="left", size=7, color="0.35")
    return figure


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        measured().to_csv(TABLE, index=False, float_format="%.3f")
    drawn(pd.read_csv(TABLE)).savefig(PICTURE, dpi=200)
