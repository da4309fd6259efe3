"""What profilers see: the names of layers and directions, and how many operations the kernels do."""

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm
from gpu_lstm import ops

X = torch.randn(7, 3, 4)


@pytest.mark.parametrize(
    ("options", "lengths", "expected"),
    [
        (dict(num_layers=2, backend="triton"), None, ["0 forward, triton", "1 forward, triton"]),
        (dict(bidirectional=True, backend="triton"), None, ["0 forward, triton", "0 reverse, triton"]),
        (dict(bidirectional=True, backend="reference"), None, ["0 forward, reference", "0 reverse, reference"]),
        (dict(num_layers=2, backend="torch"), [7, 2, 1], ["0 forward, torch", "1 forward, torch"]),
        (dict(backend="torch"), None, []),  # torch's own LSTM takes all layers in one call
    ],
)
def test_torch_profiler_names_layers_and_directions(device, options, lengths, expected):
    lstm = gpu_lstm.LSTM(4, 5, **options).to(device)
    with profile() as profiler:
        lstm(X.to(device), lengths=None if lengths is None else torch.tensor(lengths, device=device))
    names = [event.name for event in profiler.events() if event.name.startswith("gpu_lstm ")]
    assert sorted(set(names)) == [f"gpu_lstm layer {name}" for name in expected]


def test_layers_of_a_stack_are_named_where_torch_takes_one_after_another(device):
    stack = gpu_lstm.StackedLSTM(4, [5, 6], backend="torch").to(device)
    with profile() as profiler:
        stack(X.to(device))
    assert {"gpu_lstm layer 0, torch", "gpu_lstm layer 1, torch"} <= {event.name for event in profiler.events()}


def test_without_a_profiler_nothing_is_recorded(monkeypatch, device):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)  # it would raise
    gpu_lstm.LSTM(4, 5, backend="triton").to(device)(X.to(device))


@pytest.mark.parametrize("options", [{}, dict(proj_size=2), dict(bidirectional=True)], ids=str)
def test_operations_are_counted_as_those_of_the_reference(device, options):
    """And so, where ATen has a plain product for it, as those of torch.nn.LSTM."""
    counts = {}
    for backend in ("triton", "reference"):
        lstm = gpu_lstm.LSTM(4, 5, 2, backend=backend, **options).to(device)
        hx = [torch.zeros(n, 3, size, device=device, requires_grad=True) for n, size in _states(lstm)]
        with FlopCounterMode(display=False) as counter:
            y, _ = lstm(X.to(device), hx)
            forward = counter.get_total_flops()
            y.sum().backward()
        counts[backend] = forward, counter.get_total_flops() - forward
    assert counts["triton"] == counts["reference"]


def _states(lstm):
    rows = lstm.num_layers * (1 + lstm.bidirectional)
    return [(rows, lstm.proj_size or lstm.hidden_size), (rows, lstm.hidden_size)]


def test_what_one_launch_counts(device):
    gates, weight_hh, h0, c0 = (torch.zeros(size, device=device) for size in ((7, 3, 20), (20, 5), (3, 5), (3, 5)))
    with FlopCounterMode(display=False) as counter:
        ops.layer_forward(gates, *ops.flat([weight_hh, None, None, h0, c0, *[None] * 7]), False, 1, "triton", False)
    assert counter.get_total_flops() == 2 * 7 * 3 * 20 * 5
