"""The benchmark's providers: their results and gradients, in torch's layout, are those of float64; and `bench host`."""

import contextlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from subjects import HasteLSTM

from bench import __main__ as command_line
from bench import host, ppo
from bench.cases import VARIANTS, Case
from bench.inputs import Inputs, results_in
from bench.measure import Trial
from bench.providers import PROVIDERS, engine
from bench.providers.engine import Unable

PLAIN = Case("training", "fp32", steps=16, batch=3, input_size=5, hidden_size=16)
SHORT = replace(PLAIN, steps=4)
CASES = {
    "plain": PLAIN, "layers": replace(SHORT, layers=2), "directions": replace(SHORT, layers=2, directions=2),
    "ragged": replace(SHORT, sequences="ragged"), "packed": replace(SHORT, sequences="packed"),
    "ragged-directions": replace(SHORT, layers=2, directions=2, sequences="ragged"),
    "resets": replace(SHORT, reset_rate=0.2), "resets-layers": replace(SHORT, layers=2, reset_rate=0.3),
    "to-states": replace(SHORT, layers=2, reset_rate=0.3, variant="reset_states"),
    "gru": replace(SHORT, layers=2, directions=2, cell="gru"),
    "gru-ragged": replace(SHORT, layers=2, sequences="ragged", cell="gru"),
    "gru-to-states": replace(SHORT, layers=2, reset_rate=0.3, variant="reset_states", cell="gru"),
    "gru-resets": replace(SHORT, layers=2, reset_rate=0.3, cell="gru"),
    "gru-step": replace(PLAIN, mode="step", steps=1, cell="gru"),
    "heads": replace(SHORT, heads=4), "gru-heads": replace(SHORT, heads=2, cell="gru"),
    "heads-directions": replace(SHORT, steps=3, layers=2, directions=2, heads=4),
    "slstm": replace(SHORT, cell="slstm"), "slstm-heads": replace(SHORT, heads=4, cell="slstm"),
    "slstm-resets": replace(SHORT, layers=2, directions=2, heads=2, reset_rate=0.3, sequences="ragged", cell="slstm"),
    "slstm-step": replace(PLAIN, mode="step", steps=1, heads=2, cell="slstm"),
    "step": replace(PLAIN, mode="step", steps=1), "active": replace(PLAIN, mode="step", steps=1, sequences="active"),
} | {name: replace(SHORT, layers=2, directions=2, variant=name) for name in VARIANTS}  # fmt: skip
DEEP = VARIANTS.keys() - {"layer_norm"}
OURS = {"ours", "ours-triton", "ours-reference"}
BY_TORCH = "plain layers directions packed step gru gru-step heads gru-heads heads-directions"


def assert_right(name: str, inputs: Inputs, truth) -> None:
    found = Trial(name, inputs).results()
    assert found.keys() == truth.keys()
    for result, true in truth.items():
        if name == "rsl_rl-padded" and result in ("h_n", "c_n"):
            assert found[result] is None  # its states have gone through padding
            continue
        assert found[result].shape == true.shape, (name, result)
        error = (found[result].double() - true).norm() / true.norm()
        assert error < 1e-5, f"{name}, {result}: {error}"


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.deep] * (case in DEEP)) for case in CASES])
def test_results_and_gradients(monkeypatch, case):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes long, and is not ours
    inputs, ran = Inputs.of(CASES[case], "cpu"), set()
    truth = results_in(torch.float64, inputs)
    for name, provider in PROVIDERS.items():
        if (reason := provider.absent("cpu")) is None:
            with contextlib.suppress(Unable):
                provider.build(inputs)  # also the yardstick's, which is timed in the plain case
                assert_right(name, inputs, truth)
                ran.add(name)
        else:
            assert "\n" not in reason
    assert ran >= OURS | {"torch"} if case in BY_TORCH.split() else ran >= OURS


def test_a_package_that_is_not_there_is_explained_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol: f')")
    assert engine.absence("torch", "", "cpu") == "torch needs CUDA for this"
    assert engine.absence("torch", "", "cuda:0") is engine.absence("torch", "", "cpu", cuda=False) is None
    assert engine.absence("no_such_peer", "pip it", "cuda") == "no_such_peer is not installed: pip it"
    assert engine.absence("broken_peer", "", "cuda").endswith("installed but cannot be imported: undefined symbol: f")


def test_a_peer_that_needs_cuda_by_what_its_documentation_says(monkeypatch):
    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(LSTM=HasteLSTM))
    inputs = Inputs.of(PLAIN, "cpu")
    assert_right("haste", inputs, results_in(torch.float64, inputs))


@pytest.mark.parametrize("case", [case for case in host.CASES if case != "resets"])  # which torch.nn leaves out
def test_both_sides_compute_the_same(case):
    mode = "inference" if case == "Stream" else "training"
    results = []
    for provider in ("torch.nn", "torch"):
        torch.manual_seed(0)
        results.append(torch.cat([t.flatten() for t in host.made(case, mode, "cpu", provider)()]))
    torch.testing.assert_close(*reversed(results), rtol=1e-5, atol=1e-5)


@pytest.mark.deep
@pytest.mark.parametrize(("words", "line"), [
    ("host --cases Stream", ["Stream", "inference", "torch"]),
    ("ppo --device cpu", ["GRU", "6", "2", "8", "6000.00", "2000.00", "3.00"]),
], ids=["host", "ppo"])  # fmt: skip
def test_a_command_has_a_line_for_what_it_measures_and_a_ratio(monkeypatch, capsys, words, line):
    def timed(calls, *_):
        for call in calls.values():
            call()
        return {name: [3.0, 6.0, 16.0] if "loop" in name else [1.0, 2.0, 4.0] for name in calls}

    monkeypatch.setattr(host, "ROUNDS", 2)
    monkeypatch.setattr(ppo, "SIZES", [(6, 2, 8)])
    monkeypatch.setattr(ppo, "timing", Mock(wraps=ppo.timing, interleaved=timed))
    monkeypatch.setenv("COLUMNS", "120")
    assert command_line.main(words.split()) == 0
    assert line in [each.split()[: len(line)] for each in capsys.readouterr().out.splitlines()]
    here, there = ("cpu", "torch"), ("cpu", "torch.nn")
    cells = host.line("T=1", "training", here, {"": [{here: [4e-6, 2e-6], there: [2e-6, 4e-6]}] * 2})
    assert list(cells.values())[3:] == ["3.0", "3.0", "1.25", "1.00"]
