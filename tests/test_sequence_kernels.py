"""The families that walk the whole sequence in one launch: every result and gradient against the float64 oracle.

The cooperative kernels run with a thread for each program, started in shuffled order, with random pauses and with
stores that become visible late. Outputs are NaN before a launch.
"""

import dataclasses
import threading
import time
from functools import partial

import oracle
import pytest
import torch
import triton
import triton.language as tl
from comparing import assert_as_good_as_torch, example
from concurrent_interpreter import ConcurrentRun
from test_kernels import example_of
from test_layer import noisy

from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.problem import Recurrence
from gpu_lstm.kernels.triton_lstm import cooperative, exchange, launch, step
from gpu_lstm.kernels.triton_lstm.planning import INTERPRETER, Family, Plan
from gpu_lstm.kernels.triton_lstm.resident import plans as resident_plans
from gpu_lstm.kernels.triton_lstm.step import step_plan

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU test_kernels.py runs what is chosen there")

VARIANTS = ("plain", "ragged", "resets", "ragged resets reverse")


def sizes_and_variants(*sizes):
    """All variants of the first size; of the others in turn one of the two that differ most."""
    return [(size, v) for k, size in enumerate(sizes) for v in (VARIANTS if k == 0 else VARIANTS[-(k % 2) :][:1])]


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


def _reside(monkeypatch):
    """Have every launch be resident."""

    def resident(problem, device, which, *_):
        return next(iter(resident_plans(problem, INTERPRETER, which.backward)))

    monkeypatch.setattr(launch, "choose_plan", resident)


RESIDENT = sizes_and_variants((5, 3, 4, 6), (1, 1, 3, 1), (3, 11, 3, 33), (9, 2, 3, 60))
RESIDENT += sizes_and_variants((4, 3, 3, 20, 7))


@pytest.mark.parametrize(("size", "variant"), RESIDENT, ids=str)
def test_resident(monkeypatch, size, variant):
    _reside(monkeypatch)
    seeds = 8 if size[3] == 1 else 2
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float32, seeds=seeds)


def _cooperate(monkeypatch, units, groups=8, warps=2, yield_rate=0.05):
    """Have every launch be cooperative, with `units` units a program."""
    seeds = iter(range(1_000_000))

    def cooperative_plan(problem, device, which, *_):
        programs = -(-problem.hidden // units)
        if which.backward:
            programs = 4 * -(-problem.hidden // (4 * units))
        tiles = -(-problem.batch // 8)
        chunks = -(-problem.hidden * problem.size // (64 * warps))
        return Plan(Family.COOPERATIVE, 8, units, chunks, programs, min(groups, tiles), warps, 1, 0, "")

    def launch_concurrently(kernel, grid, **arguments):
        ConcurrentRun(seed=next(seeds), yield_rate=yield_rate)(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "choose_plan", cooperative_plan)
    monkeypatch.setattr(launch, "launch_kernel", launch_concurrently)


COOPERATIONS = {  # (T, B, I, H) or with P: units a program, groups
    (6, 3, 3, 8): (4, 1),  # programs forward: 2, backward: 4
    (3, 17, 3, 20): (8, 2),  # 3, 4; three batch tiles in two groups
    (3, 3, 3, 50): (4, 1),  # 13, 16
    (20, 2, 2, 6): (4, 1),  # 2, 4
    (4, 3, 3, 20, 7): (8, 1),  # the same with P = 7
}


@pytest.mark.parametrize(("size", "variant"), sizes_and_variants(*COOPERATIONS), ids=str)
def test_cooperative(monkeypatch, size, variant):
    _cooperate(monkeypatch, *COOPERATIONS[size])
    seeds = 2 if size[0] == 6 else 1
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float32, seeds=seeds)


HALVES = [  # the same: H odd, so that the last word of a row is half empty, and even
    ((4, 3, 3, 33), 8, "ragged resets reverse"),  # 5, 8
    ((3, 9, 3, 20), 4, "plain"),  # 5, 8; two batch tiles in one group
    ((4, 3, 3, 33, 12), 8, "ragged resets reverse"),
    ((5, 3, 3, 20, 7), 4, "ragged"),
]


@pytest.mark.parametrize(("size", "units", "variant"), HALVES, ids=str)
def test_cooperative_with_two_units_in_a_word(monkeypatch, size, units, variant):
    _cooperate(monkeypatch, units, groups=1)
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float16, seeds=1)


@pytest.mark.parametrize(
    ("size", "variant"),
    [((5, 3, 3, 7), "ragged resets reverse"), ((3, 9, 3, 40), "plain"), ((5, 3, 3, 33, 12), "ragged resets reverse")],
)
def test_resident_in_half_precision(monkeypatch, size, variant):
    _reside(monkeypatch)
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float16, seeds=1)


def _meet(monkeypatch, programs=3, yield_rate=0.05):
    """Have every launch be of the step family, with so many programs."""
    seeds = iter(range(1_000_000))

    def plan(problem, device, which, *_):
        return dataclasses.replace(step_plan(problem, INTERPRETER, which.backward), programs=programs)

    def launch_concurrently(kernel, grid, **arguments):
        ConcurrentRun(seed=next(seeds), yield_rate=yield_rate)(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "choose_plan", plan)
    monkeypatch.setattr(launch, "launch_kernel", launch_concurrently)


@pytest.mark.parametrize("variant", ["plain", "ragged resets reverse"])
@pytest.mark.parametrize("size", [(4, 3, 3, 40), (3, 18, 3, 20, 33)], ids=str)  # 3 tiles; 4 tiles, and 6 of h
def test_step_by_several_programs(monkeypatch, size, variant):
    _meet(monkeypatch)
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float32, seeds=1)


