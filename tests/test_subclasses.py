"""Weights and states that are subclasses of Tensor without memory of their own, as torchao's quantised ones."""

import pytest
import torch
from comparing import BACKENDS
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


def lstm_of(kind, backend):
    torch.manual_seed(0)
    if kind == "StackedLSTM":
        return gpu_lstm.StackedLSTM(I, [H, H], backend=backend).requires_grad_(False)
    return getattr(gpu_lstm, kind)(I, H, backend=backend).requires_grad_(False)


def quantised(lstm):
    """With the weights W_hh quantised."""
    for owner in lstm.modules():
        for name, weight in list(owner._parameters.items()):
            if name.startswith("weight_hh"):
                setattr(owner, name, nn.Parameter(Quantised.of(weight), requires_grad=False))
    return lstm


def in_float32(lstm):
    """The same numbers as plain tensors."""
    for owner in lstm.modules():
        for name, weight in list(owner._parameters.items()):
            if isinstance(weight, Quantised):
                setattr(owner, name, nn.Parameter(weight.plain(), requires_grad=False))
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
def routes():
    """Backends and kinds of recording of the calls, in order."""
    found, run_by = [], dispatch.run_by

    def recorded(route, call):
        found.append((route.backend.value, route.as_operators))
        return run_by(route, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "run_by", recorded)
        yield found


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell", "StackedLSTM"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights(routes, backend, kind):
    """Before and after a call of the same kind with plain weights, which goes to the kernels as ever."""
    x, hx = given(kind)
    plain = lstm_of(kind, backend)
    of_weights = quantised(lstm_of(kind, backend))
    expected = in_float32(quantised(lstm_of(kind, "reference")))(x, hx)
    plain(x, hx)
    routes.clear()
    for _ in range(2):
        assert_close(of_weights(x, hx), expected)
        assert_close(plain(x, hx), lstm_of(kind, "reference")(x, hx))
    assert routes[::3] == [(backend, backend == "triton")] * 2
    assert routes[1::3] == [(backend, False)] * 2


@pytest.mark.parametrize("how", ["hx", "reset_states", "lstm_layer"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states(routes, backend, how):
    if (backend, how) == ("torch", "reset_states"):
        return
    x, hx = given("LSTM")
    hx = tuple(Quantised.of(t if how != "lstm_layer" else t[0]) for t in hx)

    def call(backend, hx):
        lstm = lstm_of("LSTM", backend)
        match how:
            case "hx":
                return lstm(x, hx, resets=RESETS)
            case "reset_states":
                return lstm(x, resets=RESETS, reset_states=hx)
        return lstm_layer(x, list(lstm.parameters()), hx, backend=backend)

    plain = tuple(t.plain() for t in hx)
    for _ in range(2):
        assert_close(call(backend, hx), call("reference", plain))
        assert_close(call(backend, plain), call("reference", plain))
    kernels = backend == "triton" and how != "reset_states"  # a view of one of ours is plain
    assert routes[::4] == [(backend, kernels)] * 2
    assert routes[2::4] == [(backend, False)] * 2
