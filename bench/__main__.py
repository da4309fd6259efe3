"""python -m bench: how fast is an LSTM here, by whom? Also: compare two runs, test and measure a GPU, the README."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import cases, compare, gpu, grid, host, plots, ppo_update, providers, readme, results, tables

ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 fine, 1 something is wrong or slower, 2 a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    _run_arguments(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    compare.add_arguments(commands.add_parser("compare", help="what a run has faster and slower than another"))
    on_gpu = commands.add_parser("gpu", help="doctor, tests, grid, plots and a table, for a CUDA machine")
    on_gpu.add_argument("--minutes", type=float, default=8.0, help="for all of it together")
    on_gpu.add_argument("--out", type=Path, required=True, help="folder for all it finds")
    ppo_update.add_arguments(commands.add_parser("ppo", help="an update of recurrent PPO: one call against a loop"))
    commands.add_parser("readme", help="write the performance section of README.md from bench/results/*.csv")
    options = parser.parse_args(arguments)
    match options.command:
        case "compare":
            return compare.run(options)
        case "ppo":
            return ppo_update.run(options)
    try:
        if options.command == "readme":
            readme.update(ROOT / "README.md", sorted((ROOT / "bench" / "results").glob("*.csv")))
            return 0
        out = _checked(options)
    except (ValueError, OSError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    return gpu.run(options.minutes, out) if options.command == "gpu" else _run(options, out)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="groups or single cases; default: all")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="who is measured beside torch.nn.LSTM")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--out", type=Path, help="a new folder; default: out/bench-DATE-TIME")
    parser.add_argument(
        "--expect", nargs="*", metavar="GPU", default=["h100", "a100", "rtx4090"],
        help="on a CPU: cards that plans are shown for (expected, not measured)",
    )  # fmt: skip


def _checked(options: argparse.Namespace) -> Path:
    """The folder for results, made anew if everything that was asked for is known.

    Raises:
        ValueError: an unknown case, provider or device.
        FileExistsError: the folder is there; nothing is overwritten.
    """
    if options.command == "gpu":
        _check_device("cuda")
    else:
        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_device(options.device)
        cases.choose(torch.device(options.device).type, options.cases)
        providers.check(options.providers or [])
        host.check(options.expect)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = options.out or ROOT / "out" / f"bench-{now}"
    out.mkdir(parents=True)
    return out


def _run(options: argparse.Namespace, out: Path) -> int:
    """Measure, draw, and print what a person reads in ten seconds last."""
    device, file = options.device, out / "results.csv"
    chosen = cases.choose(torch.device(device).type, options.cases)
    rows, _ = grid.measure(chosen, options.providers, device, file)
    console = Console()
    if device == "cpu" and options.cases is None:
        expected = host.expected(options.expect)
        for row in expected:
            results.append(file, row)
        console.print(tables.expected(expected))
    drawn = plots.draw(rows, out)
    console.print(tables.headline(rows))
    console.print(f"{file} and {len(drawn)} plots beside it", markup=False, highlight=False)
    console.print(tables.summary(rows))
    return 1 if gpu.wrong(rows) else 0


def _check_device(name: str) -> None:
    count = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise ValueError(f"unknown device {name!r}; known here: {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
