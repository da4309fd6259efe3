"""A kernel that computes wrong numbers on a card, waits in vain or fails there is found out before anybody uses it."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  # the interpreter asks for it
from comparing import example
from concurrent_interpreter import ConcurrentRun
from test_faults import FAULTS, FAULTS_OF_NORMS, each

import gpu_lstm
from gpu_lstm import backends, races, trust
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels import cache as remembered
from gpu_lstm.kernels.problem import Norms, Problem, Recurrence
from gpu_lstm.kernels.triton_lstm import exchange, indexing, launch, step, trial
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, INTERPRETER, Family

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="faults are planted in interpreted kernels")

B, H = 3, 20
BOTH = (True, True)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered._read.cache_clear()
    remembered.warn_once.cache_clear()
    races._decided.clear()


def _recurrence(
    dtype=torch.float32, projected=0, ragged=False, noise="", reverse=False, left=False, peepholes=False, norms=""
) -> Recurrence:
    width = projected or H

    def zeros(*size, dtype=dtype):
        return torch.zeros(*size, dtype=dtype)

    options = {}
    if ragged:
        options = dict(lengths=zeros(B, dtype=torch.int64), resets=zeros(2, B, dtype=torch.bool))
    if left:
        options |= dict(reset_h=zeros(2, B, width) if noise else None, reset_c=zeros(2, B, H, dtype=torch.float32))
    if noise == "masks":
        options["dropout_h"] = zeros(B, width)
        options |= {f"zoneout_{s}": zeros(2, B, n, dtype=torch.bool) for s, n in (("h", width), ("c", H))}
    elif noise == "expected":
        options |= {f"zoneout_{s}": torch.tensor(0.3) for s in "hc"}
    if peepholes:
        options["weight_peephole"] = zeros(3 * H)
    there = zip(("hh", "c", "c"), (4 * H, H, H))
    options["norms"] = Norms(*(zeros(size) if name in norms.split() else None for name, size in there))
    return Recurrence(
        weight_hh=zeros(4 * H, width), weight_hr=zeros(projected, H) if projected else None, h0=zeros(B, width),
        c0=zeros(B, H, dtype=torch.float32), reverse=reverse, **options,
    )  # fmt: skip


def _step_plan(r: Recurrence, backward: bool):
    problem = Problem(4, B, H, r.h0.dtype, r.width if r.projected else 0, r.precision, regularised=r.regularised,
                      normalised=r.normalised)  # fmt: skip
    return plans(problem, INTERPRETER, backward)[-1]


@pytest.mark.parametrize(
    ("dtype", "projected", "ragged", "noise", "reverse", "left", "peepholes", "norms", "given"),
    [
        (torch.float32, 0, False, "", False, False, True, "", BOTH),
        (torch.float32, 5, True, "masks", True, True, False, "", (True, False)),
        (torch.float16, 5, True, "", False, False, False, "", (False, True)),
        (torch.float32, 0, True, "", True, True, False, "hh c", BOTH),
        (torch.float16, 0, True, "expected", True, True, True, "", BOTH),
        (torch.float16, 0, False, "masks", False, False, False, "c", BOTH),
    ],
)
def test_right_kernels_are_trusted(dtype, projected, ragged, noise, reverse, left, peepholes, norms, given):
    r = _recurrence(dtype, projected, ragged, noise, reverse, left, peepholes, norms)
    assert trust.distrust(_step_plan(r, False), r, save=False) is None
    assert trust.distrust(_step_plan(r, True), r, given=given) is None


def test_the_kernels_that_are_checked_are_those_of_a_call(monkeypatch):
    """Kernels are compiled for the dtypes of their arguments, and for those that are None."""
    launches, run = {}, launch.launch_kernel

    def record(kernel, grid, **arguments):
        kinds = {name: t.dtype if isinstance(t, torch.Tensor) else t is None for name, t in arguments.items()}
        launches.setdefault(kernel.__name__, []).append(kinds)
        run(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", record)
    given = example(3, B, 3, H, ragged=True, resets=0.4, states=True, peepholes=True, norms=("hh", "c"))
    x, h0, c0, *weights = (None if t is None else t.half().requires_grad_() for t in given.tensors)
    states = [t.half().requires_grad_() for t in given.reset_states]
    traversal = dict(lengths=given.lengths, resets=given.resets, reset_states=states)
    lstm_layer(x, weights, (h0, c0), **traversal, backend="triton")[0].sum().backward()
    r = _recurrence(torch.float16, ragged=True, left=True, peepholes=True, norms="hh c")
    trust.distrust(_step_plan(r, False), r)
    trust.distrust(_step_plan(r, True), r, given=(True, False))
    assert len(launches) == 2
    assert all(call == check for call, check in launches.values())


def test_the_numbers_of_the_check_shut_no_gate():
    """Products are of the size of their factors: in gates that are shut or wide open no fault would show."""
    tensors = trust.Small.like(_recurrence(projected=5), B).tensors
    for name in ("weight_ih", "weight_hh", "weight_hr"):
        assert 0.75 < tensors[name].std() * tensors[name].shape[1] ** 0.5 < 1.25, name


@pytest.mark.parametrize(("family", "projected"), [(Family.RESIDENT, 5), (Family.COOPERATIVE, 0)])
def test_every_family_is_checked_by_its_own_kernel(monkeypatch, family, projected):
    kernels = []

    def run(kernel, grid, **arguments):
        kernels.append(kernel.__name__)
        ConcurrentRun(seed=0)(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", run)
    r = _recurrence(torch.float16, projected, ragged=True, peepholes=True)
    for backward, given in ((False, None), (True, BOTH)):
        proposed = plans(Problem(4, B, H, torch.float16), DEVICES["h100"], backward)
        plan = next(p for p in proposed if p.family is family)
        assert trust.distrust(plan, r, given=given) is None
    assert kernels == [f"lstm_{family.value}_{direction}_kernel" for direction in ("forward", "backward")]


@each(FAULTS | FAULTS_OF_NORMS)
def test_a_wrong_kernel_is_found_out(monkeypatch, name, fault):
    for module in (step, indexing):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, fault)
    norms = "hh c" if name in FAULTS_OF_NORMS else ""
    r = _recurrence(ragged=True, reverse=True, left=name == "reset_to", peepholes=True, norms=norms)
    with pytest.warns(UserWarning, match=r"is not trusted on cpu: the RMS error of .* where .* is allowed.*report"):
        found = trust.distrust(_step_plan(r, False), r) or trust.distrust(_step_plan(r, True), r, given=BOTH)
    assert found.startswith("the RMS error of")


@triton.jit
def meet_one_more(arrivals_ptr, times, patience, error_ptr, step):
    return exchange.meet(arrivals_ptr, times + 1, patience, error_ptr, step)


def test_a_kernel_that_waits_in_vain_is_found_out(monkeypatch):
    monkeypatch.setattr(step, "PATIENCE", 20)
    monkeypatch.setattr(step, "meet", meet_one_more)
    r = _recurrence()
    with pytest.warns(UserWarning, match="timed out at step"):
        assert "lstm_step_forward_kernel gave up" in trust.distrust(_step_plan(r, False), r)
    gpu_lstm.check()  # nothing is left to tell


def test_no_memory_is_no_verdict(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("80 GB")

    monkeypatch.setattr(launch, "layer_forward", full)
    r = _recurrence()
    with pytest.raises(torch.OutOfMemoryError):
        trust.distrust(_step_plan(r, False), r)


def test_a_verdict_is_remembered_for_one_kernel_only(monkeypatch):
    verdicts = []
    monkeypatch.setattr(trust, "_verdict", lambda *_: verdicts.append(1) or "right")
    plan, r = _step_plan(_recurrence(), False), _recurrence()
    for _ in range(2):
        trust.distrust(plan, r)
        remembered._read.cache_clear()  # as another process
    assert len(verdicts) == 1
    others = [
        (plan, r, dict(save=False)), (plan, r, dict(given=BOTH)), (plan, r, dict(given=(True, False))),
        (dataclasses.replace(plan, columns=32), r, {}), (plan, _recurrence(torch.float16), {}),
        (plan, _recurrence(ragged=True), {}), (plan, _recurrence(reverse=True), {}),
        (plan, _recurrence(projected=5), {}), (plan, _recurrence(noise="masks"), {}),
        (plan, _recurrence(noise="expected"), {}), (plan, dataclasses.replace(r, precision="tf32"), {}),
        (plan, _recurrence(projected=6), {}), (plan, _recurrence(peepholes=True), {}),
    ]  # fmt: skip
    for number, (other, like, options) in enumerate(others, start=2):
        trust.distrust(other, like, **options)
        assert len(verdicts) == number
    trust.distrust(dataclasses.replace(plan, programs=7, groups=3, walks=2), r)
    assert len(verdicts) == len(others) + 1, "the grid is no part of a kernel"


@pytest.fixture
def card(monkeypatch):
    """The CPU as a card, where the only plan is the step family's; it is checked as on one."""

    def choose_plan(problem, device, backward, variant, attempt, distrust=None):
        return trial.first_that_fits([plans(problem, INTERPRETER, backward)[-1]], attempt, distrust)

    monkeypatch.setattr(backends, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(launch, "choose_plan", choose_plan)
    monkeypatch.setattr(trial, "load", lambda *_: None)


@pytest.mark.parametrize("training", [False, True])
def test_the_user_of_a_card_with_a_wrong_kernel_gets_right_numbers(card, monkeypatch, training):
    monkeypatch.setattr(step, "cell_forward", FAULTS["cell_forward"][0])
    lstm, x = gpu_lstm.LSTM(4, 5), torch.randn(6, 3, 4)
    with torch.set_grad_enabled(training), pytest.warns(UserWarning, match="is not trusted"):
        y, _ = lstm(x)
    with gpu_lstm.backend("reference"):
        torch.testing.assert_close(y, lstm(x)[0])
    with pytest.raises(RuntimeError, match=r"no Triton kernel can run this layer on this card.*RMS error"):
        gpu_lstm.LSTM(4, 5, backend="triton")(x)


def test_a_check_inside_a_transform(card):
    """As of a first call there: it neither fails nor changes the numbers."""
    x, lstm = torch.randn(6, 3, 4), gpu_lstm.LSTM(4, 5, backend="triton")
    ours = torch.func.grad(lambda x: lstm(x)[0].square().sum())(x)
    lstm.backend = "reference"
    torch.testing.assert_close(ours, torch.func.grad(lambda x: lstm(x)[0].square().sum())(x))


def test_a_wrong_backward_kernel_alone_sends_training_to_torch(card, monkeypatch):
    fault, *_ = FAULTS["cell_backward"]
    monkeypatch.setattr(step, "cell_backward", fault)
    lstm, x = gpu_lstm.LSTM(4, 5), torch.randn(6, 3, 4)
    gradients = []
    for backend in (None, "reference"):
        lstm.backend = backend
        lstm.zero_grad()
        lstm(x)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in lstm.parameters()])
    for ours, true in zip(*gradients):
        torch.testing.assert_close(ours, true)