every_family = pytest.mark.parametrize(
    "family", [_meet, _reside, partial(_cooperate, units=4)], ids=["step", "resident", "cooperative"]
)


@pytest.mark.parametrize("projected", [0, 5])
def test_step_with_noise_by_several_programs(monkeypatch, projected):
    _meet(monkeypatch)
    given = partial(noisy, (4, 3, 3, 40, projected), "ragged states peepholes reverse", "masks")
    assert_as_good_as_torch(lambda seed: given(seed=seed), "triton", torch.float16, seeds=1, yardstick="reference")


@pytest.mark.parametrize(
    ("noise", "variant", "dtype"),
    [
        ("masks", "ragged states reverse", torch.float16),
        ("masks", "ragged states peepholes reverse", torch.float32),
        ("expected", "ragged states peepholes reverse", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [_reside, partial(_cooperate, units=4)], ids=["resident", "cooperative"])
def test_noise(monkeypatch, family, noise, variant, dtype):
    """Recurrent dropout and zoneout, against the reference, since torch's LSTM has neither."""
    family(monkeypatch)
    given = partial(noisy, (5, 3, 3, 11, 0), variant, noise)
    assert_as_good_as_torch(lambda seed: given(seed=seed), "triton", dtype, seeds=1, yardstick="reference")


@pytest.mark.parametrize(
    ("variant", "projected", "dtype"),
    [
        ("states", 0, torch.float16),
        ("ragged states reverse", 5, torch.float32),
        ("peepholes", 5, torch.float16),
        ("ragged states peepholes reverse", 0, torch.float32),
        ("ragged states peepholes layer norm reverse", 0, torch.float16),
    ],
    ids=str,
)
@every_family
def test_resets_to_given_states_peepholes_and_norms(monkeypatch, family, projected, variant, dtype):
    """Against the reference, since torch's LSTM has neither."""
    family(monkeypatch)
    given = partial(noisy, (5, 3, 3, 11, projected), variant, "none")
    assert_as_good_as_torch(lambda seed: given(seed=seed), "triton", dtype, seeds=2, yardstick="reference")


@pytest.mark.parametrize(
    ("size", "units", "groups", "variant", "dtype"),
    [
        ((6, 3, 3, 11, 0), 4, 1, "layer norm of W_hh h", torch.float32),  # programs forward 3; backward 4, one idle
        ((6, 9, 3, 20, 0), 4, 1, "layer norm of W_hh h", torch.float16),  # 5, 8; two batch tiles in one group
        ((3, 17, 3, 20, 0), 8, 2, "layer norm of c", torch.float32),  # 3, 4; three batch tiles in two groups
        ((6, 3, 3, 33, 0), 8, 1, "layer norm of c", torch.float16),  # 5, 8
        ((3, 2, 3, 50, 0), 4, 1, "layer norm", torch.float32),  # 13, 16: more than the threads of a row
    ],
    ids=str,
)
def test_cooperative_with_layer_norms(monkeypatch, size, units, groups, variant, dtype):
    _cooperate(monkeypatch, units, groups, yield_rate=0.2)
    given = partial(noisy, size, variant, "none")
    assert_as_good_as_torch(lambda seed: given(seed=seed), "triton", dtype, seeds=1, yardstick="reference")


def test_programs_of_a_norm_wait_for_each_other_where_every_step_is_reset(monkeypatch):
    """No step needs the h of others, but nobody may run ahead of one who has yet to read the numbers of his units."""
    _cooperate(monkeypatch, units=4)
    load = exchange.load_volatile

    def load_late(at, left, GROUPS, SIZE, STRIDE):
        if SIZE == 2 and threading.current_thread().index[0] == 0:
            time.sleep(0.1)
        return load(at, left, GROUPS, SIZE, STRIDE)

    monkeypatch.setattr(exchange, "load_volatile", load_late)
    given = example(4, 2, 3, 11, resets=1.0, norms=("c",))
    assert_as_good_as_torch(lambda seed: given, "triton", torch.float32, seeds=1, yardstick="reference")


@every_family
def test_the_cell_is_kept_in_float32(monkeypatch, family):
    """In float16, too: c, saved and final, is that of a recurrence in float32, to float32's accuracy.

    W_hh is zero, so that the rounding of h plays no part.
    """
    family(monkeypatch)
    steps, batch, hidden = 12, 3, 8
    gates = example(steps, batch, 4 * hidden, hidden).rounded(torch.float16).tensors[0]
    h0, lengths = torch.zeros(batch, hidden), torch.tensor([steps, 5, 0])
    c0, weight_hh = (
        torch.randn(batch, hidden, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4 * hidden, hidden),
    )
    tensors = [gates, h0, c0, torch.eye(4 * hidden), weight_hh]
    _, _, expected, tape = oracle.layer(*(t.double().numpy() for t in tensors), lengths=lengths)
    recurrence = Recurrence(weight_hh=weight_hh.half(), h0=h0.half(), c0=c0, lengths=lengths)
    for save in (True, False):
        _, _, c_n, c = launch.layer_forward(gates.half(), recurrence, save=save)
        torch.testing.assert_close(c_n.double(), torch.from_numpy(expected), rtol=0, atol=2e-6)
        if save:
            for b, t, *_, c_new, _, _, _ in tape:
                torch.testing.assert_close(c[t, b].double(), torch.from_numpy(c_new), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits_every_run(monkeypatch, dtype):
    _cooperate(monkeypatch, units=4, yield_rate=0.3)
    given = example(5, 3, 3, 8, ragged=True, resets=0.3)
    first, second = (given.run("triton", dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second) if a is not None)


@pytest.mark.parametrize("pattern", [-1, float("nan")], ids=["the fill's", "the usual"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.float16, torch.int16)], ids=str)
def test_a_nan_in_the_data_is_not_waited_for(monkeypatch, dtype, bits, pattern):
    """A NaN is data, also one with the bit pattern that stands for data which is not there."""
    _cooperate(monkeypatch, units=4)
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
def missing_in_the_last_word(
    words, left, phase, COUNT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PHASED: tl.constexpr
):
    if PHASED:  # where a word of the wrong phase keeps its partners waiting
        missing = count_missing(words, left, phase, COUNT, SIZE, STRIDE, PHASED)
    else:
        last = left - (COUNT - 1) // SIZE * STRIDE - (COUNT - 1) % SIZE
        missing = count_missing(words[COUNT - 1 :], last, phase, 1, 1, 1, PHASED)
    return missing


@triton.jit
def nothing_missing(
    words, left, phase, COUNT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PHASED: tl.constexpr
):
    return 0


@triton.jit
def any_phase(words, left, phase, COUNT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PHASED: tl.constexpr):
    return count_missing(words, left, phase, COUNT, SIZE, STRIDE, False)


@triton.jit
def one_phase(words, phase):
    return words & -2


count_missing = exchange.count_missing  # as it was before a fault stood in its place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "fault", "norms"),
    [
        pytest.param(exchange, "count_missing", count_missing, (), id="none"),
        pytest.param(cooperative, "publish", announce_early, (), id="published before the data"),
        pytest.param(exchange, "count_missing", nothing_missing, (), id="no repeated load"),
        pytest.param(exchange, "count_missing", missing_in_the_last_word, (), id="one word is looked at"),
        pytest.param(exchange, "count_missing", any_phase, (), id="the phase is not looked at"),
        pytest.param(exchange, "count_missing", any_phase, ("hh",), id="nor that of a norm of W_hh h"),
        pytest.param(exchange, "count_missing", any_phase, ("c",), id="nor that of a norm of c"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_broken_exchange_is_seen(monkeypatch, module, name, fault, norms, dtype):
    _cooperate(monkeypatch, units=4, yield_rate=0.3)
    given = partial(example, 6, 3, 3, 8, norms=norms)
    yardstick = "reference" if norms else "torch"
    monkeypatch.setattr(module, name, fault)

    def is_seen(seed: int) -> bool:
        try:
            assert_as_good_as_torch(lambda _: given(seed=seed), "triton", dtype, seeds=1, yardstick=yardstick)
        except AssertionError:
            return True
        return False

    there = fault is not count_missing
    assert any(map(is_seen, range(12 if there else 2))) is there, "programs meet in another order at each"


@triton.jit
def never_meet(arrivals_ptr, times, poll_limit, error_ptr, step):
    return poll_limit


@pytest.mark.parametrize("projected", [0, 5])
def test_programs_that_do_not_meet_are_seen(monkeypatch, projected):
    _meet(monkeypatch, yield_rate=0.3)
    monkeypatch.setattr(step, "grid_barrier", never_meet)
    given = example(9, 3, 3, 40, projected)
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(lambda seed: given, "triton", torch.float32, seeds=5)  # in one order or another


@triton.jit
def halves_in_the_other_order(x, DTYPE: tl.constexpr):
    words = exchange.pack(x, DTYPE)
    if tl.float16 == DTYPE:
        words = (words << 16) | ((words >> 16) & 0xFFFF)
    return words


@triton.jit
def nan_for_zero(x, DTYPE: tl.constexpr):  # only units past H are zero
    return exchange.pack(tl.where(x == 0.0, float("nan"), x), DTYPE)


@triton.jit
def high_halves_lost(x, DTYPE: tl.constexpr):
    return exchange.pack(x, DTYPE) & (0xFFFF if tl.float16 == DTYPE else -1)


@pytest.mark.parametrize("fault", [halves_in_the_other_order, nan_for_zero, high_halves_lost], ids=lambda f: f.__name__)
def test_a_fault_in_a_word_is_seen(monkeypatch, fault):
    _cooperate(monkeypatch, units=8)
    monkeypatch.setattr(cooperative, "pack", fault)
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(partial(example_of, (3, 3, 3, 13), "plain"), "triton", torch.float16, seeds=1)


@triton.jit
def one_program_left_out(
    first, second, pairs_ptr, batch, in_batch, phase, error_ptr, step,
    H: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, POLL_LIMIT: tl.constexpr,
):  # fmt: skip
    found = exchange_pairs(
        first, second, pairs_ptr, batch, in_batch, phase, error_ptr, step, H, UNITS, WARPS, POLL_LIMIT
    )
    is_first = tl.arange(0, 32 * WARPS) % (4 * WARPS) == 0
    return (tl.where(is_first, 0.0, found[0]), tl.where(is_first, 0.0, found[1]), *found[2:])


exchange_pairs = cooperative.exchange_pairs


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", ["hh", "c"])
def test_a_program_that_a_norm_leaves_out_is_seen(monkeypatch, norm, direction):
    _cooperate(monkeypatch, units=4)
    run = launch.launch_kernel

    def run_with_the_fault(kernel, grid, **arguments):
        there = direction in kernel.__name__
        monkeypatch.setattr(cooperative, "exchange_pairs", one_program_left_out if there else exchange_pairs)
        run(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", run_with_the_fault)
    given = example(3, 2, 3, 8, norms=(norm,))
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(lambda seed: given, "triton", torch.float32, seeds=1, yardstick="reference")


@triton.jit
def never_publish(at, words, mask):
    pass


@triton.jit
def meet_one_more(arrivals_ptr, times, poll_limit, error_ptr, step):
    return exchange.grid_barrier(arrivals_ptr, times + 1, poll_limit, error_ptr, step)


@pytest.mark.parametrize(
    ("family", "name", "fault", "kernel"),
    [
        (cooperative, "publish", never_publish, "lstm_cooperative_forward_kernel"),
        (cooperative, "in_phase", one_phase, "lstm_cooperative_backward_kernel"),
        (step, "grid_barrier", meet_one_more, "lstm_step_forward_kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_waiting_in_vain_ends_and_is_reported(monkeypatch, family, name, fault, kernel):
    if family is step:
        _meet(monkeypatch)
    else:
        _cooperate(monkeypatch, units=4)
    run = launch.launch_kernel

    def run_with_the_fault(its, grid, **arguments):
        """Few polls for the faulty kernel alone: how many others need depends on who is scheduled when."""
        with monkeypatch.context() as patch:
            if its.__name__ == kernel:
                patch.setattr(family, name, fault)
                arguments["POLL_LIMIT"] = 20
            run(its, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", run_with_the_fault)
    tensors = [None if t is None else t.float().requires_grad_() for t in example(5, 3, 3, 8).tensors]
    x, h0, c0, *weights = tensors
    h, _ = lstm_layer(x, weights, (h0, c0), backend="triton")
    if "backward" in kernel:
        h.sum().backward()
    monkeypatch.undo()
    launch.forget()
    with pytest.raises(RuntimeError, match=rf"{kernel} timed out at step \d"):
        lstm_layer(x, weights, (h0, c0), backend="triton")
    lstm_layer(x, weights, (h0, c0), backend="triton")  # reported once
