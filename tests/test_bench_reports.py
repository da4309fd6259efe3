"""What the benchmark tells: its tables, its pictures, the README."""

import re
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from bench import plots, report, results
from bench.cases import Case, grid

HEADLINE = Case("training", "bf16", 1024, 16, 768, 768)
OTHERS = [f"other-{n}" for n in range(13)]
CPU = {"device": "Imaginary CPU, 2 threads", "cuda": None, "driver": None, "peak_bytes": None}
ORIGIN = "NVIDIA Imaginary 9000; gpu_lstm 1.2.3, torch 2.9.0, CUDA 13.0, driver 580.1; commit 0123456789; 2026-01-02"
FIELDS = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "gpu_lstm": "1.2.3", "torch": "2.9.0", "cuda": "13.0",
    "driver": "580.1", "device": "NVIDIA Imaginary 9000", "graph": False, "schema": results.SCHEMA,
}  # fmt: skip


def row(case=HEADLINE, provider="ours", ms=10.0, theirs=20.0, **changes):
    """A provider that takes `ms` a call where torch.nn.LSTM takes `theirs`; with a status for `ms`, without figures."""
    named = FIELDS | vars(case) | {"case": case.name, "provider": provider}
    if isinstance(ms, str):
        return named | {"status": ms} | changes
    s, speed = ms / 1e3, theirs / ms
    figures = {"median_s": s, "p20_s": 0.99 * s, "p80_s": 1.02 * s, "bound_s": s / 4, "error": 0.5, "rounds": 30,
               "speed": speed, "speed_p20": 0.99 * speed, "speed_p80": 1.01 * speed, "peak_bytes": 50 * 2**20,
               "kept_bytes": 30 * 2**20, "copy_bytes_per_s": 2e12, "product_flops_per_s": 5e14}  # fmt: skip
    return named | figures | {"status": "measured"} | changes


def pair(case=HEADLINE, **changes):
    return [row(case, "torch", 20.0, speed_p20=1.0, speed_p80=1.0, **changes), row(case, "ours", 10.0, **changes)]


def whole_grid(kind="cuda", **changes):
    """Rows of all cases of the grid by torch, ours and haste; torch takes H / 100 ms, the others 2 and 3 times that."""
    return [
        row(case, name, (n + 1) * case.hidden_size / 100, case.hidden_size / 100, **changes)
        for group in grid(kind).values() for case in group for n, name in enumerate(("torch", "ours", "haste"))
    ]  # fmt: skip


def frame(rows):
    return pd.DataFrame(rows, columns=results.COLUMNS)


def lines_of(make, rows, width=100):
    """What a function of report prints of rows, by line; as from a dict by the beginning of a line."""
    console = Console(width=width)
    with console.capture() as captured:
        tables = make(frame(rows))
        console.print(*(tables if isinstance(tables, list) else [tables]), sep="\n")
    return captured.get().splitlines()


def line_of(lines, beginning):
    return next(line for line in lines if line.startswith(beginning))


def words(lines, beginning):
    return " ".join(line_of(lines, beginning).split())


# tables


@pytest.mark.parametrize("width", [80, 100])
def test_sixty_cases_by_fifteen_providers_fit_a_screen_and_what_is_slower_is_shown(width):
    cases = [case for group in grid("cuda").values() for case in group]
    cases += [replace(HEADLINE, batch=batch) for batch in range(300, 300 + 60 - len(cases))]
    rows = [
        row(case, name, 10.0 + n, status="yardstick" if name == "torch" and case.reset_rate else "measured")
        for case in cases for n, name in enumerate(["torch", "ours", *OTHERS])
    ]  # fmt: skip
    rows += [row(case, name, status) for case in cases[:3] for name, status in (("x", "wrong"), ("y", "failed"))]
    rows += [row(cases[-1], "ours", 40.0), row(cases[-2], "ours", "wrong")]  # the last of two counts
    lines = lines_of(report.summary, rows, width)
    shown = sum(line.startswith(("training", "forward", "step")) for line in lines)
    assert 30 <= len(lines) <= 40
    assert max(map(len, lines)) <= width
    assert line_of(lines, "more").split()[1:3] == [str(60 - shown), "cases"]
    assert "0.500 slower" in line_of(lines, f"training  B{cases[-1].batch}")
    assert "wrong" in line_of(lines, f"training  B{cases[-2].batch}")
    assert "wrong: x in 3 of 60 cases" in " ".join(lines)


