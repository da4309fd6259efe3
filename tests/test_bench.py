"""The benchmark: cases, results as files, the check before the timing, isolation, the command line."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faulty_worker
import oracle
import pytest
import torch
from torch import nn

from bench import __main__ as command_line
from bench import cases, gpu, grid, host, isolated, problem, providers, results, run, timing
from bench.cases import Case
from bench.problem import Problem, results_in
from bench.providers import torch_lstm

SMALL = Case("training", "fp32", steps=5, batch=3, inputs=4, hidden=6)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is timed is not what these tests are about."""
    monkeypatch.setattr(run, "SECONDS", 0.01)
    monkeypatch.setattr(timing, "SHORTEST", 1e-5)
    monkeypatch.setattr(run.ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(run.ceilings, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(run.ceilings, "SECONDS", 0.01)


# Cases.


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_case_has_a_name_of_its_own(kind):
    every = [case for group in cases.grid(kind).values() for case in group]
    assert len({case.name for case in every}) == len(set(every)) == len(every)
    assert cases.choose(kind, None) == every
    assert cases.choose(kind, ["step", every[0].name]) == [*cases.grid(kind)["step"], every[0]]


def test_an_unknown_case_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown case 'hiden'; known groups: headline, hidden, .*; known cases: trai"
    ):
        cases.choose("cpu", ["headline", "hiden"])


def test_operations_and_bytes_are_those_of_the_tensors():
    case = Case("forward", "bf16", steps=7, batch=2, inputs=3, hidden=4, layers=2, directions=2)
    lstm = nn.LSTM(3, 4, 2, bidirectional=True)
    matrices = sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
    assert case.operations() == 2 * 7 * 2 * matrices
    parameters = sum(p.numel() for p in lstm.parameters())
    assert case.bytes_moved() == 2 * (parameters + 7 * 2 * (3 + 8))
    training = dataclasses.replace(case, run="training")
    assert training.operations() == 3 * case.operations()
    saved = 7 * 2 * 2 * 2 * 4  # T B L D H
    assert training.bytes_moved() == 2 * case.bytes_moved() + 2 * (2 * 4 * saved) + 2 * 4 * saved


# Problems and their truth.


@pytest.mark.parametrize("changes", [{}, {"sequences": "ragged"}, {"reset_rate": 0.3},
                                     {"sequences": "packed", "reset_rate": 0.3}], ids=str)  # fmt: skip
@pytest.mark.parametrize("directions", [1, 2])
def test_the_truth_is_the_oracles(changes, directions):
    given = Problem.of(dataclasses.replace(SMALL, directions=directions, **changes), "cpu")
    truth = results_in(torch.float64, given)
    h, tapes = [], []
    for d, suffix in enumerate(("", "_reverse")[:directions]):
        weights = [given.weights[f"{w}_l0{suffix}"].double().numpy()
                   for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
        inputs = [given.xs[0].double().numpy(), given.h0[d].double().numpy(), given.c0[d].double().numpy(), *weights]
        y, h_n, c_n, tape = oracle.layer(*inputs, lengths=given.lengths, resets=given.resets, reverse=d == 1)
        h.append(torch.from_numpy(y))
        tapes.append((inputs, tape, h_n, c_n))
        torch.testing.assert_close(truth["h_n"][d], torch.from_numpy(h_n))
        torch.testing.assert_close(truth["c_n"][d], torch.from_numpy(c_n))
    torch.testing.assert_close(truth["output"], torch.cat(h, dim=2))
    dx = 0
    for d, (inputs, tape, h_n, c_n) in enumerate(tapes):
        dy = given.dy[:, :, d * 6 : (d + 1) * 6].double().numpy()
        gradients = oracle.layer_gradients(*inputs, tape=tape, dh=dy, dh_n=0 * h_n, dc_n=0 * c_n)
        dx = dx + gradients[0]
        names = [f"d{w}_l0{('', '_reverse')[d]}" for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        for name, gradient in zip(names, gradients[3:7]):
            torch.testing.assert_close(truth[name], torch.from_numpy(gradient))
        torch.testing.assert_close(truth["dh0"][d], torch.from_numpy(gradients[1]))
        torch.testing.assert_close(truth["dc0"][d], torch.from_numpy(gradients[2]))
    torch.testing.assert_close(truth["dx"], torch.as_tensor(dx))


def test_inputs_that_would_stay_in_the_cache_are_several(monkeypatch):
    assert len(Problem.of(SMALL, "cpu").xs) == problem.MOST_SETS
    monkeypatch.setattr(problem, "CACHE_BYTES", 1)
    assert len(Problem.of(SMALL, "cpu").xs) == 1


# A case is timed only if it is right.


@pytest.mark.parametrize("changes", [{}, {"run": "forward"}, {"sequences": "ragged"}, {"sequences": "packed"},
                                     {"reset_rate": 0.2}, {"layers": 2, "directions": 2}], ids=str)  # fmt: skip
def test_rows_have_figures_or_a_reason(changes):
    case = dataclasses.replace(SMALL, **changes)
    names = ["torch", "ours", "ours-cupy", "ours-reference", "torch-packed", "cell-loop", "cleanrl-loop"]
    rows = {row.provider: row for row in run.run_case(case, names, "cpu", {})}
    assert set(rows) == set(names)
    for row in rows.values():
        assert (row.case, row.steps, row.schema) == (case.name, 5, results.SCHEMA)
        if row.status in ("measured", "yardstick"):
            assert 0 < row.p20_s <= row.median_s <= row.p80_s
            assert row.us_per_step == pytest.approx(row.median_s / 5 * 1e6)
            assert row.bound_fraction == pytest.approx(row.bound_s / row.median_s)
            assert row.error <= 1
        else:
            assert row.status in ("absent", "unable")
            assert row.note
            assert row.median_s is None
    assert rows["ours"].status == rows["ours-reference"].status == "measured"
    plain = case == case.plain() or case.sequences == "packed"
    assert rows["torch"].status == ("measured" if plain else "yardstick")
    assert rows["torch"].speed == 1


@pytest.mark.parametrize("fault", ["output", "h_n", "dx", "dweight_hh_l0", "nan", "shape"])
def test_a_provider_that_is_wrong_is_named_and_not_timed(monkeypatch, fault):
    def build(name, given):
        engine = torch_lstm.build(name, given)

        def call(x):
            y, h_n, c_n = engine.call(x)
            match fault:
                case "output":
                    y = y + 1e-5 * y.detach()
                case "h_n":
                    h_n = h_n + 1e-5
                case "dx":
                    y = y + 1e-5 * (x - x.detach()).sum()
                case "nan":
                    c_n = c_n / 0
                case "shape":
                    h_n = h_n[0]
            return y, h_n, c_n

        def to_torch(gradients):
            return gradients | {"weight_hh_l0": gradients["weight_hh_l0"] * (1.0001 if fault == "dweight_hh_l0" else 1)}

        return dataclasses.replace(engine, call=call, to_torch=to_torch)

    faulty = SimpleNamespace(NAMES=("faulty",), EVERYWHERE=(), absent=torch_lstm.absent, build=build)
    monkeypatch.setitem(providers.PROVIDERS, "faulty", faulty)
    rows = {row.provider: row for row in run.run_case(SMALL, ["torch", "faulty"], "cpu", {})}
    assert rows["torch"].status == "measured"
    assert rows["faulty"].status == "wrong"
    assert rows["faulty"].median_s is None
    assert {"nan": "c_n", "shape": "h_n"}.get(fault, fault) in rows["faulty"].note


def test_a_provider_that_raises_is_named():
    with pytest.raises(run.ProviderFailed, match="KeyError") as raised:
        run.run_case(SMALL, ["torch", "nobody"], "cpu", {})
    assert raised.value.provider == "nobody"
    rows = run.run_case(SMALL, ["torch", "nobody"], "cpu", {"nobody": "KeyError: it is not there"})
    assert [(row.provider, row.status) for row in rows] == [("nobody", "failed"), ("torch", "measured")]


# Timing and memory.


def test_interleaved_rounds_tell_what_is_slower():
    runs = {"once": lambda call: time.sleep(0.001), "twice": lambda call: time.sleep(0.002)}
    taken = timing.interleaved(runs, "cpu", 0.1)
    once, twice = (timing.percentiles(taken[name])[0] for name in runs)
    assert len(taken["once"]) == len(taken["twice"]) >= timing.ROUNDS[0]
    assert 1.5 < twice / once < 2.5


def test_calls_are_numbered_so_that_inputs_change():
    calls = []
    timing.interleaved({"": calls.append}, "cpu", 0.0)
    assert calls[: timing.WARM_UP] == list(range(timing.WARM_UP))
    assert calls[timing.WARM_UP :] == list(range(len(calls) - timing.WARM_UP))


def test_bytes_kept_for_backward_count_each_storage_once():
    a, b = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    with timing.kept_for_backward([a, b]) as kept:
        c = a @ b
        (c * c) * c.T
    assert kept() == 2 * 400  # c, and the product of two


# Results as files.


@pytest.fixture
def row() -> results.Row:
    return run.run_case(SMALL, ["torch"], "cpu", {})[0]


def test_rows_come_back_as_they_were(tmp_path, row):
    strange = dataclasses.replace(row, note='a "note", of\ntwo lines', graph=True, error=None, kept_bytes=0)
    results.write(tmp_path / "a.csv", [row, strange])
    assert results.read(tmp_path / "a.csv") == [row, strange]


def test_nothing_is_overwritten(tmp_path, row):
    results.write(tmp_path / "a.csv", [row])
    with pytest.raises(FileExistsError):
        results.write(tmp_path / "a.csv", [])
    assert results.read(tmp_path / "a.csv") == [row]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [], r"a.csv:1: no header"),
        (lambda lines: ["no such file of results"], r"a.csv:1: not the columns of schema 1"),
        (lambda lines: [lines[0], lines[1].replace("1,", "99,", 1)], r"a.csv:2: schema '99'; this version reads sch"),
        (lambda lines: [lines[0].replace("case", "cause"), lines[1]], r"a.csv:1: .*different: case, cause"),
        (lambda lines: [lines[0], lines[1], lines[1][:40]], r"a.csv:3: \d+ cells, expected \d+"),
        (lambda lines: [lines[0], lines[1], "", lines[1]], r"a.csv:3: 0 cells, expected \d+"),
        (lambda lines: [lines[0], lines[1].replace("False", "perhaps")], r"a.csv:2: graph is 'perhaps', expected bool"),
        (lambda lines: [lines[0], lines[1].replace(",5,", ",five,", 1)], r"a.csv:2: steps is 'five', expected int"),
        (lambda lines: [lines[0], lines[1].replace("measured", "guessed")], r"a.csv:2: status is 'guessed', expected"),
    ],
    ids=["empty", "header", "schema", "column", "cut", "blank", "bool", "int", "status"],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, row, damage, said):
    path = tmp_path / "a.csv"
    results.write(path, [row])
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=said):
        results.read(path)


