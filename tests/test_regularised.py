"""Recurrent dropout, zoneout and weight drop of the modules: numbers, what the probabilities mean, which backend runs.

One layer in one direction, with its masks given, is in test_layer.
"""

import pickle
from functools import partial

import pytest
import torch
from comparing import PLACES, assert_same
from pairs import LENGTHS, RESETS, B, I, T, assert_identical, random_inputs, results, truth, weights_of
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_lstm
from gpu_lstm.call.choices import Backend, select
from gpu_lstm.call.noise import NO_NOISE, Noise, draw
from gpu_lstm.settings import Settings
from gpu_lstm.call.weights import Weights

pytestmark = pytest.mark.usefixtures("exact_float32_products")
TAKERS = ("reference", "triton")
every_taker = pytest.mark.parametrize("backend", TAKERS)
every_class = pytest.mark.parametrize(
    "make", [gpu_lstm.LSTM, lambda i, h, **kw: gpu_lstm.StackedLSTM(i, [h], **kw)], ids=["LSTM", "StackedLSTM"]
)
ALL = dict(recurrent_dropout=0.3, zoneout=(0.2, 0.4), weight_drop=0.25)
RAGGED = dict(lengths=LENGTHS, resets=RESETS)
MODULES = {
    "deep": partial(gpu_lstm.LSTM, I, 4, num_layers=2, dropout=0.3),
    "both directions": partial(gpu_lstm.LSTM, I, 4, num_layers=2, bidirectional=True, dropout=0.3),
    "recompute": partial(gpu_lstm.LSTM, I, 4, proj_size=2, bidirectional=True, recompute=True),
}


def made(name, backend, **arguments):
    torch.manual_seed(0)
    return MODULES[name](backend=backend, **arguments).to(PLACES[backend]["device"])  # float32 everywhere


def call_of(module, seed=5, **ragged):
    return results(module, *random_inputs(module, B), seed=seed, **ragged)


# Numbers


@pytest.mark.parametrize(("training", "ragged"), [(True, RAGGED), (True, {}), (False, RAGGED)],
                         ids=["training, ragged", "training", "eval, ragged"])  # fmt: skip
@pytest.mark.parametrize("name", MODULES)
def test_a_seed_means_the_same_on_every_backend(name, training, ragged):
    ours, expected = (made(name, backend, **ALL).train(training) for backend in ("triton", "reference"))
    assert_same(call_of(ours, **ragged), call_of(expected, **ragged))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["deep", "recompute"])
def test_chunks_of_time_get_their_part_of_the_noise(monkeypatch, name, training):
    lstm = made(name, "triton", **ALL).train(training)
    lstm.dropout, lstm.recompute = 0.0, True
    whole = call_of(lstm, **RAGGED)
    monkeypatch.setattr("gpu_lstm.chunks.WORKSPACE", 2 * B * 16 * 4)  # two steps
    assert_same(call_of(lstm, **RAGGED), whole)


def test_another_seed_means_another_noise():
    for name, value in ALL.items():
        lstm = made("recompute", "reference", **{name: value})
        assert_identical(call_of(lstm), call_of(lstm))
        assert not torch.equal(call_of(lstm)["output"], call_of(lstm, seed=6)["output"]), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@every_taker
@pytest.mark.parametrize(("cls", "arguments"), [
    (gpu_lstm.LSTM, dict(hidden_size=4, num_layers=2, bidirectional=True, proj_size=2)),
    (gpu_lstm.StackedLSTM, dict(hidden_sizes=[I, I], residual=True)),
], ids=["LSTM", "StackedLSTM"])  # fmt: skip
def test_a_module_is_a_chain_of_oracles(backend, training, cls, arguments):
    torch.manual_seed(0)
    ours = cls(I, **arguments, backend=backend, recurrent_dropout=0.3, zoneout=(0.2, 0.4), **PLACES[backend])
    x, hx = random_inputs(ours.train(training), B)
    got = results(ours, x, hx, seed=5, **RAGGED)
    like = next(ours.parameters())
    shapes = [[Weights(*(like.new_empty(w.shape) for w in ws[:2])) for ws in layer] for layer in weights_of(ours)[1]]
    torch.manual_seed(5)
    noises = drawn(shapes, T, B, like.dtype, 0.3, (0.2, 0.4), training)
    noises = [[in_full(noise, weights) for noise, weights in zip(*layer)] for layer in zip(noises, shapes)]
    assert_same(got, truth(ours, x, hx, **RAGGED, noises=noises))


