"""The first call of a kind of layer on a card: what is tried, what is said, and what the user gets where nothing works.

The driver is stubbed: `trial.load` stands for compiling and loading a kernel.
"""

import dataclasses
import logging
import time
import warnings

import pytest
import torch

from gpu_lstm import backends
from gpu_lstm.backends import Backend, obstacle, select
from gpu_lstm.kernels.triton_lstm import binary, launch, trial
from gpu_lstm.kernels.triton_lstm.families import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family, Problem

CUDA = torch.device("cuda", 0)
H100 = DEVICES["h100"]
PROBLEM = Problem(100, 64, 256, torch.float16)  # many plans of the cooperative family


@pytest.fixture
def card(monkeypatch, tmp_path):
    """An H100, on which no plan was measured or chosen yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "device_of", lambda properties: H100)
    monkeypatch.setattr(launch, "_chosen", {})
    backends._say_once.cache_clear()


def _choose(monkeypatch, load, variant=()):
    """The plan that is chosen for PROBLEM, and all that were tried."""
    tried = []

    def attempt(plan, launch_kernel):
        tried.append(plan)
        for _ in range(3):  # a family may launch a kernel more than once
            launch_kernel(launch.step.lstm_step_forward_kernel, (1,), plan=plan)

    monkeypatch.setattr(trial, "load", load)
    return launch.choose_plan(PROBLEM, CUDA, False, variant, attempt), tried


def test_the_first_plan_that_loads_is_taken_compiled_once_and_kept(card, monkeypatch):
    loaded = []
    expected = plans(PROBLEM, H100, False)[0]
    plan, tried = _choose(monkeypatch, lambda kernel, grid, arguments: loaded.append(arguments["plan"]))
    assert [plan] == tried == loaded == [expected], "one kernel is compiled once, for one plan"
    assert _choose(monkeypatch, None) == (expected, []), "from the second call on nothing is tried"
    assert _choose(monkeypatch, lambda *_: None, variant=("another",))[1] == [expected], "but other kernels are"


def test_sequences_of_other_lengths_are_no_other_kind_of_problem(card, monkeypatch):
    """Each would be planned and compiled anew, where lengths vary from batch to batch; a single step is one, though."""
    tried = []
    monkeypatch.setattr(trial, "load", lambda kernel, grid, arguments: tried.append(arguments))

    def attempt(plan, launch_kernel):
        launch_kernel(launch.step.lstm_step_forward_kernel, (1,), plan=plan)

    for steps, kinds in ((100, 1), (2, 1), (31, 1), (5000, 1), (1, 2), (100, 2)):
        problem = dataclasses.replace(PROBLEM, steps=steps)
        plan = launch.choose_plan(problem, CUDA, False, (), attempt)
        assert plan == plans(problem, H100, False)[0]
        assert len(tried) == len(launch._chosen) == kinds


@pytest.mark.parametrize(
    "failure", [trial.DoesNotFit("spills 8 bytes"), ValueError("M, N, K >= 16"), RuntimeError("PassManager")]
)
def test_a_plan_that_does_not_compile_does_not_fit_and_a_log_line_says_why(card, monkeypatch, caplog, failure):
    refused = plans(PROBLEM, H100, False)[0]

    def load(kernel, grid, arguments):
        if arguments["plan"] == refused:
            raise failure

    with caplog.at_level(logging.INFO, "gpu_lstm"):
        plan, tried = _choose(monkeypatch, load)
    assert tried == plans(PROBLEM, H100, False)[:2]
    assert plan == tried[1]
    assert str(failure) in caplog.text


def test_hopeless_plans_are_not_all_compiled(card, monkeypatch):
    assert len(plans(PROBLEM, H100, False)) > trial.MOST + 1

    def load(kernel, grid, arguments):
        if arguments["plan"].family is not Family.STEP:
            raise trial.DoesNotFit("spills")

    plan, tried = _choose(monkeypatch, load)
    assert plan.family is Family.STEP
    assert len(tried) == trial.MOST + 1 == 4


def test_where_no_kernel_compiles_the_error_names_every_reason(card, monkeypatch):
    def load(kernel, grid, arguments):
        raise ValueError(f"no {arguments['plan'].family.value} today")

    with pytest.raises(
        RuntimeError, match=r"no Triton kernel can run this layer on this card.*no cooperative today.*no step today"
    ):
        _choose(monkeypatch, load)
    assert launch._chosen == {}


def test_out_of_memory_is_no_matter_of_plans(card, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("80 GB")

    with pytest.raises(torch.OutOfMemoryError):
        _choose(monkeypatch, load)


def test_a_line_says_what_takes_long(card, monkeypatch, caplog):
    monkeypatch.setattr(trial, "SLOW_S", 0.01)
    _choose(monkeypatch, lambda *_: time.sleep(0.2))
    assert "compiling the kernels of a layer" in caplog.text


def test_a_quick_compilation_is_not_mentioned(card, monkeypatch, caplog):
    _choose(monkeypatch, lambda *_: None)
    assert caplog.text == ""


@pytest.mark.skipif(launch.INTERPRETED, reason="kernels are interpreted here")
def test_the_triton_at_hand_compiles_for_a_card_and_not_for_one_that_is_unknown():
    assert binary.compile_problem(90) is None
    assert "sm_999" in binary.compile_problem(999)


def test_a_card_that_triton_cannot_compile_for_goes_to_torch_and_an_explicit_choice_raises(card, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(backends, "cupy_import_problem", lambda: "not here")
    monkeypatch.setattr(binary, "compile_problem", lambda architecture: f"ptxas fatal: sm_{architecture}")
    with pytest.warns(UserWarning, match=r"compiles nothing for cuda:0, compute capability 9.0: ptxas fatal: sm_90"):
        assert select(None, CUDA, torch.float32) is Backend.TORCH
    with pytest.raises(RuntimeError, match=r"backend 'triton': .* compute capability 9.0: ptxas fatal: sm_90"):
        select("triton", CUDA, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert select(None, CUDA, torch.float32) is Backend.TORCH


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.CUPY])
def test_a_torch_for_amd_is_named(monkeypatch, backend):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(obstacle(backend, CUDA, torch.float32))
    assert select(None, CUDA, torch.float32) is Backend.TORCH


@pytest.mark.parametrize("error", [OSError("libcuda.so"), RuntimeError("bad build"), AttributeError("no attribute")])
def test_a_broken_package_stops_nobody_who_did_not_ask_for_it(monkeypatch, error):
    def broken(name, package=None):
        raise error

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    for problem in (backends.triton_import_problem, backends.cupy_import_problem):
        problem.cache_clear()
    backends._say_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"is installed, but fails, and is not used: .*{error}"):
            assert select(None, CUDA, torch.float32) is Backend.TORCH
        with pytest.raises(ImportError, match=str(error)):
            select("triton", CUDA, torch.float32)
    finally:
        for problem in (backends.triton_import_problem, backends.cupy_import_problem):
            problem.cache_clear()


def test_blocks_of_threads_that_overlap_leave_nothing_behind():
    first, second = backends.backend("torch"), backends.backend("reference")
    first.__enter__()
    second.__enter__()
    assert backends.requested(None) is Backend.REFERENCE, "the youngest counts"
    first.__exit__(None, None, None)
    assert backends.requested(None) is Backend.REFERENCE
    second.__exit__(None, None, None)
    assert backends.requested(None) is Backend.AUTO
