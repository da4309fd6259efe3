"""python -m bench host: both sides compute the same, counts are right, every call has a row."""

import contextlib
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import gpu_lstm
from bench import __main__ as command_line
from bench import host


# Of a StackedLSTM other weights are drawn; torch.nn has no resets after the first step.
@pytest.mark.parametrize("case", [case for case in host.CASES if case not in ("StackedLSTM", "resets")])
def test_both_sides_compute_the_same(case):
    for mode in ("inference",) if case == "Stream" else ("forward+graph", "training"):
        results = []
        for provider in ("torch.nn", "torch"):
            torch.manual_seed(0)
            results.append(host.made(case, mode, "cpu", provider)())
        torchs, ours = (list(each) if mode == "training" else each.flatten() for each in results)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_counts_are_those_of_another_tracer():
    lstm, x, entered = gpu_lstm.LSTM(2, 3, backend="torch"), torch.rand(1, 1, 2), []
    lstm(x)
    sys.settrace(lambda frame, event, _: entered.append(frame.f_code.co_filename))
    try:
        lstm(x)
    finally:
        sys.settrace(None)
    own = [file for file in entered if Path(file).is_relative_to(Path(gpu_lstm.__file__).parent)]
    counts, files = host.count(lambda: lstm(x))
    assert (counts["functions"], files) == (len(own), {*own})
    assert host.count(lambda: len(()))[0] == dict(zip(host.COUNTS, (2, 0, 0, 0)))


@pytest.mark.parametrize("option", [[], ["--count"]])
def test_every_call_has_a_row(tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr(host, "ROUNDS", 2)
    assert command_line.main(["host", "--cases", "T=1", "Stream", "--out", str(tmp_path / "new"), *option]) == 0
    rows = pd.read_csv(tmp_path / "new" / "host.csv")
    assert [*rows.columns] == host.COLUMNS
    assert len(rows) == 2 * (3 + 1)
    assert (rows["rounds"] == (1 if option else 2 * host.TURNS)).all()
    assert ((rows["least_s"] > 0) & (rows["least_s"] <= rows["median_s"])).all()
    assert ("file changes" in capsys.readouterr().out) == bool(option)


def test_a_base_that_is_too_old_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu_lstm").mkdir()
    (tmp_path / "gpu_lstm" / "__init__.py").touch()
    monkeypatch.setattr(host, "checkout", lambda commit: contextlib.nullcontext(tmp_path))
    assert command_line.main(["host", "--base", "v0", "--out", str(tmp_path / "new")]) == 2
    assert "v0 is too old to be measured: ModuleNotFoundError" in capsys.readouterr().err
