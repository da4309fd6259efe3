"""Measured plans: autotuning finds the fastest; what is broken on disk stops no call, and nothing written is lost."""

import ctypes
import dataclasses
import importlib
import json
import logging
import multiprocessing
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from standing_in import CUDA, H100

import gpu_lstm
from gpu_lstm.backends.verify import verify
from gpu_lstm.dispatch.route import forget
from gpu_lstm.kernels import cache, contract, timeouts, triton_rnn
from gpu_lstm.kernels.layer import kept_layer
from gpu_lstm.kernels.problem import Inputs, Pass, Problem, problem_of
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import autotune, choose
from gpu_lstm.kernels.triton_rnn.plans.choose import keep_measured, measured_plan, plans

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
    dict(gain_c=True), dict(cell="gru"), dict(heads=3),
]  # fmt: skip
NO_KEYS = [  # and for which it is not
    dict(steps=1), dict(reverse=True), dict(lengths=torch.int64), dict(resets=True), dict(reset_h=True),
    dict(reset_c=True), dict(weight_peephole=True), dict(bias_c=True), dict(bias_hh=True), dict(known_h=True),
]  # fmt: skip
assert {name for change in (*KEYS, *NO_KEYS) for name in change} == set(Problem._fields)


def test_a_measured_plan_is_read_until_it_is_measured_again_or_forgotten(monkeypatch):
    """Results are read once in a process, and again after each that is written or removed; where they are valid."""
    assert measured_plan(PROBLEM, H100, False) is None
    for plan in (PLAN, dataclasses.replace(PLAN, why="measured again")):
        keep_measured(PROBLEM, H100, False, plan)
        assert measured_plan(PROBLEM, H100, False) == plan.as_json()
    assert measured_plan(PROBLEM, H100, True) is None
    for change in (dict(name="another"), dict(multiprocessors=66)):
        assert measured_plan(PROBLEM, dataclasses.replace(H100, **change), False) is None
    for place, name, other in ((choose.triton, "__version__", "0.0"), (cache, "sources", lambda *_: "others")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            assert measured_plan(PROBLEM, H100, False) is None
    assert cache.remove(cache.PLANS) == 1
    assert measured_plan(PROBLEM, H100, False) is None


def test_a_plan_is_for_one_kind_of_problem():
    keep_measured(PROBLEM, H100, False, PLAN)
    for change in (*KEYS, *NO_KEYS):
        expected = None if change in KEYS else PLAN.as_json()
        assert measured_plan(PROBLEM._replace(**change), H100, False) == expected, change


def test_a_finding_is_of_one_card_with_its_driver_and_packages(monkeypatch):
    """Each may change who is faster, or which kernel is right: what was found with another does not count."""
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
    for function in (cache.sources, cache.machine):
        function.cache_clear()


def _digests():
    for function in (cache.sources, cache.machine):
        function.cache_clear()  # as in another process
    return cache.sources("kernels"), cache.machine(torch.device("cpu"))["gpu_lstm"]


def test_what_was_found_ends_with_an_edit_of_what_decided_it(checkout):
    """Measured plans with one of kernels; verdicts and races also with one of what surrounds and judges them."""
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
        assert measured_plan(PROBLEM, H100, False) == PLAN.as_json()
        (file,) = folder.glob("*.json")
        file.write_bytes(text.encode(errors="surrogateescape"))
        for function in (cache._read, cache.warn_once):
            function.cache_clear()  # as in another process
        with pytest.warns(UserWarning, match="ignored"):
            assert measured_plan(PROBLEM, H100, False) is None


def test_a_folder_that_is_a_file_stops_nobody_and_is_named_once(folder):
    folder.write_text("")
    with pytest.warns(UserWarning, match="nothing is kept for the next process"):
        keep_measured(PROBLEM, H100, False, PLAN)
    with pytest.warns(UserWarning, match="ignored"):
        assert measured_plan(PROBLEM, H100, False) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_measured(PROBLEM, H100, False, PLAN)


def _keep_many(first):
    for batch in range(first, first + 15):
        keep_measured(PROBLEM._replace(batch=batch), H100, False, PLAN)


def test_many_who_write_at_once_lose_nothing(folder):
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("fork")) as executor:
        list(executor.map(_keep_many, range(0, 90, 15)))
    cache._read.cache_clear()
    assert [measured_plan(PROBLEM._replace(batch=batch), H100, False) for batch in range(90)] == [PLAN.as_json()] * 90
    assert list(folder.glob("*.unfinished")) == []


# Autotuning


def _chosen(problem, backward):
    forget()  # as another process would
    cache._read.cache_clear()
    given = launch.call_of(problem, torch.device("meta"))[1].inputs
    return kept_layer(launch, problem, CUDA).prepared(Pass(backward), given).plan


