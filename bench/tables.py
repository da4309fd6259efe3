"""Rows as tables on a terminal: all cases in short, all providers at one case, what is expected of other GPUs."""

import math
from collections.abc import Iterable
from dataclasses import replace

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .results import Row

YARDSTICK, OURS = "torch", "ours"  # the two providers that every table is about
LINES = 32  # that the summary has for cases and for the rules between their groups
EVEN = 0.02  # a time that differs by less is called even
MIB = 2**20

Cases = dict[str, dict[str, Row]]
"""Rows by case, then by contender, in the order in which they came."""

# Cases belong together where they differ from the headline in the same of these.
TOPICS = {
    "dtype": "dtype", "steps": "steps", "batch": "batch", "inputs": "hidden", "hidden": "hidden",
    "layers": "stack", "directions": "stack", "sequences": "lengths", "reset_rate": "resets",
}  # fmt: skip


def summary(rows: list[Row]) -> Table:
    """A line a case: torch.nn.LSTM, ours and the best other. Where there are too many, those left out are counted.

    Raises:
        ValueError: rows of several devices.
    """
    cases = by_case(rows)
    base = headline_case(cases)
    groups = grouped(cases, base)
    fits = len(cases) + len(groups) - 1 <= LINES
    shown = telling(groups, len(cases) if fits else LINES - len(groups) - 1)
    table = _table("gpu_lstm and torch.nn.LSTM (T steps, B batch, H hidden, L layers, D directions)")
    _columns(table, left=("pass", "case"), right=("torch ms", "ours ms", "times as fast", "bound"))
    table.add_column(_tail("best other"))
    for group in groups:
        for line in by_size([line for line in group if line in shown]):
            table.add_row(*_summary_cells(line, base))
        table.add_section()
    left_out = [line for group in groups for line in group if line not in shown]
    if left_out:
        table.add_row(Text("more"), _tail(f"{len(left_out)} cases"), "", "", Text(spread(left_out)), "", "")
    notes = [origin(all_rows(cases))]
    if any(row.status == "yardstick" for row in all_rows(cases)):
        notes.append("* torch.nn.LSTM without the lengths and resets, which it does not take")
    notes.append("; ".join(filter(None, (_count(status, cases) for status in ("wrong", "failed")))))
    table.caption = Text("\n".join(filter(None, notes)))
    return table


def headline(rows: list[Row]) -> Group:
    """Every provider at the case that most of them have, the fastest first; which kernels ran, or why none did.

    Raises:
        ValueError: rows of several devices.
    """
    cases = by_case(rows)
    base = headline_case(cases)
    entries = cases[base.case]
    times = sorted((row for row in entries.values() if row.median_s is not None), key=lambda row: row.median_s or 0)
    memory = memory_column(times)
    width = max(map(len, entries))
    done = _table(f"All providers: {base.run} {sizes(base)}")
    done.add_column("provider", min_width=width, no_wrap=True)
    memory_title = f"{memory.removesuffix('_bytes')} MiB"
    _columns(done, right=("ms", "p20-p80", "us a step", memory_title, "times as fast", "error"))
    for row in times:
        done.add_row(
            Text(contender(row), style="bold" if row.provider == OURS else ""),
            _milliseconds(row),
            f"{_scaled(row.p20_s, 1e3)}-{_scaled(row.p80_s, 1e3)}",
            _scaled(row.us_per_step, 1),
            _scaled(getattr(row, memory), 1 / MIB),
            verdict(row),
            _scaled(row.error, 1),
        )
    notes = Table(box=None, show_header=False, pad_edge=False)
    notes.add_column(min_width=width, no_wrap=True)
    notes.add_column(no_wrap=True)
    notes.add_column()
    for row in [*times, *(row for row in entries.values() if row.median_s is None)]:
        if row.median_s is None or (row.note and not row.graph):
            title = _status(row) if row.median_s is None else Text("kernels")
            notes.add_row(Text(contender(row)), title, _tail(row.note or ""))
    error = "error: the largest of all results and gradients, over what is allowed; 1 is the most"
    return Group(done, notes, Text(f"{error}\n{origin(all_rows(cases))}", style="dim"))


