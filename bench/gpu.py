"""The whole check of a CUDA machine in one command, the most informative parts first: see docs/first_gpu_run.md."""

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
TO_REPORT_S = 20.0  # for pytest, once it is interrupted: pytest-xdist waits 10 seconds for its workers
EVERY_S = 10.0  # a line on the screen says how far a part is
# Name, arguments (with -n auto as many processes compile kernels at once as the machine can hold), and when it ends, of
# the time. First one problem, alone, since a fault in it explains all others; and the same beside a kernel that holds
# multiprocessors. The families compile some hundred kernels, of several seconds each.
HEADLINE = "headline", [FIRST, HELD, "-k", "headline and LSTM or hog"], 0.3
FAMILIES = "families", [FIRST, STREAM, "-k", "not headline or GRU", "-n", "auto"], 0.65
GRID_UNTIL = 0.87
CUPY = "cupy", [*OF_CUPY, "-n", "auto"], 1.0  # CuPy may not be there


def run(minutes: float, out: Path, device: str = "cuda") -> int:
    """Run all parts within about `minutes`, with results in the folder `out`. How many tests failed, in lines."""
    start, whole_s = time.monotonic(), 60 * minutes - 20  # for plots and tables
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
    """Run tests until `deadline`, by time.monotonic(), and print how they ended; return a line for each failure."""
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
    """Run a module in the checkout; return its output, also in `log`, and exit code, None if it took too long.

    It is interrupted then, and has TO_REPORT_S to say what it found.
    """
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    env |= {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}  # room for the reason in pytest's summary; `log` is up to date
    words = [sys.executable, "-m", *module]
    with log.open("w") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=out, env=env, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's "&" has it ignore
        )  # fmt: skip
        try:
            if (code := _wait(process, limit_s, log)) is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TO_REPORT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # with the workers of pytest, of which one may hold the card
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace"), code


def _wait(process: subprocess.Popen[bytes], limit_s: float, log: Path) -> int | None:
    """Its exit code; None if it takes too long. Meanwhile the screen shows what is new at the end of `log`."""
    start = time.monotonic()
    while (seconds := time.monotonic() - start) < limit_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(EVERY_S, limit_s - seconds))
        said = log.read_text(errors="replace").rstrip()
        done = re.findall(r"(\d+%)\]", said)[-1:]  # as pytest -v says it
        print(f"{log.stem}, {time.monotonic() - start:.0f} s:", *done, said.rpartition("\n")[2], flush=True)
    return None
