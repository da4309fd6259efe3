"""The first call of a kind of layer on a card with a stubbed driver: what is tried and logged, and what users get."""

import contextlib
import importlib.util
import logging
import math
import warnings
from types import SimpleNamespace
from unittest.mock import ANY, Mock, call

import numpy as np
import pytest
import torch
from standing_in import CUDA, H100, plan_of, torch_finds

from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available, route
from gpu_lstm.dispatch.available import select, why_unavailable
from gpu_lstm.kernels.cupy_lstm import launch as cupy
from gpu_lstm.kernels.layer import aligned
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_lstm import choose, features, launch

PROBLEM = Problem(2, 64, 256, torch.float16)  # many plans of the cooperative family
PLANS = choose.plans(PROBLEM, H100, False)
FORWARD = Pass()
GIVEN = launch.call_of(PROBLEM, torch.device("meta"))[1].inputs


def _choose(monkeypatch, load=lambda *_: None, pass_=FORWARD, verify=None):
    """The plan, and the columns of those tried, which tell them apart; load(kernel, columns) says what spills."""
    tried = []

    def loaded(kernel, grid, arguments):
        tried.append(arguments["S"].UNITS)
        return SimpleNamespace(n_spills=load(kernel, tried[-1]) or 0)

    monkeypatch.setattr(choose, "load", loaded)
    return launch.layer_of(PROBLEM, CUDA, verify).prepared(pass_, GIVEN).plan, tried


def test_the_first_plan_that_loads_is_chosen_and_kept(an_h100, monkeypatch):
    assert launch.layer_of(PROBLEM, CUDA).chosen(Pass()) == (PLANS[0], False), "before there is a choice"
    assert _choose(monkeypatch) == (PLANS[0], [PLANS[0].units])
    assert _choose(monkeypatch) == (PLANS[0], []), "from the second call on nothing is tried"
    for pass_ in (Pass(save=False), Pass(True), Pass(True, dh=False), Pass(True, dh_n=False)):
        assert len(_choose(monkeypatch, pass_=pass_)[1]) == 1, "but other kernels are"
    launch.forget()
    assert _choose(monkeypatch)[1] == [PLANS[0].units]


def test_two_blocks_of_a_multiprocessor_must_have_room_in_its_shared_memory(monkeypatch):
    """Whatever was planned: other versions of Triton take more. A multiprocessor of an H100 has 228 KB."""
    launches = [(SimpleNamespace(__name__="kernel"), (1,), {})]
    metadata = SimpleNamespace(target=SimpleNamespace(arch=90))
    monkeypatch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0, metadata=metadata))
    for metadata.shared, said in ((113 * 1024, "None"), (114 * 1024, "2 blocks of kernel want 116736 bytes")):
        assert choose.why_it_does_not_fit(launches, 1) is None
        assert said in str(choose.why_it_does_not_fit(launches, 2))


