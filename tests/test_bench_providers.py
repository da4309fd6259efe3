"""What the benchmark's providers build: results and gradients, in torch's layout, are those of float64."""

import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from bench.cases import Case
from bench.problem import Problem, results_in
from bench.providers import PROVIDERS, installed
from bench.providers.engine import Engine, Unable

PLAIN = Case("training", "fp32", steps=16, batch=3, inputs=5, hidden=16)
SHORT = replace(PLAIN, steps=6)
CASES = {
    "plain": PLAIN,
    "layers": replace(SHORT, layers=2),
    "directions": replace(SHORT, layers=2, directions=2),
    "ragged": replace(SHORT, sequences="ragged"),
    "ragged-directions": replace(SHORT, layers=2, directions=2, sequences="ragged"),
    "packed": replace(SHORT, sequences="packed"),
    "resets": replace(SHORT, reset_rate=0.3),
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
FORCED = ("ours-resident", "ours-cooperative", "ours-step")  # families, chosen for a GPU


def assert_right(engine: Engine, problem: Problem) -> None:
    """All results and gradients are those of float64."""
    leaf, given = problem.given(problem.xs[0])
    leaves = {"x": leaf, "h0": engine.h0, "c0": engine.c0, **engine.parameters}
    with engine.within():
        y, h_n, c_n = engine.call(given)
        assert type(y) is type(given)
        packed = isinstance(y, PackedSequence)
        dy = problem.packed(problem.dy).data if packed else problem.dy
        gradients = dict(zip(leaves, torch.autograd.grad(y.data if packed else y, list(leaves.values()), dy)))
    dx, dh0, dc0 = (gradients.pop(name) for name in ("x", "h0", "c0"))
    found = {"output": problem.padded(y), "h_n": h_n, "c_n": c_n, "dh0": dh0, "dc0": dc0}
    found["dx"] = problem.padded(given._replace(data=dx)) if packed else dx
    found |= {f"d{name}": gradient for name, gradient in engine.to_torch(gradients).items()}

    truth = results_in(torch.float64, problem)
    assert found.keys() == truth.keys()
    for name, true in truth.items():
        assert found[name].shape == true.shape, name
        error = (found[name].double() - true).norm() / true.norm()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_results_and_gradients(monkeypatch, name, case):
    problem = Problem.of(CASES[case], "cpu")
    if case not in DONE[name]:
        with pytest.raises(Unable):
            PROVIDERS[name].build(name, problem)
        return
    if name in FORCED:
        pytest.skip("plans for a GPU")
    reason = PROVIDERS[name].absent(name, "cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes long, and is not ours
    assert_right(PROVIDERS[name].build(name, problem), problem)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_absence_is_explained_in_one_line(name, device):
    reason = PROVIDERS[name].absent(name, device)
    assert reason is None or (reason and "\n" not in reason)


def test_a_package_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol: f')")
    (tmp_path / "faulty_peer.py").write_text("raise RuntimeError('no matter of installing')")
    assert installed.missing("no_such_peer", "pip install it") == "no_such_peer is not installed: pip install it"
    assert (
        installed.missing("broken_peer", "") == "broken_peer is installed but cannot be imported: undefined symbol: f"
    )
    assert installed.missing("torch", "") is None
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.10.0rc1+cu130")
    assert (3, 9) < installed.release("torch") == (3, 10, 0)
    with pytest.raises(RuntimeError, match="no matter of installing"):
        installed.missing("faulty_peer", "")


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed")
def test_keras_on_another_backend_is_absent(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert "KERAS_BACKEND=torch" in PROVIDERS["keras"].absent("keras", "cpu")
    monkeypatch.delenv("KERAS_BACKEND")
    assert PROVIDERS["keras"].absent("keras", "cpu") is None


# Peers that need CUDA, by stand-ins of the same interface and layout, written from their documentation.


def stand_in(monkeypatch, name: str, **members) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def flashrnn(Wx, R, b, states, function, backend, dtype):
    """Wx [B, T, 4, N, D], R [4, N, D, D previous], b [4, N, D], states [2, B, 1, N, D]; gates i, f, z, o."""
    assert (function, dtype) == ("lstm", "float32")
    inner = {"cuda_fused": (1, 0, 3, 4, 2), "triton_fused": (0, 1, 2, 3, 4)}[backend]
    if backend == "cuda_fused":
        assert Wx.permute(inner).is_contiguous()  # [T, B, N, D, 4]
        assert R.permute(1, 2, 0, 3).is_contiguous()  # [N, D, 4, D previous]
    h, c = states[:, :, 0]
    seen = []
    for t in range(Wx.shape[1]):
        z = Wx[:, t] + torch.einsum("gndp,bnp->bgnd", R, h) + b
        c = torch.sigmoid(z[:, 1]) * c + torch.sigmoid(z[:, 0]) * torch.tanh(z[:, 2])
        h = torch.sigmoid(z[:, 3]) * torch.tanh(c)
        seen.append(torch.stack([h, c]))
    return torch.stack(seen, dim=2), seen[-1][:, :, None]


@pytest.mark.parametrize("name", ["flashrnn-cuda", "flashrnn-triton"])
def test_flashrnn(monkeypatch, name):
    stand_in(monkeypatch, "flashrnn", flashrnn=flashrnn)
    problem = Problem.of(replace(PLAIN, dtype="tf32"), "cpu")
    assert_right(PROVIDERS[name].build(name, problem), problem)


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
        h, c = state[0][0], state[1][0]
        outputs = []
        for x_t in x:
            i, g, f, o = (x_t @ self.kernel + h @ self.recurrent_kernel + self.bias).split(self.hidden_size, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def test_haste(monkeypatch):
    stand_in(monkeypatch, "haste_pytorch", LSTM=HasteLSTM)
    problem = Problem.of(PLAIN, "cpu")
    assert_right(PROVIDERS["haste"].build("haste", problem), problem)


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
        weights = self.lstm.all_weights
        ys, hs, cs = [], [], []
        h, c = h_given[:, 0].unbind(1), c_given[:, 0].unbind(1)
        for t in range(x.shape[1]):
            y, states = x[:, t], []
            for layer, (h_last, c_last) in enumerate(zip(h, c)):
                afresh = is_init[:, t]
                h_last = torch.where(afresh, h_given[:, t, layer], h_last)
                c_last = torch.where(afresh, c_given[:, t, layer], c_last)
                states.append(torch.lstm_cell(y, (h_last, c_last), *weights[layer]))
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


@pytest.mark.parametrize("case", DONE["torchrl-pad"])
@pytest.mark.parametrize("name", ["torchrl-pad", "torchrl-triton"])
def test_torchrl(monkeypatch, name, case):
    stand_in(monkeypatch, "torchrl.modules", LSTMModule=LSTMModule)
    stand_in(monkeypatch, "tensordict", TensorDict=TensorDict)
    problem = Problem.of(CASES[case], "cpu")
    if problem.resets is not None:
        problem.resets[0, 0] = True  # the given state is not used there
    assert_right(PROVIDERS[name].build(name, problem), problem)


def test_torchrl_takes_a_bfloat16_batch_in_float32(monkeypatch):
    stand_in(monkeypatch, "torchrl.modules", LSTMModule=LSTMModule)
    stand_in(monkeypatch, "tensordict", TensorDict=TensorDict)
    problem = Problem.of(replace(PLAIN, dtype="bf16"), "cpu")
    y, h_n, _ = PROVIDERS["torchrl-triton"].build("torchrl-triton", problem).call(problem.xs[0])
    truth = results_in(torch.float64, problem)
    assert y.dtype == torch.bfloat16
    assert (y - truth["output"]).norm() < 5e-3 * truth["output"].norm()
    assert (h_n - truth["h_n"]).norm() < 1e-5 * truth["h_n"].norm()
