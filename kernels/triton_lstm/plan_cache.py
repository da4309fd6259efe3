"""Measured plans, remembered in a file from one process to the next.

An entry holds for one card, one version of Triton and one of this file's format; anything else is not looked at.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import triton

from .planning import Device, Family, Plan, Problem

FORMAT = 1


def cache_file() -> Path:
    """Where plans are remembered: gpu_lstm/plans.json in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "gpu_lstm" / "plans.json"


def remembered(problem: Problem, device: Device, backward: bool) -> Plan | None:
    """The plan that was fastest for this kind of problem on this card, if it was measured."""
    return _entries(cache_file()).get(_key(problem, device, backward))


def remember(problem: Problem, device: Device, backward: bool, plan: Plan) -> None:
    """Write a measured plan to the file, beside what is there."""
    path = cache_file()
    raw = _read(path)
    raw[_key(problem, device, backward)] = dataclasses.asdict(plan) | {"family": plan.family.value}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(raw, indent=1))
    unfinished.replace(path)  # at once, so that nobody reads half a file
    _entries.cache_clear()


def _key(problem: Problem, device: Device, backward: bool) -> str:
    fields = (FORMAT, triton.__version__, device.name, problem.batch, problem.hidden, problem.projected)
    kind = (str(problem.dtype), problem.precision, problem.directions, "backward" if backward else "forward")
    return " | ".join(map(str, (*fields, *kind, *["regularised"] * problem.regularised)))


def _read(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _entries(path: Path) -> dict[str, Plan]:
    return {key: Plan(**entry | {"family": Family(entry["family"])}) for key, entry in _read(path).items()
            if key.startswith(f"{FORMAT} | ")}  # fmt: skip
