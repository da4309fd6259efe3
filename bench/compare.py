"""python -m bench compare: what has become slower or faster between two runs on the same device.

Where both runs used the same torch, `speed` is compared: torch.nn.LSTM's time over the provider's, both of one round,
so that a drift of the machine cancels. Torch's own rows, and all rows of runs with different versions of torch, are
compared in seconds. Nothing cancels there, and a change must go beyond the threshold by another 10 %.

A change counts if its ratio is beyond the threshold and the two medians are further apart than chance puts them: each
has an interval that reaches as far as its rounds' 20th and 80th percentile at 20 rounds, which is three standard errors
of the median, and less far with more rounds, by sqrt(20 / rounds).

What that sees, in simulations with independent noise of 3 % in every round of torch and provider, a drift of 5 % of
each whole run, and a threshold of 0.95 (tests/test_bench_compare.py has them in short):

- Two runs of the same code: of 650 pairs of files with 50 rows of gpu_lstm and 20 to 100 rounds none shows a
  regression. With 9 rounds, the least that is taken, one pair in 100 does; in seconds, with 25 rows, one in 30.
- One case slower by 10 %: found in 93 % of all runs at 20 rounds, in 99 % at 30, always at 60, in 59 % at 9. By 15 %:
  always from 20 rounds on. By 7 %: in 94 % at 60 rounds, in every other run at 20. By 3 %: in one of 70.
- In seconds 10 % is lost in the drift.

What it cannot see, or takes for a change: noise that hits whole processes and no single rounds, such as a plan tuned
differently or memory laid out differently, is in no interval. Neither cancels what slows only one of the two sides: a
slower host slows torch.nn.LSTM called step by step, and no replayed graph. Where two runs of the same code differ by
that much, --fail-under has to be lower. What slows torch and provider alike cancels too.

Only gpu_lstm's own rows make the comparison fail. The other providers, torch among them, are shown.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from . import results
from .results import Row
from .tables import OURS, YARDSTICK, contender

FAIL_UNDER = 0.95
IN_SECONDS = 0.9  # of the threshold, where the drift of the machine does not cancel
ROUNDS = 20  # at which three standard errors of a median reach as far as these percentiles: 3 * 1.253 = 0.842 * 20**0.5

MEASURES = {  # columns, the slowest first
    "speed": ("speed_p20", "speed", "speed_p80"),
    "seconds": ("p80_s", "median_s", "p20_s"),
}
TIMED = ("measured", "yardstick")
BROKEN = ("wrong", "failed")

Key = tuple[str, str, bool]  # case, provider, graph


@dataclass(frozen=True)
class Interval:
    """The median of all rounds between their 20th and 80th percentile; more is faster."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Change:
    """A row that was timed in both runs."""

    row: Row  # of the new run
    measure: str  # of MEASURES
    before: Interval
    now: Interval

    @property
    def ratio(self) -> float:
        """Below 1 it is slower now."""
        return self.now.middle / self.before.middle

    def is_real(self, fail_under: float) -> bool:
        """Whether the ratio is beyond the threshold, and the intervals lie apart."""
        threshold = fail_under * (IN_SECONDS if self.measure == "seconds" else 1)
        slower, faster = sorted((self.before, self.now), key=lambda interval: interval.middle)
        return not threshold <= self.ratio <= 1 / threshold and slower.high < faster.low


@dataclass(frozen=True)
class Lost:
    """A row that was timed before and is not now."""

    old: Row
    new: Row | None  # None where the new file has no such row

    @property
    def broken(self) -> bool:
        """Whether it is wrong or failed, rather than left out."""
        return self.new is not None and self.new.status in BROKEN


@dataclass(frozen=True)
class Comparison:
    """All rows of two runs, by what has become of them."""

    fail_under: float
    torch: tuple[str, str]  # versions, before and now
    slower: list[Change]  # the worst first
    faster: list[Change]  # the best first
    within_noise: int
    lost: list[Lost]
    gained: list[Row]  # timed now and not before

    @property
    def regressions(self) -> list[Row]:
        """gpu_lstm's own rows that are slower, wrong or failed now."""
        rows = [change.row for change in self.slower] + [lost.old for lost in self.lost if lost.broken]
        return [row for row in rows if _is_ours(row)]

    def __rich__(self) -> Group:
        before, now = self.torch
        if before == now:
            basis = f"torch {now} in both: what is compared is the speed against torch.nn.LSTM"
        else:
            least = self.fail_under * IN_SECONDS
            basis = (
                f"torch {before} before, {now} now: seconds are compared, where only less than {least:.3g} is slower"
            )
        broken = [lost for lost in self.lost if lost.broken]
        missing = [lost for lost in self.lost if not lost.broken]
        count = len(self.regressions)
        tables = [
            _changes("slower", self.slower),
            _rows("right before, not now", [(lost.old, _fate(lost)) for lost in broken]),
            _changes("faster", self.faster),
            _rows("timed before, not now", [(lost.old, _fate(lost)) for lost in missing]),
            _rows("timed now, not before", [(row, "") for row in self.gained]),
        ]
        return Group(
            Text(basis),
            *(table for table in tables if table.row_count),
            Text(f"within the noise or the threshold: {self.within_noise}"),
            Text(
                f"regressions of gpu_lstm: {count}, at --fail-under {self.fail_under:g}",
                style="bold red" if count else "bold green",
            ),
        )


