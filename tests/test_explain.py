"""gpu_lstm.explain says what the call then takes, why, and what else was possible; and runs nothing."""

import dataclasses
import importlib
import json
import re

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_lstm
from gpu_lstm import backends, layers, native, races, trust
from gpu_lstm.kernels import cache as remembered
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_lstm import launch
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, INTERPRETER

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU stands for a card, by the interpreter")

explain = importlib.import_module("gpu_lstm.explain")  # gpu_lstm.explain is the function

X = torch.zeros(5, 3, 4)
H100 = DEVICES["h100"]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (races.ENVIRONMENT_VARIABLE, backends.ENVIRONMENT_VARIABLE, remembered.SHARED):
        monkeypatch.delenv(name, raising=False)
    races._decided.clear()
    remembered._read.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """The CPU as a card, on which nothing is run."""

    def runs(*_, **__):
        raise AssertionError("something was run")

    monkeypatch.setattr(backends, "KERNEL_DEVICES", ("cpu",))
    for module, name in ((layers, "stack"), (native, "stack"), (races, "race"), (races, "decide")):
        monkeypatch.setattr(module, name, runs)
    for name in ("layer_forward", "layer_backward", "choose_plan"):
        monkeypatch.setattr(launch, name, runs)


@pytest.fixture
def an_h100(card, monkeypatch):
    """Its plans, and its expected times."""
    monkeypatch.setattr(explain, "card_of", lambda device: H100)
    monkeypatch.setattr(launch, "expected_plan", lambda problem, device, backward: plans(problem, H100, backward)[0])


def _kind(lstm):
    traversal, settings = gpu_lstm.sequences.Traversal(), gpu_lstm.settings.Settings.of(lstm)
    return races.kind_of(backends.Backend.TRITON, X, lstm._weights(), traversal, settings)


def _won(lstm):
    """As if kernels had won a race against torch."""
    value = dict(backend="triton", why="won a race, 1.80 times as fast", seconds={"triton": 1e-3, "torch": 1.8e-3})
    remembered.write(races.KIND, races._key(_kind(lstm), X.device), value)


def test_a_race_that_was_won_is_told_with_both_times(card):
    lstm = gpu_lstm.LSTM(4, 5, 2, bidirectional=True)
    _won(lstm)
    found = gpu_lstm.explain(lstm, X)
    assert (found.backend, found.seconds) == ("triton", {"triton": 1e-3, "torch": 1.8e-3})
    assert found.others["torch"] == "1.80 times the time in the race"
    assert "CuPy" in found.others["cupy"]
    assert "plain loop" in found.others["reference"]
    assert [(d.layer, d.name, d.input_size) for d in found.layers] == [
        (0, "forward", 4), (0, "reverse", 4), (1, "forward", 10), (1, "reverse", 10),
    ]  # fmt: skip
    assert [each.name for d in found.layers for each in d.passes] == ["forward", "backward"] * 4
    text = str(found)
    assert "backend    triton: won a race, 1.80 times as fast (triton 1 ms, torch 1.8 ms)" in text
    assert "LSTM 4 -> 5 -> 5, T = 5, B = 3, float32" in text
    with torch.no_grad():
        assert gpu_lstm.explain(lstm, X).seconds is None, "inference is another kind, and was not raced"


def test_without_a_race_it_tells_who_is_expected_to_win_and_that_there_will_be_one(card):
    lstm = gpu_lstm.LSTM(4, 5)
    found = gpu_lstm.explain(lstm, X)
    assert (found.backend, found.seconds) == ("torch", None)
    assert found.why == "expected: a kernel of the step family is slower; the first call races it"
    assert found.others["triton"] == found.why
    with gpu_lstm.racing("read"):
        assert gpu_lstm.explain(lstm, X).why == "expected: a kernel of the step family is slower"
    _won(lstm)
    with gpu_lstm.racing("off"):
        assert gpu_lstm.explain(lstm, X).backend == "torch"
    found = gpu_lstm.explain(lstm, X, resets=torch.zeros(5, 3, dtype=torch.bool))
    assert (found.backend, found.others["torch"]) == ("triton", found.why)
    assert "torch's LSTM is slow with resets" in found.why


