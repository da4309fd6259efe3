"""The results of benchmarks as CSV. There is one schema, and a row for each case and provider, with its provenance."""

import csv
import datetime
import functools
import importlib.metadata
import io
import platform
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

import gpu_lstm
from gpu_lstm.kernels import cache

from .cases import Case

SCHEMA = 7  # it goes up whenever a column is added or removed, or changes its name or meaning
# The values of `status`. TIMED rows are right and have times. A "yardstick" is torch.nn.LSTM in a case that has
# features it lacks; it runs without these features.
TIMED = ("measured", "yardstick")
BROKEN = ("wrong", "failed")  # the error is too large; raised, died or hung. Neither has times
OTHERS = ("absent", "unable")  # not installed or unable to run here; does not support the case
CASE = [field.name for field in fields(Case)]
# date is UTC in ISO 8601. commit is the commit of the checkout, with "+" if there are changes. clock_mhz is the highest
# clock of the card's multiprocessors. The columns from gpu_lstm on are versions; cuda is the CUDA of torch.
PROVENANCE = ["date", "commit", "device", "clock_mhz", "gpu_lstm", "python", "torch", "triton", "cupy", "cuda", "cudnn",
              "driver"]  # fmt: skip
FIGURES = [
    "error",  # the largest error of all results and gradients, over the allowed one; at most 1 is right
    "rounds", "median_s", "p20_s", "p80_s",  # seconds per call, over all rounds
    "speed", "speed_p20", "speed_p80",  # time of torch.nn.LSTM, or of torch-flat if faster, over this time in a round
    "over_ours", "over_ours_low", "over_ours_high",  # this time over the time of `ours` in a round; its 95 % interval
    "sm_mhz", "celsius",  # clock and temperature of the card after the last round, if nvidia-smi reports them
    "bound_s",  # the least time that a call can need: operations and bytes over the two ceilings below
    "copy_bytes_per_s", "product_flops_per_s",  # the ceilings, measured in the same run: a copy, a large product
    "peak_bytes",  # the peak allocation during a call, minus the allocation before it; CUDA only
    "kept_bytes",  # kept for backward, without input and parameters
]  # fmt: skip
# graph says whether the call was replayed from a CUDA graph. note says why there are no figures, or which kernels ran.
# The schema comes last, so that a truncated row has none.
COLUMNS = [*PROVENANCE, "case", *CASE, "provider", "graph", "status", "note", *FIGURES, "schema"]
REQUIRED = ["date", "device", "gpu_lstm", "torch", "case", *CASE, "provider", "graph", "status", "schema"]
SMI = "nvidia-smi", "--format=csv,noheader,nounits"
NUMBERS = [*(field.name for field in fields(Case) if field.type is not str), *FIGURES]


@functools.cache
def provenance(device: str) -> dict[str, Any]:
    """Return the columns that are the same for a whole run on `device`, "cpu" or a CUDA device."""
    cuda, threads, cpuinfo = device != "cpu", torch.get_num_threads(), Path("/proc/cpuinfo")
    versions = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = " ".join((names or [platform.processor() or platform.machine()])[0].split())
    git = "git", "-C", str(Path(gpu_lstm.__file__).parent)
    commit = _output(*git, "rev-parse", "--short=10", "HEAD")
    driver, _, clock = ((cuda and _output(*SMI, "--query-gpu=driver_version,clocks.max.sm")) or "").partition(", ")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit and commit + "+" * bool(_output(*git, "status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name(device) if cuda else f"{cpu}, {threads} thread{'s' * (threads > 1)}",
        "gpu_lstm": gpu_lstm.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "triton": versions.get("triton"),
        "cupy": versions.get("cupy-cuda13x") or versions.get("cupy-cuda12x") or versions.get("cupy"),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": cache.machine(torch.device("cpu"))["cuDNN"] if cuda else None,  # older commits have that key, too
        "driver": driver or None, "clock_mhz": clock or None, "schema": SCHEMA,
    }  # fmt: skip


def card_state(device: str) -> dict[str, str]:
    """Return the columns of clock and temperature as they are now."""
    if device == "cpu":
        return {}
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    named = zip(("sm_mhz", "celsius"), _output(*SMI, "--query-gpu=clocks.sm,temperature.gpu", card).split(", "))
    return {name: value for name, value in named if value.isdecimal()}  # some cards report "[N/A]"


def _output(*command: str) -> str:
    """Return the first line of a command's output, or "" if it is not installed, fails or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (FileNotFoundError, subprocess.SubprocessError, IndexError):
        return ""


def create(path: Path) -> None:
    """Create a new file without rows. An existing file is not overwritten."""
    with path.open("x", newline="") as file:
        csv.writer(file).writerow(COLUMNS)


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row. It is in the file when this function returns."""
    with path.open("a", newline="") as file:
        # A note becomes one line.
        csv.DictWriter(file, COLUMNS).writerow(row | {"note": " ".join((row.get("note") or "").split())})


def read(path: Path) -> pd.DataFrame:
    """Return all rows of a file.

    Raises:
        ValueError: the schema is another one, or a row is broken. The text names the file.
    """
    try:
        if "\0" in (text := path.read_text()):  # pandas handles NUL in several wrong ways
            raise ValueError("it holds NUL bytes")
        options: Any = dict(dtype=str, keep_default_na=False, na_values=[""], skip_blank_lines=False)
        rows = pd.read_csv(io.StringIO(text), **options)
        schemas = set(rows["schema"].dropna()) if "schema" in rows else {"none"}
        if schemas - {str(SCHEMA)} or list(rows) != COLUMNS:
            strange = f"schema {', '.join(sorted(schemas))}, and other columns: {sorted(set(rows) ^ set(COLUMNS))}"
            raise ValueError(f"{strange}; this version reads schema {SCHEMA}")
        rows["status"] = rows["status"].where(rows["status"].isin([*TIMED, *BROKEN, *OTHERS]))
        rows["graph"] = rows["graph"].map({"True": True, "False": False})
        for line, column in np.argwhere(rows[REQUIRED].isna()):
            raise ValueError(f"line {line + 2} has no {REQUIRED[column]}, or one that is not known")
        rows[NUMBERS] = rows[NUMBERS].apply(pd.to_numeric)
        return rows.astype({"graph": bool})
    except ValueError as error:  # also pandas' own errors, which have several lines
        raise ValueError(f"{path}: {' '.join(str(error).split())}; expected what `python -m bench` writes") from error
