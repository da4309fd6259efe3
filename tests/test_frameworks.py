"""Other packages give the same with our LSTM as with torch.nn.LSTM: TorchRL, models before and after convert and
to_torch (the extra `interop`), and torch's own tools that take a model apart."""
# ruff: noqa: RUF001  (phonemes look like other letters)

import functools
import operator
import threading
import warnings
from pathlib import Path

import pytest
import torch
from comparing import KERNELS_HERE, both_kinds
from installed import ROOT, load
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx import _symbolic_trace
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_lstm
from gpu_lstm.tools.convert import to_torch

N, T, I, H = 12, 4, 3, 5
THEIRS = "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"


def of_others(test):
    test = pytest.mark.usefixtures("exact_float32_products")(pytest.mark.filterwarnings(*THEIRS)(test))
    return pytest.mark.deep(test)


@of_others
@both_kinds
def test_torchrl_acts_and_resets_to_the_states_that_are_stored(kind):
    """Where a trajectory starts, it gives what TorchRL's own module gives, and gradients flow into the states there.
    `convert` is enough for it."""
    modules, TensorDict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict").TensorDict
    x, starts, letters = torch.randn(N, T, I), torch.rand(N, T, 1) < 0.4, "hc" if kind == "LSTM" else "h"
    states = {letter: torch.randn(N, T, 2, H, requires_grad=True) for letter in letters}
    keys = dict(in_keys=["x", *letters], out_keys=["y", *(("next", letter) for letter in letters)])
    module, name = getattr(modules, f"{kind}Module"), kind.lower()
    policy = module(**{name: getattr(nn, kind)(I, H, 2, batch_first=True)}, recurrent_backend="pad", **keys)

    def found(policy):
        whole = TensorDict({"x": x, "is_init": starts, **states}, [N, T])
        with modules.set_recurrent_mode(False):
            step = policy(whole[:, 0].clone())
        with modules.set_recurrent_mode(True):
            whole = policy(whole)
        gradients = torch.autograd.grad(whole["y"].square().sum(), [*states.values(), *policy.parameters()])
        return [step["y"], step["next", letters[-1]], whole["y"], whole["next", "h"], *gradients]

    expected = found(policy)
    assert all(tensor.any() for tensor in expected)
    gpu_lstm.convert(policy)
    assert type(getattr(policy, name)) is getattr(gpu_lstm.compat, kind)
    torch.testing.assert_close(gpu_lstm.backend("torch")(found)(policy), expected, rtol=0, atol=0)
    scan = module(**{name: getattr(policy, name)}, recurrent_backend="scan", **keys)
    for backend, each in (("auto", policy), (KERNELS_HERE, policy), ("auto", scan)):
        torch.testing.assert_close(gpu_lstm.backend(backend)(found)(each), expected, rtol=1e-4, atol=1e-5)


