"""`auto` races the kernels against torch's own LSTM: the CPU counts as a card, with a stubbed clock."""

import contextlib
import itertools
import json
import logging
import warnings
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm
from gpu_lstm.backends import kernels, torch_lstm
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.call.options import Size
from gpu_lstm.call.prepare import prepare
from gpu_lstm.dispatch import available, race, run
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.route import Decision
from gpu_lstm.kernels import cache, timeouts
from gpu_lstm.kernels.layer import Chosen
from gpu_lstm.kernels.triton_lstm import choose, launch
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Cooperative, Held, Plan, Pointwise, Resident, Step

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU stands for a card, by the interpreter")

EXPECTED = Decision(Backend.TORCH, "expected")
REAL_RACE = race.race
X, LSTM = torch.zeros(3, 3, 4), gpu_lstm.LSTM(4, 5)


@pytest.fixture(autouse=True)
def card(monkeypatch, nothing_cached):
    """The CPU as a card that nothing is known of, for inference; the folder of its races."""
    monkeypatch.setattr(available, "KERNEL_DEVICES", ("cpu",))
    with torch.no_grad():
        yield nothing_cached / race.KIND


@pytest.fixture
def stubbed(monkeypatch):
    """stubbed(triton=..., torch=...): seconds a call of each rival, by default 1 and 2 ms. Lists races and what ran."""

    def costs(triton=1e-3, torch=2e-3):
        ran, time, seconds = [], [0.0], dict(triton=triton, torch=torch)

        def advance(each):
            time[0] += each if isinstance(each, float) else next(each)

        def race_by_the_clock(rivals, now):
            for call in rivals.values():
                call()
            ran.extend(("race", *rivals))
            return REAL_RACE({name: partial(advance, seconds[name]) for name in rivals}, lambda: time[0])

        monkeypatch.setattr(race, "race", race_by_the_clock)
        return ran

    return costs


def _call(lstm=LSTM, x=X):
    return prepare(lstm._options(), lstm._weights(), x)


def _backend_of(lstm=LSTM, x=X):
    """The backend that runs a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_by", Mock(side_effect=run.run_by))
        lstm(x)
        return run.run_by.call_args.args[0].backend.value


def _forget_all_but_files():
    """As another process would begin."""
    run.forget()
    cache._read.cache_clear()


@pytest.mark.parametrize("winner", ["triton", "torch"])
@pytest.mark.parametrize("training", [False, True])
def test_the_faster_one_runs_and_is_cached(stubbed, card, caplog, winner, training):
    """And a log line says who won."""
    seconds = {"triton": 2e-3, "torch": 2e-3} | {winner: 1e-3}
    ran = stubbed(**seconds)
    with torch.set_grad_enabled(training), caplog.at_level(logging.INFO, "gpu_lstm"):
        assert (_backend_of(), _backend_of(), ran) == (winner, winner, ["race", "triton", "torch"])
        assert caplog.text.count("LSTM 4 -> 5, T <= 4, B <= 4, float32") == 1
        times = "triton 1 ms, torch 2 ms" if winner == "triton" else "triton 2 ms, torch 1 ms"
        assert f"{winner}: won a race, 2.00 times as fast ({times})" in caplog.text
        _forget_all_but_files()
        assert (_backend_of(), ran.count("race")) == (winner, 1), "not again, in another process either"
    entry = json.loads(next(card.glob("*.json")).read_text())
    assert (entry["key"]["training"], entry["value"]["seconds"]) == (training, pytest.approx(seconds))


@pytest.mark.parametrize(("training", "of_input"), [(True, True), (True, False), (False, True)])
def test_a_race_runs_what_the_call_will_and_touches_nothing(stubbed, monkeypatch, training, of_input):
    """Weights and input want gradients where the call's do: else time goes into products that nobody will ask for."""
    asked, run_by = set(), race.run_by

    def record(route, call):
        asked.add((torch.is_grad_enabled(), call.x.requires_grad, call.weights[0][0].weight_hh.requires_grad))
        return run_by(route, call)

    monkeypatch.setattr(race, "run_by", record)
    stubbed()
    lstm, x = gpu_lstm.LSTM(4, 5, 2, dropout=0.5), torch.zeros(1, 1, 4, requires_grad=of_input)
    before = [p.clone() for p in lstm.parameters()]
    with torch.set_grad_enabled(training):
        call, random = _call(lstm, x), torch.get_rng_state()
        race.decide(call, kind_of(call), Backend.TRITON)
    assert torch.equal(torch.get_rng_state(), random)
    assert asked == {(training, training and of_input, training)}
    assert [t.grad for t in (x, *lstm.parameters()) if t.grad is not None] == []
    assert all(map(torch.equal, lstm.parameters(), before))


