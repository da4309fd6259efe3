"""Layers and directions at once, on stubbed streams: what waits for what, and which share of the card each gets."""

import collections
import contextlib
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from standing_in import H100, recurrence

import gpu_lstm
from gpu_lstm.__main__ import main
from gpu_lstm.backends import autograd, schedule
from gpu_lstm.call.choices import Backend
from gpu_lstm.call.prepare import prepare
from gpu_lstm.dispatch import route
from gpu_lstm.dispatch.kind import kind_of, size_class
from gpu_lstm.kernels import layer as launcher
from gpu_lstm.kernels import ordering
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_lstm import launch
from gpu_lstm.kernels.triton_lstm.choose import candidates, plans

CUDA = torch.device("cuda", 0)


class Stream:
    """A queue; an event is a copy of what was done in it, with all that it waited for."""

    def __init__(self) -> None:
        self.done = set()
        self.record_event, self.wait_event = self.done.copy, self.done.update


@pytest.fixture
def streams(monkeypatch):
    """launched(number, stream, ...), of which each thread has a current one; what was synchronised."""

    def synchronize(device):
        launched = set().union(*[stream.done for stream in found.values()])
        for stream in found.values():
            stream.done |= launched

    found, local = {name: Stream() for name in "abc"}, threading.local()
    synchronised = Mock(side_effect=synchronize)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found[local.name])
    monkeypatch.setattr(ordering, "_launched", {})

    def launched(number, name, at_once=1, meanwhile=lambda: None):
        """The launches that are over when this one begins; then `meanwhile` happens."""

        def launch():
            before = set(found[name].done)
            meanwhile()
            found[name].done.add(number)
            return before

        local.name = name
        return ordering.in_order(at_once, CUDA, launch)

    return SimpleNamespace(launched=launched, synchronised=synchronised)


@pytest.mark.parametrize("launches", [
    [("a", 1, set()), ("b", 1, {1}), ("b", 1, {1, 2}), ("a", 1, {1, 2, 3})],
    # Those that share the card run at once: the second on b not after the first on a; three shares are not two.
    [("c", 1, set()), ("a", 2, {1}), ("b", 2, {1}), ("a", 2, {1, 2}), ("c", 1, {1, 2, 3, 4}),
     ("b", 3, {1, 2, 3, 4, 5})],
], ids=["whole", "shares"])  # fmt: skip
def test_launches_for_the_whole_card_go_one_after_another_and_wait_for_all_that_share_it(streams, launches):
    """Which earlier launches, by their numbers, are over when one begins. Nothing is recorded before there are two."""
    for number, (name, side_by_side, expected) in enumerate(launches, 1):
        (plan, *_) = plans(Problem(8, 16, 768, torch.bfloat16, side_by_side=side_by_side), H100, False)
        assert (plan.family.name, plan.side_by_side) == ("cooperative", side_by_side)
        assert streams.launched(number, name, plan.side_by_side) == expected
    assert streams.synchronised.mock_calls == [call(CUDA)]  # at the first switch, since that stream may be gone


def test_of_two_threads_the_second_waits_for_what_the_first_launches(streams):
    """It asks while the first one launches."""
    with ThreadPoolExecutor(1) as thread:
        streams.launched(1, "a")
        assert streams.launched(2, "b") == {1}
        state, asked = ordering._launched[CUDA], threading.Event()
        state.lock = Announced(state.lock, asked)
        second = []

        def meanwhile():
            asked.clear()
            second.append(thread.submit(streams.launched, 4, "b", meanwhile=asked.set))
            asked.wait()  # until it waits, or has launched

        assert streams.launched(3, "a", meanwhile=meanwhile) == {1, 2}
        assert second[0].result() == {1, 2, 3}


class Announced:
    """A lock that sets an event when a thread asks for it."""

    def __init__(self, lock, asked):
        self.lock, self.asked = lock, asked

    def __enter__(self):
        self.asked.set()
        self.lock.__enter__()

    def __exit__(self, *error):
        self.lock.__exit__(*error)


def test_a_launch_that_raises_lets_others_launch_which_wait_for_it(streams):
    """Something may have been launched."""
    streams.launched(1, "a")
    streams.launched(2, "b")
    for number, name in ((3, "b"), (4, "c")):
        with pytest.raises(RuntimeError, match="planted"):
            streams.launched(number, name, meanwhile=Mock(side_effect=RuntimeError("planted")))
    count = len(streams.synchronised.mock_calls)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(streams.launched, 5, "a").result()
    assert len(streams.synchronised.mock_calls) == count + 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("hidden", "family"), [(64, "resident"), (768, "cooperative")])
