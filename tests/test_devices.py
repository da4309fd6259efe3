"""Which CUDA device is current when a kernel is launched on tensors of cuda:1: fake ones, with a stubbed driver."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from standing_in import plan_of
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_lstm.backends import graph, kernels
from gpu_lstm.kernels import layer, memory
from gpu_lstm.kernels.cards import Card
from gpu_lstm.kernels.cupy_lstm import launch as cupy_launch
from gpu_lstm.kernels.cupy_lstm import planning
from gpu_lstm.kernels.triton_lstm import launch as triton_launch
from gpu_lstm.tools import stream

T, B, I, H = 3, 2, 4, 16


@pytest.fixture
def driver(monkeypatch):
    """What torch.cuda asks the driver for; it knows which device is current."""
    driver = SimpleNamespace(current=0)

    def exchange(device: int) -> int:
        before, driver.current = driver.current, device if device >= 0 else driver.current
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return driver


def _indexed(t, key):
    """t[0], t[:-1] and t[..., :H] as the launchers use them: Python's own indexing of a CUDA tensor asks the driver."""
    if isinstance(key, int):
        return t.select(0, key)
    first = key[0] if isinstance(key, tuple) else key
    return t.narrow(0, 0, t.shape[0] - 1) if isinstance(first, slice) else t


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("family", ["resident", "cooperative", "pointwise", "step", "cupy"])
def test_forward_and_backward_are_launched_on_the_device_of_the_tensors(driver, monkeypatch, family, device):
    def of_family(problem, _, which, *__):
        return plan_of(family, problem, which.backward)

    backend, launcher, choose_plan = "triton", triton_launch, of_family
    if family == "cupy":
        backend, launcher, choose_plan = "cupy", cupy_launch, planning.choose_plan
        monkeypatch.setattr(cupy_launch, "as_words", lambda weights, hidden, size: weights)  # padding asks the driver
        monkeypatch.setattr(cupy_launch, "card_of", lambda device: Card(90, 132))
        monkeypatch.setattr(kernels, "verify", None)  # it computes
    current: list[int] = []
    monkeypatch.setattr(launcher, "choose_plan", choose_plan)
    monkeypatch.setattr(launcher, "launch_kernel", lambda *_, **__: current.append(driver.current))
    monkeypatch.setattr(launcher, "error_word", lambda device, kernel, trial=False: None)  # it would be kept
    monkeypatch.setattr(layer, "in_order", lambda _, __, run, *given: run(*given))  # test_side_by_side looks at that
    monkeypatch.setattr(layer, "aligned", lambda t: t)  # fake tensors have no address
    monkeypatch.setattr(memory.checking, "on", False)
    monkeypatch.setattr(torch.Tensor, "__getitem__", _indexed)
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *_: None)
    with FakeTensorMode():
        sizes = (T, B, I), (1, B, H), (1, B, H), (4 * H, I), (4 * H, H)
        given = [torch.empty(size, device=device) for size in sizes]
        h, _, _, gates, c = graph._forward(False, backend, True, False, *given)
        needed = [k == 1 for k in range(len(sizes))]
        graph._backward(False, backend, [h, None, None], [h, gates, c], needed, given)
    assert current == [torch.device(device).index] * (2 * T if family == "pointwise" else 2)
    assert driver.current == 0, "and afterwards it is the one before"


def test_a_step_of_a_stream_is_captured_on_the_device_of_its_input(driver, monkeypatch):
    """torch.cuda.Stream() and CUDAGraph() belong to the device that is current when they are made."""
    made, steps = [], set()
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: made.append((name, driver.current)) or MagicMock())
    for name in ("current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    stream.captured(lambda: steps.add(driver.current), torch.device("cuda", 1))
    assert (made, steps, driver.current) == ([("Stream", 1), ("CUDAGraph", 1)], {1}, 0)
