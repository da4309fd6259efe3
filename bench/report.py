"""Rows in words: tables for a terminal (all cases, all providers, what is expected of other GPUs), the README."""

import math
import os
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import results
from .cases import Case
from .providers import OURS, YARDSTICK

LINES = 32  # that the summary has for cases and for the rules between their groups
EVEN = 0.02  # a time that differs by less is called even
MIB = 2**20
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NO_GPU = "No figure has been taken on a GPU yet."
CPU_LINES = 8  # in the README: a CPU is not what this is for
WIDTH = 120
# Cases belong together where they differ from the headline in the same of these.
TOPICS = {
    "dtype": "dtype", "steps": "steps", "batch": "batch", "input_size": "hidden", "hidden_size": "hidden",
    "layers": "stack", "directions": "stack", "sequences": "lengths", "reset_rate": "resets",
}  # fmt: skip
LEFT = ("mode", "case", "provider", "kernels", "status", "note", "best other")
CUT = ("note", "best other")  # where the terminal ends
STYLES = dict.fromkeys(("slower", "wrong", "failed"), "bold red") | {"faster": "bold green"}  # by a cell's last word


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """All but expected rows, with a `contender`: a provider, and whether a CUDA graph was replayed.

    Raises ValueError where there is none, or where they are of several devices.
    """
    rows = rows[rows["status"] != "expected"]
    devices = rows["device"].unique()
    if len(devices) != 1:
        raise ValueError(f"expected rows of one device, got {len(devices)}: {', '.join(devices)}")
    return rows.assign(contender=rows["provider"].where(~rows["graph"], rows["provider"] + " (graph)"))


def case_of(row: pd.Series) -> Case:
    """The case that a row is of."""
    return Case(**row[results.CASE])


def headline_of(rows: pd.DataFrame) -> Case:
    """The case with most contenders, the first of those."""
    return case_of(rows[rows["case"] == rows.groupby("case", sort=False).size().idxmax()].iloc[0])


def is_ours(rows: pd.DataFrame) -> pd.Series:
    """Which rows are gpu_lstm's own, on whatever backend."""
    return rows["provider"].str.split("-").str[0] == OURS


