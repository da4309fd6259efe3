"""The performance section of the README, written from the files of results."""

import os
import textwrap
from pathlib import Path

from . import results as results_files
from . import tables
from .results import Row
from .tables import OURS, YARDSTICK, digits

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NO_GPU = "No figure has been taken on a GPU yet."
CPU_LINES = 8  # a CPU is not what this is for
WIDTH = 120


def update(readme: Path, results: list[Path]) -> None:
    """Write what the files say between the two markers of `readme`, GPUs first; the rest stays as it is.

    Raises:
        ValueError: a marker is missing, or a file of results is broken.
    """
    before, begin, rest = readme.read_text().partition(BEGIN)
    if not begin:
        raise ValueError(f"{readme}: no {BEGIN}; expected it on a line before {END}")
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme}: no {END} after {BEGIN}")
    readme.write_text(f"{before}{BEGIN}\n{_section(readme.parent, results)}\n{END}{after}")


def _section(folder: Path, paths: list[Path]) -> str:
    gpus: list[tuple[Path, list[Row]]] = []
    processors: list[tuple[Path, list[Row]]] = []
    for path in sorted(paths):
        taken = [row for row in results_files.read(path) if row.status != "expected"]
        for device in dict.fromkeys(row.device for row in taken):
            rows = [row for row in taken if row.device == device]
            (processors if rows[0].cuda is None else gpus).append((path, rows))
    on_a_gpu = any(row.status == "measured" for _, rows in gpus for row in rows)
    described = [_device(folder, path, rows) for path, rows in gpus + processors]
    return "\n\n".join(described if on_a_gpu else [NO_GPU, *described])


def _device(folder: Path, path: Path, rows: list[Row]) -> str:
    """Where the figures come from, and a table of them."""
    cases = tables.by_case(rows)
    groups = tables.grouped(cases, tables.headline_case(cases))
    on_gpu = rows[0].cuda is not None
    shown = tables.telling(groups, len(cases) if on_gpu else CPU_LINES)
    name = Path(os.path.relpath(path, folder)).as_posix()
    text = f"{'GPU' if on_gpu else 'CPU, not a GPU'}: {tables.origin(rows)}; from [{name}]({name})."
    if len(shown) < len(cases):
        text += f" {len(shown)} of {len(cases)} cases."
        if over_all := tables.spread(list(cases.values())):
            text += f" Over all that were timed, gpu_lstm is {over_all} times as fast."
    lines = [line for group in groups for line in tables.by_size([line for line in group if line in shown])]
    if any(row.status == "yardstick" for line in lines for row in line.values()):
        text += " Where torch.nn.LSTM's time has a star, it ran without the lengths or resets, which it does not take."
    table = [
        "| case | torch.nn.LSTM, ms | gpu_lstm, ms | times as fast | of the bound |",
        "|------|------------------:|-------------:|--------------:|-------------:|",
        *(_line(line) for line in lines),
    ]
    sentence = textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return sentence + "\n\n" + "\n".join(table)


def _line(line: dict[str, Row]) -> str:
    row, ours = tables.first(line), tables.pick(line, OURS)
    cells = [f"{row.run} {tables.sizes(row)}", _time(tables.pick(line, YARDSTICK)), _time(ours)]
    cells.append("" if ours is None or ours.speed is None else digits(ours.speed))
    cells.append("" if ours is None or ours.bound_fraction is None else f"{ours.bound_fraction:.0%}")
    return f"| {' | '.join(cells)} |"


def _time(row: Row | None) -> str:
    """Milliseconds, or why there are none."""
    if row is None:
        return "not run"
    if row.median_s is None:
        return row.status
    return digits(row.median_s * 1e3) + r"\*" * (row.status == "yardstick")