@of_others
def test_a_checkout_is_not_mistaken_for_the_package_kernels(monkeypatch):
    """transformers looks for a distribution named kernels. If the root is on the path, it finds our folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import kernels

    assert not hasattr(kernels, "__version__")
    with pytest.raises(ModuleNotFoundError):
        import kernels.triton_rnn


@of_others
def test_a_pretrained_model_says_the_same():
    """The model g2p-fa turns Persian words into phonemes, by an encoder, and a decoder that is called step by step."""
    from g2p_fa import G2P_Fa

    speaker, said = G2P_Fa(), {"سلام": "sælɒːm", "کتاب": "kʰætʰɒːb", "ایران": "ʔiːɾɒːn"}
    for swap in (nn.Module.eval, gpu_lstm.convert, to_torch):
        swap(speaker.model)
        assert {word: speaker(word) for word in said} == said


KINDS = (gpu_lstm.LSTM, gpu_lstm.compat.LSTM, lambda I, H: gpu_lstm.StackedLSTM(I, [H]))


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lstm, self.head = kind(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def test_whether_torch_fx_traces_is_known_of_a_torch_that_keeps_it_for_each_thread(monkeypatch):
    """torch 2.14 keeps it so."""
    of_thread = threading.local()
    monkeypatch.delattr(_symbolic_trace, "_is_fx_tracing_flag", raising=False)
    monkeypatch.setattr(_symbolic_trace, "_is_fx_tracing_tls", of_thread, raising=False)
    is_tracing = load(ROOT / "kernels/private.py").fx_is_tracing
    assert not is_tracing()
    of_thread.flag = True
    assert is_tracing()


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_by_torch_fx_leaves_a_module_as_it_is(kind):
    x = torch.randn(4, 3, 5)
    prepared = prepare_fx(Tagger(kind).eval(), get_default_qconfig_mapping(), (x,))
    assert type(prepared.lstm).__module__.startswith("gpu_lstm.")
    assert prepared(x).shape == (4, 3, 2)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell", "compat.LSTM", "compat.GRU", "StackedGRU"])
def test_of_torch_fx_keywords_are_kept_and_an_input_may_be_a_constant(kind):
    is_cell, is_ragged = "Cell" in kind, "Cell" not in kind and "compat" not in kind

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = operator.attrgetter(kind)(gpu_lstm)(5, [6] if "Stacked" in kind else 6)
            self.register_buffer("start", torch.randn(3, 5) if is_cell else torch.randn(4, 3, 5))
            self.register_buffer("lengths", torch.tensor([4, 1, 2]))

        def forward(self, hx):
            return self.rnn(self.start, hx, **dict(lengths=self.lengths) if is_ragged else {})

    h = torch.randn(3, 6) if is_cell or "Stacked" in kind else torch.randn(1, 3, 6)
    model, hx = Model(), (h, h.flip(0)) if "LSTM" in kind else [h] if "Stacked" in kind else h
    traced = torch.fx.symbolic_trace(model)
    constants = ["get_attr"] * (1 + is_ragged)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *constants, "call_module", "output"]
    torch.testing.assert_close(traced(hx), model(hx), rtol=0, atol=0)


def unpacked(packed):
    return pad_packed_sequence(packed)[0]


@functools.cache
def graphs_of_packed_batches(kind):
    """Return how many graphs torch.compile makes of a model over packed batches of three sizes, after checking each
    result, and the warnings."""

    class Model(Tagger):
        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return self.head(unpack(self.lstm(packed)[0]))

    torch._dynamo.reset()
    unpack = unpacked
    try:
        torch.compile(unpacked, backend="eager")(pack_padded_sequence(torch.ones(2, 1, 5), [2]))
    except torch._dynamo.exc.TorchRuntimeError:  # torch 2.11 cannot trace its own, which is left out of the graph
        unpack = torch.compiler.disable(unpacked)
    graphs, model = [], Model(kind)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for T, B in ((4, 3), (7, 2), (3, 5)):
            x, lengths = torch.randn(T, B, 5), torch.cat([torch.tensor([T]), torch.randint(1, T + 1, (B - 1,))])
            torch.testing.assert_close(compiled(x, lengths), model(x, lengths))
    return len(graphs), [str(warning.message) for warning in said]


@pytest.mark.parametrize("kind", KINDS[::2])
def test_a_packed_batch_breaks_the_graph_once_for_all_sizes(kind):
    # A frame that calls torch's own module, or compat.LSTM, is not traced. Here the head is a graph for one size, and
    # one for all.
    graphs, said = graphs_of_packed_batches(kind)
    assert graphs <= 2
    assert set(said) <= set(graphs_of_packed_batches(nn.LSTM)[1])


def test_a_packed_batch_that_cannot_be_exported_is_an_error_of_torchs():
    """Where no graph can break, the call must not hand itself over to eager mode without end."""
    packed = pack_padded_sequence(torch.ones(4, 2, 5), [4, 2])
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.export.export(gpu_lstm.LSTM(5, 6), (packed,), strict=False)


@both_kinds
def test_torch_compile_leaves_out_a_compat_module_as_torchs_own(kind):
    theirs, ours = getattr(nn, kind), getattr(gpu_lstm.compat, kind)
    if kind == "LSTM":
        assert graphs_of_packed_batches(ours)[0] == graphs_of_packed_batches(theirs)[0]
    for cls in (theirs, ours):
        torch._dynamo.reset()
        counter, model = CompileCounter(), Tagger(cls)
        compiled, bare = (torch.compile(module, backend=counter) for module in (model, model.lstm))
        for T, B in ((4, 3), (7, 2)):
            x = torch.randn(T, B, 5)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
            torch.testing.assert_close(bare(x), model.lstm(x), rtol=0, atol=0)
        assert counter.frame_count == 0
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_a_script_module_has_torchs_module_and_no_forward_of_a_users_is_lost(kind):
    ours = getattr(gpu_lstm, kind)(5, 6)

    class Old(torch.jit.ScriptModule):  # it asks its modules for no module of torch
        def __init__(self):
            super().__init__()
            self.rnn = torch.jit.script(ours)

        @torch.jit.script_method
        def forward(self, x):
            return self.rnn(x)

    x = torch.randn(4, 5) if "Cell" in kind else torch.randn(4, 3, 5)
    torch.testing.assert_close(Old()(x), ours(x))
    with pytest.raises(ValueError, match="SLSTM has a cell of its own, and would be scripted"):
        torch.jit.script(gpu_lstm.SLSTM(5, 6))
    with pytest.raises(ValueError, match=r"a StackedGRU has no counterpart in torch\.nn, and cannot be scripted"):
        torch.jit.script(nn.Sequential(gpu_lstm.StackedGRU(5, [6, 7])))
    mine = type("Mine", (type(ours),), {"forward": lambda self, x: x})(5, 6)
    with pytest.raises(ValueError, match=rf"Mine has a forward of its own, .* scripted as a torch\.nn\.{kind}"):
        torch.jit.script(nn.Sequential(mine))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell", "compat.LSTM", "compat.GRU"])
def test_attributes_of_a_class_work_on_another_base(kind):
    """TorchRL copies the attributes of torch.nn.LSTM and GRU, whichever class that is, onto a class of its own."""
    cls = operator.attrgetter(kind)(gpu_lstm)
    name, base = kind.split(".")[-1], nn.RNNCellBase if "Cell" in kind else nn.RNNBase
    copied = {attribute: getattr(cls, attribute) for attribute in vars(cls) if attribute != "__init__"}
    module = type("Copy", (base,), copied)(*((5, 6, True, 4) if "Cell" in kind else (name, 5, 6)))
    module.note = "mine"
    assert module.note == "mine"
    assert repr(module).startswith("Copy(5, 6")