def expected(rows: list[Row]) -> Group:
    """What plans expect of GPUs that are not here, a table each; empty without such rows."""
    chosen = [row for row in rows if row.status == "expected"]
    tables = []
    for device, run in dict.fromkeys((row.device, row.run) for row in chosen):
        table = _table(f"Expected, not measured: {run}, {device}")
        _columns(table, left=("case", "kernels"), right=("launches", "host us", "us a step"))
        for row in (row for row in chosen if (row.device, row.run) == (device, run)):
            table.add_row(
                sizes(row),
                row.note or "",
                "" if row.launches is None else str(row.launches),
                _scaled(row.host_s, 1e6),
                _scaled(row.expected_us_per_step, 1),
            )
        tables.append(table)
    if chosen:
        tables[-1].caption = Text(origin([replace(row, device="") for row in chosen]))
    return Group(*tables)


def by_case(rows: Iterable[Row]) -> Cases:
    """All but expected rows. Of two of the same case and contender the later counts.

    Raises:
        ValueError: rows of several devices.
    """
    taken = [row for row in rows if row.status != "expected"]
    devices = dict.fromkeys(row.device for row in taken)
    if len(devices) > 1:
        raise ValueError(f"expected rows of one device, got {len(devices)}: {', '.join(devices)}")
    cases: Cases = {}
    for row in taken:
        cases.setdefault(row.case, {})[contender(row)] = row
    return cases


def all_rows(cases: Cases) -> list[Row]:
    """The rows of all cases."""
    return [row for line in cases.values() for row in line.values()]


def contender(row: Row) -> str:
    """The provider, and whether a CUDA graph was replayed."""
    return f"{row.provider} (graph)" if row.graph else row.provider


def headline_case(cases: Cases) -> Row:
    """A row of the case with most contenders, the first of those.

    Raises:
        ValueError: there is no case.
    """
    if not cases:
        raise ValueError("no rows but expected ones: nothing was measured")
    return next(iter(max(cases.values(), key=len).values()))


def grouped(cases: Cases, base: Row) -> list[list[dict[str, Row]]]:
    """The cases that vary the same of the headline's fields, in the order in which they came."""
    groups: dict[frozenset[str], list[dict[str, Row]]] = {}
    for line in cases.values():
        row = first(line)
        topics = {topic for field, topic in TOPICS.items() if getattr(row, field) != getattr(base, field)}
        groups.setdefault(frozenset({"step"} if row.run == "step" else topics), []).append(line)
    return list(groups.values())


def telling(groups: list[list[dict[str, Row]]], room: int) -> list[dict[str, Row]]:
    """At most `room` cases: the headline, where ours is slower or has no figure, then the first of every group."""

    def importance(place: tuple[int, int]) -> tuple[bool, bool, int]:
        group, rank = place
        ours = pick(groups[group][rank], OURS)
        worse = ours is not None and (ours.speed is None or ours.speed < 1 - EVEN)
        return group > 0, not worse, rank

    places = [(group, rank) for group, lines in enumerate(groups) for rank in range(len(lines))]
    return [groups[group][rank] for group, rank in sorted(places, key=importance)[:room]]


def by_size(lines: list[dict[str, Row]]) -> list[dict[str, Row]]:
    """Cases from small to large."""
    numbers = ("steps", "batch", "inputs", "hidden", "layers", "directions", "reset_rate")
    return sorted(lines, key=lambda line: [getattr(first(line), number) for number in numbers])


def first(line: dict[str, Row]) -> Row:
    """Any row of a case, for its sizes."""
    return next(iter(line.values()))


def pick(line: dict[str, Row], provider: str) -> Row | None:
    """A provider's row of a case; not from a CUDA graph, if there are both."""
    return line.get(provider) or line.get(f"{provider} (graph)")


def sizes(row: Row, base: Row | None = None) -> str:
    """What a case is, without its pass; only what differs from `base`, if anything does."""
    if base is not None:
        changed = [part for part, same in zip(_parts(row), _parts(base)) if part != same]
        if changed:
            return " ".join(changed)
    return " ".join(part for part in _parts(row) if part not in ("L1", "D1", "full", "resets 0%"))


