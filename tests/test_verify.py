"""A kernel that computes wrong numbers on a card, times out or fails there is found before its numbers are used."""

import contextlib
import ctypes
import dataclasses
import functools
import re
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import triton.language as tl
from cases import inputs_of
from concurrent_interpreter import ConcurrentRun
from places import by_interpreter, cuda
from standing_in import plan_of, the_cpu_is_a_card
from test_faults import plant
from test_settings import SETTINGS
from torch.utils.checkpoint import checkpoint

import gpu_lstm
from gpu_lstm.backends import fused, torch_rnn
from gpu_lstm.dispatch import race
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.cards import Card
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.layer import kept_layer
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import equations, launch
from gpu_lstm.kernels.triton_rnn.plans.choose import always
from gpu_lstm.kernels.triton_rnn.plans.planning import INTERPRETER
from gpu_lstm.verification import verify

pytestmark = [
    by_interpreter,
    pytest.mark.usefixtures("nothing_cached"),
]

CPU = torch.device("cpu")
FORWARD = Pass()
PLAIN, HALF = (Problem(2, 3, 20, dtype) for dtype in (torch.float32, torch.float16))
RAGGED = dict(lengths=torch.int64, resets=True)
NORMS = dict(gain_hh=True, gain_c=True, bias_c=True)
OF_GRU = dict(cell="gru", bias_hh=True)


def _given(problem):
    """Return the tensors of a call, whose x has some features."""
    given, rows = launch.call_of(problem, CPU)[1].inputs, CELLS[problem.cell].rows * problem.hidden
    states = {} if given.reset_c is None else dict(reset_h=torch.zeros(problem.steps, problem.batch, problem.width))
    x, weight_ih = torch.zeros(problem.steps, problem.batch, 3), torch.zeros(rows, 3)
    tensors = dict(x=x, weight_ih=weight_ih, bias_ih=torch.zeros(rows), bias_hh=torch.zeros(rows), **states)
    return given._replace(**{name: t.to(problem.dtype) for name, t in tensors.items()})


def _verify(problem, pass_=FORWARD, plan=None, given=None):
    plan = plan or always(problem, INTERPRETER, pass_.backward)
    return verify.verify(kept_layer(launch, problem, CPU), pass_, given or _given(problem), plan)


def test_the_kernels_that_are_verified_are_those_of_a_call(monkeypatch, launched):
    """Kernels are compiled for the dtypes of their arguments, and for absent arguments."""
    monkeypatch.setattr(verify, "ENOUGH", 1)
    given = inputs_of((3, 3, 3, 20), "ragged states peepholes norms")
    x, h0, c0, *weights = (None if t is None else t.half().requires_grad_() for t in given[:13])
    states = [t.half().requires_grad_() for t in (given.reset_h, given.reset_c)]
    traversal = dict(lengths=given.lengths, resets=given.resets, reset_states=states)
    lstm_layer(x, weights, (h0, c0), **traversal, backend="triton")[0].sum().backward()
    for pass_ in (Pass(), Pass(True, dh_n=False)):
        _verify(HALF._replace(**RAGGED, **NORMS, weight_peephole=True, reset_c=True), pass_)
    launches = {}  # the kinds of each part of a step; there are two parts, since c is normalised
    for each in launched.call_args_list:
        kind = {name: t.dtype if isinstance(t, torch.Tensor) else t is None for name, t in each.kwargs.items()}
        launches.setdefault((each.args[0].__name__, each.kwargs["S"][-2:]), []).append(kind)
    assert len(launches) == 4
    for kinds in launches.values():
        assert len(kinds) == 3 + verify.STEPS
        assert all(kind == kinds[0] for kind in kinds)


@pytest.mark.parametrize("name", ["x", "h0", "c0", "weight_hh", "reset_h", "reset_c"])
def test_every_gradient_of_a_recurrence_is_verified(monkeypatch, name):
    right = fused.gradients

    def twice(*given):
        found = right(*given)
        return found | {name: 2 * found[name]}

    monkeypatch.setattr(fused, "gradients", twice)
    monkeypatch.setattr(verify, "ENOUGH", 1)
    assert f"gradient of {name} " in _verify(HALF._replace(**RAGGED, reset_c=True), Pass(True))


@pytest.mark.parametrize(("times", "wrong"), [(1.9, False), (2.1, True)])
def test_an_error_of_twice_torchs_or_of_the_last_place_is_allowed(monkeypatch, times, wrong):
    monkeypatch.setattr(verify, "ENOUGH", 1)

    def by_kernels(small, layer, gates):
        truth, _ = small.by_reference(torch.float64)
        return {name: t + times * torch.finfo(torch.half).eps * t.abs().max() for name, t in truth.items()}

    monkeypatch.setattr(verify.Small, "by_kernels", by_kernels)
    assert (_verify(HALF) is not None) == wrong


