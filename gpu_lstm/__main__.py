"""python -m gpu_lstm: the doctor, and what the kernels compile to."""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .backends import ENVIRONMENT_VARIABLE, Backend, obstacle, select


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpu_lstm", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("doctor", help="versions, devices, and which backends can run (the default)")
    commands.add_parser("kernels", help="compile every kernel for every architecture, without a GPU, and report")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    options = parser.parse_args(arguments)
    if options.command == "kernels":
        return _kernels(options.json)
    return _doctor(options.json)


def _doctor(as_json: bool) -> int:
    findings = diagnosis()
    if as_json:
        print(json.dumps(findings, indent=2))
        return 0
    print(f"gpu_lstm {findings['versions']['gpu_lstm']}")
    for title in ("versions", "environment"):
        print(f"\n{title}")
        for name, value in findings[title].items():
            print(f"  {name:<18} {value if value is not None else '-'}")
    print("\ndevices")
    for device in findings["devices"]:
        print(f"  {device['device']:<18} {device['name']}; float32 goes to {device['auto']!r} by default")
        for name, why_not in device["backends"].items():
            print(f"    {name:<16} {'available' if why_not is None else 'not available: ' + why_not}")
    return 0


def diagnosis() -> dict:
    """Versions, environment and, for each device, the backends: None where available, else why not."""
    packages = ("torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x")
    versions: dict[str, str | None] = {"gpu_lstm": __version__, "python": platform.python_version()}
    versions |= {package: _installed(package) for package in packages}
    versions["CUDA of torch"] = torch.version.cuda
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "versions": versions,
        "environment": {name: os.environ.get(name) for name in (ENVIRONMENT_VARIABLE, "TRITON_INTERPRET")},
        "devices": [_diagnosis_of(torch.device(device)) for device in devices],
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _diagnosis_of(device: torch.device) -> dict:
    problems = {b.value: obstacle(b, device, torch.float32) for b in Backend if b is not Backend.AUTO}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    else:
        name = platform.processor() or platform.machine()
    return {
        "device": str(device),
        "name": name,
        "auto": select(Backend.AUTO, device, torch.float32).value,
        "backends": {backend: None if problem is None else str(problem) for backend, problem in problems.items()},
    }


def _kernels(as_json: bool) -> int:
    """A row for each kernel and architecture. Exit status 1 if one spills or does not fit."""
    compile_ = importlib.import_module("gpu_lstm.kernels.triton_lstm.compile")
    rows = []
    if not as_json:
        print(f"{'kernel':<36}{'problem':<44}{'sm':>4}{'regs':>6}{'spills':>8}{'shared':>8}  tensor core")
    for row in compile_.step_reports():
        rows.append(row)
        if not as_json:
            print(
                f"{row.kernel:<36}{row.problem:<44}{row.architecture:>4}{row.registers:>6}{row.spills:>8}"
                f"{row.shared:>8}  {row.tensor_core or '-'}{'' if row.fits else '  does not fit'}",
                flush=True,
            )
    if as_json:
        print(json.dumps([dataclasses.asdict(row) | {"fits": row.fits} for row in rows], indent=1))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
