"""The benchmark: cases, the check before the timing, results as files, other processes, the command line."""

import contextlib
import os
import re
import select
import signal
import subprocess
import time
import warnings
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from unittest.mock import Mock

import faulty_worker
import numpy as np
import pytest
import torch
from installed import ROOT

import gpu_lstm
from bench import __main__ as command_line
from bench import cases, gpu, isolated, measure, providers, results, timing
from bench.cases import Case
from bench.inputs import Inputs, results_in
from bench.providers import Provider, ours, torchs

SMALL = Case("training", "fp32", steps=5, batch=3, input_size=4, hidden_size=6)
FORWARD, GIVEN = replace(SMALL, mode="forward"), Inputs.of(SMALL, "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Use a grid of two small cases, since these tests are not about the times."""
    grid = {"grid": lambda kind: {"headline": [SMALL, FORWARD]}}
    sizes = dict(SHORTEST=1e-5, COPY_BYTES={"cpu": 1 << 20}, PRODUCT_SIZE={"cpu": 64}, CEILING_SECONDS=0.01)
    for module, values in {cases: grid, measure: grid | dict(SECONDS=0.01), timing: sizes}.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def run_case(case, *names):
    return {row["provider"]: row for row in measure.run_case(case, list(names), "cpu", {})}


def test_every_case_has_a_name_of_its_own(monkeypatch):
    monkeypatch.undo()
    for kind in ("cuda", "cpu"):
        grid = cases.grid(kind)
        every = [*dict.fromkeys(case for group in grid.values() for case in group)]  # some cases are in two groups
        assert len({case.name for case in every}) == len(every)
        assert cases.choose(kind, None) == every
        kinds = [(case.cell, case.heads) for case in every[:4]]  # these come first, for runs on a card with little time
        assert kinds == [("lstm", 1), ("gru", 1), ("lstm", 4), ("slstm", 4)]
        assert cases.choose(kind, ["step", every[0].name]) == [*grid["step"], every[0]]


@pytest.mark.parametrize(("cell", "heads"), [("lstm", 1), ("gru", 1), ("lstm", 2), ("slstm", 2)])
def test_operations_and_bytes_are_those_of_the_tensors(cell, heads):
    case = Case(
        "forward", "bf16", 7, batch=2, input_size=3, hidden_size=4, layers=2, directions=2, cell=cell, heads=heads
    )
    module, training = getattr(gpu_lstm, cell.upper()), replace(case, mode="training")
    parameters = list(module(3, 4, 2, bidirectional=True, heads=heads).parameters())
    assert case.operations() == 2 * 7 * 2 * sum(p.numel() for p in parameters if p.dim() == 2)
    assert case.bytes_moved() == 2 * (sum(p.numel() for p in parameters) + 7 * 2 * (3 + 8))
    assert training.operations() == 3 * case.operations()
    saved = 7 * 2 * 2 * 2 * 4  # T B L D H
    assert training.bytes_moved() == 2 * case.bytes_moved() + 2 * (2 * 4 * saved) + 2 * 4 * saved


@pytest.mark.parametrize("changes", [
    {}, {"reset_rate": 0.2}, {"mode": "step", "steps": 1, "sequences": "active"},
], ids=str)  # fmt: skip
def test_rows_have_figures_or_a_reason(changes):
    case = replace(SMALL, **changes)
    rows = run_case(case, "torch", "ours", "ours-cupy", "ours-reference", "torch-packed", "rsl_rl-padded")
    assert len(rows) == 6
    for row in rows.values():
        assert (row["case"], row["steps"], row["schema"]) == (case.name, case.steps, results.SCHEMA)
        if row["status"] not in results.TIMED:
            assert (row["status"] in ("absent", "unable"), bool(row["note"]), "median_s" in row) == (True, True, False)
            continue
        for low, middle, high in (("p20_s", "median_s", "p80_s"), ("speed_p20", "speed", "speed_p80"),
                                  ("over_ours_low", "over_ours", "over_ours_high")):  # fmt: skip
            assert 0 < row[low] <= row[middle] <= row[high]
        moved, computed = case.bytes_moved() / row["copy_bytes_per_s"], case.operations() / row["product_flops_per_s"]
        assert (row["bound_s"], 0 < row["error"] <= 1) == (max(moved, computed), True)
        assert row.get("kept_bytes", 0) > 0 or not case.training
    assert rows["ours"]["status"] == rows["ours-reference"]["status"] == "measured"
    assert rows["torch"]["status"] == ("measured" if case == case.plain() else "yardstick")
    assert rows["torch"]["speed"] == rows["torch"]["speed_p20"] == rows["ours"]["over_ours_high"] == 1
    assert (rows["rsl_rl-padded"]["note"] == "without the last states") == (changes == {"reset_rate": 0.2})


def test_speeds_are_over_the_faster_yardstick_and_nobody_else_has_weights_copied(monkeypatch):
    def copying(given):
        engine, text = torchs.plain(given), f"{measure.COPIES}. This means they need to be compacted at every call"
        return replace(engine, call=lambda *a: warnings.warn(text, stacklevel=1) or engine.call(*a))

    for name, build in {"torch": copying, "torch-flat": torchs.plain, "copying": copying}.items():
        monkeypatch.setitem(providers.PROVIDERS, name, Provider(build))
    took = {"torch": 4.0, "torch-flat": 2.0, "ours": 1.0}
    taken = lambda calls, *_: {each: np.full(9, took.get(each[0], 1.0)) for each in calls}  # noqa: E731
    monkeypatch.setattr(timing, "interleaved", taken)
    with warnings.catch_warnings(record=True):
        rows = run_case(SMALL, *took, "copying")
    assert [rows[name]["speed"] for name in took] == [0.5, 1.0, 2.0]
    assert (rows["copying"]["status"], "median_s" in rows["copying"]) == ("unable", False)
    assert "not part of single contiguous chunk" in rows["copying"]["note"]


OF_HEADS = replace(SMALL, cell="slstm", heads=2, batch=8, hidden_size=16)  # with few numbers chance would decide


@pytest.mark.parametrize("case", [SMALL, OF_HEADS], ids=["LSTM", "SLSTM of heads"])
def test_a_provider_that_is_wrong_is_named_and_not_timed(monkeypatch, case):
    right, given = measure.Trial.results, Inputs.of(case, "cpu")
    names = results_in(torch.float64, given).keys()
    assert {"c_n", "dx", "dh0", "dweight_hh_l0"} | ({"n_n"} if case.cell == "slstm" else set()) <= names
    assert all(state.any() for state in given.states)  # otherwise a provider that leaves one out would not be detected
    faults = {name: ("", None) for name in ("torch", "ours")}
    faults |= {f"a little {name}": (name, lambda t: 1.0001 * t) for name in names}
    faults |= {"infinite": ("c_n", lambda t: t / 0), "of another shape": ("h_n", lambda t: t[0])}

    def results(trial):
        (name, change), found = faults[trial.name], right(trial)
        return found | ({name: change(found[name])} if change else {})

    monkeypatch.setattr(measure.Trial, "results", results)
    for name in faults.keys() - {"torch", "ours"}:
        monkeypatch.setitem(providers.PROVIDERS, name, Provider(partial(ours.build, "reference")))
    rows = run_case(case, *faults)
    assert rows.pop("torch")["status"] == ("measured" if case is SMALL else "unable")
    assert ("speed" in rows["ours"], rows.pop("ours")["status"]) == (case is SMALL, "measured")
    for name, row in rows.items():
        assert (row["status"], "median_s" in row) == ("wrong", False), name
        assert f"error of {faults[name][0]} is" in row["note"]


@pytest.mark.parametrize(("error", "status"), [(1.9, "measured"), (2.1, "wrong")])
def test_at_most_twice_torchs_own_error_is_allowed_which_is_compared_with_its_cells(monkeypatch, error, status):
    true, trials = results_in(torch.float64, GIVEN), [measure.Trial(name, GIVEN) for name in ("torch", "ours")]

    def off(by):
        return {name: result * (1 + by) for name, result in true.items()}

    monkeypatch.setattr(measure, "results_in", lambda dtype, _: true if dtype == torch.float64 else off(1e-6))
    # The error of torch's LSTM. torch.lstm_cell has an error of 1e-6.
    for theirs, expected_ in ((1.01 * measure.SANITY * 1e-6, "wrong"), (2e-6, "measured")):
        gate, (torch_, ours) = measure.Gate(), trials
        monkeypatch.setattr(torch_, "results", lambda by=theirs: off(by))
        assert gate.judge(torch_)["status"] == expected_
        allowed = 2e-6 if expected_ == "measured" else 1e-6  # a wrong provider is no yardstick
        monkeypatch.setattr(ours, "results", lambda by=error * allowed: off(by))
        judged = gate.judge(ours)
        assert (judged["status"], judged["error"]) == (status, pytest.approx(error / 2, rel=1e-6))


def test_interleaved_rounds_run_all_each_in_an_order_of_its_own(monkeypatch):
    order, clock, takes = "", 0.0, {"a": 0.001, "b": 0.002}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)

    def call(name):
        nonlocal order, clock
        order, clock = order + name, clock + takes[name]

    taken = timing.interleaved({name: partial(call, name) for name in takes}, "cpu", 0.1)
    for name, seconds in takes.items():
        assert (timing.percentiles(taken[name]), len(taken[name])) == (pytest.approx([seconds] * 3), 32)  # 0.1 s / 3 ms
    rounds = re.findall("..", order.removeprefix("aaabbb"))  # without the warm-up
    assert set(rounds[::2]) == {"ab", "ba"}
    assert [pair[::-1] for pair in rounds[::2]] == rounds[1::2]  # each is first equally often
    assert timing.percentiles(np.arange(11.0)) == [5, 2, 8]