def test_the_summary_has_times_bound_and_the_best_other_and_marks_a_yardstick():
    case = replace(HEADLINE, reset_rate=0.02)
    rows = [*pair(), row(provider="ours-step", ms=5.0), row(provider="haste", ms=16.0), row(provider="flash", ms=12.5)]
    rows += [
        row(case, "torch", 20.0, status="yardstick"),
        row(case),
        row(case, "torch", 9.0, graph=True, status="yardstick"),
    ]
    lines = lines_of(report.summary, rows)
    assert words(lines, "training  bf16") == "training bf16 T1024 B16 H768 20.0 10.0 2.00 faster 25% 1.60 flash"
    assert words(lines, "training  resets 2%") == "training resets 2% 20.0* 10.0 2.00 faster 25%"
    assert any("* torch.nn.LSTM without the lengths and resets" in line for line in lines)
    assert ORIGIN in " ".join(" ".join(lines).split())
    whole = lines_of(report.summary, whole_grid("cpu"))
    assert sum(line.startswith(("training", "forward", "step")) for line in whole) == 25


def test_the_verdict_doubts_nothing_within_the_spread():
    said = {
        (2.0, 1.9, 2.1): "2.00 faster", (0.5, 0.4, 0.6): "0.500 slower", (1.5, 0.9, 1.6): "1.50 even",
        (0.9, 0.8, 1.1): "0.900 even", (1.01, 1.0, 1.015): "1.01 even",
    }  # fmt: skip
    rows = frame([row(**dict(zip(("speed", "speed_p20", "speed_p80"), speeds))) for speeds in said])
    assert list(report.verdicts(rows.assign(contender="ours")).str.strip()) == list(said.values())


@pytest.mark.parametrize("width", [80, 100])
def test_the_headline_has_every_provider_the_fastest_first_and_a_reason_for_the_others(width):
    rows = [*pair(note="cooperative"), row(provider="ours", ms=9.0, graph=True), *pair(replace(HEADLINE, batch=1))]
    rows += [row(provider=name, ms=name, note="needs [ctk] and much more " * 5) for name in ("absent", "wrong")]
    lines = lines_of(report.headline, [*rows, row(provider="silent", ms="failed")], width)
    assert [line.split("  ")[0] for line in lines if line[:4] in ("ours", "torc")][:3] == [
        "ours (graph)",
        "ours",
        "torch",
    ]
    assert words(lines, "torch ") == "torch 20.0 19.8-20.4 19.5 50.0 1.00 0.500"
    assert re.match(r"absent +absent +needs \[ctk\] and much more", line_of(lines, "absent"))
    assert words(lines, "silent") == "silent failed"
    assert any(re.match("ours +kernels +cooperative$", line.rstrip()) for line in lines)
    assert max(map(len, lines)) <= width
    assert "2000 GB/s, operations over 500000 GFLOP/s" in " ".join(lines)
    assert any("kept MiB" in line for line in lines_of(report.headline, pair(**CPU)))


def test_what_is_expected_says_so():
    plan = row(ms="expected", device="H100", note="cooperative / step", launches=5, host_s=2.5e-4, kept_bytes=2**21,
               expected_us_per_step=1.75)  # fmt: skip
    lines = lines_of(report.expected, [plan, *pair()])
    assert lines[0].startswith("Expected, not measured: training, H100")
    assert words(lines, "bf16") == "bf16 T1024 B16 H768 cooperative / step 5 2.00 250 1.75"
    assert "H100" not in " ".join(lines_of(report.summary, [plan, *pair()]))