def test_a_launch_waits_for_others_if_its_programs_wait_for_each_other(monkeypatch, hidden, family, backward):
    seen, in_order = Mock(), ordering.in_order

    def asked(at_once, *given):
        seen.asked(at_once)
        return in_order(at_once, *given)

    monkeypatch.setattr(launcher, "in_order", asked)
    problem = Problem(2, 16, hidden, torch.bfloat16, side_by_side=2)
    plan = plans(problem, H100, backward)[0]
    gates, weights, h0, c0 = (torch.zeros(*size, hidden) for size in ((2, 16, 4), (4 * hidden,), (16,), (16,)))
    gates = gates.bfloat16().flatten(2)
    r = recurrence(gates, weight_hh=weights.bfloat16(), h0=h0.bfloat16(), c0=c0)
    monkeypatch.setattr(launch, "launch_kernel", lambda *_, **__: seen.launched())
    layer = launch.layer_of(problem, c0.device).with_plan(plan)
    if backward:
        layer.backward(None, h0.bfloat16(), None, gates, torch.zeros(2, 16, hidden), r, False)
    else:
        layer.forward(gates, r, save=False)
    at_once = 2 if family == "cooperative" else None
    assert (plan.family.name, seen.mock_calls) == (family, [call.asked(at_once), call.launched()])


def _call(lstm, steps, **facts):
    like = next(lstm.parameters())
    x = like.new_zeros(steps, facts.pop("batch", 2), lstm.input_size)
    given = prepare(lstm._options(), lstm._weights(), x)
    return given._replace(modes=given.modes._replace(capturing=facts.pop("capturing", False)), **facts)


@pytest.mark.parametrize("hidden", [768, 1536])
def test_the_plans_of_a_call_are_those_that_the_plan_command_shows(nothing_cached, capsys, hidden):
    """Two directions of 768 units share the card; those of 1536 do not fit half of it, and go one after another."""
    arguments = ["plan", "--hidden", str(hidden), "--batch", "16", "--device", "h100", "--directions", "2", "--json"]
    assert main(arguments) == 0
    shown = [each["plan"] for each in json.loads(capsys.readouterr().out).values()]
    lstm = gpu_lstm.LSTM(8, hidden, bidirectional=True, dtype=torch.bfloat16, device="meta")
    kind = kind_of(_call(lstm, 1024, batch=16))
    for (which, plan), row in itertools.product(zip((Pass(), Pass(True)), shown, strict=True), range(2)):
        ours = candidates(kind.problem(row, side_by_side=2), H100, which)[0]
        assert plan == ours.as_json() | {"family": ours.family.name}
        assert (ours.family.name, ours.side_by_side) == ("cooperative", 2 if hidden == 768 else 1)


