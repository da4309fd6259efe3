"""Modules with features that torch's lack, against ONNX's operators, the reference; what refuses them.

Against the oracle: test_layer.py.
"""

import copy
import pickle
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pairs
import pytest
import torch
from comparing import BACKENDS, PLACES, SECOND, assert_same, every_backend
from pairs import LENGTHS, RAGGED, B, H, I, T, assert_identical, noises_of, random_inputs, results, states_left, truth
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")
ABLE = ("reference", "triton")
every_able = pytest.mark.parametrize("backend", ABLE)
LSTM, Stack = partial(gpu_lstm.LSTM, I, H), partial(gpu_lstm.StackedLSTM, I)
KINDS = {
    "LSTM": partial(LSTM, num_layers=2, bidirectional=True), "deep": partial(LSTM, num_layers=2),
    "projected": partial(LSTM, proj_size=2, bidirectional=True, recompute=True),
    "recomputed": partial(LSTM, recompute=True), "LSTMCell": partial(gpu_lstm.LSTMCell, I, H),
    "StackedLSTM": partial(Stack, [H, H]), "one of a stack": partial(Stack, [H]),
    "residual": partial(Stack, [I, I], residual=True), "GRU": partial(gpu_lstm.GRU, I, H, num_layers=2),
    "recomputed GRU": partial(gpu_lstm.GRU, I, H, bidirectional=True, recompute=True),
    "one GRU": partial(gpu_lstm.GRU, I, H), "StackedGRU": partial(gpu_lstm.StackedGRU, I, [H, 3])}  # fmt: skip
NOISE = dict(recurrent_dropout=0.3, zoneout=(0.2, 0.4))
ALL, GRUS_ZONEOUT = dict(**NOISE, weight_drop=0.25), 0.4
OPTIONS = {
    "plain": {}, "peepholes": dict(peepholes=True), "layer_norm": dict(layer_norm=True),
    "both": dict(peepholes=True, layer_norm=("c", "hh"), bias=False), "noise": NOISE, "noise in eval": NOISE,
    "all noise": ALL, "all noise in eval": ALL, **{name: {name: value} for name, value in ALL.items()}}  # fmt: skip
CONDITION = {"layer_norm": 16, "both": 16}
ADDED = {"weight_peephole": 3, "gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}  # times H


def made(kind, backend, option="plain", **arguments):
    torch.manual_seed(0)
    options = OPTIONS[option] | arguments
    if "GRU" in kind and "zoneout" in options:
        options["zoneout"] = GRUS_ZONEOUT
    module = KINDS[kind](**options, backend=backend).train("eval" not in option)
    for name, parameter in module.named_parameters():  # not the ones and zeros that they begin with
        if "gain" in name or "bias_c" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.to(**PLACES.get(backend, {}))


def call_of(module, **how):
    return results(module, *random_inputs(module, B), **dict(seed=5) | how)


@pytest.mark.parametrize(("backend", "kind"), [("reference", "LSTM"), ("triton", "residual")])
def test_all_of_h_is_dropped(backend, kind):
    ours = made(kind, backend, "noise", recurrent_dropout=1.0)
    x, hx = random_inputs(ours, B)
    expected = truth(ours, x, hx, **RAGGED, noises=noises_of(ours, seed=5))
    assert_same(results(ours, x, hx, seed=5, **RAGGED), expected, backend)


def by_onnx(operator, given, outputs, **attributes):
    """The output and the final states by an operator of ONNX, both directions."""
    info = onnx.helper.make_tensor_value_info
    attributes |= dict(hidden_size=H, direction="bidirectional")
    node = onnx.helper.make_node(operator, list(given), outputs, **attributes)
    values = [info(n, onnx.helper.np_dtype_to_tensor_dtype(t.dtype), t.shape) for n, t in given.items()]
    results = [info(n, onnx.TensorProto.FLOAT, None) for n in outputs]
    graph, opset = onnx.helper.make_graph([node], operator, values, results), onnx.helper.make_opsetid("", 14)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, *states = map(torch.from_numpy, session.run(None, given))
    return [y.transpose(1, 2).flatten(2), *states]


@pytest.mark.parametrize(("kind", "order", "variant", "attributes"), [
    ("LSTM", (0, 3, 1, 2), dict(peepholes=True), {}), ("GRU", (1, 0, 2), {}, dict(linear_before_reset=1)),
], ids=["LSTM", "GRU"])  # fmt: skip
def test_onnxs_operator_gives_the_same(kind, order, variant, attributes):
    """By its equations there: the LSTM's gates in the order i, o, f, c, peepholes to i, o and f; the GRU's z, r, h."""
    module = getattr(gpu_lstm, kind)(I, H, bidirectional=True, **variant)
    x, hx = random_inputs(module, B)
    weights = {name: t.detach().numpy() for name, t in module.named_parameters()}

    def of_both(name, order=order):
        parts = [np.split(weights[f"{name}_l0{suffix}"], len(order)) for suffix in ("", "_reverse")]
        return np.stack([np.concatenate([part[k] for k in order]) for part in parts])

    biases = np.concatenate([of_both("bias_ih"), of_both("bias_hh")], axis=1)
    given = dict(X=x.numpy(), W=of_both("weight_ih"), R=of_both("weight_hh"), B=biases, lengths=np.full(B, T, np.int32))
    given |= zip("hc", (t.numpy() for t in tree_leaves(hx)))
    if variant:
        given["P"] = of_both("weight_peephole", (0, 2, 1))
    outputs = by_onnx(kind, given, ["Y", *(f"Y_{letter}" for letter in pairs.letters_of(module))], **attributes)
    torch.testing.assert_close(tree_leaves(module(x, hx)), outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "option", "frozen"), [
    ("LSTMCell", "peepholes", "weight_peephole"), ("recomputed", "both", ""), ("recomputed", "both", "gain"),
    ("projected", "peepholes", "weight_hh"), ("projected", "noise", ""), ("recomputed GRU", "noise", ""),
    ("GRU", "plain", "weight_hh")])  # fmt: skip