@pytest.mark.parametrize(("family", "options"), [
    *((family, dict(weight_peephole=True)) for family in ("cooperative", "pointwise", "step")), ("resident", OF_GRU),
    pytest.param("resident", dict(projected=5, weight_peephole=True), marks=pytest.mark.deep),
])  # fmt: skip
def test_every_family_is_verified_by_its_own_kernel(monkeypatch, family, options):
    monkeypatch.setattr(verify, "STEPS", 2)
    run = Mock(side_effect=ConcurrentRun(seed=0))
    monkeypatch.setattr(launch, "launch_kernel", run)
    problem = HALF._replace(**RAGGED, batch=99, **options)
    for pass_ in (Pass(), Pass(True)):
        plan = plan_of(family, HALF._replace(batch=99, cell=problem.cell), pass_.backward)
        if family == "cooperative":
            plan = dataclasses.replace(plan, groups=2, tiles_per_program=7)
        if family == "step":  # three programs for each of two tiles of units
            plan = dataclasses.replace(plan, programs=6, tiles_per_program=7, rows=16)
        assert _verify(problem, pass_, plan) is None
        assert run.call_args.args[1] == plan.grid, "the call's own"
        # One program, or one of two groups, has two tiles, and one of these is partial.
        tiles = 4 if family == "step" else 3
        assert run.call_args.kwargs["B"] == tiles * plan.rows - plan.rows // 2
    kernels = dict.fromkeys(each.args[0].__name__ for each in run.call_args_list)
    assert list(kernels) == [f"{family}_{way}_kernel" for way in ("forward", "backward")]


def test_a_single_step_is_verified_by_the_kernel_of_a_single_step(monkeypatch, launched):
    monkeypatch.setattr(verify, "ENOUGH", 1)
    for steps in (1, 2):
        assert _verify(PLAIN._replace(steps=steps), Pass(save=False)) is None
    arguments = [each.kwargs for each in launched.call_args_list]
    assert [a["arrivals_ptr"] is None for a in arguments] == [True, False]
    assert [a["T"] for a in arguments] == [1, verify.STEPS]


@pytest.mark.parametrize("pass_", [FORWARD, Pass(True)])
def test_a_call_without_features_is_verified_by_one_that_has_some(pass_):
    """`call_of` makes no x."""
    assert _verify(PLAIN, pass_, given=launch.call_of(PLAIN, CPU)[1].inputs) is None


@pytest.mark.parametrize("fault", ["sLSTM: half of l", "sLSTM: dl lost"])
def test_a_wrong_kernel_is_found(monkeypatch, fault):
    """test_faults.py has faults of other cells, and test_numba_faults.py of all options."""
    problem = PLAIN._replace(**RAGGED, reverse=True, cell="slstm")
    plant(monkeypatch, fault)
    text = r"failed its verification on cpu: the RMS error of .* where .* is allowed.*report"
    with pytest.warns(UserWarning, match=text):
        assert (_verify(problem) or _verify(problem, Pass(True))).startswith("the RMS error of")


@pytest.mark.parametrize("fault", [None, "share", "c_n"])
def test_the_state_that_calls_begin_with_is_verified(monkeypatch, fault):
    """The state of an sLSTM is empty, l = -inf. Where a sequence has no step it ends empty, too: equal infinities are
    right."""
    problem, run = PLAIN._replace(cell="slstm", lengths=torch.int64, batch=5), verify.Small.by_kernels
    # The share of the first g is 1. With finite states of this size the fault changes nothing.
    if fault == "share":
        monkeypatch.setattr(equations, "LOWEST", tl.constexpr(-8.0))
    if fault == "c_n":
        by_kernels = lambda *given: (found := run(*given)) | dict(c_n=found["c_n"].nan_to_num(neginf=0))  # noqa: E731
        monkeypatch.setattr(verify.Small, "by_kernels", by_kernels)
    with pytest.warns(UserWarning, match="the RMS error") if fault else contextlib.nullcontext():
        assert (_verify(problem) is None) == (fault is None)


@pytest.mark.usefixtures("exact_float32_products")
def test_products_are_exact_while_a_kernel_is_verified_whatever_the_user_has_set(card, monkeypatch):
    """In TF32 the products over all steps, by torch.matmul, would count as an error of a kernel that is exact, as cuDNN
    is."""
    matmul, seen = torch.backends.cuda.matmul, []

    def noted(run):
        @functools.wraps(run)
        def wrapper(*given):
            seen.append((run.__name__, matmul.fp32_precision, matmul.allow_fp16_accumulation))
            if run.__name__ == "input_product" and matmul.fp32_precision == "tf32":
                given = (given[0].view(torch.int32) & ~0x1FFF).view(torch.float32), *given[1:]
            return run(*given)

        return wrapper

    of_lstm, small = fused.EQUATIONS["lstm"], verify.Small
    for place, name in (of_lstm, "input_product"), (small, "by_reference"), (small, "yardstick"):
        monkeypatch.setattr(place, name, noted(getattr(place, name)))
    layer = gpu_lstm.LSTM(64, 32, backend="triton")
    matmul.allow_fp16_accumulation = True
    # By torch's older switches, which a program may not mix with the new ones.
    torch.set_float32_matmul_precision("high")
    try:
        layer(torch.randn(4, 8, 64))
        assert (torch.get_float32_matmul_precision(), matmul.allow_tf32) == ("high", True)
    finally:
        matmul.allow_fp16_accumulation = False
        torch.set_float32_matmul_precision("highest")
    call, *verified = seen  # the kernel is verified before the first step
    assert {name for name, *_ in verified} == {"by_reference", "yardstick", "input_product"}
    assert {tuple(settings) for _, *settings in verified} == {("ieee", False)}
    assert call == ("input_product", "tf32", True), "as the user wants it"


