"""The results of benchmarks as CSV: one schema, a row for each case and provider, with where it comes from."""

import csv
import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

import gpu_lstm

SCHEMA = 1  # raised whenever a column changes its name or meaning

STATUSES = (
    "measured",  # right, and timed
    "yardstick",  # torch.nn.LSTM at a case that it cannot do: right and timed without the lengths and resets
    "expected",  # not timed: what a plan expects of a named GPU, with what the host does for it
    "absent",  # the provider is not installed or cannot run here
    "unable",  # the provider does not do such cases
    "wrong",  # results too far from float64's; not timed
    "failed",  # it raised, died or hung; not timed
)


@dataclass(frozen=True)
class Row:
    """One case by one provider. Fields without a value are None, an empty cell in the file."""

    schema: int
    date: str  # UTC, ISO 8601
    commit: str | None  # of the checkout, "+" where it has changes
    gpu_lstm: str
    python: str
    torch: str
    triton: str | None
    cupy: str | None
    cuda: str | None  # of torch
    driver: str | None
    device: str  # the card's or processor's name

    case: str
    run: str
    dtype: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int
    directions: int
    sequences: str
    reset_rate: float

    provider: str
    graph: bool  # replayed from a CUDA graph
    status: str  # of STATUSES
    note: str | None = None  # why it is absent, unable, wrong or failed; which kernels ran
    error: float | None = None  # the largest of all results and gradients, over what is allowed; 1 is the most

    runs: int | None = None
    median_s: float | None = None  # seconds a call
    p20_s: float | None = None
    p80_s: float | None = None
    us_per_step: float | None = None  # median microseconds a call, over T
    speed: float | None = None  # torch.nn.LSTM's time over this one, both of one round; the median over all rounds
    speed_p20: float | None = None
    speed_p80: float | None = None
    bound_s: float | None = None  # the least a call can take: operations and bytes over the two ceilings below
    bound_fraction: float | None = None  # bound_s over median_s
    copy_bytes_per_s: float | None = None  # ceilings measured in the same run: a copy, read and written
    product_flops_per_s: float | None = None  # and a large product in this dtype
    peak_bytes: int | None = None  # allocated at most during a call, above what was there before; CUDA only
    kept_bytes: int | None = None  # for backward, besides input and parameters
    launches: int | None = None  # of kernels in a call
    host_s: float | None = None  # median seconds of a call in which no kernel is launched
    expected_us_per_step: float | None = None  # the plan's bound


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@functools.cache
def provenance(device: str) -> dict[str, Any]:
    """The fields of Row that are the same for a whole run on `device`, "cpu" or "cuda"."""
    cuda = device.startswith("cuda")
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "gpu_lstm": gpu_lstm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cupy": _version("cupy-cuda13x") or _version("cupy-cuda12x") or _version("cupy"),
        "cuda": torch.version.cuda if cuda else None,
        "driver": _driver() if cuda else None,
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    """A new file with these rows.

    Raises:
        FileExistsError: there is one; nothing is overwritten.
    """
    with path.open("x", newline="") as file:
        csv.writer(file).writerow(COLUMNS)
    for row in rows:
        append(path, row)


def append(path: Path, row: Row) -> None:
    """One more row, in the file as soon as this returns: a run that is stopped keeps what it has."""
    cells = ["" if value is None else value for value in dataclasses.astuple(row)]
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(cells)


def read(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another schema, or a row that is broken; with file and line.
    """
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None:
            raise ValueError(f"{path}:1: no header; expected the columns of schema {SCHEMA}")
        rows = []
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            found = dict(zip(header, cells)).get("schema", str(SCHEMA))
            if found != str(SCHEMA):
                raise ValueError(f"{where}: schema {found!r}; this version reads schema {SCHEMA}")
            _check_header(path, header)
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{where}: {len(cells)} cells, expected {len(COLUMNS)}")
            rows.append(_row(where, cells))
        _check_header(path, header)  # also where there is no row
        return rows


def _check_header(path: Path, header: list[str]) -> None:
    if tuple(header) != COLUMNS:
        strange = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
        raise ValueError(f"{path}:1: not the columns of schema {SCHEMA}; different: {', '.join(strange)}")


def _row(where: str, cells: list[str]) -> Row:
    values: dict[str, Any] = {}
    for (column, kind), cell in zip(_TYPES.items(), cells):
        expected = get_args(kind) or (kind,)  # (type,), or (type, None)
        if cell == "" and len(expected) > 1:
            values[column] = None
            continue
        try:
            values[column] = _PARSERS[expected[0]](cell)
        except (ValueError, KeyError):
            raise ValueError(f"{where}: {column} is {cell!r}, expected {expected[0].__name__}") from None
    if values["status"] not in STATUSES:
        raise ValueError(f"{where}: status is {values['status']!r}, expected one of {', '.join(STATUSES)}")
    return Row(**values)


_TYPES = get_type_hints(Row)
_PARSERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: {"True": True, "False": False}.__getitem__,
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file is in; None where it is in none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        return commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None
    except FileNotFoundError:  # no git here
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or None
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None


def _processor() -> str:
    """The processor's name and how many threads torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = " ".join(models[0].split()) if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"
