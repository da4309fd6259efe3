"""Write results as tables for a terminal and for docs/benchmarks.md."""

import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import results
from .cases import Case
from .providers import OURS, YARDSTICK

EVEN = 0.02  # times that differ by less are called even
OF_HEADS = "head-loop", "xlstm-vanilla"  # their cases have a separate table
EVEN_ON_A_CPU = 0.07  # on a CPU torch's own runs many plain calls; pages show such cases as a range
MIB = 2**20
# The usual workarounds for features that torch.nn.LSTM lacks, by their provider: in a word or two, and in a sentence.
WORKAROUNDS = {
    "cleanrl-loop": ("step by step", "nn.LSTM called at every step, its state masked"),
    "torch-packed": ("packed", "sequences sorted, packed and unpacked"),
    "rl_games-pieces": ("in pieces", "nn.LSTM called between any two resets, its state masked"),
    "rsl_rl-padded": ("padded", "trajectories padded to T, from reset to reset"),
    "head-loop": ("head by head", "an nn.LSTM for each head"),
    "xlstm-vanilla": ("xlstm", "xlstm's cell in torch's operators, a step at a time"),
}
AROUND = ["case", "usual workaround", "ms", "gpu_lstm, ms", "times as fast"]
STARRED = "* torch.nn timed without the lengths, resets or variant, which it does not support"
BEYOND = "ignoring gate arithmetic, launches and the dependency between steps"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NO_GPU = "No figure has been taken on a GPU yet."
RARE = "resets 0.5%"  # its cases share a line on the pages
SHOWN = "The time of each usual workaround, divided by the time of one call"  # the caption of the picture of all cases
# LEFT are the columns that are aligned on the left. FOLDED are the columns that are folded in a narrow terminal.
LEFT = ("mode", "case", "usual workaround", "provider", "status", "note", "best other", "verdict")
FOLDED = ("note", "best other", "verdict", "case", "usual workaround")
# The styles of cells, by their last word.
STYLES = dict.fromkeys(("slower", "wrong", "failed"), "bold red") | {"faster": "bold green"}


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last row of each case and contender. The new column `contender` is a provider or its graph.

    Raises:
        ValueError: the rows are not of one device.
    """
    devices = rows["device"].unique()
    if len(devices) != 1:
        raise ValueError(f"expected rows of one device, got {len(devices)}: {', '.join(devices)}")
    contenders = rows["provider"].where(~rows["graph"], rows["provider"] + " (graph)")
    objects = [Case(**fields) for fields in rows[results.CASE].to_dict("records")]
    return rows.assign(contender=contenders, object=objects).drop_duplicates(["object", "contender"], keep="last")


def headline_of(rows: pd.DataFrame) -> Case:
    """Return the case that most contenders have run."""
    return rows["object"].value_counts(sort=False).idxmax()


def is_ours(rows: pd.DataFrame) -> pd.Series:
    return rows["provider"].str.split("-").str[0] == OURS


def by_case(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per case, ordered by the fields from the last to the first. Cases of one cell are together.

    `speed` is the speed of gpu_lstm. Other columns are text.

    A time of torch.nn has a star if torch.nn does not support the case, see STARRED.
    """
    lines = rows.drop_duplicates("case").set_index("case")[["object", *results.CASE]].sort_values(results.CASE[::-1])
    for provider in (YARDSTICK, OURS):
        its = rows[rows["provider"] == provider].sort_values("graph", kind="stable").drop_duplicates("case")
        its = its.set_index("case").reindex(lines.index)
        times = texts(1e3 * its["median_s"]) + np.where(its["status"] == "yardstick", "*", "")
        lines[f"{provider} ms"] = times.where(its["median_s"].notna(), its["status"]).fillna("-")
    lines["speed"], lines["times as fast"] = its["speed"], verdicts(its)
    reached = (its["bound_s"] / its["median_s"]).clip(upper=1)  # at most 1: the bound is a measurement, and uncertain
    lines["bound"] = texts(reached, "{:.0%}".format)
    others = rows[(rows["status"] == "measured") & (rows["contender"] != YARDSTICK) & ~is_ours(rows)]
    best = others.sort_values("speed", ascending=False, kind="stable").drop_duplicates("case").set_index("case")
    return lines.assign(**{"best other": texts(best["speed"]) + " " + best["contender"]})