def test_gradients_of_gradients_by_the_kernels(kind, option, frozen):
    """Of c alone, with parts frozen; or of everything, with states to reset to."""
    found = []
    for backend in ABLE:
        module = made(kind, backend, option).to(PLACES["triton"]["dtype"])
        place = next(module.parameters())
        given, ragged = [*random_inputs(module, B)], {}
        if option == "noise":
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
        first = [t for t in first if t is not None]  # c_n of one step has none of what is behind c
        second = torch.autograd.grad(sum(t.square().sum() for t in first), inputs, retain_graph=True)
        plain = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append({n: t.detach() for n, t in enumerate((*first, *second, *plain)) if t is not None})
    assert_same(*found, condition=SECOND * CONDITION.get(option, 1))


@pytest.mark.parametrize(("kind", "option", "how"), [
    ("deep", "all noise", "ragged"), ("residual", "plain", "ragged"), ("projected", "plain", "states"),
    ("GRU", "all noise", "states"),
    *(pytest.param(*case, "ragged", marks=pytest.mark.deep) for case in (
        ("recomputed", "both"), ("LSTM", "all noise"), ("deep", "all noise in eval"), ("projected", "all noise"))),
])  # fmt: skip
def test_a_seed_means_the_same_on_every_backend_and_in_chunks_of_time(monkeypatch, kind, option, how):
    """Each chunk gets its part of the noise, of lengths, resets and states to reset to."""
    between = dict(dropout=0.3) if kind in ("LSTM", "deep", "GRU") else {}
    ours, expected = (made(kind, backend, option, **between).to(torch.float32) for backend in ("triton", "reference"))
    ours.recompute, ragged = False, dict(RAGGED)
    if how == "states":
        ragged["reset_states"] = states_left(ours, random_inputs(ours, B)[1], T, a_step=True)
    whole = call_of(ours, **ragged)
    noisy = bool(between or "noise" in option) and "eval" not in option
    true = call_of(expected, **ragged)
    assert noisy is not torch.equal(call_of(expected, seed=6, **ragged)["output"], true["output"])
    assert_same(whole, true, condition=CONDITION.get(option, 1))
    ours.recompute = True
    monkeypatch.setattr("gpu_lstm.backends.schedule.WORKSPACE", 2 * B * 4 * H * 4)  # two steps
    assert_same(call_of(ours, **ragged), whole)
    with torch.no_grad():
        found = call_of(ours, **ragged)
    assert_same(found, {name: whole[name] for name in found})


