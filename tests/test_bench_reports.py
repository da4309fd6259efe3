"""What the benchmark tells: its tables, its pictures, the README."""

import re
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bench import plots, readme, results, tables
from bench.cases import Case, grid
from bench.results import Row

HEADLINE = Case("training", "bf16", 1024, 16, 768, 768)
OTHERS = [f"other-{n}" for n in range(13)]
README = "# A title\n\n<!-- bench: begin -->\n<!-- bench: end -->\n\nThe end.\n"

_PLAIN = Row(
    schema=results.SCHEMA, date="2026-01-02T03:04:05+00:00", commit="0123456789", gpu_lstm="1.2.3", python="3.12.0",
    torch="2.9.0", triton="3.5.0", cupy=None, cuda="13.0", driver="580.1", device="NVIDIA Imaginary 9000",
    case=HEADLINE.name, **asdict(HEADLINE), provider="ours", graph=False, status="measured",
)  # fmt: skip


def row(case: Case = HEADLINE, provider: str = "ours", ms: float | None = 10.0, theirs: float = 20.0, **changes) -> Row:
    """A provider that takes `ms` a call where torch.nn.LSTM takes `theirs`; without figures if `ms` is None."""
    figures = {}
    if ms is not None:
        seconds, speed = ms / 1e3, theirs / ms
        figures = {
            "error": 0.5, "runs": 30, "median_s": seconds, "p20_s": 0.99 * seconds, "p80_s": 1.02 * seconds,
            "us_per_step": seconds / case.steps * 1e6, "speed": speed, "speed_p20": 0.99 * speed,
            "speed_p80": 1.01 * speed, "bound_s": 0.25 * seconds, "bound_fraction": 0.25,
            "peak_bytes": 50 * 2**20, "kept_bytes": 30 * 2**20,
        }  # fmt: skip
    return replace(_PLAIN, case=case.name, provider=provider, **asdict(case), **(figures | changes))


def pair(case: Case = HEADLINE, **changes) -> list[Row]:
    """torch.nn.LSTM and ours."""
    return [row(case, "torch", 20.0, **changes), row(case, "ours", 10.0, **changes)]


def on_cpu(rows: list[Row]) -> list[Row]:
    """The same as if a processor had run them."""
    return [replace(each, device="Imaginary CPU, 2 threads", cuda=None, driver=None, peak_bytes=None) for each in rows]


def whole_grid(kind: str = "cuda", providers: tuple[str, ...] = ("torch", "ours", "haste")) -> list[Row]:
    """Rows of all cases of the grid, times in proportion to the hidden size."""
    cases = [case for group in grid(kind).values() for case in group]
    return [
        row(case, name, ms=(n + 1) * case.hidden / 100, theirs=case.hidden / 100)
        for case in cases
        for n, name in enumerate(providers)
    ]


def printed(table, width: int = 100, **options) -> str:
    console = Console(file=StringIO(), width=width, **options)
    console.print(table)
    return console.file.getvalue()


def line_of(text: str, beginning: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(beginning))


# tables


@pytest.mark.parametrize("width", [80, 100])
def test_sixty_cases_by_fifteen_providers_fit_a_screen(width):
    cases = [case for group in grid("cuda").values() for case in group]
    cases += [replace(HEADLINE, batch=batch) for batch in range(300, 300 + 60 - len(cases))]
    names = ["torch", "ours", *OTHERS]
    rows = [
        row(case, name, 10.0 + n, status="yardstick" if name == "torch" and case.reset_rate else "measured")
        for case in cases
        for n, name in enumerate(names)
    ]
    rows += [row(case, name, None, status=status) for case in cases[:3] for name, status in
             (("other-3", "wrong"), ("other-4", "failed"))]  # fmt: skip
    assert len(cases) == 60
    lines = printed(tables.summary(rows), width).splitlines()
    assert 30 <= len(lines) <= 40
    assert max(map(len, lines)) <= width
    shown = sum(line.startswith(("training", "forward", "step")) for line in lines)
    assert line_of("\n".join(lines), "more").split()[1:3] == [str(60 - shown), "cases"]


def test_a_grid_that_fits_is_shown_whole():
    rows = whole_grid("cpu")
    text = printed(tables.summary(rows))
    assert "more" not in text
    assert sum(line.startswith(("training", "forward", "step")) for line in text.splitlines()) == len(rows) / 3


def test_slower_cases_and_those_without_a_figure_are_never_left_out():
    small = [replace(HEADLINE, batch=batch) for batch in range(100, 160)]
    rows = [each for case in (HEADLINE, *small) for each in pair(case)]
    rows[-1] = row(small[-1], "ours", 40.0)
    rows[-3] = row(small[-2], "ours", None, status="wrong", note="off")
    text = printed(tables.summary(rows))
    assert "0.500 slower" in line_of(text, "training  B159")
    assert "wrong" in line_of(text, "training  B158")
    assert "wrong: ours in 1 of 61 cases" in text


