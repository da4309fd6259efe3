"""`auto` races the kernels against torch's own LSTM. The CPU counts as a card, with a stubbed clock."""

import contextlib
import dataclasses
import itertools
import json
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from places import by_interpreter
from standing_in import CUDA, H100, as_another_process, the_cpu_is_a_card, torch_finds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm
from gpu_lstm.backends import torch_rnn
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import race, route, stopwatch
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.race import Decision
from gpu_lstm.kernels import cache, timeouts
from gpu_lstm.kernels.contract import Chosen
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.plans.planning import Cooperative, Held, Plan, Pointwise, Resident, Step
from gpu_lstm.verification import verify

pytestmark = by_interpreter

EXPECTED = Decision(Backend.TORCH, "expected")
REAL_TIMES_OF = race.times_of
INPUT, LSTM, GRU = torch.zeros(3, 3, 4), gpu_lstm.LSTM(4, 5), gpu_lstm.GRU(4, 5)


@pytest.fixture(autouse=True)
def card(monkeypatch, nothing_cached):
    """The CPU as a card without any results, for inference. Return the folder of its races."""
    the_cpu_is_a_card(monkeypatch)
    with torch.no_grad():
        yield nothing_cached / cache.RACES


@pytest.fixture
def stubbed(monkeypatch):
    """stubbed(triton=..., torch=...) sets the seconds of a call of each rival, by default 1 and 2 ms. It returns a list
    of races and rivals."""

    def costs(triton=1e-3, torch=2e-3):
        ran, time, seconds = [], [0.0], dict(triton=triton, torch=torch)

        def advance(each):
            time[0] += each if isinstance(each, float) else next(each)

        def race_by_the_clock(rivals, now):
            for call in rivals.values():
                call()
            ran.extend(("race", *rivals))
            return REAL_TIMES_OF({name: partial(advance, seconds[name]) for name in rivals}, lambda: time[0])

        monkeypatch.setattr(race, "times_of", race_by_the_clock)
        return ran

    return costs


def _call(lstm=LSTM, x=INPUT):
    return lstm._request(x)


def _backend_of(lstm=LSTM, x=INPUT):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "execute", Mock(side_effect=route.execute))
        lstm(x)
        return route.execute.call_args.args[0].backend.value


@pytest.mark.parametrize("winner", ["triton", "torch"])
@pytest.mark.parametrize(("training", "module"), [(False, LSTM), (True, GRU)])
def test_the_faster_one_runs_and_is_cached(stubbed, card, caplog, winner, training, module):
    seconds = {"triton": 2e-3, "torch": 2e-3} | {winner: 1e-3}
    ran = stubbed(**seconds)
    caplog.set_level("INFO", "gpu_lstm")
    with torch.set_grad_enabled(training):
        assert (_backend_of(module), _backend_of(module), ran) == (winner, winner, ["race", "triton", "torch"])
        assert caplog.text.count(f"{type(module).__name__} 4 -> 5, T <= 4, B <= 4, float32") == 1
        times = "triton 1 ms, torch 2 ms" if winner == "triton" else "triton 2 ms, torch 1 ms"
        assert f"{winner}: won a race, 2.00 times as fast ({times})" in caplog.text
        as_another_process()
        assert (_backend_of(module), ran.count("race")) == (winner, 1), "not again, in another process either"
    entry = json.loads(next(card.glob("*.json")).read_text())
    assert (entry["key"]["training"], entry["value"]["seconds"]) == (training, pytest.approx(seconds))


@pytest.mark.parametrize(("training", "of_input"), [(True, True), (True, False), (False, True)])
def test_a_race_runs_what_the_call_will_and_touches_nothing(stubbed, spy, training, of_input):
    """Weights and the input want gradients where those of the call do. Otherwise time would go into products that
    nobody needs."""
    execute = spy(race, "execute")
    stubbed()
    lstm, x = gpu_lstm.LSTM(4, 5, 2, dropout=0.5), torch.zeros(1, 1, 4, requires_grad=of_input)
    before = [p.clone() for p in lstm.parameters()]
    with torch.set_grad_enabled(training):
        call, random = _call(lstm, x), torch.get_rng_state()
        race.decide(call, kind_of(call), Backend.TRITON)
    samples = [each.args[1] for each in execute.call_args_list]
    asked = {(call.x.requires_grad, call.weights[0][0].weight_hh.requires_grad) for call in samples}
    assert torch.equal(torch.get_rng_state(), random)
    assert asked == {(training and of_input, training)}
    assert [t.grad for t in (x, *lstm.parameters()) if t.grad is not None] == []
    assert all(map(torch.equal, lstm.parameters(), before))


