"""The benchmark: cases, the check before the timing, results as files, other processes, the command line."""

import contextlib
import itertools
import os
import re
import select
import shutil
import subprocess
import time
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import faulty_worker
import numpy as np
import oracle
import pytest
import torch
from installed import ROOT
from torch import nn

from bench import __main__ as command_line
from bench import cases, gpu, inputs, isolated, measure, providers, results, timing
from bench.cases import Case
from bench.inputs import Inputs, results_in
from bench.providers import Provider, torchs
from gpu_lstm.call.weights import NAMES

SMALL = Case("training", "fp32", steps=5, batch=3, input_size=4, hidden_size=6)
FORWARD = replace(SMALL, mode="forward")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A grid of two small cases, since these tests are not about the times."""
    for module in (cases, measure):
        monkeypatch.setattr(module, "grid", lambda kind: {"headline": [SMALL, FORWARD]})
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    for name, value in {"SHORTEST": 1e-5, "COPY_BYTES": {"cpu": 1 << 20}, "PRODUCT_SIZE": {"cpu": 64},
                        "CEILING_SECONDS": 0.01}.items():  # fmt: skip
        monkeypatch.setattr(timing, name, value)


def run_case(case, *names):
    return {row["provider"]: row for row in measure.run_case(case, list(names), "cpu", {})}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_case_has_a_name_of_its_own(monkeypatch, kind):
    monkeypatch.undo()
    grid = cases.grid(kind)
    every = [case for group in grid.values() for case in group]
    assert len({case.name for case in every}) == len(set(every)) == len(every)
    assert cases.choose(kind, None) == every
    assert cases.choose(kind, ["step", every[0].name]) == [*grid["step"], every[0]]
    assert list(grid)[:2] == ["headline", "rl"]


def test_operations_and_bytes_are_those_of_the_tensors():
    case = Case("forward", "bf16", steps=7, batch=2, input_size=3, hidden_size=4, layers=2, directions=2)
    parameters, training = list(nn.LSTM(3, 4, 2, bidirectional=True).parameters()), replace(case, mode="training")
    assert case.operations() == 2 * 7 * 2 * sum(p.numel() for p in parameters if p.dim() == 2)
    assert case.bytes_moved() == 2 * (sum(p.numel() for p in parameters) + 7 * 2 * (3 + 8))
    assert training.operations() == 3 * case.operations()
    saved = 7 * 2 * 2 * 2 * 4  # T B L D H
    assert training.bytes_moved() == 2 * case.bytes_moved() + 2 * (2 * 4 * saved) + 2 * 4 * saved


@pytest.mark.parametrize("changes", [
    {"sequences": "packed", "reset_rate": 0.3}, {"steps": 1, "batch": 16, "sequences": "active"},
    {"reset_rate": 0.3, "variant": "reset_states"}, *({"sequences": "ragged", "variant": n} for n in cases.VARIANTS),
], ids=str)  # fmt: skip
def test_the_truth_is_the_oracles(changes):
    given, noises = Inputs.of(replace(SMALL, directions=2, **changes), "cpu"), []
    torch.manual_seed(inputs.NOISE_SEED)
    for d in range(2):
        noise = dict(zip(("reset_h", "reset_c"), (each[d] for each in given.reset_states or ())))
        if given.case.variant == "recurrent_dropout":
            noise["dropout_h"] = nn.functional.dropout(torch.ones(3, 6), 0.25)
        elif given.case.variant == "zoneout":
            noise |= {name: torch.rand(5, 3, 6) < 0.1 for name in ("zoneout_h", "zoneout_c")}
        noises.append({name: t.double().numpy() for name, t in noise.items()})
    assert given.case.sequences != "active" or set(given.lengths.tolist()) == {0, 1}
    x, h0, c0, dy = (t.double().numpy() for t in (given.x, given.h0, given.c0, given.dy))
    weights = {name: t.double().numpy() for name, t in given.weights.items()}
    names = [[f"{kind}_l0{suffix}" for kind in NAMES] for suffix in ("", "_reverse")]
    layer = [[weights.get(name) for name in row] for row in names]
    ragged = dict(lengths=given.lengths, resets=given.resets, noises=[noises])
    y, (finals,), tapes = oracle.stack(x, [list(zip(h0, c0))], [layer], **ragged)
    dx, (dstates,), (dweights,), _ = oracle.stack_gradients(tapes, dy, [[(0 * h, 0 * c) for h, c in finals]])
    true = dict(zip(("output", "h_n", "c_n"), (y, *map(np.stack, zip(*finals)))))
    true |= zip(("dx", "dh0", "dc0"), (dx, *map(np.stack, zip(*dstates))))
    true |= {f"d{name}": d for row, ds in zip(names, dweights) for name, d in zip(row, ds) if d is not None}
    found = results_in(torch.float64, given)
    assert found.keys() == true.keys()
    for name, value in true.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("changes", [
    {}, {"sequences": "packed"}, {"reset_rate": 0.2}, {"reset_rate": 0.2, "variant": "reset_states"},
    {"mode": "step", "steps": 1, "sequences": "active"}, {"sequences": "ragged", "variant": "zoneout"},
], ids=str)  # fmt: skip
def test_rows_have_figures_or_a_reason(changes):
    case = replace(SMALL, **changes)
    rows = run_case(case, "torch", "ours", "ours-cupy", "ours-reference", "torch-packed", "cell-loop", "cleanrl-loop",
                    "rl_games-pieces", "rsl_rl-padded")  # fmt: skip
    assert len(rows) == 9
    for row in rows.values():
        assert (row["case"], row["steps"], row["schema"]) == (case.name, case.steps, results.SCHEMA)
        if row["status"] not in results.TIMED:
            assert (row["status"] in ("absent", "unable"), bool(row["note"]), "median_s" in row) == (True, True, False)
            continue
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert 0 < row["speed_p20"] <= row["speed"] <= row["speed_p80"]
        assert 0 < row["over_ours_low"] <= row["over_ours"] <= row["over_ours_high"]
        moved, computed = case.bytes_moved() / row["copy_bytes_per_s"], case.operations() / row["product_flops_per_s"]
        assert (row["bound_s"], 0 < row["error"] <= 1) == (max(moved, computed), True)
        assert row.get("kept_bytes", 0) > 0 or not case.training
    assert rows["ours"]["status"] == rows["ours-reference"]["status"] == "measured"
    plain = case == case.plain() or case.sequences == "packed"
    assert rows["torch"]["status"] == ("measured" if plain else "yardstick")
    assert rows["torch"]["speed"] == rows["torch"]["speed_p20"] == rows["ours"]["over_ours_high"] == 1
    assert (rows["rsl_rl-padded"]["note"] == "without the last states") == (changes == {"reset_rate": 0.2})


def test_speeds_are_over_the_faster_yardstick_and_nobody_else_has_weights_copied(monkeypatch):
    def copying(given):
        engine = torchs.plain(given)
        call = engine.call

        def warn(*arguments):
            warnings.warn(f"{measure.COPIES}. This means they need to be compacted at every call", stacklevel=1)
            return call(*arguments)

        return replace(engine, call=warn)

    for name, build in {"torch": copying, "torch-flat": torchs.plain, "copying": copying}.items():
        monkeypatch.setitem(providers.PROVIDERS, name, Provider(build))
    took = {"torch": 4.0, "torch-flat": 2.0, "ours": 1.0}
    taken = lambda calls, *_: {each: np.full(9, took.get(each[0], 1.0)) for each in calls}  # noqa: E731
    monkeypatch.setattr(timing, "interleaved", taken)
    with warnings.catch_warnings(record=True):
        rows = run_case(SMALL, *took, "copying")
        took["torch"] = 1.0
        assert run_case(SMALL, *took)["ours"]["speed"] == 1
    assert [rows[name]["speed"] for name in took] == [0.5, 1.0, 2.0]
    assert (rows["copying"]["status"], "median_s" in rows["copying"]) == ("unable", False)
    assert "not part of single contiguous chunk" in rows["copying"]["note"]


@pytest.mark.parametrize("fault", [*results_in(torch.float64, Inputs.of(SMALL, "cpu")), "nan", "shape", "missing"])
def test_a_provider_that_is_wrong_is_named_and_not_timed(monkeypatch, fault):
    def faulty(given):
        engine = torchs.plain(given)

        def call(x, state):
            y, (h_n, c_n) = engine.call(x, state)
            for name, leaf in zip(("dx", "dh0", "dc0"), (x, *state)):
                y = y + 1e-4 * (name == fault) * (leaf - leaf.detach()).sum()  # only the gradient is another
            y, h_n, c_n = y + 1e-5 * (fault == "output"), h_n + 1e-5 * (fault == "h_n"), c_n + 1e-5 * (fault == "c_n")
            return y, (h_n[0] if fault == "shape" else h_n, c_n / (fault != "nan"))

        def to_torch(gradients):
            named = {name: gradient * (1.0001 if f"d{name}" == fault else 1) for name, gradient in gradients.items()}
            return {name: each for name, each in named.items() if (name, fault) != ("bias_hh_l0", "missing")}

        return replace(engine, call=call, to_torch=to_torch)

    monkeypatch.setitem(providers.PROVIDERS, "faulty", Provider(faulty))
    rows = run_case(SMALL, "torch", "faulty")
    assert (rows["torch"]["status"], rows["faulty"]["status"]) == ("measured", "wrong")
    assert "median_s" not in rows["faulty"]
    named = {"nan": "c_n", "shape": "h_n", "missing": "dbias_hh_l0"}.get(fault, fault)
    assert f"error of {named} is" in rows["faulty"]["note"]


@pytest.mark.parametrize(("error", "status"), [(1.9, "measured"), (2.1, "wrong")])
def test_at_most_twice_torchs_own_error_is_allowed_which_is_compared_with_its_cells(monkeypatch, error, status):
    given = Inputs.of(SMALL, "cpu")
    true, trials = results_in(torch.float64, given), [measure.Trial(name, given) for name in ("torch", "ours")]

    def off(by):
        return {name: result * (1 + by) for name, result in true.items()}

    monkeypatch.setattr(measure, "results_in", lambda dtype, _: true if dtype == torch.float64 else off(1e-6))
    for theirs, expected_ in ((1.01 * measure.SANITY * 1e-6, "wrong"), (2e-6, "measured")):  # of torch.lstm_cell's 1e-6
        gate, (torch_, ours) = measure.Gate(), trials
        monkeypatch.setattr(torch_, "results", lambda by=theirs: off(by))
        assert gate.judge(torch_)["status"] == expected_
        allowed = 2e-6 if expected_ == "measured" else 1e-6  # what is wrong is no measure
        monkeypatch.setattr(ours, "results", lambda by=error * allowed: off(by))
        judged = gate.judge(ours)
        assert (judged["status"], judged["error"]) == (status, pytest.approx(error / 2, rel=1e-6))


def test_interleaved_rounds_run_all_each_in_an_order_of_its_own(monkeypatch):
    order, clock, takes = [], [0.0], {"a": 0.001, "b": 0.002}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name):
        order.append(name)
        clock[0] += takes[name]

    taken = timing.interleaved({name: partial(call, name) for name in takes}, "cpu", 0.1)
    for name, seconds in takes.items():
        assert timing.percentiles(taken[name]) == pytest.approx([seconds] * 3)
        assert len(taken[name]) == 32  # 0.1 s of 3 ms, and even
    assert "".join(order[:6]) == "aaabbb"  # warmed up
    rounds = ["".join(pair) for pair in zip(order[6::2], order[7::2], strict=True)]
    assert set(rounds[::2]) == {"ab", "ba"}
    assert [pair[::-1] for pair in rounds[::2]] == rounds[1::2]  # each is first equally often
    assert timing.percentiles(np.arange(11.0)) == [5, 2, 8]
    assert timing.interleaved({}, "cpu", 0.1) == {}


def test_the_interval_of_a_median_has_the_true_one_as_often_as_is_said():
    rounds = np.random.default_rng(1).lognormal(size=(300, 40))  # whose median is 1
    middles, lows, highs = np.transpose([timing.bootstrapped(values) for values in rounds])
    assert (middles == np.median(rounds, axis=1)).all()
    assert 0.91 <= np.mean((lows <= 1) & (highs >= 1)) <= 0.985


def test_bytes_saved_for_backward_count_each_storage_once():
    a, b = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    c = a @ b
    assert timing.kept_bytes(lambda: (c * c) * c.T, [a, b]) == 2 * 400  # c, and the product of two


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
        assert found == given | {"note": given["note"] and 'a "note", of two lines', "commit": given["commit"] or None}
    assert (row["torch"], row["cuda"], row["driver"]) == (torch.__version__, None, None)
    assert row["device"].endswith((", 1 thread", " threads"))


@pytest.mark.parametrize(("damage", "said"), {
    "schema": (lambda header, row: [header, row[: row.rindex(",")] + ",99"], "a.csv: schema 99.*reads schema 5"),
    "column": (lambda header, row: [header.replace("case", "cause"), row], r"other columns: \['case', 'cause'\]"),
    "cut": (lambda header, row: [header, row, row[:-2]], "a.csv: line 3 has no schema"),
    "blank": (lambda header, row: [header, row, "", row], "a.csv: line 3 has no date"),
    "bool": (lambda header, row: [header, row.replace("False", "perhaps")], "a.csv: line 2 has no graph"),
    "int": (lambda header, row: [header, row.replace(",5,", ",five,", 1)], "a.csv: .*five"),
    "status": (lambda header, row: [header, row.replace("measured", "guessed")], "a.csv: line 2 has no status"),
    "NUL": (lambda header, row: [header, row.replace("fp32", "fp\0")], "a.csv: it holds NUL bytes; expected what"),
}.values())  # fmt: skip
def test_a_broken_file_is_named(tmp_path, row, damage, said):
    path = write(tmp_path / "a.csv", row)
    path.write_text("\n".join(damage(*path.read_text().splitlines())))
    with pytest.raises(ValueError, match=said):
        results.read(path)


@pytest.mark.parametrize(("said", "found"), [
    ("1980, 54", {"sm_mhz": "1980", "celsius": "54"}), ("[N/A], 54", {"celsius": "54"}), ("", {}),
])  # fmt: skip
def test_clock_and_temperature_are_those_of_the_card_or_left_out(monkeypatch, said, found):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"id of {device}"))
    monkeypatch.setattr(results, "_output", lambda *command: asked.append(command) or said)
    assert (results.card_state("cpu"), results.card_state("cuda:1")) == ({}, found)
    assert {"nvidia-smi", "--id=GPU-id of cuda:1"} <= set(asked[0])


def test_a_stopped_run_keeps_what_it_has_and_no_case_is_begun_after_the_deadline(tmp_path, monkeypatch):
    run, (a, b) = measure.run_case, (tmp_path / name for name in "ab")
    assert measure.measure([SMALL], ["ours"], "cpu", {a: None}, deadline=time.monotonic() - 1) == [SMALL]
    assert results.read(a).empty
    stopped = Mock(side_effect=[run(SMALL, ["torch"], "cpu", {}), KeyboardInterrupt])
    monkeypatch.setattr(measure, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure.measure([SMALL, FORWARD], ["ours"], "cpu", {b: None}, deadline=time.monotonic() + 600)
    assert set(results.read(b)["case"]) == {SMALL.name}


def test_what_hangs_or_dies_is_named_and_the_next_call_starts_another_process():
    worker = isolated.Worker(faulty_worker.hang_or_die, limit_s=1.0)
    for what, args in (("hangs", "hung: no sign for 1 s"), ("dies", "its process died, exit code 7")):
        with pytest.raises(isolated.ProviderFailed) as raised:
            worker(what)
        assert raised.value.args == (what, args)


def test_a_provider_that_fails_stops_no_other(monkeypatch):
    def run(case, names, device, failed):
        raise isolated.ProviderFailed(*(("start", "died") if "a" in failed else ("a", "hung")))  # nobody's; one's

    rows = measure.rows_of(SMALL, ["torch", "a", "b"], "cpu", run)
    assert [(row["status"], row["note"]) for row in rows] == [("failed", "died")] * 3
    monkeypatch.setitem(providers.PROVIDERS, "raises", Provider(faulty_worker.raise_))
    rows = measure.rows_of(SMALL, ["torch", "raises", "ours"], "cpu", measure.run_case)
    assert {row["provider"]: row["status"] for row in rows} == dict(raises="failed", torch="measured", ours="measured")
    assert rows[0]["note"] == "MemoryError: too large"


TWICE = """
_forward = LSTM.forward
def _twice(self, *arguments, **options):
    output, state = _forward(self, *arguments, **options)
    return 2 * output, state
