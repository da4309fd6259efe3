"""The benchmark's providers: their results and gradients, in torch's layout, are those of float64; and `bench host`."""

import contextlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from subjects import HasteLSTM

import gpu_lstm
from bench import __main__ as command_line
from bench import host
from bench.cases import VARIANTS, Case
from bench.inputs import Inputs, results_in
from bench.measure import Trial
from bench.providers import PROVIDERS, engine, torchs
from bench.providers.engine import Unable

PLAIN = Case("training", "fp32", steps=16, batch=3, input_size=5, hidden_size=16)
SHORT = replace(PLAIN, steps=6)
CASES = {
    "plain": PLAIN, "layers": replace(SHORT, layers=2), "directions": replace(SHORT, layers=2, directions=2),
    "ragged": replace(SHORT, sequences="ragged"), "packed": replace(SHORT, sequences="packed"),
    "ragged-directions": replace(SHORT, layers=2, directions=2, sequences="ragged"),
    "resets": replace(SHORT, reset_rate=0.2), "resets-layers": replace(SHORT, layers=2, reset_rate=0.3),
    "to-states": replace(SHORT, layers=2, reset_rate=0.3, variant="reset_states"),
    "step": replace(PLAIN, mode="step", steps=1), "active": replace(PLAIN, mode="step", steps=1, sequences="active"),
} | {name: replace(SHORT, layers=2, directions=2, variant=name) for name in VARIANTS}  # fmt: skip
RESETS = "resets resets-layers to-states"
DONE = {  # which cases a provider does; it is unable to do the others
    "torch": "plain layers directions packed step", "torch-packed": "ragged ragged-directions",
    "torch-flat": "", "flashrnn-cuda": "",  # nothing in fp32
    "cell-loop": "plain step", "compiled-loop": "plain", "haste": "plain step", "keras": "plain step",
    "cleanrl-loop": RESETS, "rl_games-pieces": RESETS, "rsl_rl-padded": "resets resets-layers",
    "torchrl-pad": f"plain layers {RESETS} step", "torchrl-triton": f"plain layers {RESETS} step",
    **dict.fromkeys(("ours", "ours-triton", "ours-reference"), " ".join(CASES)), "ours-stream": "step active",
    "ours-cupy": " ".join(name for name in CASES if name not in VARIANTS),
    "ours-torch": " ".join(name for name in CASES if name not in (*VARIANTS, "to-states")),
}  # fmt: skip


def assert_right(name: str, inputs: Inputs, truth) -> None:
    """All results and gradients are those of float64."""
    found = Trial(name, inputs).results()
    assert found.keys() == truth.keys()
    for result, true in truth.items():
        if name == "rsl_rl-padded" and result in ("h_n", "c_n"):
            assert found[result] is None  # its states have gone through padding
            continue
        assert found[result].shape == true.shape, (name, result)
        error = (found[result].double() - true).norm() / true.norm()
        assert error < 1e-5, f"{name}, {result}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(monkeypatch, case):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes long, and is not ours
    inputs, ran = Inputs.of(CASES[case], "cpu"), 0
    truth = results_in(torch.float64, inputs)
    for name, provider in PROVIDERS.items():
        if case not in DONE[name].split():
            with pytest.raises(Unable):
                provider.build(inputs)
        elif (reason := provider.absent("cpu")) is None:
            assert_right(name, inputs, truth)
            ran += 1
        else:
            assert "\n" not in reason
    assert ran >= 2


@pytest.mark.parametrize(("name", "case", "families"), [
    ("ours-triton", "plain", "step / step"), ("ours-triton", "packed", "step / step"), ("ours-triton", "step", "step"),
    ("ours-torch", "plain", None),
])  # fmt: skip
def test_families_of_kernels_that_run_are_told(name, case, families):
    assert PROVIDERS[name].build(Inputs.of(CASES[case], "cpu")).kernels() == families