def test_the_verdict_is_a_word_and_a_colour_and_doubts_nothing_within_the_spread():
    assert printed(tables.verdict(row(ms=10.0))).strip() == "2.00 faster"
    assert printed(tables.verdict(row(ms=40.0))).strip() == "0.500 slower"
    assert printed(tables.verdict(row(speed=1.5, speed_p20=0.9, speed_p80=1.6))).strip() == "1.50 even"
    assert printed(tables.verdict(row(speed=0.9, speed_p20=0.8, speed_p80=1.1))).strip() == "0.900 even"
    assert "\x1b[" in printed(tables.summary(pair()), force_terminal=True)
    assert "\x1b[" not in printed(tables.summary(pair()))


def test_the_summary_names_times_bound_and_the_best_that_is_neither_ours_nor_torch():
    rows = [*pair(), row(provider="ours-step", ms=5.0), row(provider="haste", ms=16.0), row(provider="flash", ms=12.5)]
    line = line_of(printed(tables.summary(rows)), "training")
    assert line.split() == ["training", "bf16", "T1024", "B16", "H768", "20.0", "10.0", "2.00", "faster", "25%",
                            "1.60", "flash"]  # fmt: skip


def test_a_yardstick_without_lengths_is_marked():
    case = replace(HEADLINE, reset_rate=0.02)
    rows = [*pair(), row(case, "torch", 20.0, status="yardstick"), row(case)]
    rows += [row(each, "torch", 19.0, graph=True, status=status)
             for each, status in ((HEADLINE, "measured"), (case, "yardstick"))]  # fmt: skip
    text = printed(tables.summary(rows))
    assert "1.05 torch (graph)" in line_of(text, "training  bf16")
    assert "20.0*" in line_of(text, "training  resets 2%")
    assert "torch (graph)" not in line_of(text, "training  resets 2%")  # it does not do the case
    assert "* torch.nn.LSTM without the lengths and resets" in text


@pytest.mark.parametrize("status", ["absent", "unable", "wrong", "failed"])
@pytest.mark.parametrize("width", [80, 100])
def test_every_provider_of_the_headline_is_named_with_why_it_has_no_figures(status, width):
    note = "needs [ctk]\nand " + "much more " * 30
    rows = [*pair(), row(provider="haste", ms=None, status=status, note=note), *pair(replace(HEADLINE, batch=1))]
    text = printed(tables.headline(rows), width)
    assert re.match(rf"haste +{status} +needs \[ctk\] and much more", line_of(text, "haste"))
    assert sum("much" in line for line in text.splitlines()) == 1
    assert max(map(len, text.splitlines())) <= width


def test_a_provider_without_figures_is_named_even_if_nobody_said_why():
    text = printed(tables.headline([*pair(), row(provider="haste", ms=None, status="failed")]))
    assert line_of(text, "haste").split() == ["haste", "failed"]


def test_the_headline_has_the_figures_of_each_provider_fastest_first():
    text = printed(tables.headline([*pair(note="cooperative"), row(provider="ours", ms=9.0, graph=True)]))
    assert line_of(text, "torch").split() == ["torch", "20.0", "19.8-20.4", "19.5", "50.0", "1.00", "0.500"]
    names = [line.split("  ")[0] for line in text.splitlines() if line.startswith(("ours", "torch"))]
    assert names[:3] == ["ours (graph)", "ours", "torch"]
    assert "kernels  cooperative" in text
    assert "kept MiB" in printed(tables.headline(on_cpu(pair())))


def test_tables_say_where_they_come_from():
    for table in (tables.summary(pair()), tables.headline(pair())):
        text = " ".join(printed(table).split())
        assert (
            "NVIDIA Imaginary 9000; gpu_lstm 1.2.3, torch 2.9.0, triton 3.5.0, CUDA 13.0, driver 580.1; "
            "commit 0123456789; 2026-01-02" in text
        )


@pytest.mark.parametrize("width", [80, 100])
def test_what_is_expected_says_so(width):
    rows = [
        row(ms=None, status="expected", device="H100", note="cooperative / step", launches=5, host_s=2.5e-4,
            expected_us_per_step=1.75),
        *pair(),
    ]  # fmt: skip
    text = printed(tables.expected(rows), width)
    assert text.startswith("Expected, not measured: training, H100")
    (line,) = (line for line in text.splitlines() if line.startswith("bf16"))
    assert re.search(r"bf16 T1024 B16 H768 +cooperative / step +5 +250 +1.75$", line.rstrip())
    assert "H100" not in printed(tables.summary(rows))


