"""All that a CUDA machine is asked in one command: doctor, the tests that need a GPU, the grid, plots, a table."""

import subprocess
import sys
import time
from pathlib import Path

from . import cases, measure
from .isolated import ROOT

DOCTOR_S = 120.0
TESTS_SHARE = 0.4  # of the time
LAST_S = 20.0  # for plots and tables
TESTS = ["pytest", "-v", "-n", "4", "-m", "gpu", "--require-gpu", "-rfE"]  # 4 processes compile kernels side by side


def run(minutes: float, out: Path, device: str = "cuda") -> int:
    """Doctor, tests and grid within about `minutes`, into the folder `out`. How many tests failed, in lines."""
    start = time.monotonic()
    said, _ = command(["gpu_lstm"], DOCTOR_S, out / "doctor.txt")
    print(said)
    limit_s = 60 * minutes * TESTS_SHARE
    said, code = command(TESTS, limit_s, out / "tests.txt")
    failures = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if code != 0:
        failures.append(f"HUNG: stopped after {limit_s:.0f} s" if code is None else f"pytest ended with {code}")
    chosen, file = cases.choose(device.partition(":")[0], None), out / "results.csv"
    left_out = measure.measure(chosen, None, device, {file: None}, deadline=start + 60 * minutes - LAST_S)
    if left_out:
        print(f"no time was left for {len(left_out)} cases: {', '.join(case.name for case in left_out)}")
    print("\n".join([said.rstrip().rpartition("\n")[2], *failures]))
    return len(failures)


def command(module: list[str], limit_s: float, log: Path) -> tuple[str, int | None]:
    """Run a module in the checkout; what it wrote, also to `log`, and its exit code: None if it took too long."""
    with log.open("w") as file:
        done = subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = done.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            done.kill()
    return log.read_text(errors="replace"), code