def test_the_race_of_a_long_call_is_about_its_first_steps(stubbed, monkeypatch):
    """With its lengths and resets up to there: with longer ones the kernels would fail, and lose."""
    samples, run_by = [], race.run_by
    monkeypatch.setattr(race, "LONGEST", 2)
    monkeypatch.setattr(race, "run_by", lambda route, call: samples.append(call) or run_by(route, call))
    ran, resets = stubbed(), torch.rand(3, 3) < 0.5
    LSTM(X, lengths=torch.tensor([3, 0, 1]), resets=resets)
    assert ran == ["race", "triton", "torch"]
    for sample in samples:
        assert (sample.steps, sample.x.shape) == (2, (2, 3, 4))
        assert sample.traversal.lengths.tolist() == [2, 0, 1]
        assert torch.equal(sample.traversal.resets, resets[:2])


def test_each_kind_has_a_race_of_its_own_and_sizes_count_by_classes(stubbed):
    ran, others = stubbed(), (gpu_lstm.LSTM(4, 6), gpu_lstm.LSTM(4, 5, 2), gpu_lstm.StackedLSTM(4, [5, 6]))
    calls = [
        *(partial(lstm, X) for lstm in (LSTM, *others)), partial(LSTM, torch.zeros(5, 4, 4)),
        partial(LSTM, torch.zeros(3, 5, 4)),
        partial(LSTM, X, lengths=torch.tensor([3, 2, 1])), partial(LSTM, X, resets=torch.zeros(3, 3).bool()),
        partial(gpu_lstm.LSTMCell(4, 5), X[0]),
        partial(gpu_lstm.functional.lstm_layer, X, gpu_lstm.LSTM(4, 7)._weights()[0][0], reverse=True),
    ]  # fmt: skip
    for number, call in enumerate(calls, start=1):
        call()
        assert ran.count("race") == number
    LSTM(torch.zeros(4, 4, 4))  # T and B up to 4, as those of X
    assert ran.count("race") == len(calls)


