"""Modules, states, caches and settings stay whole where a launch raises, memory runs out, Ctrl-C comes at any line of
ours, or two threads run at once."""

import contextlib
import copy
import functools
import linecache
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from comparing import KERNELS_HERE, PLACES
from pairs import random_inputs, results, seeded
from subjects import SUBJECTS
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gpu_lstm
from gpu_lstm.call import choices, isolation
from gpu_lstm.call.choices import Backend, Racing, requested_backend, requested_racing
from gpu_lstm.dispatch import race
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.race import Decision
from gpu_lstm.kernels import cache, timeouts
from gpu_lstm.kernels.process_settings import Setting, precision
from gpu_lstm.tools import stream as stream_module

T, B, I, H = 3, 2, 2, 4
OURS = tuple(str(Path(module.__file__).parent) for module in (gpu_lstm, cache))
KERNELS = re.compile(r"kernels/triton_rnn/(?!launch|plans/choose)")  # and files that only these call


@dataclass
class Line:
    """Raises KeyboardInterrupt at one executed line of this package, by its number. Without a number it only counts the
    lines."""

    number: int | None = None
    seen: int = 0

    def trace(self, frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(OURS) or KERNELS.search(file):
            return None
        # At the end of a block its first line is reported again, before the block is left. No signal is taken there.
        if event == "line" and not linecache.getline(file, frame.f_lineno).lstrip().startswith("with "):
            self.seen += 1
            if self.seen == self.number:
                raise KeyboardInterrupt
        return self.trace


@contextmanager
def traced(line):
    before = sys.gettrace()
    sys.settrace(line and line.trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted_at(call, most):
    """Call again and again, each time interrupted at another line. With many lines, about `most` of them, evenly
    spread, are tried."""
    whole = Line()
    with traced(whole):
        call()
    assert whole.seen > 3
    for number in range(1, whole.seen + 1, max(1, whole.seen // most)):
        with pytest.raises(KeyboardInterrupt), traced(Line(number)):
            call()
        yield number


def assert_all_or_nothing(restore, act, held, most=1000):
    """Check that an action, interrupted at any line, has changed all of the state or none of it. `restore` undoes the
    action."""

    def call():
        with traced(None):
            restore()
            assert held() == before
        act()

    restore()
    before = held()
    act()
    after = held()
    assert before != after
    for number in interrupted_at(call, most):
        assert held() in (before, after), number


def numbers(tensors):
    return [t.numpy().tobytes() for t in tree_leaves(tensors)]


assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "kind"), [
    ("torch", "deep"), ("reference", "stack"), ("torch", "cell"),
    (KERNELS_HERE, "stack"),
])  # fmt: skip
def test_after_an_interrupt_the_next_call_is_right(backend, kind):
    module = SUBJECTS[kind](backend=backend, **PLACES[backend])
    ragged = {} if kind == "cell" else dict(lengths=torch.tensor([T, 1]))
    call = functools.partial(results, module, *random_inputs(module, B, steps=T), **ragged)
    before, expected, names = copy.deepcopy(module.state_dict()), call(), sorted(vars(module))
    for _ in interrupted_at(call, most=15):
        assert (sorted(vars(module)), choices.chosen_backends[0].value) == (names, None)
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (True, False)
        assert_equal(call(), expected)
    assert_equal(module.state_dict(), before)


ACTS = {
    "step": lambda stream, x: stream(x[0]), "chunk": lambda stream, x: stream(x),
    "reset": lambda stream, x: stream.reset(),
    "reset some": lambda stream, x: stream.reset(torch.tensor([True, False])),
}  # fmt: skip


@pytest.mark.parametrize(("backend", "kind"), [("torch", "projected"), ("reference", "stack")])
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_an_interrupted_stream_has_taken_the_step_or_not(backend, kind, act):
    stream, x = gpu_lstm.Stream(SUBJECTS[kind](backend=backend).eval(), B), torch.randn(T, B, I)
    stream(x)
    restore = functools.partial(setattr, stream, "state", stream.state)
    assert_all_or_nothing(restore, lambda: act(stream, x), lambda: numbers(stream.state), most=40)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), KeyboardInterrupt()])