def test_the_fastest_plan_is_found_and_used_from_then_on(an_h100, monkeypatch):
    """As if the widest tiles of the cooperative family were the fastest."""
    problem = PROBLEM._replace(cell="gru")

    def seconds(plan, call=None):
        return 1000 * (plan.family.name == "step") - plan.units

    before = _chosen(problem, False)
    monkeypatch.setattr(autotune, "time_plan", seconds)
    fastest = autotune.autotune(problem, CUDA, 256)
    assert set(fastest) == {"forward", "backward"}
    assert fastest["forward"] == min(plans(problem, H100, False), key=seconds) != before
    layer = kept_layer(launch, problem, CUDA)
    assert layer.chosen(Pass())[:2] == (fastest["forward"], True), "without a launch"
    assert _chosen(problem, False) == fastest["forward"], "in this process, too"
    assert _chosen(problem._replace(steps=128, reverse=True), False) == fastest["forward"]
    assert _chosen(problem, True) == fastest["backward"]


def test_a_plan_in_a_file_that_nobody_proposes_is_not_used(an_h100):
    """Its numbers may fit no problem, and its kernel was verified with others."""
    best, other, *_ = plans(PROBLEM, H100, False)
    keep_measured(PROBLEM, H100, False, other)
    assert _chosen(PROBLEM, False) == other
    odd = dict(rows="8"), dict(family="odd"), dict(family="step"), dict(chunks=None), dict(surprise=1)
    for change in (dict(programs=1), dict(groups=9), dict(tiles_per_program=7), dict(rows=16), *odd):
        cache.write(cache.PLANS, choose._key(PROBLEM, H100, False), other.as_json() | change)
        assert _chosen(PROBLEM, False) == best


def test_where_no_plan_can_be_compiled_autotune_says_why(an_h100, monkeypatch):
    monkeypatch.setattr(autotune, "recorded_launches", lambda *given: given)
    monkeypatch.setattr(autotune, "why_it_does_not_fit", lambda *_: "it spills")
    with pytest.raises(RuntimeError, match=r"no plan for the forward pass of this layer can be timed .*: it spills"):
        autotune.autotune(PROBLEM, CUDA, 256)


def test_a_plan_that_fails_is_left_out_and_the_fastest_of_the_others_kept(an_h100, monkeypatch, caplog):
    """Whether it is refused before, which is on disk by then, times out while it is timed, or in its last launch."""
    refused, out, late, fourth, *_ = plans(PROBLEM, H100, False)
    verified, timed = [], []

    def refuses(layer, pass_, inputs, plan):
        verified.append(plan)
        return "the process that tried it ended meanwhile" if plan == refused else None

    def time_plan(plan, call):
        assert verified[-1] == plan
        timed.append(plan)
        if plan == out:
            raise RuntimeError("cooperative_forward_kernel timed out at step 1")
        if plan == late:
            timeouts.error_word(CUDA, "kernel")[0] = 4
        return len(timed)

    monkeypatch.setattr(autotune, "time_plan", time_plan)
    monkeypatch.setitem(timeouts._words, CUDA, timeouts._Words(torch.device("cpu")))
    with caplog.at_level(logging.INFO, "gpu_lstm"):
        assert autotune.autotune(PROBLEM, CUDA, 256, refuses)["forward"] == fourth
    assert refused not in timed
    assert measured_plan(PROBLEM, H100, False) == fourth.as_json()
    for said in ("ended meanwhile", "timed out at step 1", "timed out at step 3"):
        assert said in caplog.text
    monkeypatch.setattr(autotune, "time_plan", Mock(side_effect=torch.AcceleratorError("illegal memory access")))
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        autotune.autotune(PROBLEM, CUDA, 256)


def test_not_while_a_graph_is_captured(an_h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        autotune.autotune(PROBLEM, CUDA, 256)


def test_what_is_measured_is_a_layer_of_the_sizes_given(monkeypatch):
    """And a Problem as calls have it, whatever T: else the kernels of one layer had two."""
    tool, measure = importlib.import_module("gpu_lstm.tools.autotune"), Mock(return_value={})
    monkeypatch.setattr(tool, "why_unavailable", lambda *_: None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(autotune, "autotune", measure)
    cpu, lstm = torch.device("cpu"), gpu_lstm.LSTM(8, 64, proj_size=16, dtype=torch.float16)
    weights = lstm._request(torch.zeros(1, 1, 8).half()).weights[0][0]
    for steps in (1, 7):
        gpu_lstm.autotune(64, 3, steps=steps, dtype=torch.float16, proj_size=16, device="cpu")
        x, h0, c0 = (torch.zeros(*size, dtype=torch.float16) for size in ((steps, 3, 8), (1, 3, 16), (1, 3, 64)))
        measure.assert_called_with(problem_of(Inputs(x, h0, c0, *weights), "lstm", False, "ieee"), cpu, steps, verify)
    gpu_lstm.autotune(64, 3, steps=7, dtype=torch.float16, device="cpu", cell="slstm", heads=4)
    measure.assert_called_with(Problem(2, 3, 64, torch.float16, cell="slstm", heads=4), cpu, 7, verify)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="times kernels on a CUDA device, and torch finds none here"):
        gpu_lstm.autotune(8, 2)
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|runs on CUDA tensors"):
        gpu_lstm.autotune(8, 2, device="cpu")
