"""python -m bench: how fast is an LSTM here, by whom? Also: compare two runs, test and measure a GPU, the README."""

import argparse
import contextlib
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import cases, compare, expected, gpu, internals, measure, ppo, report, results
from .isolated import ROOT, checkout
from .providers import OURS, PROVIDERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 fine, 1 something is wrong or slower, 2 a mistake of the user's."""
    devices = ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", metavar="NAME", help="groups or single cases; default: all")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="who is measured beside torch.nn.LSTM")
    add("--device", choices=devices, default=devices[0], help="default here: %(default)s")
    add("--out", type=Path, help="a new folder; default: out/bench-DATE-TIME")
    add("--base", metavar="REV", help="measure a commit, too, case by case in turn, and compare; default: ours only")
    add(
        "--expect", nargs="*", choices=internals.cards(), default=["h100", "a100", "rtx4090"], metavar="GPU",
        help="on a CPU: cards that plans are shown for (expected, not measured)",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    to_compare = commands.add_parser("compare", help="what a run has faster and slower than another")
    to_compare.add_argument("old", type=Path, help="CSV of the run before")
    to_compare.add_argument("new", type=Path, help="CSV of the run now, on the same device")
    to_compare.add_argument(
        "--fail-under", type=float, default=compare.FAIL_UNDER, metavar="RATIO",
        help="fail where the speed is less than this fraction of that before (default %(default)s)",
    )  # fmt: skip
    on_gpu = commands.add_parser("gpu", help="doctor, tests, grid, plots and a table, for a CUDA machine")
    on_gpu.add_argument("--minutes", type=float, default=8.0, help="for all of it together")
    on_gpu.add_argument("--out", type=Path, required=True, help="folder for all it finds")
    ppo.add_arguments(commands.add_parser("ppo", help="an update of recurrent PPO: one call against a loop"))
    commands.add_parser("readme", help="write the performance section of README.md from bench/results/*.csv")
    options = parser.parse_args(arguments)
    out = options.out if "out" in options else None
    with contextlib.ExitStack() as stack:
        try:
            match options.command:
                case "compare":
                    return compare.show(results.read(options.old), results.read(options.new), options.fail_under)
                case "readme":
                    report.update_readme(ROOT / "README.md", list((ROOT / "bench" / "results").glob("*.csv")))
                    return 0
                case "gpu" if devices == ["cpu"]:
                    raise ValueError("there is no CUDA device here")
                case None:
                    chosen = cases.choose(torch.device(options.device).type, options.cases)
                    base = stack.enter_context(checkout(options.base)) if options.base else None
                    out = options.out or ROOT / "out" / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
            if out is not None:
                out.mkdir(parents=True)
        except (ValueError, OSError) as error:
            print(f"python -m bench: {error}", file=sys.stderr)
            return 2
        match options.command:
            case "gpu":
                return gpu.run(options.minutes, out)
            case "ppo":
                return ppo.run(options)
        return _run(options, chosen, out, base)


def _run(options: argparse.Namespace, chosen: list[cases.Case], out: Path, base: Path | None) -> int:
    """Measure, and print the tables; or, beside another commit, the comparison."""
    file, device = out / "results.csv", options.device
    if base is not None:
        old = out / "base.csv"
        measure.measure(chosen, options.providers or [OURS], device, {old: base, file: None})
        return compare.show(results.read(old), results.read(file), compare.FAIL_UNDER)
    measure.measure(chosen, options.providers, device, {file: None})
    for row in expected.rows(options.expect) if device == "cpu" and options.cases is None else []:
        results.append(file, row)
    return gpu.show(file, Console())


if __name__ == "__main__":
    sys.exit(main())