def test_rows_of_two_devices_do_not_mix():
    with pytest.raises(ValueError, match="one device, got 2: NVIDIA Imaginary 9000, Imaginary CPU, 2 threads"):
        tables.summary(pair() + on_cpu(pair()))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (9.999, "10.0"), (1.0, "1.00"), (99.96, "100"), (12345.6, "12346"), (0, "0")],
)
def test_three_digits(value, text):
    assert tables.digits(value) == text


# plots


def test_all_figures_are_written_for_each_device(tmp_path):
    rows = whole_grid() + on_cpu(pair())
    paths = plots.draw(rows, tmp_path / "new")
    stems = [f"nvidia-imaginary-9000-{n}" for n in ("headline", "hidden", "batch", "steps", "speed", "memory")]
    assert [path.stem for path in paths] == [*stems, "imaginary-cpu-2-threads-headline"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_axes_have_labels_with_units_and_captions_have_their_source():
    figures = plots.figures(whole_grid())
    for name, (x, y) in {
        "hidden": ("hidden size H = input size I (units)", "time a step (µs)"),
        "batch": ("batch size B (sequences)", "time a step (µs)"),
        "steps": ("sequence length T (steps)", "time a step (µs)"),
        "memory": ("hidden size H = input size I (units)", "allocated at most during a call (MiB)"),
        "headline": ("time a call (ms)", ""),
    }.items():
        axes = figures[name].axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == (x, y)
        assert len(figures[name].axes) == 2
    for figure in figures.values():
        assert "NVIDIA Imaginary 9000; gpu_lstm 1.2.3" in figure.get_supxlabel()
        assert "commit 0123456789; 2026-01-02" in figure.get_supxlabel().replace("\n", " ")
    assert [axes.get_title() for axes in figures["batch"].axes] == [
        "training, bf16 T1024 H768", "forward, bf16 T1024 H768",
    ]  # fmt: skip
    assert figures["speed"].axes[-1].get_ylabel() == "times as fast as torch.nn.LSTM"


def test_a_line_has_the_plain_rows_that_differ_in_its_size_only():
    rows = whole_grid()
    rows += pair(replace(HEADLINE, hidden=96))  # inputs of another size
    containers = plots.figures(rows)["hidden"].axes[0].containers
    hiddens = sorted({case.hidden for case in grid("cuda")["hidden"]} | {768})
    assert len(containers) == 3
    for n, container in enumerate(containers):
        x, y = container[0].get_data()
        assert list(x) == hiddens
        assert list(y) == pytest.approx([(n + 1) * hidden / 100 / 1024 * 1e3 for hidden in hiddens])


def test_bars_reach_from_p20_to_p80():
    line, _, (bars,) = plots.figures(whole_grid())["hidden"].axes[0].containers[1]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.99 * median, 1.02 * median]) for median in line.get_ydata()]


def test_lines_differ_without_colour_and_ours_is_thick_and_black():
    cases = [HEADLINE, replace(HEADLINE, batch=64)]
    rows = [row(case, name) for case in cases for name in ("torch", "ours", *OTHERS)]
    rows += [row(case, name, graph=True) for case in cases for name in ("torch", "ours")]
    styles = plots._styles(tables.by_case(rows))
    looks = {(s["marker"], str(s["linestyle"]), s.get("markerfacecolor")) for s in styles.values()}
    assert len(looks) == len(styles) == 17
    assert styles["ours"]["color"] == "black"
    assert styles["ours"]["linewidth"] > max(s["linewidth"] for name, s in styles.items() if name != "ours")


def test_memory_is_what_was_kept_where_no_peak_was_measured():
    kept = plots.figures(on_cpu(whole_grid()))["memory"].axes[0]
    assert kept.get_ylabel() == "kept for backward (MiB)"
    assert kept.containers[0][0].get_ydata() == pytest.approx([30.0] * 9)


