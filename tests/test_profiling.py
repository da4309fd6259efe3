"""What profilers see: the names of layers and directions, and how many operations the kernels do."""

from functools import partial

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(("options", "lengths", "expected"), [
    (dict(num_layers=2, backend="triton"), None, ["0 forward, triton", "1 forward, triton"]),
    (dict(bidirectional=True, backend="triton"), None, ["0 forward, triton", "0 reverse, triton"]),
    (dict(bidirectional=True, backend="reference"), None, ["0 forward, reference", "0 reverse, reference"]),
    (dict(num_layers=2, backend="torch"), [2, 2, 1], ["0 forward, torch", "1 forward, torch"]),
    (dict(backend="torch"), None, []),  # torch's own LSTM takes all layers in one call
    (dict(hidden_sizes=[5, 6], backend="torch"), None, ["0, torch", "1, torch"]),
])  # fmt: skip
def test_torch_profiler_names_layers_and_directions(device, options, lengths, expected):
    kind = gpu_lstm.StackedLSTM if "hidden_sizes" in options else partial(gpu_lstm.LSTM, hidden_size=5)
    lstm, lengths = kind(4, **options).to(device), lengths and torch.tensor(lengths, device=device)
    with profile() as profiler:
        lstm(X.to(device), lengths=lengths)
    names = {event.name for event in profiler.events() if event.name.startswith("gpu_lstm ")}
    assert sorted(names) == [f"gpu_lstm layer {name}" for name in expected]


def test_without_a_profiler_nothing_is_recorded(monkeypatch, device):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)  # it would raise
    gpu_lstm.LSTM(4, 5, backend="triton").to(device)(X.to(device))


@pytest.mark.parametrize("options", [{}, dict(proj_size=2), dict(bidirectional=True)], ids=str)
def test_operations_are_counted_as_those_of_the_reference(device, options):
    """And so, where ATen has a plain product for it, as those of torch.nn.LSTM. Gates are recomputed by products."""
    counts = {}
    # The first one twice: each FlopCounterMode has operators of its own.
    for backend, recompute in (("triton", False), ("triton", False), ("reference", False), ("triton", True)):
        lstm = gpu_lstm.LSTM(4, 5, 2, backend=backend, recompute=recompute, **options).to(device)
        rows = 2 * lstm.num_layers if lstm.bidirectional else lstm.num_layers
        hx = [torch.zeros(rows, 3, size, device=device, requires_grad=True) for size in (lstm.proj_size or 5, 5)]
        with FlopCounterMode(display=False) as counter:
            y, _ = lstm(X.to(device), hx)
            forward = counter.get_total_flops()
            y.sum().backward()
        counts[backend, recompute] = forward, counter.get_total_flops() - forward
    forward, backward = counts["reference", False]
    assert counts["triton", False] == (forward, backward)
    projections = 2 * X.shape[0] * X.shape[1] * sum(p.numel() for n, p in lstm.named_parameters() if "weight_hr" in n)
    assert counts["triton", True] == (forward, backward + forward - projections)