def verdict(row: Row) -> Text:
    """The speed and what to think of it: faster or slower only where the spread of the rounds allows no doubt."""
    if row.speed is None:
        return Text("")
    low, high = row.speed_p20 or row.speed, row.speed_p80 or row.speed
    if row.provider == YARDSTICK and not row.graph:
        return Text(digits(row.speed) + " " * 7)
    if low > 1 + EVEN:
        return Text(f"{digits(row.speed)} faster", style="bold green")
    if high < 1 - EVEN:
        return Text(f"{digits(row.speed)} slower", style="bold red")
    return Text(f"{digits(row.speed)} even  ")


def spread(lines: list[dict[str, Row]]) -> str:
    """The least and the greatest speed of ours."""
    speeds = [ours.speed for line in lines if (ours := pick(line, OURS)) and ours.speed is not None]
    return f"{digits(min(speeds))} to {digits(max(speeds))}" if speeds else ""


def origin(rows: list[Row]) -> str:
    """Device, versions, commit and date of rows; of each all that occur."""

    def all_of(column: str) -> str:
        return "/".join(dict.fromkeys(str(getattr(row, column)) for row in rows if getattr(row, column) is not None))

    names = {"gpu_lstm": "gpu_lstm", "torch": "torch", "triton": "triton", "cuda": "CUDA", "driver": "driver"}
    versions = ", ".join(f"{name} {all_of(column)}" for column, name in names.items() if all_of(column))
    commit = f"commit {all_of('commit')}" if all_of("commit") else ""
    dates = "/".join(sorted({row.date[:10] for row in rows}))
    return "; ".join(part for part in (all_of("device"), versions, commit, dates) if part)


def memory_column(rows: Iterable[Row]) -> str:
    """Which column says what memory a call takes: what was allocated at most, if that was measured."""
    return "peak_bytes" if any(row.peak_bytes is not None for row in rows) else "kept_bytes"


def digits(value: float) -> str:
    """A number with three digits that count, or all before the point if there are more."""
    if not value:
        return "0"
    before_point = math.floor(math.log10(float(f"{value:.2e}")))  # rounded first: 9.999 is 10.0
    return f"{value:.{max(0, 2 - before_point)}f}"


def _parts(row: Row) -> list[str]:
    hidden = f"H{row.hidden}" if row.inputs == row.hidden else f"I{row.inputs} H{row.hidden}"
    resets = f"resets {100 * row.reset_rate:.3g}%"
    stack = [f"L{row.layers}", f"D{row.directions}"]
    return [row.dtype, f"T{row.steps}", f"B{row.batch}", hidden, *stack, row.sequences, resets]


def _summary_cells(line: dict[str, Row], base: Row) -> list[Text]:
    row, torch, ours = first(line), pick(line, YARDSTICK), pick(line, OURS)
    others = [
        other for other in line.values()
        if other.status == "measured" and other.speed and other is not torch and other.provider.split("-")[0] != OURS
    ]  # fmt: skip
    best = max(others, key=lambda other: other.speed or 0, default=None)
    fraction = ours.bound_fraction if ours else None
    return [
        Text(row.run),
        Text(sizes(row, base)),
        _milliseconds(torch),
        _milliseconds(ours),
        verdict(ours) if ours else Text(""),
        Text("" if fraction is None else f"{fraction:.0%}"),
        _tail(f"{digits(best.speed)} {contender(best)}" if best and best.speed else ""),
    ]


def _milliseconds(row: Row | None) -> Text:
    """A time, or why there is none."""
    if row is None:
        return Text("-")
    if row.median_s is None:
        return _status(row)
    return Text(digits(row.median_s * 1e3) + "*" * (row.status == "yardstick"))


def _status(row: Row) -> Text:
    return Text(row.status, style="bold red" if row.status in ("wrong", "failed") else "dim")


def _scaled(value: float | None, scale: float) -> str:
    return "" if value is None else digits(value * scale)


def _tail(text: str) -> Text:
    """One line, cut where the terminal ends."""
    return Text(" ".join(text.split()), no_wrap=True, overflow="ellipsis")


def _count(status: str, cases: Cases) -> str:
    """Whose results have a status, and in how many cases."""
    names = [name for line in cases.values() for name, row in line.items() if row.status == status]
    counts = [f"{name} in {names.count(name)} of {len(cases)} cases" for name in dict.fromkeys(names)]
    return f"{status}: {', '.join(counts)}" if counts else ""


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip


def _columns(table: Table, left: tuple[str, ...] = (), right: tuple[str, ...] = ()) -> None:
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
