"""python -m bench: how fast LSTMs and GRUs are here. Also: compare two runs, test and measure a GPU, write the page."""

import argparse
import contextlib
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_lstm.__main__ import cuda_devices, why_no_cuda

from . import acting, cases, compare, cpu, gpu, host, measure, models, plots, ppo, report, results
from .isolated import ROOT, checkout
from .providers import OURS, PROVIDERS

ON_A_CPU = {  # the commands for a CPU: each has a function and the text of its help
    "models": (models.run, "whole models on a CPU, before and after gpu_lstm.convert"),
    "acting": (acting.run, "a step of many environments on a CPU, by torch.nn, a module and a Stream"),
    "cpu": (cpu.run, "how much time `auto` wastes on this CPU by what it chooses; takes ten minutes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 fine, 1 something is wrong or slower, 2 a user error."""
    options = _parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            match options.command:
                case "compare":
                    return compare.show(results.read(options.old), results.read(options.new), options.fail_under)
                case "page":
                    files, docs = sorted((ROOT / "bench" / "results").glob("*.csv")), ROOT / "docs"
                    pictures = {file: docs / "pictures" / f"instead-{file.stem}.png" for file in files}
                    for file, picture in pictures.items():
                        plots.draw(results.read(file), picture)
                    report.update_page(docs / "benchmarks.md", pictures)
                    return 0
                case name if name in ON_A_CPU:
                    return ON_A_CPU[name][0](options.out, options.threads)
                case "ppo":
                    return ppo.run(options.device, options.out)
                case "host":
                    return host.run(options.cases, options.base)
                case "gpu" if not torch.cuda.is_available():
                    raise ValueError(why_no_cuda())
            out = options.out or ROOT / "out" / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
            if options.command != "gpu":
                chosen = cases.choose(torch.device(options.device).type, options.cases)
                base = stack.enter_context(checkout(options.base)) if options.base else None
            out.mkdir(parents=True)
        except (ValueError, OSError) as error:
            print(f"python -m bench: {error}", file=sys.stderr)
            return 2
        file, old = out / "results.csv", out / "base.csv"
        if options.command == "gpu":
            failures = gpu.run(options.minutes, out)
            return show(file) or int(failures > 0)
        if base is not None:
            measure.measure(chosen, options.providers or [OURS], options.device, {old: base, file: None})
            return main(["compare", str(old), str(file)])
        measure.measure(chosen, options.providers, options.device, {file: None})
        return show(file)


def show(file: Path) -> int:
    """Draw a picture next to a results file, and print its tables, the summary last.

    Return the exit status: 1 if a row of gpu_lstm is wrong or failed, or if there is no row, else 0.
    """
    rows, console = results.read(file), report.console()
    if rows.empty:
        console.print(f"Nothing was measured: {file} has no row. The reason is above.")
        return 1
    wrong = rows[report.is_ours(rows) & rows["status"].isin(results.BROKEN)]
    picture = " and a picture next to it" * plots.draw(rows, file.with_suffix(".png"))
    console.print(*report.details(rows), f"{file}{picture}", sep="\n")
    for row in wrong.itertuples():
        console.print(f"{row.status.upper()} {row.case} {row.provider}: {row.note}")
    console.print(report.summary(rows))
    return int(len(wrong) > 0)


def _parser() -> argparse.ArgumentParser:
    devices = ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(cuda_devices())] + ["cpu"]
    device: Any = dict(choices=devices, default=devices[0], help="default here: %(default)s")
    file: Any = dict(type=Path, metavar="FILE", help="a CSV file that rows are added to")
    base: Any = dict(metavar="REV", help="measure gpu_lstm in this commit, too, in turns, and compare")
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    groups = ", ".join(cases.grid("cpu"))
    add("--cases", nargs="+", metavar="NAME", help=f"groups ({groups}) or single cases; default: all")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="what is measured next to torch's own")
    add("--device", **device)
    add("--out", type=Path, help="a new folder; default: out/bench-DATE-TIME")
    add("--base", **base)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = commands.add_parser("compare", help="what is faster and slower in one run than in another").add_argument
    add("old", type=Path, help="CSV of the run before")
    add("new", type=Path, help="CSV of the run now, on the same device")
    fail = "fail where the speed is less than this fraction of that before (default %(default)s)"
    add("--fail-under", type=float, default=compare.FAIL_UNDER, metavar="RATIO", help=fail)
    add = commands.add_parser("gpu", help="doctor, tests, grid, a picture and tables, for a CUDA machine").add_argument
    add("--minutes", type=_minutes, default=8.0, help="for everything together")
    add("--out", type=Path, required=True, help="folder for everything it writes")
    add = commands.add_parser("ppo", help="an iteration of recurrent PPO beside a loop over steps").add_argument
    add("--device", **device)
    add("--out", **file)
    for name, (_, about) in ON_A_CPU.items():
        add = commands.add_parser(name, help=about).add_argument
        add("--threads", type=int, default=1, help="of torch (default %(default)s)")
        add("--out", **file)
    add = commands.add_parser("host", help="microseconds of a call on the host before the device begins").add_argument
    add("--cases", nargs="+", choices=host.CASES, metavar="NAME", default=[*host.CASES], help="; ".join(host.CASES))
    add("--base", **base)
    commands.add_parser("page", help="write the figures of docs/benchmarks.md from bench/results/*.csv")
    return parser


def _minutes(text: str) -> float:
    if not 0 < (minutes := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0 minutes, got {text!r}")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
