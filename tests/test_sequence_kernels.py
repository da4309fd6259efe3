"""Programs and threads that wait for each other: broken exchanges and barriers are detected, and waiting ends.

What they compute where nothing is broken is in test_layer.
"""

import threading
import time

import oracle
import pytest
import torch
import triton.language as tl
from comparing import assert_as_good_as_torch, check, example
from places import INTERPRETED, cooperative, forget, resident, step

from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.problem import Recurrence
from gpu_lstm.kernels.triton_lstm import cooperative as cooperative_kernels
from gpu_lstm.kernels.triton_lstm import exchange, launch
from gpu_lstm.kernels.triton_lstm import step as step_kernels

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="compiled kernels hold their device functions"),
    pytest.mark.usefixtures("nan_in_fresh_memory"),
]
F32, F16 = torch.float32, torch.float16


def against_the_reference(given, dtype=F32, **how) -> None:
    assert_as_good_as_torch(lambda seed: given, "triton", dtype, seeds=1, yardstick="reference", **how)


def test_programs_of_a_norm_wait_for_each_other_where_every_step_is_reset(monkeypatch):
    """No step needs the h of others, but nobody may run ahead of one who has yet to read the numbers of his units."""
    cooperative(monkeypatch, units=4)
    load = exchange.load_volatile

    def load_late(at, left, GROUPS, SIZE, STRIDE):
        if SIZE == 2 and threading.current_thread().index[0] == 0:
            time.sleep(0.1)
        return load(at, left, GROUPS, SIZE, STRIDE)

    monkeypatch.setattr(exchange, "load_volatile", load_late)
    against_the_reference(example(4, 2, 3, 11, resets=1.0, norms=("c",)))


@pytest.mark.parametrize("family", [step, resident, cooperative], ids=lambda family: family.__name__)
def test_the_cell_is_kept_in_float32(monkeypatch, family):
    """In float16, too: c, saved and final, is that of a recurrence in float32, to float32's accuracy.

    W_hh is zero, so that the rounding of h plays no part.
    """
    family(monkeypatch)
    steps, batch, hidden = 12, 3, 8
    gates = example(steps, batch, 4 * hidden, hidden).rounded(F16).tensors[0]
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


@pytest.mark.parametrize("pattern", [-1, float("nan")], ids=["the sentinel's", "the usual"])
@pytest.mark.parametrize(("dtype", "bits"), [(F32, torch.int32), (F16, torch.int16)], ids=str)
def test_a_nan_in_the_data_is_not_waited_for(monkeypatch, dtype, bits, pattern):
    """A NaN is data, also one with the bit pattern that stands for data which is not there."""
    cooperative(monkeypatch, units=4)
    nan = torch.tensor(pattern, dtype=bits).view(dtype) if pattern == -1 else pattern
    given = example(4, 3, 3, 8)
    x, h0, c0, *weights = (None if t is None else t.to(dtype) for t in given.tensors)
    h0[0, :2], x[1, 1, 0] = nan, nan
    ours, _ = lstm_layer(x, weights, (h0, c0), backend="triton")
    theirs, _ = lstm_layer(x, weights, (h0, c0), backend="torch")
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert not ours[:, 2].isnan().any()


# A broken exchange must be detected.


# Faults are plain functions: what calls them runs in the interpreter, where constants are numbers.


def announce_early(at, words, mask):
    tl.store(at, tl.zeros_like(words), mask=mask)  # the data come later
    tl.debug_barrier()
    exchange.publish(at, words, mask)


def missing_in_the_last_word(words, left, phase, COUNT, SIZE, STRIDE, PHASED):
    if PHASED:  # where a word of the wrong phase keeps its partners waiting
        return count_missing(words, left, phase, COUNT, SIZE, STRIDE, PHASED)
    last = left - (COUNT - 1) // SIZE * STRIDE - (COUNT - 1) % SIZE
    return count_missing(words[COUNT - 1 :], last, phase, 1, 1, 1, PHASED)


def nothing_missing(words, left, *_):
    return tl.sum(left) * 0


def any_phase(*words_and_constants):
    return count_missing(*words_and_constants[:-1], False)


def one_phase(words, phase):
    return words & -2


