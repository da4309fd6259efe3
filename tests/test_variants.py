"""Modules with features that torch's modules lack, and heads, against the reference. test_layer.py compares them with
the oracle."""

import copy
import pickle

import pairs
import pytest
import torch
from cases import drawn
from comparing import KERNELS_HERE, PLACES, SECOND, assert_same, both_classes
from pairs import LENGTHS, RAGGED, B, H, I, T, assert_identical, random_inputs, results, states_left
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm
from gpu_lstm import functional
from gpu_lstm.backends import torch_rnn
from gpu_lstm.keras import keras_init

pytestmark = pytest.mark.usefixtures("exact_float32_products")
ABLE = ("reference", KERNELS_HERE)
OF_NORMS = 16  # the condition of layer norms
REGULARISED = dict(recurrent_dropout=0.3, zoneout=(0.3, 0.45), weight_drop=0.5)
ADDED = {"weight_peephole": 3, "gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}  # times H


def made(words, backend):
    """Build a module in words of cases.py."""
    module, _ = drawn((T, B, I, H, *([2] if "projected" in words else [])), words, backend=backend)
    return module.to(**PLACES.get(backend, {}))


@pytest.mark.parametrize(("words", "frozen"), [
    ("peepholes norm-hh-c no-bias recompute", ""), ("peepholes norm-hh-c no-bias recompute", "gain"),
    ("projected both recompute peepholes", "weight_hh"), ("projected both recompute masks", ""),
    ("gru both recompute masks", ""), ("gru deep", "weight_hh")])  # fmt: skip
def test_gradients_of_gradients_by_the_kernels(words, frozen):
    """The gradients are of c alone, with parts frozen, or of everything, with states to reset to."""
    found = []
    for backend in ABLE:
        module = made(words, backend).float()
        place = next(module.parameters())
        given, ragged = [*random_inputs(module, B)], {}
        if "masks" in words:
            given.append(states_left(module, given[1], T, a_step=True))
            ragged = {name: t.to(place.device) for name, t in RAGGED.items()}
        given = tree_map_only(torch.Tensor, lambda t: t.to(place).requires_grad_(), given)  # noqa: B023
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not frozen or not name.startswith(frozen))
        parameters = [p for p in module.parameters() if p.requires_grad]
        torch.manual_seed(5)
        of_call = tree_leaves(module(*given[:2], **ragged, **dict(zip(["reset_states"], given[2:]))))
        loss = sum(t.square().sum() for t in (of_call if ragged else of_call[-1:]))
        inputs = [*(tree_leaves(given) if ragged else given[:1]), *parameters]
        first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        first = [t for t in first if t is not None]  # c_n of one step does not depend on the parameters of the output
        second = torch.autograd.grad(sum(t.square().sum() for t in first), inputs, retain_graph=True)
        plain = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append({n: t.detach() for n, t in enumerate((*first, *second, *plain)) if t is not None})
    assert_same(*found, condition=SECOND * (OF_NORMS if "norm" in words else 1))


