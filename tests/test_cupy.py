"""The CuPy backend: its launcher, and the compilation of its kernels. test_layer.py tests their numbers.

compute-sanitizer --tool memcheck   python -m pytest tests/test_layer.py tests/test_cupy.py --require-gpu -k cu
"""

import inspect
import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from places import cuda
from standing_in import recurrence, torch_finds

from dev.compile_table import cuda_kernels
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.kernels import by_steps, cupy_rnn, memory
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.cupy_rnn import launch
from gpu_lstm.kernels.layer import kept_layer
from gpu_lstm.kernels.problem import Problem, problem_of

SOURCE = launch.join(launch.texts())
SUPPORTED = "backend 'cupy' supports float16, bfloat16 and float32"


def test_the_launcher_and_the_source_agree():
    assert tuple(re.findall(r"__global__ void \S+ (\w+)\(", SOURCE)) == launch.KERNELS
    assert f"int THREADS = {launch.THREADS};" in SOURCE
    assert f"enum Cell {{ {', '.join(cell.capitalize() for cell in CELLS)} }};" in SOURCE
    assert "#include" not in SOURCE, "CuPy brings no headers along"


# Refusals and imports


@pytest.mark.parametrize(("facts", "kind", "text"), [
    (dict(device="cpu"), RuntimeError, "backend 'cupy' runs on CUDA tensors, got cpu"),
    (dict(capability=(6, 1)), RuntimeError, "backend 'cupy' needs compute capability 7.0, cuda has 6.1"),
    (dict(capability=(7, 0)), None, "None"),
    (dict(device="cpu", dtype=torch.float64), TypeError, f"{SUPPORTED}, got torch.float64"),
    *((dict(absent=cuda), ImportError, f'pip install "cupy-cuda{package}x[ctk]>=')
      for cuda, package in (("12.8", 12), ("13.0", 13), (None, 13))),
], ids=str)  # fmt: skip
def test_why_it_is_unavailable(monkeypatch, facts, kind, text):
    """The reason is the tensors, the card, or CuPy, whose package is named for torch's CUDA."""
    absent = "absent" in facts
    torch_finds(monkeypatch, get_device_capability=facts.get("capability"))
    monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
    monkeypatch.setitem(sys.modules, "cupy", None if absent else Mock())
    monkeypatch.setattr(torch.version, "cuda", facts.get("absent"))
    monkeypatch.delitem(sys.modules, cupy_rnn.__name__)  # so that it is imported again
    device, dtype = torch.device(facts.get("device", "cuda")), facts.get("dtype", torch.float32)
    obstacle = available.why_unavailable(Backend.CUPY, device, dtype)
    assert obstacle is kind is None or type(obstacle) is kind
    assert text in str(obstacle) if kind is ImportError else text == str(obstacle)


@pytest.mark.parametrize("newer", [True, False], ids=["CuPy 14", "CuPy 13"])
def test_the_stream_is_torchs(monkeypatch, newer):
    theirs, cupy = SimpleNamespace(cuda_stream=0x1234, __cuda_stream__=lambda: (0, 0x1234)), MagicMock()
    if not newer:
        del cupy.cuda.Stream.from_external
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: theirs)
    launch.stream(torch.device("cuda", 1))
    expected = call.cuda.Stream.from_external(theirs) if newer else call.cuda.ExternalStream(0x1234, 1)
    assert cupy.mock_calls == [expected]


def test_a_launch_is_what_cupy_is_asked_for(monkeypatch):
    """CuPy loads the function by its name, once. It is given the grid, the block, and one argument that holds all
    others, of which only some change."""
    asked, device, tensors = MagicMock(), torch.device("cpu"), [torch.zeros(3) for _ in range(3)]
    given = []
    monkeypatch.setitem(sys.modules, "cupy", asked)
    monkeypatch.setattr(launch, "loaded", launch.loaded.__wrapped__)
    monkeypatch.setattr(memory._Checking, "on", False)
    function = asked.RawModule().get_function()
    function.side_effect = lambda *of: given.append((*of[:2], of[2][0].copy()))
    asked.reset_mock()
    problem = Problem(2, 5, 300, torch.float16, reverse=True, zoneout_c=0)
    arguments = dict(gates_ptr=tensors[0], z_ptr=tensors[1], c_ptr=None, weight_hh_ptr=tensors[2], T=7, B=5)
    run = launch.bind(by_steps.parts_of(problem, False)[0], False, device, arguments)
    run(step=0)
    run(step=1, z_ptr=tensors[2])
    name = "after_product<float16, Lstm, 'z', 'h'>"
    module = call.RawModule(code=SOURCE, options=launch.OPTIONS, name_expressions=[name])
    assert asked.mock_calls[:2] == [module, call.RawModule().get_function(name)]
    for step, (grid, block, found) in enumerate(given):
        assert (grid, block, found.size) == ((5, 3), (128,), 1)
        names = "step", "gates", "z", "c", "T", "H", "heads", "from_x", "reverse", "rate_h", "rate_c"
        z = tensors[1 + step].data_ptr()
        expected = step, tensors[0].data_ptr(), z, 0, 7, 300, 1, 4, 1, 0, 1
        assert tuple(int(found[name]) for name in names) == expected
    assert len(given) == 2


# Compilation by NVRTC, and the layout of the argument


@pytest.mark.parametrize(("architecture", "element"), [
    (75, "float16"), *(pytest.param(*case, marks=pytest.mark.deep) for case in ((70, "float"), (90, "bfloat16"))),
])  # fmt: skip
def test_every_kernel_compiles_without_warnings_and_spills(architecture, element):
    try:
        known = cuda_kernels.architectures()
    except ImportError as error:
        pytest.skip(str(error))
    if architecture not in known:
        pytest.skip("CUDA 13 compiles nothing for it")
    cases = [case for case in cuda_kernels.cases(h100=False) if case.architecture == architecture]
    cases = [case for case in cases if f"<{element}," in case.name]
    assert {case.kernel for case in cases} == set(launch.KERNELS)
    assert {cuda_kernels.compile_for(case).log for case in cases} == {""}
    assert [report for report in cuda_kernels.reports(cases) if not report.fits] == []


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(monkeypatch):
    steps, batch, hidden = 70_000, 64, 128
    gates = torch.zeros(steps, batch, 4 * hidden, dtype=torch.float16, device="cuda")  # 2.3e9 elements
    gates[-1, -1] = 1
    state = torch.zeros(batch, hidden, device="cuda")
    r = recurrence(gates, weight_hh=gates.new_zeros(4 * hidden, hidden), h0=state.half(), c0=state)
    cuda(monkeypatch, "cuda")
    h, *_ = kept_layer(launch, problem_of(r.inputs, "lstm", False, "ieee"), gates.device).forward(gates, r, save=False)
    one = torch.ones((), device="cuda")
    last = one.sigmoid() * (one.sigmoid() * one.tanh()).tanh()
    torch.testing.assert_close(h[-1, -1], last.half().expand(hidden), rtol=1e-3, atol=1e-3)
    assert (h[-1, :-1] == 0).all()