def test_while_a_graph_is_captured_nothing_is_verified_and_nothing_is_kept(an_h100, monkeypatch):
    """Its work would become part of the graph; and what was not verified must not count as verified later."""
    verify = Mock(side_effect=lambda *given: "wrong" if given[-1] == PLANS[0] else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        assert _choose(monkeypatch, verify=verify) == (PLANS[0], [PLANS[0].units])
    assert verify.mock_calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert _choose(monkeypatch, verify=verify)[0] == PLANS[1]
    assert verify.mock_calls == [call(ANY, Pass(), GIVEN, plan) for plan in PLANS[:2]]
    assert {each.args[0].problem for each in verify.call_args_list} == {PROBLEM}
    _choose(monkeypatch, pass_=Pass(True, dh=False, dh_n=False), verify=verify)
    assert verify.call_count == 2, "without a gradient of h there is nothing to verify"


@pytest.mark.parametrize("shift", [0, 1, 8])
def test_a_tensor_is_copied_unless_it_is_contiguous_and_aligned(shift):
    storage = torch.arange(200.0).to(torch.float16)
    first = -storage.data_ptr() % 16 // 2 + shift
    t = storage[first : first + 64].view(8, 8)
    assert (aligned(t) is t) == (shift % 8 == 0)
    for each in (t, t.T, t[:, ::2]):
        assert torch.equal(aligned(each), each)
        assert (aligned(each).is_contiguous(), aligned(each).data_ptr() % 16) == (True, 0)


@pytest.mark.parametrize("pass_", [Pass(True, True, dh, dh_n) for dh in (True, False) for dh_n in (True, False)])
def test_what_is_compiled_for_a_projection_outside_the_loop_is_what_is_launched(monkeypatch, pass_):
    """Whichever gradients there are, the recurrence of m is given that of every m."""
    problem, record = Problem(2, 3, 16, torch.float16, 4), Mock()
    plan, (gates, r) = plan_of("resident", problem, True), launch.call_of(problem, torch.device("cpu"))
    monkeypatch.setattr(launch, "launch_kernel", record)
    h = torch.zeros(2, 3, 4).half()
    given = h if pass_.dh else None, h[:1] if pass_.dh_n else None, None
    launch.layer_of(problem, gates.device).with_plan(plan).backward(*given, gates, torch.zeros(2, 3, 16), r)
    [compiled] = launch.recorded_launches(problem, pass_, plan)
    absent = [{name for name, each in a.items() if each is None} for a in (compiled.arguments, record.call_args.kwargs)]
    assert absent[0] == absent[1]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("family", ["resident", "cooperative", "pointwise", "step"])
def test_a_plan_is_launched_as_it_says(monkeypatch, family, backward):
    """Its warps, stages, registers, programs; and cooperatively wherever programs wait for each other."""
    batch, hidden, steps = 40, 64, 4
    problem = Problem(steps, batch, hidden, torch.float16)
    of = problem._replace(hidden=256) if family == "cooperative" else problem
    plan = plan_of(family, of, backward)
    h, record = torch.zeros(steps, batch, hidden).half(), Mock()
    gates, r = launch.call_of(problem, torch.device("cpu"))
    monkeypatch.setattr(launch, "launch_kernel", record)
    layer = launch.layer_of(problem, gates.device).with_plan(plan)
    if backward:
        layer.backward(h, h[:1], None, gates, h.float(), r)
    else:
        layer.forward(gates, r, save=True)
    calls = [each.kwargs.get("step") for each in record.call_args_list]
    order = [*range(steps)][::-1] if backward else [*range(steps)]
    assert calls == (order if family == "pointwise" else [None])
    (kernel, grid), arguments = record.call_args
    assert kernel.__name__ == f"lstm_{family}_{'backward' if backward else 'forward'}_kernel"
    assert math.prod(grid) == plan.programs * plan.groups
    options = dict(num_warps=plan.num_warps, maxnreg=min(255, 65536 // (32 * plan.num_warps)), enable_fp_fusion=True)
    options["launch_cooperative_grid"] = family in ("cooperative", "step")
    if family == "step":
        options["num_stages"] = plan.num_stages
    assert {name: arguments.get(name, False) for name in options} == options
    sizes = arguments["S"]
    assert (hidden, plan.rows, plan.units, plan.num_warps) == (sizes.H, sizes.BLOCK_B, sizes.UNITS, sizes.WARPS)
    assert (getattr(plan.family, "k", 0), getattr(plan.family, "chunks", 0)) == (sizes.BLOCK_K, sizes.CHUNKS)


@pytest.mark.parametrize(("failure", "said"), [
    (8 // 4, "spills 8 bytes a thread"), *((kind(text), text) for kind, text in (
        (ValueError, "M, N, K >= 16"), (RuntimeError, "PassManager"))),
], ids=str)  # fmt: skip
def test_a_plan_that_does_not_compile_does_not_fit_and_a_log_line_says_why(an_h100, monkeypatch, caplog, failure, said):
    with caplog.at_level(logging.INFO, "gpu_lstm"):
        found = _choose(monkeypatch, Mock(side_effect=[failure, None]))
    assert found == (PLANS[1], [plan.units for plan in PLANS[:2]])
    assert said in caplog.text


def test_where_no_kernel_compiles_the_error_names_every_reason_but_out_of_memory_is_itself(an_h100, monkeypatch):
    """Of the plans that are tried, which are not all: the best, and the last resort."""

    def load(kernel, _):
        raise ValueError(f"no {kernel.__name__} today")

    reasons = r"no Triton kernel can run this layer on this card.*no lstm_coop.*no lstm_step.*today"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reasons):
            _choose(monkeypatch, load)
    with pytest.raises(torch.OutOfMemoryError):
        _choose(monkeypatch, Mock(side_effect=torch.OutOfMemoryError("80 GB")))
    assert len(PLANS) > choose.MOST + 1
    plan, tried = _choose(monkeypatch, lambda kernel, _: "step" not in kernel.__name__)
    assert (plan.family.name, len(tried)) == ("step", choose.MOST + 1)


def test_a_line_says_what_takes_long(an_h100, monkeypatch, caplog):
    timer = Mock()
    monkeypatch.setattr(choose.threading, "Timer", timer)
    _choose(monkeypatch)
    seconds, function, arguments = timer.call_args.args
    assert seconds == choose.SLOW_S
    assert timer.mock_calls[1:] == [call().start(), call().cancel()], "a quick compilation is not mentioned"
    function(*arguments)
    assert "compiling the kernels of a layer" in caplog.text


# Where nothing can be launched


def _selected(asked: str | None = None) -> Backend:
    return select(asked, CUDA, torch.float32, None, False)


@pytest.fixture
def card(monkeypatch, nothing_cached):
    """A card that cannot load kernels, as each test finds out anew."""
    torch_finds(monkeypatch)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(choose, "compile_problem", lambda architecture: None)
    choose._load_problem.cache_clear()
    yield
    choose._load_problem.cache_clear()


CAUSES = {  # what Triton or the driver says, and a word of what the user is told to do
    "no C compiler": (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "gcc"),
    "no Python.h": (RuntimeError("Command '['gcc', 'main.c']' returned non-zero exit status 1."), "python3-dev"),
    "old driver": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "newer driver"),
    "old driver, PTX": (RuntimeError("the provided PTX was compiled with an unsupported toolchain."), "newer driver"),
    "unknown": (OSError("no space left on device"), "no space left"),
    "unknown card": (None, "compute capability 9.0: ptxas fatal: sm_90"),
}


