"""The first call of a kind of layer on a card with a stubbed driver: what is tried and logged, and what users get."""

import logging
import math
import warnings
from types import SimpleNamespace
from unittest.mock import ANY, Mock, call

import pytest
import torch
from standing_in import H100, plan_of, recurrence

from gpu_lstm.backends import verify
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.dispatch.available import select, why_unavailable
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.layer import Layer, aligned
from gpu_lstm.kernels.problem import Pass, Problem, problem_of
from gpu_lstm.kernels.triton_lstm import choose, launch
from gpu_lstm.kernels.triton_lstm.planning import Held

CUDA = torch.device("cuda", 0)
PROBLEM = Problem(2, 64, 256, torch.float16)  # many plans of the cooperative family
PLANS = choose.plans(PROBLEM, H100, False)
FORWARD = Pass()
GIVEN = launch.call_of(PROBLEM, torch.device("meta"))[1].inputs


def _choose(monkeypatch, load=lambda *_: None, which=FORWARD, verify=None):
    """The plan, and the columns of those tried, which tell them apart; load(kernel, columns) says what spills."""
    tried = []

    def loaded(kernel, grid, arguments):
        tried.append(arguments.get("UNITS", arguments.get("BLOCK_H")))
        return SimpleNamespace(n_spills=load(kernel, tried[-1]) or 0)

    monkeypatch.setattr(choose, "load", loaded)
    return launch.layer_of(PROBLEM, CUDA, verify).prepared(which, GIVEN).plan, tried


def test_the_first_plan_that_loads_is_chosen_and_kept(an_h100, monkeypatch):
    assert launch.layer_of(PROBLEM, CUDA).chosen(Pass()) == (PLANS[0], False), "before there is a choice"
    assert _choose(monkeypatch) == (PLANS[0], [PLANS[0].units])
    assert _choose(monkeypatch) == (PLANS[0], []), "from the second call on nothing is tried"
    for which in (Pass(save=False), Pass(True), Pass(True, dh=False), Pass(True, dh_n=False)):
        assert len(_choose(monkeypatch, which=which)[1]) == 1, "but other kernels are"
    launch.forget()
    assert _choose(monkeypatch)[1] == [PLANS[0].units]


@pytest.mark.parametrize(("shared", "fits"), [(112 * 1024, True), (113 * 1024, True), (114 * 1024, False)])
def test_two_blocks_of_a_multiprocessor_must_have_room_in_its_shared_memory(monkeypatch, shared, fits):
    """Whatever was planned: other versions of Triton take more. A multiprocessor of an H100 has 228 KB."""
    metadata = SimpleNamespace(shared=shared, target=SimpleNamespace(arch=90))
    monkeypatch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0, metadata=metadata))
    launches = [(SimpleNamespace(__name__="kernel"), (1,), {})]
    assert choose.why_it_does_not_fit(launches, 1) is None
    reason = choose.why_it_does_not_fit(launches, 2)
    assert reason is None if fits else f"2 blocks of kernel want {shared} bytes" in reason


def test_every_fact_of_a_call_is_in_its_problem():
    """What is compiled separately is chosen separately; a sequence of another length from 2 on is not."""
    batch, hidden, steps = 3, 8, 4
    gates, h, c = (torch.zeros(steps, batch, n) for n in (4 * hidden, hidden, hidden))
    plain = recurrence(gates, weight_hh=torch.zeros(4 * hidden, hidden), h0=h[0], c0=c[0]).inputs
    rate, mask = torch.tensor(0.1), h > 1
    changes = [
        dict(), dict(lengths=torch.full((batch,), steps)), dict(resets=mask[..., 0]),
        dict(lengths=torch.full((batch,), steps, dtype=torch.int32)), dict(dropout_h=h[0]), dict(zoneout_h=rate),
        dict(zoneout_c=rate), dict(zoneout_h=mask), dict(zoneout_c=mask),
        dict(dropout_h=h[0], zoneout_h=rate), dict(dropout_h=h[0], zoneout_c=rate), dict(zoneout_h=rate, reset_h=h),
        dict(reset_c=c),
        dict(weight_peephole=h[0, 0]), dict(gain_hh=h[0, 0]), dict(gain_c=h[0, 0]),
        dict(gain_c=h[0, 0], bias_c=h[0, 0]), dict(weight_hr=h[0], h0=h[0, :, :2]),
    ]  # fmt: skip
    problems = [problem_of(plain._replace(**change), False, "ieee") for change in changes]
    others = (True, "ieee"), (False, "tf32"), (False, "ieee", 2)
    problems += [problem_of(plain, *facts) for facts in others]
    one_step, of_two, of_three, half = (plain._replace(x=x) for x in (gates[:1], gates[:2], gates[:3], gates.half()))
    problems += [problem_of(each, False, "ieee") for each in (one_step, half)]
    assert len(set(problems)) == len(changes) + len(others) + 2
    assert problem_of(of_two, False, "ieee") == problem_of(of_three, False, "ieee") == problems[0]
    assert {str(p.as_json()) for p in problems} == {str(p.as_json()) for p in set(problems)}
    keys = (problems[0], h.device), (problems[1], h.device), (problems[0], CUDA)
    assert len({id(launch.layer_of(*key)) for key in 2 * keys}) == 3


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
    _choose(monkeypatch, which=Pass(True, dh=False, dh_n=False), verify=verify)
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