def test_provenance_names_the_versions(row):
    assert row.torch == torch.__version__
    assert row.device.endswith(("thread", "threads"))
    assert row.cuda is None and row.driver is None  # noqa: PT018


# Grids, and processes of their own.


def test_a_stopped_run_keeps_what_it_has(tmp_path, monkeypatch):
    first, second = SMALL, dataclasses.replace(SMALL, run="forward")

    def stopped(case, *args):
        if case == second:
            raise KeyboardInterrupt
        return run.run_case(case, *args)

    monkeypatch.setattr(grid, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        grid.measure([first, second], ["ours"], "cpu", tmp_path / "a.csv")
    assert {row.case for row in results.read(tmp_path / "a.csv")} == {first.name}


def test_no_case_is_begun_after_the_deadline(tmp_path):
    rows, left_out = grid.measure([SMALL], ["ours"], "cpu", tmp_path / "a.csv", deadline=time.monotonic() - 1)
    assert rows == [] and left_out == [SMALL]  # noqa: PT018
    assert results.read(tmp_path / "a.csv") == []


def test_in_the_headline_all_take_part_elsewhere_those_for_every_case():
    assert providers.taking_part(None, headline=True) == list(providers.PROVIDERS)
    elsewhere = providers.taking_part(None, headline=False)
    assert "ours" in elsewhere and "ours-reference" not in elsewhere  # noqa: PT018
    assert providers.taking_part(["cell-loop"], headline=False) == ["torch", "cell-loop"]


def test_what_hangs_dies_or_raises_takes_nothing_else_along(monkeypatch):
    worker = isolated.Worker("cpu", limit_s=10.0, serve=faulty_worker.serve)
    try:
        rows = grid._rows(SMALL, ["torch", "hangs", "ours"], "cpu", worker)
    finally:
        worker.close()
    assert {row.provider: row.status for row in rows} == {"hangs": "failed", "torch": "measured", "ours": "measured"}
    assert rows[0].note == "hung: no sign for 10 s"

    worker = isolated.Worker("cpu", limit_s=30.0, serve=faulty_worker.serve)
    try:
        rows = grid._rows(SMALL, ["torch", "dies", "raises"], "cpu", worker)
    finally:
        worker.close()
    assert {row.provider: row.note for row in rows[:2]} == {
        "dies": "its process died, exit code 7", "raises": "MemoryError: too large",
    }  # fmt: skip
    assert rows[2].status == "measured"


# What can be told without a GPU.


def test_what_is_expected_of_a_card():
    rows = host.expected(["h100"])
    assert {row.status for row in rows} == {"expected"}
    by_hidden = {row.hidden: row for row in rows}
    assert by_hidden[768].note == "cooperative / cooperative"
    assert by_hidden[768].launches == 2
    assert by_hidden[2048].launches == 2 * 1024  # one a step
    assert by_hidden[2048].host_s > 0
    assert all(row.median_s is None and row.expected_us_per_step > 0 for row in rows)
    cells = 1024 * 16 * 768  # T B H
    assert by_hidden[768].kept_bytes == pytest.approx(cells * (4 * 2 + 4 + 2), rel=0.01)  # gates, float32 c, h


# The command line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "hiden"], "unknown case 'hiden'; known groups: headline"),
        (["--providers", "cudnn"], "unknown provider 'cudnn'; known: torch, ours"),
        (["--device", "cuda:77"], "unknown device 'cuda:77'; known here: cpu"),
        (["--expect", "h1000"], "unknown device 'h1000'; known: h100"),
        (["--out", "."], "exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_with_what_is_known(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_of_results_leaves_the_readme_as_it_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    text = "a\n<!-- bench: begin -->\nb\n<!-- bench: end -->\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "a.csv").write_text("schema,date\n1,now\n")
    assert command_line.main(["readme"]) == 2
    assert "a.csv:1: not the columns of schema 1" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_bench_gpu_says_so_where_there_is_none(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["gpu", "--out", str(tmp_path / "a")]) == 2
    assert "unknown device 'cuda'; known here: cpu" in capsys.readouterr().err


def test_a_run_ends_with_the_table(capsys, tmp_path, monkeypatch):
    small = {"headline": [SMALL, dataclasses.replace(SMALL, run="forward")]}
    monkeypatch.setattr(cases, "grid", lambda kind: small)
    assert command_line.main(["--device", "cpu", "--cases", "headline", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert printed.index("All providers") < printed.index("gpu_lstm and torch.nn.LSTM")
    assert results.read(tmp_path / "a" / "results.csv")


def test_bench_gpu_rehearsed_on_a_cpu(capsys, tmp_path, monkeypatch):
    """All parts in their order; what would ask the device is stubbed, and one test file hangs."""
    monkeypatch.setattr(cases, "grid", lambda kind: {"headline": [SMALL]})
    asked = []

    def command(words, limit_s, log):
        asked.append((words, limit_s))
        if "gpu_lstm" in words:
            return "gpu_lstm 0.1.0", 0
        if "--collect-only" in words:
            return "tests/test_gpu.py::test_a\ntests/test_gpu.py::test_b\ntests/test_more.py::test_c\n\n3 tests", 0
        if "tests/test_more.py" in words:
            return "", None
        return "FAILED tests/test_gpu.py::test_b - AssertionError\n1 failed, 1 passed in 3 s", 1

    monkeypatch.setattr(gpu, "command", command)
    (tmp_path / "a").mkdir()
    assert gpu.run(minutes=1.0, out=tmp_path / "a", device="cpu") == 1
    assert [("--require-gpu" in words) for words, _ in asked] == [False, False, True, True]
    share = 60 * gpu.TESTS_SHARE  # of which the first file leaves what it does not take
    assert [limit for _, limit in asked[2:]] == pytest.approx([share / 2, share], rel=0.1)
    printed = capsys.readouterr().out
    assert printed.index("gpu_lstm 0.1.0") < printed.index("FAILED tests/test_gpu.py::test_b")
    assert printed.index("HUNG tests/test_more.py") < printed.index("gpu_lstm and torch.nn.LSTM")  # the table is last
    assert {row.provider for row in results.read(tmp_path / "a" / "results.csv")} == set(providers.PROVIDERS)


def test_a_command_that_hangs_is_stopped(tmp_path):
    said, code = gpu.command([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], 2.0,
                             tmp_path / "log")  # fmt: skip
    assert (said, code) == ("1\n", None)


def test_the_module_runs_as_a_program():
    root = Path(__file__).parent.parent
    said = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=root, capture_output=True, text=True)
    assert said.returncode == 0
    for word in ("compare", "gpu", "readme", "--cases", "--providers"):
        assert word in said.stdout
