"""The CuPy backend's launcher, and what its kernels compile to. Which arguments they get is tested by their results."""

import inspect
import itertools
import re
import sys
from collections.abc import Iterable
from math import ceil
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from standing_in import H100, torch_finds

from dev.compile_table import cuda_kernels
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.kernels import cupy_rnn, memory
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.cupy_rnn import launch, planning, source
from gpu_lstm.kernels.cupy_rnn.planning import Card, Plan, choose_plan, plans
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn import exchange

SOURCE = source.join(source.texts())
DTYPES = tuple(source.ELEMENTS)
SUPPORTED = "backend 'cupy' supports float16, bfloat16 and float32"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("card", [H100, Card(86, 20), Card(75, 40)], ids=lambda card: f"sm_{card.architecture}")
def test_there_is_a_plan_for_every_problem_and_its_blocks_cover_everything_once(card, backward):
    sizes = (1, 17, 1000), (1, 33, 768, 1024, 20_000)
    for batch, hidden, dtype, side_by_side, cell in itertools.product(*sizes, DTYPES, (1, 2), CELLS.values()):
        problem = Problem(2, batch, hidden, dtype, side_by_side=side_by_side, cell=cell.name)
        found = list(plans(problem, card, backward))
        assert choose_plan(problem, card, backward) == min(found, key=lambda plan: plan.clocks)
        for plan in found:
            blocks, groups = plan.grid
            assert blocks * groups * side_by_side <= card.multiprocessors, "all resident at once"
            assert (blocks % plan.partners, groups <= ceil(batch / 8)) == (0, True)
            assert plan.units * 8 <= plan.threads
            if plan.chunks:
                assert (card.architecture >= 80, dtype.itemsize) == (True, 2)
                assert blocks * plan.units >= hidden > (blocks - plan.partners) * plan.units
                assert cell.rows % plan.partners == 0
                k = planning.words_of(problem) * (cell.rows // plan.partners if backward else 1)
                assert plan.chunks * plan.warps * 16 >= k > (plan.chunks - 1) * plan.warps * 16


def test_the_launcher_and_the_source_agree():
    assert tuple(re.findall(r"__global__ void __\w+__\([^)]*\) (\w+)\(", SOURCE)) == source.KERNELS
    assert int(re.search(r"SENTINEL = (0x\w+);", SOURCE)[1], 16) == memory.EVERY_BIT & 0xFFFFFFFF
    assert "#include" not in SOURCE, "CuPy brings no headers along"
    found = re.search(r"LONGER = (\d+), SHORTER = (\d+), LONGEST = (\d+)", SOURCE)
    assert tuple(map(int, found.groups())) == (exchange.LONGER, exchange.SHORTER, exchange.LONGEST)


# What is refused, and what is imported when.


@pytest.mark.parametrize(("facts", "kind", "text"), [
    (dict(device="cpu"), RuntimeError, "backend 'cupy' runs on CUDA tensors, got cpu"),
    (dict(capability=(6, 1)), RuntimeError, "backend 'cupy' needs compute capability 7.0, cuda has 6.1"),
    (dict(capability=(7, 0)), None, "None"),
    (dict(device="cpu", dtype=torch.float64), TypeError, f"{SUPPORTED}, got torch.float64"),
    *((dict(absent=cuda), ImportError, f'pip install ".[{extra}]" in a clone')
      for cuda, extra in (("12.8", "cupy12"), ("13.0", "cupy13"), (None, "cupy13"))),
], ids=str)  # fmt: skip
def test_why_it_is_unavailable(monkeypatch, facts, kind, text):
    """The tensors, the card, or CuPy, which is named with its extra."""
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
    launch._stream(torch.device("cuda", 1))
    expected = call.cuda.Stream.from_external(theirs) if newer else call.cuda.ExternalStream(0x1234, 1)
    assert cupy.mock_calls == [expected]


def test_a_launch_is_what_cupy_is_asked_for(monkeypatch):
    """The function by its name, once loaded; its grid, block, shared memory; arguments by value, on torch's stream."""
    asked, device = MagicMock(), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "cupy", asked.cupy)
    monkeypatch.setattr(launch, "_stream", asked.stream)
    monkeypatch.setattr(launch, "_loaded", launch._loaded.__wrapped__)
    tensor, kernel = torch.zeros(3), source.KERNELS[0]
    plan = Plan(cell="lstm", hidden=768, units=12, warps=8, chunks=3, partners=1, grid=(64, 2), shared=1234, clocks=0)
    arguments = dict.fromkeys(source.parameters(kernel), tensor) | dict(c=None, T=7, B=5, reverse=True)
    launch.launch_kernel(kernel, torch.float16, plan, **arguments)
    *before, made, after = asked.mock_calls
    name = "cooperative_forward<float16, Lstm, 768, 12, 8, 3, true, false, true, true, true, true>"  # c is None
    loading = dict(code=SOURCE, options=source.OPTIONS, name_expressions=[name], enable_cooperative_groups=True)
    module, stream = call.cupy.RawModule(**loading), call.stream(device)
    assert before == [module, call.cupy.RawModule().get_function(name), stream, call.stream().__enter__()]
    assert after == call.stream().__exit__(None, None, None)
    function = asked.cupy.RawModule().get_function()
    grid, block, given = made.args
    assert (grid, block, made.kwargs) == ((64, 2), (256,), {"shared_mem": 1234})
    assert (function.call_count, function.max_dynamic_shared_size_bytes) == (1, 163 * 1024)
    values = [dict(zip(source.parameters(kernel), given))[name] for name in ("gates", "c", "T", "reverse")]
    types = [type(value).__name__.rstrip("_") for value in values]
    assert (values, types) == ([tensor.data_ptr(), 0, 7, True], ["uint64", "uint64", "int32", "bool"])