def by_case(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each case, in the groups that differ from the headline in the same, each from small to large.

    Beside the fields of Case they have `object`, the Case itself; `group` and `rank`, its place in that before sorting;
    `torch_*` and `ours_*`, some columns of these providers; `best_speed` and `best_contender`, the fastest other.
    """
    base = headline_of(rows)

    def topics(case: Case) -> str:
        found = {topic for field, topic in TOPICS.items() if getattr(case, field) != getattr(base, field)}
        return "step" if case.mode == "step" else " ".join(sorted(found))

    lines = rows.drop_duplicates("case").set_index("case")[results.CASE]
    lines["object"] = [case_of(line) for _, line in lines.iterrows()]
    lines["group"] = pd.factorize(lines["object"].map(topics))[0]
    lines["rank"] = lines.groupby("group").cumcount()
    for name in (YARDSTICK, OURS):
        its = rows[rows["provider"] == name].sort_values("graph", kind="stable").drop_duplicates("case")
        columns = ["status", "median_s", "speed", "speed_p20", "speed_p80", "bound_s"]
        lines = lines.join(its.set_index("case")[columns].add_prefix(f"{name}_"))
    others = rows[(rows["status"] == "measured") & (rows["contender"] != YARDSTICK) & ~is_ours(rows)]
    best = others.sort_values("speed", ascending=False, kind="stable").drop_duplicates("case").set_index("case")
    lines = lines.join(best[["speed", "contender"]].add_prefix("best_"))
    sizes = ["steps", "batch", "input_size", "hidden_size", "layers", "directions", "reset_rate"]
    return lines.sort_values(["group", *sizes], kind="stable")


def telling(lines: pd.DataFrame, room: int) -> pd.DataFrame:
    """At most `room` lines: the headline, where ours is slower or has no figure, then the first of every group."""
    fine = lines["ours_status"].isna() | (lines["ours_speed"] >= 1 - EVEN)
    order = lines.assign(later=lines["group"] > 0, fine=fine).sort_values(["later", "fine", "rank", "group"])
    return lines[lines.index.isin(order.index[:room])]


def summary(rows: pd.DataFrame) -> Table:
    """A line a case: torch.nn.LSTM, ours and the best other. Where there are too many, those left out are counted."""
    rows = measured(rows)
    lines, base = by_case(rows), headline_of(rows)
    rules = lines["group"].nunique() - 1
    shown = lines if len(lines) + rules <= LINES else telling(lines, LINES - rules - 2)
    speeds = zip(shown["ours_speed"], shown["ours_speed_p20"], shown["ours_speed_p80"])
    best = shown["best_speed"].map(digits) + " " + shown["best_contender"]
    cells = pd.DataFrame({
        "mode": shown["mode"], "case": [sizes(case, base) for case in shown["object"]],
        "torch ms": _time(shown, YARDSTICK), "ours ms": _time(shown, OURS),
        "times as fast": [verdict(*each) for each in speeds], "bound": _of_the_bound(shown), "best other": best,
    })  # fmt: skip
    notes = [origin(rows)]
    if (rows["status"] == "yardstick").any():
        notes.append("* torch.nn.LSTM without the lengths and resets, which it does not take")
    broken = rows[rows["status"].isin(results.BROKEN)].groupby(["status", "contender"], sort=False).size()
    notes += [f"{status}: {name} in {count} of {len(lines)} cases" for (status, name), count in broken.items()]
    title = "gpu_lstm and torch.nn.LSTM (T steps, B batch, H hidden, L layers, D directions)"
    done = table(cells, title, "\n".join(notes), shown["group"])
    left_out = lines.drop(shown.index)
    if len(left_out):
        done.add_row("more", f"{len(left_out)} cases", "", "", spread(left_out), "", "")
    return done


def headline(rows: pd.DataFrame) -> Group:
    """Every provider at the case that most of them have, the fastest first; which kernels ran, or why none did."""
    rows = measured(rows)
    base = headline_of(rows)
    rows = rows[rows["case"] == base.name].sort_values("median_s", kind="stable")  # those without a time last
    memory, timed = memory_column(rows), rows[rows["status"].isin(results.TIMED)]
    speeds = zip(timed["speed"], timed["speed_p20"], timed["speed_p80"])
    cells = pd.DataFrame({
        "provider": timed["contender"], "ms": (1e3 * timed["median_s"]).map(digits),
        "p20-p80": (1e3 * timed["p20_s"]).map(digits) + "-" + (1e3 * timed["p80_s"]).map(digits),
        "us a step": (1e6 * timed["median_s"] / base.steps).map(digits),
        f"{memory.removesuffix('_bytes')} MiB": (timed[memory] / MIB).map(digits),
        "times as fast": [verdict(*each) for each in speeds], "error": timed["error"].map(digits),
    })  # fmt: skip
    footnotes = ["error: the largest of all results and gradients, over what is allowed; 1 is the most"]
    for copy, product in timed[["copy_bytes_per_s", "product_flops_per_s"]].dropna().values[:1] / 1e9:
        reached = f"{digits(copy)} GB/s copied, {digits(product)} GFLOP/s in a product"
        footnotes.append(f"bound of a time: bytes and operations over what was reached here, {reached}")
    others = rows[~rows.index.isin(timed.index) | (rows["note"].notna() & ~rows["graph"])]
    status = others["status"].where(~others.index.isin(timed.index), "kernels")
    notes = pd.DataFrame({"provider": others["contender"], "status": status, "note": others["note"]})
    title = f"All providers: {base.mode} {sizes(base)}"
    return Group(table(cells, title), table(notes, "", "\n".join([*footnotes, origin(rows)])))


def expected(rows: pd.DataFrame) -> Group:
    """What plans expect of GPUs that are not here, a table each; empty without such rows."""
    tables = []
    for device, its in rows[rows["status"] == "expected"].groupby("device", sort=False):
        cells = pd.DataFrame({
            "case": [sizes(case_of(row)) for _, row in its.iterrows()], "kernels": its["note"],
            "launches": its["launches"].map("{:.0f}".format),
            "kept MiB": (its["kept_bytes"] / MIB).map(digits),
            "host us": (its["host_s"] * 1e6).map(digits),
            "us a step": its["expected_us_per_step"].map(digits),
        })  # fmt: skip
        tables.append(table(cells, f"Expected, not measured: training, {device}", origin(its)))
    return Group(*tables)


def update_readme(readme: Path, files: list[Path]) -> None:
    """Write what the files of results say between the two markers of `readme`, GPUs first; the rest stays as it is.

    Raises ValueError where a marker is missing, or a file of results is broken.
    """
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme}: no {END if begin else BEGIN}; expected {BEGIN} on a line before {END}")
    on_gpus, on_cpus, measured_on_a_gpu = [], [], False
    for path in sorted(files):
        rows = results.read(path)
        for _, its in rows[rows["status"] != "expected"].groupby("device", sort=False):
            on_gpu = its["cuda"].notna().any()
            measured_on_a_gpu |= on_gpu and (its["status"] == "measured").any()
            (on_gpus if on_gpu else on_cpus).append(_section(readme.parent, path, measured(its), on_gpu))
    sections = [*([] if measured_on_a_gpu else [NO_GPU]), *on_gpus, *on_cpus]
    readme.write_text(f"{before}{BEGIN}\n" + "\n\n".join(sections) + f"\n{END}{after}")


def _section(folder: Path, path: Path, rows: pd.DataFrame, on_gpu: bool) -> str:
    """Where the figures come from, and a table of them."""
    lines = by_case(rows)
    shown = lines if on_gpu else telling(lines, CPU_LINES)
    name = Path(os.path.relpath(path, folder)).as_posix()
    text = f"{'GPU' if on_gpu else 'CPU, not a GPU'}: {origin(rows)}; from [{name}]({name})."
    if len(shown) < len(lines):
        text += f" {len(shown)} of {len(lines)} cases."
        if over_all := spread(lines):
            text += f" Over all that were timed, gpu_lstm is {over_all} times as fast."
    if (shown["torch_status"] == "yardstick").any():
        text += " Where torch.nn.LSTM's time has a star, it ran without the lengths or resets, which it does not take."
    cells = [
        [f"{line['mode']} {sizes(line['object'])}" for _, line in shown.iterrows()],
        *(_time(shown, name).replace("-", "not run").str.replace("*", r"\*") for name in (YARDSTICK, OURS)),
        shown["ours_speed"].map(digits), _of_the_bound(shown),
    ]  # fmt: skip
    table = [
        "| case | torch.nn.LSTM, ms | gpu_lstm, ms | times as fast | of the bound |",
        "|------|------------------:|-------------:|--------------:|-------------:|",
        *(f"| {' | '.join(line)} |" for line in zip(*cells)),
    ]
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n\n" + "\n".join(table)


def sizes(case: Case, base: Case | None = None) -> str:
    """What a case is, without its mode; only what differs from `base`, if anything does."""

    def parts(case: Case) -> list[str]:
        size = f"{'' if case.input_size == case.hidden_size else f'I{case.input_size} '}H{case.hidden_size}"
        stack = [f"L{case.layers}", f"D{case.directions}"]
        resets = f"resets {100 * case.reset_rate:.3g}%"
        return [case.dtype, f"T{case.steps}", f"B{case.batch}", size, *stack, case.sequences, resets]

    changed = [part for part, same in zip(parts(case), parts(base)) if part != same] if base else []
    return " ".join(changed or (part for part in parts(case) if part not in ("L1", "D1", "full", "resets 0%")))


def verdict(speed: float, p20: float, p80: float) -> str:
    """The speed and what to think of it: faster or slower only where the spread of the rounds allows no doubt."""
    if pd.isna(speed):
        return ""
    word = "faster" if p20 > 1 + EVEN else "slower" if p80 < 1 - EVEN else "" if p20 == p80 == 1 else "even"
    return f"{digits(speed)} {word:6}"


def spread(lines: pd.DataFrame) -> str:
    """The least and the greatest speed of ours."""
    speeds = lines["ours_speed"].dropna()
    return f"{digits(speeds.min())} to {digits(speeds.max())}" if len(speeds) else ""


def origin(rows: pd.DataFrame) -> str:
    """Device, versions, commit and date of rows; of each all that occur."""
    found = {column: "/".join(map(str, values.dropna().unique())) for column, values in rows.items()}
    names = {"gpu_lstm": "gpu_lstm", "torch": "torch", "triton": "triton", "cuda": "CUDA", "driver": "driver"}
    versions = ", ".join(f"{name} {found[column]}" for column, name in names.items() if found[column])
    commit = f"commit {found['commit']}" if found["commit"] else ""
    return "; ".join(
        filter(None, (found["device"], versions, commit, "/".join(sorted(rows["date"].str[:10].unique()))))
    )


def memory_column(rows: pd.DataFrame) -> str:
    """Which column says what memory a call takes: what was allocated at most, if that was measured."""
    return "peak_bytes" if rows["peak_bytes"].notna().any() else "kept_bytes"


def digits(value: float) -> str:
    """A number with three digits that count, or all before the point if there are more; nothing for NaN."""
    if pd.isna(value) or not value:
        return "" if pd.isna(value) else "0"
    before_point = math.floor(math.log10(float(f"{value:.2e}")))  # rounded first: 9.999 is 10.0
    return f"{value:.{max(0, 2 - before_point)}f}"


def table(
    cells: pd.DataFrame, title: str, caption: str = "", groups: pd.Series | None = None, folded: tuple[str, ...] = ()
) -> Table:
    """Cells of text, with rules between groups. Where the terminal is too narrow, some columns are folded or CUT."""

    def cell(column: str, text: str) -> Text:
        cut: Any = {"no_wrap": True, "overflow": "ellipsis"} if column in CUT else {}
        return Text(text, style=STYLES.get(text.strip().split(" ")[-1], ""), **cut)

    done = Table(
        title=Text(title, style="bold"), title_justify="left", caption=Text(caption), caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip
    for name in cells:
        no_wrap = name not in (*CUT, *folded)
        done.add_column(cell(name, name), "left" if name in LEFT else "right", no_wrap=no_wrap, overflow="fold")
    for _, group in cells.fillna("").groupby([0] * len(cells) if groups is None else groups):
        for line in group.values:
            done.add_row(*map(cell, cells, line))
        done.add_section()
    return done


def _time(lines: pd.DataFrame, name: str) -> pd.Series:
    """Milliseconds, with a star where it is the yardstick's without lengths and resets; or why there are none."""
    status, seconds = lines[f"{name}_status"], lines[f"{name}_median_s"]
    star = (status == "yardstick").map({True: "*", False: ""})
    return ((1e3 * seconds).map(digits) + star).where(seconds.notna(), status).fillna("-")


def _of_the_bound(lines: pd.DataFrame) -> pd.Series:
    return (lines["ours_bound_s"] / lines["ours_median_s"]).map("{:.0%}".format, na_action="ignore").fillna("")