def test_the_interval_of_a_median_has_the_true_one_as_often_as_is_said():
    rounds = np.random.default_rng(1).lognormal(size=(200, 40))  # the true median is 1
    middles, lows, highs = np.transpose([timing.bootstrapped(values) for values in rounds])
    assert (middles == np.median(rounds, axis=1)).all()
    assert 0.91 <= np.mean((lows <= 1) & (highs >= 1)) <= 0.985


def test_bytes_saved_for_backward_count_each_storage_once():
    a, b = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    c = a @ b
    assert timing.kept_bytes(lambda: (c * c) * c.T, [a, b]) == 2 * 400  # c, and the product c * c


@pytest.fixture
def row():
    return run_case(SMALL, "torch")["torch"]


def write(path, *rows):
    results.create(path)
    for each in rows:
        results.append(path, each)
    return path


def test_rows_come_back_as_they_were_and_no_file_is_overwritten(tmp_path, row):
    strange = row | {"note": 'a "note", of\ntwo lines', "graph": True, "error": None, "kept_bytes": 0, "commit": "1e5"}
    path = write(tmp_path / "a.csv", row, strange)
    with pytest.raises(FileExistsError):
        results.create(path)
    with pytest.raises(ValueError, match="seconds"):
        results.append(path, row | {"seconds": 1})
    read = results.read(path).astype(object)
    for found, given in zip(read.where(read.notna(), None).to_dict("records"), (row, strange), strict=True):
        given = {name: given.get(name) for name in results.COLUMNS} | {"schema": str(results.SCHEMA)}
        given |= {"note": given["note"] and 'a "note", of two lines', "commit": given["commit"] or None}
        assert found == pytest.approx(given)  # pandas 2 reads 16 decimals of a time
    assert (row["torch"], row["cuda"], row["driver"]) == (torch.__version__, None, None)
    assert row["device"].endswith((", 1 thread", " threads"))


