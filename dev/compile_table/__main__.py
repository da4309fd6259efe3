"""python -m dev.compile_table: compile the kernels, without a GPU, and write the result to README.md in this folder.

With --all a table of every architecture and dtype is printed instead. The exit status is 1 if a kernel spills or does
not fit.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from . import cuda_kernels, triton_kernels
from .report import Report

PAGE = Path(__file__).with_name("README.md")
HEAD = """<!-- make kernels-page writes this page: change dev/compile_table/__main__.py. -->

# What the kernels compile to

These kernels were compiled for an H100 (sm_90) in bfloat16, without a GPU, by Triton {triton} and NVRTC {nvrtc}. In a
clone `python -m dev.compile_table --all` prints the table of every architecture and dtype. It ends with 1 if a kernel
spills or does not fit.

**A row** is one compiled kernel. If a kernel serves several numbers of sequences, its row names them all.

**A case.** B is the number of sequences, H the number of hidden units, and P the number of projected features. 4x128
means 4 heads of 128 units. A *ragged* case has lengths, and resets to given states, and runs in reverse. *Masks* means
recurrent dropout and zoneout in training, and *rates* means zoneout in `eval()`. *Peepholes* and *layer norm* name
these options. A case without *GRU* or *sLSTM* is a case of an LSTM. A kernel in CUDA C++ serves all sizes, so its case
names the cell and the part of a step.

**The columns** give registers a thread, bytes of stack a thread (spills), and bytes of shared memory a block. The
columns from `instructions` on count one pass of the time loop, each instruction once. There are no loads of W_hh where
W_hh stays on chip. [CONTRIBUTING.md](../../CONTRIBUTING.md#reading-the-compile-table) says more about the columns."""
FAMILIES = {  # by the beginning of the names of their kernels
    "resident": "Resident: W_hh in the registers of one program",
    "cooperative": "Cooperative: W_hh in the registers of many programs",
    "pointwise": "Pointwise: a launch a step, next to a product by cuBLAS",
    "held": "Held: W_hh in shared memory",
    "step": "Step: W_hh read from L2 at every step",
    ("after", "before"): "CUDA C++, through CuPy: a launch a step, next to a product by cuBLAS",
}


def _of_loop(name: str) -> Callable[[Report], object]:
    return lambda row: getattr(row.loop, name, "")


COLUMNS: dict[str, Callable[[Report], object]] = {  # the page has the columns up to OF_PAGE
    "kernel": lambda row: f"`{row.kernel.removesuffix('_kernel')}`",
    "case": lambda row: row.case.removeprefix("bfloat16 "),
    "sm": attrgetter("architecture"),
    "registers": attrgetter("registers"),
    "spills": attrgetter("spills"),
    "shared": attrgetter("shared"),
    "instructions": _of_loop("instructions"),
    "barriers": _of_loop("barriers"),
    "mma": _of_loop("products"),
    "loads of W_hh": attrgetter("weight_loads"),
    "bytes moved": lambda row: "" if row.loop is None else row.loop.shared * row.threads,
    "loads": _of_loop("loads"),
    "stores": _of_loop("stores"),
    "tiles": lambda row: row.tiles + ("" if row.fits else ", DOES NOT FIT"),
}
OF_PAGE = 10


def rows(h100: bool) -> Iterator[Report]:
    """Yield a report for each case of both backends. If `h100`, yield only the cases of an H100 in bfloat16."""
    for backend, compiler in (("triton", triton_kernels), ("cupy", cuda_kernels)):
        cases = compiler.cases(h100)
        yield from track(compiler.reports(cases), backend, len(cases), console=Console(stderr=True))


def joined(reports: Iterable[Report]) -> list[Report]:
    """Return one report for each compiled kernel.

    Cases that differ in B alone may share a kernel. Their joined report names each B: "bfloat16 B=16, 64 H=128".
    """
    kernels: dict[tuple[str, str], list[Report]] = {}
    for row in reports:
        kernels.setdefault((row.digest, _BATCH.sub("", row.case)), []).append(row)
    batches = (", ".join(batch for row in each for batch in _BATCH.findall(row.case)) for each in kernels.values())
    return [replace(each[0], case=_BATCH.sub(all_b, each[0].case)) for each, all_b in zip(kernels.values(), batches)]


_BATCH = re.compile(r"(?<=B=)\d+")


def tables(rows: Iterable[Report], count: int) -> list[str]:
    """Return titles and tables of all families in Markdown, with the first `count` columns."""
    columns = list(COLUMNS)[:count]
    head = f"| {' | '.join(columns)} |\n|---|---|{'--:|' * (count - 2)}"
    lines = {title: [head] for title in FAMILIES.values()}
    for row in rows:
        (title,) = (title for begin, title in FAMILIES.items() if row.kernel.startswith(begin))
        cells = [str(COLUMNS[column](row)) for column in columns]
        lines[title].append(f"| {' | '.join(cells)} |")
    return [part for title, table in lines.items() for part in (f"## {title}", "\n".join(table))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dev.compile_table", description=__doc__)
    parser.add_argument("--all", action="store_true", help="print the table of every architecture and dtype")
    options = parser.parse_args(arguments)
    reports = joined(rows(h100=not options.all))
    unfit = [row for row in reports if not row.fits]
    if options.all or unfit:
        print("\n\n".join(tables(reports, len(COLUMNS))))
    else:
        head = HEAD.format(triton=version("triton"), nvrtc=version("nvidia-cuda-nvrtc-cu12"))
        PAGE.write_text("\n\n".join([head, *tables(reports, OF_PAGE)]) + "\n")
    print(f"{len(reports)} kernels; {len(unfit)} do not fit")
    return int(bool(unfit))


if __name__ == "__main__":
    if triton_kernels.INTERPRETED:
        sys.exit("kernels cannot be compiled with TRITON_INTERPRET=1 in the environment")
    sys.exit(main())