def test_a_trace_shows_the_states_after_zoneout():
    lstm = made("LSTM", "reference", "zoneout")
    x = random_inputs(lstm, B)[0].to(lstm.weight_ih_l0)
    output, states = pairs.seeded(lstm, x, lengths=LENGTHS)
    traced = pairs.seeded(gpu_lstm.trace, lstm, x, lengths=LENGTHS)
    torch.testing.assert_close((traced.output, traced.states), (output, states))
    upper = traced.layers[1]
    assert torch.equal(torch.cat([gates.hidden for gates in upper], dim=2), traced.output)
    assert torch.equal(upper[0].cell[3, 2], traced.states[1][2, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["plain", "noise in eval"])
@pytest.mark.parametrize("kind", ["projected", "recomputed GRU"])
def test_the_reference_computes_half_precision_in_float32_and_rounds_once(dtype, option, kind):
    lstm = made(kind, "reference", option).to(dtype)
    x, hx = tree_map_only(torch.Tensor, lambda t: t.to(dtype), random_inputs(lstm, B))
    rounded, given = tree_leaves(lstm(x, hx, **RAGGED)), tree_map_only(torch.Tensor, torch.Tensor.float, (x, hx))
    exact = tree_leaves(lstm.float()(*given, **RAGGED))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(rounded, exact, strict=True))
    if dtype is torch.bfloat16:  # under autocast alike
        found = torch.autocast("cpu", dtype)(lstm)(*given, **RAGGED)
        assert all(torch.equal(a.to(dtype), b) for a, b in zip(tree_leaves(found), rounded, strict=True))


@pytest.mark.parametrize("kind", ["LSTM", "residual", "GRU", "StackedGRU"])
@every_backend
def test_in_eval_dropout_of_any_kind_changes_no_bit(backend, kind):
    dropped = made(kind, backend, recurrent_dropout=0.5, weight_drop=0.5).eval()
    dropped.dropout = 0.5
    assert_identical(call_of(dropped, **RAGGED), call_of(made(kind, backend).eval(), **RAGGED))


@pytest.mark.parametrize(("backend", "kind", "rate"), [
    *((backend, kind, 0.5) for backend in BACKENDS for kind in ("recomputed", "one GRU")),
    ("torch", "one of a stack", 1.0)])  # fmt: skip
def test_weight_drop_runs_everywhere(backend, kind, rate):
    """As an LSTM whose weight_hh has what a seed leaves of it; gradients pass what was left only."""
    lstm, plain = made(kind, backend, weight_drop=rate), made(kind, "reference").to(**PLACES[backend])
    name, weight_hh = next((n, p) for n, p in plain.named_parameters() if "weight_hh" in n)
    torch.manual_seed(5)
    factors = dropout(torch.ones_like(weight_hh), rate)
    weight_hh.data *= factors
    got, expected = call_of(lstm), call_of(plain)
    expected[f"d{name}"] *= factors
    assert_same(got, expected)
    packed = pack_padded_sequence(torch.randn(4, 4, I).to(weight_hh), torch.tensor([4, 3, 3, 1]))
    torch.manual_seed(5)
    torch.testing.assert_close(lstm(packed)[0].data, plain(packed)[0].data, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("with_onednn")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@every_able
def test_autocast(backend, kind, device):
    lstm = made(kind, backend, "all noise").to(device, torch.float32)
    x = random_inputs(lstm, B)[0].to(device)
    half = pairs.seeded(torch.autocast(device, torch.float16)(lstm), x)[0]
    assert half.dtype is (torch.float32 if (kind, device) == ("GRU", "cpu") else torch.float16)
    torch.testing.assert_close(half.float(), pairs.seeded(lstm, x)[0], rtol=0, atol=5e-3)


@every_backend
@pytest.mark.parametrize("cls", [gpu_lstm.StackedLSTM, gpu_lstm.StackedGRU])
def test_what_dropout_keeps_between_layers_is_scaled(backend, cls):
    stack = cls(3, [4, 5], dropout=0.25, backend=backend).to(**PLACES[backend])
    x = torch.randn(6, 2, 3, **PLACES[backend])
    with torch.random.fork_rng():
        torch.manual_seed(7)
        found, _ = stack(x)
        torch.manual_seed(7)
        kept = torch.empty(6, 2, 4, dtype=torch.bool, device=x.device).bernoulli_(0.75)
    lower, upper = stack.layers
    torch.testing.assert_close(found, upper(lower(x)[0] * kept / 0.75)[0])


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.GRU])
def test_per_sample_noise_under_vmap(cls):
    lstm, x = cls(3, 4, zoneout=0.5, recurrent_dropout=0.5), torch.randn(4, 1, 3).expand(5, 4, 1, 3)
    outputs = torch.func.vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 5


