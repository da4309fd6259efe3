"""The benchmark's providers, whose results and gradients agree with float64, `bench host`, tables, pages and
comparisons."""

import contextlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from installed import ROOT

from bench import __main__ as command_line
from bench import acting, compare, host, models, ppo, report, results, rows, timing
from bench.cases import VARIANTS, Case
from bench.inputs import Inputs, results_in
from bench.measure import Trial
from bench.providers import PROVIDERS, engine
from bench.providers.engine import Unable

SHORT = Case("training", "fp32", steps=4, batch=3, input_size=5, hidden_size=16)
OPTIONS = {
    "plain": dict(steps=16), "layers": dict(layers=2), "directions": dict(layers=2, directions=2),
    "ragged": dict(sequences="ragged"), "packed": dict(sequences="packed"),
    "ragged-directions": dict(layers=2, directions=2, sequences="ragged"),
    "resets": dict(reset_rate=0.2), "resets-layers": dict(layers=2, reset_rate=0.3),
    "to-states": dict(layers=2, reset_rate=0.3, variant="reset_states"),
    "gru": dict(layers=2, directions=2, cell="gru"),
    "gru-ragged": dict(layers=2, sequences="ragged", cell="gru"),
    "gru-to-states": dict(layers=2, reset_rate=0.3, variant="reset_states", cell="gru"),
    "gru-resets": dict(layers=2, reset_rate=0.3, cell="gru"),
    "gru-step": dict(mode="step", steps=1, cell="gru"),
    "heads": dict(heads=4), "gru-heads": dict(heads=2, cell="gru"),
    "heads-directions": dict(steps=3, layers=2, directions=2, heads=4),
    "slstm": dict(cell="slstm"), "slstm-heads": dict(heads=4, cell="slstm"),
    "slstm-resets": dict(layers=2, directions=2, heads=2, reset_rate=0.3, sequences="ragged", cell="slstm"),
    "slstm-step": dict(mode="step", steps=1, heads=2, cell="slstm"),
    "step": dict(mode="step", steps=1), "active": dict(mode="step", steps=1, sequences="active"),
} | {name: dict(layers=2, directions=2, variant=name) for name in VARIANTS}  # fmt: skip
CASES = {name: replace(SHORT, **options) for name, options in OPTIONS.items()}
DEEP = VARIANTS.keys() - {"layer_norm"}
OURS = {"ours", "ours-triton", "ours-reference"}
OTHERS = {  # providers that need no package, and must run in these cases
    "plain": {"compiled-loop"}, "ragged": {"torch-packed"}, "heads": {"head-loop"},
    "resets": {"cleanrl-loop", "rl_games-pieces", "rsl_rl-padded"}, "step": {"ours-stream"},
}  # fmt: skip
BY_TORCH = "plain layers directions packed step gru gru-step heads gru-heads heads-directions"


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.deep] * (case in DEEP)) for case in CASES])
def test_results_and_gradients(monkeypatch, case):
    # Compiling takes long, and is not tested here.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs, ran = Inputs.of(CASES[case], "cpu"), set()
    truth = results_in(torch.float64, inputs)
    for name, provider in PROVIDERS.items():
        if (reason := provider.absent("cpu")) is None:
            with contextlib.suppress(Unable):
                provider.build(inputs)  # the yardstick, too, which is timed in the plain case
                found = Trial(name, inputs).results()
                assert found.keys() == truth.keys()
                for result, true in truth.items():
                    if name == "rsl_rl-padded" and result in ("h_n", "c_n"):
                        assert found[result] is None  # its states have gone through padding
                        continue
                    assert found[result].shape == true.shape, (name, result)
                    error = (found[result].double() - true).norm() / true.norm()
                    assert error < 1e-5, f"{name}, {result}: {error}"
                ran.add(name)
        else:
            assert "\n" not in reason
    assert ran >= OURS | OTHERS.get(case, set()) | ({"torch"} if case in BY_TORCH.split() else set())


def test_a_package_that_is_not_there_is_explained_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol: f')")
    assert engine.absence("torch", "", "cpu") == "torch needs CUDA for this"
    assert engine.absence("torch", "", "cuda:0") is engine.absence("torch", "", "cpu", cuda=False) is None
    assert engine.absence("no_such_peer", "pip it", "cuda") == "no_such_peer is not installed: pip it"
    assert engine.absence("broken_peer", "", "cuda").endswith("installed but cannot be imported: undefined symbol: f")


@pytest.mark.parametrize("case", [case for case in host.CASES if case != "resets"])  # torch.nn has no resets
def test_both_sides_compute_the_same(case):
    mode = "inference" if case == "Stream" else "training"
    results = []
    for provider in ("torch.nn", "torch"):
        torch.manual_seed(0)
        results.append(torch.cat([t.flatten() for t in host.made(case, mode, "cpu", provider)()]))
    torch.testing.assert_close(*reversed(results), rtol=1e-5, atol=1e-5)


