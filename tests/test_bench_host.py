"""python -m bench host: both sides compute the same, kernels run where they should, every call has a line."""

import contextlib

import pytest
import torch

import gpu_lstm
from bench import __main__ as command_line
from bench import host


@pytest.mark.parametrize("case", [case for case in host.CASES if case != "resets"])  # which torch.nn leaves out
def test_both_sides_compute_the_same(case):
    for mode in ("inference",) if case == "Stream" else ("forward+graph", "training"):
        results = []
        for provider in ("torch.nn", "torch"):
            torch.manual_seed(0)
            results.append(host.made(case, mode, "cpu", provider)())
        torchs, ours = (list(each) if mode == "training" else each.flatten() for each in results)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_kernels_that_run_are_seen(backend):
    lstm = gpu_lstm.LSTM(2, 3, backend=backend)
    assert host.runs_kernels(lambda: lstm(torch.rand(1, 1, 2))) == (backend == "triton")


def test_every_call_has_a_line_and_what_is_compared_is_a_ratio(monkeypatch, capsys):
    monkeypatch.setattr(host, "ROUNDS", 2)
    monkeypatch.setenv("COLUMNS", "120")
    assert command_line.main(["host", "--cases", "T=1", "Stream"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    asked = [("T=1", mode) for mode in host.MODES] + [("Stream", "inference")]
    assert [tuple(line[:3]) for line in lines if line[:1] in (["T=1"], ["Stream"])] == [
        (*each, provider) for each in asked for provider in ("kernels", "torch")
    ]
    here, there = ("cpu", "torch"), ("cpu", "torch.nn")
    cells = host.line("T=1", "training", here, {"": [{here: [4e-6, 2e-6], there: [2e-6, 4e-6]}] * 2})
    assert list(cells.values())[3:] == ["3.0", "2.0", "3.0", "2.0", "1.25", "1.00"]
    assert not {"nn us"} & set(host.line("", "", here, {side: [{here: [1.0], there: [1.0]}] for side in ("old ", "")}))


def test_a_base_that_is_too_old_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu_lstm").mkdir()
    (tmp_path / "gpu_lstm" / "__init__.py").touch()
    monkeypatch.setattr(host, "checkout", lambda commit: contextlib.nullcontext(tmp_path))
    assert command_line.main(["host", "--base", "v0"]) == 2
    assert "v0 is too old to be measured: ModuleNotFoundError" in capsys.readouterr().err
