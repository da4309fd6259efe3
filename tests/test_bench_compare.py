"""Two runs of the same code do not cry wolf, and a case that was slowed down is found."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from bench import compare, results
from bench.results import Row

NOISE, DRIFT = 0.03, 0.05  # of a round; of a whole run
PROVENANCE = {
    "schema": results.SCHEMA, "date": "2026-01-01T00:00:00+00:00", "commit": None, "gpu_lstm": "0.1.0",
    "python": "3.13.0", "torch": "2.9.0", "triton": None, "cupy": None, "cuda": None, "driver": None,
    "device": "a card",
}  # fmt: skip
SIZES = {
    "run": "training", "dtype": "bf16", "steps": 128, "batch": 16, "inputs": 64, "hidden": 64, "layers": 1,
    "directions": 1, "sequences": "full", "reset_rate": 0.0,
}  # fmt: skip


def row(case="a", provider="ours", status="measured", speed=2.0, spread=0.01, seconds=1e-3, **changes):
    """A row whose intervals reach `spread` to either side."""
    figures = {}
    if status in ("measured", "yardstick"):
        figures = {
            "runs": 30, "median_s": seconds, "p20_s": seconds * (1 - spread), "p80_s": seconds * (1 + spread),
        }  # fmt: skip
        if speed is not None:
            figures |= {"speed": speed, "speed_p20": speed * (1 - spread), "speed_p80": speed * (1 + spread)}
    names = {"case": case, "provider": provider, "status": status, "graph": False}
    return Row(**(PROVENANCE | SIZES | names | figures | changes))


def simulated(generator, rounds, cases=50, slowed=None, slowdown=1.0, **changes):
    """A run of `cases`, torch's row and ours of each; the drift is the whole run's, the noise each round's."""
    drift = np.exp(DRIFT * generator.normal())
    rows = []
    for case in range(cases):
        n = rounds if rounds is not None else generator.integers(20, 41)
        torchs, mine = 2e-3 * drift * np.exp(NOISE * generator.normal(size=(2, n)))
        mine = mine / 2 * (slowdown if case == slowed else 1)
        for provider, seconds in (("torch", torchs), ("ours", mine)):
            figures = {"runs": int(n)}
            for names, values in (("median_s p20_s p80_s", seconds), ("speed speed_p20 speed_p80", torchs / seconds)):
                figures |= zip(names.split(), np.quantile(values, [0.5, 0.2, 0.8]).tolist())
            rows.append(replace(row(f"case {case}", provider), **figures, **changes))
    return rows


def test_two_runs_of_the_same_code_show_no_regression():
    generator = np.random.default_rng(0)
    for _ in range(40):
        comparison = compare.compare(simulated(generator, None), simulated(generator, None), 0.95)
        assert comparison.regressions == []
        assert len(comparison.slower) + len(comparison.faster) + comparison.within_noise == 100


@pytest.mark.parametrize(("slowdown", "rounds", "least", "most"), [
    (1.03, 30, 0.0, 0.05), (1.10, 9, 0.4, 0.75), (1.10, 20, 0.85, 0.98), (1.10, 40, 0.97, 1.0), (1.15, 20, 0.98, 1.0),
    (1.07, 60, 0.85, 0.99),
])  # fmt: skip
def test_a_slowdown_is_found_as_often_as_is_said(slowdown, rounds, least, most):
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        old = simulated(generator, rounds, cases=3)
        new = simulated(generator, rounds, cases=3, slowed=1, slowdown=slowdown)
        regressions = compare.compare(old, new, 0.95).regressions
        assert all(each.case == "case 1" for each in regressions)
        found += len(regressions)
    assert least <= found / 200 <= most