def instead(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the usual workarounds in every case: the columns AROUND as text, and the `ratio` of the times."""
    ours = rows[rows["contender"] == OURS].set_index("case")["median_s"]
    its = rows[rows["provider"].isin(WORKAROUNDS) & (rows["status"] == "measured") & rows["over_ours"].notna()]
    interval = " (" + texts(its["over_ours_low"]) + "-" + texts(its["over_ours_high"]) + ")"
    words = [WORKAROUNDS[name][1].replace("LSTM", cell.upper()) for name, cell in zip(its["provider"], its["cell"])]
    columns = _names(its), words, texts(1e3 * its["median_s"]), texts(1e3 * its["case"].map(ours))
    ratio = its["over_ours"]
    return its.assign(ratio=ratio, **dict(zip(AROUND, (*columns, texts(ratio) + interval))))


def summary(rows: pd.DataFrame) -> Table:
    """Return a table with one line per case: torch.nn, gpu_lstm and the best other provider."""
    rows = measured(rows)
    lines = by_case(rows)
    broken = rows[rows["status"].isin(results.BROKEN)].value_counts(["status", "contender"])
    told = [f"{status}: {name} in {count} of {len(lines)} cases" for (status, name), count in broken.items()]
    notes = [origin(rows), *[STARRED] * ("yardstick" in set(rows["status"])), "; ".join(told)]
    cells = lines.assign(case=[sizes(case) for case in lines["object"]])
    cells = cells[["mode", "case", "torch ms", "ours ms", "times as fast", "bound", "best other"]]
    title = "gpu_lstm and torch.nn (T steps, B batch, H hidden, L layers, D directions)"
    return table(cells, title, "\n".join(notes).strip())


def details(rows: pd.DataFrame) -> list[Table]:
    """Return the other tables.

    They show every provider at the headline, the fastest first; the kernels that ran, or why none did; and the usual
    workarounds.
    """
    rows = measured(rows)
    base, around = headline_of(rows), instead(rows)
    memory = "peak_bytes" if rows["peak_bytes"].notna().any() else "kept_bytes"
    its = rows[rows["object"] == base].sort_values("median_s", kind="stable")  # rows without a time come last
    timed = its[its["median_s"].notna()]
    median, low, high = (texts(1e3 * timed[f"{name}_s"]) for name in ("median", "p20", "p80"))
    cells = pd.DataFrame({
        "provider": timed["contender"], "ms": median, "p20-p80": low + "-" + high,
        "us a step": texts(1e6 * timed["median_s"] / base.steps),
        f"{memory.removesuffix('_bytes')} MiB": texts(timed[memory] / MIB),
        "times as fast": verdicts(timed), "error": texts(timed["error"]),
    })  # fmt: skip
    footnotes = ["error: the largest of results and gradients over what is allowed; 1 is the most", origin(rows)]
    for copy, product in timed[["copy_bytes_per_s", "product_flops_per_s"]].dropna().values[:1] / 1e9:
        reached = f"bytes over {digits(copy)} GB/s, operations over {digits(product)} GFLOP/s, as measured here"
        footnotes.insert(1, f"bound: {reached}; {BEYOND}")
    others = its[its["median_s"].isna() | (its["note"].notna() & ~its["graph"])]
    status = others["status"].where(others["median_s"].isna(), "kernels")
    notes = pd.DataFrame({"provider": others["contender"], "status": status, "note": others["note"]})
    tables = [table(cells, f"All providers: {base.mode} {sizes(base)}"), table(notes, "", "\n".join(footnotes))]
    title = "The usual workarounds; their time over gpu_lstm's, with its 95 % interval"
    return [*tables, table(around[AROUND], title)] if len(around) else tables


def update_page(page: Path, pictures: Mapping[Path, Path]) -> None:
    """Write the results of files between the markers of `page`, GPUs first, each with its picture if there is one."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no {END if begin else BEGIN}; expected {BEGIN} on a line before {END}")
    of_gpus, of_cpus = list[str](), list[str]()
    for file, picture in pictures.items():
        rows = measured(results.read(file))
        on_gpu = bool(rows["cuda"].notna().any())
        text = _section(os.path.relpath(file, page.parent), rows, on_gpu)
        text += f"\n\n![{SHOWN}]({os.path.relpath(picture, page.parent)})" * picture.exists()
        (of_gpus if on_gpu else of_cpus).append(text)
    sections = "\n\n".join([*(of_gpus or [NO_GPU]), *of_cpus])
    page.write_text(f"{before}{BEGIN}\n{sections}\n{END}{after}")


