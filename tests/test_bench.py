"""The benchmark: cases, the check before the timing, results as files, other processes, the command line."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faulty_worker
import oracle
import pytest
import torch
from torch import nn

from bench import __main__ as command_line
from bench import cases, expected, gpu, inputs, isolated, measure, providers, report, results, timing
from bench.cases import Case
from bench.inputs import Inputs, results_in
from bench.providers import Provider, torch_lstm

ROOT = Path(__file__).parent.parent
SMALL = Case("training", "fp32", steps=5, batch=3, input_size=4, hidden_size=6)
FORWARD = replace(SMALL, mode="forward")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is timed is not what these tests are about."""
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    monkeypatch.setattr(timing, "SHORTEST", 1e-5)
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(timing, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(timing, "CEILING_SECONDS", 0.01)


# Cases.


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_case_has_a_name_of_its_own(kind):
    every = [case for group in cases.grid(kind).values() for case in group]
    assert len({case.name for case in every}) == len(set(every)) == len(every)
    assert cases.choose(kind, None) == every
    assert cases.choose(kind, ["step", every[0].name]) == [*cases.grid(kind)["step"], every[0]]


def test_operations_and_bytes_are_those_of_the_tensors():
    case = Case("forward", "bf16", steps=7, batch=2, input_size=3, hidden_size=4, layers=2, directions=2)
    parameters = list(nn.LSTM(3, 4, 2, bidirectional=True).parameters())
    assert case.operations() == 2 * 7 * 2 * sum(p.numel() for p in parameters if p.dim() == 2)
    assert case.bytes_moved() == 2 * (sum(p.numel() for p in parameters) + 7 * 2 * (3 + 8))
    training = replace(case, mode="training")
    assert training.operations() == 3 * case.operations()
    saved = 7 * 2 * 2 * 2 * 4  # T B L D H
    assert training.bytes_moved() == 2 * case.bytes_moved() + 2 * (2 * 4 * saved) + 2 * 4 * saved


# Inputs and their truth.


@pytest.mark.parametrize("changes", [{}, {"sequences": "ragged"}, {"reset_rate": 0.3},
                                     {"sequences": "packed", "reset_rate": 0.3}], ids=str)  # fmt: skip
@pytest.mark.parametrize("directions", [1, 2])
def test_the_truth_is_the_oracles(changes, directions):
    given = Inputs.of(replace(SMALL, directions=directions, **changes), "cpu")
    truth, outputs, dx = results_in(torch.float64, given), [], 0
    for d, suffix in enumerate(("", "_reverse")[:directions]):
        tensors = [given.xs[0], given.h0[d], given.c0[d], *(given.weights[f"{w}_l0{suffix}"] for w in inputs.WEIGHTS)]
        tensors = [tensor.double().numpy() for tensor in tensors]
        y, h_n, c_n, tape = oracle.layer(*tensors, lengths=given.lengths, resets=given.resets, reverse=d == 1)
        dy = given.dy[:, :, d * 6 : (d + 1) * 6].double().numpy()
        gradients = oracle.layer_gradients(*tensors, tape=tape, dh=dy, dh_n=0 * h_n, dc_n=0 * c_n)
        outputs.append(torch.from_numpy(y))
        dx = dx + gradients[0]
        found = {f"d{w}_l0{suffix}": truth[f"d{w}_l0{suffix}"] for w in inputs.WEIGHTS}
        found = [*(truth[name][d] for name in ("h_n", "c_n", "dh0", "dc0")), *found.values()]
        for value, true in zip(found, (h_n, c_n, *gradients[1:7])):
            torch.testing.assert_close(value, torch.from_numpy(true))
    torch.testing.assert_close(truth["output"], torch.cat(outputs, dim=2))
    torch.testing.assert_close(truth["dx"], torch.as_tensor(dx))


def test_inputs_that_would_stay_in_the_cache_are_several(monkeypatch):
    assert len(Inputs.of(SMALL, "cpu").xs) == inputs.MOST_SETS
    monkeypatch.setattr(inputs, "CACHE_BYTES", 1)
    assert len(Inputs.of(SMALL, "cpu").xs) == 1


# A case is timed only if it is right.


@pytest.mark.parametrize("changes", [{}, {"mode": "forward"}, {"sequences": "ragged"}, {"sequences": "packed"},
                                     {"reset_rate": 0.2}, {"layers": 2, "directions": 2}], ids=str)  # fmt: skip
def test_rows_have_figures_or_a_reason(changes, tmp_path):
    case = replace(SMALL, **changes)
    names = ["torch", "ours", "ours-cupy", "ours-reference", "torch-packed", "cell-loop", "cleanrl-loop"]
    rows = {row["provider"]: row for row in measure.run_case(case, names, "cpu", {})}
    assert set(rows) == set(names)
    for row in rows.values():
        assert (row["case"], row["steps"], row["schema"]) == (case.name, 5, results.SCHEMA)
        if row["status"] in results.TIMED:
            assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert 0 < row["speed_p20"] <= row["speed"] <= row["speed_p80"]
            moved, computed = (
                case.bytes_moved() / row["copy_bytes_per_s"],
                case.operations() / row["product_flops_per_s"],
            )
            assert row["bound_s"] == max(moved, computed)
            assert 0 < row["error"] <= 1
            assert (row["kept_bytes"] or 0) > 0 or not case.training
        else:
            assert row["status"] in ("absent", "unable")
            assert row["note"]
            assert "median_s" not in row
    assert rows["ours"]["status"] == rows["ours-reference"]["status"] == "measured"
    plain = case == case.plain() or case.sequences == "packed"
    assert rows["torch"]["status"] == ("measured" if plain else "yardstick")
    assert rows["torch"]["speed"] == rows["torch"]["speed_p20"] == 1


@pytest.mark.parametrize("fault", [*results_in(torch.float64, Inputs.of(SMALL, "cpu")), "nan", "shape", "missing"])
def test_a_provider_that_is_wrong_is_named_and_not_timed(monkeypatch, fault):
    def faulty(given):
        engine = torch_lstm.plain(given)

        def call(x, h0, c0):
            y, h_n, c_n = engine.call(x, h0, c0)
            for name, leaf in (("dx", x), ("dh0", h0), ("dc0", c0)):
                y = y + 1e-4 * (name == fault) * (leaf - leaf.detach()).sum()  # only the gradient is another
            y, h_n, c_n = y + 1e-5 * (fault == "output"), h_n + 1e-5 * (fault == "h_n"), c_n + 1e-5 * (fault == "c_n")
            return y, h_n[0] if fault == "shape" else h_n, c_n / (fault != "nan")

        def to_torch(gradients):
            named = {name: gradient * (1.0001 if f"d{name}" == fault else 1) for name, gradient in gradients.items()}
            return {name: each for name, each in named.items() if (name, fault) != ("bias_hh_l0", "missing")}

        return replace(engine, call=call, to_torch=to_torch)

    monkeypatch.setitem(providers.PROVIDERS, "faulty", Provider(faulty))
    rows = {row["provider"]: row for row in measure.run_case(SMALL, ["torch", "faulty"], "cpu", {})}
    assert rows["torch"]["status"] == "measured"
    assert rows["faulty"]["status"] == "wrong"
    assert "median_s" not in rows["faulty"]
    named = {"nan": "c_n", "shape": "h_n", "missing": "dbias_hh_l0"}.get(fault, fault)
    assert f"error of {named} is" in rows["faulty"]["note"]


@pytest.mark.parametrize(("error", "status"), [(1.9, "measured"), (2.1, "wrong")])
def test_at_most_twice_torchs_own_error_is_allowed(monkeypatch, error, status):
    true = results_in(torch.float64, Inputs.of(SMALL, "cpu"))
    cell, torchs = 1e-6, 2e-6  # relative errors of torch.lstm_cell and of torch.nn.LSTM, whichever is larger
    monkeypatch.setattr(measure, "results_in", lambda dtype, _: true if dtype == torch.float64 else off(cell))

    def off(by):
        return {name: result * (1 + by) for name, result in true.items()}

    gate, inputs_ = measure.Gate(), Inputs.of(SMALL, "cpu")
    trials = {"torch": measure.Trial("torch", inputs_), "ours": measure.Trial("ours", inputs_)}
    for (name, trial), by in zip(trials.items(), (torchs, error * torchs)):
        monkeypatch.setattr(trial, "results", lambda by=by: off(by))
        judged = gate.judge(trial)
    assert judged["status"] == status
    assert judged["error"] == pytest.approx(error / 2, rel=1e-6)


def test_torch_itself_is_held_to_its_cell(monkeypatch):
    trial = measure.Trial("torch", Inputs.of(SMALL, "cpu"))
    right = trial.results()
    monkeypatch.setattr(trial, "results", lambda: right | {"dx": right["dx"] * 1.0001})
    assert measure.Gate().judge(trial)["status"] == "wrong"


# Timing and memory.


def test_interleaved_rounds_tell_what_is_slower():
    calls = {"once": lambda number: time.sleep(0.001), "twice": lambda number: time.sleep(0.002)}
    taken = timing.interleaved(calls, "cpu", 0.1)
    (once, *_), (twice, *_) = (timing.percentiles(taken[name]) for name in calls)
    assert len(taken["once"]) == len(taken["twice"]) >= timing.ROUNDS[0]
    assert 1.5 < twice / once < 2.5


def test_each_round_has_an_order_of_its_own_and_calls_are_numbered():
    order, numbers = [], []
    calls = {name: lambda number, name=name: (order.append(name), numbers.append(number)) for name in "ab"}
    timing.interleaved(calls, "cpu", 0.0)
    assert numbers[: timing.WARM_UP] == list(range(timing.WARM_UP))
    assert "".join(order[2 * timing.WARM_UP :]).strip("ab") == ""
    changes = sum(a != b for a, b in zip(order[6:], order[7:]))
    assert 0 < changes < len(order[6:]) - 1  # neither one after the other, nor always in turn
    assert max(numbers) >= timing.ROUNDS[0] - 1


def test_percentiles_are_the_median_p20_and_p80():
    assert timing.percentiles(torch.arange(11.0).numpy()) == [5, 2, 8]


def test_bytes_kept_for_backward_count_each_storage_once():
    a, b = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)

    def forward():
        c = a @ b
        return (c * c) * c.T

    assert timing.kept_bytes(forward, [a, b]) == 2 * 400  # c, and the product of two