def test_a_capture_that_fails_leaves_the_stream_as_it_was(error, monkeypatch):
    def captured(step, device):
        for _ in range(3):
            step()
        raise error

    lstm, x = gpu_lstm.LSTM(I, H, backend="reference").eval(), torch.randn(T, B, I)
    stream = gpu_lstm.Stream(lstm, B)
    stream(x[:2])
    monkeypatch.setattr(stream_module, "on_cuda", lambda x: True)
    monkeypatch.setattr(stream_module, "captured", captured)
    with pytest.raises(type(error)):
        stream(x[2])
    monkeypatch.setattr(stream_module, "captured", lambda step, device: step)
    torch.testing.assert_close(stream(x[2]), lstm(x)[0][2])


@pytest.mark.parametrize(("convert", "back"), [
    (gpu_lstm.convert, gpu_lstm.to_torch), (gpu_lstm.to_torch, gpu_lstm.convert),
])  # fmt: skip
def test_a_conversion_that_is_interrupted_or_raises_is_whole_or_not_there(convert, back):
    b = nn.Sequential(nn.LSTMCell(H, H), nn.Linear(H, 2))
    given = back(nn.ModuleDict({"a": nn.LSTM(I, H), "b": b, "c": nn.LSTM(I, 2)}))

    def parts():
        children = {name: type(child) for name, child in given.named_modules()}
        return children, {name: id(p) for name, p in given.named_parameters()}

    assert_all_or_nothing(lambda: back(given), lambda: convert(given), parts)
    back(given)
    before, of_c = parts(), given["c"]._parameters
    given["c"].__dict__["_parameters"] = None  # broken, as by a subclass of Module that went wrong
    with pytest.raises(AttributeError):
        convert(given)
    given["c"].__dict__["_parameters"] = of_c
    assert parts() == before


@pytest.mark.parametrize(("name", "text"), [("forget_bias", "bias=False"), ("keras_init", "Fan in")])
def test_initial_values_are_for_all_or_for_none(name, text):
    """All modules keep their values where one in the middle cannot have new ones. Interrupted, all or none have new
    values."""
    set_values = getattr(gpu_lstm.keras, name)
    wrong = nn.ModuleList([gpu_lstm.LSTM(I, H), gpu_lstm.LSTM(I, H, bias=name == "keras_init")])
    if name == "keras_init":
        wrong[1].weight_ih_l0 = nn.Parameter(torch.zeros(4))
    before = numbers(wrong.state_dict())
    with pytest.raises(ValueError, match=text):
        set_values(wrong)
    assert numbers(wrong.state_dict()) == before

    given = nn.ModuleList([gpu_lstm.LSTM(I, H), gpu_lstm.LSTMCell(I, H)])
    first = copy.deepcopy(given.state_dict())

    def restore():
        torch.manual_seed(1)
        given.load_state_dict(first)

    assert_all_or_nothing(restore, lambda: set_values(given), lambda: numbers(given.state_dict()))


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_result_that_is_written_in_part_leaves_no_file(error, nothing_cached, monkeypatch):
    def dump(value, file, **options):
        file.write("{")
        raise error

    monkeypatch.setattr(cache.json, "dump", dump)
    with pytest.warns(UserWarning, match=str(error)) if isinstance(error, OSError) else pytest.raises(type(error)):
        cache.write("checks", {"card": "interrupted"}, "right")
    assert list((nothing_cached / "checks").iterdir()) == []


@pytest.mark.parametrize("at", range(8))
def test_blocks_that_are_interrupted_as_they_open_or_close_leave_nothing_behind(monkeypatch, at):
    """There are four blocks. Two of them are the same object, entered again while it is open. Each is interrupted as it
    opens and as it closes."""

    class Interrupted(list):
        def insert(self, k, element):
            super().insert(k, element)
            interrupt()

        def remove(self, element):
            super().remove(element)
            interrupt()

    interrupt = Mock(side_effect=[*[None] * at, KeyboardInterrupt, *[None] * 8])
    blocks = Interrupted(choices.chosen_backends)
    monkeypatch.setattr(choices, "chosen_backends", blocks)
    block = gpu_lstm.backend("reference")
    with pytest.raises(KeyboardInterrupt), gpu_lstm.backend("torch"), block, gpu_lstm.backend("torch"), block:
        pass
    assert (len(blocks), requested_backend(None)) == (1, Backend.AUTO)