def test_a_broken_file_is_named(tmp_path, row):
    whole = write(tmp_path / "a.csv", row).read_text().rstrip()
    for old, new, said in (
        (r",7$", ",99", "a.csv: schema 99.*reads schema 7"), ("case", "cause", r"other columns: \['case', 'cause'\]"),
        (r",7$", "", "a.csv: line 2 has no schema"), (r"^20", "\n20", "a.csv: line 2 has no date"),
        ("False", "perhaps", "a.csv: line 2 has no graph"), (",3,", ",three,", "a.csv: .*three"),
        ("measured", "guessed", "a.csv: line 2 has no status"), ("fp32", "fp\0", "a.csv: it holds NUL bytes; ex"),
    ):  # fmt: skip
        (tmp_path / "a.csv").write_text(re.sub(old, new, whole, flags=re.MULTILINE))
        with pytest.raises(ValueError, match=said):
            results.read(tmp_path / "a.csv")


def test_a_stopped_run_keeps_what_it_has_and_no_case_is_begun_after_the_deadline(tmp_path, monkeypatch):
    run, (a, b) = measure.run_case, (tmp_path / name for name in "ab")
    assert measure.measure([SMALL], ["ours"], "cpu", {a: None}, deadline=time.monotonic() - 1) == [SMALL]
    assert results.read(a).empty
    stopped = Mock(side_effect=[run(SMALL, ["torch"], "cpu", {}), KeyboardInterrupt])
    monkeypatch.setattr(measure, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure.measure([SMALL, FORWARD], ["ours"], "cpu", {b: None}, deadline=time.monotonic() + 600)
    assert set(results.read(b)["case"]) == {SMALL.name}


def test_what_hangs_or_dies_is_named_and_the_next_call_starts_another_process(monkeypatch):
    worker, poll = isolated.Worker(faulty_worker.hang_or_die, limit_s=1.0), Connection.poll
    # Only the call that hangs has a limit that can be exceeded, on any machine.
    limits = iter([None, None, 0.1, None, None, None])
    monkeypatch.setattr(Connection, "poll", lambda connection, _: poll(connection, next(limits)))
    for what, args in (("hangs", "hung: no sign for 1 s"), ("dies", "its process died, exit code 7")):
        with pytest.raises(isolated.ProviderFailed) as raised:
            worker(what)
        assert raised.value.args == (what, args)


def test_a_provider_that_fails_stops_no_other(monkeypatch):
    def run(case, names, device, failed):
        # First provider a fails, then the process at its start.
        raise isolated.ProviderFailed(*(("start", "died") if "a" in failed else ("a", "hung")))

    rows = measure.rows_of(SMALL, ["torch", "a", "b"], "cpu", run)
    assert [(row["status"], row["note"]) for row in rows] == [("failed", "died")] * 3
    monkeypatch.setitem(providers.PROVIDERS, "raises", Provider(faulty_worker.raise_))
    rows = measure.rows_of(SMALL, ["torch", "raises", "ours"], "cpu", measure.run_case)
    assert {row["provider"]: row["status"] for row in rows} == dict(raises="failed", torch="measured", ours="measured")
    assert rows[0]["note"] == "MemoryError: too large"


def test_who_cannot_be_captured_keeps_its_times_and_nobody_else_is_judged_without_it(monkeypatch):
    """The device "cpu:0" is not "cpu", so graphs are captured, and torch computes on it. Another process times the lost
    provider again, without the capture."""
    right = {name: Provider(torchs.plain, graphed=True) for name in ("torch", "ours")}
    for module in (providers, measure):
        monkeypatch.setattr(module, "PROVIDERS", right)

    def captured(call):
        if call.__self__.name == "torch":
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    for name, function in {"captured": captured, "peak_bytes": lambda *_: 0, "_sample": lambda *_: 1e-3}.items():
        monkeypatch.setattr(timing, name, function)
    for name in ("card_state", "provenance"):
        monkeypatch.setattr(results, name, lambda device: {})
    run = Mock(wraps=partial(measure.run_case, tell=(told := []).append))
    rows = measure.rows_of(SMALL, ["torch", "ours"], "cpu:0", run)
    assert told == ["torch", "torch (graph)", "torch", "ours", "ours (graph)", "all, timed in turn"]
    (lost,) = (row for row in rows if row["status"] != "measured")
    assert (lost["provider"], lost["graph"], lost["status"]) == ("torch", True, "failed")
    assert lost["note"] == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert {(row["provider"], row["graph"]) for row in rows if "speed" in row} == {
        ("torch", False), ("ours", False), ("ours", True)}  # fmt: skip


def test_the_commit_of_a_base_is_imported_in_a_process_of_its_own(monkeypatch, tmp_path):
    git, names = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"], ("gpu_lstm", "kernels")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for command in ("init -q", "add .", "commit -qm with", "rm -rq gpu_lstm", "commit -qm without"):
        subprocess.run([*git, *command.split()], check=True)
    monkeypatch.setattr(isolated, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no commit 'HEAD'"), isolated.checkout("HEAD"):
        pass
    with isolated.checkout("HEAD~1") as path, contextlib.closing(isolated.Worker(faulty_worker.found, path)) as worker:
        assert worker() == [str(path.parent / "tree" / name / "__init__.py") for name in names]
    assert not path.parent.exists()
    assert subprocess.check_output([*git, "worktree", "list"]).count(b"\n") == 1


def test_a_base_and_a_run_are_measured_in_turns_and_told_in_tables_and_ours_that_is_broken_now_is_a_failure(
    monkeypatch, tmp_path, capsys
):
    turns, out = [], tmp_path / "out"

    def worker(function, path):
        def run(*arguments):
            turns.append(path)
            factor = 1 if path else 2  # the weights of ours are wrong now
            build = lambda g: torchs.plain(replace(g, weights={n: factor * t for n, t in g.weights.items()}))  # noqa: E731
            monkeypatch.setitem(providers.PROVIDERS, "ours", Provider(build))
            return function(*arguments)

        run.close = lambda: None
        return run

    monkeypatch.setattr(measure, "Worker", worker)
    monkeypatch.setattr(command_line, "checkout", contextlib.nullcontext)
    assert command_line.main(["--device", "cpu", "--out", str(out), "--base", "a base"]) == 1
    assert turns == ["a base", None, None, "a base"]
    said = capsys.readouterr().out
    assert f"case 2 of 2: {FORWARD.name}\n" in said
    assert "regressions of gpu_lstm: 2," in said
    for name, status in (("base.csv", 0), ("results.csv", 1)):  # the same status as after a run without a base
        assert command_line.show(out / name) == status
        said = capsys.readouterr().out
        assert said.index("All providers") < said.index("gpu_lstm and torch.nn (")
        assert ("WRONG training-fp32" in said) == (status == 1)
    assert {path.suffix for path in out.iterdir()} == {".csv"}


@pytest.mark.parametrize(("error", "why"), [
    (OSError("no space"), "STOPPED benchmark: OSError: no space"),
    (None, f"no time was left for 2 cases: {SMALL.name}, {FORWARD.name}"),
])  # fmt: skip
def test_all_parts_of_bench_gpu_run_and_where_nothing_is_measured_a_run_ends_with_the_reason(
    capsys, tmp_path, monkeypatch, error, why
):
    """Queries of the device are stubbed. One test fails in each part."""

    def measured(chosen, names, device, sides, deadline=None):
        assert (chosen, names) == ([SMALL, FORWARD], None)
        results.create(*sides)
        if error is not None:
            raise error
        return chosen

    asked = Mock(return_value=("FAILED tests/a - 0.3\n1 failed", 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(gpu, "command", asked)
    monkeypatch.setenv("COLUMNS", "300")
    assert command_line.main(["gpu", "--out", str(tmp_path / "out")]) == 1
    *said, end = capsys.readouterr().out.splitlines()
    assert end == f"Nothing was measured: {tmp_path / 'out' / 'results.csv'} has no row. The reason is above."
    assert why in said
    lines = "FAILED tests/a - 0.3\nheadline: pytest ended with 1\nFAILED tests/a - 0.3\nfamilies: pytest ended with 1"
    assert lines in "\n".join(said)
    assert [call.args[0][0] for call in asked.mock_calls] == ["gpu_lstm", "pytest", "pytest", "pytest"]
    marks = r"^(@|pytestmark = )pytest\.mark\.gpu|^def .*host_or_card"
    marked = {path for path in (ROOT / "tests").glob("test_*.py") if re.search(marks, path.read_text(), re.MULTILINE)}
    words = [word for call in asked.mock_calls for word in call.args[0]]
    assert {word for word in words if word.startswith("tests/")} == {f"tests/{path.name}" for path in marked}
    assert set(gpu.OF_CUPY) <= set(asked.mock_calls[-1].args[0])
    asked.return_value = "FAILED tests/a - 0.3\n1 failed", None
    failures = gpu.tests("families", [], time.monotonic() - 1, tmp_path)
    assert failures == ["FAILED tests/a - 0.3", "STOPPED families: after 1 s; the last line was: 1 failed"]


def test_tests_that_run_out_of_time_say_why_others_failed_before_and_nothing_that_they_started_runs_on(
    tmp_path, monkeypatch, capsys, request
):
    """A worker of pytest, for example, may hold the card while the next part is timed. Here the worker holds a pipe. It
    ends even where interrupts are ignored, as behind a shell's "&". Meanwhile the screen shows the progress."""
    os.mkfifo(path := tmp_path / "pipe")
    wait, pipe = subprocess.Popen.wait, os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    (file := tmp_path / "test_kernels.py").write_text(f"""
import subprocess

def test_wrong():
    assert False, "the RMS error of h is 0.3"

def test_hangs():
    subprocess.run(["sh", "-c", "exec > {path}; echo begun; sleep 600"])
""")

    def once_it_has_begun(process, timeout=None):
        if timeout != gpu.EVERY_S:
            return wait(process, timeout)
        assert select.select([pipe], [], [], 600)[0]
        assert os.read(pipe, 9) == b"begun\n"
        raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_begun)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=partial(next, iter([0.0, 0.0, 600.0, 600.0]))))
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN)))
    said, code = gpu.command(["pytest", "-v", "-rfE", "-p", "no:cacheprovider", str(file)], 600.0, tmp_path / "log")
    assert code is None
    assert re.fullmatch(r"log, 600 s: 50% .*test_hangs ?\n", capsys.readouterr().out)
    assert re.search("(?m)^FAILED .*test_wrong - AssertionError: the RMS error of h is 0.3$", said)
    assert select.select([pipe], [], [], 600)[0]
    assert os.read(pipe, 9) == b"", "nobody can write any more"
    os.close(pipe)
