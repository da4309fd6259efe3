"""Weights and states that are subclasses of Tensor without memory of their own, as torchao's quantised ones."""

import pytest
import torch
from comparing import KERNELS_HERE
from pairs import random_inputs
from subjects import SUBJECTS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gpu_lstm.dispatch import route as dispatch

T, B = 3, 2
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


KINDS = ("plain", "cell", "stack", "GRU", "GRUCell", "StackedGRU")


def made(kind, backend, weight_hh=lambda weight: weight):
    """A module that learns nothing, with weight_hh(W_hh) in the place of each W_hh."""
    torch.manual_seed(0)
    lstm = SUBJECTS[kind](backend=backend)
    for owner in lstm.modules():
        for name, weight in list(owner._parameters.items()):
            new = weight_hh(weight) if name.startswith("weight_hh") else weight
            setattr(owner, name, nn.Parameter(new.detach(), requires_grad=False))
    return lstm


def given(kind):
    return random_inputs(SUBJECTS[kind](), B, steps=T)


def assert_close(ours, theirs):
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture
def routes(monkeypatch):
    """Of the calls, in order: the backend, and whether kernels ran as operators."""
    found, execute = [], dispatch.execute

    def recorded(route, call):
        found.append((route.backend.value, route.operators is not None))
        return execute(route, call)

    monkeypatch.setattr(dispatch, "execute", recorded)
    return found


@pytest.mark.parametrize(("backend", "kind"), [
    *(("reference", kind) for kind in KINDS), *((KERNELS_HERE, kind) for kind in ("plain", "cell", "GRU")),
    *(("torch", kind) for kind in ("plain", "stack", "GRU", "GRUCell"))])  # fmt: skip
def test_weights_and_states(routes, backend, kind):
    """Before and after a call of the same kind with plain ones, which goes to the kernels as ever."""
    x, hx = given(kind)
    of_weights, plain_weights = made(kind, backend, Quantised.of), lambda w: Quantised.of(w).plain()
    quantised = tree_map_only(Tensor, Quantised.of, hx)
    calls = [
        (made(kind, backend), hx, made(kind, "reference")(x, hx)),
        (of_weights, hx, made(kind, "reference", plain_weights)(x, hx)),
        (made(kind, backend), quantised, made(kind, "reference")(x, tree_map_only(Tensor, plain_weights, hx))),
    ]
    routes.clear()
    for lstm, states, expected in calls + calls:
        assert_close(lstm(x, states), expected)
    plain = [] if backend == "torch" and "ell" in kind else [(backend, False)]  # such a cell needs no route
    assert routes == 2 * [*plain, *[(backend, backend == KERNELS_HERE)] * 2]


@pytest.mark.parametrize("kind", ["plain", "GRU"])
@pytest.mark.parametrize("backend", ["reference", KERNELS_HERE])
def test_states_to_reset_to(backend, kind):
    x, hx = given(kind)
    found, expected = (
        made(kind, name)(x, resets=RESETS, reset_states=tree_map_only(Tensor, how, hx))
        for name, how in ((backend, Quantised.of), ("reference", lambda t: Quantised.of(t).plain()))
    )
    assert_close(found, expected)
