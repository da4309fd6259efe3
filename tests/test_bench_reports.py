"""What the benchmark reports: its tables, its pictures, the README, and the comparison of two runs."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from installed import ROOT
from rich.console import Console

from bench import __main__ as command_line
from bench import compare, plots, report, results
from bench.cases import Case, grid

HEADLINE = Case("training", "bf16", 1024, 16, 768, 768)
RESETS, ONE, SLOW, WRONG = replace(HEADLINE, reset_rate=0.02), *(replace(HEADLINE, batch=n) for n in (1, 4, 8))
CPU = {"device": "Imaginary CPU, 2 threads", "cuda": None, "driver": None, "peak_bytes": None}
ORIGIN = "NVIDIA Imaginary 9000; gpu_lstm 1.2.3, torch 2.9.0, CUDA 13.0, driver 580.1; commit 0123456789; 2026-01-02"
FIELDS = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "gpu_lstm": "1.2.3", "torch": "2.9.0", "cuda": "13.0",
    "driver": "580.1", "device": "NVIDIA Imaginary 9000", "graph": False, "schema": results.SCHEMA,
}  # fmt: skip


def row(case=HEADLINE, provider="ours", ms=10.0, theirs=20.0, **changes):
    """A provider that needs `ms` per call where torch.nn.LSTM needs `theirs`; if `ms` is a status, without figures."""
    named = FIELDS | vars(case) | {"case": case.name, "provider": provider}
    if isinstance(ms, str):
        return named | {"status": ms} | changes
    s, speed = ms / 1e3, theirs / ms
    figures = {"median_s": s, "p20_s": 0.99 * s, "p80_s": 1.02 * s, "bound_s": s / 4, "error": 0.5, "rounds": 30,
               "speed": speed, "speed_p20": 0.99 * speed, "speed_p80": 1.01 * speed, "peak_bytes": 50 * 2**20,
               "kept_bytes": 30 * 2**20, "copy_bytes_per_s": 2e12, "product_flops_per_s": 5e14}  # fmt: skip
    return named | figures | {"status": "measured"} | changes


def pair(case=HEADLINE, **changes):
    return [row(case, "torch", 20.0, **changes), row(case, "ours", 10.0, **changes)]


def whole_grid(kind="cuda", **changes):
    """Rows of all cases of the grid by torch, ours and haste; torch takes H / 100 ms, the others 2 and 3 times that."""
    return [row(case, name, (n + 1) * case.hidden_size / 100, case.hidden_size / 100, **changes)
            for group in grid(kind).values() for case in group
            for n, name in enumerate(("torch", "ours", "haste"))]  # fmt: skip


def frame(rows):
    return pd.DataFrame(rows, columns=results.COLUMNS)


def said_by(make, rows, width=100):
    """The lines that a function of report prints of rows, with single spaces; none is wider than the terminal."""
    console = Console(width=width)
    with console.capture() as captured:
        tables = make(frame(rows))
        console.print(*(tables if isinstance(tables, list) else [tables]), sep="\n")
    assert max(map(len, captured.get().splitlines())) <= width
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_the_summary_has_times_bound_and_the_best_other_and_marks_a_yardstick():
    yardstick = {"status": "yardstick"}
    rows = [*pair(), row(provider="ours-step", ms=5.0), row(provider="haste", ms=16.0), row(provider="flash", ms=12.5)]
    rows += [row(RESETS, "torch", 20.0, **yardstick), row(RESETS), row(RESETS, "torch", 9.0, graph=True, **yardstick)]
    rows += [*pair(replace(RESETS, variant="reset_states")), row(ONE, "torch", 20.0)]
    rows += [row(ONE, speed=1.5, speed_p20=0.9, speed_p80=1.6), row(ONE, "x", "wrong"), row(RESETS, "x", "wrong")]
    rows += [row(SLOW), row(SLOW, ms=40.0), row(WRONG, ms="wrong")]  # the last of two counts
    lines = said_by(report.summary, rows)
    for line in ("training bf16 T1024 B16 H768 20.0 10.0 2.00 faster 25% 1.60 flash",
                 "training resets 2% 20.0* 10.0 2.00 faster 25%", "training B1 20.0 10.0 1.50 even 25%",
                 "training resets 2% reset_states 20.0 10.0 2.00 faster 25%", "training B4 - 40.0 0.500 slower 25%",
                 "training B8 - wrong"):  # fmt: skip
        assert line in lines
    assert all(text in " ".join(lines) for text in (report.STARRED, ORIGIN, "wrong: x in 2 of 6 cases"))


@pytest.mark.parametrize("width", [80, 100])
def test_details_have_every_provider_the_fastest_first_and_a_reason_for_the_others(width):
    rows = [*pair(note="cooperative"), row(provider="ours", ms=9.0, graph=True), *pair(ONE)]
    rows += [row(provider=name, ms=name, note="needs [ctk] and much more " * 5) for name in ("absent", "wrong")]
    lines = said_by(report.details, [*rows, row(provider="silent", ms="failed")], width)
    timed = [line for line in lines if line.startswith(("ours", "torch"))]
    assert [line.split()[0] for line in timed[:3]] == ["ours", "ours", "torch"]
    assert timed[0].startswith("ours (graph) ")
    assert timed[2] == "torch 20.0 19.8-20.4 19.5 50.0 1.00 0.500"
    assert {"silent failed", "ours kernels cooperative"} <= set(lines)
    assert any(line.startswith("absent absent needs [ctk] and much more") for line in lines)
    assert "2000 GB/s, operations over 500000 GFLOP/s" in " ".join(lines)
    assert "kept MiB" in " ".join(said_by(report.details, pair(**CPU)))


def test_three_digits():
    for value, text in {0.0123456: "0.0123", 9.999: "10.0", 1: "1.00", 99.96: "100", 12345.6: "12346", 0: "0"}.items():
        assert report.digits(value) == text


# plots


def test_all_figures_are_written_for_each_device_and_none_of_fewer_than_two_points(tmp_path):
    rows = [*pair(), *pair(ONE), *pair(RESETS), *(row(case, "cleanrl-loop", 15.0) for case in (RESETS, ONE))]
    paths = plots.draw(frame(rows + pair(**CPU)), tmp_path / "new")
    assert [path.stem for path in paths] == [f"{name}-nvidia-imaginary-9000" for name in ("speed", "instead")]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)
    for rows in ([], [row()]):
        assert plots.draw(frame(rows), tmp_path) == []


def test_the_heat_map_has_a_number_for_every_speed_a_word_for_what_is_wrong_and_a_star_for_a_yardstick():
    four = replace(HEADLINE, batch=4)
    rows = [*pair(), row(provider="haste", ms=40.0), *pair(ONE), *pair(four)]
    rows += [row(ONE, "haste", "wrong"), row(four, "haste", "failed"), row(HEADLINE, "torch", 10.0, graph=True)]
    rows += pair(replace(HEADLINE, batch=8))  # ours alone, which is left out
    rows += [row(ONE, "torch", 10.0, graph=True, status="yardstick")]
    figure = plots.figures(frame(rows))["speed"]
    axes, bar = figure.axes
    columns, names = ([t.get_text() for t in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels()))
    assert names == ["training bf16 T1024 B16 H768", "training B1*", "training B4"]
    cells = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}
    assert {column: [cells[x, y] for y in range(3)] for x, column in enumerate(columns)} == {
        "ours": ["2.00"] * 3, "haste": ["0.500", "wrong", "failed"], "torch (graph)": ["2.00", "-", ""],
    }  # fmt: skip
    assert bar.get_ylabel() == "times as fast as torch.nn.LSTM"
    assert report.STARRED in figure.get_supxlabel().replace("\n", " ")


@pytest.fixture
def updated(tmp_path):
    """Write files of rows, and return what the README then has between its markers."""
    readme, before, after = tmp_path / "README.md", f"# A title\n\n{report.BEGIN}\n", f"{report.END}\n\nThe end.\n"
    readme.write_text(before + after)

    def update(**files):
        for name, rows in files.items():
            frame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
        report.update_page(readme, list(tmp_path.glob("*.csv")))
        text = readme.read_text()
        assert text.startswith(before)
        assert text.endswith(after)
        return text[len(before) : -len(after)]

    return update


def test_the_sentence_goes_when_a_gpu_was_measured_and_not_before(updated):
    assert updated() == f"{report.NO_GPU}\n"
    text = updated(cpu=pair(**CPU), broken=[row(ms="failed", note="driver")])
    assert text.startswith(report.NO_GPU)
    text = updated(gpu=pair(), broken=[])
    assert report.NO_GPU not in text
    assert text.index("[gpu.csv](gpu.csv)") < text.index("CPU, not a GPU")
    assert updated() == text  # a second time nothing changes


def test_the_table_of_a_gpu_has_every_case_that_of_a_cpu_has_workarounds_only(updated):
    """The workarounds: test_readme_and_page_are_those_of_the_stored_results, which are of a CPU."""
    rows = whole_grid()
    rows[0] |= {"status": "yardstick"}
    rows[1] |= {"median_s": 0.03, "speed": 0.667, "bound_s": 0.0025}
    rows[7] |= {"bound_s": 2 * rows[7]["median_s"]}  # ceilings are measured, too
    rows[4] = row(grid("cuda")["headline"][1], ms="wrong")
    text = updated(gpu=rows)
    assert "| training bf16 T1024 B16 H768 | 7.68\\* | 30.0 | 0.667 | 8% |" in text
    assert "| forward bf16 T1024 B16 H768 | 7.68 | wrong |  |  |" in text
    assert text.count("\n| ") == 2 + len(rows) / 3
    assert text.count(" 100% |") == 1
    assert f"\\{report.STARRED}." in text.replace("\n", " ")
    text = updated(gpu=[], cpu=whole_grid("cpu", **CPU))
    assert "\n| " not in text  # without workarounds there is no table
    assert "A call that nn.LSTM can make too takes 2.00 to 2.00 times as long." in text.replace("\n", " ")


def test_readme_and_page_are_those_of_the_stored_results(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("bench", "docs/pictures"):
        (tmp_path / name).symlink_to(ROOT / name)
    files = list((tmp_path / "bench" / "results").glob("*.csv"))
    pictures = sorted((tmp_path / "docs" / "pictures").glob("*.png"))
    for name, its in (("README.md", None), ("docs/benchmarks.md", pictures)):  # every case, and pictures
        stored = (ROOT / name).read_text()
        (tmp_path / name).write_text(stored)
        report.update_page(tmp_path / name, files, its)
        assert (tmp_path / name).read_text() == stored, "python -m bench readme"


@pytest.mark.parametrize("text", [report.BEGIN, report.END, f"{report.END}\n{report.BEGIN}"])
def test_a_missing_marker_is_named_and_the_file_left_alone(tmp_path, text):
    (readme := tmp_path / "README.md").write_text(text)
    missing = report.END if text.endswith(report.BEGIN) else report.BEGIN
    with pytest.raises(ValueError, match=re.escape(f"README.md: no {missing}")):
        report.update_page(readme, [])
    assert readme.read_text() == text


# compare: two runs of the same code raise no false alarm, and a case that was slowed down is found

NOISE, DRIFT = 0.03, 0.05  # of a round; of a whole run
OURS = FIELDS | vars(HEADLINE) | {"provider": "ours", "status": "measured", "rounds": 30}
NAMES = ("median_s", "p20_s", "p80_s"), ("speed", "speed_p20", "speed_p80")
HASTE, TORCH = {"provider": "haste"}, {"provider": "torch", "speed": 1.0}
BROKEN, ABSENT, GRAPH = {"status": "wrong"}, {"status": "absent"}, {"graph": True}


def compared(name, speed=2.0, ms=1.0, spread=0.01, **changes):
    """By default of ours, twice as fast as torch, p20 and p80 1 % away."""
    values = (value * end for value in (ms, speed) for end in (1, 1 - spread, 1 + spread))
    timed = changes.get("status", "measured") in results.TIMED
    return OURS | {"case": name} | (dict(zip((*NAMES[0], *NAMES[1]), values)) if timed else {}) | changes


def run(**cases):
    """Rows of a case, or of `case_2` and so on."""
    return frame([compared(case[0], **changes) for case, changes in cases.items()])


def simulated(seed, rounds, runs=200, cases=3, slowdown=1.0, torch="2.9.0"):
    """`runs` of some cases, the first slowed down, torch's row and ours; drift is per run, noise per round."""
    generator, frames = np.random.default_rng(seed), []
    drift = np.exp(DRIFT * generator.normal(size=(runs, 1, 1)))
    torchs, mine = 2e-3 * drift * np.exp(NOISE * generator.normal(size=(2, runs, cases, rounds)))
    mine[:, 0] *= slowdown
    for provider, seconds in (("torch", torchs), ("ours", mine / 2)):
        rows = {"case": [f"case {case} of run {run}" for run in range(runs) for case in range(cases)]}
        for names, values in zip(NAMES, (seconds, torchs / seconds)):
            rows |= zip(names, np.quantile(values.reshape(runs * cases, rounds), [0.5, 0.2, 0.8], axis=1))
        fields = OURS | {"provider": provider, "torch": torch, "rounds": rounds}
        frames.append(pd.DataFrame(rows).assign(**fields))
    return pd.concat(frames, ignore_index=True).reindex(columns=results.COLUMNS)