CONTEXTS = SETTINGS | {"autocast": partial(torch.autocast, "cpu", torch.bfloat16), "profiler": torch.profiler.profile}


@pytest.mark.filterwarnings("error:gpu_lstm", "ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "context", [pytest.param(context, marks=[pytest.mark.deep] * (context != "default device")) for context in CONTEXTS]
)
def test_contexts_of_the_caller_do_not_reach_the_first_calls_checks_and_races(card, context):
    lstm, x = gpu_lstm.LSTM(4, 5), torch.randn(3, 3, 4)
    found = []
    for backend in (None, None, "reference"):  # a first call, another call, and the expected results
        lstm.backend = backend
        with CONTEXTS[context]():
            found.append(lstm(x)[0].detach().float())
    torch.testing.assert_close(found[0], found[2], rtol=1e-2 if context == "autocast" else 1e-5, atol=1e-3)
    assert torch.equal(*found[:2])


def gradient_in_a_checkpoint(call, x):
    """Return a gradient through a checkpoint. Its hooks count the saved tensors, and must find equally many when they
    are computed again."""
    x.requires_grad_()
    return torch.autograd.grad(checkpoint(call, x, use_reentrant=False), x)[0]


@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize(("backend", "gradient"), [
    pytest.param(None, gradient_in_a_checkpoint, marks=pytest.mark.deep),
    ("triton", lambda call, x: torch.func.grad(call)(x)),
], ids=["checkpoint", "transform"])  # fmt: skip
def test_a_first_call_that_is_verified_inside_a_checkpoint_or_a_transform(card, backend, gradient):
    lstm, x = gpu_lstm.LSTM(4, 5, backend=backend), torch.randn(6, 3, 4)

    def call(x):
        return lstm(x)[0].square().sum()

    ours = gradient(call, x)
    lstm.backend = "reference"
    torch.testing.assert_close(ours, torch.func.grad(call)(x))


def test_where_torchs_lstm_fails_the_reference_is_the_yardstick(monkeypatch):
    fails = Mock(side_effect=RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"))
    monkeypatch.setattr(torch_rnn, "layer_by_torch", fails)
    assert _verify(PLAIN) is None
    plant(monkeypatch, "gates i and f swapped")
    with pytest.warns(UserWarning, match="RMS error"):
        assert _verify(PLAIN, Pass(save=False))


@pytest.fixture
def a_v100(monkeypatch):
    """The CPU as a card on which only the kernels in CUDA C++ run, compiled by g++."""
    choose = cupy.choose
    cuda(monkeypatch)
    monkeypatch.setattr(cupy, "choose", choose)
    monkeypatch.setattr(cupy, "card_of", lambda _: Card(70, 80))
    the_cpu_is_a_card(monkeypatch)
    monkeypatch.setattr(launch, "obstacle", lambda *_: RuntimeError("too old"))
    monkeypatch.setattr(race, "times_of", lambda rivals, now: {name: [1.0 + (name == "torch")] * 9 for name in rivals})


@pytest.mark.parametrize(("cls", "how", "resets"), [
    (gpu_lstm.LSTM, "right", False), (gpu_lstm.GRU, "right", True), (gpu_lstm.GRU, "computes nothing", True),
    (gpu_lstm.LSTM, "writes outside", False),
])  # fmt: skip
def test_kernels_in_cuda_are_verified_too_and_win_where_they_are_right(a_v100, monkeypatch, recwarn, cls, how, resets):
    """`auto` does not use them where they are wrong."""
    load = cupy.loaded

    def loaded(device, name):
        run = load(device, name)

        def function(grid, block, arguments):
            if how == "right":
                run(grid, block, arguments)
            if how == "writes outside":
                ctypes.memset(int(arguments[0]["h"]) - 4, 0, 4)

        return function

    monkeypatch.setattr(cupy, "loaded", loaded)
    lstm, x, found = cls(4, 5), torch.randn(6, 3, 4), []
    starts = torch.rand(6, 3) < 0.3 if resets else None
    for lstm.backend in (None, "reference"):
        y, _ = lstm(x, resets=starts)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(lstm.parameters()))])
    said = " ".join(str(each.message) for each in recwarn)
    assert (how == "right") != bool(re.search("failed its verification on cpu: .*It is not used", said))
    torch.testing.assert_close(*found)
    gpu_lstm.check()
    if how == "right":
        assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"] * 2, "forward and backward"
