"""gpu_lstm.explain tells what a call then runs, why, and the alternatives, and it runs nothing."""

import dataclasses
import importlib
import json
from unittest.mock import Mock

import pytest
import torch
from places import by_interpreter
from standing_in import CUDA, H100, the_cpu_is_a_card
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_lstm
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available, race, route
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.execution import schedule
from gpu_lstm.kernels import cache, numba_rnn
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.plans.choose import always, plans
from gpu_lstm.kernels.triton_rnn.plans.planning import INTERPRETER
from gpu_lstm.kernels.triton_rnn.plans.tiles import pointwise_plan
from gpu_lstm.verification import verify

pytestmark = [by_interpreter, pytest.mark.usefixtures("nothing_cached")]  # the CPU stands for a card
CPU = torch.device("cpu")
INPUT, TIMES = torch.zeros(5, 3, 4), {"triton": 1e-3, "torch": 1.8e-3}


@pytest.fixture
def card(monkeypatch):
    """The CPU as a card, on which nothing is run."""
    the_cpu_is_a_card(monkeypatch)
    for module, name in ((route, "execute"), (race, "execute"), (race, "times_of"), (launch, "choose_plan")):
        monkeypatch.setattr(module, name, Mock(side_effect=AssertionError("something was run")))


def _kind(lstm):
    return kind_of(lstm._request(INPUT))


def _won(lstm):
    """Store a race that the kernels won against torch."""
    value = dict(backend="triton", why="won a race, 1.80 times as fast", seconds=TIMES)
    cache.write(cache.RACES, race._key(_kind(lstm), Backend.TRITON, CPU), value)


def test_a_race_that_was_won_is_told_with_both_times(card):
    lstm = gpu_lstm.LSTM(4, 5, 2, bidirectional=True)
    _won(lstm)
    found = gpu_lstm.explain(lstm, INPUT)
    assert (found.backend, found.seconds) == ("triton", TIMES)
    for backend, words in dict(torch="1.80 times the time in the race", cupy="CuPy", reference="plain loop").items():
        assert words in found.others[backend]
    sizes = [(layer, name, size) for layer, size in enumerate((4, 10)) for name in ("forward", "reverse")]
    assert [(d.layer, d.name, d.input_size) for d in found.layers] == sizes
    assert [each.name for d in found.layers for each in d.passes] == ["forward", "backward"] * 4
    assert "backend    triton: won a race, 1.80 times as fast (triton 1 ms, torch 1.8 ms)" in str(found)
    assert "LSTM 4 -> 5 -> 5, T = 5, B = 3, float32" in str(found)
    with torch.no_grad():
        assert gpu_lstm.explain(lstm, INPUT).seconds is None, "inference is another kind, and was not raced"


def test_without_a_race_it_tells_who_is_expected_to_win_and_that_there_will_be_one(card):
    lstm = gpu_lstm.LSTM(4, 5)
    found = gpu_lstm.explain(lstm, INPUT)
    assert (found.backend, found.seconds) == ("torch", None)
    assert found.why == "expected: a kernel of the step family is slower; the first call races it"
    assert found.others["triton"] == found.why
    with gpu_lstm.racing("read"):
        assert gpu_lstm.explain(lstm, INPUT).why == "expected: a kernel of the step family is slower"
    _won(lstm)
    with gpu_lstm.racing("off"):
        assert gpu_lstm.explain(lstm, INPUT).backend == "torch"
    found = gpu_lstm.explain(lstm, INPUT, resets=torch.ones(5, 3, dtype=torch.bool))
    assert (found.backend, found.others["torch"]) == ("triton", found.why)
    assert "torch's LSTM is slow with resets" in found.why
    found = gpu_lstm.explain(gpu_lstm.LSTM(4, 5, zoneout=0.1), INPUT)
    assert (found.why, found.others["torch"]) == ("torch's own does not support zoneout", "it does not support zoneout")
    assert "B = 3, float32, zoneout, with gradients\n" in str(found)


