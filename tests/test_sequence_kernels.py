"""The families that walk the whole sequence in one launch: every result and gradient against the float64 oracle.

The cooperative kernels run with a thread for each program, started in shuffled order, with random pauses and with
stores that become visible late. Outputs are NaN before a launch.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from comparing import assert_as_good_as_torch, example
from concurrent_interpreter import ConcurrentRun
from test_kernels import example_of

from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.triton_lstm import cooperative, exchange, launch
from gpu_lstm.kernels.triton_lstm.families import plans
from gpu_lstm.kernels.triton_lstm.planning import INTERPRETER, Family, Plan

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU test_kernels.py runs what is chosen there")

BOTH_EXCHANGES = pytest.mark.parametrize("flagged", [True, False], ids=["flagged", "counter"])
VARIANTS = ("plain", "ragged", "resets", "ragged resets reverse")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """New tensors hold NaN, so that a result which no kernel wrote is seen."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def filled(create):
        def call(*args, **options):
            tensor = create(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return call

    monkeypatch.setattr(torch, "empty", filled(empty))
    monkeypatch.setattr(torch, "empty_like", filled(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(new_empty))


@pytest.mark.parametrize("size", [(1, 1, 3, 1), (5, 3, 4, 6), (7, 17, 3, 33), (9, 2, 3, 60)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resident(monkeypatch, size, variant):
    def resident(problem, device, backward, *_):
        problem = replace(problem, steps=2)  # a single step is planned otherwise
        return next(plan for plan in plans(problem, INTERPRETER, backward) if plan.family is Family.RESIDENT)

    monkeypatch.setattr(launch, "choose_plan", resident)
    assert_as_good_as_torch(
        partial(example_of, size, variant), "triton", torch.float32, seeds=12 if size[3] < 10 else 2
    )


def _cooperate(monkeypatch, units, groups=8, warps=2, yield_rate=0.05):
    """Have every launch be cooperative, with `units` units a program."""
    seeds = iter(range(1_000_000))

    def cooperative_plan(problem, device, backward, *_):
        programs = -(-problem.hidden // units)
        if backward:
            programs = 4 * -(-problem.hidden // (4 * units))
        tiles = -(-problem.batch // 8)
        chunks = -(-problem.hidden * problem.size // (64 * warps))
        return Plan(Family.COOPERATIVE, 8, units, chunks, programs, min(groups, tiles), warps, 1, 0, "")

    def launch_concurrently(kernel, grid, **arguments):
        ConcurrentRun(seed=next(seeds), yield_rate=yield_rate)(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "choose_plan", cooperative_plan)
    monkeypatch.setattr(launch, "launch_kernel", launch_concurrently)


COOPERATIONS = [  # (T, B, I, H), units a program, groups: programs forward, backward
    ((6, 3, 3, 8), 4, 1),  # 2, 4
    ((3, 17, 3, 20), 8, 2),  # 3, 4; three batch tiles in two groups
    pytest.param((3, 3, 3, 50), 4, 1, marks=pytest.mark.slow),  # 13, 16
    pytest.param((40, 2, 2, 6), 4, 1, marks=pytest.mark.slow),  # 2, 4
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("size", "units", "groups"), COOPERATIONS, ids=str)
def test_cooperative(monkeypatch, size, units, groups, variant):
    _cooperate(monkeypatch, units, groups)
    seeds = 1 if size[0] == 40 else 3
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float32, seeds=seeds)


HALVES = [  # the same: H odd, so that the last word of a row is half empty, and even; batch tiles that are not full
    ((4, 3, 3, 33), 8, 4),  # 5, 8; 1
    ((3, 5, 3, 20), 4, 2),  # 5, 8; 3
]


@BOTH_EXCHANGES
@pytest.mark.parametrize("variant", ["plain", "ragged resets reverse"])
@pytest.mark.parametrize(("size", "columns", "rows"), HALVES, ids=str)
def test_cooperative_with_two_units_in_a_word(monkeypatch, size, columns, rows, variant, flagged):
    _cooperate(monkeypatch, columns, rows, flagged)
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float16, seeds=2)


@BOTH_EXCHANGES
def test_in_several_launches(monkeypatch, flagged):
    """For batch tiles that do not fit at once, and backward for two steps each."""
    _cooperate(monkeypatch, columns=8, rows=2, flagged=flagged, groups=2)
    monkeypatch.setattr(cooperative, "PARTIALS_WORKSPACE", 2 * 16 * 7 * 8)  # two steps of B=7, H=8
    assert_as_good_as_torch(
        partial(example_of, (5, 7, 3, 8), "ragged resets reverse"), "triton", torch.float32, seeds=2
    )


@BOTH_EXCHANGES
def test_the_same_bits_every_run(monkeypatch, flagged):
    _cooperate(monkeypatch, columns=4, rows=4, flagged=flagged, yield_rate=0.3)
    given = example(6, 3, 3, 20, ragged=True, resets=0.3)
    first, second = (given.run("triton", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second) if a is not None)


@pytest.mark.parametrize("pattern", [-1, float("nan")], ids=["the fill's", "the usual"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.float16, torch.int16)], ids=str)
def test_a_nan_in_the_data_is_not_waited_for(monkeypatch, dtype, bits, pattern):
    """A NaN is data, also one with the bit pattern that stands for data which is not there."""
    _cooperate(monkeypatch, columns=4, rows=4, flagged=True)
    nan = torch.tensor(pattern, dtype=bits).view(dtype) if pattern == -1 else pattern
    given = example(4, 3, 3, 8)
    x, h0, c0, *weights = (None if t is None else t.to(dtype) for t in given.tensors)
    h0[0, :2], x[1, 1, 0] = nan, nan
    ours, _ = lstm_layer(x, weights, (h0, c0), backend="triton")
    theirs, _ = lstm_layer(x, weights, (h0, c0), backend="torch")
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert not ours[:, 2].isnan().any()


# A broken exchange must be seen.


@triton.jit
def announce_early(at, words, mask):
    tl.store(at, tl.zeros_like(words), mask=mask)  # the data come later
    tl.debug_barrier()
    exchange.publish(at, words, mask)


@triton.jit
def relaxed_announce(arrivals_ptr, counter, FLAGGED: tl.constexpr):
    tl.atomic_add(arrivals_ptr + counter, 1, sem="relaxed")


@triton.jit
def no_wait(arrivals_ptr, counter, expected, patience, error_ptr, step, FLAGGED: tl.constexpr):
    return patience


@triton.jit
def collect_without_repeating(
    at, left, error_ptr, step,
    TILES: tl.constexpr, STRIDE: tl.constexpr, PATIENCE: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    return exchange.load_volatile(at, left, TILES, STRIDE)


@triton.jit
def count_missing_in_the_last_tile(tiles, TILES: tl.constexpr):
    return tl.sum((tiles[TILES - 1] == -1).to(tl.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "fault", "flagged"),
    [
        pytest.param(cooperative, "publish", announce_early, True, id="published before the data"),
        pytest.param(cooperative, "announce", relaxed_announce, False, id="announced before the data"),
        pytest.param(cooperative, "wait", no_wait, False, id="no wait"),
        pytest.param(cooperative, "collect", collect_without_repeating, True, id="no repeated load"),
        pytest.param(exchange, "count_missing", count_missing_in_the_last_tile, True, id="one tile is looked at"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_broken_exchange_is_seen(monkeypatch, module, name, fault, flagged, dtype):
    _cooperate(monkeypatch, columns=4, rows=4, flagged=flagged, yield_rate=0.3)
    given = partial(example, 8, 3, 3, 20)
    assert_as_good_as_torch(lambda seed: given(seed=seed), "triton", dtype, seeds=2)
    monkeypatch.setattr(module, name, fault)

    def is_seen(seed: int) -> bool:
        try:
            assert_as_good_as_torch(lambda _: given(seed=seed), "triton", dtype, seeds=1)
        except AssertionError:
            return True
        return False

    assert any(map(is_seen, range(12))), "programs meet in another order at each"


@triton.jit
def halves_in_the_other_order(x, DTYPE: tl.constexpr):
    words = exchange.pack(x, DTYPE)
    return (words << 16) | ((words >> 16) & 0xFFFF)


@triton.jit
def nan_for_zero(x, DTYPE: tl.constexpr):  # only units past H are zero
    return exchange.pack(tl.where(x == 0.0, float("nan"), x), DTYPE)


@triton.jit
def high_halves_lost(x, DTYPE: tl.constexpr):
    return exchange.pack(x, DTYPE) & 0xFFFF


@pytest.mark.parametrize("fault", [halves_in_the_other_order, nan_for_zero, high_halves_lost], ids=lambda f: f.__name__)
def test_a_fault_in_a_word_is_seen(monkeypatch, fault):
    _cooperate(monkeypatch, columns=8, rows=4, flagged=True)
    monkeypatch.setattr(cooperative, "pack", fault)
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(partial(example_of, (3, 3, 3, 13), "plain"), "triton", torch.float16, seeds=1)


@triton.jit
def never_announce(arrivals_ptr, counter, FLAGGED: tl.constexpr):
    pass


@triton.jit
def never_publish(at, words, mask):
    pass


@pytest.mark.parametrize(
    ("name", "fault", "flagged"), [("announce", never_announce, False), ("publish", never_publish, True)]
)
def test_waiting_in_vain_ends_and_is_reported(monkeypatch, name, fault, flagged):
    _cooperate(monkeypatch, columns=4, rows=4, flagged=flagged)
    monkeypatch.setattr(cooperative, "PATIENCE", 20)
    monkeypatch.setattr(cooperative, name, fault)
    x, h0, c0, *weights = (None if t is None else t.float() for t in example(5, 3, 3, 8).tensors)
    lstm_layer(x, weights, (h0, c0), backend="triton")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"lstm_cooperative_forward_kernel gave up at step \d"):
        lstm_layer(x, weights, (h0, c0), backend="triton")
    lstm_layer(x, weights, (h0, c0), backend="triton")  # reported once
