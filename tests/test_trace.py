"""Traces: gates and states of every step against the oracle, and the records of profilers."""

import numpy as np
import oracle
import pytest
import torch
from comparing import KERNELS_HERE, every_backend
from pairs import letters_of, weights_of, zeros_for
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import profile
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm

T, B, I, H = 6, 3, 4, 6
LENGTHS = torch.tensor([6, 0, 3])
RESETS = torch.tensor([[0, 1, 0]] * 3 + [[1, 0, 0]] * 3).bool()


def inputs():
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def slstm_gates(i, f, not_f, g, o, c, n):
    """Convert the numbers of the oracle to those that a trace shows of an sLSTM: shares of a mean instead of i and
    f."""
    return i / n, 1 - not_f, g, o, c / n


BOTH = dict(lengths=LENGTHS, resets=RESETS)


@every_backend
@pytest.mark.parametrize(("kind", "ragged", "options"), [
    ("LSTM", {}, {}), ("LSTM", dict(lengths=LENGTHS), dict(proj_size=2)), ("LSTM", dict(resets=RESETS), dict(heads=2)),
    ("GRU", BOTH, {}), ("SLSTM", BOTH, dict(heads=2)),
], ids=["plain", "lengths", "resets", "GRU", "SLSTM"])  # fmt: skip
def test_gates_are_the_oracles(backend, kind, ragged, options):
    backend = "reference" if (kind, backend) == ("SLSTM", "torch") else backend
    module, x = getattr(gpu_lstm, kind)(I, H, 2, bidirectional=True, backend=backend, **options).double(), inputs()
    traced, (_, layers) = gpu_lstm.trace(module, x, **ragged), weights_of(module)
    names = {"LSTM": ("input", "forget", "candidate", "output", "cell"), "GRU": ("reset", "update", "candidate"),
             "SLSTM": ("share", "forget", "candidate", "output", "mean")}[kind]  # fmt: skip
    assert f"{names[0]}, {names[1]}" in repr(traced)
    assert str([T, B, H]) in repr(traced)
    y, _, tapes = oracle.stack(x.numpy(), zeros_for(layers, B, letters_of(module)), layers, **ragged)
    for layer, (*_, taken) in zip(traced.layers, tapes, strict=True):
        for gates, (_, _, tape) in zip(layer, taken, strict=True):
            expected = torch.zeros(len(names), T, B, H).double()
            for b, t, _, _, _, *values in tape:
                values = slstm_gates(*values) if kind == "SLSTM" else values
                expected[:, t, b] = torch.tensor(np.array(values[: len(names)]))
            assert_close({name: getattr(gates, name) for name in names}, dict(zip(names, expected)))
    assert_close([traced.output, torch.cat([gates.hidden for gates in traced.layers[1]], 2)], [torch.from_numpy(y)] * 2)


def test_other_inputs_and_modules():
    x, lengths = inputs(), torch.tensor([2, 6, 4])
    lstm, packed = gpu_lstm.LSTM(I, H).double(), pack_padded_sequence(x, lengths, enforce_sorted=False)
    traced, padded = gpu_lstm.trace(lstm, packed), gpu_lstm.trace(lstm, x, lengths=lengths)
    assert_close(traced.layers[0][0], padded.layers[0][0])
    assert_close(traced.output.data, lstm(packed)[0].data)
    assert traced.lengths.tolist() == padded.lengths.tolist() == [2, 6, 4]

    alone = gpu_lstm.trace(lstm, x[:, 0], lengths=torch.tensor(2))
    assert (alone.output.shape, alone.lengths.tolist()) == ((T, H), [2])
    assert_close(list(alone.layers[0][0]), [t[:, :1] for t in padded.layers[0][0]])

    for stacked, theirs in ((gpu_lstm.StackedLSTM, nn.LSTM), (gpu_lstm.StackedGRU, nn.GRU)):
        stack, first = stacked(I, [H, I, I], residual=True).double(), theirs(I, H, batch_first=True).double()
        h, c = torch.randn(2, 1, B, H).double()
        for module, *given in ((stack, x), (first, x.transpose(0, 1), (h, c) if theirs is nn.LSTM else h)):
            traced = gpu_lstm.trace(module, *given)
            assert_close((traced.output, traced.states), module(*given))
            assert traced.layers[0][0].hidden.shape == (T, B, H)  # time first
        assert type(first) is theirs


INPUT = torch.randn(2, 3, 4)


@pytest.mark.parametrize(("module", "lengths", "expected"), [
    (gpu_lstm.LSTM(4, 5, bidirectional=True, backend=KERNELS_HERE), None,
     [f"0 forward, {KERNELS_HERE}", f"0 reverse, {KERNELS_HERE}"]),
    (gpu_lstm.LSTM(4, 5, 2, backend="torch"), [2, 2, 1], ["0 forward, torch", "1 forward, torch"]),
    (gpu_lstm.LSTM(4, 5, backend="torch"), None, []),  # torch's own LSTM takes all layers in one call
    (gpu_lstm.StackedLSTM(4, [5, 6], backend="torch"), None, ["0, torch", "1, torch"]),
    (gpu_lstm.GRU(4, 5, backend=KERNELS_HERE), [2, 2, 1], [f"0 forward, {KERNELS_HERE}"]),
])  # fmt: skip
def test_torch_profiler_names_layers_and_directions(device, module, lengths, expected):
    with profile() as profiler:
        module.to(device)(INPUT.to(device), lengths=lengths and torch.tensor(lengths, device=device))
    names = {event.name for event in profiler.events() if event.name.startswith("gpu_lstm ")}
    assert sorted(names) == [f"gpu_lstm layer {name}" for name in expected]


def test_without_a_profiler_nothing_is_recorded(monkeypatch, device):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)  # it would raise
    gpu_lstm.LSTM(4, 5, backend=KERNELS_HERE).to(device)(INPUT.to(device))


def test_operations_are_counted_as_those_of_the_reference(device):
    """Where ATen counts a plain product for a layer, the counts also equal those of torch.nn.LSTM. Gates are recomputed
    by products."""
    counts, hx = {}, [torch.zeros(4, 3, size, device=device, requires_grad=True) for size in (2, 5)]
    # The first one runs twice, since each FlopCounterMode has operators of its own.
    for backend, recompute in (*[(KERNELS_HERE, False)] * 2, ("reference", False), (KERNELS_HERE, True)):
        lstm = gpu_lstm.LSTM(4, 5, 2, bidirectional=True, proj_size=2, backend=backend, recompute=recompute).to(device)
        with FlopCounterMode(display=False) as counter:
            y, _ = lstm(INPUT.to(device), hx)
            forward = counter.get_total_flops()
            y.sum().backward()
        counts[backend, recompute] = forward, counter.get_total_flops() - forward
    forward, backward = counts["reference", False]
    assert counts[KERNELS_HERE, False] == (forward, backward)
    projections = (
        2 * INPUT.shape[0] * INPUT.shape[1] * sum(p.numel() for n, p in lstm.named_parameters() if "weight_hr" in n)
    )
    assert counts[KERNELS_HERE, True] == (forward, backward + forward - projections)
