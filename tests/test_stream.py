"""Streams: steps and chunks, one after another, give the results of the whole sequence at once."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from comparing import PLACES, both_classes
from installed import ROOT
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm
from gpu_lstm.backends import torch_rnn
from gpu_lstm.kernels import timeouts
from gpu_lstm.tools import stream as stream_module
from gpu_lstm.tools.stream import Stream

T, B, I, H = 9, 3, 4, 5
F16 = torch.float16
KINDS = {  # LSTM is for the tests of a cell state in another dtype
    "projection": partial(gpu_lstm.LSTM, I, H, 2, proj_size=3), "StackedLSTM": partial(gpu_lstm.StackedLSTM, I, [H, 3]),
    "LSTM": partial(gpu_lstm.LSTM, I, H), "GRU": partial(gpu_lstm.GRU, I, H),
    "StackedGRU": partial(gpu_lstm.StackedGRU, I, [H, 3]), "SLSTM": partial(gpu_lstm.SLSTM, I, 6, heads=2),
}  # fmt: skip


def built(kind, backend="reference", steps=T, **kwargs):
    """Return a module, and its input."""
    torch.manual_seed(0)
    backend = "reference" if (kind, backend) == ("SLSTM", "torch") else backend
    lstm = KINDS[kind](**PLACES[backend] | kwargs, backend=backend).eval()
    return lstm, torch.randn(steps, B, I).to(next(lstm.parameters()))


@pytest.fixture(params=["projection", "StackedLSTM", "GRU", "StackedGRU", "SLSTM"])
def build(request):
    return partial(built, request.param)


@both_classes
def test_a_step_of_few_sequences_on_a_cpu_is_by_torchs_cells(spy, cls):
    """torch's operator for a layer of an LSTM packs all weights at each call."""
    by_layers, module = spy(torch_rnn, cls.__name__.lower()), cls(I, H, 2, backend="torch")
    (twin := copy.deepcopy(module)).backend = "reference"
    for batch, calls in ((16, 0), (17, 6)):
        stream, given, states = Stream(module, batch), None, None
        for x in torch.randn(3, batch, I):
            with torch.no_grad():
                (found, given), (true, states) = module(x[None], given), twin(x[None], states)
            y = stream(x)
            torch.testing.assert_close((found[0], y), (true[0], true[0]))
            y.fill_(math.nan)  # this changes no state
        torch.testing.assert_close((given, stream.state), (states, states))
        assert by_layers.call_count == calls
    by_layers.reset_mock()
    module(torch.zeros(1, 2, I))  # with a gradient
    Stream(module, 2)(torch.zeros(2, 2, I))  # two steps
    torch.jit.trace(module.eval(), torch.zeros(1, 2, I), check_trace=False)  # for any number of steps
    assert by_layers.call_count == 3


