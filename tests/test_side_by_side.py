"""Streams, devices and chunks of time, with a stubbed driver.

Launches wait for the right ones, and get the right share of the right card. Chunks change no number and bound the
memory that is kept.
"""

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from places import by_interpreter
from standing_in import CUDA, H100, plan_of, torch_finds
from test_interrupted import lock_that_announces
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from watching import Watched

import gpu_lstm
from gpu_lstm.call import modes
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import race
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.route import forget
from gpu_lstm.execution import operators, schedule
from gpu_lstm.kernels import layer as launcher
from gpu_lstm.kernels import memory, ordering
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans.choose import plans
from gpu_lstm.tools.stream import captured


class Stream:
    """A queue. An event is a copy of the operations done in it, including all that it waited for."""

    def __init__(self) -> None:
        self.done = set()
        self.record_event, self.wait_event = self.done.copy, self.done.update


@pytest.fixture
def streams(monkeypatch):
    """launched(number, stream, ...), where each thread has a current stream, and a Mock that records
    synchronisations."""

    def synchronize(device):
        launched = set().union(*[stream.done for stream in found.values()])
        for stream in found.values():
            stream.done |= launched

    found, local, states = {name: Stream() for name in "abc"}, threading.local(), {}
    synchronised = Mock(side_effect=synchronize)
    torch_finds(monkeypatch, synchronize=synchronised, current_stream=lambda device: found[local.name])
    for place, name in ((ordering, "_launched"), (torch.cuda, "_gpu_lstm_launched_2")):
        monkeypatch.setattr(place, name, states, raising=False)

    def launched(number, name, at_once=1, meanwhile=lambda: None, copy=ordering):
        """Return the launches that are over when this one begins. Then call `meanwhile`."""

        def launch():
            before = set(found[name].done)
            meanwhile()
            found[name].done.add(number)
            return before

        local.name = name
        return copy.in_order(at_once, CUDA, launch)

    return SimpleNamespace(launched=launched, synchronised=synchronised)


@pytest.mark.parametrize("launches", [
    [("a", 1, set()), ("b", 1, {1}), ("b", 1, {1, 2}), ("a", 1, {1, 2, 3})],
    # Launches that share the card run at once: the second one on b does not wait for the first one on a. For a third
    # one there is no room.
    [("c", 1, set()), ("a", 2, {1}), ("b", 2, {1}), ("a", 2, {1, 2}), ("c", 2, {1, 2, 3, 4}), ("a", 2, {1, 2, 3, 4}),
     ("c", 1, {1, 2, 3, 4, 5, 6})],
    # The launches of a before it shares the card with b are those that b waits for.
    [("c", 1, set()), ("a", 1, {1}), ("a", 2, {1, 2}), ("b", 2, {1, 2})],
], ids=["whole", "shares", "alone before"])  # fmt: skip
def test_launches_for_the_whole_card_go_one_after_another_and_wait_for_all_that_share_it(streams, launches):
    """Each row has the numbers of the earlier launches that are over when it begins. Nothing is recorded before there
    are two streams."""
    for number, (name, side_by_side, expected) in enumerate(launches, 1):
        (plan, *_) = plans(Problem(8, 16, 768, torch.bfloat16, side_by_side=side_by_side), H100, False)
        assert (plan.family.name, plan.side_by_side) == ("cooperative", side_by_side)
        assert streams.launched(number, name, plan.side_by_side) == expected
    assert streams.synchronised.mock_calls == [call(CUDA)]  # at the first switch, since the first stream may be gone


def test_of_two_threads_the_second_waits_for_what_the_first_launches(streams, monkeypatch):
    with ThreadPoolExecutor(1) as thread:
        streams.launched(1, "a")
        assert streams.launched(2, "b") == {1}
        asked, second = lock_that_announces(monkeypatch, ordering._launched[CUDA]), []

        def meanwhile():
            asked.clear()
            second.append(thread.submit(streams.launched, 4, "b", meanwhile=asked.set))
            asked.wait()  # until the second launch waits, or has launched

        assert streams.launched(3, "a", meanwhile=meanwhile) == {1, 2}
        assert second[0].result() == {1, 2, 3}


