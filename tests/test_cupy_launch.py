"""The CuPy backend's launcher, every argument compared with cooperative.cu; what its kernels compile to: no GPU."""

import collections
import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from math import ceil, prod
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from standing_in import recurrence
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compile_table import cuda_kernels
from compile_table.report import Report
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.kernels import memory
from gpu_lstm.kernels.cupy_lstm import launch, planning, source
from gpu_lstm.kernels.cupy_lstm.planning import Card, Plan, choose_plan, plans
from gpu_lstm.kernels.problem import Problem, problem_of
from gpu_lstm.kernels.triton_lstm import exchange

SOURCE = source.join(source.parts())
DTYPES = tuple(source.ELEMENTS)
H100 = Card(90, 132)
T, B, H, P = 3, 5, 6, 4
CUDA = torch.device("cuda")
SUPPORTED = "backend 'cupy' supports float16, bfloat16 and float32"
Parameter = collections.namedtuple("Parameter", "type name shape nullable")
"""Of a kernel, as it declares it: its type without const; the shape of what a pointer points to, or None."""


def _parameters(kernel: str) -> list[Parameter]:
    found = re.search(rf"__global__ void __\w+__\([^)]*\) {kernel}\((.*?)\) \{{", SOURCE, re.DOTALL)
    parameters = []
    for line in found[1].strip().splitlines():
        declared, _, comment = line.partition("//")
        for one in filter(None, map(str.strip, declared.split(","))):
            type_, name = one.rsplit(" ", 1)
            shape = re.search(r"\[.*?\]", comment)
            parameters.append(Parameter(type_.removeprefix("const "), name, shape and shape[0], "null" in comment))
    return parameters


def _elements(shape: str, sizes: dict[str, int]) -> int:
    """How many "[T*B + B, 4H]" has, with numbers for the letters."""
    for letter, size in sizes.items():
        shape = re.sub(rf"\b(\d+){letter}\b", rf"(\1 * {size})", shape)
        shape = re.sub(rf"\b{letter}\b", str(size), shape)
    return prod(eval(dimension.replace("/", "//")) for dimension in shape[1:-1].split(", "))


@pytest.fixture
def launched(monkeypatch) -> Mock:
    """Replaces launch_kernel."""
    monkeypatch.setattr(launch, "launch_kernel", Mock())
    return launch.launch_kernel