def drawn(weights, steps, batch, dtype, recurrent_dropout, zoneout, training) -> list[list[Noise]]:
    """The noise that a call with these settings would have."""
    settings = Settings(training, recurrent_dropout=recurrent_dropout, zoneout=zoneout)
    return draw(weights, torch.empty(steps, batch, 1), dtype, settings)[0]


def in_full(noise, weights) -> dict:
    """The masks of dropout and zoneout as the oracle takes them."""
    width, hidden = weights.weight_hh.shape[1], len(weights.weight_hh) // 4
    sizes = (B, width), (T, B, width), (T, B, hidden)
    tensors = (None if t is None else t.double().cpu().expand(size).numpy() for t, size in zip(noise, sizes))
    return dict(zip(Noise._fields, tensors))


# What the probabilities mean


@every_taker
def test_dropping_all_of_h_is_an_lstm_without_recurrent_weights(backend):
    for name in ("recurrent_dropout", "weight_drop"):
        lstm, plain = made("both directions", backend, **{name: 1.0}), made("both directions", "reference")
        lstm.dropout = plain.dropout = 0.0
        with torch.no_grad():
            for parameter in (p for n, p in plain.named_parameters() if n.startswith("weight_hh")):
                parameter.zero_()
        got, expected = call_of(lstm, lengths=LENGTHS), call_of(plain, lengths=LENGTHS)
        others = [n for n in got if not n.startswith("dweight_hh") and n != "dh0"]
        assert_same({n: got[n] for n in others}, {n: expected[n] for n in others})
        assert all((got[n] == 0).all() for n in got if n.startswith("dweight_hh"))


def test_the_statistics_of_what_is_drawn():
    torch.manual_seed(0)
    weights = [[Weights(torch.empty(80, 3), torch.empty(80, 10))] * 2] * 3
    noises = drawn(weights, 30, 40, torch.float32, 0.2, (0.1, 0.4), True)
    assert [len(layer) for layer in noises] == [2, 2, 2]
    noises = [noise for layer in noises for noise in layer]
    assert [t.shape for t in noises[0]] == [(40, 10), (30, 40, 10), (30, 40, 20)]
    assert [t.dtype for t in noises[0]] == [torch.float32, torch.bool, torch.bool]
    assert noises[0].dropout_h.unique().tolist() == [0, 1.25]
    rates = [(n.dropout_h == 0, n.zoneout_h, n.zoneout_c) for n in noises]
    for masks, rate in zip(zip(*rates), (0.2, 0.1, 0.4)):
        for mask in masks:
            assert abs(mask.double().mean() - rate) < 4 * (rate * (1 - rate) / mask.numel()) ** 0.5
        assert not torch.equal(masks[0], masks[1]), "directions have masks of their own"
        assert not torch.equal(masks[0], masks[2]), "and so have layers"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_eval_has_only_the_expectation_of_zoneout(dtype):
    weights = [[Weights(torch.empty(80, 3), torch.empty(80, 10))]]
    ((noise,),) = drawn(weights, 30, 40, dtype, 0.2, (0.1, 0.0), False)
    assert noise == Noise(None, torch.tensor(0.1, dtype=torch.promote_types(dtype, torch.float32)), None)
    assert drawn(weights, 30, 40, dtype, 0.2, (0.0, 0.0), False) == [[NO_NOISE]]


@pytest.mark.parametrize("backend", ["torch", *TAKERS])
def test_in_eval_dropout_of_any_kind_changes_no_bit(backend):
    kinds = dict(recurrent_dropout=0.5, weight_drop=0.5)
    for name in ("both directions", "recompute"):
        assert_identical(*(call_of(made(name, backend, **each).to(torch.float32).eval()) for each in (kinds, {})))


@pytest.mark.parametrize("backend", ["torch", *TAKERS])
@every_class
def test_weight_drop_runs_everywhere(make, backend, device):
    """As an LSTM whose weight_hh has what a seed leaves of it; gradients pass what was left only."""
    torch.manual_seed(0)
    lstm = make(I, 4, backend=backend, device=device, weight_drop=0.5)
    plain = make(I, 4, backend="reference", device=device)
    plain.load_state_dict(lstm.state_dict())
    name, weight_hh = next((n, p) for n, p in plain.named_parameters() if "weight_hh" in n)
    torch.manual_seed(5)
    factors = dropout(torch.ones_like(weight_hh), 0.5)
    with torch.no_grad():
        weight_hh *= factors
    got, expected = call_of(lstm), call_of(plain)
    expected[f"d{name}"] *= factors
    assert_same(got, expected)
    packed = pack_padded_sequence(torch.randn(4, 4, I, device=device), torch.tensor([4, 3, 3, 1]))
    torch.manual_seed(5)
    torch.testing.assert_close(lstm(packed)[0].data, plain(packed)[0].data, rtol=1e-5, atol=1e-6)


