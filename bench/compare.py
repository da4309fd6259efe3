"""python -m bench compare: what has become slower or faster between two runs on the same device.

It compares `speed`, torch.nn.LSTM's time over the provider's in the same round, so that drift cancels. For runs with
different versions of torch, and for torch itself, it compares seconds, and a change must be 10 % larger to count. A
change counts if it exceeds --fail-under and the intervals of three standard errors around the two medians, from p20,
p80 and the rounds, do not overlap. Simulated with 3 % noise per round and 5 % drift per run, the same code is never
slower in 650 pairs of runs; a case slower by 10 % is found in 93 % of pairs at 20 rounds, 99 % at 30, 59 % at 9.
"""

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from rich.text import Text

from . import report
from .providers import YARDSTICK
from .results import BROKEN, TIMED

FAIL_UNDER = 0.95
IN_SECONDS = 0.9  # times the threshold, where the drift of the machine does not cancel
ROUNDS = 20  # at which three standard errors of a median reach as far as p20 and p80: 3 * 1.253 = 0.842 * 20**0.5
KEY, STATUS = ["case", "provider", "graph"], ["status_old", "status_new"]
VERDICTS = ["slower", "broken", "faster", "not timed now", "not timed before"]


def compare(old: pd.DataFrame, new: pd.DataFrame, fail_under: float) -> pd.DataFrame:
    """The rows timed in either run: `verdict` of VERDICTS or "", `ratio` below 1 where slower now, `is_regression`."""
    if not 0 < fail_under <= 1:
        raise ValueError(f"--fail-under is {fail_under:g}, expected more than 0 and at most 1")
    report.measured(pd.concat([old, new]))  # raises unless they are of one device
    # What was not timed has no separate row for a graph, unless it is the graph alone.
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
    return rows.sort_values("ratio", key=lambda ratio: -np.abs(np.log(ratio)), kind="stable")  # the most changed first


def _interval(rows: pd.DataFrame, in_seconds: pd.Series) -> tuple[pd.Series, pd.Series, pd.Series]:
    """A median between the ends of three standard errors, of speeds or of calls a second: more is faster."""
    rows = rows.rename(columns=lambda name: name.rpartition("_")[0])
    rows = rows.where(rows[["rounds", "median_s", "p20_s", "p80_s"]].gt(0).all(axis=1))  # NaN where there are no times
    low, middle, high = (
        rows[speed].where(~in_seconds, 1 / rows[seconds])
        for speed, seconds in (("speed_p20", "p80_s"), ("speed", "median_s"), ("speed_p80", "p20_s"))
    )
    scale = np.sqrt(ROUNDS / rows["rounds"].astype(float)).where(middle > 0)
    return middle - scale * (middle - low), middle, middle + scale * (high - middle)


def show(old: pd.DataFrame, new: pd.DataFrame, fail_under: float) -> int:
    """Print what `compare` finds. 1 if gpu_lstm itself is slower, wrong or failed, else 0, whatever others do."""
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
