"""Layers and directions at once: each plans for its share of the card, and no two whole grids are ever half resident.

Streams, events and launches are stubbed: a program of what waits for what is written down, and looked at.
"""

import contextlib
import json

import pytest
import torch

import gpu_lstm
from gpu_lstm import fused, streams
from gpu_lstm.__main__ import main
from gpu_lstm.kernels.recurrence import Recurrence
from gpu_lstm.kernels.triton_lstm import launch, ordering
from gpu_lstm.kernels.triton_lstm.families import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family, Problem

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
        ordering.await_others(plan, CUDA)
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
    monkeypatch.setattr(torch.cuda, "current_stream", None)  # nobody asks
    ordering.await_others(plans(Problem(8, 16, 64, torch.bfloat16), H100, False)[0], CUDA)
    assert ordering._launched == {}


@pytest.mark.parametrize("hidden", [768, 1536])
def test_the_launcher_takes_what_the_plan_command_shows(monkeypatch, capsys, tmp_path, hidden):
    """Two directions of 768 units share the card; those of 1536 do not fit half of it, and go one after another."""
    arguments = ["plan", "--hidden", str(hidden), "--batch", "16", "--device", "h100", "--directions", "2", "--json"]
    assert main(arguments) == 0
    shown = {name: each["plan"] for name, each in json.loads(capsys.readouterr().out).items()}
    asked = []
    monkeypatch.setattr(launch, "choose_plan", lambda problem, device, backward, *_: asked.append((problem, backward)))
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


def test_backward_is_told_what_forward_was(monkeypatch):
    told = []
    monkeypatch.setattr(launch, "await_others", lambda plan, device: None)
    choose = launch.choose_plan

    def spy(problem, device, backward, *rest):
        told.append((problem.side_by_side, backward))
        return choose(problem, device, backward, *rest)

    monkeypatch.setattr(launch, "choose_plan", spy)
    lstm = gpu_lstm.LSTM(3, 4, backend="triton")
    (weights,), zeros = lstm._weights()[0], torch.zeros(1, 4)
    h, _ = fused.layer(
        torch.zeros(2, 1, 3), (zeros, zeros), weights, gpu_lstm.sequences.Traversal(), gpu_lstm.Backend.TRITON,
        side_by_side=2,
    )  # fmt: skip
    h.sum().backward()
    assert told == [(2, False), (2, True)]