def test_a_trace_shows_the_states_after_zoneout():
    lstm = made("deep both zoneout", "reference")
    x = random_inputs(lstm, B)[0].to(lstm.weight_ih_l0)
    output, states = pairs.seeded(lstm, x, lengths=LENGTHS)
    traced = pairs.seeded(gpu_lstm.trace, lstm, x, lengths=LENGTHS)
    torch.testing.assert_close((traced.output, traced.states), (output, states))
    upper = traced.layers[1]
    assert torch.equal(torch.cat([gates.hidden for gates in upper], dim=2), traced.output)
    assert torch.equal(upper[0].cell[3, 2], traced.states[1][2, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", ["projected both", "projected expected", "gru both expected"])
def test_the_reference_computes_half_precision_in_float32_and_rounds_once(dtype, words):
    lstm = made(words, "reference").to(dtype)
    x, hx = tree_map_only(torch.Tensor, lambda t: t.to(dtype), random_inputs(lstm, B))
    rounded, given = tree_leaves(lstm(x, hx, **RAGGED)), tree_map_only(torch.Tensor, torch.Tensor.float, (x, hx))
    exact = tree_leaves(lstm.float()(*given, **RAGGED))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(rounded, exact, strict=True))
    if dtype is torch.bfloat16:  # under autocast the results are the same
        found = torch.autocast("cpu", dtype)(lstm)(*given, **RAGGED)
        assert all(torch.equal(a.to(dtype), b) for a, b in zip(tree_leaves(found), rounded, strict=True))


@both_classes
def test_per_sample_noise_under_vmap(cls):
    lstm, x = cls(3, 4, zoneout=0.5, recurrent_dropout=0.5), torch.randn(4, 1, 3).expand(5, 4, 1, 3)
    outputs = torch.func.vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 5


@pytest.mark.parametrize(("cls", "options", "names"), [
    (gpu_lstm.LSTM, dict(peepholes=True), ["weight_peephole"]),
    (gpu_lstm.LSTMCell, dict(peepholes=True, layer_norm=("c", "hh"), bias=False),
     ["weight_peephole", "gain_hh", "gain_c"]),
    (gpu_lstm.LSTM, dict(layer_norm=True), ["gain_ih", "gain_hh", "gain_c", "bias_c"]),
], ids=str)  # fmt: skip
def test_parameters(cls, options, names):
    """The parameters of a plain module come first, from the same random numbers. All are saved and copied."""
    plain, lstm = (pairs.seeded(cls, I, H, **given) for given in (dict(bias=options.get("bias", True)), options))
    count = len(list(plain.parameters()))
    assert list(lstm.state_dict())[:count] == list(plain.state_dict())
    assert all(map(torch.equal, plain.parameters(), lstm.parameters()))
    added = dict([*lstm.named_parameters()][count:])
    assert {name.removesuffix("_l0"): len(t) // H for name, t in added.items()} == {n: ADDED[n] for n in names}
    for name, parameter in added.items():
        assert 0 < parameter.abs().max() <= H**-0.5 if "weight" in name else (parameter == ("gain" in name)).all()
    x = torch.randn(1, I)
    assert torch.equal(pickle.loads(pickle.dumps(lstm))(x)[0], lstm(x)[0])
    before = copy.deepcopy(lstm.state_dict())
    for parameter in lstm.parameters():
        nn.init.constant_(parameter, 2.0)
    pairs.seeded(lstm.reset_parameters)
    assert_identical(lstm.state_dict(), before)


@pytest.mark.parametrize("words", ["recompute", "stack", "gru deep", "gru stack"])
def test_pickles(words):
    twin, old = pickle.loads(pickle.dumps(made(f"{words} masks weight_drop", None))), made(words, None)
    expected = REGULARISED | (dict(zoneout=0.45) if "gru" in words else {})
    assert {name: getattr(twin, name) for name in expected} == expected
    for name in expected:
        del old.__dict__[name]  # older pickles do not have these
    old = pickle.loads(pickle.dumps(old))
    assert repr(old) == repr(made(words, None))
    old(torch.zeros(2, 1, I))


# Heads. test_layer.py tests their numbers.


@both_classes
def test_on_a_cpu_wide_heads_are_a_call_each(cls, spy):
    module = cls(I, 256, 2, bidirectional=True, heads=4, backend="torch").double()
    twin, calls = copy.deepcopy(module), spy(torch_rnn, cls.__name__.lower())
    twin.backend = "reference"
    x, hx = random_inputs(module, B)
    # Gradients are sums of up to 2 x 1,024 terms. Those of pairs.py have 7 terms. sqrt((2,048 + 20) / (7 + 20)) is 9.
    assert_same(*(results(each, x, hx) for each in (module, twin)), condition=9)
    assert [each.args[2][1].shape for each in calls.call_args_list] == [(64 * module._cell.rows, 64)] * 4 * 2


@both_classes
def test_initial_weights_are_those_of_the_fan_in(cls):
    torch.manual_seed(0)
    module = cls(I, 400, heads=4)
    drawn = {name: p.clone() for name, p in module.named_parameters()}
    assert [name for name, p in drawn.items() if p.abs().max() > 400**-0.5] == ["weight_hh_l0"]
    assert 0.99 * 100**-0.5 < drawn["weight_hh_l0"].abs().max() <= 100**-0.5
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(p, drawn[name]) for name, p in module.named_parameters())
    assert repr(module) == f"gpu_lstm.{cls.__name__}({I}, 400, heads=4)"
    of_head = keras_init(module).weight_hh_l0.view(-1, 4, 100, 100)[:, 1].flatten(0, 1)
    torch.testing.assert_close(of_head.T @ of_head, torch.eye(100), rtol=0, atol=1e-5)


@both_classes
def test_to_torch_cut_and_back(cls):
    x, module = torch.randn(T, B, I).double(), cls(I, 12, 2, heads=3, dtype=torch.float64, backend="reference")
    theirs = gpu_lstm.to_torch(copy.deepcopy(module))
    assert type(theirs) is getattr(nn, cls.__name__)
    torch.testing.assert_close(theirs(x)[0], module(x)[0], rtol=0, atol=1e-12)
    assert torch.equal(theirs.weight_hh_l1, functional.dense(module.weight_hh_l1, 12))
    assert torch.equal(functional.of_heads(theirs.weight_hh_l1, 3), module.weight_hh_l1)
    scripted = torch.jit.script(nn.Sequential(module))
    torch.testing.assert_close(scripted(x)[0], module(x)[0], rtol=0, atol=1e-12)
    state = {name: functional.of_heads(t, 3) if "hh" in name and t.dim() == 2 else t
             for name, t in theirs.state_dict().items()}  # fmt: skip
    again = cls(I, 12, 2, heads=3, dtype=torch.float64)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    rows = module._cell.rows * 12
    sizes = rf"torch.Size\(\[{rows}, 12\]\) .* torch.Size\(\[{rows}, 4\]\)"
    with pytest.raises(RuntimeError, match=f"size mismatch for weight_hh_l0: .* {sizes}"):
        again.load_state_dict(theirs.state_dict())
