"""python -m gpu_lstm: the doctor, the plan for a problem, what the kernels compile to, and what is cached."""

import argparse
import dataclasses
import enum
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .backends import verify
from .call.choices import BACKEND_VARIABLE, KERNEL_BACKENDS, RACE_VARIABLE, Backend, requested_backend, requested_racing
from .dispatch import race
from .dispatch.available import select, triton_import_problem, why_unavailable, without_triton
from .dispatch.kind import describe
from .dispatch.route import Decision
from .kernels import cache  # type: ignore[import-not-found]  # a folder next to gpu_lstm/ in a checkout
from .kernels.problem import Problem  # type: ignore[import-not-found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpu_lstm", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("doctor", help="versions, devices, and which backends can run (the default)")
    table = commands.add_parser(
        "kernels", help="compile every kernel for every architecture, without a GPU, and report"
    )
    table.add_argument("--quick", action="store_true", help="for an H100 in bfloat16 alone")
    plan = commands.add_parser(
        "plan", help="which kernels a problem uses on a card, and how long a step is (estimated)"
    )
    plan.add_argument("--hidden", type=_positive, required=True, help="hidden units")
    plan.add_argument("--batch", type=_positive, required=True, help="sequences")
    plan.add_argument("--steps", type=_positive, default=1024, help="time steps")
    plan.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the tensors; tf32 and fp32 are float32")
    plan.add_argument("--directions", type=int, choices=(1, 2), default=1, help="that run side by side")
    plan.add_argument("--device", required=True, help="h100, a100, l4, rtx4090, rtx5090, b200")
    cached = commands.add_parser("races", help="cached results: races, verification of kernels, measured plans")
    what = cached.add_mutually_exclusive_group()
    what.add_argument("--export", metavar="FILE", help="write all of them into one file")
    what.add_argument(
        "--merge", metavar="FILE", nargs="+", help="add results of exported files that are not cached here"
    )
    what.add_argument("--clear", action="store_true", help="remove all but those in a shared folder")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    options = parser.parse_args(arguments)
    if options.command in ("kernels", "plan") and (problem := triton_import_problem()) is not None:
        print(f"python -m gpu_lstm {options.command} {without_triton(problem)}", file=sys.stderr)
        return 1
    if options.command == "kernels" and importlib.import_module("gpu_lstm.kernels.triton_lstm.launch").INTERPRETED:
        print("python -m gpu_lstm kernels compiles them: unset TRITON_INTERPRET in the environment", file=sys.stderr)
        return 2
    return {"kernels": _kernels, "plan": _plan, "races": _races}.get(options.command, _doctor)(options)


_DTYPES = {
    "bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee"),
}  # fmt: skip
LARGEST_MEMORY = 192e9  # bytes; of a B200


def _positive(text: str) -> int:
    """A number of the command line that is at least one."""
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count


def _doctor(options: argparse.Namespace) -> int:
    found = diagnosis()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(found["summary"])
    print(f"\ngpu_lstm {found['versions']['gpu_lstm']}")
    for title in ("versions", "environment"):
        print(f"\n{title}")
        for name, value in found[title].items():
            print(f"  {name:<18} {value if value is not None else '-'}")
    print("\ndevices")
    for device in found["devices"]:
        print(f"  {device['device']:<18} {device['name']}; float32 goes to {device['auto']!r} by default")
        for name, why_not in device["backends"].items():
            print(f"    {name:<16} {'available' if why_not is None else 'not available: ' + why_not}")
    return 0