@pytest.mark.parametrize(("ours", "theirs", "winner", "why", "trusted"), [
    ([1.0] * 9, [2.0] * 9, "triton", "won a race, 2.00 times as fast", True),
    ([2.0] * 9, [1.0] * 9, "torch", "won a race", True),
    ([1.0, 1.1, 0.9] * 3, [1.05, 1.0, 1.1] * 3, "torch", "a tie; expected", True),
    ([1.0, 9.0, 5.0] * 3, [20.0] * 9, "torch", "too noisy; expected", False),
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
    """In turn; as many calls as are needed to see a difference; within the budget, but with three turns at least."""
    time, order = [0.0], []

    def run(name, seconds):
        order.append(name)
        time[0] += seconds

    times = race.race({"a": lambda: run("a", 1e-4), "b": lambda: run("b", 1e-2)}, lambda: time[0])
    assert {name: {round(s, 9) for s in found} for name, found in times.items()} == {"a": {1e-4}, "b": {1e-2}}
    assert len(times["a"]) == len(times["b"]) >= 3
    assert time[0] < race.BUDGET + 0.1
    assert order.count("a") > 15 * order.count("b"), "2 ms of calls between looks at the clock"
    slow = race.race({"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)}, lambda: time[0])
    assert {name: len(found) for name, found in slow.items()} == {"a": 3, "b": 3}


def test_on_the_cpu_torch_and_the_reference_race_for_real():
    call = _call(gpu_lstm.LSTM(8, 16, 2), torch.zeros(60, 4, 8))
    rivals = {b.value: race._sample(call, kind_of(call), b) for b in (Backend.REFERENCE, Backend.TORCH)}
    decision, _ = race.judge(REAL_RACE(rivals, partial(race.clock, X.device)), EXPECTED)
    assert decision.seconds["reference"] > 2 * decision.seconds["torch"]


@pytest.mark.parametrize(("mode", "raced", "winner"), [("on", 1, "triton"), ("read", 0, "torch"), ("off", 0, "torch")])
def test_modes(stubbed, monkeypatch, mode, raced, winner):
    ran = stubbed()
    monkeypatch.setenv(choices.RACE_VARIABLE, mode)
    assert (_backend_of(), ran.count("race")) == (winner, raced)
    with gpu_lstm.racing("on"):
        assert _backend_of() == "triton", "a block counts before the environment"
    _forget_all_but_files()
    assert _backend_of() == ("torch" if mode == "off" else "triton"), "what is cached is read"
    with pytest.raises(ValueError, match="unknown mode of racing 'fast'; expected one of 'on', 'read', 'off'"):
        gpu_lstm.racing("fast").__enter__()
    assert choices.requested_racing() is choices.Racing(mode)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_kernels_that_fail_leave_the_user_with_torchs_numbers(stubbed, monkeypatch, mode):
    """Or, where torch's LSTM cannot run the call, with the reference's."""

    fails = Mock(side_effect=RuntimeError("no Triton kernel can run this layer on this card: planted"))
    monkeypatch.setattr(launch, "choose_plan", fails)
    ran, x = stubbed(), torch.randn(5, 3, 4)
    with gpu_lstm.racing(mode), pytest.warns(UserWarning, match="auto' uses 'torch' for LSTM 4 -> 5.*planted"):
        y, _ = LSTM(x)
    with gpu_lstm.backend("torch"):
        assert torch.equal(y, LSTM(x)[0])
    assert ran == []
    with warnings.catch_warnings(), gpu_lstm.racing(mode):
        warnings.simplefilter("error")
        LSTM(x)  # said once
        call = _call(LSTM, x)
        capturing = call._replace(modes=call.modes._replace(capturing=True))
        assert race.decide(capturing, kind_of(call), Backend.TRITON).backend is Backend.TORCH, "in a capture, too"
    with pytest.raises(RuntimeError, match="planted"):
        gpu_lstm.LSTM(4, 5, backend="triton")(x)
    with pytest.warns(UserWarning, match="auto' uses 'reference'"):
        assert _backend_of(gpu_lstm.LSTM(4, 5, zoneout=0.3)) == "reference"


def test_the_result_of_another_card_or_version_does_not_count(stubbed, monkeypatch):
    stubbed()
    machine = cache.machine(X.device)
    LSTM(X)
    for other, winner in ({}, "triton"), ({"driver": "another"}, "torch"):  # what else there is: test_plan_cache.py
        _forget_all_but_files()
        monkeypatch.setattr(cache, "machine", lambda device, other=other: machine | other)
        with gpu_lstm.racing("read"):
            assert _backend_of() == winner, other


def test_a_shared_folder_is_read_first_and_not_written_to(stubbed, card, monkeypatch, tmp_path):
    ran = stubbed()
    LSTM(X)
    card.parent.rename(tmp_path / "shared")
    monkeypatch.setenv(cache.SHARED, str(tmp_path / "shared"))
    _forget_all_but_files()
    LSTM(X)
    assert ran.count("race") == 1
    gpu_lstm.LSTM(4, 9)(X)
    assert len(list((tmp_path / "shared" / race.KIND).iterdir())) == len(list(card.iterdir())) == 1


def test_ranks_follow_the_one_that_decided_first_and_none_waits(stubbed, monkeypatch, tmp_path, request):
    """The second rank calls other things first, and one whose kernels fail keeps torch's."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    small, large = gpu_lstm.LSTM(4, 5), gpu_lstm.LSTM(4, 9)
    with torch.no_grad():
        stubbed(triton=1e-3)
        assert _backend_of(small) == "triton"
        _as_another_rank(monkeypatch, tmp_path / "1")
        stubbed(triton=3e-3)
        assert [_backend_of(lstm) for lstm in (large, small)] == ["torch", "triton"]
        _as_another_rank(monkeypatch, tmp_path / "2")
        ran = stubbed(triton=1e-3)
        assert [_backend_of(lstm) for lstm in (small, large)] == ["triton", "torch"]
        assert ran.count("race") == 2
        _as_another_rank(monkeypatch, tmp_path / "3")
        monkeypatch.setattr(kernels.autograd, "layer", lambda *_: exec('raise RuntimeError("no")'))
        with pytest.warns(UserWarning, match="uses 'torch' for LSTM 4 -> 5"):
            assert _backend_of(small) == "torch"


def _as_another_rank(monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    _forget_all_but_files()


def test_nothing_is_raced_where_it_was_chosen_or_would_be_traced_transformed_or_counted(stubbed):
    ran = stubbed(triton=2e-3, torch=1e-3)
    for name in ("triton", "torch", "reference"):
        assert _backend_of(gpu_lstm.LSTM(4, 5, backend=name)) == name
    with gpu_lstm.backend("torch"):
        assert _backend_of() == "torch"
    torch.compile(LSTM, backend="eager")(X)
    torch.func.grad(lambda x: LSTM(x)[0].sum())(X)
    with FlopCounterMode(display=False):
        LSTM(X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        LSTM(mode.from_tensor(X))
    assert ran == []
    LSTM(X)
    assert ran.count("race") == 1


NOISE, RESETS = dict(dropout_h=True), dict(resets=True)


@pytest.mark.parametrize(("family", "tiles_per_program", "options", "winner"), [
    ("resident", 1, {}, "triton"), ("cooperative", 1, {}, "triton"), ("cooperative", 2, {}, "torch"),
    ("step", 1, {}, "torch"), ("step held", 1, {}, "triton"), ("step held", 2, {}, "torch"),
    ("pointwise", 1, {}, "torch"), ("step", 1, dict(lengths=torch.int64), "triton"), ("step", 1, RESETS, "triton"),
    ("step", 1, dict(layers=(Size(4, 5, 3),)), "triton"), ("step", 1, NOISE, "triton"),
    ("step", 1, dict(peepholes=True), "triton"), ("step", 1, dict(reset_c=True), "triton"),
    ("", 1, {}, "torch"), ("", 1, RESETS, "cupy"),
])  # fmt: skip
def test_the_expected_winner(monkeypatch, family, tiles_per_program, options, winner):
    """Kernels of no family of Triton's are CuPy's."""
    families = {"resident": Resident(2), "cooperative": Cooperative(3), "step held": Held(64), "step": Step(64)}
    plan = Plan(families.get(family, Pointwise()), 8, 8, 1, 1, 4, 0, "", tiles_per_program=tiles_per_program)
    layer = SimpleNamespace(chosen=lambda which: Chosen(plan, False))
    monkeypatch.setattr(kernels, "layer_of", lambda backend, problem, device: layer)
    kind, like = kind_of(_call()), dict(options)
    layers = like.pop("layers", kind.layers)
    kind = kind._replace(layers=layers, like=kind.like._replace(**like))
    able = Backend.TRITON if family else Backend.CUPY
    assert race.expected_winner(kind, able, X.device).backend.value == winner


def test_the_expected_winner_depends_on_every_layer_as_it_shares_the_card(monkeypatch):
    """Once for both of its directions, whose kernels are alike."""
    asked, plan = [], Plan(Resident(2), 8, 8, 1, 1, 4, 0, "")
    layer = SimpleNamespace(chosen=lambda which: Chosen(plan, False))
    monkeypatch.setattr(kernels, "layer_of", lambda backend, problem, device: asked.append(problem) or layer)
    kind = kind_of(_call(gpu_lstm.StackedLSTM(4, [5, 6], bidirectional=True)))
    race.expected_winner(kind, Backend.TRITON, X.device)
    assert [(problem.hidden, problem.side_by_side) for problem in asked] == [(5, 2), (6, 2)]


@pytest.mark.parametrize(("hidden", "options", "winner"), [
    (5, {}, "triton"), (2048, {}, "torch"), (2048, dict(lengths=torch.tensor([3, 1, 2])), "triton"),
])  # fmt: skip
def test_a_graph_for_all_sizes_runs_the_expected_winner(stubbed, monkeypatch, hidden, options, winner):
    """On a card where the larger one does not stay on chip; its kernels are not run."""
    ran = stubbed(triton=2e-3, torch=1e-3)

    def of_an_h100(backend, problem, device):
        found = choose.plans(problem._replace(precision="tf32"), DEVICES["h100"], False)
        return SimpleNamespace(chosen=lambda which: Chosen(found[0], False))

    monkeypatch.setattr(kernels, "layer_of", of_an_h100)
    program = torch.export.export(gpu_lstm.LSTM(4, hidden), (X,), options, strict=True)
    (layer,) = (node for node in program.graph.nodes if node.target is torch.ops.gpu_lstm.layer.default)
    assert winner in layer.args
    assert ran == []


def test_torch_gets_a_packed_sequence_as_it_is(stubbed, monkeypatch):
    stubbed(triton=2e-3, torch=1e-3)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), [5, 3, 2])
    expected, _ = LSTM(packed)
    stack = Mock(side_effect=torch_lstm.stack)
    monkeypatch.setattr(torch_lstm, "stack", stack)
    y, _ = LSTM(packed)
    ((x, *_, batch_sizes),) = (each.args for each in stack.call_args_list)
    assert (x is packed.data, batch_sizes is packed.batch_sizes) == (True, True)
    assert torch.equal(y.data, expected.data)


def test_a_rival_that_fails_has_lost(stubbed, monkeypatch):
    fails = Mock(side_effect=RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"))
    monkeypatch.setattr(torch_lstm, "run", fails)
    ran = stubbed()
    LSTM(X)
    (decision,) = race._decided.values()
    assert (ran, decision.backend, decision.why[:19]) == ([], Backend.TRITON, "torch's LSTM fails:")


@pytest.mark.parametrize("clock", [itertools.repeat(0.0), itertools.count(1e9, -1e6), itertools.count(0, 1e9)])
def test_a_race_ends_whatever_the_clock_says(clock):
    calls = []
    times = REAL_RACE({"triton": lambda: calls.append(1), "torch": lambda: None}, lambda: next(clock))
    assert len(calls) <= 2 + race.MOST_CALLS * race.MOST_TURNS
    decision, is_certain = race.judge(times, EXPECTED)
    assert (decision.backend, is_certain) == (Backend.TORCH, next(clock) > 1e9 and decision.why.startswith("a tie"))


DECISION = {"backend": "torch", "why": "won", "seconds": {"triton": 0.2, "torch": 0.1}}
LIES = [
    None, [], 1, "torch", {"surprise": 1}, {"backend": "torch"},
    *(DECISION | {"backend": backend} for backend in ("auto", "odd", None, ["torch"])),
    *(DECISION | change for change in ({"why": 7}, {"surprise": 1})),
    *(DECISION | {"seconds": seconds} for seconds in (7, "fast", [1.0], {"torch": 0}, {"torch": "1"}, {"torch": True},
                                                     {"torch": float("nan")}, {"torch": -1.0})),
]  # fmt: skip
OF_OTHERS = [DECISION | {"backend": backend} for backend in ("cupy", "reference")]  # another kind of call, or machine
NESTED = "[" * 100_000


@pytest.mark.parametrize("value", [*LIES, *OF_OTHERS, pytest.param(NESTED, id="nested without end")])
def test_a_cached_race_that_lies_is_ignored_with_one_line_and_written_again(card, stubbed, tmp_path, value):
    """And never merged; but for what another kind of call, or another machine, may have decided for.

    Files that are broken in other ways: test_plan_cache.py.
    """
    ran, x = stubbed(), X[:1]  # the interpreter is slow
    LSTM(x)
    (file,) = card.glob("*.json")
    entry = json.loads(file.read_text())
    file.write_text(value if value is NESTED else json.dumps(entry | {"value": value}))
    _forget_all_but_files()
    with pytest.warns(UserWarning, match="is ignored") as warned:
        y, _ = LSTM(x)
    assert (len(warned), ran.count("race")) == (1, 2)
    _forget_all_but_files()
    LSTM(x)
    assert ran.count("race") == 2, "the result of the second is in the file"
    with gpu_lstm.backend("reference"):
        torch.testing.assert_close(y, LSTM(x)[0])
    if value in LIES:
        exported = tmp_path / "exported.json"
        exported.write_text(json.dumps([entry | {"kind": race.KIND, "key": {"another": "key"}, "value": value}]))
        with pytest.warns(UserWarning, match="is not merged"):
            assert cache.merge([exported]) == 0


@pytest.mark.parametrize(("steps", "winner"), [(65_535, "torch"), (65_536, "triton"), (70_000, "triton")])
def test_more_steps_than_cudnn_runs_are_not_given_to_it(stubbed, monkeypatch, steps, winner):
    """Though a race is of fewer steps, which torch would win."""
    monkeypatch.setattr(race, "LONGEST", 3)  # the interpreter is slow
    stubbed(triton=2e-3, torch=1e-3)
    call = _call(x=torch.zeros(steps, 1, 4))
    assert race.decide(call, kind_of(call), Backend.TRITON).backend.value == winner


def test_a_part_of_a_card_is_another_card(monkeypatch):
    """As MIG makes it, by the same name."""
    monkeypatch.setattr(cache, "machine", lambda device: {"card": "a card"})
    kind, cuda = kind_of(_call()), torch.device("cuda", 0)

    def key(count):
        properties = SimpleNamespace(multi_processor_count=count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return race._key(kind, Backend.TRITON, cuda)

    assert key(132) == key(132) != key(60)


def test_another_number_of_multiprocessors_left_free_is_another_race(stubbed, monkeypatch):
    """Plans have another part of the card then."""
    ran = stubbed()
    for spare in ("", "1", "1", "2"):
        monkeypatch.setattr(race, "spare_multiprocessors", lambda count, spare=spare: int(spare or 0))
        _forget_all_but_files()
        _backend_of()
    assert ran.count("race") == 3


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("rival", ["triton", "torch"])
def test_a_rival_that_fails_during_a_race_has_lost(stubbed, monkeypatch, rival, at):
    """Launches are asynchronous: the run after a timeout raises, not the one that timed out."""
    calls = itertools.count()

    def race_in_which_one_fails(rivals, now):
        def run(name):
            if name == rival and next(calls) >= at:
                raise RuntimeError("lstm_step_forward_kernel timed out at step 3")

        return REAL_RACE({name: partial(run, name) for name in rivals}, itertools.count().__next__)

    monkeypatch.setattr(race, "race", race_in_which_one_fails)
    other = "torch" if rival == "triton" else "triton"
    said = pytest.warns(UserWarning, match="timed out at step 3") if rival == "triton" else contextlib.nullcontext()
    with said:
        assert _backend_of() == other


def test_a_timeout_of_the_last_call_of_a_race_is_the_kernels(stubbed, monkeypatch):
    """Which no later call of theirs reports, as none follows: nor does the user's."""

    def race_with_a_late_timeout(rivals, now):
        timeouts.error_word(X.device, "lstm_step_forward_kernel")[0] = 4
        return {name: [1e-3 if name == "triton" else 2e-3] * 9 for name in rivals}

    monkeypatch.setattr(race, "race", race_with_a_late_timeout)
    with pytest.warns(UserWarning, match="lstm_step_forward_kernel timed out at step 3"):
        assert _backend_of() == "torch"
    gpu_lstm.check()
