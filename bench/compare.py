"""python -m bench compare: find the cases that became slower or faster between two runs on the same device.

The compared figure is `speed`: the time of torch.nn.LSTM divided by the time of the provider in the same round. The
drift of the machine cancels in it. For runs with different versions of torch, and for torch itself, seconds are
compared, and a change must be 10 % larger to count.

A change counts if it exceeds --fail-under, and if the intervals of three standard errors around the two medians do not
overlap. The intervals are computed from p20, p80 and the number of rounds.

In a simulation with 3 % noise per round and 5 % drift per run, the same code was slower in none of 650 pairs of runs. A
case that is slower by 10 % was found in 93 % of pairs with 20 rounds, in 99 % with 30, and in 59 % with 9.
"""

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from rich.text import Text

from . import report
from .providers import YARDSTICK
from .results import BROKEN, TIMED

FAIL_UNDER = 0.95
IN_SECONDS = 0.9  # a factor of the threshold where seconds are compared, in which the drift does not cancel
ROUNDS = 20  # with so many, three standard errors of a median reach to p20 and p80: 3 * 1.253 = 0.842 * 20**0.5
KEY, STATUS = ["case", "provider", "graph"], ["status_old", "status_new"]
VERDICTS = ["slower", "broken", "faster", "not timed now", "not timed before"]


def compare(old: pd.DataFrame, new: pd.DataFrame, fail_under: float) -> pd.DataFrame:
    """Return the rows that were timed in either run, with three more columns.

    `verdict` is one of VERDICTS or "". `ratio` is below 1 where the new run is slower. `is_regression` is a bool.
    """
    if not 0 < fail_under <= 1:
        raise ValueError(f"--fail-under is {fail_under:g}, expected more than 0 and at most 1")
    report.measured(pd.concat([old, new]))  # raises unless all rows are of one device
    # A provider that was not timed has no separate row for its graph, unless only the graph was not timed.
    replayed = new[~(new["status"].isin(TIMED) | new["graph"])].assign(graph=True)
    try:
        rows = old.merge(pd.concat([new, replayed]), "outer", KEY, suffixes=("_old", "_new"), validate="one_to_one")
    except pd.errors.MergeError as error:
        raise ValueError(f"a row is there twice, expected one run a file: {error}") from None
    others = pd.concat(rows.loc[report.is_ours(rows), f"note_{side}"] for side in ("old", "new")).dropna().unique()
    rows = rows[rows[STATUS].isin(TIMED).any(axis=1)]
    (before, now), broken = (rows[side].isin(TIMED) for side in STATUS), rows["status_new"].isin(BROKEN)
    ours = report.is_ours(rows)
    if not (ours & before & (now | broken)).any():
        raise ValueError(f"nothing to compare: no case of gpu_lstm was timed in both runs; {'; '.join(others)}")
    in_seconds = (rows["provider"] == YARDSTICK) | rows[["speed_old", "speed_new"]].isna().any(axis=1)
    in_seconds |= set(old["torch"]) != set(new["torch"])
    (low_old, middle_old, high_old), (low_new, middle_new, high_new) = (
        _interval(rows.filter(regex=f"_{side}$"), in_seconds) for side in ("old", "new")
    )
    unsound = rows[before & now & ~np.isfinite(low_old + high_old + low_new + high_new)]
    for row in unsound.itertuples():
        raise ValueError(f"{row.provider} at {row.case} was timed, expected positive times and rounds")
    ratio, threshold = middle_new / middle_old, fail_under * np.where(in_seconds, IN_SECONDS, 1)
    slower, faster = (ratio < threshold) & (high_new < low_old), (ratio > 1 / threshold) & (high_old < low_new)
    verdict = np.select([slower, before & broken, faster, before & ~now, ~before], VERDICTS, "")
    figures = {"ratio": ratio, "in_seconds": in_seconds, "before": middle_old, "now": middle_new}
    rows = rows.assign(verdict=verdict, is_regression=ours & (slower | before & broken), **figures)
    # The largest change comes first.
    return rows.sort_values("ratio", key=lambda ratio: -np.abs(np.log(ratio)), kind="stable")


def _interval(rows: pd.DataFrame, in_seconds: pd.Series) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Return a median, between the ends of three standard errors to either side: (low, median, high), larger if faster.

    The median is of `speed`, and where `in_seconds` is True of calls per second.
    """
    rows = rows.rename(columns=lambda name: name.rpartition("_")[0])
    rows = rows.where(rows[["rounds", "median_s", "p20_s", "p80_s"]].gt(0).all(axis=1))  # NaN without times
    low, middle, high = (
        rows[speed].where(~in_seconds, 1 / rows[seconds])
        for speed, seconds in (("speed_p20", "p80_s"), ("speed", "median_s"), ("speed_p80", "p20_s"))
    )
    scale = np.sqrt(ROUNDS / rows["rounds"].astype(float)).where(middle > 0)
    return middle - scale * (middle - low), middle, middle + scale * (high - middle)


def show(old: pd.DataFrame, new: pd.DataFrame, fail_under: float) -> int:
    """Print the result of `compare`. Return 1 if gpu_lstm itself is slower, wrong or failed, else 0."""
    rows, console, lines = compare(old, new, fail_under), report.console(), []
    told = rows[rows["verdict"] != ""].sort_values("verdict", key=lambda its: its.map(VERDICTS.index), kind="stable")
    for row in told.itertuples():
        cells, verdict = ["", "", ""], row.verdict
        if pd.notna(row.ratio):
            cells = [f"{1e3 / it:.3g} ms" if row.in_seconds else f"{it:.3g}x" for it in (row.before, row.now)]
            cells.append(f"{row.ratio:.2f}")
        else:
            why = (row.status_new, row.note_new) if row.status_old in TIMED else (row.status_old, row.note_old)
            verdict += ": " + (": ".join(filter(pd.notna, why)) or "not run")
        lines.append([row.case, row.provider + " (graph)" * row.graph, *cells, verdict])
    if lines:
        table = pd.DataFrame(lines, columns=["case", "provider", "before", "now", "ratio", "verdict"])
        console.print(report.table(table, "Changes (x: times as fast as torch.nn)"))
    before, now = (", ".join(sorted(set(side["torch"]))) for side in (old, new))
    console.print(f"torch {before} before, {now} now; within the noise: {(rows['verdict'] == '').sum()}")
    count = rows["is_regression"].sum()
    text = f"regressions of gpu_lstm: {count}, at --fail-under {fail_under:g}"
    console.print(Text(text, style="bold red" if count else "bold green"))
    return int(count > 0)
