"""Measured plans, remembered from one process to the next: one small file for each problem, card and version of Triton.

Files of their own cannot lose each other's entries, whoever writes at once. Nothing here stops a call: what cannot be
read or written is ignored, and a warning says so once.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, get_type_hints

import triton

from .planning import Device, Family, Plan, Problem

FORMAT = 3  # raised whenever a field of Plan or of the key changes its name or meaning


def cache_folder() -> Path | None:
    """Where plans are remembered: gpu_lstm/plans in the user's cache folder. None: the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "gpu_lstm" / "plans"
    except RuntimeError:  # neither HOME nor an entry in passwd, as in a container with a random user id
        return None


def remembered(problem: Problem, device: Device, backward: bool) -> Plan | None:
    """The plan that was fastest for this kind of problem on this card, if it was measured."""
    folder = cache_folder()
    return None if folder is None else _read(folder, _key(problem, device, backward))


def remember(problem: Problem, device: Device, backward: bool, plan: Plan) -> None:
    """Write a measured plan."""
    folder, key = cache_folder(), _key(problem, device, backward)
    text = json.dumps({"key": key, "plan": dataclasses.asdict(plan) | {"family": plan.family.value}}, indent=1)
    try:
        if folder is None:
            raise OSError("there is no home directory, and XDG_CACHE_HOME is not set")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".unfinished", delete=False) as file:
            file.write(text)
        Path(file.name).replace(_file(folder, key))  # at once, so that nobody reads half a file
    except OSError as error:
        _warn(f"a measured plan is not remembered: {error}")
    _read.cache_clear()


def _key(problem: Problem, device: Device, backward: bool) -> str:
    fields = (FORMAT, triton.__version__, device.name, problem.batch, problem.hidden, problem.projected)
    kind = (str(problem.dtype), problem.precision, problem.side_by_side, "backward" if backward else "forward")
    return " | ".join(map(str, (*fields, *kind, *["regularised"] * problem.regularised)))


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@functools.cache
def _read(folder: Path, key: str) -> Plan | None:
    path = _file(folder, key)
    try:
        entry = json.loads(path.read_text())
        if not isinstance(entry, dict) or set(entry) != {"key", "plan"} or entry["key"] != key:
            raise ValueError(f"expected the key {key!r} and its plan")
        return _plan(entry["plan"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # JSON's and Unicode's errors are ValueErrors
        _warn(f"a measured plan is ignored: {path}: {error}")
        return None


def _plan(fields: Any) -> Plan:
    """A plan out of a file, every field checked.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    types = get_type_hints(Plan)
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise ValueError(f"expected the fields {sorted(types)}, got {fields!r}")
    for name, expected in types.items():
        if type(fields[name]) is not (str if expected is Family else expected):
            raise ValueError(f"expected {name} of type {expected.__name__}, got {fields[name]!r}")
    return Plan(**fields | {"family": Family(fields["family"])})


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(f"gpu_lstm: {text}", stacklevel=2)