@pytest.mark.parametrize("dh_n", [None, torch.zeros(3, 4).half()], ids=["no dh_n", "dh_n"])
@pytest.mark.parametrize("dh", [None, torch.zeros(2, 3, 4).half()], ids=["no dh", "dh"])
def test_what_is_compiled_for_a_projection_outside_the_loop_is_what_is_launched(monkeypatch, dh, dh_n):
    """Whichever gradients there are, the recurrence of m is given that of every m."""
    problem, record = Problem(2, 3, 16, torch.float16, 4), Mock()
    plan, gates = plan_of("resident", problem, True), torch.zeros(2, 3, 64).half()
    weights = dict(weight_hh=torch.zeros(64, 4).half(), weight_hr=torch.zeros(4, 16).half())
    r = recurrence(gates, h0=torch.zeros(3, 4).half(), c0=torch.zeros(3, 16), **weights)
    monkeypatch.setattr(launch, "launch_kernel", record)
    Layer(problem, gates.device, launch, trial=plan).backward(dh, dh_n, None, gates, torch.zeros(2, 3, 16), r)
    [compiled] = launch.recorded_launches(problem, Pass(True, True, dh is not None, dh_n is not None), plan)
    of_compiled, of_launched = (
        {name for name, each in arguments.items() if each is None}
        for arguments in (compiled.arguments, record.call_args.kwargs)
    )
    assert of_compiled == of_launched


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("family", ["resident", "cooperative", "pointwise", "step"])
def test_a_plan_is_launched_as_it_says(monkeypatch, family, backward):
    """Its warps, stages, registers, programs; and cooperatively wherever programs wait for each other."""
    batch, hidden, steps = 40, 64, 4
    problem = Problem(2, batch, hidden, torch.float16)
    of = problem._replace(hidden=256) if family == "cooperative" else problem
    plan = plan_of(family, of, backward)
    gates, h, c = (torch.zeros(steps, batch, n, dtype=torch.float16) for n in (4 * hidden, hidden, hidden))
    r, record = recurrence(gates, weight_hh=torch.zeros(4 * hidden, hidden).half(), h0=h[0], c0=c[0].float()), Mock()
    monkeypatch.setattr(launch, "launch_kernel", record)
    layer = launch.layer_of(problem, gates.device).with_plan(plan)
    if backward:
        layer.backward(h, h[0], None, gates, c.float(), r)
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
        options |= dict(num_stages=plan.num_stages, BLOCK_B=plan.rows, BLOCK_H=plan.units, BLOCK_K=plan.family.k)
    assert {name: arguments.get(name, False) for name in options} == options


@pytest.mark.parametrize(("failure", "said"), [
    (8 // 4, "spills 8 bytes a thread"), *((kind(text), text) for kind, text in (
        (ValueError, "M, N, K >= 16"), (RuntimeError, "PassManager"))),
], ids=str)  # fmt: skip
def test_a_plan_that_does_not_compile_does_not_fit_and_a_log_line_says_why(an_h100, monkeypatch, caplog, failure, said):
    with caplog.at_level(logging.INFO, "gpu_lstm"):
        found = _choose(monkeypatch, Mock(side_effect=[failure, None]))
    assert found == (PLANS[1], [plan.units for plan in PLANS[:2]])
    assert said in caplog.text


