"""All that a CUDA machine is asked in one command: doctor, the tests that need a GPU, the grid, plots, a table.

Every part has its own limit of time, and none takes the rest along: tests run file by file, cases in a process of
their own.
"""

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from . import cases, measure, plots, report, results
from .isolated import ROOT

DOCTOR_S = 120.0
TESTS_SHARE = 0.4  # of the time
LAST_S = 20.0  # for plots and tables
TEST_PROCESSES = 4  # that compile kernels side by side


def run(minutes: float, out: Path, device: str = "cuda") -> int:
    """All parts within about `minutes`; everything they find goes into the folder `out`. 1 if anything was wrong."""
    start, file, console = time.monotonic(), out / "results.csv", Console()
    said, _ = command([sys.executable, "-m", "gpu_lstm"], DOCTOR_S, out / "doctor.txt")
    console.print(said, markup=False, highlight=False)
    failures = tests(start + 60 * minutes * TESTS_SHARE, out / "tests.txt", console)
    chosen = cases.choose(device.partition(":")[0], None)
    left_out = measure.measure(chosen, None, device, {file: None}, deadline=start + 60 * minutes - LAST_S)
    if left_out:
        console.print(f"no time was left for {len(left_out)} cases: {', '.join(case.name for case in left_out)}")
    console.print("\n".join(failures), markup=False, highlight=False)
    return show(file, console) or int(bool(failures))


def show(file: Path, console: Console) -> int:
    """Plots beside a file of results, and its tables, what is read in ten seconds last. 1 if ours is wrong or failed."""
    rows = results.read(file)
    drawn = plots.draw(rows, file.parent)
    wrong = rows[report.is_ours(rows) & rows["status"].isin(results.BROKEN)]
    console.print(report.expected(rows), report.headline(rows))
    console.print(f"{file} and {len(drawn)} plots beside it", markup=False, highlight=False)
    for row in wrong.itertuples():
        console.print(f"{row.status.upper()} {row.case} {row.provider}: {row.note}", markup=False, highlight=False)
    console.print(report.summary(rows))
    return int(len(wrong) > 0)


def tests(deadline: float, log: Path, console: Console) -> list[str]:
    """Run the tests marked `gpu`, file by file until `deadline`; what failed, hung, or had no time."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    listed, _ = command([*pytest, "--collect-only"], DOCTOR_S, log.with_suffix(".collected.txt"))
    files = list(dict.fromkeys(line.split("::")[0] for line in listed.splitlines() if "::" in line))
    if not files:
        return [f"FAILED no test marked gpu was found: {listed.strip().splitlines()[-1:]}"]
    pytest += ["-n", str(TEST_PROCESSES), "--require-gpu", "-rfE"]
    failures, said = [], []
    for number, file in enumerate(files):
        left = (deadline - time.monotonic()) / (len(files) - number)  # what one file leaves, the next ones have
        if left < 1:
            failures.append(f"NOT RUN {file}: no time was left")
            continue
        text, code = command([*pytest, file], left, log.with_suffix(f".{Path(file).stem}.txt"))
        said.append(f"{file}: {text.strip().splitlines()[-1] if text.strip() else 'said nothing'}")
        failures += [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if code is None:
            failures.append(f"HUNG {file}: stopped after {left:.0f} s")
        elif code and not any(file in line for line in failures):
            failures.append(f"FAILED {file}: pytest ended with {code}")
    log.write_text("\n".join([*said, *failures]) + "\n")
    console.print("\n".join(said), markup=False, highlight=False)
    return failures


def command(words: list[str], limit_s: float, log: Path) -> tuple[str, int | None]:
    """Run a command in the checkout; what it wrote, also to `log`, and its exit code: None if it took too long."""
    with log.open("w") as file:
        try:
            options = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            code = subprocess.run(words, timeout=limit_s, **options).returncode  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            code = None
    return log.read_text(errors="replace"), code