def diagnosis() -> dict:
    """What a user gets; versions; environment; for each device the backends: None where available, else why not."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "summary": _summary(torch.device(devices[min(1, len(devices) - 1)])),
        "versions": {
            "gpu_lstm": __version__, "python": platform.python_version(), "torch": torch.__version__,
            **{package: cache.version_of(package) for package in ("triton", "numpy", "cupy-cuda12x", "cupy-cuda13x")},
            "CUDA of torch": torch.version.cuda,
        },
        "environment": {
            name: os.environ.get(name) for name in (BACKEND_VARIABLE, RACE_VARIABLE, cache.SHARED, "TRITON_INTERPRET")
        },
        "devices": [_diagnosis_of(torch.device(device)) for device in devices],
    }  # fmt: skip


def _summary(device: torch.device) -> str:
    """What a user of a device gets by default, and whether it was verified and raced there."""
    try:
        requested_backend(None), requested_racing()
    except ValueError as error:
        return f"On this machine gpu_lstm.LSTM raises: {error}"
    start = "On this machine gpu_lstm.LSTM runs"
    backend = select(Backend.AUTO, device, torch.float32, None, False)
    on_cpu = device.type == "cpu"
    where = "the CPU" if on_cpu else torch.cuda.get_device_name(device)
    if backend not in KERNEL_BACKENDS:
        why = "there is no CUDA device" if on_cpu else why_unavailable(Backend.TRITON, device, torch.float32)
        return f"{start} torch's own LSTM on {where}: {why}"
    here = cache.machine(device).items()
    verdicts, decisions = (
        [value for _, key, value in cache.entries(kind) if key.items() >= here] for kind in (verify.KIND, race.KIND)
    )
    wrong = sum(verdict != "right" for verdict in verdicts)
    won = sum(isinstance(value, dict) and value.get("backend") == backend.value for value in decisions)
    kernels = "fused Triton kernels" if backend is Backend.TRITON else "fused kernels in CUDA C++"
    return (
        f"{start} {kernels} on {where} where they are faster: kernels checked {len(verdicts)}"
        + (f", of which {wrong} are not trusted" if wrong else "")
        + f"; kinds of problems raced {len(decisions)}, won {won}"
        + ("; the first call of each kind races" if os.environ.get(RACE_VARIABLE, "on") == "on" else "")
    )


def _diagnosis_of(device: torch.device) -> dict:
    problems = {b.value: why_unavailable(b, device, torch.float32) for b in Backend if b is not Backend.AUTO}
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    return {
        "device": str(device), "name": name, "auto": select(Backend.AUTO, device, torch.float32, None, False).value,
        "backends": {backend: None if problem is None else str(problem) for backend, problem in problems.items()},
    }  # fmt: skip


def _kernels(options: argparse.Namespace) -> int:
    """A row for each case and kernel of both kernel backends. Exit status 1 if one spills, does not fit, or cannot be
    compiled at all. From `instr` to `stores`: a pass of the time loop, see sass.Loop; `moved` are a block's bytes,
    `W_hh` the loads of weights among Triton's."""
    line = "{:<7}{:<34}{:<40}{:>4}{:>5}{:>7}{:>7}  {:>6}{:>5}{:>4}{:>7}{:>6}{:>7}{:>5}  {}"
    title = ("regs", "spills", "shared", "instr", "bars", "mma", "moved", "loads", "stores", "W_hh", "tiles")
    if not options.json:
        print(line.format("", "kernel", "case", "sm", *title))
    rows: list[dict[str, Any]] = []
    complete = True
    for backend in ("triton", "cupy"):
        try:
            compiler = importlib.import_module(f"gpu_lstm.kernels.{backend}_lstm.compile")
            cases, begin = compiler.cases(options.quick), time.monotonic()
            for done, those in enumerate(compiler.reports(cases), start=1):
                left = (time.monotonic() - begin) / done * (len(cases) - done)
                print(f"{backend}: {done} of {len(cases)} compiled, about {left:.0f} s left", file=sys.stderr)
                rows += [_as_json(row) | {"backend": backend, "fits": row.fits} for row in those]
                for row in [] if options.json else those:
                    loop = row.loop
                    counts = ("-",) * 7 if loop is None else (
                        loop.instructions, loop.barriers, loop.products, loop.shared * row.threads, loop.loads,
                        loop.stores, row.weight_loads if backend == "triton" else "-",
                    )  # fmt: skip
                    cells = line.format(
                        backend, row.kernel.removesuffix("_kernel"), row.case, row.architecture, row.registers,
                        row.spills, row.shared, *counts, row.tiles + ("" if row.fits else ", DOES NOT FIT"),
                    )  # fmt: skip
                    print(cells, flush=True)
        except ImportError as error:  # NVRTC is in the dev extra only
            print(f"{backend}: {error}", file=sys.stderr)
            complete = False
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{len(rows)} kernels; {sum(not row['fits'] for row in rows)} do not fit")
    return 0 if complete and all(row["fits"] for row in rows) else 1


