"""Tools that take a model with torch.nn.LSTM apart, given ours in its place."""

import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_lstm

KINDS = (gpu_lstm.LSTM, gpu_lstm.compat.LSTM, lambda I, H: gpu_lstm.StackedLSTM(I, [H]))


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lstm, self.head = kind(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_of_torch_fx_a_module_is_a_leaf_as_torchs_own_is(kind):
    torch.manual_seed(0)
    model, theirs = Tagger(kind), Tagger(nn.LSTM)
    traced, expected = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(theirs)
    assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in expected.graph.nodes]
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    prepared = prepare_fx(Tagger(kind).eval(), get_default_qconfig_mapping(), (x,))
    assert type(prepared.lstm).__module__.startswith("gpu_lstm.")
    assert prepared(x).shape == (4, 3, 2)


def test_of_torch_fx_keywords_and_cells_are_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.cell = gpu_lstm.LSTM(5, 6), gpu_lstm.LSTMCell(6, 6)

        def forward(self, x, lengths):
            y, (h, c) = self.lstm(x, lengths=lengths)
            return y, self.cell(y[0], (h[0], c[0]))

    torch.manual_seed(0)
    model, x, lengths = Model(), torch.randn(4, 3, 5), torch.tensor([4, 1, 2])
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x, lengths), model(x, lengths), rtol=0, atol=0)


def unpacked(packed):
    return pad_packed_sequence(packed)[0]


def graphs_of_packed_batches(kind):
    """How many graphs torch.compile makes of a model over packed batches of four sizes, each right; and warnings."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = kind(5, 6), nn.Linear(6, 2)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return self.head(unpack(self.lstm(packed)[0]))

    torch._dynamo.reset()
    unpack = unpacked
    try:
        torch.compile(unpacked, backend="eager")(pack_padded_sequence(torch.ones(2, 1, 5), [2]))
    except torch._dynamo.exc.TorchRuntimeError:  # torch 2.11 cannot trace its own: left out of the graph
        unpack = torch.compiler.disable(unpacked)
    graphs, model = [], Model()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for T, B in ((4, 3), (7, 2), (3, 5), (9, 4)):
            x, lengths = torch.randn(T, B, 5), torch.cat([torch.tensor([T]), torch.randint(1, T + 1, (B - 1,))])
            torch.testing.assert_close(compiled(x, lengths), model(x, lengths))
    return len(graphs), [str(warning.message) for warning in said]


@pytest.mark.parametrize("kind", KINDS[::2])
def test_a_packed_batch_breaks_the_graph_once_for_all_sizes(kind):
    # A frame that calls torch's own, or compat.LSTM, is not traced. Here the head is a graph for one size, and for all.
    graphs, said = graphs_of_packed_batches(kind)
    assert graphs <= 2
    assert set(said) <= set(graphs_of_packed_batches(nn.LSTM)[1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_packed_batch_that_cannot_be_exported_is_an_error_of_torchs(kind):
    """Where no graph can break, the call must not hand itself over to eager mode without end."""
    packed = pack_padded_sequence(torch.ones(4, 2, 5), [4, 2])
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.export.export(getattr(gpu_lstm, kind)(5, 6), (packed,), strict=False)


class Recurrent(nn.Module):
    """As pfrl's RecurrentSequential and joeynmt's decoder are."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.LSTM(5, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0] if isinstance(layer, nn.LSTM) else layer(x)
        return x


class OfGRUs(nn.Sequential):
    def forward(self, x):
        return self[0](x)[0] if isinstance(self[0], nn.GRU) else x


def test_convert_makes_instances_of_torchs_lstm_or_warns_of_a_model_that_asks_for_them():
    x = torch.randn(4, 3, 5)
    with pytest.warns(UserWarning, match=r"Recurrent asks isinstance.*convert\(model, compat=True\)"):
        model = gpu_lstm.convert(Recurrent())
    with pytest.raises((AttributeError, TypeError)):
        model(x).sum()
    model = Recurrent()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(gpu_lstm.convert(model, compat=True).layers[1]) is gpu_lstm.compat.LSTM
        gpu_lstm.convert(Tagger(nn.LSTM))
    with pytest.warns(UserWarning, match="OfGRUs asks isinstance"):
        gpu_lstm.convert(OfGRUs(nn.GRU(5, 6)))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert type(gpu_lstm.to_torch(model).layers[1]) is nn.LSTM
    with pytest.raises(TypeError, match="compat should be of type bool, got: int"):
        gpu_lstm.convert(model, compat=1)