def compare(old_rows: Iterable[Row], new_rows: Iterable[Row], fail_under: float) -> Comparison:
    """Match the rows of two runs by case, provider and graph, and say what has become of them.

    Args:
        old_rows, new_rows: of one device; rows that are "expected" do not count.
        fail_under: what a speed may fall to, as a fraction of that before; 1 for any fall beyond the noise.

    Raises:
        ValueError: fail_under outside (0, 1]; different devices; nothing of gpu_lstm to compare; a row that is there
            twice, or timed without its times.
    """
    if not 0 < fail_under <= 1:
        raise ValueError(f"--fail-under is {fail_under:g}, expected more than 0 and at most 1")
    old, new = _by_key(old_rows), _by_key(new_rows)
    devices = list(dict.fromkeys(row.device for row in [*old.values(), *new.values()]))
    if len(devices) > 1:
        raise ValueError(f"expected two runs on one device, got {' and '.join(devices)}")
    torch_before, torch_now = (", ".join(sorted({row.torch for row in rows.values()})) for rows in (old, new))

    before, now = ({key: row for key, row in rows.items() if row.status in TIMED} for rows in (old, new))
    lost = [Lost(row, _instead(key, new)) for key, row in before.items() if key not in now]
    common = [key for key in before if key in now]
    if not any(map(_is_ours, [*(now[key] for key in common), *(each.old for each in lost if each.broken)])):
        raise ValueError("nothing to compare: no case of gpu_lstm was timed in both runs")
    changes = [_change(before[key], now[key], torch_before == torch_now) for key in common]
    real = [change for change in changes if change.is_real(fail_under)]
    return Comparison(
        fail_under=fail_under,
        torch=(torch_before, torch_now),
        slower=sorted((change for change in real if change.ratio < 1), key=lambda change: change.ratio),
        faster=sorted((change for change in real if change.ratio > 1), key=lambda change: -change.ratio),
        within_noise=len(changes) - len(real),
        lost=lost,
        gained=[row for key, row in now.items() if key not in before],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the subcommand."""
    parser.add_argument("old", type=Path, help="CSV of the run before")
    parser.add_argument("new", type=Path, help="CSV of the run now, on the same device")
    parser.add_argument(
        "--fail-under", type=float, default=FAIL_UNDER, metavar="RATIO",
        help="fail where the speed is less than this fraction of that before (default %(default)s)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Compare two files and print it. Exit status: 0, 1 with a regression, 2 if they cannot be compared."""
    try:
        comparison = compare(results.read(options.old), results.read(options.new), options.fail_under)
    except (OSError, ValueError, csv.Error) as error:
        print(error, file=sys.stderr)
        return 2
    Console().print(comparison)
    return 1 if comparison.regressions else 0


def _by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in rows:
        if row.status == "expected":
            continue
        key = (row.case, row.provider, row.graph)
        if key in found:
            raise ValueError(f"{contender(row)} at {row.case} is there twice, expected one run a file")
        found[key] = row
    return found


def _instead(key: Key, rows: dict[Key, Row]) -> Row | None:
    """The row that is there in place of a timed one. What fails or is absent has none of its own for graphs."""
    case, provider, _ = key
    row = rows.get(key) or rows.get((case, provider, False))
    return None if row is None or row.status in TIMED else row


def _is_ours(row: Row) -> bool:
    return row.provider == OURS or row.provider.startswith(f"{OURS}-")


def _change(before: Row, now: Row, same_torch: bool) -> Change:
    paired = same_torch and now.provider != YARDSTICK and before.speed is not None and now.speed is not None
    measure = "speed" if paired else "seconds"
    return Change(now, measure, _interval(before, measure), _interval(now, measure))


def _interval(row: Row, measure: str) -> Interval:
    """Of the speed or of calls a second, widened where there were few rounds."""
    rounds, low, middle, high = (_positive(row, column) for column in ("runs", *MEASURES[measure]))
    if measure == "seconds":
        low, middle, high = 1 / low, 1 / middle, 1 / high
    scale = math.sqrt(ROUNDS / rounds)
    return Interval(middle - scale * (middle - low), middle, middle + scale * (high - middle))


def _positive(row: Row, column: str) -> float:
    value = getattr(row, column)
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{column} of {contender(row)} at {row.case} is {value}, expected a positive number")
    return value


def _fate(lost: Lost) -> str:
    if lost.new is None:
        return "not in the new file"
    return lost.new.status + f": {lost.new.note}" * (lost.new.note is not None)


def _changes(title: str, changes: list[Change]) -> Table:
    table = _table(title)
    for column in ("before", "now", "ratio"):
        table.add_column(column, justify="right")
    for change in changes:
        cells = [_value(change.measure, interval.middle) for interval in (change.before, change.now)]
        table.add_row(change.row.case, contender(change.row), *cells, f"{change.ratio:.2f}")
    return table


def _value(measure: str, value: float) -> str:
    return f"{value:.3g}x" if measure == "speed" else f"{1e3 / value:.3g} ms"


def _rows(title: str, rows: list[tuple[Row, str]]) -> Table:
    table = _table(title)
    table.add_column("why", overflow="fold")
    for row, why in rows:
        table.add_row(row.case, contender(row), Text(why))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case", overflow="fold")
    table.add_column("provider", overflow="fold")
    return table
