"""What the benchmark reports: its tables, its pictures, the README, and the comparison of two runs."""

from dataclasses import replace

import pandas as pd
import pytest
from installed import ROOT

from bench import __main__ as command_line
from bench import compare, report, results
from bench.cases import Case

HEADLINE = Case("training", "bf16", 1024, 16, 768, 768)
FIELDS = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "gpu_lstm": "1.2.3", "torch": "2.9.0", "cuda": "13.0",
    "driver": "580.1", "device": "NVIDIA Imaginary 9000", "graph": False, "schema": results.SCHEMA, "provider": "ours",
    "status": "measured", "rounds": 30,
}  # fmt: skip
TORCH, HASTE = {"provider": "torch", "speed": 1.0}, {"provider": "haste"}
BROKEN, ABSENT, GRAPH = {"status": "wrong"}, {"status": "absent"}, {"graph": True}


def row(case=HEADLINE, speed=2.0, ms=1.0, spread=0.01, **changes):
    """By default of ours, twice as fast as torch, p20 and p80 1 % away."""
    names = "median_s", "p20_s", "p80_s", "speed", "speed_p20", "speed_p80"
    values = (value * end for value in (ms, speed) for end in (1, 1 - spread, 1 + spread))
    timed = changes.get("status", "measured") in results.TIMED
    return FIELDS | vars(case) | {"case": case.name} | (dict(zip(names, values)) if timed else {}) | changes


def frame(rows):
    return pd.DataFrame(rows, columns=results.COLUMNS)


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
    (readme := tmp_path / "README.md").write_text(report.BEGIN)
    with pytest.raises(ValueError, match=f"README.md: no {report.END}"):
        report.update_page(readme, files)


def test_cases_of_heads_are_a_group():
    heads = replace(HEADLINE, hidden_size=512, input_size=512, heads=4)
    chosen = HEADLINE, heads, replace(heads, batch=1), replace(heads, cell="slstm")
    lines = report.by_case(report.measured(frame([row(case) for case in chosen])))
    groups = lines["object"].map(report.sizes).groupby(lines["group"]).agg(list)
    of_heads = ["bf16 T1024 B1 H4x128", "bf16 T1024 B16 H4x128", "SLSTM bf16 T1024 B16 H4x128"]
    assert list(groups) == [["bf16 T1024 B16 H768"], of_heads]


def run(**cases):
    """Rows of a case, or of `case_2` and so on."""
    return frame([row(**changes) | {"case": case[0]} for case, changes in cases.items()])


def regressions(old, new, fail_under=0.95):
    rows = compare.compare(old, new, fail_under)
    return list(rows["case"][rows["is_regression"]])


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
           "i": HASTE, "j": HASTE, "k": {}, "l": {}, "m": {}, "n": {}, "n_2": GRAPH}  # fmt: skip
    new = {"a": {"speed": 1.92}, "b": ABSENT, "d": {}, "e": {}, "f": {}, "g": BROKEN, "h": TORCH | {"ms": 2},
           "i": HASTE | {"speed": 1}, "j": HASTE | BROKEN, "k": {"speed": 1.8}, "l": {"speed": 1},
           "m": {"speed": 3}, "n": {}, "n_2": GRAPH | BROKEN}  # fmt: skip
    rows = compare.compare(run(**old), run(**new), 0.95)
    names = rows["case"] + rows["graph"].map({True: "+", False: ""})
    told = {verdict: list(its) for verdict, its in names.groupby(rows["verdict"])}
    assert told["slower"][-1] == "k"  # h, i and l are half as fast
    assert {verdict: sorted(its) for verdict, its in told.items()} == {
        "": ["a", "e", "n"], "slower": ["h", "i", "k", "l"], "faster": ["m"], "broken": ["g", "g+", "j", "n+"],
        "not timed now": ["b", "c", "e+"], "not timed before": ["d", "f"],
    }  # fmt: skip
    assert sorted(rows["case"][rows["is_regression"]]) == ["g", "g", "k", "l", "n"]
    assert rows.set_index("case")["ratio"]["k"] == pytest.approx(0.9)


A = {"a": {}}


@pytest.mark.parametrize(("old", "new", "fail_under", "message"), [
    (A, A, 0.0, "--fail-under is 0, expected"), ({}, {}, 0.95, "one device, got 0"),
    (A, {"a": {"device": "b"}}, 0.95, "one device, got 2: NVIDIA Imaginary 9000, b"),
    (A | {"a_2": TORCH}, {"a": TORCH}, 0.95, "nothing to compare"), (A, {"b": {}}, 0.95, "nothing to compare"),
    (A | {"a_2": {}}, A, 0.95, "is there twice"),
    (A, {"a": {"rounds": None}}, 0.95, "ours at a was timed, expected positive times and rounds"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(old, new, fail_under, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(run(**old), run(**new), fail_under)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for path, speed, lost in (("old", 2.0, {}), ("slow", 1.8, BROKEN | {"note": "[not] here"})):
        results.create(tmp_path / path)
        for each in run(a={"speed": speed}, b=lost).to_dict("records"):
            results.append(tmp_path / path, {column: value for column, value in each.items() if value == value})
    old, slow = str(tmp_path / "old"), str(tmp_path / "slow")
    for new, status, found in ((old, 0, 0), (slow, 1, 2)):
        assert command_line.main(["compare", old, new]) == status
        said = capsys.readouterr().out
        assert f"regressions of gpu_lstm: {found}, at --fail-under 0.95" in said
    assert said.index("0.90") < said.index("wrong: [not] here")
    for why, arguments in {"--fail-under is 2": [slow, "--fail-under", "2"], "No such file": ["nowhere"]}.items():
        assert command_line.main(["compare", old, *arguments]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n"), why in printed.err) == ("", 1, True)