def test_a_package_that_is_not_there_is_explained_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol: f')")
    (tmp_path / "faulty_peer.py").write_text("raise RuntimeError('no matter of installing')")
    assert engine.absence("torch", "", "cpu") == "torch needs CUDA for this"
    assert engine.absence("torch", "", "cuda:0") is engine.absence("torch", "", "cpu", cuda=False) is None
    assert engine.absence("no_such_peer", "pip it", "cuda") == "no_such_peer is not installed: pip it"
    assert engine.absence("broken_peer", "", "cuda").endswith("installed but cannot be imported: undefined symbol: f")
    with pytest.raises(RuntimeError, match="no matter of installing"):
        engine.absence("faulty_peer", "", "cuda")
    assert "backend 'cupy' needs CuPy" in PROVIDERS["ours-cupy"].absent("cpu")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert "KERAS_BACKEND=torch" in PROVIDERS["keras"].absent("cpu")


def test_weights_in_one_buffer_for_cudnn(monkeypatch):
    """What torch's function is passed, and why other cases are refused."""
    given: list = []
    inputs = Inputs.of(replace(SHORT, dtype="bf16", layers=2, directions=2), "cpu")
    with pytest.raises(Unable, match="only for bfloat16 on CUDA"):
        torchs.flat(inputs)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *arguments: given.extend(arguments))
    monkeypatch.setattr(torchs, "get_cudnn_mode", lambda mode: mode)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
        own = torchs.flat(inputs).parameters
        with pytest.raises(Unable, match="bfloat16"):
            torchs.flat(Inputs.of(SHORT, "cpu"))
    weights, *sizes = given
    assert [id(w) for w in weights] == [id(w) for w in own.values()]
    assert sizes == [4, 5, "LSTM", 16, 0, 2, False, True]


def flashrnn(Wx, R, b, states, function, backend, dtype):
    """Wx [B, T, 4, N, D], R [4, N, D, D previous], b [4, N, D], states [2, B, 1, N, D]; gates i, f, z, o."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
    assert Wx.permute(1, 0, 3, 4, 2).is_contiguous()  # [T, B, N, D, 4]
    assert R.permute(1, 2, 0, 3).is_contiguous()  # [N, D, 4, D previous]
    (h, c), seen = states[:, :, 0], []
    for t in range(Wx.shape[1]):
        z = Wx[:, t] + torch.einsum("gndp,bnp->bgnd", R, h) + b
        c = torch.sigmoid(z[:, 1]) * c + torch.sigmoid(z[:, 0]) * torch.tanh(z[:, 2])
        h = torch.sigmoid(z[:, 3]) * torch.tanh(c)
        seen.append(torch.stack([h, c]))
    return torch.stack(seen, dim=2), seen[-1][:, :, None]


@pytest.mark.parametrize(("name", "dtype"), [("haste", "fp32"), ("flashrnn-cuda", "tf32")])
def test_peers_that_need_cuda_by_what_their_documentation_says(monkeypatch, name, dtype):
    """Stand-ins of the same interface and layout."""
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))
    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(LSTM=HasteLSTM))
    inputs = Inputs.of(replace(PLAIN, dtype=dtype), "cpu")
    assert_right(name, inputs, results_in(torch.float64, inputs))


# python -m bench host: both sides compute the same, kernels run where they should, every call has a line


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
    assert list(cells.values())[3:] == ["3.0", "3.0", "1.25", "1.00"]
    assert not {"nn us"} & set(host.line("", "", here, {side: [{here: [1.0], there: [1.0]}] for side in ("old ", "")}))


def test_a_base_that_is_too_old_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu_lstm").mkdir()
    (tmp_path / "gpu_lstm" / "__init__.py").touch()
    monkeypatch.setattr(host, "checkout", lambda commit: contextlib.nullcontext(tmp_path))
    assert command_line.main(["host", "--base", "v0"]) == 2
    assert "v0 is too old to be measured: ModuleNotFoundError" in capsys.readouterr().err
