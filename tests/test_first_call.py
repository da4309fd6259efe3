"""The first call of a kind of layer on a card: what is tried, what is said, and what the user gets where nothing works.

The driver is stubbed: `trial.load` stands for compiling and loading a kernel.
"""

import dataclasses
import logging
import math
import time
import warnings

import pytest
import torch

from gpu_lstm import backends
from gpu_lstm.call.choices import Backend, obstacle, select
from gpu_lstm.kernels.operands import as_words
from gpu_lstm.kernels.problem import Recurrence
from gpu_lstm.kernels.triton_lstm import binary, launch, trial
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family

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


def test_each_variant_of_a_kernel_is_tried_for_itself(card, monkeypatch):
    """What is compiled anew is chosen anew: by direction, card, what is saved, what is given, what there is."""
    batch, hidden, steps = 3, 8, 4
    tried, choose = [], launch.choose_plan
    monkeypatch.setattr(launch, "await_others", lambda plan, device: None)
    monkeypatch.setattr(launch, "choose_plan", lambda problem, device, *rest: choose(problem, CUDA, *rest))
    monkeypatch.setattr(launch, "first_that_fits", lambda proposed, *_: tried.append(1) or proposed[-1])
    monkeypatch.setattr(launch, "launch_kernel", lambda *_, **__: None)
    gates, h, c = (torch.zeros(steps, batch, n) for n in (4 * hidden, hidden, hidden))
    plain = Recurrence(weight_hh=torch.zeros(4 * hidden, hidden), h0=h[0], c0=c[0])
    zoneout = torch.tensor(0.1)
    recurrences = [plain] + [
        dataclasses.replace(plain, **change)
        for change in (
            dict(reverse=True), dict(lengths=torch.full((batch,), steps)), dict(resets=h[..., 0] > 1),
            dict(dropout_h=h[0]), dict(zoneout_h=zoneout), dict(zoneout_c=zoneout), dict(precision="tf32"),
            dict(side_by_side=2), dict(dropout_h=h[0], zoneout_h=zoneout), dict(dropout_h=h[0], zoneout_c=zoneout),
        )
    ]  # fmt: skip
    calls = [
        *(lambda r=r, save=save: launch.layer_forward(gates, r, save=save)
          for r in recurrences for save in (True, False)),
        *(lambda r=r, dh=dh, dh_n=dh_n: launch.layer_backward(dh, dh_n, None, gates, c, r)
          for r in recurrences for dh, dh_n in ((h, h[0]), (h, None), (None, h[0]))),
    ]  # fmt: skip
    for number, call in enumerate(calls, start=1):
        for _ in range(2):
            call()
            assert len(tried) == number
    for device, backward in ((CUDA, False), (CUDA, True), (torch.device("cuda", 1), False)):
        before = len(tried)
        choose(dataclasses.replace(PROBLEM, batch=9), device, backward, (), None)
        assert len(tried) == before + 1


def test_while_a_graph_is_captured_nothing_is_checked_and_nothing_is_kept(card, monkeypatch):
    """A check's work would become part of the graph; and what was not checked must not be taken for trusted later."""
    asked = []
    monkeypatch.setattr(trial, "load", lambda *_: None)

    def choose():
        return launch.choose_plan(
            PROBLEM, CUDA, False, (), lambda plan, launch_kernel: None, lambda plan: asked.append(plan)
        )

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == plans(PROBLEM, H100, False)[0]
    assert launch._chosen == {}
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choose()
    assert asked == plans(PROBLEM, H100, False)[:1]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("family", Family)
def test_a_plan_is_launched_as_it_says(monkeypatch, family, backward):
    """Its warps, stages, registers, programs; and cooperatively wherever programs wait for each other."""
    batch, hidden, steps = 40, 64, 4
    problem = Problem(steps, batch, hidden, torch.float16)
    plan = next(
        p for p in plans(dataclasses.replace(problem, hidden=256), H100, backward) if p.family is Family.COOPERATIVE
    )
    if family is not Family.COOPERATIVE:
        plan = next(p for p in plans(problem, H100, backward) if p.family is family)
    made = []
    gates, h, c = (torch.zeros(steps, batch, n, dtype=torch.float16) for n in (4 * hidden, hidden, hidden))
    r = Recurrence(weight_hh=torch.zeros(4 * hidden, hidden).half(), h0=h[0], c0=c[0].float())

    def record(kernel, grid, **arguments):
        made.append((kernel.__name__, grid, arguments))

    if backward:
        launch.layer_backward(h, h[0], None, gates, c.float(), r, plan=plan, launch=record)
    else:
        launch.layer_forward(gates, r, save=True, plan=plan, launch=record)
    ((name, grid, arguments),) = made
    assert name == f"lstm_{family.value}_{'backward' if backward else 'forward'}_kernel"
    assert math.prod(grid) == plan.programs * plan.groups
    assert arguments["num_warps"] == plan.num_warps
    assert arguments["maxnreg"] == plan.registers
    assert arguments["enable_fp_fusion"] is True
    assert arguments.get("launch_cooperative_grid", False) is (family is not Family.RESIDENT)
    if family is Family.STEP:
        assert arguments["num_stages"] == plan.num_stages
        assert [arguments[f"BLOCK_{name}"] for name in "BHK"] == [plan.rows, plan.columns, plan.k]


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("width", [6, 7])
def test_words_of_rows_that_begin_anywhere(offset, width):
    """Two halves in a word, the lower first, zero where H is odd; also where memory begins in the middle of a word."""
    x = torch.arange(1, 60, dtype=torch.int16).view(torch.float16)[offset : offset + 4 * width].view(4, width)
    words = as_words(x)
    halves = words.view(torch.float16).view(4, -1)
    assert torch.equal(halves[:, :width], x)
    assert (halves[:, width:] == 0).all()
    assert words.shape == (4, -(-width // 2))


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