LSTM.forward = _twice
"""


def test_base_measures_both_commits_in_turns_and_fails_where_ours_is_broken_now(monkeypatch, tmp_path, capsys):
    """Of a repository the first commit is right, the second has no gpu_lstm; here the LSTM returns twice its output."""

    def git(*arguments):
        command = ["git", "-C", str(there), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    for path, folder in itertools.product((here, there), ("gpu_lstm", "kernels")):
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    (here / "gpu_lstm" / "kernels").symlink_to(here / "kernels")
    (there / "bench.py").write_text("raise ImportError('the benchmark is that of this checkout')")
    for command in ("init -q", "add .", "commit -qm with", "rm -rq gpu_lstm", "commit -qm without"):
        git(*command.split())
    with (here / "gpu_lstm" / "__init__.py").open("a") as file:
        file.write(TWICE)
    monkeypatch.setattr(isolated, "ROOT", there)
    with contextlib.suppress(KeyboardInterrupt), isolated.checkout("HEAD~1") as path:
        assert (path.parent / "tree" / "kernels").is_dir()
        raise KeyboardInterrupt
    assert not path.parent.exists()

    monkeypatch.syspath_prepend(here)  # which new processes get, too; the other commit goes before it
    monkeypatch.setattr(measure, "run_case", faulty_worker.run_case)
    command = ["--device", "cpu", "--out", str(out)]
    assert command_line.main([*command, "--base", "HEAD"]) == 2
    assert "no commit 'HEAD'" in capsys.readouterr().err
    assert not out.exists()
    assert command_line.main([*command, "--base", "HEAD~1"]) == 1
    assert "regressions of gpu_lstm: 2," in capsys.readouterr().out
    for name, status in (("base", "measured"), ("results", "wrong")):
        rows = results.read(out / f"{name}.csv")
        statuses = {"torch": "measured", "torch-flat": "unable", "ours": status}
        assert dict(zip(rows["provider"], rows["status"])) == statuses
    assert len(git("worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_run_ends_with_the_table_and_fails_where_ours_is_wrong(capsys, tmp_path, monkeypatch, wrong):
    def build(given):
        return torchs.plain(replace(given, weights={k: (1 + wrong) * t for k, t in given.weights.items()}))

    monkeypatch.setitem(providers.PROVIDERS, "ours", replace(providers.PROVIDERS["ours"], build=build))
    options = "--device cpu --cases headline --providers ours cell-loop --out"
    assert command_line.main([*options.split(), str(tmp_path / "a")]) == wrong
    said = capsys.readouterr().out
    assert said.index("All providers") < said.index("gpu_lstm and torch.nn.LSTM")
    assert ("WRONG training-fp32" in said) == wrong
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".csv"}


def test_bench_gpu_rehearsed_on_a_cpu(capsys, tmp_path, monkeypatch):
    """All parts in their order; queries of the device are stubbed. One test fails; then all hang."""
    asked = []
    for name in set(providers.PROVIDERS) - {"torch", "ours", "cell-loop"}:
        monkeypatch.setitem(providers.PROVIDERS, name, Provider(torchs.plain, lambda device: "slow"))
    failed = "FAILED tests/test_gpu.py::test_b - AssertionError\n1 failed, 1 passed in 3 s", 1
    hung = "tests/test_gpu.py::test_a PASSED\ntests/test_gpu.py::test_b", None
    counted = ["1 passed and 0 failed before; the last line was: tests/test_gpu.py::test_b"]
    ended = ["FAILED tests/test_gpu", "pytest ended with 1"]
    for said, minutes, lines in ((failed, 1.0, ended), (hung, 0.2, counted)):
        answers = iter([("gpu_lstm 0.1.0", 0), *[said] * 3])
        monkeypatch.setattr(gpu, "command", lambda *asking, answers=answers: asked.append(asking) or next(answers))
        (out := tmp_path / str(minutes)).mkdir()
        assert gpu.run(minutes, out, device="cpu") == 3 * len(lines)
        printed = capsys.readouterr().out
        assert all(printed.index("gpu_lstm 0.1.0") < printed.index(line) for line in lines)
        assert all(printed.count(line) == 3 for line in lines)
        found = set(results.read(out / "results.csv")["provider"])
        assert found == (set(providers.PROVIDERS) if minutes == 1.0 else set())  # in the headline all take part
        assert (f"no time was left for 2 cases: {SMALL.name}, {FORWARD.name}" in printed) == (not found)
    assert [asking[0][0] for asking in asked] == ["gpu_lstm", "pytest", "pytest", "pytest"] * 2
    _, headline, families, cupy = (asking[0] for asking in asked[:4])
    assert headline[-4:] == ["tests/test_gpu.py", "tests/test_hog.py", "-k", "headline or hog"]
    assert re.findall(r"def (test_\w*headline\w*)", (ROOT / "tests/test_gpu.py").read_text()) == ["test_the_headline"]
    assert "not headline" in families
    marks = r"^(@|pytestmark = )pytest\.mark\.gpu|^def .*host_or_card"
    marked = {path for path in (ROOT / "tests").glob("test_*.py") if re.search(marks, path.read_text(), re.MULTILINE)}
    ran = {word for word in (*headline, *families, *cupy) if word.startswith("tests/")}
    assert ran == {f"tests/{path.name}" for path in marked}
    assert all({"--require-gpu", "gpu"} <= set(words) for words in (headline, families, cupy))
    assert asked[1][1] == pytest.approx(gpu.HEADLINE[2] * 40, abs=1)
    families_s = (gpu.FAMILIES[2] - gpu.HEADLINE[2]) * (60 * 8 - 20)
    assert families_s > 180, "some hundred kernels of several seconds each, in four processes"
    assert all(asking[1] >= 1 for asking in asked)


def test_elsewhere_those_for_every_case_take_part_and_a_command_that_hangs_is_stopped(tmp_path):
    elsewhere = "torch torch-flat torch-packed cleanrl-loop rl_games-pieces rsl_rl-padded ours ours-stream torchrl-pad"
    assert providers.taking_part(None, headline=False) == [*elsewhere.split(), "torchrl-triton"]
    assert providers.taking_part(["cell-loop"], headline=False) == ["torch", "torch-flat", "cell-loop"]
    assert gpu.command(["timeit", "-n", "1", "import time; time.sleep(600)"], 0.5, tmp_path / "log")[1] is None
    assert gpu.command(["platform"], 60.0, tmp_path / "log")[1] == 0


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("", 1), KeyboardInterrupt()], ids=["limit", "user"])
def test_what_a_stopped_command_has_started_is_stopped_too(tmp_path, monkeypatch, error):
    """As pytest's workers, one of which may hold the card beside what is timed next. Here it holds a pipe."""
    os.mkfifo(path := tmp_path / "pipe")
    wait, pipe = subprocess.Popen.wait, os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def once_it_has_begun(process, timeout=None):
        if timeout is None:
            return wait(process)
        assert select.select([pipe], [], [], 60)[0]
        assert os.read(pipe, 9) == b"begun\n"
        raise error

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_begun)
    code = f"import subprocess; subprocess.run(['sh', '-c', 'exec > {path}; echo begun; sleep 600'])"
    with contextlib.suppress(KeyboardInterrupt):
        gpu.command(["timeit", "-n", "1", code], 600.0, tmp_path / "log")
    assert select.select([pipe], [], [], 20)[0]
    assert os.read(pipe, 9) == b"", "nobody can write any more"
    os.close(pipe)