def test_a_decision_of_this_process_counts(card):
    lstm = gpu_lstm.LSTM(4, 5)
    races._decided[_kind(lstm), X.device, races.mode()] = races.Decision("torch", "the kernels fail: planted")
    found = gpu_lstm.explain(lstm, X)
    assert (found.backend, found.others["triton"]) == ("torch", "the kernels fail: planted")
    races._decided.clear()


def test_plans_and_what_bounds_a_step(an_h100, monkeypatch):
    lstm = gpu_lstm.LSTM(4, 768, dtype=torch.bfloat16, backend="triton")
    x = torch.zeros(5, 16, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(backends, "obstacle", lambda *_: None)  # bfloat16, which the interpreter does not take
    found = gpu_lstm.explain(lstm, x)
    (direction,) = found.layers
    for each, backward in zip(direction.passes, (False, True)):
        plan = plans(Problem(5, 16, 768, torch.bfloat16), H100, backward)[0]
        assert each.family == plan.family.value == "cooperative"
        assert each.tiles.startswith(f"{plan.rows} sequences x {plan.columns} units, {plan.programs} programs")
        assert "exchange, beyond other batch tiles" in each.bounds
    for line, each in zip(re.findall("(?<=most of it: ).*", str(found)), direction.passes, strict=True):
        most = sorted(each.bounds, key=each.bounds.get, reverse=True)[:3]
        assert line == ", ".join(f"{name} {each.bounds[name] * 1e6:.2f} us" for name in most)
    assert found.precision == "of bfloat16 numbers, summed in float32"


@pytest.mark.parametrize(
    "change",
    [dict(hidden=33), dict(projected=True), dict(dtype="torch.float32"), dict(precision="tf32"), dict(rows=32),
     dict(columns=8), dict(k=1), dict(num_warps=2), dict(num_stages=9), dict(family="resident"), dict(format=0),
     dict(card="another"), dict(there=["lengths"])],
    ids=str,
)  # fmt: skip
def test_what_the_check_of_another_kernel_came_to_is_not_said_of_this_one(card, change):
    lstm, x = gpu_lstm.LSTM(4, 32, dtype=torch.float16, backend="triton"), torch.zeros(5, 16, 4, dtype=torch.float16)
    r = gpu_lstm.kernels.problem.Recurrence(
        weight_hh=torch.zeros(128, 32, dtype=torch.float16), c0=torch.zeros(16, 32), h0=torch.zeros(16, 32).half()
    )
    plan = plans(Problem(5, 16, 32, torch.float16), INTERPRETER, False)[-1]
    key = trust._key(plan, r, True, None)
    assert key != key | change
    remembered.write(trust.KIND, key | change, "right")
    assert gpu_lstm.explain(lstm, x).layers[0].passes[0].checked == "not checked yet"


@pytest.mark.parametrize("wrong", [False, True])
def test_what_the_check_of_a_kernel_came_to(card, wrong):
    lstm = gpu_lstm.LSTM(4, 32, dtype=torch.float16, bidirectional=True, backend="triton")
    x = torch.zeros(5, 16, 4, dtype=torch.float16)
    assert {each.checked for each in gpu_lstm.explain(lstm, x).layers[0].passes} == {"not checked yet"}
    r = gpu_lstm.kernels.problem.Recurrence(
        weight_hh=torch.zeros(128, 32, dtype=torch.float16), weight_hr=None, c0=torch.zeros(16, 32),
        h0=torch.zeros(16, 32, dtype=torch.float16),
    )  # fmt: skip
    plan = plans(Problem(5, 16, 32, torch.float16), INTERPRETER, False)[-1]  # backward has the same tiles
    remembered.write(trust.KIND, trust._key(plan, r, True, None), "an error of 1" if wrong else "right")
    forward, backward = gpu_lstm.explain(lstm, x).layers[0].passes
    assert forward.checked == ("not trusted: an error of 1" if wrong else "checked")
    assert backward.checked == "not checked yet"
    assert gpu_lstm.explain(lstm, x).layers[1].passes[0].checked == "not checked yet", "reverse is another kernel"
    ragged = gpu_lstm.explain(lstm, x, lengths=torch.full((16,), 5))
    assert ragged.layers[0].passes[0].checked == "not checked yet"


@pytest.mark.parametrize("training", [False, True])
def test_launches_are_as_many_as_the_call_makes(monkeypatch, training):
    """With a workspace for few steps, so that there are chunks where nothing is kept for backward."""
    monkeypatch.setattr(gpu_lstm.chunks, "WORKSPACE", 2 * 3 * 20 * 4)
    launched = []
    monkeypatch.setattr(launch, "launch_kernel", lambda *a, **k: launched.append(1) or REAL_LAUNCH(*a, **k))
    lstm = gpu_lstm.LSTM(4, 5, 2, backend="triton")
    with torch.set_grad_enabled(training):
        found = gpu_lstm.explain(lstm, X)
        y, _ = lstm(X)
        if training:
            y.sum().backward()
    assert found.launches == len(launched) == (4 if training else 6)


REAL_LAUNCH = launch.launch_kernel


def test_what_a_user_asked_for_is_named(monkeypatch):
    lstm = gpu_lstm.LSTM(4, 5)
    assert gpu_lstm.explain(lstm, X).why == "backend 'auto' takes it where no kernels run"
    assert gpu_lstm.explain(lstm, X).others["triton"] == "'auto' does not give cpu tensors to it"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert gpu_lstm.explain(lstm, X).why == "asked for by the variable GPU_LSTM_BACKEND"
    with gpu_lstm.backend("triton"):
        assert gpu_lstm.explain(lstm, X).why == "asked for by gpu_lstm.backend(...)"
        lstm.backend = "torch"
        found = gpu_lstm.explain(lstm, X)
    assert (found.backend, found.why) == ("torch", "asked for by the argument `backend`")
    assert found.others["triton"] == "'torch' is asked for by the argument `backend`"
    zoneout = gpu_lstm.explain(gpu_lstm.LSTM(4, 5, zoneout=0.1).double(), X.double())
    assert zoneout.others["torch"] == "it takes no zoneout"
    assert "takes float16, bfloat16 and float32, got torch.float64" in zoneout.others["triton"]


def test_how_torch_goes_about_it():
    packed = pack_padded_sequence(X, [5, 3, 2])
    assert "all layers in one call" in gpu_lstm.explain(gpu_lstm.LSTM(4, 5), X).how
    assert "takes the PackedSequence as it is" in gpu_lstm.explain(gpu_lstm.LSTM(4, 5), packed).how
    assert "a call for each layer and" in gpu_lstm.explain(gpu_lstm.LSTM(4, 5), X, lengths=torch.tensor([5, 2, 1])).how
    stack = gpu_lstm.explain(gpu_lstm.StackedLSTM(4, [5, 6]), X)
    assert stack.how.endswith("a call for each layer")
    assert [d.hidden_size for d in stack.layers] == [5, 6]


def test_the_precision_of_float32_products_on_a_card_and_the_switch(monkeypatch):
    def words(backend="triton"):
        return explain._precision(torch.float32, torch.device("cuda"), backends.Backend(backend))

    assert words().startswith("in the recurrence TF32 (torch.backends.cudnn.")
    assert ", over all steps float32, exactly (torch.backends.cuda.matmul." in words()
    assert words("torch").endswith(", and all others")
    monkeypatch.setattr("gpu_lstm.precision._cudnn_takes_tf32", lambda: False)
    assert words().startswith("in the recurrence float32, exactly")


def test_nothing_changes_and_all_of_it_is_data(card):
    lstm = gpu_lstm.LSTM(4, 5, 2, dropout=0.5, weight_drop=0.5)
    before = torch.get_rng_state()
    found = gpu_lstm.explain(lstm, X, (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert races._decided == {}
    assert not list(remembered.entries(races.KIND))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["backend"] == "torch"


def test_errors_are_those_of_the_module():
    with pytest.raises(TypeError, match=r"explain takes a gpu_lstm.LSTM or StackedLSTM, got torch.nn.modules.rnn.LSTM"):
        gpu_lstm.explain(torch.nn.LSTM(4, 5), X)
    with pytest.raises(RuntimeError, match="4, got 6"):
        gpu_lstm.explain(gpu_lstm.LSTM(4, 5), torch.zeros(5, 3, 6))
    with pytest.raises(ValueError, match="LSTM: Expected input to be 2D or 3D, got 1D instead"):
        gpu_lstm.explain(gpu_lstm.LSTM(4, 5), torch.zeros(4))
    with pytest.raises(ValueError, match="Expected lengths of shape"):
        gpu_lstm.explain(gpu_lstm.LSTM(4, 5), X, lengths=torch.tensor([5]))
