"""A picture of docs/reinforcement_learning.md: an update of recurrent PPO in one call, and by a loop over the steps.

python docs/ppo_updates.py draws docs/pictures/ppo_updates.png from the figures in ppo_updates.csv beside it. With
--measure it first measures them on this machine, in about a minute, and writes them there.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench, which is not installed

TABLE = ROOT / "docs" / "pictures" / "ppo_updates.csv"
PICTURE = TABLE.with_suffix(".png")
SIZES = [(128, B, 128) for B in (2, 8, 16, 64)]  # T, B environments, H
RUNS = 3  # one after another, since other programs on the machine come and go
LOOP, ONE_CALL = "0.72", "#1f5fa8"


def measured() -> pd.DataFrame:
    """A row for each size, over the rounds of all runs: medians of both sides, and of their ratio in a round."""
    from bench import ppo, results

    runs = [[ppo.measure("cpu", *sizes) for sizes in SIZES] for _ in range(RUNS)]
    where = {name: results.provenance("cpu")[name] for name in ("device", "torch", "gpu_lstm", "commit", "date")}
    rows = []
    for (T, B, H), of_size in zip(SIZES, zip(*runs)):
        loop, one_call = (np.concatenate([seconds[name] for seconds in of_size]) for name in ("loop", "one_call"))
        low, ratio, high = np.percentile(loop / one_call, [20, 50, 80])
        times = dict(loop_ms=1e3 * np.median(loop), one_call_ms=1e3 * np.median(one_call))
        rows.append(dict(T=T, B=B, H=H, rounds=len(loop), **times, times_as_fast=ratio, p20=low, p80=high, **where))
    return pd.DataFrame(rows)


def drawn(rows: pd.DataFrame) -> Figure:
    """Two bars for each number of environments, labelled with their times."""
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.subplots()
    longest = rows["loop_ms"].max()
    for place, row in enumerate(rows.itertuples()):
        axes.barh(place - 0.2, row.loop_ms, 0.38, color=LOOP)
        axes.barh(place + 0.2, row.one_call_ms, 0.38, color=ONE_CALL)
        axes.text(row.loop_ms + 0.01 * longest, place - 0.2, f"{row.loop_ms:.0f} ms, loop", va="center", size=9)
        ratio = f"{row.one_call_ms:.0f} ms, one call: {row.times_as_fast:.1f} times as fast"
        axes.text(row.one_call_ms + 0.01 * longest, place + 0.2, ratio, va="center", size=9, color=ONE_CALL)
    axes.set_yticks(range(len(rows)), [f"{B} environments" for B in rows["B"]], size=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xlim(0, 1.25 * longest)
    axes.invert_yaxis()
    axes.set_title("One update of recurrent PPO, 128 steps, 128 units", size=10, weight="bold", loc="left")
    first = rows.iloc[0]
    spreads = ", ".join(f"{row.p20:.1f}-{row.p80:.1f}" for row in rows.itertuples())
    rounds = f"medians over at least {rows['rounds'].min()} rounds, on a busy machine"
    caption = (
        "loop: torch.nn.LSTM called for every step, its state multiplied by 0 at a reset\n"
        f"float32, {first.device}, torch {first.torch}; {rounds}\n"
        f"ratios from the 20th to the 80th percentile: {spreads}"
    )
    figure.supxlabel(caption, x=0.01, ha="left", size=7, color="0.35")
    return figure


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        measured().to_csv(TABLE, index=False, float_format="%.3f")
    drawn(pd.read_csv(TABLE)).savefig(PICTURE, dpi=200)