def test_the_race_of_a_long_call_is_about_its_first_steps(stubbed, monkeypatch, spy):
    """The race has the lengths and resets of these steps. With longer ones the kernels would fail, and lose."""
    monkeypatch.setattr(race, "LONGEST", 2)
    ran, execute, resets = stubbed(), spy(race, "execute"), torch.rand(3, 3) < 0.5
    LSTM(INPUT, lengths=torch.tensor([3, 0, 1]), resets=resets)
    assert ran == ["race", "triton", "torch"]
    for _, sample in (each.args for each in execute.call_args_list):
        assert (sample.steps, sample.x.shape, sample.traversal.lengths.tolist()) == (2, (2, 3, 4), [2, 0, 1])
        assert torch.equal(sample.traversal.resets, resets[:2])


@pytest.mark.parametrize(("ours", "theirs", "winner", "why", "trusted"), [
    ([2.0] * 9, [1.0] * 9, "torch", "won a race", True),
    ([1.0, 1.1, 0.9] * 3, [1.05, 1.0, 1.1] * 3, "torch", "a tie; expected", True),
    ([1.0, 9.0, 5.0] * 3, [4.0] * 9, "torch", "too noisy; expected", False),
    # Some rounds are disturbed.
    ([1.0, 9.0, 5.0] * 3, [2.0, 18.0, 10.0] * 3, "triton", "won a race, 2.00 times as fast", True),
])  # fmt: skip
def test_ties_and_noise_go_to_the_expected_winner(ours, theirs, winner, why, trusted):
    decision, is_trusted = race.judge({"triton": ours, "torch": theirs}, EXPECTED)
    assert (decision.backend.value, is_trusted) == (winner, trusted)
    assert why in decision.why


def test_what_is_too_noisy_is_not_cached_but_holds_for_this_process(stubbed, card):
    ran = stubbed(triton=itertools.cycle([1e-3, 9e-3, 5e-3]), torch=5e-3)
    for batch in (3, 4):
        LSTM(torch.zeros(3, batch, 4))
    assert (card.exists(), ran.count("race")) == (False, 1)