count_missing = exchange.count_missing  # without a fault


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "fault", "norms"),
    [
        pytest.param(exchange, "count_missing", count_missing, (), id="none"),
        pytest.param(cooperative_kernels, "publish", announce_early, (), id="published before the data"),
        pytest.param(exchange, "count_missing", nothing_missing, (), id="no repeated load"),
        pytest.param(exchange, "count_missing", missing_in_the_last_word, (), id="one word is looked at"),
        pytest.param(exchange, "count_missing", any_phase, (), id="the phase is not looked at"),
        pytest.param(exchange, "count_missing", any_phase, ("hh",), id="nor that of a norm of W_hh h"),
        pytest.param(exchange, "count_missing", any_phase, ("c",), id="nor that of a norm of c"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_broken_exchange_is_detected(monkeypatch, module, name, fault, norms, dtype):
    cooperative(monkeypatch, units=4, yield_rate=0.3)
    monkeypatch.setattr(module, name, fault)

    def is_detected(seed: int) -> bool:
        given, yardstick = example(6, 3, 3, 8, norms=norms, seed=seed), "reference" if norms else "torch"
        try:
            assert_as_good_as_torch(lambda _: given, "triton", dtype, seeds=1, yardstick=yardstick)
        except AssertionError:
            return True
        return False

    there = fault is not count_missing
    assert any(map(is_detected, range(12 if there else 2))) is there, "programs run in another order at each"


def no_barrier(arrivals_ptr, times, poll_limit, error_ptr, step):
    return poll_limit


@pytest.mark.parametrize("projected", [0, 5])
def test_a_barrier_that_does_not_wait_is_detected(monkeypatch, projected):
    step(monkeypatch, yield_rate=0.3)
    monkeypatch.setattr(step_kernels, "grid_barrier", no_barrier)
    with pytest.raises(AssertionError):
        check((9, 3, 3, 40, projected), "plain", "triton", F32, seeds=5)  # in one order or another


def halves_in_the_other_order(x, DTYPE):
    words = exchange.pack(x, DTYPE)
    return (words << 16) | ((words >> 16) & 0xFFFF)


def nan_for_zero(x, DTYPE):  # only units past H are zero
    return exchange.pack(tl.where(x == 0.0, float("nan"), x), DTYPE)


def high_halves_lost(x, DTYPE):
    return exchange.pack(x, DTYPE) & 0xFFFF


@pytest.mark.parametrize("fault", [halves_in_the_other_order, nan_for_zero, high_halves_lost], ids=lambda f: f.__name__)
def test_a_fault_in_a_word_is_detected(monkeypatch, fault):
    cooperative(monkeypatch, units=8)
    monkeypatch.setattr(cooperative_kernels, "pack", fault)
    with pytest.raises(AssertionError):
        check((3, 3, 3, 13), "plain", "triton", F16, seeds=1)


def one_program_left_out(*given):
    found, (*_, WARPS, _) = exchange_pairs(*given), given
    is_first = tl.arange(0, 32 * WARPS) % (4 * WARPS) == 0
    return (tl.where(is_first, 0.0, found[0]), tl.where(is_first, 0.0, found[1]), *found[2:])


exchange_pairs = cooperative_kernels.exchange_pairs


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", ["hh", "c"])
def test_a_program_that_a_norm_leaves_out_is_detected(monkeypatch, norm, direction):
    cooperative(monkeypatch, units=4)
    run = launch.launch_kernel

    def run_with_the_fault(kernel, grid, **arguments):
        there = direction in kernel.__name__
        monkeypatch.setattr(cooperative_kernels, "exchange_pairs", one_program_left_out if there else exchange_pairs)
        run(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", run_with_the_fault)
    with pytest.raises(AssertionError):
        against_the_reference(example(3, 2, 3, 8, norms=(norm,)))


def never_publish(at, words, mask):
    pass


def one_barrier_more(arrivals_ptr, times, poll_limit, error_ptr, step):
    return exchange.grid_barrier(arrivals_ptr, times + 1, poll_limit, error_ptr, step)


@pytest.mark.parametrize(
    ("family", "name", "fault", "kernel"),
    [
        (cooperative_kernels, "publish", never_publish, "lstm_cooperative_forward_kernel"),
        (cooperative_kernels, "in_phase", one_phase, "lstm_cooperative_backward_kernel"),
        (step_kernels, "grid_barrier", one_barrier_more, "lstm_step_forward_kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wait_that_times_out_ends_and_is_reported(monkeypatch, family, name, fault, kernel):
    if family is step_kernels:
        step(monkeypatch)
    else:
        cooperative(monkeypatch, units=4)
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
    forget()
    with pytest.raises(RuntimeError, match=rf"{kernel} timed out at step \d"):
        lstm_layer(x, weights, (h0, c0), backend="triton")
    lstm_layer(x, weights, (h0, c0), backend="triton")  # reported once