def test_a_plan_that_holds_w_hh_and_computes_wrong_numbers_costs_one_warning_and_the_next_one_runs(
    an_h100, monkeypatch
):  # fmt: skip
    problem, passes = Problem(2, 512, 512, torch.bfloat16), [Pass(backward=True), Pass(backward=True, dh_n=False)]
    first, second, *_ = choose.plans(problem, H100, True)
    assert type(first.family) is Held
    metadata = SimpleNamespace(shared=first.shared, target=SimpleNamespace(arch=90))
    monkeypatch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0, metadata=metadata))
    monkeypatch.setattr(verify, "_raise_earlier_errors", lambda device: None)
    monkeypatch.setattr(verify, "_verdict", lambda *given: "right" if given[-1] != first else "the RMS error is 1")
    monkeypatch.setattr(cache, "machine", lambda device: {"card": H100.name})
    given = launch.call_of(problem, torch.device("meta"))[1].inputs
    chosen = []
    with pytest.warns(UserWarning, match=f"failed its verification on {H100.name}: the RMS error is 1") as warned:
        chosen.extend(launch.layer_of(problem, CUDA, verify.verify).prepared(each, given).plan for each in passes)
    assert (chosen, len(warned)) == ([second, second], 1)


def test_hopeless_plans_are_not_all_compiled(an_h100, monkeypatch):
    assert len(PLANS) > choose.MOST + 1
    plan, tried = _choose(monkeypatch, lambda kernel, _: "step" not in kernel.__name__)
    assert plan.family.name == "step"
    assert len(tried) == choose.MOST + 1 == 4


def test_where_no_kernel_compiles_the_error_names_every_reason_but_out_of_memory_is_itself(an_h100, monkeypatch):
    def load(kernel, _):
        raise ValueError(f"no {kernel.__name__} today")

    reasons = r"no Triton kernel can run this layer on this card.*no lstm_coop.*no lstm_step.*today"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reasons):
            _choose(monkeypatch, load)
    with pytest.raises(torch.OutOfMemoryError):
        _choose(monkeypatch, Mock(side_effect=torch.OutOfMemoryError("80 GB")))


def test_a_line_says_what_takes_long(an_h100, monkeypatch, caplog):
    timer = Mock()
    monkeypatch.setattr(choose.threading, "Timer", timer)
    _choose(monkeypatch)
    seconds, function, arguments = timer.call_args.args
    assert seconds == choose.SLOW_S
    assert timer.mock_calls[1:] == [call().start(), call().cancel()], "a quick compilation is not mentioned"
    function(*arguments)
    assert "compiling the kernels of a layer" in caplog.text


def _selected(asked: str | None = None) -> Backend:
    return select(asked, CUDA, torch.float32, None, False)


@pytest.mark.skipif(launch.INTERPRETED, reason="kernels are interpreted here")
def test_the_triton_at_hand_compiles_for_a_card_and_not_for_one_that_is_unknown():
    assert choose.compile_problem(90) is None
    assert "sm_999" in choose.compile_problem(999)


def test_a_card_that_triton_cannot_compile_for_goes_to_torch_and_an_explicit_choice_raises(an_h100, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(available, "cupy_import_problem", lambda: "not here")
    monkeypatch.setattr(choose, "compile_problem", lambda architecture: f"ptxas fatal: sm_{architecture}")
    with pytest.warns(UserWarning, match=r"launches nothing on cuda:0, compute capability 9.0: ptxas fatal: sm_90"):
        assert _selected() is Backend.TORCH
    with pytest.raises(RuntimeError, match=r"backend 'triton': .* compute capability 9.0: ptxas fatal: sm_90"):
        _selected("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert _selected() is Backend.TORCH


def test_a_torch_for_amd_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for backend in (Backend.TRITON, Backend.CUPY):
        assert "ROCm" in str(why_unavailable(backend, CUDA, torch.float32))
    assert _selected() is Backend.TORCH


@pytest.mark.parametrize("error", [OSError("libcuda.so"), RuntimeError("bad build"), AttributeError("no attribute")])
def test_a_broken_package_stops_nobody_who_did_not_ask_for_it(monkeypatch, nothing_cached, error):
    for name in ("triton_import_problem", "cupy_import_problem"):
        monkeypatch.setattr(available, name, getattr(available, name).__wrapped__)
    monkeypatch.setattr(available.importlib, "import_module", Mock(side_effect=error))
    with pytest.warns(UserWarning, match=f"is installed, but fails, and is not used: .*{error}"):
        assert _selected() is Backend.TORCH
    with pytest.raises(ImportError, match=str(error)):
        _selected("triton")