def _call(dtype, projected=0, ragged=False, backward=False, precision="ieee") -> None:
    width, c = projected or H, torch.zeros(T, B, H)
    sizes = (T, B, 4 * H), (T, B, width), (B, width), (4 * H, width), (projected, H)
    gates, h, h0, weight_hh, weight_hr = (torch.zeros(size, dtype=dtype) for size in sizes)
    more = dict(weight_hr=weight_hr) if projected else {}
    if ragged:
        more |= dict(lengths=torch.tensor([3, 0, 1, 2, 3]), resets=torch.zeros(T, B).bool(), reset_c=c)
    r = recurrence(gates, weight_hh=weight_hh, h0=h0, c0=c[0], **more)
    layer = launch.layer_of(problem_of(r.inputs, ragged, precision), gates.device)
    if backward:
        layer.backward(*((h, h0, c[0]) if ragged else (None, None, None)), gates, c, r)
    else:
        layer.forward(gates, r, save=ragged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projected", [0, P])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_argument_is_as_the_kernel_declares_it(launched, backward, ragged, projected, dtype):
    _call(dtype, projected, ragged, backward)
    (kernel, of_dtype, plan), arguments = launched.call_args
    assert (launched.call_count, kernel, of_dtype) == (1, source.KERNELS[backward], dtype)
    sizes = {"T": T, "B": B, "H": H, "W": planning.words_of(Problem(2, B, H, dtype)), "PARTS": plan.partners}
    types = {"E*": dtype, "float*": torch.float32, "int*": torch.int32, "bool*": torch.bool}
    parameters = _parameters(kernel)
    assert source.parameters(kernel) == tuple(parameter.name for parameter in parameters)
    for parameter, argument in zip(parameters, source.in_order(kernel, arguments)):
        where = f"{kernel}, {parameter.name}"
        match argument:
            case None:
                assert parameter.nullable, where
            case Tensor() if parameter.type == "unsigned*":  # words
                assert argument.data_ptr() % 16 == 0 or parameter.name == "partials", where
                found = argument.is_contiguous(), argument.nbytes
                assert found == (True, 4 * _elements(parameter.shape, sizes)), where
            case Tensor():
                expected = argument.numel() or 1 if parameter.name == "error" else _elements(parameter.shape, sizes)
                found = argument.dtype, argument.is_contiguous(), argument.numel()
                assert found == (types[parameter.type], True, expected), where
            case bool():
                assert (parameter.type, parameter.name, argument) == ("bool", "reverse", ragged), where
            case int():
                assert (parameter.type, argument) == ("int", sizes[parameter.name]), where


def test_arguments_go_by_their_names(launched):
    """In any order; one under another's name is refused before anything is launched."""
    _call(torch.float32)
    (kernel, *_), arguments = launched.call_args
    assert source.in_order(kernel, dict(reversed(arguments.items()))) == source.in_order(kernel, arguments)
    missing = {name: a for name, a in arguments.items() if name != "c"}
    for fault in (missing, missing | {"cell": arguments["c"]}, arguments | {"cell": arguments["c"]}):
        with pytest.raises(TypeError, match="lstm_cooperative_forward takes gates, weights, h, h_n, c, c_n, lengths"):
            source.in_order(kernel, fault)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("card", [H100, Card(86, 20), Card(75, 40)], ids=lambda card: f"sm_{card.architecture}")
def test_there_is_a_plan_for_every_problem_and_its_blocks_cover_everything_once(card, backward):
    sizes = (1, 17, 1000), (1, 33, 128, 768, 1024, 4096, 20_000)
    for batch, hidden, dtype, side_by_side in itertools.product(*sizes, DTYPES, (1, 2)):
        problem = Problem(2, batch, hidden, dtype, side_by_side=side_by_side)
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
                k = planning.words_of(problem) * (4 // plan.partners if backward else 1)
                assert plan.chunks * plan.warps * 16 >= k > (plan.chunks - 1) * plan.warps * 16


@pytest.mark.parametrize(("batch", "hidden", "backward", "sizes", "grid", "shared", "clocks"), [
    (16, 768, False, (12, 4, 6, 1), (64, 2), 13_312, (1800, 2050)),
    (16, 768, True, (16, 8, 12, 1), (48, 2), 10_240, (2600, 3000)),
    (16, 256, True, (16, 4, 8, 1), (16, 2), 5_120, (1500, 1750)),
    (16, 2048, False, (16, 8, 0, 1), (128, 1), 51_200, (26_000, 30_000)),
])  # fmt: skip
def test_what_is_chosen_on_an_h100(batch, hidden, backward, sizes, grid, shared, clocks):
    plan = choose_plan(Problem(2, batch, hidden, torch.bfloat16), H100, backward)
    assert (plan.units, plan.warps, plan.chunks, plan.partners) == sizes
    assert (plan.grid, plan.shared) == (grid, shared)
    assert clocks[0] < plan.clocks < clocks[1]


def test_the_launcher_and_the_source_agree():
    assert tuple(re.findall(r"__global__ void __\w+__\([^)]*\) (\w+)\(", SOURCE)) == source.KERNELS
    for name in ("SEQUENCES", "CHUNK", "AHEAD"):
        assert f"constexpr int {name} = {getattr(planning, name)};" in SOURCE
    assert int(re.search(r"SENTINEL = (0x\w+);", SOURCE)[1], 16) == memory.EVERY_BIT & 0xFFFFFFFF
    assert "enum Gate { I, F, G, O, GATES };" in SOURCE
    assert "#include" not in SOURCE, "CuPy brings no headers along"
    assert set(source.PARTS) == {file.stem for file in source.FOLDER.iterdir()}


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products_are_computed_in_the_precision_asked_for(launched, precision):
    """All of a projection; dh0 is computed as torch is set to compute."""
    matmul, found = torch.backends.cuda.matmul, []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                found.append(matmul.fp32_precision)
            return function(*args, **(kwargs or {}))

    before = matmul.fp32_precision
    with Products():
        for backward in (False, True):
            _call(torch.float32, P, backward=backward, precision=precision)
    assert found == [precision] * 6 + [before]
    kept = any(plan.chunks for plan in plans(Problem(2, 16, 768, torch.float32, precision=precision), H100, False))
    assert kept == (precision == "tf32")


# What is refused, and what is imported when.


def test_a_dtype_that_the_kernels_do_not_support(launched):
    with pytest.raises(TypeError, match=f"^{SUPPORTED}, got torch.float64$"):
        _call(torch.float64)
    launched.assert_not_called()


@pytest.mark.parametrize(("facts", "kind", "text"), [
    (dict(device="cpu"), RuntimeError, "backend 'cupy' runs on CUDA tensors, got cpu"),
    (dict(capability=(6, 1)), RuntimeError, "backend 'cupy' needs compute capability 7.0, cuda has 6.1"),
    (dict(capability=(7, 0)), None, "None"),
    (dict(device="cpu", dtype=torch.float64), TypeError, f"{SUPPORTED}, got torch.float64"),
    *((dict(absent=absent, cuda=cuda), ImportError, f'pip install ".[{extra}]" in a clone')
      for absent in ("cupy", "nvrtc") for cuda, extra in (("12.8", "cupy12"), ("13.0", "cupy13"), (None, "cupy13"))),
], ids=str)  # fmt: skip
def test_why_it_is_unavailable(monkeypatch, facts, kind, text):
    """The tensors, the card, or a package that is absent, which is named with its extra."""
    cupy, absent = Mock(), facts.get("absent")
    if absent == "nvrtc":
        cupy.cuda.nvrtc.getVersion.side_effect = RuntimeError("CuPy failed to load libnvrtc.so.13")
    monkeypatch.setattr(available, "cupy_import_problem", available.cupy_import_problem.__wrapped__)
    monkeypatch.setitem(sys.modules, "cupy", None if absent == "cupy" else cupy)
    monkeypatch.setattr(torch.version, "cuda", facts.get("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts.get("capability"))
    device, dtype = torch.device(facts.get("device", "cuda")), facts.get("dtype", torch.float32)
    obstacle = available.why_unavailable(Backend.CUPY, device, dtype)
    assert obstacle is kind is None or type(obstacle) is kind
    assert text in str(obstacle) if kind is ImportError else text == str(obstacle)


@pytest.mark.parametrize(("able", "feature", "chosen"), [
    ("triton cupy", None, "triton"), ("triton", None, "triton"), ("cupy", None, "cupy"), ("", None, "torch"),
    ("triton cupy", "zoneout", "triton"), ("cupy", "zoneout", "reference"),
])  # fmt: skip
def test_what_auto_chooses(monkeypatch, able, feature, chosen):
    missing = RuntimeError("not here")
    monkeypatch.setattr(available, "why_unavailable", lambda it, *_: None if it.value in able.split() else missing)
    assert available.select("auto", CUDA, torch.float32, feature, False).value == chosen
    on_cpu = available.select("auto", torch.device("cpu"), torch.float32, feature, False)
    assert on_cpu is (Backend.REFERENCE if feature else Backend.TORCH)


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
    plan = Plan(hidden=768, units=12, warps=8, chunks=3, partners=1, grid=(64, 2), shared=1234, clocks=0)
    arguments = dict.fromkeys(source.parameters(kernel), tensor) | dict(c=None, T=7, B=5, reverse=True)
    launch.launch_kernel(kernel, torch.float16, plan, **arguments)
    *before, made, after = asked.mock_calls
    name = "lstm_cooperative_forward<float16, 768, 12, 8, 3, false, true, true, true, true>"  # c is None
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


@pytest.fixture(scope="module")
def rows() -> list:
    """On every architecture in bfloat16, and on an H100 in all; `python -m compile_table --all` has the rest."""
    try:
        known = cuda_kernels.architectures()
    except ImportError as error:
        pytest.skip(str(error))

    def is_wanted(case):
        sm, is_bf16, is_large = case.card.architecture, case.problem.dtype is torch.bfloat16, case.problem.hidden == 768
        on_h100 = sm == 90 and (is_bf16 or is_large)
        return sm in known and (on_h100 or (is_bf16 and is_large and (case.plan.chunks or sm in (70, 75))))

    cases = list(filter(is_wanted, cuda_kernels.cases(h100=False)))
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
            products = 2 * case.plan.chunks * case.plan.units * (case.plan.partners if case.backward else 4) // 16
            assert row.loop.products == products


@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_reads_no_argument_that_is_not_given(rows, backward):
    """As the PTX says, in which every parameter has its number; so nothing of it is in the time loop either."""
    case = next(case for case, _ in rows if case.backward == backward and case.plan.chunks)
    kernel = source.KERNELS[backward]
    numbers, names = {name: n for n, name in enumerate(source.parameters(kernel))}, source.optional(kernel)

    def read(given: Iterable[str]) -> set[str]:
        ptx = cuda_kernels.compile_for(case, frozenset(given)).ptx
        return {name for name in names if re.search(rf"ld\.param\S* [^;]*_param_{numbers[name]}\]", ptx)}

    assert read(names) == set(names)
    for given in ((), *zip(names)):
        assert read(given) == set(given)


@pytest.mark.parametrize("backward", [False, True])
def test_a_warp_waits_before_its_first_poll(rows, monkeypatch, backward):
    """As long as in Triton's kernels, by a loop with a vote; without it nothing votes before words are loaded."""
    case = next(case for case, _ in rows if case.backward == backward and case.plan.chunks)
    texts, found = source.parts(), re.search(r"LONGER = (\d+), SHORTER = (\d+), LONGEST = (\d+)", SOURCE)
    assert tuple(map(int, found.groups())) == (exchange.LONGER, exchange.SHORTER, exchange.LONGEST)

    def votes_before() -> bool:
        return "vote.sync.any" in cuda_kernels.compile_for.__wrapped__(case).ptx.partition("ld.relaxed.gpu")[0]

    assert votes_before()
    without = texts | {"cooperative": texts["cooperative"].replace(" delay.pass();", "")}
    monkeypatch.setattr(cuda_kernels, "parts", lambda: without)
    assert not votes_before()


def test_a_kernel_that_spills_does_not_fit():
    row = Report(source.KERNELS[0], "float32", 80, None, 128, "", registers=32, spills=0, shared=0)
    assert row.fits
    for change in (dict(spills=8), dict(shared=164 * 1024), dict(registers=160, threads=512)):
        assert not replace(row, **change).fits