def test_a_race_is_fair_and_short():
    """Rivals take turns. Each makes as many calls as show a difference, within the budget, but has two turns at
    least."""
    time, order = 0.0, ""

    def race_of(**seconds):
        def run(name):
            nonlocal time, order
            time, order = time + seconds[name], order + name

        return race.times_of({name: partial(run, name) for name in seconds}, lambda: time)

    times = race_of(a=1e-4, b=1e-2)
    assert {name: {round(s, 9) for s in found} for name, found in times.items()} == {"a": {1e-4}, "b": {1e-2}}
    assert len(times["a"]) == len(times["b"]) >= 3
    assert time < stopwatch.BUDGET + 0.1
    assert order.count("a") > 10 * order.count("b"), "2 ms of calls between looks at the clock"
    assert {name: len(found) for name, found in race_of(a=1.0, b=2.0).items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(("mode", "raced", "winner"), [("on", 1, "triton"), ("read", 0, "torch"), ("off", 0, "torch")])
def test_modes(stubbed, monkeypatch, mode, raced, winner):
    ran = stubbed()
    monkeypatch.setenv(choices.RACE_VARIABLE, mode)
    assert (_backend_of(), ran.count("race")) == (winner, raced)
    with gpu_lstm.racing("on"):
        assert _backend_of() == "triton", "a block counts before the environment"
    as_another_process()
    assert _backend_of() == ("torch" if mode == "off" else "triton"), "what is cached is read"
    assert choices.requested_racing() is choices.Racing(mode)


def test_a_shared_folder_is_read_first_and_not_written_to(stubbed, card, monkeypatch, tmp_path):
    ran = stubbed()
    LSTM(INPUT)
    GRU(INPUT)
    assert ran.count("race") == 2, "one cell says nothing of another"
    cache.write(cache.CHECKS, {}, "right")
    card.parent.rename(tmp_path / "shared")
    monkeypatch.setenv(cache.SHARED, str(tmp_path / "shared"))
    as_another_process()
    LSTM(INPUT)
    GRU(INPUT)
    assert ran.count("race") == 2
    gpu_lstm.LSTM(4, 9)(INPUT)
    assert [len(list(path.iterdir())) for path in (tmp_path / "shared" / cache.RACES, card)] == [2, 1]
    cache.write(cache.CHECKS, {}, "another verdict")
    assert cache.read(cache.CHECKS, {}) == "right"
    assert (cache.remove(cache.RACES), len(list(cache.entries(cache.RACES)))) == (1, 2)


def test_nothing_is_raced_where_it_was_chosen_or_would_be_traced_transformed_or_counted(stubbed):
    ran = stubbed(triton=2e-3, torch=1e-3)
    for name in ("triton", "torch", "reference"):
        assert _backend_of(gpu_lstm.LSTM(4, 5, backend=name)) == name
    with gpu_lstm.backend("torch"):
        assert _backend_of() == "torch"
    torch.compile(LSTM, backend="eager")(INPUT)
    torch.func.grad(lambda x: LSTM(x)[0].sum())(INPUT)
    with FlopCounterMode(display=False):
        LSTM(INPUT)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        LSTM(mode.from_tensor(INPUT))
    assert ran == []
    LSTM(INPUT)
    assert ran.count("race") == 1


RESETS = dict(resets=True)


def layers_of(monkeypatch, plan):
    """Give each layer the plan that plan(problem) returns. Return a list of the problems."""
    asked = []
    monkeypatch.setattr(verify, "verified_layer", lambda backend, problem, device: (
        asked.append(problem) or SimpleNamespace(chosen=lambda pass_: Chosen(plan(problem), False))
    ))  # fmt: skip
    return asked


@pytest.mark.parametrize(("family", "tiles_per_program", "options", "winner"), [
    ("resident", 1, {}, "triton"), ("cooperative", 1, {}, "triton"), ("cooperative", 2, {}, "torch"),
    ("step", 1, {}, "torch"), ("step held", 1, {}, "triton"), ("step held", 2, {}, "torch"),
    ("pointwise", 1, {}, "torch"), ("step", 1, dict(lengths=torch.int64), "triton"), ("step", 1, RESETS, "triton"),
    ("step", 1, dict(projected=3), "triton"), ("step", 1, dict(torch_lacks="zoneout"), "triton"),
    ("", 1, {}, "torch"), ("", 1, RESETS, "cupy"),
])  # fmt: skip
def test_the_expected_winner(monkeypatch, family, tiles_per_program, options, winner):
    """Without a family the kernels are CuPy's. Two directions have the same kernels, so one of them is asked about."""
    families = {"resident": Resident(2), "cooperative": Cooperative(3), "step held": Held(64), "step": Step(64)}
    plan = Plan(families.get(family, Pointwise()), 8, 8, 1, 1, 4, 0, "", tiles_per_program=tiles_per_program)
    asked = layers_of(monkeypatch, lambda problem: plan)
    kind = kind_of(_call(gpu_lstm.LSTM(4, 5, bidirectional=True)))
    changes = {**options}
    lacks = changes.pop("torch_lacks", None)
    kind = kind._replace(torch_lacks=lacks, problems=tuple(p._replace(**changes) for p in kind.problems))
    able = Backend.TRITON if family else Backend.CUPY
    assert race.expected_winner(kind, able, INPUT.device).backend.value == winner
    assert [(problem.hidden, problem.side_by_side) for problem in asked] in ([(5, 2)], [])


@pytest.mark.parametrize(("kind", "options", "winner"), [
    ("LSTM", dict(lengths=torch.tensor([3, 1, 2])), "auto triton"), ("GRU", {}, "torch"),
])  # fmt: skip
def test_a_graph_for_all_sizes_runs_the_expected_winner(stubbed, monkeypatch, kind, options, winner):
    """The card does not hold the larger W_hh on chip. Kernels are not run."""
    ran = stubbed(triton=2e-3, torch=1e-3)
    asked = layers_of(monkeypatch, lambda problem: choose.plans(problem._replace(precision="tf32"), H100, False)[0])
    program = torch.export.export(getattr(gpu_lstm, kind)(4, 2048), (INPUT,), options, strict=True)
    (layer,) = (node for node in program.graph.nodes if node.target is torch.ops.gpu_lstm.layer.default)
    assert winner in layer.args
    assert {problem.cell for problem in asked} == (set() if options else {kind.lower()})
    assert ran == []


DECISION = {"backend": "torch", "why": "won", "seconds": {"triton": 0.2, "torch": 0.1}}
LIES = [
    None, [], "torch", {"surprise": 1}, {"backend": "torch"},
    *(DECISION | {"backend": backend} for backend in ("auto", "odd", ["torch"])), DECISION | {"why": 7},
    DECISION | {"surprise": 1}, *(DECISION | {"seconds": seconds} for seconds in (
        7, [1.0], {"torch": 0}, {"torch": "1"}, {"torch": True}, {"torch": float("nan")}, {"torch": -1.0})),
]  # fmt: skip


def test_a_cached_race_that_lies_is_ignored_with_one_line():
    """test_plan_cache.py tests files that are broken in other ways."""
    kind = kind_of(_call())
    key = race._key(kind, Backend.TRITON, INPUT.device)
    for value in (*LIES, DECISION | {"backend": "cupy"}):  # the last value may be right for another call
        cache.write(cache.RACES, key, value)
        cache.warn_once.cache_clear()
        with pytest.warns(UserWarning, match="is ignored") as warned:
            assert race._cached(kind, Backend.TRITON, INPUT.device, choices.Racing.ON) is None
        assert len(warned) == 1
    cache.write(cache.RACES, key, DECISION)
    assert race._cached(kind, Backend.TRITON, INPUT.device, choices.Racing.ON).backend is Backend.TORCH


@pytest.mark.parametrize("on_card", [False, True])
def test_more_steps_than_cudnn_runs_are_not_given_to_it(stubbed, monkeypatch, on_card):
    """A race is of fewer steps, and torch would win it. torch runs 65,535 steps, which have a route of their own. Both
    65,535 and 65,536 steps are rounded up to 65,536, and the key of a route does that in its own way. On a CPU torch
    runs any number of steps."""
    if on_card:
        monkeypatch.setattr(torch_rnn, "too_long", lambda x, steps: steps > torch_rnn.MOST_STEPS)
    monkeypatch.setattr(race, "LONGEST", 3)  # the interpreter is slow
    stubbed(triton=2e-3, torch=1e-3)
    calls = [_call(x=torch.zeros(steps, 1, 4)) for steps in (65_535, 65_536, 65_535, 70_000)]
    others = "triton" if on_card else "torch"
    assert [route.route_of(call).backend.value for call in calls] == ["torch", others, "torch", others]


def test_a_part_of_a_card_is_another_card(monkeypatch):
    """Other parts are a MIG instance with the same name, a context with a share of the card, and the multiprocessors
    that are left to other kernels."""
    kind, keys, whole = kind_of(_call()), [], (H100, 132, "")
    mig = dataclasses.replace(H100, multiprocessors=60)
    another = dataclasses.replace(H100, name="another")
    monkeypatch.setattr(choose, "_context", lambda: 1)
    for card, of_context, spare in (whole, whole, (another, 132, ""), (mig, 60, ""), (H100, 66, ""), (H100, 132, "2")):
        torch_finds(monkeypatch, card)
        monkeypatch.setattr(cache, "machine", lambda device, card=card: {"card": card.name})
        monkeypatch.setattr(choose, "_multiprocessors", {(CUDA, 1): of_context})
        monkeypatch.setenv(timeouts.SPARE, spare)
        keys.append(str(race._key(kind, Backend.TRITON, CUDA)))
    assert (keys[0] == keys[1], len(set(keys))) == (True, 5)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("rival", ["triton", "torch"])
def test_a_rival_that_fails_during_a_race_has_lost(stubbed, monkeypatch, rival, at):
    """Launches are asynchronous. The run after a timeout raises, not the run that timed out."""
    calls, execute = itertools.count(), race.execute

    def one_fails(route, call):
        if route.backend.value == rival and next(calls) > at:  # the first call is before the race
            raise RuntimeError("step_forward_kernel timed out at step 3")
        return execute(route, call)

    monkeypatch.setattr(race, "execute", one_fails)
    monkeypatch.setattr(race, "times_of", lambda rivals, now: REAL_TIMES_OF(rivals, itertools.count().__next__))
    other = "torch" if rival == "triton" else "triton"
    said = pytest.warns(UserWarning, match="timed out at step 3") if rival == "triton" else contextlib.nullcontext()
    with said:
        assert _backend_of() == other


def test_a_timeout_of_the_last_call_of_a_race_is_the_kernels(stubbed, monkeypatch):
    """No later call of the kernels reports it, since none follows, and the user's call does not report it either."""

    def race_with_a_late_timeout(rivals, now):
        timeouts.error_word(INPUT.device, "step_forward_kernel")[0] = 4
        return {name: [1e-3 if name == "triton" else 2e-3] * 9 for name in rivals}

    monkeypatch.setattr(race, "times_of", race_with_a_late_timeout)
    with pytest.warns(UserWarning, match="step_forward_kernel timed out at step 3"):
        assert _backend_of() == "torch"
    gpu_lstm.check()