def test_the_heat_map_has_a_number_for_every_speed_and_a_word_for_what_is_wrong():
    wide = replace(HEADLINE, hidden=1024, inputs=1024)
    wrong = row(replace(HEADLINE, batch=1), "haste", None, status="wrong")
    unable = row(replace(HEADLINE, batch=4), "haste", None, status="unable")
    rows = [*pair(), row(provider="haste", ms=40.0), *pair(wide), row(wide, "haste", 80.0)]
    rows += [*pair(replace(HEADLINE, batch=1)), wrong, *pair(replace(HEADLINE, batch=4)), unable]
    rows += [row(case, "torch", 10.0, graph=True) for case in (HEADLINE, wide)]
    rows += [row(replace(HEADLINE, batch=1), "torch", 10.0, graph=True, status="yardstick")]
    axes, *_ = plots.figures(rows)["speed"].axes
    cells = {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ours", "haste", "torch (graph)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bf16 T1024 B16 H768", "H1024", "B1", "B4"]
    assert [cells[0, y] for y in range(4)] == ["2.00"] * 4
    assert [cells[1, y] for y in range(4)] == ["0.500", "0.250", "wrong", "-"]
    assert [cells[2, y] for y in range(4)] == ["2.00", "2.00", "-", ""]


def test_nothing_is_drawn_of_fewer_than_two_points(tmp_path):
    assert plots.draw([row()], tmp_path) == []
    assert plots.draw([], tmp_path) == []
    assert plots.draw([row(ms=None, status="expected", device="H100")], tmp_path) == []
    assert list(plots.figures(pair())) == ["headline"]
    batches = pair() + pair(replace(HEADLINE, batch=1))
    assert list(plots.figures(batches)) == ["headline", "batch", "speed"]
    assert len(plots.figures(batches)["batch"].axes) == 1  # no forward, no panel for it


# the README


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    return tmp_path


def updated(folder: Path) -> str:
    readme.update(folder / "README.md", list((folder / "results").glob("*.csv")))
    return (folder / "README.md").read_text()


def test_without_results_the_readme_says_that_there_are_none(folder):
    assert updated(folder) == README.replace("begin -->\n", f"begin -->\n{readme.NO_GPU}\n")


def test_a_second_run_changes_nothing(folder):
    results.write(folder / "results" / "b.csv", whole_grid())
    results.write(folder / "results" / "a.csv", on_cpu(whole_grid("cpu")))
    once = updated(folder)
    assert once.startswith("# A title\n\n<!-- bench: begin -->\nGPU: NVIDIA")
    assert once.endswith("|\n<!-- bench: end -->\n\nThe end.\n")
    assert updated(folder) == once


def test_the_sentence_goes_when_a_gpu_was_measured_and_not_before(folder):
    results.write(folder / "results" / "cpu.csv", on_cpu(pair()))
    results.write(folder / "results" / "plans.csv", [row(ms=None, status="expected", device="H100")])
    results.write(folder / "results" / "broken.csv", [row(ms=None, status="failed", note="no driver")])
    text = updated(folder)
    assert readme.NO_GPU in text
    assert "H100" not in text
    results.write(folder / "results" / "gpu.csv", pair())
    text = updated(folder)
    assert readme.NO_GPU not in text
    assert text.index("[results/gpu.csv](results/gpu.csv)") < text.index("CPU, not a GPU")
    (folder / "results" / "gpu.csv").unlink()
    assert readme.NO_GPU in updated(folder)


def test_the_table_of_a_gpu_has_every_case_and_its_source(folder):
    rows = whole_grid()
    slow, wrong = rows[1].case, rows[4].case
    rows[1] = replace(rows[1], median_s=0.03, speed=0.667, bound_fraction=0.083)
    rows[4] = row(grid("cuda")["headline"][1], ms=None, status="wrong")
    assert (slow, wrong) == tuple(case.name for case in grid("cuda")["headline"])
    results.write(folder / "results" / "gpu.csv", rows)
    text = updated(folder)
    assert "| training bf16 T1024 B16 H768 | 7.68 | 30.0 | 0.667 | 8% |" in text
    assert "| forward bf16 T1024 B16 H768 | 7.68 | wrong |  |  |" in text
    assert text.count("\n| ") == 1 + len(rows) / 3
    assert "torch 2.9.0, triton 3.5.0, CUDA 13.0" in text
    assert "commit 0123456789; 2026-01-02" in text.replace("\n", " ")


def test_the_table_of_a_cpu_is_short_and_says_what_it_leaves_out(folder):
    rows = on_cpu(whole_grid("cpu"))
    results.write(folder / "results" / "cpu.csv", rows)
    text = updated(folder)
    assert text.count("\n| ") == 1 + 8
    assert f"8 of {len(rows) // 3} cases." in text.replace("\n", " ")
    assert "gpu_lstm is 0.500 to 0.500 times as fast" in text.replace("\n", " ")


@pytest.mark.parametrize("missing", ["<!-- bench: begin -->", "<!-- bench: end -->"])
def test_a_missing_marker_is_named_and_the_file_left_alone(folder, missing):
    text = README.replace(missing, "")
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"README.md: no {missing}")):
        updated(folder)
    assert (folder / "README.md").read_text() == text


def test_markers_the_wrong_way_round_are_refused(folder):
    (folder / "README.md").write_text("<!-- bench: end -->\n<!-- bench: begin -->\n")
    with pytest.raises(ValueError, match="no <!-- bench: end --> after <!-- bench: begin -->"):
        updated(folder)
