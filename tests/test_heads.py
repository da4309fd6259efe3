"""Heads as a user meets them: beside one head whose W_hh has zeros between them, in float64 on the backends without
kernels. (test_layer.py has the kernels, beside the oracle.)"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_leaves

import gpu_lstm
from bench.inputs import blocks, dense
from gpu_lstm import functional
from gpu_lstm.backends import torch_rnn
from gpu_lstm.keras import keras_init

T, B, I, H, HEADS = 5, 3, 4, 12, 3
F64 = torch.float64
KINDS = pytest.mark.parametrize("kind", [gpu_lstm.LSTM, gpu_lstm.GRU])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
RAGGED = dict(lengths=torch.tensor([5, 2, 0]), resets=torch.arange(T * B).view(T, B) % 4 == 1)


def one_head(module: nn.Module) -> nn.Module:
    """The same with one head."""
    twin = copy.deepcopy(module)
    for of in twin.modules():
        of.__dict__.pop("heads", None)
        for name, weight in [*of.named_parameters(recurse=False)]:
            if "weight_hh" in name:
                setattr(of, name, nn.Parameter(dense(weight.detach(), of.hidden_size // weight.shape[1])))
    return twin


def results(module, *args, **options):
    """Results of a call, and gradients of all parameters."""
    torch.manual_seed(0)
    module.zero_grad()
    leaves = tree_leaves(module(*args, **options))
    sum((k + 1) * t.square().sum() for k, t in enumerate(leaves)).backward()
    return [*leaves, *(p.grad for p in module.parameters())]


def assert_as_one_head(module, *args, tolerance=1e-12, **options):
    ours, theirs = results(module, *args, **options), results(one_head(module), *args, **options)
    for a, b in zip(ours, theirs, strict=True):
        same = b if a.shape == b.shape else blocks(b, b.shape[1] // a.shape[1])
        torch.testing.assert_close(a, same, rtol=0, atol=tolerance)


def x_of(*sizes, dtype=F64):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1), dtype=dtype)


@KINDS
@BACKENDS
def test_heads_compute_what_zeros_between_them_do(kind, backend):
    deep = dict(num_layers=2, bidirectional=True)
    for arguments, options in (({}, {}), ({}, RAGGED), (deep, {}), (deep, RAGGED)):
        assert_as_one_head(kind(I, H, heads=HEADS, dtype=F64, backend=backend, **arguments), x_of(T, B, I), **options)
    stack = getattr(gpu_lstm, f"Stacked{kind.__name__}")(I, [6, H], heads=HEADS, dtype=F64, backend=backend)
    assert_as_one_head(stack, x_of(T, B, I), **RAGGED)
    cell = getattr(gpu_lstm, f"{kind.__name__}Cell")(I, H, heads=HEADS, dtype=F64, backend=backend)
    assert_as_one_head(cell, x_of(B, I))
    assert_as_one_head(cell, x_of(0, I))
    assert_as_one_head(kind(I, H, heads=HEADS, dtype=F64, backend=backend), x_of(T, 0, I))
    with torch.autocast("cpu"):
        x = x_of(T, B, I, dtype=torch.float32)
        assert_as_one_head(kind(I, H, heads=HEADS, backend=backend), x, tolerance=0.008)


@KINDS
def test_noise_and_states_to_reset_to(kind):
    module, x = kind(I, H, heads=HEADS, dtype=F64, recurrent_dropout=0.4, zoneout=0.2), x_of(T, B, I)
    h, c, to_h, to_c = x_of(4, 1, B, H)
    one = kind is gpu_lstm.GRU
    assert_as_one_head(module, x, h if one else (h, c), **RAGGED, reset_states=to_h if one else (to_h, to_c))
    module.recurrent_dropout = module.zoneout = 0.0
    module.weight_drop = 1.0
    without = kind(I, H, heads=HEADS, dtype=F64)
    without.load_state_dict(module.state_dict() | {"weight_hh_l0": torch.zeros_like(module.weight_hh_l0)})
    torch.testing.assert_close(module(x)[0], without(x)[0])
    assert not torch.equal(module.eval()(x)[0], without(x)[0])


@KINDS
def test_on_a_cpu_wide_heads_are_a_call_each(kind, monkeypatch):
    module, x = kind(I, 256, 2, bidirectional=True, heads=4, backend="torch"), x_of(3, 2, I, dtype=torch.float32)
    assert_as_one_head(module, x, lengths=torch.tensor([3, 1]), tolerance=2e-4)
    calls, name = [], kind.__name__.lower()
    theirs = getattr(torch, name)
    monkeypatch.setattr(torch_rnn, name, lambda *args: calls.append(args[2][1].shape) or theirs(*args))
    module(x)
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
    assert repr(module) == f"gpu_lstm.{kind.__name__}(4, 400, heads=4)"
    of_head = keras_init(module).weight_hh_l0.view(-1, 4, 100, 100)[:, 1].flatten(0, 1)
    torch.testing.assert_close(of_head.T @ of_head, torch.eye(100), rtol=0, atol=1e-5)


@KINDS
def test_to_torch_cut_and_back(kind):
    x, module = x_of(T, B, I), kind(I, H, 2, heads=HEADS, dtype=F64, backend="reference")
    theirs = gpu_lstm.to_torch(copy.deepcopy(module))
    assert type(theirs) is getattr(nn, kind.__name__)
    torch.testing.assert_close(theirs(x)[0], module(x)[0], rtol=0, atol=1e-12)
    assert torch.equal(theirs.weight_hh_l1, functional.dense(module.weight_hh_l1, H))
    assert torch.equal(functional.of_heads(theirs.weight_hh_l1, HEADS), module.weight_hh_l1)
    scripted = torch.jit.script(nn.Sequential(module))
    torch.testing.assert_close(scripted(x)[0], module(x)[0], rtol=0, atol=1e-12)
    state = {name: functional.of_heads(t, HEADS) if "hh" in name and t.dim() == 2 else t
             for name, t in theirs.state_dict().items()}  # fmt: skip
    again = kind(I, H, 2, heads=HEADS, dtype=F64)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    rows = module._cell.rows * H
    sizes = (
        rf"size mismatch for weight_hh_l0: .* torch.Size\(\[{rows}, {H}\]\) .* torch.Size\(\[{rows}, {H // HEADS}\]\)"
    )
    with pytest.raises(RuntimeError, match=sizes):
        again.load_state_dict(theirs.state_dict())
    theirs.weight_hh_l1.data[0, -1] = 0.5
    with pytest.raises(ValueError, match=r"^Expected zeros between the 3 heads of weight_hh, got 1 other weights$"):
        functional.of_heads(theirs.weight_hh_l1, HEADS)
    for wrong in (lambda: functional.dense(module.weight_hh_l0, 11)), (lambda: functional.of_heads(x[0].T, 3)):
        with pytest.raises(ValueError, match=r"^Expected weight_hh with a multiple of \d+ rows, got \[\d+, \d+\]$"):
            wrong()
    with pytest.raises(ValueError, match=r"^heads must be greater than zero$"):
        module.heads = 0
    with pytest.raises(ValueError, match=r"^hidden_size must be divisible by heads, got hidden_size=12 and heads=5$"):
        functional.of_heads(theirs.weight_hh_l0, 5)


@KINDS
def test_functions_streams_traces_and_explanations(kind):
    module, x = kind(I, H, heads=HEADS, dtype=F64, backend="reference").eval(), x_of(T, B, I)
    y, _ = module(x)
    layer = getattr(functional, f"{kind.__name__.lower()}_layer")
    assert torch.equal(layer(x, [*module.parameters()], backend="reference", heads=HEADS)[0], y)
    stream = gpu_lstm.Stream(module, B)
    torch.testing.assert_close(torch.stack([stream(step) for step in x]), y, rtol=0, atol=1e-12)
    assert torch.equal(gpu_lstm.trace(module, x).layers[0][0].hidden, y)
    said = gpu_lstm.explain(module, x)
    assert said.layers[0].heads == HEADS
    assert "layer 0, forward: 4 -> 12 of 3 heads" in str(said)
    assert said.problem.startswith(f"{kind.__name__} 4 -> 12 (3 heads), T = 5, B = 3, float64, ")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], y)


@KINDS
def test_derivatives_and_transforms(kind):
    module, x = kind(2, 4, heads=2, dtype=F64), x_of(3, 2, 2).requires_grad_()
    for backend in ("reference", "torch"):
        module.backend = backend
        names = [name for name, _ in module.named_parameters()]

        def run(x, *weights, names=names):
            return functional_call(module, dict(zip(names, weights)), (x,))[0]

        if backend == "reference":
            assert torch.autograd.gradgradcheck(run, (x, *module.parameters()))
        assert torch.autograd.gradcheck(run, (x, *module.parameters()))
        every = vmap(lambda x: module(x)[0])(torch.stack([x, 2 * x]))
        torch.testing.assert_close(every[1], module(2 * x)[0])
        (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
        torch.testing.assert_close(jacrev(lambda x: module(x)[0].sum())(x), expected)


@KINDS
@BACKENDS
def test_graphs(kind, backend):
    module, x = kind(I, H, heads=HEADS, backend=backend), x_of(T, B, I, dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(results(module, x, **RAGGED), results(compiled, x, **RAGGED), strict=True):
        torch.testing.assert_close(ours, theirs)
    exported = torch.export.export(module.eval(), (x,)).module()
    torch.testing.assert_close(exported(x)[0], module(x)[0])


def test_what_heads_do_not_go_with():
    before = torch.get_rng_state()
    for arguments, says in (
        (dict(heads=5), "hidden_size must be divisible by heads, got hidden_size=12 and heads=5"),
        (dict(heads=0), "heads must be greater than zero"),
        (dict(heads=2, proj_size=2), "heads are not defined with a projection: expected proj_size 0, got 2"),
        (dict(heads=2, layer_norm=True), "layer_norm of 'hh' or 'c' is over all units: expected heads=1, got 2"),
        (dict(heads=2, layer_norm=("c",)), "layer_norm of 'hh' or 'c' is over all units: expected heads=1, got 2"),
    ):
        with pytest.raises(ValueError, match=f"^{says}$"):
            gpu_lstm.LSTM(I, H, **arguments)
    for make in (gpu_lstm.GRU, gpu_lstm.LSTMCell, gpu_lstm.GRUCell):
        with pytest.raises(
            ValueError, match=r"^hidden_size must be divisible by heads, got hidden_size=12 and heads=5$"
        ):
            make(I, H, heads=5)
    with pytest.raises(ValueError, match=r"^hidden_size must be divisible by heads, got hidden_size=7 and heads=2$"):
        gpu_lstm.StackedGRU(I, [6, 7], heads=2)
    with pytest.raises(TypeError, match=r"^heads should be of type int, got: float$"):
        gpu_lstm.LSTM(I, H, heads=2.0)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    gpu_lstm.LSTM(I, H, heads=2, layer_norm=("ih",), peepholes=True)(x_of(T, B, I, dtype=torch.float32))