def test_rows_of_two_devices_do_not_mix():
    with pytest.raises(ValueError, match="one device, got 2: NVIDIA Imaginary 9000, Imaginary CPU, 2 threads"):
        report.summary(frame(pair() + pair(**CPU)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (9.999, "10.0"), (1.0, "1.00"), (99.96, "100"), (12345.6, "12346"), (0, "0")],
)
def test_three_digits(value, text):
    assert report.digits(value) == text


# plots


def test_all_figures_are_written_for_each_device(tmp_path):
    paths = plots.draw(frame(whole_grid() + pair(**CPU)), tmp_path / "new")
    stems = [f"nvidia-imaginary-9000-{n}" for n in ("headline", "hidden", "batch", "steps", "speed", "memory")]
    assert [path.stem for path in paths] == [*stems, "imaginary-cpu-2-threads-headline"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_axes_have_labels_with_units_and_lines_the_plain_rows_that_differ_in_their_size_only():
    figures = plots.figures(frame(whole_grid() + pair(replace(HEADLINE, hidden_size=96))))  # inputs of another size
    for name, labels in {
        "hidden": ("hidden size H = input size I (units)", "time a step (µs)"), "headline": ("time a call (ms)", ""),
        "batch": ("batch size B (sequences)", "time a step (µs)"), "steps": ("sequence length T (steps)", "time a step (µs)"),
        "memory": ("hidden size H = input size I (units)", "allocated at most during a call (MiB)"),
    }.items():  # fmt: skip
        axes = figures[name].axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == labels
        assert len(figures[name].axes) == 2
    assert all(ORIGIN in figure.get_supxlabel().replace("\n", " ") for figure in figures.values())
    titles = [axes.get_title() for axes in figures["batch"].axes]
    assert titles == ["training, bf16 T1024 H768", "forward, bf16 T1024 H768"]
    hiddens = sorted({case.hidden_size for case in grid("cuda")["hidden"]} | {768})
    for n, container in enumerate(figures["hidden"].axes[0].containers, start=1):
        line, _, (bars,) = container
        assert list(line.get_xdata()) == hiddens
        assert list(line.get_ydata()) == pytest.approx([n * hidden / 100 / 1024 * 1e3 for hidden in hiddens])
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        assert ends == [pytest.approx([0.99 * median, 1.02 * median]) for median in line.get_ydata()]
    assert n == 3
    kept = plots.figures(frame(whole_grid(**CPU)))["memory"].axes[0]
    assert kept.get_ylabel() == "kept for backward (MiB)"
    assert list(kept.containers[0][0].get_ydata()) == pytest.approx([30.0] * 9)


def test_lines_differ_without_colour_and_ours_is_thick_and_black():
    rows = [row(provider=name) for name in ("torch", "ours", *OTHERS)] + pair(graph=True)
    styles = plots._styles(report.measured(frame(rows)))
    looks = {(s["marker"], str(s["linestyle"]), s.get("markerfacecolor")) for s in styles.values()}
    assert len(looks) == len(styles) == 17
    assert styles["ours"]["color"] == "black"
    assert styles["ours"]["linewidth"] > max(s["linewidth"] for name, s in styles.items() if name != "ours")


def test_the_heat_map_has_a_number_for_every_speed_and_a_word_for_what_is_wrong():
    wide, one, four = (
        replace(HEADLINE, hidden_size=1024, input_size=1024),
        *(replace(HEADLINE, batch=b) for b in (1, 4)),
    )
    rows = [*pair(), row(provider="haste", ms=40.0), *pair(wide), row(wide, "haste", 80.0), *pair(one), *pair(four)]
    rows += [row(one, "haste", "wrong"), row(four, "haste", "unable")]
    rows += [row(case, "torch", 10.0, graph=True) for case in (HEADLINE, wide)]
    axes, *_, bar = plots.figures(frame([*rows, row(one, "torch", 10.0, graph=True, status="yardstick")]))["speed"].axes
    cells = {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ours", "haste", "torch (graph)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bf16 T1024 B16 H768", "H1024", "B1", "B4"]
    assert [[cells[x, y] for y in range(4)] for x in range(3)] == [
        ["2.00"] * 4, ["0.500", "0.250", "wrong", "-"], ["2.00", "2.00", "-", ""],
    ]  # fmt: skip
    assert bar.get_ylabel() == "times as fast as torch.nn.LSTM"


def test_nothing_is_drawn_of_fewer_than_two_points(tmp_path):
    for rows in ([], [row()], [row(ms="expected", device="H100")]):
        assert plots.draw(frame(rows), tmp_path) == []
    figures = plots.figures(frame(pair() + pair(replace(HEADLINE, batch=1))))
    assert {name: len(figure.axes) for name, figure in figures.items()} == {"headline": 1, "batch": 1, "speed": 2}


# the README


@pytest.fixture
def updated(tmp_path):
    """Write files of rows, and what the README has then between its markers."""
    readme, before, after = tmp_path / "README.md", f"# A title\n\n{report.BEGIN}\n", f"{report.END}\n\nThe end.\n"
    readme.write_text(before + after)

    def update(**files):
        for name, rows in files.items():
            (tmp_path / f"{name}.csv").unlink(missing_ok=True)
            results.create(tmp_path / f"{name}.csv")
            frame(rows).astype(object).to_csv(tmp_path / f"{name}.csv", index=False)
        report.update_readme(readme, list(tmp_path.glob("*.csv")))
        text = readme.read_text()
        assert text.startswith(before)
        assert text.endswith(after)
        return text[len(before) : -len(after)]

    return update


def test_the_sentence_goes_when_a_gpu_was_measured_and_not_before(updated):
    assert updated() == f"{report.NO_GPU}\n"
    text = updated(
        cpu=pair(**CPU), plans=[row(ms="expected", device="H100")], broken=[row(ms="failed", note="no driver")]
    )
    assert text.startswith(report.NO_GPU)
    assert "H100" not in text
    text = updated(gpu=pair(), broken=[])
    assert report.NO_GPU not in text
    assert text.index("[gpu.csv](gpu.csv)") < text.index("CPU, not a GPU")
    assert updated() == text  # a second time nothing changes
    assert updated(gpu=[]).startswith(report.NO_GPU)


def test_the_table_of_a_gpu_has_every_case_that_of_a_cpu_is_short_and_says_so(updated):
    rows = whole_grid()
    rows[1] |= {"median_s": 0.03, "speed": 0.667, "bound_s": 0.0025}
    rows[4] = row(grid("cuda")["headline"][1], ms="wrong")
    text = updated(gpu=rows)
    assert "| training bf16 T1024 B16 H768 | 7.68 | 30.0 | 0.667 | 8% |" in text
    assert "| forward bf16 T1024 B16 H768 | 7.68 | wrong |  |  |" in text
    assert text.count("\n| ") == 1 + len(rows) / 3
    assert ORIGIN in text.replace("\n", " ")
    yardstick = [row(replace(HEADLINE, reset_rate=0.1), "torch", status="yardstick", **CPU)]
    text = updated(gpu=[], cpu=whole_grid("cpu", **CPU) + yardstick).replace("\n", " ")
    assert text.count("| training ") + text.count("| forward ") + text.count("| step ") == 8
    assert "8 of 26 cases. Over all that were timed, gpu_lstm is 0.500 to 0.500 times as fast." in text


@pytest.mark.parametrize(
    "text", ["<!-- bench: begin -->", "<!-- bench: end -->", "<!-- bench: end -->\n<!-- bench: begin -->"]
)
def test_a_missing_marker_is_named_and_the_file_left_alone(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    missing = report.END if text.endswith(report.BEGIN) else report.BEGIN
    with pytest.raises(ValueError, match=re.escape(f"README.md: no {missing}")):
        report.update_readme(tmp_path / "README.md", [])
    assert (tmp_path / "README.md").read_text() == text