def test_where_versions_of_torch_differ_drift_alone_is_seldom_a_regression():
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(100):
        old, new = simulated(generator, 30, cases=5), simulated(generator, 30, cases=5, torch="2.10.0")
        alarms += bool(compare.compare(old, new, 0.95).regressions)
    assert alarms <= 5
    slow = simulated(generator, 30, cases=5, slowed=2, slowdown=2.0, torch="2.10.0")
    assert [each.case for each in compare.compare(old, slow, 0.95).regressions] == ["case 2"]


def test_what_is_slower_comes_worst_first_and_then_what_is_faster():
    now = {"a": 1.8, "b": 3.0, "c": 1.0, "d": 2.5, "e": 1.99, "f": 1.92, "g": 2.08}
    old = [row(case) for case in now]
    new = [row(case, speed=speed) for case, speed in now.items()]
    comparison = compare.compare(old, new, 0.95)
    assert [change.row.case for change in comparison.slower] == ["c", "a"]
    assert [change.ratio for change in comparison.slower] == pytest.approx([0.5, 0.9])
    assert [change.row.case for change in comparison.faster] == ["b", "d"]
    assert comparison.within_noise == 3
    assert [each.case for each in comparison.regressions] == ["c", "a"]


@pytest.mark.parametrize(("spread", "fail_under", "real"), [
    (0.01, 0.95, True), (0.08, 0.95, False), (0.01, 0.89, False), (0.01, 1.0, True),
])  # fmt: skip
def test_a_change_is_real_beyond_the_threshold_and_with_intervals_apart(spread, fail_under, real):
    comparison = compare.compare([row(spread=spread)], [row(spread=spread, speed=1.8)], fail_under)
    assert bool(comparison.regressions) is real


def test_few_rounds_widen_the_intervals():
    def regressions(rounds):
        return compare.compare([row(spread=0.03, runs=rounds)], [row(spread=0.03, speed=1.8, runs=rounds)], 0.95)

    assert regressions(20).slower
    assert not regressions(5).slower  # twice as wide


def test_the_machine_is_slower_and_the_speed_the_same():
    old = [row(provider="torch", speed=1.0, seconds=2e-3), row()]
    new = [row(provider="torch", speed=1.0, seconds=4e-3), row(seconds=2e-3)]
    comparison = compare.compare(old, new, 0.95)
    assert [(change.row.provider, change.measure) for change in comparison.slower] == [("torch", "seconds")]
    assert comparison.regressions == []


@pytest.mark.parametrize("changes", [{"torch": "2.10.0"}, {"speed": None}], ids=str)
def test_without_a_common_yardstick_seconds_are_compared_with_a_margin(changes):
    def slower(seconds):
        return compare.compare([row()], [row(seconds=seconds, **changes)], 0.95).slower

    assert not slower(1.12e-3)  # 0.89 of the speed; 0.95 * 0.9 is 0.855
    assert [(change.measure, change.ratio) for change in slower(1.25e-3)] == [("seconds", pytest.approx(0.8))]


@pytest.mark.parametrize("provider", ["torch", "flashrnn"])
def test_other_providers_are_shown_and_fail_nothing(provider):
    old = [row(), row("a", provider), row("b", provider)]
    new = [row(), row("a", provider, speed=1.0, seconds=2e-3), row("b", provider, status="failed")]
    comparison = compare.compare(old, new, 0.95)
    assert len(comparison.slower) == 1
    assert [lost.broken for lost in comparison.lost] == [True]
    assert comparison.regressions == []


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_what_was_right_and_is_broken_is_a_regression(status):
    comparison = compare.compare([row(graph=graph) for graph in (False, True)], [row(status=status)], 0.95)
    assert [(each.case, each.graph) for each in comparison.regressions] == [("a", False), ("a", True)]