def test_one_step_that_is_packed_or_drops_out_is_as_torchs_own():
    ours, theirs = gpu_lstm.LSTM(I, H, 2, dropout=0.5), torch.nn.LSTM(I, H, 2, dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    sequences = pack_sequence([torch.randn(1, I) for _ in range(3)])
    with torch.no_grad():
        for x in (sequences, torch.randn(1, 3, I)):
            found = []
            for module in (ours, theirs):
                torch.manual_seed(0)
                y, states = module(x)
                assert x is not sequences or y.sorted_indices is y.unsorted_indices is None
                found.append([y.data if x is sequences else y, *states])
            torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore")
def test_the_newer_exporter_of_onnx_takes_the_recipe_for_a_step_too(tmp_path, monkeypatch):
    """test_documentation.py runs the recipe by the older exporter. The recipe compares every step of an LSTM and of a
    GRU."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "streaming.md").read_text(), flags=re.DOTALL)
    (recipe,) = (block for block in blocks if "onnxruntime" in block)
    exec(blocks[0], names := {})
    exec(recipe, names)


def test_one_made_in_inference_mode_runs_outside_and_the_other_way_round():
    lstm, steps = gpu_lstm.LSTM(3, 4), torch.randn(2, 2, 3)
    with torch.inference_mode():
        stream = Stream(lstm, 2)
    y = [stream(steps[0])]
    with torch.inference_mode():
        y.append(stream(steps[1]))
    torch.testing.assert_close(torch.stack(y), lstm(steps)[0])


def test_it_begins_with_the_states_it_is_given_and_leaves_them_alone(build):
    lstm, x = build()
    _, states = lstm(x)
    given = tree_map(torch.clone, states)
    stream = Stream(lstm, B, given)
    assert repr(stream) == f"Stream({lstm!r}, batch={B})"
    torch._foreach_zero_(tree_leaves(given))  # the stream has copies
    stream.reorder(torch.tensor([2, 0, 0], dtype=torch.int32))
    expected, _ = lstm(x, tree_map(lambda t: t[..., [2, 0, 0], :], states))
    torch.testing.assert_close(stream(x), expected)
    assert not any(t.any() for t in tree_leaves(given))
    taken = tree_leaves(stream.state)
    stream(x)
    assert not torch.equal(taken[0], tree_leaves(stream.state)[0])  # the state that was taken is a copy


@pytest.mark.parametrize(("graph", "batch_first"), [(False, True), (True, False)], ids=["plain", "graph"])
def test_each_sequence_runs_the_steps_that_it_is_active_for(build, request, batch_first, graph):
    """Each sequence runs as if it were alone. The input of the others, NaN here, is ignored."""
    captures = request.getfixturevalue("captures") if graph else None
    lstm, x = build(batch_first=batch_first)
    stream, active = Stream(lstm, B), torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.5
    active[0], active[2], active[5], active[7:] = True, True, False, torch.tensor([True, False, True])
    dirty = x.masked_fill(~active[:, :, None], float("nan"))
    parts = [stream(dirty[t], None if t in (0, 2) else active[t]) for t in range(7)]
    chunk = stream(dirty[7:].transpose(0, 1) if batch_first else dirty[7:], active=active[7])
    outputs = torch.cat([torch.stack(parts), chunk.transpose(0, 1) if batch_first else chunk])
    assert (outputs[~active] == 0).all()
    for n in range(B):
        alone, states = lstm(x[active[:, n], n])
        found = [outputs[active[:, n], n], *(held[..., n, :] for held in tree_leaves(stream.state))]
        torch.testing.assert_close(found, [alone, *tree_leaves(states)])
    assert not graph or len(captures) == 2  # the second one when only some sequences are active for the first time


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SLSTM"])
def test_half_precision_keeps_the_cell_in_float32(kind):
    """If the cell state, or h of a GRU, were rounded after every step, it would drift away from that of the whole
    sequence."""
    lstm, x = built(kind, dtype=torch.bfloat16, num_layers=2, steps=200)
    stream = Stream(lstm, B)
    steps = torch.stack([stream(x_t) for x_t in x])
    assert tree_leaves(stream.state)[-1].dtype is torch.float32
    assert (steps - lstm(x)[0]).abs().max() <= 4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("backend", ["torch", "reference", "triton", "numba"])
@pytest.mark.parametrize(("kind", "options", "lengths"), [
    ("LSTM", {"num_layers": 2}, None), ("LSTM", {"num_layers": 2}, [T, 0, 4]),
    ("LSTM", {"bidirectional": True}, None), ("GRU", {"bidirectional": True}, None),
    ("GRU", {"bidirectional": True}, [T, 0, 4]),
], ids=str)  # fmt: skip
def test_a_state_in_float32_with_half_precision(backend, kind, options, lengths):
    """The state in float32 is the cell state, or h of a GRU. Where a sequence has no step it is not rounded."""
    module, x = built(kind, backend, dtype=F16, **options)
    ragged = {} if lengths is None else dict(lengths=torch.tensor(lengths, device=x.device))
    h, c = (torch.randn(2, 2, B, H) * 0.5).to(x.device)

    def last_of(of_h, of_c):
        hx = (h.to(of_h), c.to(of_c)) if kind == "LSTM" else h.to(of_c)
        *others, last = tree_leaves(module(x, hx, **ragged))
        assert {t.dtype for t in others} == {F16}
        return last

    kept, rounded = last_of(F16, torch.float32), last_of(F16, F16)
    assert (kept.dtype, rounded.dtype) == (torch.float32, F16)
    torch.testing.assert_close(kept.half(), rounded, rtol=0, atol=4e-3 if kind == "LSTM" else 2e-3)
    assert lengths is None or torch.equal(kept[:, 1], (h if kind == "GRU" else c)[:, 1])
    for wrong in [(F16, torch.float64), *[(torch.float32, torch.float32)] * (kind == "LSTM")]:
        # The words are torch's, and on its backend depend on the device.
        with pytest.raises(RuntimeError, match="dtype"):
            last_of(*wrong)


@pytest.fixture
def captures(monkeypatch):
    """A list of the steps that were captured, as graphs whose replays write where the capture wrote."""
    captures = []

    def captured(step, device):
        captures.append(step)
        static = [step() for _ in range(4)][-1]  # three of them warm up
        return lambda: static.copy_(step())

    monkeypatch.setattr(stream_module, "captured", captured)
    monkeypatch.setattr(stream_module, "on_cuda", lambda x: True)
    return captures


def test_a_step_is_captured_once_and_again_when_a_parameter_is_replaced_or_a_setting_changed(captures):
    lstm, x = built("projection", zoneout=0.5)
    stream, (whole, _) = Stream(lstm, B), lstm(x)
    torch.testing.assert_close(torch.stack([stream(x_t) for x_t in x]), whole)
    stream.reset()
    stream(x[:4])  # a chunk bypasses the graph, and leaves the state where the graph finds it
    torch.testing.assert_close(torch.stack([stream(x_t) for x_t in x[4:]]), whole[4:])
    # A replay reads changed values of a parameter. The other changes cause a new capture, since a graph keeps what it
    # was made with.
    for count, change in enumerate((
        lambda: lstm.weight_hh_l0.detach().mul_(2.0),
        lambda: setattr(lstm, "weight_hh_l0", torch.nn.Parameter(lstm.weight_hh_l0.detach() * 3.0)),
        lambda: setattr(lstm, "zoneout", (0.1, 0.3)), lambda: setattr(lstm, "zoneout", 0.0)), start=1):  # fmt: skip
        change()
        stream.reset()
        torch.testing.assert_close(torch.stack([stream(x_t) for x_t in x[:3]]), lstm(x[:3])[0])
        assert len(captures) == count


def test_a_state_that_was_taken_outlives_replays(build, captures):
    """Replays write the stream's own states, in the same memory as the capture."""
    lstm, x = build()
    stream = Stream(lstm, B)
    places = [t.data_ptr() for t in tree_leaves(stream._state)]
    stream(x[0])
    taken = stream.state
    before = tree_map(torch.clone, tree_leaves(taken))
    for change in (lambda: stream(x[1:]), stream.reset, lambda: setattr(stream, "state", taken), lambda: stream(x[1])):
        change()
        assert [t.data_ptr() for t in tree_leaves(stream._state)] == places
    assert all(map(torch.equal, tree_leaves(taken), before))


@pytest.mark.gpu
@pytest.mark.parametrize(("cell", "heads"), [("LSTM", 1), ("GRU", 1), ("LSTM", 4), ("SLSTM", 4)])
@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize(("dtype", "last_place"), [(torch.float32, 2**-10), (torch.bfloat16, 2**-7)], ids=str)
def test_a_step_is_replayed_from_a_graph(hidden, cell, heads, dtype, last_place):
    """The precisions are TF32 and half precision."""
    lstm = getattr(gpu_lstm, cell)(32, hidden, 2, heads=heads, device="cuda", dtype=dtype, backend="triton").eval()
    stream, x = Stream(lstm, 4), torch.randn(50, 4, 32, device="cuda", dtype=dtype)
    steps = torch.stack([stream(x_t) for x_t in x])
    torch.testing.assert_close(steps, lstm(x)[0], rtol=0, atol=8 * last_place)


@pytest.mark.parametrize("x", [torch.zeros(B, 1), torch.zeros(B, I, dtype=torch.float64)], ids=["size", "dtype"])
def test_a_step_that_the_lstm_refuses_is_refused_after_a_capture(captures, x):
    """Otherwise the input of the graph would be filled by it: one feature for all, or numbers of another dtype."""
    stream = Stream(gpu_lstm.LSTM(I, H, backend="reference"), B)
    stream(torch.zeros(B, I))
    with pytest.raises((RuntimeError, ValueError)):  # in torch's words
        stream(x)


def test_a_replay_reports_that_an_earlier_one_timed_out(captures):
    """A graph reports nothing, so that the stream looks before each replay."""
    stream, x = Stream(gpu_lstm.LSTM(I, H, backend="reference"), B), torch.randn(B, I)
    stream(x)
    timeouts.error_word(x.device, "step_forward_kernel")[0] = 1
    with pytest.raises(RuntimeError, match="step_forward_kernel timed out at step 0 on cpu"):
        stream(x)
    stream(x)  # it is raised once
