"""Modules with peepholes: against the oracle, ONNX's LSTM, which has them, and the reference; and who refuses them.

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
from gpu_lstm.convert import to_torch

pytestmark = pytest.mark.usefixtures("exact_float32_products")
TAKERS = ("reference", "triton")
every_taker = pytest.mark.parametrize("backend", TAKERS)
KINDS = {
    "LSTM": dict(num_layers=2, bidirectional=True), "projected": dict(proj_size=2, recompute=True),
    "StackedLSTM": dict(bidirectional=True), "LSTMCell": {},
}  # fmt: skip


def made(kind, backend):
    torch.manual_seed(0)
    size = dict(hidden_sizes=[H, 2]) if kind == "StackedLSTM" else dict(hidden_size=H)
    cls = getattr(gpu_lstm, kind if kind in vars(gpu_lstm) else "LSTM")
    module = cls(I, **size, **KINDS[kind], backend=backend, peepholes=True)
    return module.to(**PLACES.get(backend, {}))


@pytest.mark.parametrize("ragged", [{}, dict(lengths=LENGTHS, resets=RESETS)], ids=["plain", "ragged"])
@pytest.mark.parametrize("kind", ["LSTM", "projected", "StackedLSTM"])
@every_taker
def test_a_module_is_a_chain_of_oracles(backend, kind, ragged):
    ours = made(kind, backend)
    x, hx = random_inputs(ours, B)
    assert_same(results(ours, x, hx, **ragged), truth(ours, x, hx, **ragged), backend)


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


@pytest.mark.parametrize("frozen", ["", "weight_hh", "weight_peephole"])
def test_a_cell_and_gradients_of_gradients_by_the_kernels(frozen):
    for kind in ("LSTMCell", "projected"):
        found = []
        for backend in TAKERS:
            module = made(kind, backend).to(PLACES["triton"]["dtype"])
            x, hx = random_inputs(module, B)
            x.requires_grad_()
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(not frozen or not name.startswith(frozen))
            parameters = [p for p in module.parameters() if p.requires_grad]
            *_, c = module(x, hx) if kind == "LSTMCell" else module(x, hx)[1]
            first = torch.autograd.grad(c.square().sum(), [x, *parameters], create_graph=True)
            second = torch.autograd.grad(sum(t.square().sum() for t in first), [x, *parameters], retain_graph=True)
            plain = torch.autograd.grad(c.square().sum(), parameters)
            found.append(dict(enumerate(t.detach() for t in (*first, *second, *plain))))
        assert_same(*found)


@every_taker
def test_streams_traces_and_chunks(monkeypatch, backend):
    lstm = made("LSTM", backend)
    x, hx = random_inputs(lstm, B)
    whole = results(lstm, x, hx, lengths=LENGTHS)
    traced = gpu_lstm.trace(lstm, x.to(lstm.weight_ih_l0), lengths=LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(traced.output, lstm(x.to(lstm.weight_ih_l0), lengths=LENGTHS)[0])
        one_way = made("projected", backend)
        stream = gpu_lstm.Stream(one_way, B)
        steps = torch.stack([stream(step) for step in x.to(one_way.weight_ih_l0)])
        torch.testing.assert_close(steps, one_way(x.to(steps))[0])
    lstm.recompute = True
    monkeypatch.setattr("gpu_lstm.chunks.WORKSPACE", 2 * B * 4 * H * 4)  # two steps
    assert_same(results(lstm, x, hx, lengths=LENGTHS), whole)


@pytest.mark.slow
@every_taker
def test_compiled_and_exported(backend):
    lstm = made("LSTM", backend)
    x, hx = random_inputs(lstm, B)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    assert_same(results(lstm, x, hx, call=compiled), results(lstm, x, hx))
    x = x.to(lstm.weight_ih_l0)
    exported = torch.export.export(lstm, (x,)).module()
    torch.testing.assert_close(exported(x)[0], lstm(x)[0])


def test_parameters():
    """Those of an LSTM without peepholes first, from the same random numbers; all are saved, copied and shown."""
    for cls in (gpu_lstm.LSTM, gpu_lstm.LSTMCell):
        torch.manual_seed(3)
        plain = cls(I, H)
        torch.manual_seed(3)
        lstm = cls(I, H, peepholes=True)
        assert list(lstm.state_dict())[:4] == list(plain.state_dict())
        assert all(map(torch.equal, plain.parameters(), lstm.parameters()))
        name, peephole = list(lstm.named_parameters())[-1]
        assert name.startswith("weight_peephole")
        assert peephole.shape == (3 * H,)
        assert 0 < peephole.abs().max() <= H**-0.5
        before = peephole.clone()
        torch.manual_seed(3)
        lstm.reset_parameters()
        assert torch.equal(peephole, before)
        assert repr(lstm) == repr(plain)[:-1] + ", peepholes=True)"
        twin = pickle.loads(pickle.dumps(lstm))
        x = torch.randn(2, 1, I) if cls is gpu_lstm.LSTM else torch.randn(1, I)
        assert_identical({"": twin(x)[0]}, {"": lstm(x)[0]})
        with pytest.raises(AttributeError):
            plain.peepholes = True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "cupy"])
def test_a_backend_that_cannot_says_so(kind, backend):
    module = made(kind, backend).float()
    with pytest.raises(ValueError, match=f"^backend '{backend}' takes no peepholes; use 'triton' or 'reference'$"):
        module(*random_inputs(module, B))
    if kind == "LSTM":
        packed = pack_padded_sequence(torch.zeros(T, 1, I), [2])
        with pytest.raises(ValueError, match="takes no peepholes"):
            module(packed)
    if backend == "torch" and kind != "LSTMCell":
        module.backend = None
        explained = gpu_lstm.explain(module, torch.zeros(T, 1, I))
        assert (explained.backend, explained.others["torch"]) == ("reference", "it takes no peepholes")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.LSTMCell])
def test_torch_cannot_have_them(cls):
    model = nn.Sequential(cls(I, H, peepholes=True))
    with pytest.raises(ValueError, match=r"'0' has peepholes=True, which torch\.nn\.LSTM has not"):
        to_torch(model)
    with pytest.raises(ValueError, match=r"has peepholes=True, and would be scripted as a torch\.nn"):
        torch.jit.script(model)
