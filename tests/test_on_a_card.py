"""What the tests do on a card, without one: their settings, their tables, and what becomes of a broken process."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import test_gpu
import torch
from places import INTERPRETED, KERNELS
from standing_in import H100, plan_of
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_lstm
from gpu_lstm.call import modes
from gpu_lstm.kernels import by_steps
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn import choose
from gpu_lstm.kernels.triton_rnn import launch as triton

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here")

ON_THE_HOST = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default


@pytest.fixture(scope="module")
def a_card():
    """Before the fixtures of a test ask for one."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        yield


class Reads(TorchDispatchMode):
    """What reads a number of a tensor on the host: on a card it waits for the stream, and a capture forbids it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in ON_THE_HOST
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "SLSTM"])
@pytest.mark.parametrize("place", ["held", "resident", "cooperative/4/1/4", "pointwise", "cupy"])
@pytest.mark.parametrize("checked", [False, True])
def test_the_host_reads_no_number_in_a_call_unless_the_test_asks_for_margins(
    a_card, request, monkeypatch, cell, place, checked
):
    if checked:
        request.getfixturevalue("within_margins")
    backend, force = KERNELS[place]
    force(monkeypatch)
    monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)  # what is counted is of a call that nobody watches
    monkeypatch.setattr(triton, "launch_kernel", lambda *_, **__: None)  # the interpreter reads numbers itself
    monkeypatch.setattr(cupy, "loaded", lambda *_: lambda *_: None)
    module, x = getattr(gpu_lstm, cell)(4, 8, backend=backend), torch.zeros(3, 2, 4)
    with Reads() as reads:
        module(x)[0].sum().backward()
    assert (reads.count > 0) == checked


class Launches(TorchDispatchMode):
    """How many operators are run that launch something on a card."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [
    {}, dict(layer_norm=("hh",)), dict(layer_norm=("c",)), dict(layer_norm=("hh", "c")), dict(proj_size=3, zoneout=0.1),
], ids=str)  # fmt: skip
def test_a_step_is_as_many_launches_as_are_estimated(monkeypatch, options, dtype):
    """What a call of one step more launches more: kernels, products, and what torch does for layer norms."""
    KERNELS["pointwise"].force(monkeypatch)
    launched, lstm, counts = mock.Mock(), gpu_lstm.LSTM(4, 8, dtype=dtype, backend="triton", **options).eval(), []
    monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)  # what is counted is of a call that nobody watches
    monkeypatch.setattr(triton, "launch_kernel", launched)

    def launches(act):
        launched.reset_mock()
        with Launches() as operators:
            result = act()
        counts.append(operators.count + launched.call_count)
        return result

    for steps in (4, 5):
        x = torch.zeros(steps, 2, 4, dtype=dtype)
        y, _ = launches(lambda x=x: lstm(x))
        launches(lambda y=y: torch.autograd.grad(y.sum(), [*lstm.parameters()]))
    norms = options.get("layer_norm", ())
    problem = Problem(2, 2, 8, dtype, options.get("proj_size", 0), zoneout_h=0 if "zoneout" in options else None,
                      gain_hh="hh" in norms, gain_c="c" in norms)  # fmt: skip
    expected = [by_steps.launches_of(problem, backward) for backward in (False, True)]
    assert [counts[2] - counts[0], counts[3] - counts[1]] == expected


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_family_runs_on_an_h100_with_both_cells(cell):
    for test in (test_gpu.test_the_headline, test_gpu.test_every_family, test_gpu.test_a_captured_graph_replays):
        assert test_gpu.every_cell.mark in test.pytestmark
    ragged = Problem(20, 9, 1, torch.float16, cell=cell, reverse=True, lengths=torch.int64, resets=True)
    forced = [(name, ragged._replace(hidden=hidden)) for name, hidden in test_gpu.FORCED]
    plans = [plan_of(name, problem, backward) for name, problem in forced for backward in (False, True)]
    assert {type(plan.family) for plan in plans} == choose.FAMILIES.keys()
    for name, (batch, hidden) in test_gpu.CHOSEN.items():
        plan, *_ = choose.plans(Problem(30, batch, hidden, torch.float16, cell=cell), H100, False)
        assert plan.family.name == name


