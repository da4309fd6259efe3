"""Faults of kernels on a card: the user gets right numbers and one warning that says why, and there is no second trial.

The CPU counts as a card with one plan, the step family's. Faults are planted in its kernels and around them.
test_verify.py tests how they are found.
"""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from comparing import assert_same
from pairs import RAGGED, B, H, I, T, pair, random_inputs, results, truth, weighing
from places import by_interpreter
from standing_in import as_another_process, few_polls, plans_are_verified_on_the_cpu
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm
from gpu_lstm.dispatch import race
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.triton_rnn import equations, launch
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.threads import fragments
from gpu_lstm.kernels.triton_rnn.tiles import cells
from gpu_lstm.kernels.triton_rnn.tiles import step as step_family
from gpu_lstm.verification import verify

pytestmark = [
    by_interpreter,
    pytest.mark.usefixtures("nothing_cached", "exact_float32_products"),
]

# Right device functions. Faults are plain functions in their place, since the code that calls them runs in the
# interpreter.
cell_forward, cell_backward, tanh = equations.cell_forward, equations.cell_backward, equations.tanh
launch_kernel = launch.launch_kernel


def gru_with(candidate):
    """Return the GRU's forward with another candidate n."""

    def forward(x, z, c_prev, rest, bias_hh, peepholes, S):
        (r, update, _, s), _, rest = cell_forward(x, z, c_prev, rest, bias_hh, peepholes, S)
        gates = (r, update, candidate(x, s, r, bias_hh), s)
        return gates, equations.next_cell(gates, c_prev, S), rest

    return forward


def gru_gradients(change):
    """Return the GRU's backward with wrong results: change(gates, dz, dc_prev, rest)."""
    return lambda gates, *given: change(gates, *cell_backward(gates, *given))


IN_KERNELS = {  # the device function, and the faulty one in its place
    "gates i and f swapped": ("cell_forward", lambda x, z, *given: cell_forward(
        (x[1], x[0], *x[2:]), (z[1], z[0], *z[2:]), *given)),
    "cell gradient lost": ("cell_backward", lambda *given: (
        cell_backward(*given)[0], cell_backward(*given)[1] * 0.0, ())),
    "GRU: b_hn outside r": ("cell_forward", gru_with(lambda x, s, r, b: tanh(x[2] + b[2] + r * (s - b[2])))),
    "GRU: n does not depend on r": ("cell_backward", gru_gradients(lambda gates, dz, *rest: (
        (dz[0], dz[1] * 0.0, dz[2], dz[3]), *rest))),
    "sLSTM: half of l": ("cell_forward", lambda x, z, q, rest, *given: cell_forward(
        x, z, q, (rest[0] * 0.5,), *given)),
    "sLSTM: dl lost": ("cell_backward", lambda *given: cell_backward(
        *given[:4], (given[4][0] * 0.0,), *given[5:])),
}  # fmt: skip


def plant(monkeypatch, fault):
    """Plant a fault wherever kernels of the step family find the function."""
    name, function = IN_KERNELS[fault]
    for module in (step_family, cells, fragments, equations):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)


def writes_outside(kernel, grid, **arguments):
    launch_kernel(kernel, grid, **arguments)
    if (h := arguments.get("h_ptr")) is not None:
        h.as_strided((3,), (1,), h.storage_offset() + h.numel()).fill_(1)


def gives_nan(kernel, grid, **arguments):
    launch_kernel(kernel, grid, **arguments)
    arguments["dgates_ptr" if "dgates_ptr" in arguments else "h_ptr"].fill_(torch.nan)


def times_out(kernel, grid, arrivals_ptr, **arguments):
    """Launch programs that wait for one arrival more than there will be."""
    with few_polls(kernel.__name__, trial=True):
        launch_kernel(kernel, grid, arrivals_ptr=arrivals_ptr.sub_(1), **arguments)


OF_LAUNCHES = {  # a function in the place of a launch, and the text of the warning
    "writes outside": (writes_outside, r"step_forward_kernel wrote up to 12 bytes past the end of h \["),
    "gives NaN": (gives_nan, "the RMS error of .* is nan"),
    "times out": (times_out, "step_forward_kernel timed out at step"),
    "cannot be launched": (Mock(side_effect=RuntimeError("planted")), "RuntimeError: planted"),
}


