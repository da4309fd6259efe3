"""`auto` where no kernel is right, or memory is too full to verify one: what runs instead, in eager mode and elsewhere.

The CPU counts as a card with one plan, and faults are planted in its kernels.
"""

import copy
import dataclasses
import warnings
from unittest.mock import Mock

import pytest
import torch
from comparing import assert_same
from pairs import RAGGED, B, H, I, T, pair, random_inputs, results, truth, weighing
from places import INTERPRETED
from standing_in import as_another_process, plans_are_verified_on_the_cpu
from test_verify import plant
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm
from gpu_lstm.backends import verify
from gpu_lstm.dispatch import race
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.equations import slstm
from gpu_lstm.kernels.triton_rnn.plans import choose

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="the CPU stands for a card, by the interpreter"),
    pytest.mark.usefixtures("nothing_cached", "exact_float32_products"),
]


@pytest.fixture(autouse=True)
def verdicts(monkeypatch):
    """A Mock that gives them. Nothing is raced: with resets the kernels are expected to be faster."""
    torch._dynamo.reset()
    plans_are_verified_on_the_cpu(monkeypatch)
    monkeypatch.setattr(verify, "STEPS", 2)  # the interpreter is slow
    monkeypatch.setattr(verify, "_verdict", Mock(side_effect=verify._verdict))
    with gpu_lstm.racing("off"):
        yield verify._verdict


def watched(module):
    def call(*given, **options):
        with FlopCounterMode(display=False):
            return module(*given, **options)

    return call


WAYS = {
    "eager": lambda module: module, "watched": watched,
    "compiled": lambda module: torch.compile(module, backend="aot_eager", fullgraph=True),
}  # fmt: skip
X = random_inputs(gpu_lstm.LSTM(I, H), B)[0]