# Which backend runs


@pytest.mark.parametrize("backend", ["torch", "cupy"])
@every_class
def test_a_backend_that_cannot_says_so(make, backend):
    x = torch.zeros(2, 1, 3)
    for name, value in (("recurrent_dropout", 0.1), ("zoneout", (0.0, 0.1))):
        lstm = make(3, 4, backend=backend, **{name: value})
        with pytest.raises(ValueError, match=f"^backend '{backend}' takes no {name}; use 'triton' or 'reference'$"):
            lstm(x)
    with pytest.raises(ValueError, match="takes no zoneout"):
        lstm.eval()(x)
    with gpu_lstm.backend(backend), pytest.raises(ValueError, match="takes no zoneout"):
        make(3, 4, zoneout=0.1)(x)
    if backend == "torch":
        make(3, 4, backend="torch", recurrent_dropout=0.1).eval()(x)
        with pytest.raises(ValueError, match="takes no zoneout"):
            gpu_lstm.LSTM(3, 4, backend="torch", zoneout=0.1)(pack_padded_sequence(x, torch.tensor([2])))


def test_auto_takes_triton_where_it_can_else_the_reference(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for unable, chosen in ((None, Backend.TRITON), (Backend.TRITON, Backend.REFERENCE)):
        monkeypatch.setattr("gpu_lstm.backends.can_run", lambda b, *_, unable=unable: b is not unable)
        assert select("auto", cuda, torch.float32, "zoneout") is chosen
        assert select("auto", cpu, torch.float32, "zoneout") is Backend.REFERENCE
        assert select("auto", cpu, torch.float32) is Backend.TORCH


# torch.compile, autocast, vmap, trace


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "training"), [("triton", True), ("reference", False)])
def test_compiled_whole_it_computes_the_same(backend, training):
    lstm = made("recompute", backend, **ALL).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x, hx = random_inputs(lstm, B)
    assert_same(results(lstm, x, hx, call=compiled, seed=5, **RAGGED), call_of(lstm, **RAGGED))


@every_taker
def test_autocast(backend, device):
    lstm = made("both directions", backend, **ALL)
    x = random_inputs(lstm, B)[0].to(device)
    outputs = []
    for dtype in (torch.float16, None):
        torch.manual_seed(5)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            outputs.append(lstm(x)[0])
    assert outputs[0].dtype is torch.float16
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=0, atol=5e-3)


def test_per_sample_noise_under_vmap():
    lstm = gpu_lstm.LSTM(3, 4, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(4, 1, 3).expand(5, 4, 1, 3)
    outputs = torch.func.vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 5


def test_a_trace_shows_the_states_after_zoneout():
    lstm = made("both directions", "reference", zoneout=(0.2, 0.4))
    traced = gpu_lstm.trace(lstm, random_inputs(lstm, B)[0], lengths=LENGTHS)
    top = torch.cat([gates.hidden for gates in traced.layers[1]], dim=2)
    assert torch.equal(top, traced.output)
    h_n, c_n = traced.states
    assert torch.equal(traced.layers[1][0].cell[3, 2], c_n[2, 2])
    assert torch.equal(traced.layers[1][1].hidden[0], torch.where(LENGTHS[:, None] > 0, h_n[3], 0))


# Arguments


@every_class
def test_pickles(make):
    twin = pickle.loads(pickle.dumps(make(3, 4, **ALL)))
    assert {name: getattr(twin, name) for name in ALL} == ALL
    old = make(3, 4)
    for name in ALL:
        del old.__dict__[name]  # as in a pickle from before there were any
    old = pickle.loads(pickle.dumps(old))
    assert repr(old) == repr(make(3, 4))
    old(torch.zeros(2, 1, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
def test_torchscript_cannot_have_them(name):
    lstm = gpu_lstm.LSTM(3, 4, **{name: ALL[name]})
    with pytest.raises(ValueError, match=f"the LSTM has {name}=.*, and would be scripted as a torch.nn.LSTM"):
        torch.jit.script(nn.Sequential(lstm))
    setattr(lstm, name, 0.0)
    torch.jit.script(nn.Sequential(lstm))
