"""What the benchmark's providers build: results and gradients, in torch's layout, are those of float64."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.cases import Case
from bench.inputs import Inputs, results_in
from bench.measure import Trial
from bench.providers import PROVIDERS, engine
from bench.providers.engine import Unable

PLAIN = Case("training", "fp32", steps=16, batch=3, input_size=5, hidden_size=16)
SHORT = replace(PLAIN, steps=6)
CASES = {
    "plain": PLAIN,
    "layers": replace(SHORT, layers=2),
    "directions": replace(SHORT, layers=2, directions=2),
    "ragged": replace(SHORT, sequences="ragged"),
    "ragged-directions": replace(SHORT, layers=2, directions=2, sequences="ragged"),
    "packed": replace(SHORT, sequences="packed"),
    "resets": replace(SHORT, reset_rate=0.2),
    "resets-layers": replace(SHORT, layers=2, reset_rate=0.3),
}
DONE = {  # which cases a provider does; it is unable to do the others
    "torch": ("plain", "layers", "directions", "packed"),
    "torch-packed": ("ragged", "ragged-directions"),
    "cell-loop": ("plain",),
    "compiled-loop": ("plain",),
    "cleanrl-loop": ("resets", "resets-layers"),
    "flashrnn-cuda": (),  # "plain", but in TF32
    "flashrnn-triton": (),
    "haste": ("plain",),
    "torchrl-pad": ("plain", "layers", "resets", "resets-layers"),
    "torchrl-triton": ("plain", "layers", "resets", "resets-layers"),
    "keras": ("plain", "layers", "directions", "ragged", "ragged-directions"),
} | {name: tuple(CASES) for name in PROVIDERS if name.startswith("ours")}


def assert_right(name: str, inputs: Inputs) -> None:
    """All results and gradients are those of float64."""
    found, truth = Trial(name, inputs).results(), results_in(torch.float64, inputs)
    assert found.keys() == truth.keys()
    for name, true in truth.items():
        assert found[name].shape == true.shape, name
        error = (found[name].double() - true).norm() / true.norm()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_results_and_gradients(monkeypatch, name, case):
    inputs = Inputs.of(CASES[case], "cpu")
    if case not in DONE[name]:
        with pytest.raises(Unable):
            PROVIDERS[name].build(inputs)
        return
    reason = PROVIDERS[name].absent("cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes long, and is not ours
    assert_right(name, inputs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [name for name in PROVIDERS if not name.startswith("ours")])
def test_absence_is_explained_in_one_line(name, device):
    reason = PROVIDERS[name].absent(device)
    assert reason is None or (reason and "\n" not in reason)


def test_a_package_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol: f')")
    (tmp_path / "faulty_peer.py").write_text("raise RuntimeError('no matter of installing')")
    assert engine.absence("torch", "", "cpu") == "torch needs CUDA for this"
    assert engine.absence("torch", "", "cuda:0") is engine.absence("torch", "", "cpu", cuda=False) is None
    assert engine.absence("no_such_peer", "pip it", "cuda") == "no_such_peer is not installed: pip it"
    assert engine.absence("broken_peer", "", "cuda").endswith("installed but cannot be imported: undefined symbol: f")
    with pytest.raises(RuntimeError, match="no matter of installing"):
        engine.absence("faulty_peer", "", "cuda")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.10.0rc1+cu130")
    assert engine.release("torch") == (3, 10, 0)
    assert engine.absence("torch", "pip it", "cuda", oldest=(3, 11)) == "torch is too old: pip it"
    assert engine.absence("torch", "pip it", "cuda", oldest=(3, 9)) is None


def test_keras_on_another_backend_is_absent(monkeypatch):
    pytest.importorskip("keras")
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert "KERAS_BACKEND=torch" in PROVIDERS["keras"].absent("cpu")


# Peers that need CUDA, by stand-ins of the same interface and layout, written from their documentation.


def stand_in(monkeypatch, name: str, **members) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def flashrnn(Wx, R, b, states, function, backend, dtype):
    """Wx [B, T, 4, N, D], R [4, N, D, D previous], b [4, N, D], states [2, B, 1, N, D]; gates i, f, z, o."""
    assert (function, dtype) == ("lstm", "float32")
    if backend == "cuda_fused":
        assert Wx.permute(1, 0, 3, 4, 2).is_contiguous()  # [T, B, N, D, 4]
        assert R.permute(1, 2, 0, 3).is_contiguous()  # [N, D, 4, D previous]
    (h, c), seen = states[:, :, 0], []
    for t in range(Wx.shape[1]):
        z = Wx[:, t] + torch.einsum("gndp,bnp->bgnd", R, h) + b
        c = torch.sigmoid(z[:, 1]) * c + torch.sigmoid(z[:, 0]) * torch.tanh(z[:, 2])
        h = torch.sigmoid(z[:, 3]) * torch.tanh(c)
        seen.append(torch.stack([h, c]))
    return torch.stack(seen, dim=2), seen[-1][:, :, None]


@pytest.mark.parametrize("name", ["flashrnn-cuda", "flashrnn-triton"])
def test_flashrnn(monkeypatch, name):
    stand_in(monkeypatch, "flashrnn", flashrnn=flashrnn)
    assert_right(name, Inputs.of(replace(PLAIN, dtype="tf32"), "cpu"))


class HasteLSTM(nn.Module):
    """kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]; gates i, g, f, o; time first."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size

    def from_native_weights(self, weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0):
        of_torch = [gate * self.hidden_size + unit for gate in (0, 2, 1, 3) for unit in range(self.hidden_size)]
        self.kernel = nn.Parameter(weight_ih_l0.T[:, of_torch])
        self.recurrent_kernel = nn.Parameter(weight_hh_l0.T[:, of_torch])
        self.bias = nn.Parameter((bias_ih_l0 + bias_hh_l0)[of_torch])

    def forward(self, x, state):
        assert self.training
        (h,), (c,), outputs = *state, []
        for x_t in x:
            i, g, f, o = (x_t @ self.kernel + h @ self.recurrent_kernel + self.bias).split(self.hidden_size, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def test_haste(monkeypatch):
    stand_in(monkeypatch, "haste_pytorch", LSTM=HasteLSTM)
    assert_right("haste", Inputs.of(PLAIN, "cpu"))


class LSTMModule(nn.Module):
    """Batch first; where `is_init` is set, the state of that step, [B, T, L, H], is the one to go on from."""

    def __init__(self, lstm, in_keys, out_keys, default_recurrent_mode, recurrent_backend, recurrent_compute_dtype,
                 recurrent_matmul_precision):  # fmt: skip
        super().__init__()
        assert lstm.batch_first
        assert default_recurrent_mode
        self.lstm, self.in_keys, self.out_keys = lstm, [*in_keys, "is_init"], out_keys
        self.triton = recurrent_backend == "triton"

    def forward(self, tensordict):
        x, h_given, c_given, is_init = (tensordict[key] for key in self.in_keys)
        assert tensordict.batch_size == list(x.shape[:2]) == list(is_init.shape[:2])
        if self.triton:
            assert {t.dtype for t in (x, h_given, c_given, *self.lstm.parameters())} == {torch.float32}
        ys, hs, cs = [], [], []
        h, c = h_given[:, 0].unbind(1), c_given[:, 0].unbind(1)
        for t in range(x.shape[1]):
            y, states = x[:, t], []
            for layer, last in enumerate(zip(h, c)):
                given = h_given[:, t, layer], c_given[:, t, layer]
                last = [torch.where(is_init[:, t], *pair) for pair in zip(given, last)]
                states.append(torch.lstm_cell(y, last, *self.lstm.all_weights[layer]))
                y = states[-1][0]
            h, c = zip(*states)
            ends = is_init[:, t + 1, :, None] if t + 1 < x.shape[1] else torch.tensor(True)
            ys.append(y)
            hs.append(torch.where(ends, torch.stack(h, 1), 0))
            cs.append(torch.where(ends, torch.stack(c, 1), 0))
        tensordict |= zip(self.out_keys, (torch.stack(each, 1) for each in (ys, hs, cs)))
        return tensordict


class TensorDict(dict):
    def __init__(self, source, batch_size):
        super().__init__(source)
        self.batch_size = batch_size


@pytest.mark.parametrize("case", [*DONE["torchrl-pad"], "bf16"])
@pytest.mark.parametrize("name", ["torchrl-pad", "torchrl-triton"])
def test_torchrl(monkeypatch, name, case):
    stand_in(monkeypatch, "torchrl.modules", LSTMModule=LSTMModule)
    stand_in(monkeypatch, "tensordict", TensorDict=TensorDict)
    inputs = Inputs.of(CASES.get(case, replace(PLAIN, dtype="bf16")), "cpu")
    if inputs.resets is not None:
        inputs.resets[0, 0] = True  # the given state is not used there
    if case != "bf16":
        assert_right(name, inputs)
        return
    found, truth = Trial(name, inputs).results(), results_in(torch.float64, inputs)
    assert found["output"].dtype == torch.bfloat16
    for result, allowed in (("output", 5e-3), ("h_n", 5e-3 if name == "torchrl-pad" else 1e-5)):
        assert (found[result] - truth[result]).norm() < allowed * truth[result].norm()
