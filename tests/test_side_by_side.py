"""Layers and directions at once: each plans for its share of the card, and no two whole grids are ever half resident.

Streams, events and launches are stubbed: a program of what waits for what is written down, and looked at.
"""

import collections
import contextlib
import functools
import json
from types import SimpleNamespace

import pytest
import torch

import gpu_lstm
from gpu_lstm import chunks, fused, streams
from gpu_lstm.__main__ import main
from gpu_lstm.kernels import layer as kernels_layer
from gpu_lstm.kernels import ordering
from gpu_lstm.kernels.problem import Problem, Recurrence
from gpu_lstm.kernels.triton_lstm import launch
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family

CUDA, H100 = torch.device("cuda", 0), DEVICES["h100"]


class Stream:
    """A queue; an event is a copy of what was in it, with all that waited for."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, set()

    def record_event(self) -> set:
        return set(self.done)

    def wait_event(self, event: set) -> None:
        self.done |= event


@pytest.fixture
def queued(monkeypatch):
    """queued(stream, side_by_side): launch on a stream, and say which earlier launches are over by then."""
    monkeypatch.setattr(ordering, "_launched", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def launch_on(stream: Stream, side_by_side: int = 1) -> set:
        (plan, *_) = plans(Problem(8, 16, 768, torch.bfloat16, side_by_side=side_by_side), H100, False)
        assert plan.family is Family.COOPERATIVE
        assert plan.side_by_side == side_by_side
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        ordering.await_others(plan.side_by_side, CUDA)
        before = set(stream.done)
        number = len(launched) + 1
        launched.append(number)
        stream.done.add(number)
        return before

    launched: list[int] = []
    return launch_on


def test_launches_for_the_whole_card_go_one_after_another(queued):
    a, b = Stream("a"), Stream("b")
    assert queued(a) == set()
    assert queued(b) == {1}
    assert queued(b) == {1, 2}
    assert queued(a) == {1, 2, 3}


def test_launches_that_share_the_card_run_at_once_and_others_wait_for_all_of_them(queued):
    a, b, c = Stream("a"), Stream("b"), Stream("c")
    queued(c)
    assert queued(a, 2) == {1}
    assert queued(b, 2) == {1}, "not for the one on a"
    assert queued(a, 2) == {1, 2}
    assert queued(c) == {1, 2, 3, 4}
    assert queued(b, 3) == {1, 2, 3, 4, 5}, "three shares are not two"


def test_families_whose_programs_do_not_wait_are_left_alone(queued, monkeypatch):
    monkeypatch.setattr(kernels_layer, "await_others", None)  # it is not called
    gates, h0 = torch.zeros(2, 16, 256), torch.zeros(16, 64)
    plan = plans(Problem(8, 16, 64, torch.bfloat16), H100, False)[0]
    assert plan.family is Family.RESIDENT
    r = Recurrence(weight_hh=torch.zeros(256, 64), h0=h0, c0=h0)
    launch.layer_forward(gates, r, save=False, plan=plan, launch=lambda *_, **__: None)


@pytest.mark.parametrize("hidden", [768, 1536])
def test_the_launcher_takes_what_the_plan_command_shows(monkeypatch, capsys, tmp_path, hidden):
    """Two directions of 768 units share the card; those of 1536 do not fit half of it, and go one after another."""
    arguments = ["plan", "--hidden", str(hidden), "--batch", "16", "--device", "h100", "--directions", "2", "--json"]
    assert main(arguments) == 0
    shown = {name: each["plan"] for name, each in json.loads(capsys.readouterr().out).items()}
    asked = []
    monkeypatch.setattr(
        launch, "choose_plan", lambda problem, device, which, *_: asked.append((problem, which.backward))
    )
    recurrence = Recurrence(
        weight_hh=torch.empty(4 * hidden, hidden, dtype=torch.bfloat16), h0=torch.empty(16, hidden),
        c0=torch.empty(16, hidden), side_by_side=2,
    )  # fmt: skip
    gates = torch.empty(1024, 16, 4 * hidden, dtype=torch.bfloat16, device="meta")
    with contextlib.suppress(AttributeError):  # of the plan that is None
        launch.layer_forward(gates, recurrence, save=True)
    with contextlib.suppress(AttributeError):
        launch.layer_backward(None, None, None, gates, gates, recurrence)
    assert [backward for _, backward in asked] == [False, True]
    for (problem, backward), plan in zip(asked, shown.values()):
        ours = plans(problem, H100, backward)[0]
        assert plan == ours.__dict__ | {"family": ours.family.value}
        assert ours.family is Family.COOPERATIVE
        assert ours.side_by_side == (2 if hidden == 768 else 1)


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [({}, 200, 1), ({"num_layers": 3}, 200, 3), ({"num_layers": 3}, 20, 1), ({"bidirectional": True}, 20, 2)],
    ids=str,
)
def test_layers_say_how_many_run_at_once(monkeypatch, options, steps, expected):
    """As if the CPU had streams: what runs at once is told to every launch, forward and backward."""
    told = []

    def layer(x, state, weights, traversal, backend, noise, recompute, side_by_side):
        told.append(side_by_side)
        return x.new_zeros(*x.shape[:2], state[0].shape[1]), state

    monkeypatch.setattr(streams, "for_work_on", lambda x, count: (object() if count > 1 else None,) * count)
    monkeypatch.setattr(streams, "on", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(streams, "join", lambda *_: None)
    monkeypatch.setattr(fused, "layer", layer)
    with torch.no_grad():
        gpu_lstm.LSTM(3, 4, backend="triton", **options)(torch.zeros(steps, 1, 3))
    assert set(told) == {expected}


class Queue:
    """A CUDA stream that writes down what it waits for and what work it was given."""

    def __init__(self, name, log) -> None:
        self.name, self.log, self.device = name, log, CUDA

    def wait_stream(self, other) -> None:
        self.log.append((self.name, "waits for", other.name))

    def __enter__(self) -> None:
        self.log.append((self.name, "begins"))

    def __exit__(self, *_) -> None:
        self.log.append((self.name, "ends"))


class Memory:
    """A tensor that writes down who keeps its memory."""

    def __init__(self, name, log) -> None:
        self.name, self.log = name, log

    def record_stream(self, stream) -> None:
        self.log.append((stream.name, "reads", self.name))


def test_a_stream_waits_before_it_reads_and_holds_what_it_reads(monkeypatch):
    log = []
    main, below, above = (Queue(name, log) for name in ("main", "below", "above"))
    x, h = Memory("x", log), Memory("h", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    with streams.on(below, None, [x]):
        pass
    with streams.on(above, below, [x, h]):
        pass
    with streams.on(None, None, [x]):  # as on the CPU
        pass
    streams.join((below, None, above), [h])
    assert log == [
        ("below", "waits for", "main"), ("below", "reads", "x"), ("below", "begins"), ("below", "ends"),
        ("above", "waits for", "below"), ("above", "reads", "x"), ("above", "reads", "h"),
        ("above", "begins"), ("above", "ends"),
        ("main", "waits for", "below"), ("main", "reads", "h"), ("main", "waits for", "above"), ("main", "reads", "h"),
    ]  # fmt: skip


def test_streams_are_taken_where_they_help_and_never_into_a_graph(monkeypatch):
    """The same ones at every call; none while a graph is captured or compiled, where they would become part of it."""
    state = {"capturing": False, "compiling": False}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: state["compiling"])
    monkeypatch.setattr(streams, "_streams", functools.cache(streams._streams.__wrapped__))
    x = SimpleNamespace(is_cuda=True, device=CUDA)
    taken = streams.for_work_on(x, 3)
    assert len(set(taken)) == 3
    assert None not in taken
    assert streams.for_work_on(x, 3) == taken
    assert streams.for_work_on(x, 1) == (None,)
    assert streams.for_work_on(torch.zeros(1), 2) == (None, None)
    for why in state:
        state[why] = True
        assert streams.for_work_on(x, 3) == (None,) * 3
        state[why] = False


@pytest.mark.parametrize(
    ("steps", "workspace", "length"),
    [(127, 1 << 30, 127), (128, 1 << 30, 64), (512, 1 << 30, 64), (1000, 1 << 30, 125), (1000, 20 * 2 * 16 * 4, 20)],
)
def test_chunks_of_layers_side_by_side(monkeypatch, steps, workspace, length):
    """An eighth of the sequence, though no fewer than 64 steps, and no more than the workspace holds."""
    monkeypatch.setattr(streams, "for_work_on", lambda x, count: (object(),) * count)
    monkeypatch.setattr(chunks, "WORKSPACE", workspace)
    with torch.no_grad():
        schedule = chunks.schedule(torch.zeros(steps, 2, 3), gpu_lstm.LSTM(3, 4, 2)._weights(), False)
    assert schedule.side_by_side == (1 if steps < 128 else 2)
    if length == steps:
        assert schedule.spans == [None]
    else:
        starts = range(0, steps, length)
        assert schedule.spans == [slice(start, min(start + length, steps)) for start in starts]


@pytest.mark.parametrize(
    "options", [dict(num_layers=3), dict(num_layers=3, dropout=0.5), dict(bidirectional=True)], ids=str
)
def test_layers_wait_for_those_below_and_the_caller_for_all(monkeypatch, options):
    """As if the CPU had streams: whatever one of them reads was made on it, is waited for, and is held for it."""
    names: list[str] = []
    made_on: dict[int, str] = {}  # by address
    waited: dict[str, set] = {"caller": set()}  # whose work a stream has waited for
    current = ["caller"]

    @contextlib.contextmanager
    def on(stream, after, reads):
        waited.setdefault(stream, set()).update({after or "caller"} | waited[after or "caller"])
        current.append(stream)
        held[stream].update(t.data_ptr() for t in reads)
        yield
        current.pop()

    def join(joined, results):
        assert list(joined) == names
        waited["caller"].update(joined)
        held["caller"].update(t.data_ptr() for t in results)

    def layer(x, state, weights, traversal, backend, noise, recompute, side_by_side):
        for tensor in (x, *state):
            source = made_on.get(tensor.data_ptr(), "caller")
            assert source == current[-1] or source in waited[current[-1]]
            assert source == current[-1] or tensor.data_ptr() in held[current[-1]]
        found = x.new_zeros(*x.shape[:2], state[0].shape[1]), tuple(torch.zeros_like(t) for t in state)
        for tensor in (found[0], *found[1]):
            made_on[tensor.data_ptr()] = current[-1]
            alive.append(tensor)
        return found

    def for_work_on(x, count):
        names.extend(f"stream {k}" for k in range(count))
        return tuple(names)

    held = collections.defaultdict(set)
    alive: list[torch.Tensor] = []  # so that no address is given twice
    monkeypatch.setattr(streams, "for_work_on", for_work_on)
    monkeypatch.setattr(streams, "on", on)
    monkeypatch.setattr(streams, "join", join)
    monkeypatch.setattr(fused, "layer", layer)
    lstm = gpu_lstm.LSTM(3, 4, backend="triton", **options)
    lstm(torch.zeros(200, 2, 3))
    assert len(names) == max(lstm.num_layers, 1 + lstm.bidirectional)
    assert waited["caller"] == set(names)
    finals = [tensor.data_ptr() for tensor in alive if tensor.dim() == 2][-2 * len(names) :]
    assert set(finals) <= held["caller"]


def test_backward_is_told_what_forward_was(monkeypatch):
    told = []
    monkeypatch.setattr(kernels_layer, "await_others", lambda at_once, device: None)
    choose = launch.choose_plan

    def spy(problem, device, which, *rest):
        told.append((problem.side_by_side, which.backward))
        return choose(problem, device, which, *rest)

    monkeypatch.setattr(launch, "choose_plan", spy)
    lstm = gpu_lstm.LSTM(3, 4, backend="triton")
    (weights,), zeros = lstm._weights()[0], torch.zeros(1, 4)
    h, _ = fused.layer(
        torch.zeros(2, 1, 3), (zeros, zeros), weights, gpu_lstm.sequences.Traversal(), gpu_lstm.Backend.TRITON,
        side_by_side=2,
    )  # fmt: skip
    h.sum().backward()
    assert told == [(2, False), (2, True)]