@pytest.fixture
def timed(monkeypatch):
    """No call is timed: each runs once, and torch.nn, a loop and "before" take three times as long as the others."""

    def interleaved(calls, *_):
        for call in calls.values():
            call()
        slow = "torch.nn", "loop", "before"
        return {n: np.array([3.0, 6.0, 16.0] if {*slow} & {n, *n} else [1.0, 2.0, 4.0]) for n in calls}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setenv("COLUMNS", "120")


def test_the_host_command_has_a_line_for_what_it_measures(timed, monkeypatch, capsys):
    monkeypatch.setattr(host, "ROUNDS", 2)
    assert command_line.main(["host", "--cases", "Stream"]) == 0
    line = ["Stream", "inference", "torch"]
    assert line in [each.split()[: len(line)] for each in capsys.readouterr().out.splitlines()]
    here, there = ("cpu", "torch"), ("cpu", "torch.nn")
    cells = host.line("T=1", "training", here, {"": [{here: [4e-6, 2e-6], there: [2e-6, 4e-6]}] * 2})
    assert list(cells.values())[3:] == ["3.0", "3.0", "1.25", "1.00"]


@pytest.mark.parametrize(("words", "row"), [
    ("ppo --device cpu", "cell GRU; T 9; N 2; H 8; update, loop ms 6e+03; update, one call ms 2e+03; "
     "times as fast 3; p20 3; p80 3.6; by numba; rollout, loop ms 6e+03; rollout, one call ms 2e+03; "
     "rollout, times as fast 3; rollout, p20 3; rollout, p80 3.6; "
     "iteration, times as fast 3; iteration, p20 3; iteration, p80 3.6"),
    ("acting", "cell GRU; N 2; H 128; resets True; torch.nn us 6e+06; module us 2e+06; Stream us 2e+06; "
     "module, times as fast 3; module, p20 3; module, p80 3.6; "
     "Stream, times as fast 3; Stream, p20 3; Stream, p80 3.6"),
    ("models", "model recommender, GRU4Rec; recurrent layers a GRU of 100; pass inference; before ms 6e+03; "
     "after ms 2e+03; times as fast 3; p20 3; p80 3.6"),
])  # fmt: skip
def test_rows_are_printed_and_stored_with_their_provenance(timed, monkeypatch, capsys, tmp_path, words, row):
    monkeypatch.setattr(ppo, "SIZES", [(9, 2, 8)])
    monkeypatch.setattr(acting, "ENVIRONMENTS", (2,))
    kept = "recommender, GRU4Rec", "keyword spotter, streamed"
    monkeypatch.setattr(models, "MODELS", {name: models.MODELS[name] for name in kept})
    file = tmp_path / "rows.csv"
    assert command_line.main([*words.split(), "--out", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert row in printed
    stored = pd.read_csv(file)
    assert len(stored) == len(printed)
    assert set(stored["torch"]) == {torch.__version__}


def test_a_result_that_differs_or_is_missing_is_named():
    ones = torch.ones(3)
    rows.check_same({"y": ones + 1e-6}, {"y": ones}, 1e-5)
    for found in ({"y": ones + 1e-4}, {"y": ones * float("nan")}, {}):
        with pytest.raises(RuntimeError, match=r"^y differs by .*, expected at most 1e-05"):
            rows.check_same(found, {"y": ones}, 1e-5)


@pytest.mark.deep
@pytest.mark.parametrize("name", models.MODELS)
def test_a_converted_model_computes_the_same(name):
    """`calls` compares outputs and all gradients, and has to notice a layer that was changed."""
    model = models.MODELS[name]
    for training in (True, False):
        models.calls(model, training)

    def changed(module):
        model.converted(module)
        with torch.no_grad():
            next(p for n, p in module.named_parameters() if "_hh" in n or "_recurrent_kernel_" in n).add_(0.1)

    with pytest.raises(RuntimeError, match="differs by"):
        models.calls(model._replace(converted=changed), True)


HEADLINE = Case("training", "bf16", 1024, 16, 768, 768)
FIELDS = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "gpu_lstm": "1.2.3", "torch": "2.9.0", "cuda": "13.0",
    "driver": "580.1", "device": "NVIDIA Imaginary 9000", "graph": False, "schema": results.SCHEMA, "provider": "ours",
    "status": "measured", "rounds": 30,
}  # fmt: skip
TORCH, TORCHRL = {"provider": "torch", "speed": 1.0}, {"provider": "torchrl-pad"}
BROKEN, ABSENT, GRAPH = {"status": "wrong"}, {"status": "absent"}, {"graph": True}


def row(case=HEADLINE, speed=2.0, ms=1.0, spread=0.01, **changes):
    """Return a row, by default of ours, twice as fast as torch, with p20 and p80 1 % away."""
    names = "median_s", "p20_s", "p80_s", "speed", "speed_p20", "speed_p80"
    values = (value * end for value in (ms, speed) for end in (1, 1 - spread, 1 + spread))
    timed = changes.get("status", "measured") in results.TIMED
    return FIELDS | vars(case) | {"case": case.name} | (dict(zip(names, values)) if timed else {}) | changes


def test_the_page_is_written_from_the_stored_results(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("bench", "docs/pictures"):
        (tmp_path / name).symlink_to(ROOT / name)
    files = sorted((tmp_path / "bench" / "results").glob("*.csv"))
    pictures = {file: tmp_path / "docs" / "pictures" / f"instead-{file.stem}.png" for file in files}
    stored, page = (ROOT / "docs/benchmarks.md").read_text(), tmp_path / "docs" / "benchmarks.md"
    page.write_text(stored.replace("| 1.77 |", "| 7.71 |"))
    report.update_page(page, pictures)
    assert page.read_text() == stored, "python -m bench page"
    page.write_text(report.BEGIN)
    with pytest.raises(ValueError, match=f"benchmarks.md: no {report.END}"):
        report.update_page(page, pictures)


def run(**cases):
    """Return rows of a case: the keyword "case", or "case_2" and so on for more rows."""
    rows = [row(**changes) | {"case": case[0]} for case, changes in cases.items()]
    return pd.DataFrame(rows, columns=results.COLUMNS)


@pytest.mark.parametrize(("old", "new", "fail_under", "real"), [
    *((changes, changes | {"speed": 1.8}, fail_under, real) for changes, fail_under, real in (
        ({}, 0.95, True), ({"spread": 0.08}, 0.95, False), ({}, 0.89, False),
        # These intervals are twice as wide.
        ({"spread": 0.03, "rounds": 20}, 0.95, True), ({"spread": 0.03, "rounds": 5}, 0.95, False),
    )),
    # The speed is 0.89 or 0.80 of the old one. Below 0.95 less the margin, 0.855, the change is real.
    *(({}, {"ms": ms} | changes, 0.95, real) for ms, real in ((1.12, False), (1.25, True))
      for changes in ({"torch": "2.10.0"}, {"speed": float("nan")})),
])  # fmt: skip
def test_a_change_is_real_beyond_the_threshold_and_with_intervals_apart_or_a_margin(old, new, fail_under, real):
    """A margin replaces the intervals where seconds are compared, without a common yardstick."""
    assert list(compare.compare(run(a=old), run(a=new), fail_under)["is_regression"]) == [real]


def test_every_verdict_what_changed_most_first_and_only_ours_fails():
    old = {"a": {}, "b": {}, "c": {}, "d": BROKEN, "e": GRAPH, "e_2": {}, "g": {}, "g_2": GRAPH, "h": TORCH,
           "i": TORCHRL, "j": TORCHRL, "k": {}, "l": {}, "m": {}, "n": {}, "n_2": GRAPH}  # fmt: skip
    new = {"a": {"speed": 1.92}, "b": ABSENT, "d": {}, "e": {}, "f": {}, "g": BROKEN, "h": TORCH | {"ms": 2},
           "i": TORCHRL | {"speed": 1}, "j": TORCHRL | BROKEN, "k": {"speed": 1.8}, "l": {"speed": 1},
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


BASIC = {"a": {}}


@pytest.mark.parametrize(("old", "new", "fail_under", "message"), [
    (BASIC, BASIC, 0.0, "--fail-under is 0, expected"), ({}, {}, 0.95, "one device, got 0"),
    (BASIC, {"a": {"device": "b"}}, 0.95, "one device, got 2: NVIDIA Imaginary 9000, b"),
    (BASIC | {"a_2": TORCH}, {"a": TORCH}, 0.95, "nothing to compare"), (BASIC, {"b": {}}, 0.95, "nothing to compare"),
    (BASIC | {"a_2": {}}, BASIC, 0.95, "is there twice"),
    (BASIC, {"a": {"rounds": None}}, 0.95, "ours at a was timed, expected positive times and rounds"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(old, new, fail_under, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(run(**old), run(**new), fail_under)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for path, speed, ms, lost in (("old", 2.0, 1e-3, {}), ("slow", 1.8, 2e-3, BROKEN | {"note": "[not] here"})):
        results.create(tmp_path / path)
        for each in run(a={"speed": speed}, b=lost, c=TORCH | {"ms": ms}).to_dict("records"):
            results.append(tmp_path / path, {column: value for column, value in each.items() if value == value})
    old, slow = str(tmp_path / "old"), str(tmp_path / "slow")
    for new, status, found in ((old, 0, 0), (slow, 1, 2)):
        assert command_line.main(["compare", old, new]) == status
        said = capsys.readouterr().out
        assert f"regressions of gpu_lstm: {found}, at --fail-under 0.95" in said
    assert said.index(" 2 ms") < said.index("0.90") < said.index("wrong: [not] here")
