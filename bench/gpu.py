"""The whole check of a CUDA machine in one command, the most informative parts first: see docs/first_gpu_run.md."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import cases, measure
from .isolated import ROOT

FIRST, HELD, STREAM, *OF_CUPY = (f"tests/test_{name}.py" for name in ("gpu", "hog", "stream", "layer", "cupy_kernels"))
PYTEST = ["pytest", "-v", "-m", "gpu", "--require-gpu", "-rfE"]
# Name, arguments (with -n auto as many processes compile kernels at once as the machine can hold), and when it ends, of
# the time. First one problem, alone, since a fault in it explains all others; and the same beside a kernel that holds
# multiprocessors. The families compile some hundred kernels, of several seconds each.
HEADLINE = "headline", [FIRST, HELD, "-k", "headline or hog"], 0.2
FAMILIES = "families", [FIRST, STREAM, "-k", "not headline", "-n", "auto"], 0.6
GRID_UNTIL = 0.85
CUPY = "cupy", [*OF_CUPY, "-n", "auto"], 1.0  # which may not be there


def run(minutes: float, out: Path, device: str = "cuda") -> int:
    """Run all parts within about `minutes`, with results in the folder `out`. How many tests failed, in lines."""
    start, whole_s = time.monotonic(), 60 * minutes - 20  # for plots and tables
    print(command(["gpu_lstm"], 120, out / "doctor.txt")[0])
    failures = [line for part in (HEADLINE, FAMILIES) for line in tests(*part[:2], start + part[2] * whole_s, out)]
    chosen = cases.choose(device.partition(":")[0], None)
    left_out = measure.measure(chosen, None, device, {out / "results.csv": None}, start + GRID_UNTIL * whole_s)
    if left_out:
        print(f"no time was left for {len(left_out)} cases: {', '.join(case.name for case in left_out)}")
    failures += tests(*CUPY[:2], start + CUPY[2] * whole_s, out)
    print("\n".join(failures))
    return len(failures)


def tests(name: str, arguments: list[str], deadline: float, out: Path) -> list[str]:
    """Run tests until `deadline`, by time.monotonic(), and print how they ended; return a line for each failure."""
    limit_s = max(1.0, deadline - time.monotonic())
    said, code = command([*PYTEST, *arguments], limit_s, out / f"tests-{name}.txt")
    last = said.rstrip().rpartition("\n")[2]
    print(f"{name}: {last}")
    failures = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if code is None:
        passed, failed = (len(re.findall(rf"\b{outcome}\b", said)) for outcome in ("PASSED", "FAILED"))
        counts = f"{passed} passed and {failed} failed before"
        failures.append(f"STOPPED {name}: after {limit_s:.0f} s; {counts}; the last line was: {last}")
    elif code:
        failures.append(f"{name}: pytest ended with {code}")
    return failures


def command(module: list[str], limit_s: float, log: Path) -> tuple[str, int | None]:
    """Run a module in the checkout; return its output, also in `log`, and exit code, None if it took too long."""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    words, code = [sys.executable, "-m", *module], None
    with log.open("w") as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers of pytest, of which one may hold the card
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    return log.read_text(errors="replace"), code