def test_what_is_in_one_file_only_is_told():
    expected = row("x", status="expected", device="another card")
    old = [row("a"), row("b"), row("c"), row("d", status="wrong"), row("e", graph=True), row("e"), expected]
    new = [row("a"), row("b", status="absent", note="no Triton"), row("d"), row("e"), row("f"), expected]
    comparison = compare.compare(old, new, 0.95)
    assert [(lost.old.case, lost.old.graph, lost.new and lost.new.status) for lost in comparison.lost] == [
        ("b", False, "absent"), ("c", False, None), ("e", True, None),
    ]  # fmt: skip
    assert [each.case for each in comparison.gained] == ["d", "f"]
    assert comparison.regressions == []


@pytest.mark.parametrize(("old", "new", "fail_under", "message"), [
    ([row()], [row()], 0.0, "--fail-under is 0, expected"),
    ([row()], [row()], 1.01, "--fail-under is 1.01, expected"),
    ([row()], [row()], float("nan"), "--fail-under is nan, expected"),
    ([row()], [row(device="another")], 0.95, "one device, got a card and another"),
    ([row("a")], [row("b")], 0.95, "nothing to compare"),
    ([row(), row(provider="torch")], [row(provider="torch")], 0.95, "nothing to compare"),
    ([], [], 0.95, "nothing to compare"),
    ([row(), row()], [row()], 0.95, "ours at a is there twice"),
    ([row()], [row(runs=None)], 0.95, "runs of ours at a is None, expected a positive number"),
    ([row()], [row(speed_p80=float("nan"))], 0.95, "speed_p80 of ours at a is nan"),
    ([row()], [row(speed=0.0)], 0.95, "speed_p20 of ours at a is 0.0"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(old, new, fail_under, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(old, new, fail_under)


def status_of(*arguments):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def files(tmp_path):
    """CSVs: old.csv, same.csv, slow.csv."""
    for name, speed in (("old", 2.0), ("same", 2.0), ("slow", 1.8)):
        results.write(tmp_path / f"{name}.csv", [row(speed=speed), row("b", status="absent", note="[not] here")])
    return tmp_path


def test_the_exit_status(files, capsys):
    assert status_of(files / "old.csv", files / "same.csv") == 0
    assert "regressions of gpu_lstm: 0" in capsys.readouterr().out
    assert status_of(files / "old.csv", files / "slow.csv") == 1
    assert "regressions of gpu_lstm: 1, at --fail-under 0.95" in capsys.readouterr().out
    assert status_of(files / "old.csv", files / "slow.csv", "--fail-under", 0.8) == 0


def test_a_user_error_is_printed_and_the_exit_status_is_2(files, capsys):
    broken = files / "broken.csv"
    lines = (files / "old.csv").read_text().splitlines()
    broken.write_text("\n".join([lines[0], lines[1].replace("2.9.0", "2.9.0,")]))
    no_csv = files / "no.csv"
    no_csv.write_bytes(b"\x93\x00\xff")
    for path, message in (
        (broken, "broken.csv:2: "), (no_csv, ""), (files / "none.csv", "none.csv"), (files, str(files)),
    ):  # fmt: skip
        assert status_of(files / "old.csv", path) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err
        assert printed.out == ""
    assert status_of(files / "old.csv", files / "same.csv", "--fail-under", 2) == 2


def test_it_prints_the_worst_first_every_name_whole_and_notes_as_they_are():
    name = "training-bf16-T1024-B16-I768-H768-L2-both-directions-ragged-resets-2.0%"
    old = [row("a"), row(name, graph=True), row("c"), row("d"), row("e")]
    new = [
        row("a", speed=1.6),
        row(name, graph=True, speed=1.0),
        row("c", speed=3.0),
        row("d", status="wrong", note="[x]"),
    ]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(compare.compare(old, new, 0.95))
    text = captured.get()
    slower, broken, faster, missing = map(text.index, ("slower", "right before, not now", "faster", "timed before"))
    assert slower < text.index("0.50") < text.index("0.80") < broken < faster < missing
    assert "wrong: [x]" in text
    assert "".join(line[:40].strip() for line in text.splitlines()).count("2.0%") == 1