@pytest.mark.parametrize(("at_once", "names", "waited"), [
    (1, "abab", [set(), {1}, {1, 2}, {1, 2, 3}]), (2, "abca", [set(), set(), {1, 2}, {1, 2}]),
])  # fmt: skip
def test_launches_of_two_copies_of_the_library_wait_for_each_other(streams, monkeypatch, at_once, names, waited):
    """Hugging Face's `kernels` loads a copy beside an installed one."""
    spec = importlib.util.spec_from_file_location("a_copy", ordering.__file__)
    monkeypatch.setitem(sys.modules, "a_copy", copy := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(copy)
    for number, (of, name, before) in enumerate(zip((ordering, copy) * 2, names, waited), 1):
        assert streams.launched(number, name, at_once, copy=of) == before


def test_a_launch_that_raises_lets_others_launch_which_wait_for_it(streams):
    streams.launched(1, "a")
    streams.launched(2, "b")
    for number, name in ((3, "b"), (4, "c")):
        with pytest.raises(RuntimeError, match="planted"):
            streams.launched(number, name, meanwhile=Mock(side_effect=RuntimeError("planted")))
    count = len(streams.synchronised.mock_calls)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(streams.launched, 5, "a").result()
    assert len(streams.synchronised.mock_calls) == count + 1


def _call(options, capturing=False, **facts):
    given = gpu_lstm.LSTM(3, 4, **options)._request(torch.zeros(200, 2, 3))
    return given._replace(modes=given.modes._replace(capturing=capturing), **facts)


@pytest.fixture
def schedule_of(monkeypatch):
    """schedule_of(options) returns the schedule of an LSTM with these options. Objects stand in for streams."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(schedule, "_pairs", {})

    def schedule_of(options, is_cuda=True, **facts):
        x = SimpleNamespace(is_cuda=is_cuda, device=CUDA)
        return schedule.schedule_of(_call(options, x=x, **facts), 4)

    return schedule_of


@pytest.mark.parametrize(("options", "expected"), [(dict(num_layers=3), 1), (dict(bidirectional=True), 2)], ids=str)
def test_directions_run_at_once_and_never_in_a_graph(schedule_of, monkeypatch, options, expected):
    """Every call has the same streams. All launches, forward and backward, know how many run at once."""
    found = schedule_of(options)
    assert found.side_by_side == expected
    assert len(set(found.streams)) == (expected if expected > 1 else 0)
    assert schedule_of(options) == found
    # A captured graph uses the plans of the warm-up.
    for why, at_once in ((dict(is_cuda=False), 1), (dict(capturing=True), expected)):
        one_stream = schedule_of(options, **why)
        assert (one_stream.streams, one_stream.side_by_side) == ((), at_once)
    monkeypatch.setattr(race, "schedule_of", lambda *_: found)
    given = _call(options)
    kind = kind_of(given)
    layers = race.build(given, kind, Backend.TRITON).layers
    assert [layer.problem.side_by_side for layer in layers] == [expected] * len(kind.problems)


def test_all_threads_have_the_same_streams(schedule_of, monkeypatch):
    """This holds even if another thread asks for the streams while they are made. Twice as many would not fit the card
    together."""
    others, both = [], dict(bidirectional=True)

    def made(device):
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
        others.append(schedule_of(both))
        return object()

    monkeypatch.setattr(torch.cuda, "Stream", made)
    assert [schedule_of(both)] == others == [schedule_of(both)]


# The device that is current when a kernel is launched on fake tensors of cuda:1


@pytest.fixture
def driver(monkeypatch):
    """A stub of the driver below torch.cuda, which knows the current device."""
    driver = SimpleNamespace(current=0)

    def exchange(device: int) -> int:
        before, driver.current = driver.current, device if device >= 0 else driver.current
        return before

    names = dict(_exchange_device=exchange, _maybe_exchange_device=exchange, current_device=lambda: driver.current)
    torch_finds(monkeypatch, device=torch.cuda.device, **names)
    return driver


def _indexed(t, key):
    """t[0], t[:-1] and t[..., :H] as the launchers use them. Python's own indexing of a CUDA tensor asks the driver."""
    if isinstance(key, int):
        return t.select(0, key)
    first = key[0] if isinstance(key, tuple) else key
    return t.narrow(0, 0, t.shape[0] - 1) if isinstance(first, slice) else t


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_forward_and_backward_are_launched_on_the_device_of_the_tensors(driver, monkeypatch, device):
    """kernels/layer.py makes the device current, so it holds for any family."""
    current, asked = [], []
    monkeypatch.setattr(launch, "choose_plan", lambda problem, _, pass_, *__: plan_of("step", problem, pass_.backward))
    monkeypatch.setattr(launch, "launch_kernel", lambda *_, **__: current.append(driver.current))
    monkeypatch.setattr(launch, "error_word", lambda device, kernel, trial=False: None)  # an error word would be kept
    monkeypatch.setattr(launcher, "in_order", lambda at_once, _, run, *given: asked.append(at_once) or run(*given))
    monkeypatch.setattr(launcher, "aligned", lambda t: t)  # fake tensors have no address
    monkeypatch.setattr(memory._Checking, "on", False)
    monkeypatch.setattr(torch.Tensor, "__getitem__", _indexed)
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *_: None)
    T, B, I, H = 3, 2, 4, 16
    with FakeTensorMode():
        sizes = (T, B, I), (1, B, H), (1, B, H), (4 * H, I), (4 * H, H)
        given = [torch.empty(size, device=device) for size in sizes]
        h, _, _, gates, c = operators._forward("lstm", False, "triton", True, False, *given)
        needed = [k == 1 for k in range(len(sizes))]
        operators._backward("lstm", False, "triton", [h, None, None], [h, gates, c], needed, given)
    assert current == [torch.device(device).index] * 2
    assert asked == [1, 1], "programs of this family wait for each other"
    assert driver.current == 0, "and afterwards it is the one before"