def test_plans_and_whether_they_were_timed(card, monkeypatch):
    for module in (choose, launch):
        monkeypatch.setattr(module, "card_of", lambda device: H100)
    lstm = gpu_lstm.LSTM(4, 768, dtype=torch.bfloat16, backend="triton")
    monkeypatch.setattr(available, "why_unavailable", lambda *_: None)  # bfloat16, which the interpreter refuses
    x, problem = torch.zeros(5, 16, 4, dtype=torch.bfloat16), Problem(2, 16, 768, torch.bfloat16)
    found = gpu_lstm.explain(lstm, x)
    assert "  layer 0, forward: 4 -> 768\n" in str(found)
    (direction,) = found.layers
    for each, backward in zip(direction.passes, (False, True), strict=True):
        plan = plans(problem, H100, backward)[0]
        assert each.family == plan.family.name == "cooperative"
        assert each.tiles.startswith(f"{plan.rows} sequences x {plan.units} units, {plan.programs} programs")
        assert each.origin == "the first to try, not timed"
    choose.keep_measured(problem, H100, True, plans(problem, H100, True)[1])
    (direction,) = gpu_lstm.explain(lstm, x).layers
    assert [each.origin for each in direction.passes] == ["the first to try, not timed", "timed on this card"]
    assert found.precision == "of bfloat16 numbers, summed in float32"


def test_what_the_verification_of_a_kernel_came_to(card):
    lstm = gpu_lstm.LSTM(4, 32, dtype=torch.float16, bidirectional=True, backend="triton")
    x, problem = torch.zeros(5, 16, 4, dtype=torch.float16), Problem(2, 16, 32, torch.float16)
    plan = always(problem, INTERPRETER, False)  # backward has the same tiles

    def checked(**options):
        return [each.checked for d in gpu_lstm.explain(lstm, x, **options).layers for each in d.passes]

    assert checked() == ["not checked yet"] * 4
    for verdict, words in (("right", "checked"), ("an error of 1", "failed: an error of 1")):
        cache.write(cache.CHECKS, verify._key(plan, problem, Pass(), CPU), verdict)
        assert checked() == [words] + ["not checked yet"] * 3, "neither backward nor the reverse direction"
    assert checked(lengths=torch.full((16,), 5)) == ["not checked yet"] * 4


@pytest.mark.parametrize("learns", [True, False])
def test_a_call_in_which_only_states_to_reset_to_learn_is_training(learns):
    gru, resets = gpu_lstm.GRU(4, 5, backend="triton").requires_grad_(False), torch.zeros(5, 3, dtype=torch.bool)
    left = torch.zeros(1, 3, 5, requires_grad=learns)
    (layer,) = gpu_lstm.explain(gru, INPUT, resets=resets, reset_states=left).layers
    assert [each.name for each in layer.passes] == ["forward", "backward"][: 1 + learns]


@pytest.mark.parametrize(("training", "options", "launches"), [
    (False, {}, 6), (True, {}, 4 * len(INPUT)), (True, dict(layer_norm=True), 8 * len(INPUT)),
    (True, dict(proj_size=2, zoneout=0.1), 8 * len(INPUT)), (True, dict(proj_size=2), 4),
])  # fmt: skip
def test_launches_are_as_many_as_the_call_makes(monkeypatch, launched, training, options, launches):
    """The workspace holds few steps, so that there are chunks where nothing is kept for backward. A layer norm or a
    projection in the loop divides a step into two."""
    monkeypatch.setattr(schedule, "WORKSPACE", 2 * 3 * 20 * 4)
    if training and not options:
        monkeypatch.setattr(choose, "candidates", lambda problem, *_: [pointwise_plan(problem, False)])
    lstm = gpu_lstm.LSTM(4, 5, 2, backend="triton", **options)
    with torch.set_grad_enabled(training):
        found, (y, _) = gpu_lstm.explain(lstm, INPUT), lstm(INPUT)
        if training:
            y.sum().backward()
    assert found.launches == launched.call_count == launches
    assert "one launch" not in str(found)