def _plan(options: argparse.Namespace) -> int:
    """The plans of a problem, forward and backward, and the estimated time of a step."""
    planning = importlib.import_module("gpu_lstm.kernels.triton_lstm.planning")
    choose = importlib.import_module("gpu_lstm.kernels.triton_lstm.choose")
    device = planning.DEVICES.get(options.device)
    if device is None:
        print(f"unknown device {options.device!r}; known: {', '.join(planning.DEVICES)}", file=sys.stderr)
        return 2
    dtype, precision = _DTYPES[options.dtype]
    problem = Problem(
        options.steps, options.batch, options.hidden, dtype, precision=precision, side_by_side=options.directions
    )
    weights = 4 * problem.hidden**2 * problem.size
    if weights > LARGEST_MEMORY:
        takes = f"W_hh of {problem.hidden} units takes {weights / 1e9:.0f} GB"
        print(f"{takes}, more than any known card has", file=sys.stderr)
        return 2
    passes = {
        name: [(p, planning.expected(problem, device, p, backward)) for p in choose.plans(problem, device, backward)]
        for name, backward in (("forward", False), ("backward", True))
    }
    if options.json:
        found = {
            name: {"plan": _as_json(plan), "expected_seconds": expected.seconds, "expected_terms": expected.terms}
            for name, ((plan, expected), *_) in passes.items()
        }
        print(json.dumps(found, indent=2))
        return 0
    print(f"{device.name}: T={options.steps} B={options.batch} H={options.hidden} {options.dtype}")
    for name, ((plan, expected), *others) in passes.items():
        print(f"\n{name}: {plan.family.value}, {plan.why}")
        print(f"  tiles    {plan.rows} sequences x {plan.columns} units, K by {plan.k}")
        grid = f"{plan.programs} programs x {plan.groups} groups, {plan.num_warps} warps each"
        print(f"  grid     {grid}; {plan.walks} tile(s) after one another at every step")
        print(f"  shared   {plan.shared / 1024:.0f} KB a program, of {device.shared / 1024:.0f} KB")
        print(f"  a step   {expected.seconds * 1e6:.2f} us (expected, not measured):")
        for term, seconds in sorted(expected.terms.items(), key=lambda item: -item[1]):
            print(f"           {seconds * 1e6:6.2f} us  {term}")
        for plan, expected in others:
            tiles = f"{plan.rows}x{plan.columns}, {plan.programs} programs x {plan.groups}"
            print(f"  else     {expected.seconds * 1e6:6.2f} us  {plan.family.value} {tiles}")
    return 0


def _races(options: argparse.Namespace) -> int:
    """List, export, merge or clear cached results. Exit status 2 if a file cannot be read or written."""
    try:
        if options.export is not None:
            done = {"exported": cache.export(options.export)}
        elif options.merge is not None:
            done = {"merged": cache.merge(options.merge)}
        elif options.clear:
            done = {"cleared": sum(map(cache.forget, cache.KINDS))}
        else:
            return _list_cached(options.json)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(done) if options.json else "".join(f"{count} finding(s) {what}" for what, count in done.items()))
    return 0


def _list_cached(as_json: bool) -> int:
    found = {kind: list(cache.entries(kind)) for kind in cache.KINDS}
    if as_json:
        rows = [
            {"kind": kind, "file": str(file), "key": key, "value": value}
            for kind, entries in found.items()
            for file, key, value in entries
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for kind, entries in found.items():
        print(f"{kind}: {len(entries)}")
        for _, key, value in entries:
            try:
                text = _in_words(kind, key, value)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # of another version, or not ours
                text = f"{key}: {value}"
            print(f"  {key.get('card')}, triton {key.get('triton')}: {text}")
    return 0


def _in_words(kind: str, key: dict[str, Any], value: Any) -> str:
    """A cached result; raises whatever it is where the result has other fields."""
    if kind == race.KIND:
        return f"{describe(key)}: {Decision(**value)._replace(backend=Backend(value['backend']))}"
    of = key | value if kind == "plans" else key
    direction, dtype = "backward" if of["backward"] else "forward", of["dtype"].removeprefix("torch.")
    tiles = f"{of['family']} {of['rows']}x{of['columns']} {direction}, H = {of['hidden']}, {dtype}"
    if kind == "plans":
        return f"B = {of['batch']}: {tiles}"
    words = ["projected"] * bool(key["projected"])
    words += [name for name in ("reverse", "lengths", "resets", "dropout_h", "reset_c", "peepholes") if key[name]]
    words += [f"{name}, {key[name]}-D" for name in ("zoneout_h", "zoneout_c") if key[name] is not None]
    words += [name for name, there in zip(("gain_hh", "gain_c", "bias_c"), key["norms"]) if there]
    return f"{', '.join([tiles, key['precision'], *words])}: {value}"


def _as_json(row: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(
        row, dict_factory=lambda items: {k: v.value if isinstance(v, enum.Enum) else v for k, v in items}
    )


if __name__ == "__main__":
    sys.exit(main())