def test_a_step_of_a_stream_is_captured_on_the_device_of_its_input_whatever_another_thread_does(driver, monkeypatch):
    """torch.cuda.Stream() and CUDAGraph() belong to the device that is current when they are made. In mode "global",
    torch's default, an unsafe operation of another thread would raise during a capture."""
    made, steps, asked = [], Mock(side_effect=lambda: torch.ones(1) * driver.current), MagicMock()
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: made.append((name, driver.current)) or MagicMock())
    for name in ("current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", asked)
    assert torch.equal(captured(steps, torch.device("cuda", 1))(), torch.ones(1))
    assert (made, driver.current) == ([("Stream", 1), ("CUDAGraph", 1)], 0)
    assert [call.kwargs for call in asked.call_args_list] == [dict(capture_error_mode="thread_local")]
    assert steps.call_count == 4  # three of them warm up


@pytest.fixture
def two_steps(monkeypatch):
    """two_steps(batch, hidden) makes every later chunk two steps long, also in kinds of calls that were decided
    before."""

    def two_steps(batch: int, hidden: int) -> None:
        monkeypatch.setattr(schedule, "WORKSPACE", 2 * batch * 4 * hidden * 4)
        forget()

    return two_steps


def kept_elements(module, x) -> int:
    """Return how many elements autograd keeps, without the input and parameters. A float32 of a half-precision layer
    counts as one."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    return sum(count for place, count in kept.items() if place not in known)


@pytest.mark.parametrize(("cell", "dtype"), [("LSTM", torch.float32), ("LSTM", torch.float16), ("GRU", torch.float16)])
def test_what_is_saved_for_backward_and_less_where_every_layer_of_a_stack_recomputes(device, cell, dtype):
    how = dict(dtype=dtype, device=device, backend="triton")
    x = torch.randn(4, 3, 4, dtype=dtype, device=device, requires_grad=True)
    for recompute, elements in ((False, 6 * 4), (True, 2 * 4)):
        module = getattr(gpu_lstm, cell)(4, 4, recompute=recompute, **how)
        assert 0 <= kept_elements(module, x) - elements * 4 * 3 <= 4 * 3 * 4 + 64  # h0 and c0
    kind = getattr(gpu_lstm, f"Stacked{cell}")
    stacks = (kind(4, [4, 4], bidirectional=True, recompute=again, **how) for again in (False, True))
    kept, less = (kept_elements(stack, x) for stack in stacks)
    assert kept - less == 2 * 2 * 4 * 4 * 4 * 3  # gates of both layers and directions


def allocated(call) -> list[int]:
    """Return the bytes of each storage that a call makes, without autograd."""
    sizes = []

    def note(_, *trees):
        given, new = ([t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in trees)
        known = {storage.data_ptr() for storage in given}
        sizes.extend(storage.nbytes() for storage in new if storage.data_ptr() not in known)

    with torch.no_grad(), Watched(note):
        call()
    return sizes


@pytest.mark.parametrize(("cell", "options"), [
    ("LSTM", {}), ("LSTM", dict(num_layers=2, bidirectional=True)), ("LSTM", dict(num_layers=2, proj_size=3)),
    ("GRU", {}),
], ids=str)  # fmt: skip
@pytest.mark.deep
def test_a_long_sequence_needs_a_fixed_workspace(monkeypatch, two_steps, device, cell, options):
    """Without autograd there are the pre-activations of one chunk at a time. No tensor exceeds the workspace, except
    outputs. Outputs of two directions are joined."""
    two_steps(batch=1, hidden=6)
    monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)  # the measured call is one that nobody watches
    monkeypatch.setattr(memory._Checking, "on", False)  # margins take memory, too
    if launch.INTERPRETED:
        # It copies tensors.
        monkeypatch.setattr(launch, "launch_kernel", _disable_current_modes()(launch.launch_kernel))
    module = getattr(gpu_lstm, cell)(4, 6, device=device, backend="triton", **options)
    x = torch.randn(17, 1, 4, device=device)
    of_a_chunk, allocations = (allocated(lambda x=x: module(x)) for x in (x[:2], x))
    y, _ = module(x)
    output, both, layers = y.numel() * y.element_size(), module.bidirectional, module.num_layers
    outputs = [output] * layers + [output // 2] * (2 * layers * both)
    weights = {size for size in of_a_chunk if size > schedule.WORKSPACE}  # W_hh W_hr, whatever T is
    largest = sorted((size for size in allocations if size not in weights), reverse=True)
    assert largest[: len(outputs)] == outputs
    assert largest[len(outputs)] <= schedule.WORKSPACE < outputs[-1]


@pytest.mark.parametrize(("cell", "half"), [("LSTM", True), ("LSTM", False), ("GRU", True)])
def test_cell_states_go_from_chunk_to_chunk_in_float32(two_steps, device, cell, half):
    module = getattr(gpu_lstm, cell)(4, 6, device=device, backend="triton")
    x, results = torch.randn(9, 3, 4, device=device), []
    module, x = (module.half(), x.half()) if half else (module, x)
    for _ in range(2):
        with torch.no_grad(), torch.autocast(device, torch.float16, enabled=not half):
            results.append(tree_leaves(module(x)))
        two_steps(batch=3, hidden=6)
    assert all(map(torch.equal, *results))
    assert results[1][-1].dtype is torch.float16


@by_interpreter
@pytest.mark.parametrize(("recompute", "training", "steps"), [
    (True, True, [5]), (False, True, [5]), (False, False, [2, 2, 1]),
])  # fmt: skip
def test_a_sequence_is_cut_into_chunks_in_inference_alone(launched, two_steps, recompute, training, steps):
    two_steps(batch=3, hidden=6)
    lstm = gpu_lstm.LSTM(4, 6, backend="triton", recompute=recompute)
    with torch.set_grad_enabled(training):
        lstm(torch.randn(5, 3, 4))
    assert [each.kwargs["T"] for each in launched.mock_calls] == steps