# Results as files.


@pytest.fixture
def row():
    return measure.run_case(SMALL, ["torch"], "cpu", {})[0]


def write(path, *rows):
    results.create(path)
    for each in rows:
        results.append(path, each)


def test_rows_come_back_as_they_were(tmp_path, row):
    strange = row | {"note": 'a "note", of\ntwo lines', "graph": True, "error": None, "kept_bytes": 0, "commit": "1e5"}
    write(tmp_path / "a.csv", row, strange)
    for found, given in zip(results.read(tmp_path / "a.csv").to_dict("records"), (row, strange), strict=True):
        for column, value in found.items():
            expected_ = given.get(column)
            assert value == (expected_.replace("\n", " ") if column == "note" and expected_ else expected_) or (
                value != value and expected_ is None
            ), column


def test_nothing_is_overwritten_and_no_column_is_made_up(tmp_path, row):
    write(tmp_path / "a.csv", row)
    with pytest.raises(FileExistsError):
        results.create(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="seconds"):
        results.append(tmp_path / "a.csv", row | {"seconds": 1})
    assert len(results.read(tmp_path / "a.csv")) == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [], "a.csv: No columns"),
        (lambda lines: ["no such file of results"], "a.csv: schema none"),
        (lambda lines: [lines[0], lines[1][: lines[1].rindex(",")] + ",99"], "a.csv: schema 99.*reads schema 2"),
        (lambda lines: [lines[0].replace("case", "cause"), lines[1]], r"other columns: \['case', 'cause'\]"),
        (lambda lines: [lines[0], lines[1], lines[1][:-2]], "a.csv: line 3 has no schema"),
        (lambda lines: [lines[0], lines[1], "", lines[1]], "a.csv: line 3 has no date"),
        (lambda lines: [lines[0], lines[1] + ",1"], "a.csv"),
        (lambda lines: [lines[0], lines[1].replace("False", "perhaps")], "a.csv: line 2 has no graph"),
        (lambda lines: [lines[0], lines[1].replace(",5,", ",five,", 1)], "a.csv: .*five"),
        (lambda lines: [lines[0], lines[1].replace("measured", "guessed")], "a.csv: line 2 has no status"),
    ],
    ids=["empty", "header", "schema", "column", "cut", "blank", "cells", "bool", "int", "status"],
)
def test_a_broken_file_is_named(tmp_path, row, damage, said):
    path = tmp_path / "a.csv"
    write(path, row)
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=said):
        results.read(path)


