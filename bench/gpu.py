"""Check a CUDA machine in one command, the most informative parts first. See docs/first_gpu_run.md."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from . import cases, measure
from .isolated import ROOT

FIRST, HELD, STREAM, *OF_CUPY = (f"tests/test_{name}.py" for name in ("gpu", "hog", "stream", "layer", "cupy"))
PYTEST = ["pytest", "-v", "-m", "gpu", "--require-gpu", "-rfE", "--tb=short"]
TO_REPORT_S = 20.0  # time for pytest to report after an interrupt: pytest-xdist waits 10 seconds for its workers
EVERY_S = 10.0  # time between lines that show the progress on the screen
# Each part of the tests has a name, arguments of pytest, and the fraction of the whole time at which it ends. The
# headline is one problem alone, since a fault in it explains all others, and the same problem beside a kernel that
# occupies multiprocessors. The families compile some hundred kernels, which takes several seconds each. With -n auto
# many processes compile at once.
HEADLINE = "headline", [FIRST, HELD, "-k", "headline and LSTM or hog"], 0.3
FAMILIES = "families", [FIRST, STREAM, "-k", "not headline or GRU", "-n", "auto"], 0.65
GRID_UNTIL = 0.87
CUPY = "cupy", [*OF_CUPY, "-n", "auto"], 1.0  # last, since CuPy may not be installed


def run(minutes: float, out: Path, device: str = "cuda") -> int:
    """Run all parts within about `minutes`, and write results to the folder `out`. Return the number of failures."""
    start, whole_s = time.monotonic(), 60 * minutes - 20  # 20 seconds are left for the picture and tables
    print(command(["gpu_lstm"], 120, out / "doctor.txt")[0], flush=True)
    failures = [line for part in (HEADLINE, FAMILIES) for line in tests(*part[:2], start + part[2] * whole_s, out)]
    chosen = cases.choose(device.partition(":")[0], None)
    left_out = list[cases.Case]()
    try:
        left_out = measure.measure(chosen, None, device, {out / "results.csv": None}, start + GRID_UNTIL * whole_s)
    except Exception as error:
        traceback.print_exc()
        failures.append(f"STOPPED benchmark: {type(error).__name__}: {error}")
    failures += tests(*CUPY[:2], start + CUPY[2] * whole_s, out)
    print("\n".join(failures))
    if left_out:
        print(f"no time was left for {len(left_out)} cases: {', '.join(case.name for case in left_out)}")
    return len(failures)


def tests(name: str, arguments: list[str], deadline: float, out: Path) -> list[str]:
    """Run tests until `deadline`, a time of time.monotonic(), and print the end. Return a line for each failure."""
    limit_s, log = max(1.0, deadline - time.monotonic()), out / f"tests-{name}.txt"
    print(f"{name}: up to {limit_s:.0f} s; what it says goes to {log}", flush=True)
    said, code = command([*PYTEST, *arguments], limit_s, log)
    last = said.rstrip().rpartition("\n")[2]
    print(f"{name}: {last}", flush=True)
    failures = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if code is None:
        failures.append(f"STOPPED {name}: after {limit_s:.0f} s; the last line was: {last}")
    elif code:
        failures.append(f"{name}: pytest ended with {code}")
    return failures


def command(module: list[str], limit_s: float, log: Path) -> tuple[str, int | None]:
    """Run a module in the checkout; return its output, which is also in the file `log`, and its exit code.

    The exit code is None if the module takes longer than `limit_s`. Then it is interrupted, and has TO_REPORT_S to
    report its results.
    """
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    env |= {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}  # wide lines for pytest's summary; no delay in `log`
    words = [sys.executable, "-m", *module]
    with log.open("w") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=out, env=env, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" lets the child ignore it
        )  # fmt: skip
        try:
            if (code := _wait(process, limit_s, log)) is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TO_REPORT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # also pytest's workers, which may occupy the card
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace"), code


def _wait(process: subprocess.Popen[bytes], limit_s: float, log: Path) -> int | None:
    """Wait for a process and show the progress in `log`. Return the exit code, or None if it takes too long."""
    start = time.monotonic()
    while (seconds := time.monotonic() - start) < limit_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(EVERY_S, limit_s - seconds))
        said = log.read_text(errors="replace").rstrip()
        done = re.findall(r"(\d+%)\]", said)[-1:]  # in the format of pytest -v
        print(f"{log.stem}, {time.monotonic() - start:.0f} s:", *done, said.rpartition("\n")[2], flush=True)
    return None