@pytest.fixture(autouse=True)
def verdicts(monkeypatch, spy):
    """A Mock that gives the verdicts. Nothing is raced. Where there are resets the kernels are expected to be
    faster."""
    plans_are_verified_on_the_cpu(monkeypatch)
    verdicts = spy(verify, "_verdict")
    with gpu_lstm.racing("off"):
        yield verdicts


def eager(module):
    return module


def watched(module):
    def call(*given, **options):
        with FlopCounterMode(display=False):
            return module(*given, **options)

    return call


def by_compiler(module):
    torch.compiler.reset()
    return torch.compile(module, backend="eager", fullgraph=True)


class Row(NamedTuple):
    """A fault, the module whose kernels have it, and the way in which the module is called."""

    fault: str
    kind: str = "LSTM"
    arguments: dict = {}  # noqa: RUF012
    way: Callable = eager


INPUT = random_inputs(gpu_lstm.LSTM(I, H), B)[0]
EVERYTHING = dict(peepholes=True, recompute=True)


def assert_right(module, call, expected):
    assert_same(results(module, INPUT, call=call, **RAGGED), expected, condition=2)


@pytest.mark.parametrize("row", [
    Row("gates i and f swapped"), Row("gates i and f swapped", way=watched), Row("cell gradient lost"),
    Row("cell gradient lost", "LSTM", EVERYTHING, by_compiler), Row("gates i and f swapped", "LSTM", EVERYTHING),
    Row("GRU: b_hn outside r", "GRU"),
    Row("GRU: n does not depend on r", "GRU", {}, watched), *map(Row, OF_LAUNCHES),
], ids=lambda row: f"{row.fault}, {row.way.__name__}")  # fmt: skip
def test_numbers_are_right_where_no_kernel_is(verdicts, monkeypatch, row):
    """A fault is forward or backward. One warning reports it, and there is no second trial. An event that tells nothing
    about the kernel, such as a timeout next to another process, is not cached."""
    if row.fault in IN_KERNELS:
        plant(monkeypatch, row.fault)
    else:
        monkeypatch.setattr(launch, "launch_kernel", OF_LAUNCHES[row.fault][0])
    _, said = OF_LAUNCHES.get(row.fault, (None, "the RMS error of"))
    ours = getattr(gpu_lstm, row.kind)(I, H, **row.arguments)
    call, expected = row.way(ours), truth(ours, INPUT, **RAGGED)
    told = "does without the kernels of 'triton'"
    if row.way is eager:
        told = f"uses '{'reference' if row.arguments else 'torch'}' for {row.kind} {I} -> {H}"
    with pytest.warns(UserWarning, match=f"'auto' {told}.* no Triton kernel can run this layer .*{said}"):
        assert_right(ours, call, expected)
    asked, stored = verdicts.call_count, [verdict for *_, verdict in cache.entries(cache.CHECKS)]
    assert (stored == []) == (row.fault in ("times out", "cannot be launched"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm")
        assert_right(ours, call, expected)
        gpu_lstm.check()  # nothing is left to report
        others = gpu_lstm.explain(ours, INPUT, **RAGGED).others
        assert row.way is not eager or others["triton"].startswith("the kernels fail")
    assert verdicts.call_count == asked
    with torch.no_grad():
        torch.testing.assert_close(call(INPUT, **RAGGED)[0].double(), expected["output"], rtol=0, atol=1e-6)
    ours.backend = "triton"
    with pytest.raises(RuntimeError, match=f"no Triton kernel can run this layer on this card.*{said}"):
        results(ours, INPUT, call=row.way(ours), **RAGGED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_instead_is_what_kernels_of_backward_read(monkeypatch, launched, dtype):
    """The backward kernels are right, and the forward kernels are not. torch has no SLSTM, so that the reference runs
    forward."""
    above = equations.above
    monkeypatch.setattr(equations, "above", lambda x: 2.0 * above(x))  # backward does not need it
    ours = gpu_lstm.SLSTM(I, H).to(dtype)
    twin, x = copy.deepcopy(ours).double(), INPUT.to(dtype)
    twin.backend = "reference"
    found = results(ours, x, call=watched(ours), **RAGGED), results(twin, x, **RAGGED)
    for our, true in zip(*(each.values() for each in found)):
        torch.testing.assert_close(
            our.double(), true, rtol=0, atol=8 * torch.finfo(dtype).eps * float(true.abs().max())
        )
    (kernel, _), given = launched.call_args
    assert (kernel.__name__, given["c_ptr"].dtype) == ("step_backward_kernel", torch.float32)


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_gradients_by_torch_func_are_right_where_no_kernel_is(monkeypatch):
    plant(monkeypatch, "gates i and f swapped")
    ours, _ = pair("LSTM", None)[::-1]
    found, pull = torch.func.vjp(lambda x: tuple(tree_leaves(ours(x, **RAGGED))), INPUT)
    torch.testing.assert_close(pull(tuple(weighing(found)))[0].double(), truth(ours, INPUT, **RAGGED)["dx"])


@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize("way", [eager, by_compiler])
def test_while_memory_is_full_another_backend_runs_and_later_the_kernels(verdicts, monkeypatch, launched, way):
    """Nothing is decided or cached. A user who chose the kernels gets the error."""
    ours = pair("LSTM", None)[1]
    expected = truth(ours, INPUT, **RAGGED)
    with monkeypatch.context() as patch:
        patch.setattr(verify.Small, "by_reference", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        for said in pytest.warns(UserWarning, match="memory is full"), contextlib.nullcontext():  # it is said once
            with said:
                assert_right(ours, way(ours), expected)
        assert verdicts.call_count > 1
        ours.backend = "triton"
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            results(ours, INPUT, call=way(ours), **RAGGED)
    assert (race.decided, [*cache.entries(cache.CHECKS)], [*cache.entries(cache.RACES)]) == ({}, [], [])
    ours.backend = "auto"
    launched.reset_mock()
    assert_right(ours, way(ours), expected)
    assert launched.called


def test_where_memory_is_too_full_for_a_race_the_expected_winner_runs(monkeypatch):
    """A call of two steps verifies it. The winner is not cached, since another process may have the memory."""
    execute, x = race.execute, torch.randn(5, B, I)

    def of_few_steps(route, call):
        if call.steps > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(route, call)

    monkeypatch.setattr(race, "execute", of_few_steps)
    with gpu_lstm.racing("on"), torch.no_grad():
        gpu_lstm.LSTM(I, H)(x, resets=torch.ones(5, B, dtype=torch.bool))
    assert [decision.backend.value for decision in race.decided.values()] == ["triton"]
    assert [*cache.entries(cache.RACES)] == []
    assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"]


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_kernels_of_another_batch_or_process_are_verified_before_they_run(verdicts, monkeypatch):
    """Batches of 3 and 4 are raced as one, and a race is on disk, but their kernels may differ."""
    candidates, ours = choose.candidates, gpu_lstm.LSTM(I, H)

    def of_batch(problem, card, pass_):
        return [dataclasses.replace(plan, num_warps=problem.batch) for plan in candidates(problem, card, pass_)]

    def call(batch):
        y, _ = ours(torch.ones(T, batch, I), resets=torch.zeros(T, batch, dtype=torch.bool))
        return [decision.backend.value for decision in race.decided.values()], y[:, 0]

    monkeypatch.setattr(choose, "candidates", of_batch)
    verdicts.side_effect = lambda layer, pass_, inputs, plan: "wrong" if plan.num_warps in wrong else "right"
    monkeypatch.setattr(race, "times_of", lambda rivals, now: {name: [1.0 + (name == "torch")] * 9 for name in rivals})
    with torch.no_grad(), gpu_lstm.racing("on"):
        wrong = [4]
        _, expected = call(3)
        for batch, backends in (3, ["triton"]), (4, ["torch"]), (4, ["torch"]), (3, ["torch"]):
            decided, y = call(batch)
            assert decided == backends
            torch.testing.assert_close(y, expected)
        as_another_process()
        assert (cache.remove(cache.CHECKS), len([*cache.entries(cache.RACES)])) == (2, 1)
        wrong = [3]
        assert call(3)[0] == ["torch"]
