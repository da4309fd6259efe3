"""Modules with peepholes and layer norms: against the oracle, ONNX's LSTM, which has peepholes, and the reference; and
who refuses them.

One layer in one direction is in test_layer, the families of kernels in test_sequence_kernels.
"""

import pickle

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from comparing import PLACES, assert_same
from pairs import LENGTHS, RESETS, B, H, I, T, assert_identical, random_inputs, results, truth
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_lstm
from gpu_lstm.tools.convert import to_torch

pytestmark = pytest.mark.usefixtures("exact_float32_products")
TAKERS = ("reference", "triton")
every_taker = pytest.mark.parametrize("backend", TAKERS)
KINDS = {
    "LSTM": dict(num_layers=2, bidirectional=True), "projected": dict(proj_size=2, recompute=True),
    "StackedLSTM": dict(bidirectional=True), "LSTMCell": {}, "recomputed": dict(recompute=True),
}  # fmt: skip
VARIANTS = {
    "peepholes": dict(peepholes=True), "layer_norm": dict(layer_norm=True),
    "both": dict(peepholes=True, layer_norm=("hh", "c"), bias=False),
}  # fmt: skip
CONDITION = {"peepholes": 1, "layer_norm": 16, "both": 16}
ADDED = {"weight_peephole": 3, "gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}  # times H


def kinds_and_variants(*kinds) -> pytest.MarkDecorator:
    """All of them; with a projection peepholes alone."""
    every = [(kind, variant) for kind in kinds for variant in VARIANTS]
    return pytest.mark.parametrize(
        ("kind", "variant"), [(kind, variant) for kind, variant in every if (kind, variant) in DEFINED]
    )


DEFINED = [(kind, variant) for kind in KINDS for variant in VARIANTS if kind != "projected" or variant == "peepholes"]


def made(kind, backend, variant="peepholes"):
    torch.manual_seed(0)
    size = dict(hidden_sizes=[H, 5]) if kind == "StackedLSTM" else dict(hidden_size=H)
    cls = getattr(gpu_lstm, kind if kind in vars(gpu_lstm) else "LSTM")
    module = cls(I, **size, **KINDS[kind], backend=backend, **VARIANTS[variant])
    for name, parameter in module.named_parameters():  # not the ones and zeros that they begin with
        if "gain" in name or "bias_c" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.to(**PLACES.get(backend, {}))


@kinds_and_variants("LSTM", "projected", "StackedLSTM", "recomputed")
@every_taker
def test_a_module_is_a_chain_of_oracles(backend, kind, variant):
    ragged = {} if kind == "StackedLSTM" else dict(lengths=LENGTHS, resets=RESETS)
    ours = made(kind, backend, variant)
    x, hx = random_inputs(ours, B)
    found, true = results(ours, x, hx, **ragged), truth(ours, x, hx, **ragged)
    assert_same(found, true, backend, condition=CONDITION[variant])


def test_onnxs_lstm_gives_the_same():
    """Its operator has peepholes to i, o and f, and gates in the order i, o, f, c, by their equations there."""
    lstm = gpu_lstm.LSTM(I, H, bidirectional=True, peepholes=True)
    x, (h0, c0) = random_inputs(lstm, B)
    weights = {name: t.detach().numpy() for name, t in lstm.named_parameters()}

    def of_both(kind, order):
        parts = [np.split(weights[f"{kind}_l0{suffix}"], 4 if kind != "weight_peephole" else 3) for suffix in SUFFIXES]
        return np.stack([np.concatenate([part[k] for k in order]) for part in parts])

    given = dict(
        X=x.numpy(), W=of_both("weight_ih", GATES), R=of_both("weight_hh", GATES),
        B=np.concatenate([of_both("bias_ih", GATES), of_both("bias_hh", GATES)], axis=1),
        lengths=np.full(B, T, np.int32), h=h0.numpy(), c=c0.numpy(), P=of_both("weight_peephole", (0, 2, 1)),
    )  # fmt: skip
    node = onnx.helper.make_node("LSTM", list(given), ["Y", "Y_h", "Y_c"], hidden_size=H, direction="bidirectional")
    types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
    values = [onnx.helper.make_tensor_value_info(n, types[t.dtype], t.shape) for n, t in given.items()]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in node.output]
    graph = onnx.helper.make_graph([node], "lstm", values, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, h_n, c_n = map(torch.from_numpy, session.run(None, given))
    with torch.no_grad():
        output, states = lstm(x, (h0, c0))
    for ours, theirs in zip((output, *states), (y.transpose(1, 2).flatten(2), h_n, c_n)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


SUFFIXES, GATES = ("", "_reverse"), (0, 3, 1, 2)


@pytest.mark.parametrize("frozen", ["", "weight_hh", "weight_peephole", "gain"])
def test_a_cell_and_gradients_of_gradients_by_the_kernels(frozen):
    for kind, variant in (("LSTMCell", "peepholes"), ("projected", "peepholes"), ("recomputed", "both")):
        found = []
        for backend in TAKERS:
            module = made(kind, backend, variant).to(PLACES["triton"]["dtype"])
            x, hx = random_inputs(module, B)
            x.requires_grad_()
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(not frozen or not name.startswith(frozen))
            parameters = [p for p in module.parameters() if p.requires_grad]
            *_, c = module(x, hx) if kind == "LSTMCell" else module(x, hx)[1]
            first = torch.autograd.grad(c.square().sum(), [x, *parameters], create_graph=True, allow_unused=True)
            first = [t for t in first if t is not None]  # c_n of one step has none of what is behind c
            second = torch.autograd.grad(sum(t.square().sum() for t in first), [x, *parameters], retain_graph=True)
            plain = torch.autograd.grad(c.square().sum(), parameters, allow_unused=True)
            found.append({n: t.detach() for n, t in enumerate((*first, *second, *plain)) if t is not None})
        assert_same(*found, condition=CONDITION[variant])


@pytest.mark.parametrize("variant", ["peepholes", "layer_norm"])
@every_taker
def test_streams_traces_and_chunks(monkeypatch, backend, variant):
    lstm = made("LSTM", backend, variant)
    x, hx = random_inputs(lstm, B)
    whole = results(lstm, x, hx, lengths=LENGTHS)
    traced = gpu_lstm.trace(lstm, x.to(lstm.weight_ih_l0), lengths=LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(traced.output, lstm(x.to(lstm.weight_ih_l0), lengths=LENGTHS)[0])
        one_way = made("recomputed", backend, variant)
        stream = gpu_lstm.Stream(one_way, B)
        steps = torch.stack([stream(step) for step in x.to(one_way.weight_ih_l0)])
        torch.testing.assert_close(steps, one_way(x.to(steps))[0])
    lstm.recompute = True
    monkeypatch.setattr("gpu_lstm.chunks.WORKSPACE", 2 * B * 4 * H * 4)  # two steps
    assert_same(results(lstm, x, hx, lengths=LENGTHS), whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["peepholes", "both"])
@every_taker
def test_compiled_and_exported(backend, variant):
    lstm = made("LSTM", backend, variant)
    x, hx = random_inputs(lstm, B)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    assert_same(results(lstm, x, hx, call=compiled), results(lstm, x, hx))
    x = x.to(lstm.weight_ih_l0)
    exported = torch.export.export(lstm, (x,)).module()
    torch.testing.assert_close(exported(x)[0], lstm(x)[0])


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.LSTMCell])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(cls, variant):
    """Those of an LSTM without a variant first, from the same random numbers; all are saved, copied and shown."""
    bias = VARIANTS[variant].get("bias", True)
    torch.manual_seed(3)
    plain = cls(I, H, bias=bias)
    torch.manual_seed(3)
    lstm = cls(I, H, **VARIANTS[variant])
    count = len(list(plain.parameters()))
    assert list(lstm.state_dict())[:count] == list(plain.state_dict())
    assert all(map(torch.equal, plain.parameters(), lstm.parameters()))
    added = list(lstm.named_parameters())[count:]
    sizes = {name.removesuffix("_l0"): len(parameter) // H for name, parameter in added}
    norms = lstm.layer_norm if isinstance(lstm.layer_norm, tuple) else ("ih", "hh", "c") * lstm.layer_norm
    names = (
        ["weight_peephole"] * lstm.peepholes + [f"gain_{norm}" for norm in norms] + ["bias_c"] * (bias and "c" in norms)
    )
    assert sizes == {name: ADDED[name] for name in names}
    before = {name: t.clone() for name, t in lstm.state_dict().items()}
    for name, parameter in added:
        if name.startswith("weight"):
            assert 0 < parameter.abs().max() <= H**-0.5
        else:
            assert (parameter == name.startswith("gain")).all()
            nn.init.constant_(parameter, 2.0)
    twin = pickle.loads(pickle.dumps(lstm))
    x = torch.randn(2, 1, I) if cls is gpu_lstm.LSTM else torch.randn(1, I)
    assert_identical({"": twin(x)[0]}, {"": lstm(x)[0]})
    torch.manual_seed(3)
    lstm.reset_parameters()
    assert_identical(lstm.state_dict(), before)
    shown = [f"{name}={getattr(lstm, name)!r}" for name in ("peepholes", "layer_norm") if getattr(lstm, name)]
    assert repr(lstm) == ", ".join([repr(plain)[:-1], *shown]) + ")"
    for name in ("peepholes", "layer_norm"):
        with pytest.raises(AttributeError):
            setattr(plain, name, True)


@kinds_and_variants(*KINDS)
@pytest.mark.parametrize("backend", ["torch", "cupy"])
def test_a_backend_that_cannot_says_so(kind, variant, backend):
    module = made(kind, backend, variant).float()
    said = f"takes no {'peepholes' if variant == 'peepholes' else 'layer_norm'}"
    with pytest.raises(ValueError, match=f"^backend '{backend}' {said}; use 'triton' or 'reference'$"):
        module(*random_inputs(module, B))
    if kind == "LSTM":
        packed = pack_padded_sequence(torch.zeros(T, 1, I), [2])
        with pytest.raises(ValueError, match=said):
            module(packed)
    if backend == "torch" and kind != "LSTMCell":
        module.backend = None
        explained = gpu_lstm.explain(module, torch.zeros(T, 1, I))
        assert (explained.backend, explained.others["torch"]) == ("reference", f"it {said}")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.LSTMCell])
@pytest.mark.parametrize("variant", ["peepholes", "layer_norm"])
def test_torch_cannot_have_them(cls, variant):
    model = nn.Sequential(cls(I, H, **VARIANTS[variant]))
    with pytest.raises(ValueError, match=rf"'0' has {variant}=True, which torch\.nn\.LSTM has not"):
        to_torch(model)
    with pytest.raises(ValueError, match=rf"has {variant}=True, and would be scripted as a torch\.nn"):
        torch.jit.script(model)
