"""All that a CUDA machine is asked in one command: doctor, the tests that need a GPU, the grid, plots, a table.

Every part has its own limit of time, and none takes the rest along: tests run file by file, cases in a process of
their own.
"""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from . import cases, grid, plots, tables
from .results import Row

ROOT = Path(__file__).parent.parent
DOCTOR_S = 120.0
TESTS_SHARE = 0.4  # of the time
LAST_S = 20.0  # for plots and tables
TEST_PROCESSES = 4  # that compile kernels side by side


def run(minutes: float, out: Path, device: str = "cuda") -> int:
    """All parts within about `minutes`; everything they find goes into the folder `out`. 1 if anything was wrong."""
    file = out / "results.csv"
    console = Console()
    start = time.monotonic()
    deadline = start + 60 * minutes - LAST_S

    said, _ = command([sys.executable, "-m", "gpu_lstm"], DOCTOR_S, out / "doctor.txt")
    console.print(said, markup=False, highlight=False)
    failures = tests(start + 60 * minutes * TESTS_SHARE, out / "tests.txt", console)

    rows, left_out = grid.measure(
        cases.choose("cpu" if device == "cpu" else "cuda", None), None, device, file, deadline
    )
    drawn = plots.draw(rows, out)
    console.print(tables.headline(rows))
    console.print(f"{file} and {len(drawn)} plots beside it", markup=False, highlight=False)
    if left_out:
        console.print(f"no time was left for {len(left_out)} cases: {', '.join(case.name for case in left_out)}")
    for line in (*failures, *wrong(rows)):
        console.print(line, markup=False, highlight=False)
    console.print(tables.summary(rows))
    return 1 if failures or any(wrong(rows)) else 0


def wrong(rows: list[Row]) -> list[str]:
    """A line for each row of our own that is not right."""
    ours = [row for row in rows if row.provider.startswith("ours") and row.status in ("wrong", "failed")]
    return [f"{row.status.upper()} {row.case} {row.provider}: {row.note}" for row in ours]


def tests(deadline: float, log: Path, console: Console) -> list[str]:
    """Run the tests marked `gpu`, file by file until `deadline`; what failed, hung, or had no time."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    listed, _ = command([*pytest, "--collect-only"], DOCTOR_S, log.with_suffix(".collected.txt"))
    files = list(dict.fromkeys(line.split("::")[0] for line in listed.splitlines() if "::" in line))
    if not files:
        return [f"FAILED no test marked gpu was found: {listed.strip().splitlines()[-1:]}"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", str(TEST_PROCESSES)]
    failures, said = [], []
    for number, file in enumerate(files):
        left = (deadline - time.monotonic()) / (len(files) - number)  # what one file leaves, the next ones have
        if left < 1:
            failures.append(f"NOT RUN {file}: no time was left")
            continue
        part = log.with_suffix(f".{Path(file).stem}.txt")
        text, code = command([*pytest, "--require-gpu", "-rfE", file], left, part)
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
            code = subprocess.run(
                words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    return log.read_text(errors="replace"), code