def regressions(old, new, fail_under=0.95):
    rows = compare.compare(old, new, fail_under)
    return list(rows["case"][rows["is_regression"]])


@pytest.mark.parametrize(("slowdown", "rounds", "least", "most"), [
    (1.03, 30, 0.0, 0.05), (1.10, 9, 0.4, 0.75), (1.10, 20, 0.85, 0.98), (1.10, 40, 0.97, 1.0), (1.15, 20, 0.98, 1.0),
    (1.07, 60, 0.85, 0.99),
])  # fmt: skip
def test_a_slowdown_is_found_as_often_as_is_said(slowdown, rounds, least, most):
    found = regressions(simulated(2, rounds), simulated(3, rounds, slowdown=slowdown))
    assert all(case.startswith("case 0 ") for case in found)  # the others are of the same code
    assert least <= len(found) / 200 <= most


def test_where_versions_of_torch_differ_drift_alone_is_seldom_a_regression():
    found = regressions(simulated(4, 30, cases=5), simulated(5, 30, cases=5, torch="2.10.0"))
    assert len({case.split("run")[1] for case in found}) <= 10  # of 200 runs
    slow = regressions(simulated(6, 30, runs=1, cases=5), simulated(7, 30, 1, 5, slowdown=2.0, torch="2.10.0"))
    assert slow == ["case 0 of run 0"]