def _section(link: str, rows: pd.DataFrame, on_gpu: bool) -> str:
    """Return the origin of the figures, and three tables: the usual workarounds, heads and sLSTMs, torch.nn itself."""
    lines, around = by_case(rows), instead(rows)
    wrapped = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)
    dtypes, where = "/".join(rows["dtype"].unique()), "GPU" if on_gpu else "CPU, not a GPU"
    text = f"{where}: {origin(rows)}; {dtypes}; from [{link.removeprefix('../')}]({link})."
    starred = lines["torch ms"].str.endswith("*")
    text += f" \\{STARRED}." if starred.any() else ""
    roofline = "a roofline (FLOPs and bytes at rates measured on this machine)"
    text += f' "Of the bound" is the fraction of {roofline}, {BEYOND}.'
    written = [wrapped(text)]
    of_heads = around["provider"].isin(OF_HEADS)
    for its in (around[~of_heads], around[of_heads]):
        if len(its):
            written.append(_markdown(_over_ours(its, lines)))
    lines = lines[~_names(lines).isin(around["case"])]
    starred = starred[lines.index]
    same = ~starred & (lines["mode"] != "step") & ((lines["speed"] - 1).abs() < EVEN_ON_A_CPU) & (not on_gpu)
    its, lines = lines["speed"][same], lines[~same]
    cells = {"case": _names(lines),
             "torch.nn, ms": lines["torch ms"].str.replace("*", r"\*"), "gpu_lstm, ms": lines["ours ms"],
             "times as fast": lines["times as fast"].str.split(" ").str[0], "of the bound": lines["bound"]}  # fmt: skip
    written.append(_markdown(pd.DataFrame(cells).replace("-", "not run")))
    if len(its):
        ends = f"{digits(min(its))} to {digits(max(its))}"
        written.append(f"\n{len(its)} more cases are {ends} times as fast.")
    return "\n".join(written).replace(f" {dtypes} T", " T")


def _names(lines: pd.DataFrame) -> pd.Series:
    return lines["mode"] + " " + lines["object"].map(sizes)