@pytest.fixture
def schedule_of(monkeypatch):
    """Of an LSTM with options and a call of so many steps; objects stand in for streams."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(schedule, "_made", {})

    def schedule_of(options, steps, is_cuda=True, **facts):
        x = SimpleNamespace(is_cuda=is_cuda, device=CUDA)
        return schedule.schedule_of(_call(gpu_lstm.LSTM(3, 4, **options), steps, x=x, **facts), size_class(steps), 4)

    return schedule_of


@pytest.mark.parametrize(("options", "steps", "expected"), [
    ({}, 200, 1), (dict(num_layers=3), 200, 3), (dict(num_layers=3), 20, 1), (dict(bidirectional=True), 20, 2),
], ids=str)  # fmt: skip
def test_layers_run_at_once_where_that_helps_and_never_in_a_graph(schedule_of, monkeypatch, options, steps, expected):
    """On the same streams at every call; and all launches, forward and backward, know how many run at once."""
    found = schedule_of(options, steps)
    assert found.side_by_side == expected
    assert len(set(found.streams) - {None}) == (expected if expected > 1 else 0)
    assert schedule_of(options, steps) == found
    for why, at_once in ((dict(is_cuda=False), 1), (dict(capturing=True), expected)):  # by the plans of the warm-up
        one_stream = schedule_of(options, steps, **why)
        assert (set(one_stream.streams), one_stream.side_by_side) == ({None}, at_once)
    monkeypatch.setattr(route, "schedule_of", lambda *_: found)
    given = _call(gpu_lstm.LSTM(3, 4, **options), steps)
    layers = route.build(given, kind_of(given), Backend.TRITON).layers
    assert [layer.problem.side_by_side for layer in layers] == [expected] * given.options.rows


@pytest.mark.parametrize(("steps", "workspace", "length"), [
    (128, 1 << 30, 128), (129, 1 << 30, 64), (512, 1 << 30, 64), (1000, 1 << 30, 125), (1001, 1 << 30, 126),
    (1000, 20 * 2 * 16 * 4, 20),
])  # fmt: skip
def test_chunks_of_layers_side_by_side(schedule_of, monkeypatch, steps, workspace, length):
    """An eighth of the sequence, though no fewer than 64 steps, and no more than the workspace holds."""
    monkeypatch.setattr(schedule, "WORKSPACE", workspace)
    found = schedule_of(dict(num_layers=2), steps, learns=False)
    assert found.side_by_side == (2 if steps > 128 else 1)
    chunks = [slice(start, min(start + length, steps)) for start in range(0, steps, length)]
    assert found.spans(steps, 1) == (chunks if len(chunks) > 1 else [None])


def test_a_stream_waits_before_it_reads_and_the_caller_for_all(monkeypatch):
    log = MagicMock()  # of what is called on streams and tensors, its attributes
    main, below, above, x, h = log.main, log.below, log.above, log.x, log.h
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    schedule.hold(below, [x, None])
    with schedule.on(below, None):
        pass
    with schedule.on(above, below):
        pass
    schedule.hold(None, [x])  # as on the CPU
    with schedule.on(None, None):
        pass
    schedule.join((below, None, above), [h])
    assert [each for each in log.mock_calls if not each[0].endswith("__bool__")] == [
        call.x.record_stream(below), call.below.wait_stream(main),
        call.below.__enter__(), call.below.__exit__(None, None, None),
        call.above.wait_stream(below),
        call.above.__enter__(), call.above.__exit__(None, None, None),
        call.main.wait_stream(below), call.h.record_stream(main),
        call.main.wait_stream(above), call.h.record_stream(main),
    ]  # fmt: skip


def test_all_threads_have_the_same_streams(monkeypatch):
    """Also where another one asks for them while they are made: twice as many would not fit the card together."""
    devices = [CUDA, CUDA]  # for the first stream that is made

    def made(device):
        return others.append(schedule._streams(devices.pop(), 2)) or object() if devices else object()

    others = []
    monkeypatch.setattr(schedule, "_made", {})
    monkeypatch.setattr(torch.cuda, "Stream", made)
    streams = schedule._streams(CUDA, 2)
    assert len(others) == 2
    assert [streams, *others] == [schedule._streams(CUDA, 2)] * 3


@pytest.mark.parametrize(
    "options", [dict(num_layers=3), dict(num_layers=3, dropout=0.5), dict(bidirectional=True)], ids=str
)
def test_layers_wait_for_those_below_and_the_caller_for_all(monkeypatch, options):
    """As if the CPU had streams: whatever one of them reads was made on it, is waited for, and is held for it."""
    lstm = gpu_lstm.LSTM(3, 4, backend="triton", **options)
    names = tuple(f"stream {k}" for k in range(max(lstm.num_layers, 1 + lstm.bidirectional)))
    made_on, current = {}, ["caller"]  # by address
    waited, held = (collections.defaultdict(set) for _ in range(2))  # whose work a stream has waited for; addresses
    alive = []  # so that no address is given twice

    @contextlib.contextmanager
    def on(stream, after):
        waited[stream] |= {after or "caller"} | waited[after or "caller"]
        current.append(stream)
        yield
        current.pop()

    def hold(stream, tensors):
        held[stream].update(t.data_ptr() for t in tensors if t is not None)

    def join(joined, results):
        waited["caller"].update(joined)
        held["caller"].update(t.data_ptr() for t in results)

    def layer(kernels, x, state, weights, traversal, *_):
        alive.append(traversal.lengths)  # of this chunk
        for tensor in (x, *state, traversal.lengths):
            source, here = made_on.get(tensor.data_ptr(), "caller"), current[-1]
            assert source == here or (source in waited[here] and tensor.data_ptr() in held[here])
        found = x.new_zeros(*x.shape[:2], state[0].shape[-1]), tuple(torch.zeros_like(t) for t in state)
        made_on.update({tensor.data_ptr(): current[-1] for tensor in (found[0], *found[1])})
        alive.extend((found[0], *found[1]))
        return found

    monkeypatch.setattr(route, "schedule_of", lambda *_: schedule.Schedule(2**31, names, len(names)))
    for module, function in (schedule, on), (schedule, hold), (schedule, join), (autograd, layer):
        monkeypatch.setattr(module, function.__name__, function)
    lstm(torch.zeros(200, 2, 3), lengths=torch.tensor([200, 150]))
    assert waited["caller"] == set(names)
    assert set(made_on.values()) == set(names), "each layer, or direction, on its own"
    finals = [tensor.data_ptr() for tensor in alive if len(tensor) == 1][-2 * len(names) :]
    assert set(finals) <= held["caller"]
