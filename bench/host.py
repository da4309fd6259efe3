"""python -m bench host: microseconds that a call costs on the host, against the whole call of torch.nn.

What is called, and what is stubbed where there is no GPU: see host_calls.py.
"""

import argparse
import datetime
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import report, results
from .host_calls import CARD, CASES, COUNTS, MODES, TORCH, YARDSTICK, measure
from .isolated import ROOT, ProviderFailed, Worker, checkout

TURNS, ROUNDS = 4, 40  # of each commit, case by case; in each turn
LIMIT_S = 300.0  # of a turn: the first compiles kernels on a GPU
TIMES = ["median_s", "least_s", "torch_median_s", "torch_least_s"]
RATIOS = ["ratio", "ratio_of_least", "target"]  # to torch.nn, both of one round, the median; of the least of all rounds
COLUMNS = [*results.PROVENANCE, "base", "case", "mode", "provider", "rounds", *TIMES, *RATIOS, *COUNTS]
SHOWN = {
    "median_s": ("us", 1e6, ".1f"), "least_s": ("least", 1e6, ".1f"), "torch_median_s": ("nn us", 1e6, ".1f"),
    "torch_least_s": ("nn least", 1e6, ".1f"), "ratio": ("ratio", 1, ".2f"), "ratio_of_least": ("of least", 1, ".2f"),
    "target": ("target", 1, ".1f"),
} | {name: (name.replace("_", " "), 1, ".0f") for name in COUNTS}  # fmt: skip
"""By column: its title, in which unit, how many digits."""


def target(case: str, mode: str, provider: str) -> float | None:
    """The most that the ratio should be."""
    both = {"LSTMCell": 1.2, "one step with resets": 1.3}
    kernels = {("T=1", "inference"): 0.8, ("T=1", "forward+graph"): 0.9, ("T=1", "training"): 0.8}
    torchs = dict.fromkeys(("T=1", "T=128", "two layers, bidirectional"), 1.1)
    return both.get(case) or (torchs.get(case) if provider == TORCH else kernels.get((case, mode)))


def rows_of(case: str, mode: str, base: bool, turns: list[dict[tuple[str, str], Any]]) -> list[dict[str, Any]]:
    """A row for each provider of ours."""
    rows, seconds = [], {place: np.concatenate([turn[place][1] for turn in turns]) for place in turns[0]}
    for (device, provider), (origin, _) in turns[0].items():
        if provider != YARDSTICK:
            mine, torchs = seconds[device, provider], seconds[device, YARDSTICK]
            times = [np.median(mine), mine.min(), np.median(torchs), torchs.min()]
            ratios = [np.median(mine / torchs), mine.min() / torchs.min(), target(case, mode, provider)]
            named = dict(zip([*TIMES, *RATIOS], [*times, *ratios]))
            rows.append(origin | dict(base=base, case=case, mode=mode, provider=provider, rounds=len(mine)) | named)
    return rows


def table(rows: pd.DataFrame, shown: list[str]) -> Table:
    """A line for each row of this checkout; next to its figures those of the base, if there is one."""
    old, new = (rows[rows["base"] == base].reset_index() for base in (True, False))
    cells = new[["case", "mode", "provider"]].copy()
    for column in shown:
        title, unit, digits = SHOWN[column]
        for name, side in ((f"old {title}", old), (title, new)):
            if len(side) and not (side is old and column == "target"):
                texts = [f"{unit * value:{digits}}" for value in side[column].astype(float)]
                cells[name] = pd.Series(texts).where(side[column].notna(), "")
    told = "kernels are launched" if CARD == "cuda" else "kernels are planned for an H100, their launches do nothing"
    groups = new["case"].map(list(CASES).index)
    return report.table(cells, "A call on the host", f"{told}; {report.origin(rows)}", groups, ("case",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the subcommand."""
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, metavar="NAME", default=list(CASES), help="of: " + "; ".join(CASES))
    add("--base", metavar="REV", help="measure gpu_lstm in this commit, too, in turns, and show both")
    add("--count", action="store_true", help="calls, files and changes of file of one call, instead of times")
    add("--out", type=Path, help="a new folder for host.csv; default: out/host-DATE-TIME")


def run(options: argparse.Namespace) -> int:
    """Measure, write and print; the exit status, 0. ValueError for a base that cannot be measured."""
    out = options.out or ROOT / "out" / f"host-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    cases = [each for each in product(options.cases, MODES) if each[0] != "Stream" or each[1] == "inference"]
    turns, rounds = (1, 1) if options.count else (TURNS, ROUNDS)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        paths = {True: stack.enter_context(checkout(options.base))} if options.base else {}
        sides = {
            base: stack.enter_context(closing(Worker(measure, paths.get(base), LIMIT_S))) for base in (*paths, False)
        }
        out.mkdir(parents=True)
        for case, mode in track(cases, "calls on the host", console=Console(stderr=True), transient=True):
            found: dict[bool, list[Any]] = {base: [] for base in sides}
            for base in [*sides] * turns:
                try:
                    found[base].append(sides[base](case, mode, rounds))
                except ProviderFailed as error:
                    if not base:
                        raise
                    raise ValueError(f"{options.base} is too old to be measured: {error.args[1]}") from error
            for base in sides:
                rows += rows_of(case, mode, base, found[base])
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.to_csv(out / "host.csv", index=False)
    times = [name for name in TIMES if not (options.base and name.startswith("torch"))]
    shown = COUNTS if options.count else [*times, *RATIOS]
    Console().print(table(frame, shown), str(out / "host.csv"), sep="\n")
    return 0
