"""Two threads at once: first calls, settings of the whole process. Each test fixes the order of what they do."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import pytest
import torch

import gpu_lstm
from gpu_lstm.call import settings
from gpu_lstm.call.choices import Backend
from gpu_lstm.call.prepare import prepare
from gpu_lstm.dispatch import race
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.race import Decision
from gpu_lstm.kernels import projection, timeouts


@pytest.fixture
def another():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.mark.parametrize("hidden", [4, 5], ids=["the same call", "another call"])
def test_a_first_call_of_autograds_thread_does_not_wait_for_a_race_that_waits_for_it(
    monkeypatch, nothing_cached, another, hidden
):
    """On a GPU backward runs on the device's thread, which may compute a checkpoint again before it gets to the race's.
    Of one kind of call the first decision is kept; random numbers are as if nobody had raced."""

    lstms = {size: gpu_lstm.LSTM(3, size) for size in (4, 5)}

    def decide(hidden):
        call = prepare(lstms[hidden]._options(), lstms[hidden]._weights(), torch.zeros(2, 2, 3))
        return race.decide(call, kind_of(call), Backend.TRITON)

    def judge(call, *_):
        torch.rand(3)  # as a race draws
        if threading.current_thread() is not threading.main_thread():
            return Decision(Backend.TRITON, "first")
        others.append(another.submit(decide, hidden).result(timeout=600))
        return Decision(Backend.TORCH, "second")

    others = []
    monkeypatch.setattr(race, "_race", judge)
    before = torch.get_rng_state()
    decision = decide(4)
    assert others == [Decision(Backend.TRITON, "first")]
    assert decision == (others[0] if hidden == 4 else Decision(Backend.TORCH, "second"))
    assert torch.equal(torch.get_rng_state(), before)


def overlap(another, first, second):
    """Two blocks, the second one in a thread; the first one that opens is the first that closes."""
    first.__enter__()
    another.submit(second.__enter__).result()
    first.__exit__(None, None, None)
    another.submit(second.__exit__, None, None, None).result()


def test_computations_of_our_own_that_overlap_leave_the_process_as_it_was(another):
    def facts():
        return torch.get_default_dtype(), torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()

    torch.set_default_dtype(torch.float64)
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            before = facts()
            overlap(another, settings.alone(True), settings.alone(True))
            assert facts() == before
            with settings.alone(True):
                with settings.alone(True):
                    pass
                assert facts() == (torch.float32, False, True), "the inner one ends nothing"
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_are_as_if_nobody_had_raced_where_races_overlap(another):
    def drawing():
        with race._generator(torch.device("cpu")).changed():
            torch.rand(3)
            yield
            torch.rand(3)

    before, races = torch.get_rng_state(), (contextlib.contextmanager(drawing) for _ in range(2))
    overlap(another, *(each() for each in races))
    assert torch.equal(torch.get_rng_state(), before)


def lock_that_announces(monkeypatch, place):
    """An event that is set whenever a thread asks for the lock of a module or object."""
    asked, lock, announced = threading.Event(), place.lock, MagicMock()
    announced.__enter__.side_effect = lambda: (asked.set(), lock.acquire())
    announced.__exit__.side_effect = lambda *_: lock.release()
    monkeypatch.setattr(place, "lock", announced)
    return asked


def test_products_have_their_precision_though_another_thread_asks_for_another_one(another, monkeypatch):
    matmul, asked, seen = torch.backends.cuda.matmul, lock_that_announces(monkeypatch, projection), threading.Event()

    def in_another():
        with projection.products_in("tf32"):
            asked.set()
            seen.wait()
            return matmul.fp32_precision

    before = matmul.fp32_precision
    with projection.products_in("ieee"):
        asked.clear()
        other = another.submit(in_another)
        asked.wait()
        during = matmul.fp32_precision
        seen.set()
    assert (during, other.result(), matmul.fp32_precision) == ("ieee", "tf32", before)


def test_exact_products_begin_after_those_of_another_thread_and_end_as_before(another, monkeypatch):
    """Otherwise a verification would set back what a projection in another thread has set for a moment."""
    matmul, asked, entered = torch.backends.cuda.matmul, lock_that_announces(monkeypatch, projection), threading.Event()

    def in_another():
        with projection.products_in("tf32"):
            asked.clear()
            entered.set()
            asked.wait(timeout=10)

    before = matmul.fp32_precision
    other = another.submit(in_another)
    entered.wait()
    with settings.products.changed(settings.EXACT):
        other.result()
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == before


def test_the_word_that_a_kernel_has_is_the_one_that_is_read(monkeypatch):
    """Where another thread makes the first words of a device at the same time."""
    device, made, others = torch.device("cpu"), [], []

    def words(device, real=timeouts._Words):
        made.append(None)
        if len(made) == 1:
            others.append(timeouts.error_word(device, "step_forward_kernel"))
        return real(device)

    monkeypatch.setattr(timeouts, "_words", {})
    monkeypatch.setattr(timeouts, "_Words", words)
    for word in timeouts.error_word(device, "step_backward_kernel"), *others:
        word[0] = 3
        with pytest.raises(RuntimeError, match="timed out at step 2"):
            timeouts.raise_if_timed_out(device)