def test_what_a_user_asked_for_is_named(monkeypatch):
    lstm = gpu_lstm.LSTM(4, 5)
    with monkeypatch.context() as patch:
        patch.setattr(numba_rnn, "is_compiled", lambda *_: False)
        found = gpu_lstm.explain(lstm, INPUT)
    own = "torch's own LSTM is one loop on a CPU as well"
    why = f"the loops are not compiled yet, and this call starts no compilation: {own}"
    assert (found.why, found.others["numba"]) == (f"backend 'auto' chooses it where no kernels run; {why}", why)
    assert found.others["triton"] == "'auto' does not give cpu tensors to it"
    monkeypatch.setenv(choices.BACKEND_VARIABLE, "reference")
    assert gpu_lstm.explain(lstm, INPUT).why == "asked for by the variable GPU_LSTM_BACKEND"
    by_triton = gpu_lstm.backend("triton")(gpu_lstm.explain)
    assert by_triton(lstm, INPUT).why == "asked for by gpu_lstm.backend(...)"
    lstm.backend = "torch"
    found = by_triton(lstm, INPUT)
    assert (found.backend, found.why) == ("torch", "asked for by the argument `backend`")
    assert found.others["triton"] == "'torch' is asked for by the argument `backend`"
    zoneout = gpu_lstm.explain(gpu_lstm.LSTM(4, 5, zoneout=0.1).double(), INPUT.double())
    assert zoneout.others["torch"] == "it does not support zoneout"
    assert "supports float16, bfloat16 and float32, got torch.float64" in zoneout.others["triton"]


def test_the_loops_for_cpus_and_what_decides():
    found = gpu_lstm.explain(gpu_lstm.GRU(4, 5, 2), torch.zeros(9, 3, 4))
    assert (found.backend, found.layers[1].passes[1].family, found.launches) == ("numba", "loop", 4)
    assert found.why == found.others["torch"]
    assert found.why == (
        "expected: torch runs a step as many small operations, the compiled loop as one; the first call races it"
    )
    assert gpu_lstm.explain(gpu_lstm.GRU(4, 5).double(), torch.zeros(9, 3, 4).double()).backend == "torch"
    found = gpu_lstm.explain(gpu_lstm.LSTM(4, 5, zoneout=0.1), torch.zeros(9, 3, 4))
    assert (found.backend, found.why) == (
        "numba", "torch's own does not support zoneout; the first call races it",
    )  # fmt: skip


def test_how_torch_goes_about_it():
    lstm, packed = gpu_lstm.LSTM(4, 5, backend="torch"), pack_padded_sequence(INPUT, [5, 3, 2])
    assert "all layers in one call" in gpu_lstm.explain(lstm, INPUT).how
    assert "runs the PackedSequence as it is" in gpu_lstm.explain(lstm, packed).how
    assert "a call for each layer and" in gpu_lstm.explain(lstm, INPUT, lengths=torch.tensor([5, 2, 1])).how
    assert gpu_lstm.explain(gpu_lstm.GRU(4, 5), INPUT).how == "torch's own GRU, all layers in one call"
    of_heads = gpu_lstm.explain(gpu_lstm.GRU(4, 6, heads=3), INPUT)
    assert (of_heads.layers[0].heads, "layer 0, forward: 4 -> 6 of 3 heads" in str(of_heads)) == (3, True)
    assert of_heads.problem.startswith("GRU 4 -> 6 (3 heads), T = 5, B = 3, float32, ")
    stack = gpu_lstm.explain(gpu_lstm.StackedGRU(4, [5, 6]), INPUT)
    assert stack.how.endswith("a call for each layer")
    assert [d.hidden_size for d in stack.layers] == [5, 6]


def test_the_precision_of_float32_products_and_the_switch(monkeypatch):
    explain = importlib.import_module("gpu_lstm.tools.explain")  # gpu_lstm.explain is the function
    for switch, words in (True, "TF32 (torch.backends.cudnn."), (False, "float32, exactly"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", switch)
        found = explain._precision(_kind(gpu_lstm.LSTM(4, 5)), CUDA, Backend.TRITON)
        assert found.startswith(f"in the recurrence {words}")


def test_nothing_changes_and_all_of_it_is_data(card):
    lstm, before = gpu_lstm.LSTM(4, 5, 2, dropout=0.5, weight_drop=0.5), torch.get_rng_state()
    found = gpu_lstm.explain(lstm, INPUT, (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert route._routes == race.decided == {}
    assert not list(cache.entries(cache.RACES))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["backend"] == "torch"