@pytest.mark.parametrize(("old", "new", "fail_under", "real"), [
    *((changes, changes | {"speed": 1.8}, fail_under, real) for changes, fail_under, real in (
        ({}, 0.95, True), ({"spread": 0.08}, 0.95, False), ({}, 0.89, False),
        ({"spread": 0.03, "rounds": 20}, 0.95, True), ({"spread": 0.03, "rounds": 5}, 0.95, False),  # twice as wide
    )),
    *(({}, {"ms": ms} | changes, 0.95, real) for ms, real in ((1.12, False), (1.25, True))  # of the speed; 0.855 counts
      for changes in ({"torch": "2.10.0"}, {"speed": float("nan")})),
])  # fmt: skip
def test_a_change_is_real_beyond_the_threshold_and_with_intervals_apart_or_a_margin(old, new, fail_under, real):
    """A margin where seconds are compared, without a common yardstick."""
    assert regressions(run(a=old), run(a=new), fail_under) == ["a"] * real


def test_every_verdict_what_changed_most_first_and_only_ours_fails():
    old = {"a": {}, "b": {}, "c": {}, "d": BROKEN, "e": GRAPH, "e_2": {}, "g": {}, "g_2": GRAPH, "h": TORCH,
           "i": HASTE, "j": HASTE, "k": {}, "l": {}, "m": {}}  # fmt: skip
    new = {"a": {"speed": 1.92}, "b": ABSENT, "d": {}, "e": {}, "f": {}, "g": BROKEN, "h": TORCH | {"ms": 2},
           "i": HASTE | {"speed": 1}, "j": HASTE | BROKEN, "k": {"speed": 1.8}, "l": {"speed": 1},
           "m": {"speed": 3}}  # fmt: skip
    rows = compare.compare(run(**old), run(**new), 0.95)
    names = rows["case"] + rows["graph"].map({True: "+", False: ""})
    told = {verdict: list(its) for verdict, its in names.groupby(rows["verdict"])}
    assert told["slower"][-1] == "k"  # h, i and l are half as fast
    assert {verdict: sorted(its) for verdict, its in told.items()} == {
        "": ["a", "e"], "slower": ["h", "i", "k", "l"], "faster": ["m"], "broken": ["g", "g+", "j"],
        "not timed now": ["b", "c", "e+"], "not timed before": ["d", "f"],
    }  # fmt: skip
    assert sorted(rows["case"][rows["is_regression"]]) == ["g", "g", "k", "l"]
    assert rows.set_index("case")["ratio"]["k"] == pytest.approx(0.9)


