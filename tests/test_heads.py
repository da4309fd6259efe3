"""Heads as a user meets them. Their numbers, on every backend and beside the oracle: test_layer.py."""

import copy

import pytest
import torch
from comparing import assert_same
from pairs import B, I, T, random_inputs, results
from torch import nn

import gpu_lstm
from gpu_lstm import functional
from gpu_lstm.backends import torch_rnn
from gpu_lstm.keras import keras_init

H, HEADS = 12, 3
KINDS = pytest.mark.parametrize("kind", [gpu_lstm.LSTM, gpu_lstm.GRU])


@KINDS
def test_on_a_cpu_wide_heads_are_a_call_each(kind, monkeypatch):
    module = kind(I, 256, 2, bidirectional=True, heads=4, backend="torch").double()
    twin, calls, name = copy.deepcopy(module), [], kind.__name__.lower()
    twin.backend, theirs = "reference", getattr(torch, name)
    monkeypatch.setattr(torch_rnn, name, lambda *args: calls.append(args[2][1].shape) or theirs(*args))
    x, hx = random_inputs(module, B)
    # Gradients are sums of up to 2 x 1,024 terms where those of pairs.py have 7: sqrt((2,048 + 20) / (7 + 20)).
    assert_same(*(results(each, x, hx) for each in (module, twin)), condition=9)
    assert calls == [(64 * module._cell.rows, 64)] * 4 * 2


@KINDS
def test_initial_weights_are_those_of_the_fan_in(kind):
    torch.manual_seed(0)
    module = kind(I, 400, heads=4)
    drawn = {name: p.clone() for name, p in module.named_parameters()}
    assert [name for name, p in drawn.items() if p.abs().max() > 400**-0.5] == ["weight_hh_l0"]
    assert 0.99 * 100**-0.5 < drawn["weight_hh_l0"].abs().max() <= 100**-0.5
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(p, drawn[name]) for name, p in module.named_parameters())
    assert repr(module) == f"gpu_lstm.{kind.__name__}({I}, 400, heads=4)"
    of_head = keras_init(module).weight_hh_l0.view(-1, 4, 100, 100)[:, 1].flatten(0, 1)
    torch.testing.assert_close(of_head.T @ of_head, torch.eye(100), rtol=0, atol=1e-5)


@KINDS
def test_to_torch_cut_and_back(kind):
    x, module = torch.randn(T, B, I).double(), kind(I, H, 2, heads=HEADS, dtype=torch.float64, backend="reference")
    theirs = gpu_lstm.to_torch(copy.deepcopy(module))
    assert type(theirs) is getattr(nn, kind.__name__)
    torch.testing.assert_close(theirs(x)[0], module(x)[0], rtol=0, atol=1e-12)
    assert torch.equal(theirs.weight_hh_l1, functional.dense(module.weight_hh_l1, H))
    assert torch.equal(functional.of_heads(theirs.weight_hh_l1, HEADS), module.weight_hh_l1)
    scripted = torch.jit.script(nn.Sequential(module))
    torch.testing.assert_close(scripted(x)[0], module(x)[0], rtol=0, atol=1e-12)
    state = {name: functional.of_heads(t, HEADS) if "hh" in name and t.dim() == 2 else t
             for name, t in theirs.state_dict().items()}  # fmt: skip
    again = kind(I, H, 2, heads=HEADS, dtype=torch.float64)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    rows = module._cell.rows * H
    sizes = (
        rf"size mismatch for weight_hh_l0: .* torch.Size\(\[{rows}, {H}\]\) .* torch.Size\(\[{rows}, {H // HEADS}\]\)"
    )
    with pytest.raises(RuntimeError, match=sizes):
        again.load_state_dict(theirs.state_dict())