@pytest.mark.parametrize(("cls", "variant", "names"), [
    (gpu_lstm.LSTM, "peepholes", ["weight_peephole"]), 
    (gpu_lstm.LSTMCell, "both", ["weight_peephole", "gain_hh", "gain_c"]),
    (gpu_lstm.LSTM, "layer_norm", ["gain_ih", "gain_hh", "gain_c", "bias_c"]),
])  # fmt: skip
def test_parameters(cls, variant, names):
    """Those of an LSTM without a variant first, from the same random numbers; all are saved, copied and shown."""
    plain = pairs.seeded(cls, I, H, bias=OPTIONS[variant].get("bias", True))
    lstm = pairs.seeded(cls, I, H, **OPTIONS[variant])
    count = len(list(plain.parameters()))
    assert list(lstm.state_dict())[:count] == list(plain.state_dict())
    assert all(map(torch.equal, plain.parameters(), lstm.parameters()))
    added = dict([*lstm.named_parameters()][count:])
    assert {name.removesuffix("_l0"): len(t) // H for name, t in added.items()} == {n: ADDED[n] for n in names}
    for name, parameter in added.items():
        assert 0 < parameter.abs().max() <= H**-0.5 if "weight" in name else (parameter == ("gain" in name)).all()
    x = torch.randn(1, I)
    assert torch.equal(pickle.loads(pickle.dumps(lstm))(x)[0], lstm(x)[0])
    shown = [f"{name}={getattr(lstm, name)!r}" for name in ("peepholes", "layer_norm") if getattr(lstm, name)]
    assert repr(lstm) == ", ".join([repr(plain)[:-1], *shown]) + ")"
    before = copy.deepcopy(lstm.state_dict())
    for parameter in lstm.parameters():
        nn.init.constant_(parameter, 2.0)
    pairs.seeded(lstm.reset_parameters)
    assert_identical(lstm.state_dict(), before)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("StackedLSTM", "layer_norm"), *((kind, name) for kind in ("LSTM", "GRU", "StackedGRU") for name in NOISE)],
)
def test_a_backend_that_cannot_says_so_and_explain_does(kind, name):
    module, said = made(kind, "torch", name).float(), f"does not support {name}"
    with pytest.raises(ValueError, match=f"^backend 'torch' {said}; use 'triton' or 'reference'$"):
        module(*random_inputs(module, B))
    explained = gpu_lstm.explain(made(kind, None, name), torch.zeros(T, 1, I))
    assert (explained.backend, explained.others["torch"]) == ("reference", f"it {said}")
    if name == "recurrent_dropout":  # in eval() it is off
        module.eval()(*random_inputs(module, B))


@pytest.mark.parametrize("kind", ["recomputed", "one of a stack", "GRU", "StackedGRU"])
def test_pickles(kind):
    twin, old = pickle.loads(pickle.dumps(made(kind, None, "all noise"))), made(kind, None)
    expected = ALL | (dict(zoneout=GRUS_ZONEOUT) if "GRU" in kind else {})
    assert {name: getattr(twin, name) for name in ALL} == expected
    for name in ALL:
        del old.__dict__[name]  # as in a pickle from before there were any
    old = pickle.loads(pickle.dumps(old))
    assert repr(old) == repr(made(kind, None))
    old(torch.zeros(2, 1, I))
