"""Measured plans: a first call finds the fastest. A broken file stops no call, and nothing written is lost."""

import ctypes
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from standing_in import CUDA, H100, as_another_process

import gpu_lstm
from gpu_lstm.kernels import cache, contract, timeouts, triton_rnn
from gpu_lstm.kernels.layer import Layer, kept_layer
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.plans.choose import always, keep_measured, measured_plan, plans
from gpu_lstm.verification import timing

PROBLEM = Problem(2, 16, 768, torch.bfloat16)
PLAN = plans(PROBLEM, H100, False)[0]


@pytest.fixture(autouse=True)
def folder(nothing_cached):
    return nothing_cached / cache.PLANS


def _entry(without=""):
    fields = {name: value for name, value in PLAN.as_json().items() if name != without}
    return json.dumps({"key": choose._key(PROBLEM, H100, False), "value": fields})


KEYS = [  # changes of a problem for which another plan may be the fastest
    dict(batch=17), dict(hidden=769), dict(dtype=torch.float16), dict(projected=64), dict(precision="tf32"),
    dict(side_by_side=2), dict(dropout_h=True), dict(zoneout_h=0), dict(zoneout_c=3), dict(gain_hh=True),
    dict(gain_c=True), dict(cell="gru"), dict(heads=3), dict(steps=1), dict(lengths=torch.int64, resets=True),
]  # fmt: skip
NO_KEYS = [  # changes for which the same plan is the fastest
    dict(reverse=True), dict(lengths=torch.int64), dict(resets=True), dict(reset_h=True),
    dict(reset_c=True), dict(weight_peephole=True), dict(bias_c=True), dict(bias_hh=True), dict(known_h=True),
]  # fmt: skip
assert {name for change in (*KEYS, *NO_KEYS) for name in change} == set(Problem._fields)


