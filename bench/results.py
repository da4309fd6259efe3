"""The results of benchmarks as CSV: one schema, a row for each case and provider, with its provenance."""

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

from .cases import Case

SCHEMA = 7  # raised whenever a column is added, removed, or changes its name or meaning
# By status. Right, and timed: a yardstick is torch.nn.LSTM at a case that it cannot do, without what it cannot do.
TIMED = ("measured", "yardstick")
BROKEN = ("wrong", "failed")  # too far from float64; raised, died or hung. Neither is timed
OTHERS = ("absent", "unable")  # not installed or unable to run here; not meant for such cases
CASE = [field.name for field in fields(Case)]
# date: UTC, ISO 8601. commit: of gpu_lstm's checkout, "+" where it has changes. clock_mhz: of the card's
# multiprocessors, at most. From gpu_lstm on: versions, of which cuda is torch's.
PROVENANCE = ["date", "commit", "device", "clock_mhz", "gpu_lstm", "python", "torch", "triton", "cupy", "cuda", "cudnn",
              "driver"]  # fmt: skip
FIGURES = [
    "error",  # the largest of all results and gradients, over what is allowed; 1 is the most
    "rounds", "median_s", "p20_s", "p80_s",  # seconds a call, over all rounds
    "speed", "speed_p20", "speed_p80",  # torch.nn.LSTM's time, or torch-flat's if faster, over this, of one round
    "over_ours", "over_ours_low", "over_ours_high",  # this time over that of `ours`, likewise; its 95 % interval
    "sm_mhz", "celsius",  # clock and temperature of the card after the last round, where nvidia-smi reports them
    "bound_s",  # the least time a call can need: operations and bytes over the two ceilings that follow
    "copy_bytes_per_s", "product_flops_per_s",  # measured in the same run: a copy, a large product in this dtype
    "peak_bytes",  # allocated at most during a call, above what was there before; CUDA only
    "kept_bytes",  # for backward, besides input and parameters
]  # fmt: skip
# graph: replayed from a CUDA graph. note: why there are no figures, or which kernels ran. The schema comes last, so
# that a truncated row has none.
COLUMNS = [*PROVENANCE, "case", *CASE, "provider", "graph", "status", "note", *FIGURES, "schema"]
REQUIRED = ["date", "device", "gpu_lstm", "torch", "case", *CASE, "provider", "graph", "status", "schema"]
SMI = "nvidia-smi", "--format=csv,noheader,nounits"
NUMBERS = [*(field.name for field in fields(Case) if field.type is not str), *FIGURES]


def _cudnn_version() -> int | str | None:
    """Or what torch says of one that it cannot use. Not gpu_lstm's: the commit that is measured may be older."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:
        return str(error)


@functools.cache
def provenance(device: str) -> dict[str, Any]:
    """The columns that are the same for a whole run on `device`, "cpu" or a CUDA device."""
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
        "cuda": torch.version.cuda if cuda else None, "cudnn": _cudnn_version() if cuda else None,
        "driver": driver or None, "clock_mhz": clock or None, "schema": SCHEMA,
    }  # fmt: skip


def card_state(device: str) -> dict[str, str]:
    """The columns of clock and temperature, as they are now."""
    if device == "cpu":
        return {}
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    named = zip(("sm_mhz", "celsius"), _output(*SMI, "--query-gpu=clocks.sm,temperature.gpu", card).split(", "))
    return {name: value for name, value in named if value.isdecimal()}  # "[N/A]" on some cards


def _output(*command: str) -> str:
    """The first line of a command's output; "" where it is not installed, fails or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (FileNotFoundError, subprocess.SubprocessError, IndexError):
        return ""


def create(path: Path) -> None:
    """Create a new file without rows; nothing is overwritten."""
    with path.open("x", newline="") as file:
        csv.writer(file).writerow(COLUMNS)


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, which is in the file as soon as this returns."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(row | {"note": " ".join((row.get("note") or "").split())})  # on one line


def read(path: Path) -> pd.DataFrame:
    """All rows of a file. ValueError, with its name, for another schema or a row that is broken."""
    try:
        if "\0" in (text := path.read_text()):  # which pandas reads as nothing, as a column's name, or as it is
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
    except ValueError as error:  # pandas' own, of several lines, among them
        raise ValueError(f"{path}: {' '.join(str(error).split())}; expected what `python -m bench` writes") from error
