"""Two runs of the same code raise no false alarm, and a case that was slowed down is found."""

import numpy as np
import pandas as pd
import pytest

from bench import __main__ as command_line
from bench import compare, results
from bench.cases import Case

NOISE, DRIFT = 0.03, 0.05  # of a round; of a whole run
FIELDS = vars(Case("training", "bf16", 128, 16, 64, 64)) | {
    "date": "2026-01-01", "gpu_lstm": "0.1.0", "torch": "2.9.0", "device": "a card", "graph": False, "provider": "ours",
    "status": "measured", "rounds": 30, "schema": results.SCHEMA,
}  # fmt: skip
NAMES = ("median_s", "p20_s", "p80_s"), ("speed", "speed_p20", "speed_p80")
HASTE = {"provider": "haste"}
TORCH = {"provider": "torch", "speed": 1.0}
WRONG, ABSENT, GRAPH = {"status": "wrong"}, {"status": "absent"}, {"graph": True}


def row(name, speed=2.0, ms=1.0, spread=0.01, **changes):
    """By default of ours, twice as fast as torch, p20 and p80 1 % away."""
    values = (value * end for value in (ms, speed) for end in (1, 1 - spread, 1 + spread))
    timed = changes.get("status", "measured") in results.TIMED
    return FIELDS | {"case": name} | (dict(zip((*NAMES[0], *NAMES[1]), values)) if timed else {}) | changes


def frame(**cases):
    """Rows of a case, or of `case_2` and so on."""
    return pd.DataFrame([row(case[0], **changes) for case, changes in cases.items()], columns=results.COLUMNS)


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
        fields = FIELDS | {"provider": provider, "torch": torch, "rounds": rounds}
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
    assert regressions(frame(a=old), frame(a=new), fail_under) == ["a"] * real


def test_every_verdict_what_changed_most_first_and_only_ours_fails():
    old = {"a": {}, "b": {}, "c": {}, "d": WRONG, "e": GRAPH, "e_2": {}, "g": {}, "g_2": GRAPH, "h": TORCH,
           "i": HASTE, "j": HASTE, "k": {}, "l": {}, "m": {}}  # fmt: skip
    new = {"a": {"speed": 1.92}, "b": ABSENT, "d": {}, "e": {}, "f": {}, "g": WRONG, "h": TORCH | {"ms": 2},
           "i": HASTE | {"speed": 1}, "j": HASTE | WRONG, "k": {"speed": 1.8}, "l": {"speed": 1},
           "m": {"speed": 3}}  # fmt: skip
    rows = compare.compare(frame(**old), frame(**new), 0.95)
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
    (A, {"a": {"device": "b"}}, 0.95, "one device, got 2: a card, b"), (A, {"b": {}}, 0.95, "nothing to compare"),
    (A | {"a_2": TORCH}, {"a": TORCH}, 0.95, "nothing to compare"), (A | {"a_2": {}}, A, 0.95, "is there twice"),
    *((A, {"a": {name: value}}, 0.95, "ours at a was timed, expected positive times and rounds")
      for name, value in (("rounds", None), ("speed_p80", float("nan")), ("speed", 0.0), ("ms", -1.0))),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(old, new, fail_under, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(frame(**old), frame(**new), fail_under)


def test_the_command(tmp_path, capsys, monkeypatch):
    name, note = "training-bf16-T1024-B16-I768-H768-L2-both-directions-ragged-resets-2.0%", "[not] here"
    monkeypatch.setenv("COLUMNS", "100")
    for path, speed, lost in (("old", 2.0, {}), ("slow", 1.8, WRONG | {"note": note})):
        results.create(tmp_path / path)
        for row in frame(a={"case": name, "speed": speed}, b=lost, c=ABSENT | {"note": note}).to_dict("records"):
            results.append(tmp_path / path, {column: value for column, value in row.items() if value == value})
    old, slow = str(tmp_path / "old"), str(tmp_path / "slow")
    assert command_line.main(["compare", old, old]) == 0
    assert "regressions of gpu_lstm: 0" in capsys.readouterr().out
    assert command_line.main(["compare", old, slow]) == 1
    said = capsys.readouterr().out
    assert "regressions of gpu_lstm: 2, at --fail-under 0.95" in said
    assert said.index("0.90") < said.index("wrong: [not] here")
    assert "".join(line[:50].strip() for line in said.splitlines()).count("2.0%") == 1  # the name is whole
    (tmp_path / "nul").write_bytes((tmp_path / "old").read_bytes().replace(b"card", b"\0"))
    wrong = {"--fail-under is 2": [slow, "--fail-under", "2"], "holds NUL bytes": [str(tmp_path / "nul")]}
    for why, arguments in wrong.items():
        assert command_line.main(["compare", old, *arguments]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n"), why in printed.err) == ("", 1, True)
