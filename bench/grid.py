"""Many cases, one after another: every row is in the file before the next case starts."""

import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import cases as all_cases
from . import providers, results
from .cases import Case
from .isolated import Worker
from .results import Row
from .run import ProviderFailed, run_case, unmeasured


def measure(
    cases: list[Case], names: list[str] | None, device: str, file: Path, deadline: float | None = None
) -> tuple[list[Row], list[Case]]:
    """The rows of `cases`, which are also in `file`, a new one; and the cases that there was no time for.

    Args:
        cases: what to run, in this order.
        names: who takes part; by default all in the headline, and in the other cases those that say so.
        device: "cpu", or a CUDA device, where cases run in a process of their own.
        file: a CSV file that does not exist yet.
        deadline: by time.monotonic(); no case is begun after it.

    Raises:
        FileExistsError: there is such a file.
    """
    results.write(file, [])
    if device == "cpu":
        torch.set_num_threads(1)  # several stall each other, by a factor of 100, where anything else wants a core
    headline = all_cases.grid("cpu" if device == "cpu" else "cuda")["headline"]
    rows: list[Row] = []
    worker = None if device == "cpu" else Worker(device)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, transient=True) as progress:
            bar = progress.add_task("", total=len(cases))
            for number, case in enumerate(cases):
                if deadline is not None and time.monotonic() > deadline:
                    return rows, cases[number:]
                progress.update(bar, description=case.name)
                for row in _rows(case, providers.taking_part(names, case in headline), device, worker):
                    results.append(file, row)
                    rows.append(row)
                progress.advance(bar)
    finally:
        if worker is not None:
            worker.close()
    return rows, []


def _rows(case: Case, names: list[str], device: str, worker: Worker | None) -> list[Row]:
    """Of one case. Providers that fail are named as failed, and the others run without them."""
    failed: dict[str, str] = {}
    while set(failed) != set(names):
        try:
            if worker is None:
                return run_case(case, names, device, failed)
            return worker.run_case(case, names, failed)
        except ProviderFailed as error:
            blamed = [error.provider] if error.provider in names else names  # where nobody in particular: everybody
            failed |= {name: error.text for name in blamed}
    return [unmeasured(case, name, device, "failed", text) for name, text in failed.items()]