def test_a_measured_plan_is_read_until_it_is_measured_again(monkeypatch):
    """Results are read once in a process, and again after each that is written. A result counts only for its card,
    versions and sources."""
    assert measured_plan(PROBLEM, H100, False) is None
    for plan in plans(PROBLEM, H100, False)[:2]:
        keep_measured(PROBLEM, H100, False, plan)
        assert measured_plan(PROBLEM, H100, False) == plan
    for change in (dict(name="another"), dict(multiprocessors=66)):
        assert measured_plan(PROBLEM, dataclasses.replace(H100, **change), False) is None
    for place, name, other in ((choose.triton, "__version__", "0.0"), (cache, "sources", lambda *_: "others")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            assert measured_plan(PROBLEM, H100, False) is None


def test_a_plan_is_for_one_kind_of_problem():
    keep_measured(PROBLEM, H100, False, PLAN)
    for change in (*KEYS, *NO_KEYS):
        expected = None if change in KEYS else PLAN
        assert measured_plan(PROBLEM._replace(**change), H100, False) == expected, change
    keep_measured(one := PROBLEM._replace(steps=1), H100, False, always(one, H100, False))
    assert measured_plan(PROBLEM, H100, False) == PLAN, "whatever is the fastest for a single step"


def test_a_finding_is_of_one_card_with_its_driver_and_packages(monkeypatch):
    """Each of them may change which backend is faster, or which kernel is right. A result found with another one does
    not count."""
    facts = dict.fromkeys(("card", "driver", "torch", "cuDNN", "triton", "cupy", "NVRTC", "gpu_lstm"), "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: facts["card"])
    driver = SimpleNamespace(cuDriverGetVersion=lambda version: setattr(version._obj, "value", int(facts["driver"])))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: facts["cuDNN"])
    monkeypatch.setattr(triton_rnn, "version_of", lambda package: facts[package])
    nvrtc = SimpleNamespace(getVersion=lambda: facts["NVRTC"])
    monkeypatch.setattr(cache, "sources", lambda *names: facts["gpu_lstm"])

    def machine():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "__version__", facts["torch"])
            cupy = SimpleNamespace(__version__=facts["cupy"], cuda=SimpleNamespace(nvrtc=nvrtc))
            patch.setitem(sys.modules, "cupy", cupy)
            cache.machine.cache_clear()
            found = [contract.machine_of(backend, CUDA) for backend in ("triton", "cupy")]
            cache.machine.cache_clear()
            return found[0] | found[1] | {"NVRTC": "".join(found[1]["NVRTC"])}

    for name in facts:
        before, facts[name] = machine(), "2"
        assert {other for other in facts if machine()[other] != before[other]} == {name}


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A copy of the sources in the folders of a checkout, from which the digest is computed."""
    tmp_path = tmp_path / "checkout"
    for name in ("gpu_lstm", "kernels"):
        shutil.copytree(Path(__file__).parents[1] / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(gpu_lstm, "__path__", [str(tmp_path / "gpu_lstm"), str(tmp_path)])
    yield tmp_path
    _forget_sources()


def _forget_sources():
    for function in (cache.sources, cache.machine):
        function.cache_clear()  # as in another process


def _digests():
    _forget_sources()
    return cache.sources("kernels"), cache.machine(torch.device("cpu"))["gpu_lstm"]


def test_what_was_found_ends_with_an_edit_of_what_decided_it(checkout):
    """Measured plans end with an edit of the kernels. Verdicts and races also end with an edit of the code that
    surrounds and judges the kernels."""
    for file, ends in (
        ("kernels/triton_rnn/equations.py", (True, True)), ("gpu_lstm/backends/fused.py", (False, True)),
        ("kernels/cupy_rnn/cuda/equations.cu", (True, True)), ("gpu_lstm/equations/gru.py", (False, True)),
        ("kernels/cells.py", (True, True)), ("gpu_lstm/dispatch/race.py", (False, True)),
        ("gpu_lstm/keras/convert.py", (False, False)), ("kernels/notes.txt", (False, False)),
    ):  # fmt: skip
        before = _digests()
        with (checkout / file).open("a") as text:
            text.write("#")
        assert tuple(a != b for a, b in zip(before, _digests())) == ends, file


def test_a_wheel_and_a_checkout_of_the_same_sources_share_results(checkout, monkeypatch):
    before = _digests()
    (checkout / "kernels").rename(checkout / "gpu_lstm/kernels")
    monkeypatch.setattr(gpu_lstm, "__path__", [str(checkout / "gpu_lstm")])
    assert _digests() == before


BROKEN = ("", _entry()[:-40], "[]", "null", "{}", '{"key": 1, "value": {}}', "\udcff\udcfe", _entry(without="rows"),
          _entry(without="family"), _entry().replace("768", "769"))  # fmt: skip


def test_a_broken_entry_is_ignored_with_a_warning_and_written_again(folder):
    for text in BROKEN:
        keep_measured(PROBLEM, H100, False, PLAN)
        assert measured_plan(PROBLEM, H100, False) == PLAN
        (file,) = folder.glob("*.json")
        file.write_bytes(text.encode(errors="surrogateescape"))
        for function in (cache._read, cache.warn_once):
            function.cache_clear()  # as in another process
        with pytest.warns(UserWarning, match="ignored"):
            assert measured_plan(PROBLEM, H100, False) is None


def test_a_folder_that_is_a_file_stops_nobody_and_is_named_once(folder, recwarn):
    folder.write_text("")
    with pytest.warns(UserWarning, match="nothing is kept for the next process"):
        keep_measured(PROBLEM, H100, False, PLAN)
    with pytest.warns(UserWarning, match="ignored"):
        assert measured_plan(PROBLEM, H100, False) is None
    keep_measured(PROBLEM, H100, False, PLAN)
    assert not recwarn.list


def _keep_many(first):
    for number in range(first, first + 15):
        cache.write(cache.PLANS, {"number": number}, PLAN.as_json())


def test_many_who_write_at_once_lose_nothing(folder):
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("fork")) as executor:
        list(executor.map(_keep_many, range(0, 90, 15)))
    cache._read.cache_clear()
    assert [cache.read(cache.PLANS, {"number": number}) for number in range(90)] == [PLAN.as_json()] * 90
    assert list(folder.glob("*.unfinished")) == []


# Timing


class Timed:
    """A card on which each plan takes seconds(plan, round), and which records the runs."""

    def __init__(self, monkeypatch):
        self.now, self.runs, self.seconds = 0.0, [], lambda plan, number: 1.0
        self.verify, self.patch = Mock(return_value=None), monkeypatch
        monkeypatch.setattr(launch, "prepare_run", self.prepare_run)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setitem(timeouts._words, CUDA, timeouts._Words(torch.device("cpu")))

    def prepare_run(self, problem, device, pass_, plan):
        def run():
            self.runs.append(plan)
            self.now += self.seconds(plan, self.runs.count(plan))

        return run

    def chosen(self, problem=PROBLEM, backward=False):
        """Return the plan that a new process chooses."""
        as_another_process()
        self.runs.clear()
        return self.layer(problem).prepared(Pass(backward), GIVEN).plan

    def layer(self, problem=PROBLEM):
        return kept_layer(launch, problem, CUDA, self.verify, timing.timer)


GIVEN = launch.call_of(PROBLEM, torch.device("meta"))[1].inputs
FIRST, SECOND, THIRD, *_ = plans(PROBLEM, H100, False)
STEP = next(plan for plan in plans(PROBLEM, H100, False) if plan.family.name == "step")
SLOW = {FIRST: 3.0, SECOND: 1.0, THIRD: 2.0}


@pytest.fixture
def timed(an_h100, monkeypatch):
    timed = Timed(monkeypatch)
    timed.seconds = lambda plan, number: SLOW.get(plan, 1.0)
    return timed


def test_the_fastest_of_the_first_plans_is_found_and_used_from_then_on(timed, caplog):
    """Other batches that share its kernels, up to the same power of two of sequences, use it, too, until the cache is
    cleared."""
    caplog.set_level("INFO", "gpu_lstm")
    assert timed.chosen() == SECOND
    assert timed.runs == [FIRST, SECOND, THIRD] * timing.ROUNDS, "in turns"
    assert f"{SECOND.family.name} {SECOND.rows}x{SECOND.units} 1e+03 ms" in caplog.text
    assert timed.layer().chosen(Pass())[:2] == (SECOND, True)
    for batch in (16, 15, 9):
        assert timed.chosen(PROBLEM._replace(batch=batch, reverse=True)) == SECOND.fitted(PROBLEM._replace(batch=batch))
        assert timed.runs == []
    first, second, *_ = plans(PROBLEM, H100, True)
    timed.seconds = lambda plan, number: 2 - (plan == second)
    assert timed.chosen(backward=True) == second != first
    assert (timed.chosen(), timed.runs) == (SECOND, []), "forward is another matter"
    cache.remove(cache.PLANS)
    assert timed.chosen() == FIRST, "of equal ones"


def test_on_a_card_that_another_job_shares_the_least_time_counts(timed):
    """The load on the card does not matter. Here the fastest plan is undisturbed in one round only, and has the largest
    median."""
    timed.seconds = lambda plan, number: SLOW[plan] + 10 * (plan == SECOND and number != 5) + 9 * (number % 3 == 0)
    assert timed.chosen() == SECOND


def test_a_plan_whose_timing_fails_is_not_used_and_nothing_is_kept(timed, monkeypatch, caplog):
    """The plan times out while it runs, or in its last launch. It may be chance that only this one failed."""

    def seconds(plan, number):
        if plan == SECOND and number == 2:
            raise RuntimeError("cooperative_forward_kernel timed out at step 1")
        return SLOW.get(plan, 5.0)

    def late(plan, number):
        if plan == SECOND:
            timeouts.error_word(CUDA, "kernel")[0] = 4
        return SLOW.get(plan, 5.0)

    caplog.set_level("INFO", "gpu_lstm")
    for timed.seconds in (seconds, late):
        assert timed.chosen() == THIRD
        assert timed.runs[-2:] == [FIRST, THIRD]
        assert measured_plan(PROBLEM, H100, False) is None
    for said in ("timed out at step 1", "timed out at step 3"):
        assert said in caplog.text
    timed.seconds = Mock(side_effect=RuntimeError("too many blocks"))
    assert timed.chosen() == STEP, "if all fail, what always works"
    timed.verify.side_effect = lambda layer, pass_, inputs, plan: "wrong" if plan == STEP else None
    with pytest.raises(contract.NoKernel, match=r"cooperative 8x16: RuntimeError: too many blocks.*step .*: wrong"):
        timed.chosen()
    timed.seconds = Mock(side_effect=torch.AcceleratorError("illegal memory access"))
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        timed.chosen()


def test_an_earlier_launch_that_timed_out_is_no_fault_of_the_plan_that_is_timed(timed):
    timeouts.error_word(CUDA, "kernel")[0] = 4
    with pytest.raises(RuntimeError, match="timed out at step 3"):
        timed.chosen()
    assert timed.runs == []


def test_where_memory_is_full_another_plan_is_used_or_another_backend_until_the_next_call(timed):
    full = {FIRST, SECOND}

    def prepare_run(problem, device, pass_, plan):
        if plan in full:
            raise torch.OutOfMemoryError("full")
        return Timed.prepare_run(timed, problem, device, pass_, plan)

    timed.patch.setattr(launch, "prepare_run", prepare_run)
    assert timed.chosen() == THIRD
    assert measured_plan(PROBLEM, H100, False) is None
    full.add(THIRD)
    with pytest.raises(torch.OutOfMemoryError):
        timed.chosen()
    kept = timed.layer()
    with pytest.warns(UserWarning, match="memory is full, where a kernel has to be verified or timed"):
        assert not kept.has_kernel(Pass(), GIVEN)
    full.clear()
    assert kept.has_kernel(Pass(), GIVEN)
    assert kept.chosen(Pass()).plan == SECOND


def on_trial(problem):
    return Layer(problem, CUDA, launch, trial=FIRST)


def only_the_third(layer, pass_, inputs, plan):
    return None if plan == THIRD else "wrong"


WITHOUT_TIMING = {  # blocks
    "in a capture": lambda timed: patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    "racing is off": lambda timed: gpu_lstm.racing("off"), "races are read": lambda timed: gpu_lstm.racing("read"),
    "launches block": lambda timed: patch.dict(os.environ, CUDA_LAUNCH_BLOCKING="1"),
    "profiled": lambda timed: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "nothing is verified": lambda timed: patch.object(timed, "verify", None),
    "the others are wrong": lambda timed: patch.object(timed, "verify", only_the_third),
    "there is one plan": lambda timed: patch.object(choose, "candidates", lambda *_: [FIRST]),
    "on trial": lambda timed: patch.object(timed, "layer", on_trial),
}  # fmt: skip


@pytest.mark.parametrize("when", WITHOUT_TIMING)
def test_when_nothing_is_timed(timed, when):
    """The first plan that is right runs then."""
    with WITHOUT_TIMING[when](timed):
        assert timed.chosen() == (THIRD if when == "the others are wrong" else FIRST)
    assert timed.runs == []
    assert measured_plan(PROBLEM, H100, False) is None


def test_each_plan_is_compiled_on_the_device_and_a_line_says_how_many(timed, monkeypatch, caplog):
    """A plan that does not compile is not used, for the reason of its error. test_rehearsal.py tests that plans are
    compiled side by side."""
    told, loaded, on = threading.Event(), [], []
    load, warning = choose.load, choose.logger.warning

    def compile_all(device, launches):
        on.append(device)
        assert told.wait(20)
        if SECOND.units == launches[0].arguments["S"].UNITS:
            raise ValueError("M, N, K >= 16")

    monkeypatch.setattr(choose, "compile_all", compile_all)
    monkeypatch.setattr(choose, "load", lambda *given: loaded.append(given[-1]["S"].UNITS) or load(*given))
    monkeypatch.setattr(choose, "SLOW_S", 0.0)
    monkeypatch.setattr(choose.logger, "warning", lambda *line: (warning(*line), told.set()))
    caplog.set_level("INFO", "gpu_lstm")
    assert timed.chosen() == THIRD
    assert (on, loaded) == ([CUDA] * choose.MOST, [FIRST.units, THIRD.units])
    assert "compiling 3 of at most 4 plans for LSTM, H = 768, torch.bfloat16; Triton keeps the result" in caplog.text
    assert "ValueError: M, N, K >= 16" in caplog.text


def test_a_plan_in_a_file_that_nobody_proposes_is_not_used(timed):
    """Its numbers may fit no problem, and its kernel was verified with others."""
    keep_measured(PROBLEM, H100, False, THIRD)
    assert (timed.chosen(), timed.runs) == (THIRD, [])
    odd = dict(rows="8"), dict(family="odd"), dict(family="step"), dict(chunks=None), dict(surprise=1)
    for change in (dict(programs=1), dict(groups=9), dict(tiles_per_program=7), dict(rows=16), *odd):
        cache.write(cache.PLANS, choose._key(PROBLEM, H100, False), THIRD.as_json() | change)
        assert timed.chosen() == SECOND, "the others are timed again"