def of_ours(words, units, dtype, batch=test_gpu.SIZE[1]):
    precision, heads = "tf32" if dtype is torch.float32 else "ieee", 4 if "four" in words else 1 + ("heads" in words)
    cell = next((cell for cell in ("gru", "slstm") if cell in words.split()), "lstm")
    ragged = dict(lengths=torch.int64, resets=True)
    return Problem(2, batch, heads * units, dtype, precision=precision, cell=cell, heads=heads, **ragged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["tf32", "bf16"])
def test_heads_and_the_slstm_run_by_every_family_of_an_h100_in_tf32_and_half_precision(dtype):
    """As they are forced; and as they are chosen."""
    for words in test_gpu.OF_OURS:
        problems = {family: of_ours(words, units, dtype) for family, units in test_gpu.UNITS.items()}
        plans = [plan_of(family, p, backward) for family, p in problems.items() for backward in (False, True)]
        assert {type(plan.family) for plan in plans} == choose.FAMILIES.keys()
    sizes = ((batch, H // 4 if heads else H, heads) for batch, H, heads in test_gpu.SIZES)
    problems = [of_ours(f"slstm {heads}", units, dtype, batch) for batch, units, heads in sizes]
    chosen = {choose.plans(p, H100, backward)[0].family.name for p in problems for backward in (False, True)}
    assert chosen == {"resident", "cooperative", "held"}


@pytest.fixture
def rehearsed(monkeypatch):
    """Tests of test_gpu.py run on the CPU, by plans that it can run: where there are no streams and no graphs."""

    def captured(run):
        found = run()
        return found, lambda: [t.data.copy_(again) for t, again in zip(found, run())]

    changes = dict(CARD="cpu", SIZE=(3, 9, 3), UNITS=dict.fromkeys(KERNELS, 9), card_of=lambda _: H100,
                   force=lambda patch, place: KERNELS[place].force(patch), captured=captured,
                   on_a_stream=lambda run: run())  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(test_gpu, name, value)


@pytest.mark.parametrize(("place", "words", "dtype"), [
    ("resident", "slstm heads", torch.float16), ("cooperative/16/1/1", "heads", torch.float32),
    ("held", "gru heads", torch.float16), ("pointwise", "slstm", torch.float32), ("step", "heads", torch.float16),
])  # fmt: skip
@pytest.mark.parametrize("fault", [False, True])
def test_heads_and_the_slstm_rehearsed(rehearsed, monkeypatch, place, words, dtype, fault):
    """What a family of kernels must be for the test of it on a card to pass; and that one with a fault fails."""
    forward = Layer.forward

    def of_the_unit_before(layer, gates, r, save):
        inputs = r.inputs._replace(weight_hh=r.inputs.weight_hh.roll(1, 0))
        return forward(layer, gates, r._replace(inputs=inputs), save)

    if fault:
        monkeypatch.setattr(Layer, "forward", of_the_unit_before)
    with pytest.raises(AssertionError, match=r"RMS error|away from zero") if fault else contextlib.nullcontext():
        test_gpu.test_every_family_of_heads_and_of_the_slstm(monkeypatch, place, words, dtype)


TORCH = """  # on a card that a test breaks for its process
import sys
from types import SimpleNamespace

sys.modules["triton"] = None
broken = False

def works(*_, **__):
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

rand = works
cuda = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, synchronize=works)
"""
TESTS = """
import logging, pytest, torch

@pytest.mark.parametrize("n", range(12))
def test_a_kernel(n):
    logging.getLogger("gpu_lstm").info("plan %d", n)
    torch.broken |= n == 3
    torch.rand()
"""


@pytest.mark.parametrize(("options", "passed"), [
    ("-n 2 --dist worksteal", 11), ("", 3),  # without workers pytest ends
])  # fmt: skip
def test_a_process_ends_where_the_card_fails_and_another_runs_the_other_tests(tmp_path, options, passed):
    """And before the end there is the traceback, with what was logged."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    for name, text in {"torch": TORCH, "test_kernels": TESTS}.items():
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "xdist"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    into = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run([*command, *options.split(), tmp_path], cwd=tmp_path, env=environment, **into)
    before, _, after = done.stdout.partition("= FAILURES =")
    assert (done.returncode, int(re.search(r"(\d+) passed", after)[1])) == (1, passed), done.stdout
    assert set(re.findall("FAILED .*test_a_kernel(.*)]", after)) == {"[3"}
    assert "E   RuntimeError: CUDA error: an illegal memory access" in before
    assert set(re.findall("INFO +gpu_lstm:.*plan (.*)", before)) == {"3"}
    assert "in this process any more, after test_kernels.py::test_a_kernel[3]: CUDA error" in done.stdout