@pytest.mark.parametrize(("way", "fault", "kind", "arguments"), [
    ("eager", "gates i and f swapped", "LSTM", {}), ("watched", "gates i and f swapped", "LSTM", {}),
    ("compiled", "gates i and f swapped", "LSTM", {}), ("compiled", "cell gradient lost", "LSTM", {}),
    ("watched", "GRU: n does not depend on r", "GRU", {}), ("compiled", "GRU: b_hn outside r", "GRU", {}),
    ("compiled", "gates i and f swapped", "LSTM", dict(peepholes=True, recompute=True)),
])  # fmt: skip
def test_numbers_are_right_where_no_kernel_is(verdicts, monkeypatch, way, fault, kind, arguments):
    """Forward or backward; as one warning says, and without another verification."""
    plant(monkeypatch, fault)
    ours = getattr(gpu_lstm, kind)(I, H, **arguments)
    call, expected = WAYS[way](ours), truth(ours, X, **RAGGED)
    with pytest.warns(UserWarning, match="backend 'auto' .* no Triton kernel can run this layer .*RMS error"):
        assert_same(results(ours, X, call=call, **RAGGED), expected, condition=2)
    asked = verdicts.call_count
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm")
        assert_same(results(ours, X, call=call, **RAGGED), expected, condition=2)
    assert verdicts.call_count == asked
    with torch.no_grad():
        torch.testing.assert_close(call(X, **RAGGED)[0].double(), expected["output"], rtol=0, atol=1e-6)
    ours.backend = "triton"
    with pytest.raises(RuntimeError, match="no Triton kernel can run this layer on this card"):
        results(ours, X, call=WAYS[way](ours), **RAGGED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_instead_is_what_kernels_of_backward_read(monkeypatch, dtype):
    """Which are right, where those of forward are not; of an SLSTM, which torch has not."""
    above = slstm.above
    monkeypatch.setattr(slstm, "above", lambda x: 2.0 * above(x))  # which backward does not need
    ours = gpu_lstm.SLSTM(I, H).to(dtype)
    twin, x, found = copy.deepcopy(ours).double(), X.to(dtype), []
    twin.backend = "reference"
    launched = Mock(side_effect=launch.launch_kernel)
    monkeypatch.setattr(launch, "launch_kernel", launched)
    for module in ours, twin:
        y, _ = (watched(module) if module is ours else module)(x.to(module.weight_ih_l0), **RAGGED)
        found.append([y, *torch.autograd.grad(y.sum(), list(module.parameters()))])
    for our, true in zip(*found):
        torch.testing.assert_close(
            our.double(), true, rtol=0, atol=8 * torch.finfo(dtype).eps * float(true.abs().max())
        )
    (kernel, _), given = launched.call_args
    assert (kernel.__name__, given["c_ptr"].dtype) == ("step_backward_kernel", torch.float32)


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_gradients_by_torch_func_are_right_where_no_kernel_is(monkeypatch):
    plant(monkeypatch, "gates i and f swapped")
    ours, _ = pair("LSTM", None)[::-1]
    found, pull = torch.func.vjp(lambda x: tuple(tree_leaves(ours(x, **RAGGED))), X)
    torch.testing.assert_close(pull(tuple(weighing(found)))[0].double(), truth(ours, X, **RAGGED)["dx"])


@pytest.mark.parametrize("way", WAYS)
def test_while_memory_is_full_another_backend_runs_and_later_the_kernels(verdicts, monkeypatch, way):
    """Nothing is decided or cached; who chose the kernels gets the error."""
    ours = pair("LSTM", None)[1]
    expected, launched = truth(ours, X, **RAGGED), Mock(side_effect=launch.launch_kernel)
    with monkeypatch.context() as patch:
        patch.setattr(verify.Small, "by_reference", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        for said in pytest.warns(UserWarning, match="memory is full"), warnings.catch_warnings(action="error"):
            with said:
                assert_same(results(ours, X, call=WAYS[way](ours), **RAGGED), expected, condition=2)
        assert verdicts.call_count > 1
        ours.backend = "triton"
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            results(ours, X, call=WAYS[way](ours), **RAGGED)
    assert (race.decided, [*cache.entries(cache.CHECKS)], [*cache.entries(cache.RACES)]) == ({}, [], [])
    ours.backend = "auto"
    monkeypatch.setattr(launch, "launch_kernel", launched)
    assert_same(results(ours, X, call=WAYS[way](ours), **RAGGED), expected, condition=2)
    assert launched.called


def test_where_memory_is_too_full_for_a_race_the_expected_winner_runs(monkeypatch):
    """Verified, as it is by a call of two steps. It is not cached: another process may have the memory."""
    execute, x = race.execute, torch.randn(5, B, I)

    def of_few_steps(route, call):
        if call.steps > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(route, call)

    monkeypatch.setattr(race, "execute", of_few_steps)
    with gpu_lstm.racing("on"), torch.no_grad():
        gpu_lstm.LSTM(I, H)(x, resets=torch.zeros(5, B, dtype=torch.bool))
    assert [decision.backend.value for decision in race.decided.values()] == ["triton"]
    assert [*cache.entries(cache.RACES)] == []
    assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"]


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_kernels_of_another_batch_or_process_are_verified_before_they_run(verdicts, monkeypatch):
    """Batches of 3 and 4 are raced as one, and a race is on disk; but their kernels need not be the same."""
    candidates, ours = choose.candidates, gpu_lstm.LSTM(I, H)

    def of_batch(problem, card, pass_):
        return [dataclasses.replace(plan, num_warps=problem.batch) for plan in candidates(problem, card, pass_)]

    def call(batch):
        y, _ = ours(torch.ones(T, batch, I), resets=torch.zeros(T, batch, dtype=torch.bool))
        return [decision.backend.value for decision in race.decided.values()], y[:, 0]

    monkeypatch.setattr(choose, "candidates", of_batch)
    verdicts.side_effect = lambda layer, pass_, inputs, plan: "wrong" if plan.num_warps in wrong else "right"
    monkeypatch.setattr(race, "race", lambda rivals, now: {name: [1.0 + (name == "torch")] * 9 for name in rivals})
    with torch.no_grad(), gpu_lstm.racing("on"):
        wrong = [4]
        _, expected = call(3)
        for batch, backends in (3, ["triton"]), (4, ["torch"]), (4, ["torch"]), (3, ["torch"]):
            decided, y = call(batch)
            assert decided == backends
            torch.testing.assert_close(y, expected)
        as_another_process()
        assert (cache.forget(cache.CHECKS), len([*cache.entries(cache.RACES)])) == (2, 1)
        wrong = [3]
        assert call(3)[0] == ["torch"]