def _over_ours(around: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each case with a workaround: gpu_lstm's time, and the times of torch.nn and each workaround
    over it.

    All cases of forward alone share one line, with the least and the greatest ratio. All cases with the rarest resets
    share another.
    """
    trained, torchs = around["mode"] == "training", lines.set_index(_names(lines))["speed"]
    rare = trained & around["case"].str.endswith(RARE)
    cells = around[trained & ~rare].drop_duplicates("case").set_index("case")[["gpu_lstm, ms"]]
    ratios = {r"torch.nn\*": torchs[torchs.index.isin(around["case"])]}
    cells[r"torch.nn\*"] = texts(torchs)
    for provider, (column, _) in WORKAROUNDS.items():
        its = around[around["provider"] == provider].set_index("case")
        if len(its):
            cells[column], ratios[column] = its["times as fast"].reindex(cells.index).fillna(""), its["ratio"]
    for name, others in (f"training {RARE}", around[rare]["case"]), ("forward", around[~trained]["case"]):
        if len(others):
            ends = [its[its.index.isin(others)].agg(["min", "max"]).dropna() for its in ratios.values()]
            ranges = [" to ".join(dict.fromkeys(map(digits, each))) for each in ends]
            cells.loc[f"{name}, {others.nunique()} cases"] = ["", *ranges]
    return cells.reset_index(names="case")


def _markdown(cells: pd.DataFrame) -> str:
    rule = ["---" if name in LEFT else "--:" for name in cells]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in (list(cells), rule, *cells.values.tolist()))


def sizes(case: Case, base: Case | None = None) -> str:
    """Return a case in words, without its mode. If it differs from `base`, return only the differences."""

    def parts(case: Case) -> list[str]:
        heads = f"{case.heads}x" * (case.heads > 1)
        size = f"I{case.input_size} " * (case.input_size != case.hidden_size)
        size += f"H{heads}{case.hidden_size // case.heads}"
        rest = [f"L{case.layers}", f"D{case.directions}", case.sequences, f"resets {100 * case.reset_rate:.3g}%"]
        return [case.cell.upper(), case.dtype, f"T{case.steps}", f"B{case.batch}", size, *rest, case.variant]

    changed = [part for part, same in zip(parts(case), parts(base)) if part != same] if base else []
    usual = "LSTM", "L1", "D1", "full", "resets 0%", "plain"
    return " ".join(changed or (part for part in parts(case) if part not in usual))


def digits(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the point if there are more."""
    exponent = int(f"{value:.2e}".partition("e")[2])  # the exponent of the rounded value: 9.999 is 10.0
    return f"{value:.{max(0, 2 - exponent)}f}" if value else "0"


def texts(values: pd.Series, write: Callable[[float], str] = digits) -> pd.Series:
    """Return numbers as text, and "" for NaN."""
    return values.map(write, na_action="ignore").astype(object).fillna("")


def verdicts(rows: pd.DataFrame) -> pd.Series:
    """Return speeds as text. "faster" or "slower" is added only if both the 20th and the 80th percentile are."""
    itself, timed = rows["contender"] == YARDSTICK, rows["speed"].notna()
    doubtless = [rows["speed_p20"] > 1 + EVEN, rows["speed_p80"] < 1 - EVEN]
    return texts(rows["speed"]) + np.select([*doubtless, itself, timed], [" faster", " slower", " " * 7, " even  "], "")


def origin(rows: pd.DataFrame) -> str:
    """Return device, versions, commit and date of rows, each with all values that occur."""
    labels = {"gpu_lstm": "gpu_lstm ", "torch": "torch ", "triton": "triton ", "cuda": "CUDA ", "driver": "driver "}
    every = {name: "/".join(rows[name].dropna().unique()) for name in (*labels, "device", "commit")}
    versions = ", ".join(label + every[name] for name, label in labels.items() if every[name])
    several = every["commit"].count("/") + 1
    commits = f"{several} commits" if several > 2 else every["commit"] and f"commit {every['commit']}"
    days = rows["date"].str[:10]
    dates = " to ".join(dict.fromkeys([days.min(), days.max()]))
    return "; ".join(filter(None, (every["device"], versions, commits, dates)))


def console() -> Console:
    """Return the console for tables. In a file or a pipe it is as wide as the tables need."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else 160, markup=False, highlight=False)


def table(cells: pd.DataFrame, title: str, caption: str = "") -> Table:
    """Return a table of text cells."""
    done = Table(
        title=Text(title, style="bold"), title_justify="left", caption=Text(caption), caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip
    for name in cells:
        justify: Any = "left" if name in LEFT else "right"
        done.add_column(name, justify=justify, no_wrap=name not in FOLDED, overflow="fold")
    for line in cells.astype(object).fillna("").values:
        done.add_row(*(Text(text, style=STYLES.get(text.strip().split(" ")[-1], "")) for text in line))
    return done
