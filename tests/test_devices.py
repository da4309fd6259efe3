"""Which CUDA device is current when a kernel is launched, seen by a driver that is stubbed: tensors are fake.

Triton launches on the current device. A module on cuda:1 must work while cuda:0 is current.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_lstm import ops, stream
from gpu_lstm.kernels.cupy_lstm import cooperative as cupy_cooperative
from gpu_lstm.kernels.cupy_lstm import launch as cupy_launch
from gpu_lstm.kernels.cupy_lstm import planning
from gpu_lstm.kernels.triton_lstm import cooperative, step
from gpu_lstm.kernels.triton_lstm import launch as triton_launch
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family

T, B, H = 3, 2, 16


class Driver:
    """What torch.cuda asks the driver for; it knows which device is current."""

    current = 0

    def exchange(self, device: int) -> int:
        before, self.current = self.current, device if device >= 0 else self.current
        return before


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, driver.exchange)
    return driver


def _indexed(t, key):
    """t[0], t[:-1] and t[..., :H] as the families use them: Python's own indexing of a CUDA tensor asks the driver."""
    if isinstance(key, int):
        return t.select(0, key)
    first = key[0] if isinstance(key, tuple) else key
    return t.narrow(0, 0, t.shape[0] - 1) if isinstance(first, slice) else t


def _launches(driver, monkeypatch, backend: str, choose_plan, device: str) -> list[int]:
    """The current device at each launch of forward and backward of a layer on `device`."""
    current: list[int] = []
    launcher = {"triton": triton_launch, "cupy": cupy_launch}[backend]
    monkeypatch.setattr(launcher, "choose_plan", choose_plan)
    monkeypatch.setattr(launcher, "launch_kernel", lambda *_, **__: current.append(driver.current))
    for each in (triton_launch, cupy_launch):
        monkeypatch.setattr(each, "await_others", lambda side_by_side, device: None)  # test_side_by_side looks at that
    for family in (cooperative, step, cupy_cooperative):
        monkeypatch.setattr(family, "error_word", lambda device, kernel: None)  # kept for as long as the process
    monkeypatch.setattr(torch.Tensor, "__getitem__", _indexed)
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *_: None)
    with FakeTensorMode():

        def empty(*shape):
            return torch.empty(*shape, device=device)

        gates, weight_hh, h0, c0 = empty(T, B, 4 * H), empty(4 * H, H), empty(B, H), empty(B, H)
        given = *ops.flat([weight_hh, None, None, h0, c0, *[None] * 7]), False, 1, backend
        h, _, _, c = ops._layer_forward(gates, *given, True)
        ops._layer_backward([h, None, None], gates, c, *given)
    return current


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("family", Family)
def test_triton_launches_on_the_device_of_the_tensors(driver, monkeypatch, family, device):
    def choose_plan(problem, _, backward, *key):
        return next(plan for plan in plans(problem, DEVICES["h100"], backward) if plan.family is family)

    current = _launches(driver, monkeypatch, "triton", choose_plan, device)
    assert current == [torch.device(device).index] * 2
    assert driver.current == 0, "and afterwards it is the one before"


def test_cupy_launches_on_the_device_of_the_tensors(driver, monkeypatch):
    monkeypatch.setattr(cupy_cooperative, "as_words", lambda weights, size: weights)  # padding asks the driver
    monkeypatch.setattr(cupy_launch, "card_of", lambda device: planning.Card(90, 132))
    current = _launches(driver, monkeypatch, "cupy", planning.choose_plan, "cuda:1")
    assert current == [1, 1]
    assert driver.current == 0


def test_a_step_of_a_stream_is_captured_on_the_device_of_its_input(driver, monkeypatch):
    """torch.cuda.Stream() and CUDAGraph() belong to the device that is current when they are made."""
    made: list[tuple[str, int]] = []

    class Queue:
        def wait_stream(self, _): ...

    class Within:
        def __init__(self, *_): ...
        def __enter__(self): ...
        def __exit__(self, *_): ...

    def maker(name, result):
        def make(*_):
            made.append((name, driver.current))
            return result()

        return make

    monkeypatch.setattr(torch.cuda, "Stream", maker("stream", Queue))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", maker("graph", object))
    monkeypatch.setattr(torch.cuda, "current_stream", Queue)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "graph", Within)
    steps: list[int] = []
    stream.captured(lambda: steps.append(driver.current), torch.device("cuda", 1))
    assert made == [("stream", 1), ("graph", 1)]
    assert set(steps) == {1}
    assert driver.current == 0
