"""python -m gpu_lstm: check this machine, show plans, explain how an LSTM or GRU runs here, list cached results."""

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, modules
from .call.checks import check_heads
from .call.choices import BACKEND_VARIABLE, KERNEL_BACKENDS, RACE_VARIABLE, Backend, requested_backend, requested_racing
from .dispatch.available import backends_for, import_problem, is_compiled_once, select, why_unavailable
from .dispatch.kind import Kind, in_words
from .dispatch.race import Decision
from .kernels import cache
from .kernels.cards import driver
from .kernels.cells import CELLS
from .kernels.contract import machine_of, package_of
from .kernels.problem import Problem
from .tools.compile import compile_loops, loops_for_this_cpu
from .tools.explain import explain

ANY = Kind((Problem(1, 1, 8, torch.float32),), (8,), 1, False, False, None)  # a kind that every backend supports

_DTYPES = {
    "bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee"),
}  # fmt: skip
LARGEST_MEMORY = 192e9  # bytes: the memory of a B200
SMI = "nvidia-smi", "--query-gpu=index,name,driver_version,mig.mode.current,compute_mode,memory.free", "--format=csv"
MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED in cuda.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 for success, 1 if something is missing, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m gpu_lstm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gpu_lstm {__version__}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)
    subparsers, commands = parser.add_subparsers(dest="command", metavar="COMMAND"), {}
    for run in (_doctor, _compile, _plan, _explain, _races):
        name = run.__name__.removeprefix("_")
        commands[name] = command = subparsers.add_parser(name, help=run.__doc__)
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        command.set_defaults(run=run)
    commands["compile"].add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS], help="default: all")
    commands["compile"].add_argument("--hidden", nargs="+", type=_positive, default=[128], help="units, default: 128")
    commands["compile"].add_argument("--dtype", choices=["fp32"], help="the only one: the loops compute in float32")
    plan = commands["plan"]
    for command, dtype in ((plan, "bf16"), (commands["explain"], "tf32")):
        command.add_argument("--cell", choices=CELLS, default="lstm", help="default: %(default)s")
        command.add_argument("--hidden", type=_positive, required=True, help="hidden units")
        command.add_argument("--heads", type=_positive, default=1, help="that W_hh does not connect with each other")
        command.add_argument("--batch", type=_positive, required=True, help="sequences")
        command.add_argument("--steps", type=_positive, default=1024, help="time steps")
        command.add_argument("--dtype", choices=_DTYPES, default=dtype, help="of the tensors; tf32, fp32: float32")
        command.add_argument("--directions", type=int, choices=(1, 2), default=1, help="that run side by side")
    plan.add_argument("--layer-norm", action="store_true", help="of W_hh h and of c; of an LSTM")
    plan.add_argument("--device", required=True, help="h100, a100, l4, rtx4090, rtx5090, b200")
    commands["explain"].add_argument("--layers", type=_positive, default=1, help="on top of each other")
    commands["explain"].add_argument("--inference", action="store_true", help="without gradients")
    commands["races"].add_argument("--clear", action="store_true", help="remove all but those in a shared folder")
    options = parser.parse_args(arguments)
    try:
        as_json, text = options.run(options)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except (ImportError, MemoryError, RuntimeError, UserWarning) as error:
        print(str(error) or "memory is full", file=sys.stderr)
        return 1
    try:
        print(json.dumps(as_json, indent=2) if options.json else text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has read enough; at exit Python would write to it again
        os._exit(0)
    return 0


def _positive(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count


def cuda_devices() -> int:
    """Return how many CUDA devices torch can use.

    torch.cuda.device_count() alone also counts devices whose driver is too old for torch.
    """
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_cuda() -> str:
    """Return torch's own words for why it uses no CUDA device here, and the remedy if the driver is too old."""
    problem = "torch.cuda.is_available() is False"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch is built without CUDA
        problem = " ".join(str(error).split()).removesuffix(".")
    if "too old" in problem:
        older = "a torch for CUDA 12: pip install torch --index-url https://download.pytorch.org/whl/cu126"
        problem += f". This torch is for CUDA {torch.version.cuda}; a newer driver helps, or {older}"
    return f"there is no CUDA device that torch can use: {problem}"


# Each command returns two things: the data that --json prints, and the text that is printed without --json. The
# docstring of a command is its line in --help.


def _doctor(_: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """versions, devices, and which backends can run (the default)"""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(cuda_devices()))]
    ours, numbas = (BACKEND_VARIABLE, RACE_VARIABLE, cache.SHARED), ("NUMBA_CACHE_DIR", "NUMBA_CPU_NAME")
    variables = *ours, *numbas, "OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    packages = ["numpy", *(name for b in KERNEL_BACKENDS for name in package_of(b.value).PACKAGES)]
    state: dict[str, Any] = {
        "summary": _summary(devices[:2][-1]),
        "versions": {
            "gpu_lstm": __version__, "sources of gpu_lstm": cache.machine(torch.device("cpu"))["gpu_lstm"],
            "python": platform.python_version(), "torch": torch.__version__,
            **{package: cache.version_of(package) for package in packages},
            "CUDA of torch": torch.version.cuda, "cuDNN of torch": cache.cudnn_version(),
        },
        "cache": {"folder": str(cache.folder() or "-"), "loops compiled for this CPU": loops_for_this_cpu()},
        "environment": {name: os.environ.get(name) for name in variables}, "nvidia-smi": _smi(),
        "devices": [_diagnosis(device) for device in devices],
    }  # fmt: skip
    lines = [state["summary"]]
    for title in ("versions", "cache", "environment"):
        lines += ["", title, *(f"  {name:<34} {value or '-'}" for name, value in state[title].items())]
    lines += ["", "nvidia-smi", *(f"  {line}" for line in state["nvidia-smi"]), "", "devices"]
    for device in state["devices"]:
        goes = f"an LSTM in float32 goes to {device['auto']!r} by default"
        lines.append(f"  {device['device']:<22} {device['name']}; {goes}")
        can = {name: f"not available: {why}" if why else "available" for name, why in device["backends"].items()}
        lines += [f"    {name:<20} {value}" for name, value in (device["card"] | can).items()]
    return state, "\n".join(lines)


def _summary(device: torch.device) -> str:
    """Return one sentence: the default backend on a device, and how many of its kernels were verified and raced."""
    try:
        chosen, _ = requested_backend(None), requested_racing()
    except ValueError as error:
        return f"On this machine gpu_lstm raises: {error}"
    if chosen is not Backend.AUTO:
        asked_for = f"backend {chosen.value!r}, asked for by the variable {BACKEND_VARIABLE}"
        if (why := why_unavailable(chosen, device, torch.float32)) is not None:
            return f"On this machine {asked_for}, raises: {why}"
        return f"On this machine gpu_lstm runs {asked_for}"
    backend, on_cpu = _expected(device), device.type == "cpu"
    where = "the CPU" if on_cpu else torch.cuda.get_device_name(device)
    if backend not in KERNEL_BACKENDS:
        # The last backend of a CPU is the compiled loops. They are never `backend`, even if they are available, since
        # ANY is a plain LSTM and cpu_rule gives the loops no plain LSTM.
        *_, last = backends_for(device)
        why = why_unavailable(last if on_cpu else KERNEL_BACKENDS[0], device, torch.float32)
        if not on_cpu:
            return f"On this machine gpu_lstm runs torch's own LSTM and GRU on {where}: {why}"
        theirs, rest = "LSTM and GRU", f"what torch lacks by a loop in Python, since {why}"
        if why is None:
            theirs, rest = "LSTM", f"most GRUs and what torch lacks by the compiled loops of backend {last.value!r}"
        return f"On this machine gpu_lstm runs torch's own {theirs} on the CPU, and {rest}; {why_no_cuda()}"
    verdicts, decisions = (
        [value for _, key, value in cache.entries(kind) if key.items() >= machine_of(backend.value, device).items()]
        for kind in (cache.CHECKS, cache.RACES)
    )
    wrong = len(verdicts) - verdicts.count("right")
    won = sum(isinstance(value, dict) and value.get("backend") == backend.value for value in decisions)
    failed = f", of which {wrong} failed" if wrong else ""
    then = "; the first call of each kind races" if os.environ.get(RACE_VARIABLE, "on") == "on" else ""
    found = f"kernels checked {len(verdicts)}{failed}; kinds of problems raced {len(decisions)}, won {won}{then}"
    kernels = f"the kernels of backend {backend.value!r}"
    return f"On this machine gpu_lstm runs {kernels} on {where} where they are faster: {found}"


def _expected(device: torch.device) -> Backend:
    """Return the backend that a plain LSTM has by default: kernels that the first call races, or torch's own."""
    able = select(Backend.AUTO, device, ANY, False)
    return Backend.TORCH if able in KERNEL_BACKENDS and is_compiled_once(able) else able


def _diagnosis(device: torch.device) -> dict[str, Any]:
    """Return the facts about a device, and for each backend why it is not available there, or None if it is."""
    name = cache.cpu_name()
    card = {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        count = torch.cuda.get_device_properties(device).multi_processor_count
        card = {"free memory": f"{free:.1f} of {total:.1f} GiB", "multiprocessors": count, "MPS": _mps(device)}
    problems = {b.value: why_unavailable(b, device, torch.float32) for b in Backend if b is not Backend.AUTO}
    return {
        "device": str(device), "name": name, "auto": _expected(device).value, "card": card,
        "backends": {backend: problem and str(problem) for backend, problem in problems.items()},
    }  # fmt: skip


def _smi() -> list[str]:
    """Return the lines of nvidia-smi, one per card: the driver's build, MIG, the compute mode, free memory."""
    try:
        done = subprocess.run(SMI, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)
    except FileNotFoundError:
        return ["there is no nvidia-smi: no driver of NVIDIA's is installed, or it is not on the PATH"]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return done.stdout.splitlines()


def _mps(device: torch.device) -> str:
    """Return "on" if processes share a card through MPS, else "off". MPS may give each only some multiprocessors.

    If the driver returns an error, the text names it.
    """
    if sys.platform != "linux":  # MPS exists only on Linux
        return "off"
    enabled = ctypes.c_int()
    code = driver().cuDeviceGetAttribute(ctypes.byref(enabled), MPS_ENABLED, device.index)
    return f"the driver does not say: error {code}" if code else "on" if enabled.value else "off"


def _compile(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """compile and verify the loops for this CPU, for example when an image is built"""
    kept = compile_loops(options.cells, options.hidden)
    text = f"verified for {', '.join(options.cells)} of {options.hidden} units; compiled for this CPU, kept in {kept}"
    text += "\non a card the first call of each kind compiles its kernels" * (cuda_devices() > 0)
    return {"cells": options.cells, "hidden": options.hidden, "kept": kept}, text


def _plan(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """which kernels a problem tries on a card, in which order"""
    if (needs := import_problem(Backend.TRITON)) is not None:
        raise ImportError(f"python -m gpu_lstm plan {needs}")
    from .kernels.triton_rnn.plans import choose, planning

    if (card := planning.DEVICES.get(options.device)) is None:
        raise ValueError(f"unknown device {options.device!r}; known: {', '.join(planning.DEVICES)}")
    dtype, precision = _DTYPES[options.dtype]
    check_heads(options.heads, options.hidden)
    if (normed := options.layer_norm) and (options.heads > 1 or not CELLS[options.cell].normalises):
        raise ValueError(f"--layer-norm needs an LSTM without heads, got {options.cell} with heads={options.heads}")
    problem = Problem(
        min(options.steps, 2), options.batch, options.hidden, dtype, precision=precision, gain_hh=normed, gain_c=normed,
        side_by_side=options.directions, cell=options.cell, heads=options.heads, bias_c=normed,
    )  # fmt: skip
    if (weights := CELLS[problem.cell].rows * problem.hidden * problem.columns * problem.size) > LARGEST_MEMORY:
        takes = f"W_hh of {problem.hidden} units takes {weights / 1e9:.0f} GB"
        raise ValueError(f"{takes}, more than any known card has")
    sizes = f"T={options.steps} B={options.batch} H={options.hidden}" + f"/{problem.heads}" * (problem.heads > 1)
    sizes += " layer norm" * normed
    found, lines = {}, [f"{card.name}: {options.cell.upper()} {sizes} {options.dtype}"]
    for name, backward in (("forward", False), ("backward", True)):
        plan, *others = choose.plans(problem, card, backward)
        found[name] = dict(plan=plan.as_json(), others=[each.as_json() for each in others])
        lines += [
            f"\n{name}: {plan.family.name}, {plan.why}",
            f"  first    {_in_one_line(plan)}",
            f"  memory   {plan.shared >> 10} of {card.shared >> 10} KB of shared memory",
            *(f"  else     {each.family.name}, {_in_one_line(each)}" for each in others),
        ]
    return found, "\n".join(lines)


def _in_one_line(plan: Any) -> str:
    """Return the numbers of a plan. Those of its family that are off, such as one part, are left out."""
    of_family = [f"{size} {value}" for size, value in dataclasses.asdict(plan.family).items() if value > 1]
    own = ["looks ahead"] * getattr(plan.family, "ahead", False) + of_family
    in_turn = [f"{plan.tiles_per_program} tiles in turn"] * (plan.tiles_per_program > 1)
    return ", ".join([plan.tiles, *in_turn, *own, f"{plan.num_warps} warps"])


def _explain(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """which backend would run an LSTM or GRU on this machine, how, and why"""
    (dtype, precision), device = _DTYPES[options.dtype], "cuda" if torch.cuda.is_available() else "cpu"
    module = getattr(modules, options.cell.upper())(
        options.hidden, options.hidden, options.layers, bidirectional=options.directions == 2, heads=options.heads,
        device=device, dtype=dtype,
    )  # fmt: skip
    x = next(module.parameters()).new_empty(options.steps, options.batch, options.hidden)
    tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32")
    with torch.set_grad_enabled(not options.inference), tf32:
        explanation = explain(module, x)
    return dataclasses.asdict(explanation), str(explanation)


def _races(options: argparse.Namespace) -> tuple[Any, str]:
    """cached results: races, verification of kernels, measured plans"""
    if options.clear:
        cleared = sum(map(cache.remove, cache.KINDS))
        ours = cache.folder()
        if ours is not None and (loops := ours / "compiled").is_dir() and not loops.is_symlink():  # links are not ours
            shutil.rmtree(loops)
        return {"cleared": cleared}, f"cached results cleared: {cleared}"
    rows, lines = [], []
    how_they_come = (
        "the first call of each kind races the kernels against torch's own",
        "each kernel is verified before it is used", "the first call of a layer on a card times some of them",
    )  # fmt: skip
    for kind, none_yet in zip(cache.KINDS, how_they_come, strict=True):
        entries = list(cache.entries(kind))
        lines.append(f"{kind}: {len(entries) or f'none yet; {none_yet}'}")
        for file, key, value in entries:
            rows.append(dict(kind=kind, file=str(file), key=key, value=value))
            try:
                text = _in_words(kind, key, value)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # an entry of another version
                text = f"{key}: {value}"
            made_by = [f"{name} {key[name]}" for name in ("triton", "cupy", "numba") if name in key]
            lines.append(f"  {', '.join([str(key.get('card')), *made_by])}: {text}")
    return rows, "\n".join(lines)


def _in_words(kind: str, key: dict[str, Any], value: Any) -> str:
    """Return a cached result in words.

    An entry of another version may have other fields. Then this raises one of the errors that `_races` catches.
    """
    if kind == cache.RACES:
        return f"{in_words(key)}: {Decision(**value)._replace(backend=Backend(value['backend']))}"
    of = key | value if kind == cache.PLANS else key
    direction, dtype = "backward" if of["backward"] else "forward", of["dtype"].removeprefix("torch.")
    how = f"{of['family']} {of['rows']}x{of['units']}" if "family" in of else of["kernel"]
    tiles = f"{of['cell'].upper()}, {how} {direction}, H = {of['hidden']}, {dtype}"
    if kind == cache.PLANS:
        return f"B = {of['batch']}: {tiles}"
    there = [name for name in Problem._fields if key[name] is True or (key[name] and name in ("projected", "lengths"))]
    words = [tiles, *there] if "numba" in key else [tiles, key["precision"], *there]
    words += [f"{key['heads']} heads"] * (key["heads"] > 1)
    words += [f"{name}, {key[name]}-D" for name in ("zoneout_h", "zoneout_c") if key[name] is not None]
    return f"{', '.join(words)}: {value}"


if __name__ == "__main__":
    sys.exit(main())