# What the kernels compile to, by NVRTC.


def architectures() -> list[int]:
    """Those that the installed NVRTC knows."""
    try:
        return cuda_kernels.architectures()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows() -> list:
    """On every architecture in bfloat16, on an H100 in all; `python -m dev.compile_table --all` has more sizes.

    Any two of architecture, direction, cell and where the weights are meet; on an H100 in bfloat16 all do.
    """
    known = architectures()
    cases = [case for case in cuda_kernels.cases(h100=False) if case.card.architecture in known]
    cases = [case for case in cases if case.problem.hidden == 768 and (
        case.problem.dtype is torch.bfloat16 or case.card.architecture == 90)]  # fmt: skip
    facts = [(case, case.backward + (case.problem.cell == "gru") + (case.plan.chunks > 0)) for case in cases]
    cases = [case for case, count in facts if (str(case).startswith("bfloat16") and case.card.architecture == 90)
             or (count + known.index(case.card.architecture)) % 2]  # fmt: skip
    assert set(known) == {case.card.architecture for case in cases} >= {80, 86, 89, 90}  # 100 and 120 from CUDA 12.8 on
    assert {cuda_kernels.compile_for(case).log for case in cases} == {""}
    return list(zip(cases, cuda_kernels.reports(cases)))


@pytest.mark.deep
def test_no_kernel_spills_weights_stay_in_registers_and_a_step_has_one_barrier(rows):
    assert [row for _, row in rows if not row.fits] == []
    for case, row in rows:
        kept = case.plan.chunks > 0
        # In the time loop no weight is loaded; the disassembler reads no code of sm_70.
        found = "mma.sync" in row.tensor_core, row.weight_loads == 0, row.loop is None
        assert found == (kept, kept, row.architecture < 75)
        if row.loop is not None:
            assert row.loop.barriers == 1
            of_unit = case.plan.partners if case.backward else CELLS[case.problem.cell].rows
            assert row.loop.products == 2 * case.plan.chunks * ceil(case.plan.units * of_unit / 16)


def a_case(backward: bool) -> cuda_kernels.Case:
    """One that keeps W_hh in registers."""
    assert 90 in architectures()
    return next(case for case in cuda_kernels.cases(h100=True) if case.backward == backward and case.plan.chunks)


@pytest.mark.deep
@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_reads_no_argument_that_is_not_given(backward):
    """As the PTX says, in which every parameter has its number; so nothing of it is in the time loop either."""
    case = a_case(backward)
    kernel = source.KERNELS[backward]
    numbers, names = {name: n for n, name in enumerate(source.parameters(kernel))}, source.optional(kernel)

    def read(given: Iterable[str]) -> set[str]:
        ptx = cuda_kernels.compile_for(case, frozenset(given)).ptx
        return {name for name in names if re.search(rf"ld\.param\S* [^;]*_param_{numbers[name]}\]", ptx)}

    for given in (names[::2], names[1::2]):
        assert read(given) == set(given)


@pytest.mark.parametrize("backward", [False, True])
def test_a_warp_waits_before_its_first_poll(monkeypatch, backward):
    """By a loop with a vote; without it nothing votes before words are loaded."""
    case, texts = a_case(backward), source.texts()

    def votes_before() -> bool:
        return "vote.sync.any" in cuda_kernels.compile_for.__wrapped__(case).ptx.partition("ld.relaxed.gpu")[0]

    assert votes_before()
    without = texts | {"cooperative": texts["cooperative"].replace(" delay.pass();", "")}
    monkeypatch.setattr(cuda_kernels, "texts", lambda: without)
    assert not votes_before()