A = {"a": {}}


@pytest.mark.parametrize(("old", "new", "fail_under", "message"), [
    (A, A, 0.0, "--fail-under is 0, expected"), (A, A, 1.01, "--fail-under is 1.01, expected"),
    (A, A, float("nan"), "--fail-under is nan, expected"), ({}, {}, 0.95, "one device, got 0"),
    (A, {"a": {"device": "b"}}, 0.95, "one device, got 2: NVIDIA Imaginary 9000, b"),
    (A | {"a_2": TORCH}, {"a": TORCH}, 0.95, "nothing to compare"), (A, {"b": {}}, 0.95, "nothing to compare"),
    (A | {"a_2": {}}, A, 0.95, "is there twice"),
    *((A, {"a": {name: value}}, 0.95, "ours at a was timed, expected positive times and rounds")
      for name, value in (("rounds", None), ("speed_p80", float("nan")), ("speed", 0.0), ("ms", -1.0))),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(old, new, fail_under, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(run(**old), run(**new), fail_under)


def test_the_command(tmp_path, capsys, monkeypatch):
    name, note = "training-bf16-T1024-B16-I768-H768-L2-both-directions-ragged-resets-2.0%", "[not] here"
    monkeypatch.setenv("COLUMNS", "100")
    for path, speed, lost in (("old", 2.0, {}), ("slow", 1.8, BROKEN | {"note": note})):
        results.create(tmp_path / path)
        for row in run(a={"case": name, "speed": speed}, b=lost, c=ABSENT | {"note": note}).to_dict("records"):
            results.append(tmp_path / path, {column: value for column, value in row.items() if value == value})
    old, slow = str(tmp_path / "old"), str(tmp_path / "slow")
    assert command_line.main(["compare", old, old]) == 0
    assert "regressions of gpu_lstm: 0" in capsys.readouterr().out
    assert command_line.main(["compare", old, slow]) == 1
    said = capsys.readouterr().out
    assert "regressions of gpu_lstm: 2, at --fail-under 0.95" in said
    assert said.index("0.90") < said.index("wrong: [not] here")
    assert "".join(line[:50].strip() for line in said.splitlines()).count("2.0%") == 1  # the name is whole
    (tmp_path / "nul").write_bytes((tmp_path / "old").read_bytes().replace(b"Imaginary", b"\0"))
    wrong = {"--fail-under is 2": [slow, "--fail-under", "2"], "holds NUL bytes": [str(tmp_path / "nul")]}
    for why, arguments in wrong.items():
        assert command_line.main(["compare", old, *arguments]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n"), why in printed.err) == ("", 1, True)
