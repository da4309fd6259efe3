"""Weights and states that are subclasses of Tensor without memory of their own, as torchao's quantised ones."""

import pytest
import torch
from comparing import every_backend
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm
from gpu_lstm.dispatch import run as dispatch
from gpu_lstm.functional import lstm_layer

T, B, I, H = 3, 2, 3, 4
RESETS = torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()


class Quantised(Tensor):
    """Eight bits an element, and a scale; every operator gets float32."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, t):
        scale = t.detach().abs().max() / 127
        return cls((t.detach() / scale).round().to(torch.int8), scale)

    def plain(self):
        return self.values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        return function(*tree_map_only(cls, cls.plain, args), **tree_map_only(cls, cls.plain, kwargs or {}))


MODULES = {
    "LSTM": gpu_lstm.LSTM, "LSTMCell": gpu_lstm.LSTMCell,
    "StackedLSTM": lambda inputs, hidden, **how: gpu_lstm.StackedLSTM(inputs, [hidden, hidden], **how),
}  # fmt: skip


def made(kind, backend, weight_hh=lambda weight: weight):
    """A module that learns nothing, with weight_hh(W_hh) in the place of each W_hh."""
    torch.manual_seed(0)
    lstm = MODULES[kind](I, H, backend=backend)
    for owner in lstm.modules():
        for name, weight in list(owner._parameters.items()):
            new = weight_hh(weight) if name.startswith("weight_hh") else weight
            setattr(owner, name, nn.Parameter(new.detach(), requires_grad=False))
    return lstm


def given(kind):
    torch.manual_seed(1)
    x = torch.randn(T, B, I)
    if kind == "LSTMCell":
        return x[0], tuple(torch.randn(2, B, H))
    return x, tuple(torch.randn(2, 1, B, H)) if kind == "LSTM" else [tuple(torch.randn(2, B, H)) for _ in range(2)]


def assert_close(ours, theirs):
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture
def routes(monkeypatch):
    """Of the calls, in order: the backend, and whether kernels ran as operators."""
    found, run_by = [], dispatch.run_by

    def recorded(route, call):
        found.append((route.backend.value, route.as_operators))
        return run_by(route, call)

    monkeypatch.setattr(dispatch, "run_by", recorded)
    return found


@pytest.mark.parametrize("kind", MODULES)
@every_backend
def test_weights(routes, backend, kind):
    """Before and after a call of the same kind with plain weights, which goes to the kernels as ever."""
    x, hx = given(kind)
    plain, of_weights = made(kind, backend), made(kind, backend, Quantised.of)
    true = made(kind, "reference")(x, hx), made(kind, "reference", lambda w: Quantised.of(w).plain())(x, hx)
    routes.clear()
    for lstm, expected in 2 * [*zip((plain, of_weights), true)]:
        assert_close(lstm(x, hx), expected)
    assert routes == 2 * [(backend, False), (backend, backend == "triton")]


@pytest.mark.parametrize("how", ["hx", "reset_states", "lstm_layer"])
@every_backend
def test_states(routes, backend, how):
    if (backend, how) == ("torch", "reset_states"):
        return
    x, hx = given("LSTM")
    hx = tuple(Quantised.of(t if how != "lstm_layer" else t[0]) for t in hx)
    plain = tuple(t.plain() for t in hx)

    def call(backend, hx):
        lstm = made("LSTM", backend)
        match how:
            case "hx":
                return lstm(x, hx, resets=RESETS)
            case "reset_states":
                return lstm(x, resets=RESETS, reset_states=hx)
        return lstm_layer(x, list(lstm.parameters()), hx, backend=backend)

    expected = call("reference", plain)
    routes.clear()
    for states in 2 * [plain, hx]:
        assert_close(call(backend, states), expected)
    as_operators = backend == "triton" and how != "reset_states"  # a view of one of ours is plain
    assert routes == 2 * [(backend, False), (backend, as_operators)]
