"""What a call costs the host: functions from the module to the launch, numbers that it reads, launches of a step."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from comparing import both_kinds
from places import KERNELS, by_interpreter
from watching import Watched

import gpu_lstm
from gpu_lstm.call import modes
from gpu_lstm.kernels import by_steps
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn import launch as triton

COUNT = Path(__file__).parents[1] / "dev/path_count.py"
FUNCTIONS = {  # the most functions of the library that a call enters, in inference and in training
    "T=1": (36, 61), "T=128": (36, 64), "lengths": (40, 70), "resets": (40, 69), "two layers, bidirectional": (81, 195),
}  # fmt: skip


def test_the_way_of_a_call_is_not_longer():
    """`python dev/path_count.py CASE` prints the functions. After a change that shortens the way, lower FUNCTIONS."""
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, COUNT], env=without_gpu, check=True, capture_output=True, text=True)
    found = re.findall(r"(.+), (?:inference|training): (\d+) calls", done.stdout)
    most = [(case, count) for case, counts in FUNCTIONS.items() for count in counts]
    assert [case for case, _ in found] == [case for case, _ in most]
    assert [each for each, (_, count) in zip(found, most) if int(each[1]) > count] == []


@both_kinds
def test_a_cell_on_a_cpu_comes_soon_to_torchs_operator(kind):
    x, state, called, cell = torch.zeros(2, 3), torch.zeros(2, 4), [], getattr(gpu_lstm, f"{kind}Cell")(3, 4)

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and "/gpu_lstm/" in code.co_filename and code.co_name[0] != "<":
            called.append(code.co_name)

    cell(x)
    sys.setprofile(profile)
    try:
        cell(x, (state, state) if kind == "LSTM" else state)
    finally:
        sys.setprofile(None)
    assert len(called) <= 8, called


@pytest.fixture
def unwatched(monkeypatch):
    """Count operators without making the call take the path of a watched call."""
    monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)


@pytest.fixture(scope="module")
def a_card():
    """Pretend that there is a card, before other fixtures ask. Without a card they check margins."""
    with patch.object(torch.cuda, "is_available", return_value=True):
        yield


ON_THE_HOST = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
"""Operators that read a number on the host. On a card they wait for the stream, and a capture forbids them."""


@by_interpreter
@pytest.mark.parametrize(("place", "margins"), [
    *((place, False) for place in ("held", "resident", "cooperative/4/1/4", "pointwise", "cupy")), ("held", True),
])  # fmt: skip
def test_the_host_reads_no_number_in_a_call(a_card, unwatched, request, monkeypatch, place, margins):
    """A call that checks margins reads numbers, which shows that reads are counted."""
    if margins:
        request.getfixturevalue("within_margins")
    backend, force = KERNELS[place]
    force(monkeypatch)
    monkeypatch.setattr(triton, "launch_kernel", lambda *_, **__: None)  # the interpreter reads numbers itself
    monkeypatch.setattr(cupy, "loaded", lambda *_: lambda *_: None)
    for cell in "LSTM", "GRU", "SLSTM":
        module, x = getattr(gpu_lstm, cell)(4, 8, backend=backend), torch.zeros(3, 2, 4)
        with Watched(lambda operator, *_: operator in ON_THE_HOST) as reads:
            module(x)[0].sum().backward()
        assert (reads.count > 0) == margins


@by_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [
    {}, dict(layer_norm=("hh",)), dict(layer_norm=("c",)), dict(layer_norm=("hh", "c")), dict(proj_size=3, zoneout=0.1),
], ids=str)  # fmt: skip
def test_a_step_is_as_many_launches_as_are_estimated(a_card, unwatched, monkeypatch, options, dtype):
    """One more step adds as many launches as by_steps estimates: kernels, products and layer norms."""
    KERNELS["pointwise"].force(monkeypatch)
    launched, lstm, counts = Mock(), gpu_lstm.LSTM(4, 8, dtype=dtype, backend="triton", **options).eval(), []
    monkeypatch.setattr(triton, "launch_kernel", launched)

    def launches(act):
        launched.reset_mock()
        with Watched(lambda operator, *_: not operator.is_view) as operators:
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