@pytest.mark.parametrize(("error", "cure"), CAUSES.values(), ids=CAUSES)
def test_where_nothing_can_be_launched_the_user_is_told_why_and_auto_does_without(card, monkeypatch, error, cure):
    if error is None:
        monkeypatch.setattr(choose, "compile_problem", lambda architecture: f"ptxas fatal: sm_{architecture}")
    monkeypatch.setattr(choose, "load", Mock(side_effect=error))
    of_triton = available.import_problem(Backend.TRITON)
    monkeypatch.setattr(available, "import_problem", {Backend.TRITON: of_triton, Backend.CUPY: "not here"}.get)
    with pytest.warns(UserWarning, match="launches nothing on cuda:0.*Backend 'auto' does without it"):
        assert _selected() is Backend.TORCH
    with pytest.raises(RuntimeError, match=f"backend 'triton': .*{cure}"):
        _selected("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert _selected() is Backend.TORCH


def test_an_empty_kernel_is_loaded_once_and_never_into_a_capture(card, monkeypatch):
    loaded = []
    monkeypatch.setattr(choose, "load", lambda kernel, *_: loaded.append(kernel.__name__))
    for capturing in (True, False, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert _selected("triton") is Backend.TRITON
        assert loaded == ([] if capturing else ["empty_kernel"])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("hidden", [64, 768, 1024])
def test_the_last_smaller_batch_of_an_epoch_compiles_nothing(an_h100, hidden, backward):
    """It uses the plan of the others, unless that is estimated to be much slower."""
    problem, pass_ = Problem(2, 64, hidden, torch.bfloat16), Pass(backward)
    given = launch.call_of(problem, torch.device("meta"))[1].inputs
    plan = launch.layer_of(problem, CUDA).prepared(pass_, given).plan
    ours = [launch.layer_of(problem._replace(batch=batch), CUDA).chosen(pass_).plan for batch in range(1, 64)]
    least = 33 if (hidden, backward) == (1024, True) else 9  # there a cooperative plan is faster for half the batch
    assert ours[least - 1 :] == [plan] * (64 - least)
    larger = launch.layer_of(problem._replace(batch=4096), CUDA)
    assert larger.chosen(pass_).plan == choose.plans(larger.problem, H100, backward)[0], "it may not fit a larger one"


def test_a_torch_for_amd_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for backend in (Backend.TRITON, Backend.CUPY):
        assert "ROCm" in str(why_unavailable(backend, CUDA, torch.float32))
    assert _selected() is Backend.TORCH


@pytest.mark.parametrize("error", [OSError("libcuda.so"), RuntimeError("bad build"), AttributeError("no attribute")])
def test_a_broken_package_stops_nobody_who_did_not_ask_for_it(monkeypatch, nothing_cached, error):
    monkeypatch.setattr(available, "import_problem", available.import_problem.__wrapped__)
    monkeypatch.setattr(available.importlib, "import_module", Mock(side_effect=error))
    with pytest.warns(UserWarning, match=f"is installed, but fails, and is not used: .*{error}"):
        assert _selected() is Backend.TORCH
    with pytest.raises(ImportError, match=str(error)):
        _selected("triton")


@pytest.mark.skipif(not launch.INTERPRETED, reason="of Triton's interpreter")
@pytest.mark.parametrize(("triton", "numpy", "runs"), [
    ("3.6.0", "2.4.0", False), ("3.4.0", "2.10.1", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.0", True),
])  # fmt: skip
def test_an_interpreter_that_numpy_is_too_new_for_says_so_at_once(monkeypatch, triton, numpy, runs):
    """Rather than that only 0-dimensional arrays can be converted to Python scalars, in the middle of a kernel."""
    monkeypatch.setattr(features.triton, "__version__", triton)
    monkeypatch.setattr(np, "__version__", numpy)
    spec = importlib.util.spec_from_file_location("features_again", features.__file__)
    said = pytest.raises(ImportError, match=f"Triton {triton} needs NumPy below 2.4, got {numpy}: pip install")
    with contextlib.nullcontext() if runs else said:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_kind_of_call_and_every_device_has_a_layer_of_its_own():
    keys = (PROBLEM, CUDA), (PROBLEM, torch.device("cpu")), (PROBLEM._replace(reverse=True), CUDA)
    assert len({id(launch.layer_of(*key)) for key in 2 * keys}) == 3


@pytest.mark.parametrize("launcher", [launch, cupy], ids=["triton", "cupy"])
def test_what_routes_forget_layers_forget(launcher):
    layer = launcher.layer_of(PROBLEM, CUDA)
    choose.plans_in_use[PROBLEM, H100, FORWARD] = {64: PLANS[0]}
    route.forget()
    assert launcher.layer_of(PROBLEM, CUDA) is not layer
    assert not choose.plans_in_use


def test_layers_of_ever_more_batches_do_not_fill_memory(monkeypatch):
    monkeypatch.setattr(launch, "MOST_LAYERS", 2)
    for batch in range(1, 9):
        layer = launch.layer_of(PROBLEM._replace(batch=batch), CUDA)
        assert launch.layer_of(layer.problem, CUDA) is layer
    assert len(launch._layers) <= 2