def test_provenance_names_the_versions(row):
    assert row["torch"] == torch.__version__
    assert row["device"].endswith(("thread", "threads"))
    assert row["cuda"] is row["driver"] is None


# Many cases, and other processes.


def test_a_stopped_run_keeps_what_it_has(tmp_path, monkeypatch):
    def stopped(case, *arguments):
        if case == FORWARD:
            raise KeyboardInterrupt
        return run_case(case, *arguments)

    run_case = measure.run_case
    monkeypatch.setattr(measure, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure.measure([SMALL, FORWARD], ["ours"], "cpu", {tmp_path / "a.csv": None})
    assert set(results.read(tmp_path / "a.csv")["case"]) == {SMALL.name}


def test_no_case_is_begun_after_the_deadline(tmp_path):
    file = tmp_path / "a.csv"
    assert measure.measure([SMALL], ["ours"], "cpu", {file: None}, deadline=time.monotonic() - 1) == [SMALL]
    assert results.read(file).empty
    assert measure.measure([FORWARD], ["ours"], "cpu", {tmp_path / "b.csv": None}, time.monotonic() + 60) == []


def test_in_the_headline_all_take_part_elsewhere_those_for_every_case():
    assert providers.taking_part(None, headline=True) == list(providers.PROVIDERS)
    elsewhere = providers.taking_part(None, headline=False)
    assert {"ours", "cleanrl-loop", "torchrl-pad"} <= set(elsewhere)
    assert not {"ours-reference", "cell-loop"} & set(elsewhere)
    assert providers.taking_part(["cell-loop"], headline=False) == ["torch", "cell-loop"]


def test_what_hangs_or_dies_is_named():
    for function, limit_s, said in ((faulty_worker.hang, 1.0, "hung: no sign for 1 s"),
                                    (faulty_worker.die, 60.0, "its process died, exit code 7")):  # fmt: skip
        worker = isolated.Worker(function, limit_s=limit_s)
        for _ in range(2):  # the second in a new process
            with pytest.raises(isolated.ProviderFailed) as raised:
                worker()
            assert raised.value.args == (f"{function.__name__}s", said)


def test_a_provider_that_fails_takes_no_other_along(monkeypatch):
    failures = {"a": "hung", "start": "died"}

    def run(case, names, device, failed):
        for name, text in failures.items():
            if name in (set(names) | {"start"}) - set(failed):
                raise isolated.ProviderFailed(name, text)
        return [{"failed": failed}]

    rows = measure.rows_of(SMALL, ["torch", "a", "b"], "cpu", run)
    assert {row["provider"]: (row["status"], row["note"]) for row in rows} == {
        "a": ("failed", "died"), "torch": ("failed", "died"), "b": ("failed", "died"),
    }  # fmt: skip
    del failures["start"]
    assert measure.rows_of(SMALL, ["torch", "a", "b"], "cpu", run) == [{"failed": {"a": "hung"}}]
    worker = isolated.Worker(faulty_worker.run_case)
    monkeypatch.setitem(providers.PROVIDERS, "raises", providers.PROVIDERS["torch"])
    try:
        rows = measure.rows_of(SMALL, ["torch", "raises", "ours"], "cpu", worker)
    finally:
        worker.close()
    assert {row["provider"]: row["status"] for row in rows} == {
        "raises": "failed", "torch": "measured", "ours": "measured",
    }  # fmt: skip
    assert rows[0]["note"] == "MemoryError: too large"


# Beside another commit.


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small one, with this gpu_lstm in its first commit and none in the second."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "gpu_lstm", root / "gpu_lstm", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "bench").mkdir()
    (root / "bench" / "__init__.py").write_text("raise ImportError('the benchmark is that of this checkout')")
    git("init", "-q", str(root))
    git("-C", str(root), "add", ".")
    commit = ["-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm"]
    git(*commit, "with")
    git("-C", str(root), "rm", "-rq", "gpu_lstm")
    git(*commit, "without")
    monkeypatch.setattr(isolated, "ROOT", root)
    return root


def test_a_commit_is_checked_out_beside_this_one_and_removed(repository, capsys):
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with isolated.checkout("HEAD~1") as path:
                if error is not None:
                    raise error
                found = isolated.Worker(faulty_worker.places, path)()
                tree = (path.parent / "tree").resolve()
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert not path.exists()
        assert len(git("-C", str(repository), "worktree", "list").splitlines()) == 1
    assert [Path(each) for each in found] == [
        tree / "gpu_lstm" / "__init__.py", tree / "kernels" / "__init__.py", ROOT / "bench" / "__init__.py",
    ]  # fmt: skip
    for unknown in ("HEAD", "no-such-commit"):  # the first has no gpu_lstm
        assert command_line.main(["--base", unknown, "--out", str(repository / "out")]) == 2
        assert f"no commit {unknown!r}" in capsys.readouterr().err
        assert len(git("-C", str(repository), "worktree", "list").splitlines()) == 1
    assert not (repository / "out").exists()


def test_what_is_slower_than_another_commit_is_told_and_nothing_else(monkeypatch, tmp_path, capsys):
    """Here 7 units take 2 ms longer than in the other commit, and 8 units are as they were."""
    for side, units in (("here", 7), ("there", 0)):
        shutil.copytree(ROOT / "gpu_lstm", tmp_path / side / "gpu_lstm", symlinks=True)
        path = tmp_path / side / "gpu_lstm" / "native.py"
        slow = f"    import time; time.sleep(0.002 * (h0.shape[2] == {units}))\n    exact = is_exact(c0, x)\n    hx"
        path.write_text(path.read_text().replace("    exact = is_exact(c0, x)\n    hx", slow))
        assert "sleep" in path.read_text()
    monkeypatch.syspath_prepend(tmp_path / "here")  # which new processes get, too; "there" goes before it
    monkeypatch.setattr(command_line, "checkout", lambda commit: contextlib.nullcontext(tmp_path / commit))
    monkeypatch.setattr(measure, "run_case", faulty_worker.run_case)
    sizes = [Case("forward", "fp32", 64, 8, 16, hidden) for hidden in (7, 8)]
    for module in (cases, measure):
        monkeypatch.setattr(module, "grid", lambda kind: {"headline": sizes})
    monkeypatch.setenv("COLUMNS", "120")
    assert command_line.main(["--base", "there", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "regressions of gpu_lstm: 1," in said
    (line,) = (line for line in said.splitlines() if " ours " in line)
    assert sizes[0].name in line and line.split()[-1] == "slower"  # noqa: PT018
    for file in ("base.csv", "results.csv"):
        assert list(results.read(tmp_path / "out" / file)["provider"]) == ["torch", "ours"] * 2


# What can be told without a GPU.


def test_what_is_expected_of_a_card():
    rows = {row["hidden_size"]: row for row in expected.rows(["h100"])}
    assert {row["status"] for row in rows.values()} == {"expected"}
    assert (rows[768]["note"], rows[768]["launches"]) == ("cooperative / cooperative", 2)
    assert rows[2048]["launches"] == 2 * 1024  # one a step
    assert all(row["host_s"] > 0 and row["expected_us_per_step"] > 0 and "median_s" not in row for row in rows.values())
    cells = 1024 * 16 * 768  # T B H
    assert rows[768]["kept_bytes"] == pytest.approx(cells * (4 * 2 + 4 + 2), rel=0.01)  # gates, float32 c, h


# The command line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "hiden"], "unknown case 'hiden'; known groups: headline"),
        (["--providers", "cudnn"], "invalid choice: 'cudnn' (choose from '?torch'?, '?ours"),
        (["--device", "cuda:77"], "invalid choice: 'cuda:77' (choose from '?cpu"),
        (["--expect", "h1000"], "invalid choice: 'h1000' (choose from '?h100"),
        (["--out", "."], "exists"),
        (["gpu", "--out", "a"], "there is no CUDA device here"),
        (["readme"], "a.csv: schema 1"),
        (["compare", "bench/results/a.csv", "bench/results/a.csv"], "a.csv: schema 1"),
        (["compare", "none.csv", "none.csv"], "none.csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_with_what_is_known(capsys, monkeypatch, tmp_path, arguments, said):
    if torch.cuda.is_available() and "CUDA" in said:
        pytest.skip("there is a GPU")
    text = f"{report.BEGIN}\nb\n{report.END}\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "a.csv").write_text("schema,date\n1,now\n")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        status = command_line.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert re.search(re.escape(said).replace("'\\?", "'?"), capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "bench"}
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("wrong", [False, True])
def test_a_run_ends_with_the_table_and_fails_where_ours_is_wrong(capsys, tmp_path, monkeypatch, wrong):
    for module in (cases, measure):
        monkeypatch.setattr(module, "grid", lambda kind: {"headline": [SMALL, FORWARD]})
    if wrong:
        monkeypatch.setattr(torch.nn.modules.rnn.RNNBase, "state_dict", None, raising=False)
        broken = replace(providers.PROVIDERS["ours"], build=_twice_the_output)
        monkeypatch.setitem(providers.PROVIDERS, "ours", broken)
    out = tmp_path / "a"
    assert command_line.main(["--device", "cpu", "--cases", "headline", "--out", str(out)]) == wrong
    said = capsys.readouterr().out
    assert said.index("All providers") < said.index("gpu_lstm and torch.nn.LSTM")
    assert ("WRONG" in said) == wrong
    assert set(results.read(out / "results.csv")["provider"]) == set(providers.PROVIDERS)


def _twice_the_output(given):
    engine = torch_lstm.plain(given)
    return replace(engine, call=lambda *leaves: [2 * result for result in engine.call(*leaves)])


def test_bench_gpu_rehearsed_on_a_cpu(capsys, tmp_path, monkeypatch):
    """All parts in their order; what would ask the device is stubbed, and one test fails."""
    for module in (cases, measure):
        monkeypatch.setattr(module, "grid", lambda kind: {"headline": [SMALL]})
    asked, said = [], ["gpu_lstm 0.1.0", "FAILED tests/test_gpu.py::test_b - AssertionError\n1 failed, 1 passed in 3 s"]
    codes = [0, 1]

    def command(module, limit_s, log):
        asked.append((module, limit_s))
        return said[len(asked) - 1], codes[len(asked) - 1]

    monkeypatch.setattr(gpu, "command", command)
    assert gpu.run(minutes=1.0, out=tmp_path, device="cpu") == 2
    assert [module[0] for module, _ in asked] == ["gpu_lstm", "pytest"]
    assert {"--require-gpu", "gpu"} <= set(asked[1][0])
    assert asked[1][1] == 60 * gpu.TESTS_SHARE
    printed = capsys.readouterr().out
    assert printed.index("gpu_lstm 0.1.0") < printed.index("FAILED tests/test_gpu.py::test_b")
    assert "pytest ended with 1" in printed
    assert set(results.read(tmp_path / "results.csv")["provider"]) == set(providers.PROVIDERS)
    (tmp_path / "results.csv").unlink()
    asked.clear()
    codes[:] = 0, None
    said[1] = ""
    assert gpu.run(minutes=0.2, out=tmp_path, device="cpu") == 1  # for the tests; no time is left for the grid
    assert "HUNG" in (printed := capsys.readouterr().out)
    assert f"no time was left for 1 cases: {SMALL.name}" in printed


def test_a_command_that_hangs_is_stopped(tmp_path):
    (tmp_path / "slow.py").write_text("print(1, flush=True); import time; time.sleep(60)")
    start = time.monotonic()
    assert gpu.command(["runpy", str(tmp_path / "slow.py")], 0.5, tmp_path / "log")[1] is None
    assert gpu.command(["platform"], 60.0, tmp_path / "log")[1] == 0
    assert time.monotonic() - start < 30


def test_the_module_runs_as_a_program():
    said = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0
    assert {"compare", "gpu", "ppo", "readme", "--cases", "--providers", "--base"} <= set(
        re.split(r"[\s,\[]+", said.stdout)
    )