def in_a_thread(call, *arguments):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *arguments).result()


@pytest.mark.parametrize("run", [lambda call, *arguments: call(*arguments), in_a_thread], ids=["one thread", "many"])
def test_overlapping_blocks_leave_nothing_behind(run):
    """The test fixes the order, so that no scheduler has an influence."""

    def choosing(value):
        with gpu_lstm.racing(value.value):
            yield requested_racing()

    chosen, by_default = [Racing.OFF, Racing.READ, Racing.OFF], requested_racing()
    first, second, third = map(choosing, chosen)
    assert [run(next, block) for block in (first, second, third)] == chosen
    run(third.close)
    run(first.close)
    assert run(requested_racing) is Racing.READ
    del second  # never run to its end
    assert run(requested_racing) is by_default


def test_a_block_holds_for_the_backward_that_runs_in_it():
    """This holds in whatever thread autograd runs it. The backend that computed a checkpoint computes it again, with
    the same random numbers, to the bit."""
    lstm, x, seen = gpu_lstm.LSTM(I, H, 2, dropout=0.5), torch.randn(T, B, I, requires_grad=True), []

    def checkpointed(x):
        seen.append(requested_backend(None))
        return lstm(x)[0]

    with gpu_lstm.backend("reference"):
        expected = torch.autograd.grad(seeded(checkpointed, x).sum(), x)[0]
        for use_reentrant in (True, False):
            y = seeded(checkpoint, checkpointed, x, use_reentrant=use_reentrant)
            x.grad = None
            in_a_thread(y.sum().backward)
            assert torch.equal(x.grad, expected)
    assert seen == [Backend.REFERENCE] * 5


@pytest.fixture
def another():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.mark.parametrize("hidden", [4, 5], ids=["the same call", "another call"])
def test_a_first_call_of_autograds_thread_does_not_wait_for_a_race_that_waits_for_it(
    monkeypatch, nothing_cached, another, hidden
):
    """On a GPU backward runs on the device's thread. It may compute a checkpoint again before it gets to the race's
    backward. The first decision about a kind of call is kept. Random numbers are as without a race."""

    lstms = {size: gpu_lstm.LSTM(3, size) for size in (4, 5)}

    def decide(hidden):
        call = lstms[hidden]._request(torch.zeros(2, 2, 3))
        return race.decide(call, kind_of(call), Backend.TRITON)

    def judge(call, *_):
        torch.rand(3)  # a race draws numbers
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
    """Open and close two blocks, the second one in a thread. The first one that opens is the first that closes."""
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
            overlap(another, isolation.alone(True), isolation.alone(True))
            assert facts() == before
            with isolation.alone(True):
                with isolation.alone(True):
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
    """Return an event that is set whenever a thread asks for the lock of `place`."""
    asked, lock, announced = threading.Event(), place.lock, MagicMock()
    announced.__enter__.side_effect = lambda: (asked.set(), lock.acquire())
    announced.__exit__.side_effect = lambda *_: lock.release()
    monkeypatch.setattr(place, "lock", announced)
    return asked


def test_exact_products_begin_after_those_of_another_thread_and_end_as_before(another, monkeypatch):
    """Otherwise a verification would undo a setting that a projection in another thread has made for a moment."""
    matmul, asked, entered = torch.backends.cuda.matmul, lock_that_announces(monkeypatch, precision), threading.Event()

    def in_another():
        with precision.held("tf32"):
            asked.clear()
            entered.set()
            asked.wait(timeout=10)

    before = matmul.fp32_precision
    other = another.submit(in_another)
    entered.wait()
    with precision.changed("ieee"):
        other.result()
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == before


def test_no_other_thread_reads_a_setting_while_it_is_set(another):
    def is_free():
        free = setting.lock.acquire(blocking=False)
        if free:
            setting.lock.release()
        return free

    found = []
    setting = Setting(lambda: 0, lambda value: found.append((value, another.submit(is_free).result())))
    with setting.changed(1), setting.held(2):
        assert not another.submit(is_free).result(), "a block that holds it is short"
    assert found == [(1, False), (2, False), (0, False), (0, False)]


def test_the_word_that_a_kernel_has_is_the_one_that_is_read(monkeypatch):
    """Another thread makes the first words of a device at the same time."""
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
