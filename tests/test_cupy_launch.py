"""The CuPy backend's launcher, every launch looked at, and what lstm.cu compiles to. None of it needs a GPU.

Every argument is held against the kernel's parameter list in lstm.cu, shapes in comments included.
"""

import re
import subprocess
import sys
from dataclasses import replace
from math import ceil, prod
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from gpu_lstm import backends
from gpu_lstm.backends import Backend
from gpu_lstm.kernels.cupy_lstm import launch, planning, sequence, source
from gpu_lstm.kernels.cupy_lstm.planning import Plan
from gpu_lstm.kernels.cupy_lstm.sequence import sequence_plan
from gpu_lstm.kernels.cupy_lstm.step import STEP_PLAN
from gpu_lstm.kernels.recurrence import Recurrence

SOURCE = source.SOURCE.read_text()
DTYPES = tuple(source.ELEMENTS)


class Parameter(NamedTuple):
    """Of a kernel, as lstm.cu declares it."""

    type: str  # without const
    name: str
    shape: str | None  # of what a pointer points to
    nullable: bool


def _parameters(kernel: str) -> list[Parameter]:
    name = kernel.partition("<")[0]
    found = re.search(rf"__global__ void (?:__\w+__\([^)]*\) )*{name}\((.*?)\) \{{", SOURCE, re.DOTALL)
    parameters = []
    for line in found[1].strip().splitlines():
        declared, _, comment = line.partition("//")
        for one in filter(None, map(str.strip, declared.split(","))):
            type_, name = one.rsplit(" ", 1)
            shape = re.search(r"\[.*?\]", comment)
            parameters.append(Parameter(type_.removeprefix("const "), name, shape and shape[0], "null" in comment))
    return parameters


def _matrix(shape: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """ "[T*B, 4H]" with numbers for the letters."""
    dimensions = []
    for dimension in shape[1:-1].split(", "):
        factors = re.findall(r"\d+|[A-Z]", dimension)
        dimensions.append(prod(sizes.get(factor) or int(factor) for factor in factors))
    return tuple(dimensions)


class Launch(NamedTuple):
    kernel: str
    dtype: torch.dtype
    grid: int
    plan: Plan
    arguments: dict[str, Tensor | int | None]


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    made: list[Launch] = []
    monkeypatch.setattr(launch, "launch_kernel", lambda *args, **arguments: made.append(Launch(*args, arguments)))
    return made


T, B, H, P = 3, 5, 6, 4


def _call(dtype, hidden=H, batch=B, projected=0, ragged=False, backward=False, plan=None, precision="ieee") -> None:
    width = projected or hidden
    gates, c = torch.zeros(T, batch, 4 * hidden, dtype=dtype), torch.zeros(T, batch, hidden)
    h, h0, c0 = torch.zeros(T, batch, width, dtype=dtype), torch.zeros(batch, width, dtype=dtype), c[0]
    recurrence = Recurrence(
        weight_hh=torch.zeros(4 * hidden, width, dtype=dtype),
        weight_hr=torch.zeros(projected, hidden, dtype=dtype) if projected else None,
        h0=h0,
        c0=c0,
        lengths=torch.full((batch,), T) if ragged else None,
        resets=torch.zeros(T, batch, dtype=torch.bool) if ragged else None,
        reverse=ragged,
        precision=precision,
    )
    if backward:
        launch.layer_backward(h, h0, c0, gates, c, recurrence, plan=plan)
    else:
        launch.layer_forward(gates, recurrence, save=True, plan=plan)


def _plan(family: str, dtype: torch.dtype, backward: bool):
    if family == "step":
        return STEP_PLAN
    return sequence_plan(H, dtype, 48 * 1024, backward, {"sequence": 1, "cluster": 8}[family])


CASES = [  # family, projected features, backward, kernels in order
    ("step", 0, False, ["lstm_step_forward"] * T),
    ("step", 0, True, ["lstm_step_backward"] * T),
    ("step", P, False, ["lstm_step_forward", "lstm_step_project_forward"] * T),
    ("step", P, True, ["lstm_step_project_backward", "lstm_step_backward"] * T),
    ("sequence", 0, False, ["lstm_sequence_forward"]),
    ("sequence", 0, True, ["lstm_sequence_backward"]),
    ("cluster", 0, False, ["lstm_cluster_forward<8>"]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "ragged"])
@pytest.mark.parametrize(("family", "projected", "backward", "kernels"), CASES)
def test_every_argument_is_what_the_kernel_declares(launches, family, projected, backward, kernels, ragged, dtype):
    _call(dtype, projected=projected, ragged=ragged, backward=backward, plan=_plan(family, dtype, backward))
    assert [made.kernel for made in launches] == kernels
    sizes = {"T": T, "B": B, "H": H, "P": projected}
    types = {"E*": dtype, "float*": torch.float32, "int*": torch.int32, "bool*": torch.bool}
    for made in launches:
        assert made.dtype == dtype
        parameters = _parameters(made.kernel)
        assert source.parameters(made.kernel) == tuple(parameter.name for parameter in parameters)
        for parameter, argument in zip(parameters, source.in_order(made.kernel, made.arguments)):
            where = f"{made.kernel}, {parameter.name}"
            match argument:
                case None:
                    assert parameter.nullable, where
                case Tensor():
                    later = parameter.name == "c_prev" and made.arguments["step"] > 0
                    expected = _matrix("[T*B, H]" if later else parameter.shape, sizes)
                    assert argument.dtype == types[parameter.type], where
                    assert argument.is_contiguous(), where
                    assert argument.numel() == prod(expected), where
                    assert argument.shape[-1] == expected[-1] or parameter.name == "resets", where
                case bool():
                    assert (parameter.type, parameter.name, argument) == ("bool", "reverse", ragged), where
                case int():
                    assert parameter.type == "int", where
                    assert parameter.name == "step" or argument == sizes[parameter.name], where
    steps = [made.arguments["step"] for made in launches if family == "step"]
    assert steps == sorted(steps, reverse=backward)
    assert set(steps) == (set(range(T)) if family == "step" else set())


def test_arguments_go_by_their_names(launches):
    """In any order; one under another's name is refused before anything is launched."""
    _call(torch.float32, plan=STEP_PLAN)
    kernel, arguments = launches[0].kernel, launches[0].arguments
    assert source.in_order(kernel, dict(reversed(arguments.items()))) == source.in_order(kernel, arguments)
    missing = {name: a for name, a in arguments.items() if name != "c"}
    for fault in (missing, missing | {"cell": arguments["c"]}, arguments | {"cell": arguments["c"]}):
        with pytest.raises(TypeError, match="lstm_step_forward takes gates, product, h, m, c, c_n, lengths, resets"):
            source.in_order(kernel, fault)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 17, 1000])
@pytest.mark.parametrize("hidden", [1, 5, 33, 64, 128])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_grid_and_block_cover_everything_once(launches, backward, hidden, batch, dtype):
    size = 16 // dtype.itemsize
    _call(dtype, hidden, batch, backward=backward, plan=STEP_PLAN)
    for made in launches:
        shares = batch * ceil(hidden / size)
        assert (made.plan.shared, made.plan.threads % 32) == (0, 0)
        assert shares <= made.grid * made.plan.threads < shares + made.plan.threads
    launches.clear()
    for blocks in (1,) if backward else (1, *source.CLUSTER_SIZES):
        plan = sequence_plan(hidden, dtype, 227 * 1024, backward, blocks)
        if plan is None:  # W_hh does not fit
            assert 4 * hidden * hidden * dtype.itemsize > 0.8 * 227 * 1024
            continue
        _call(dtype, hidden, batch, backward=backward, plan=plan)
        made = launches.pop()
        assert made.grid == ceil(batch / 4) * blocks
        assert made.plan.threads % (4 * ceil(hidden / blocks)) == 0  # whole slices
        assert made.plan.threads <= 512
        assert 4 * hidden * hidden * dtype.itemsize / blocks <= made.plan.shared <= 227 * 1024


def test_the_kernels_and_constants_of_the_launcher_are_those_of_the_source():
    declared = set(re.findall(r"__global__ void (?:__\w+__\([^)]*\) )*(\w+)\(", SOURCE))
    assert {kernel.partition("<")[0] for kernel in source.kernels_of(90)} == declared
    assert source.kernels_of(80) == source.KERNELS
    assert re.search(r"MAX_THREADS = (\d+);", SOURCE)[1] == str(sequence.MAX_THREADS)
    assert re.search(r"enum Gate \{ I, F, G, O, GATES \};", SOURCE)
    assert re.search(r"BATCH_TILE = GATES;", SOURCE)
    assert re.search(rf"struct alignas\({planning.PACK}\) Pack", SOURCE)


def test_which_family_is_chosen(monkeypatch):
    def family(hidden, dtype, limit, projected=False, backward=False):
        monkeypatch.setattr(launch, "shared_limit", lambda device: limit * 1024)
        weight_hr = torch.empty(1, hidden) if projected else None
        r = Recurrence(weight_hh=None, weight_hr=weight_hr, h0=None, c0=torch.empty(1, hidden))
        return launch.choose_plan(r, dtype, backward).family.value

    half = torch.float16
    assert family(128, half, 163) == family(128, half, 163, backward=True) == "sequence"
    assert family(129, half, 227) == family(128, half, 99) == family(128, torch.float32, 227) == "step"
    assert family(64, torch.float32, 99) == family(64, half, 48, backward=True) == "sequence"
    assert family(16, half, 227, projected=True) == "step"


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products_are_taken_in_the_precision_asked_for(monkeypatch, precision):
    matmul = torch.backends.cuda.matmul

    def now():
        return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else "tf32" if matmul.allow_tf32 else "ieee"

    seen, before = set(), now()
    monkeypatch.setattr(launch, "launch_kernel", lambda *args, **arguments: seen.add(now()))
    for backward in (False, True):
        _call(torch.float32, backward=backward, plan=STEP_PLAN, precision=precision)
    assert seen == {precision}
    assert now() == before


# What is refused, and what is imported when.


def test_a_dtype_that_the_kernels_do_not_take(launches):
    with pytest.raises(TypeError, match=r"^backend 'cupy' takes float16, bfloat16 and float32, got torch\.float64$"):
        _call(torch.float64)
    obstacle = backends.obstacle(Backend.CUPY, torch.device("cpu"), torch.float64)
    assert isinstance(obstacle, TypeError)
    assert launches == []


@pytest.fixture
def fake_cupy(monkeypatch):
    """As if CuPy were installed: fake_cupy(what its NVRTC says)."""

    def install(nvrtc_version):
        nvrtc = SimpleNamespace(getVersion=nvrtc_version)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc)))

    backends.cupy_import_problem.cache_clear()
    yield install
    backends.cupy_import_problem.cache_clear()


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cupy12"), ("13.0", "cupy13"), (None, "cupy13")])
@pytest.mark.parametrize("absent", ["cupy", "nvrtc"])
def test_what_is_absent_is_named_with_its_extra(monkeypatch, fake_cupy, absent, cuda, extra):
    if absent == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        fake_cupy(Mock(side_effect=RuntimeError("CuPy failed to load libnvrtc.so.13")))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    obstacle = backends.obstacle(Backend.CUPY, torch.device("cuda"), torch.float32)
    assert isinstance(obstacle, ImportError)
    assert f'pip install "gpu-lstm[{extra}]"' in str(obstacle)


def test_tensors_that_are_not_on_a_gpu_are_refused(fake_cupy):
    fake_cupy(lambda: (13, 0))
    obstacle = backends.obstacle(Backend.CUPY, torch.device("cpu"), torch.float32)
    assert isinstance(obstacle, RuntimeError)
    assert str(obstacle) == "backend 'cupy' takes CUDA tensors, got cpu"
    assert backends.obstacle(Backend.CUPY, torch.device("cuda"), torch.float32) is None


@pytest.mark.parametrize(
    ("able", "chosen"), [("triton cupy", "triton"), ("triton", "triton"), ("cupy", "cupy"), ("", "torch")]
)
def test_auto_takes_triton_then_cupy_then_torch(monkeypatch, able, chosen):
    monkeypatch.setattr(backends, "can_run", lambda choice, device, dtype: choice.value in able.split())
    assert backends.select("auto", torch.device("cuda"), torch.float32).value == chosen
    assert backends.select("auto", torch.device("cpu"), torch.float32) is Backend.TORCH


def test_cupy_is_not_imported_before_first_use():
    code = """
import sys
import gpu_lstm, torch
import gpu_lstm.kernels.cupy_lstm.launch
gpu_lstm.LSTM(3, 4)(torch.zeros(5, 2, 3))
assert not {"cupy", "cupy_backends"} & set(sys.modules)
assert not [name for name in sys.modules if "triton_lstm" in name]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("newer", [True, False], ids=["CuPy 14", "CuPy 13"])
def test_the_stream_is_torchs(monkeypatch, newer):
    theirs = SimpleNamespace(cuda_stream=0x1234, __cuda_stream__=lambda: (0, 0x1234))
    stream = SimpleNamespace(from_external=lambda stream: ("from_external", stream)) if newer else SimpleNamespace()
    cuda = SimpleNamespace(Stream=stream, ExternalStream=lambda *args: ("ExternalStream", *args))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: theirs)
    expected = ("from_external", theirs) if newer else ("ExternalStream", 0x1234, 1)
    assert launch._stream(torch.device("cuda", 1)) == expected


@pytest.mark.parametrize("architecture", [86, 90])
def test_a_launch_is_what_cupy_is_asked_for(monkeypatch, architecture):
    """The function by its name, once loaded; its grid, block, shared memory; arguments by value, on torch's stream."""
    asked, entered = [], []

    class Function:
        def __init__(self, name):
            self.name, self.kernel = name, SimpleNamespace(ptr=name)

        def __call__(self, *args, **options):
            asked.append((self.name, self.max_dynamic_shared_size_bytes, *args, options))

    class Entered:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            entered.remove(self.name)

    loaded, attributes = [], []
    cupy = SimpleNamespace(
        RawModule=lambda **given: loaded.append(given) or SimpleNamespace(get_function=Function),
        cuda=SimpleNamespace(driver=SimpleNamespace(funcSetAttribute=lambda *given: attributes.append(given))),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10))
    monkeypatch.setattr(torch.cuda, "device", lambda d: Entered(d))
    monkeypatch.setattr(launch, "_stream", lambda d: Entered("stream"))
    monkeypatch.setattr(launch, "shared_limit", lambda d: 99)
    for cache in (launch._module, launch._kernel):
        monkeypatch.setattr(launch, cache.__name__, cache.__wrapped__)
    tensor, plan = torch.zeros(3), replace(STEP_PLAN, threads=96, shared=1234)
    kernel = "lstm_step_forward" if architecture < 90 else "lstm_cluster_forward<8>"
    values = [tensor, None, True, 7]
    names = source.parameters(kernel)
    arguments = {name: values[k] if k < len(values) else 0 for k, name in enumerate(names)}
    launch.launch_kernel(kernel, torch.float16, 0, plan, **arguments)
    assert loaded == asked == [], "an empty batch launches nothing"
    launch.launch_kernel(kernel, torch.float16, 5, plan, **arguments)
    assert entered == []
    ((name, most, grid, block, given, options),) = asked
    assert name == source.name_expression(kernel, torch.float16)
    assert (most, grid, block, options) == (99, (5,), (96,), {"shared_mem": 1234})
    assert given[:4] == (tensor.data_ptr(), 0, True, 7)
    assert [type(value).__name__.rstrip("_") for value in given[:4]] == ["uint64", "uint64", "bool", "int32"]
    assert len(given) == len(names)
    assert attributes == ([(name, 14, 1)] if architecture == 90 else [])
    (loading,) = loaded
    assert loading["code"] == SOURCE
    assert set(loading["name_expressions"]) == {
        source.name_expression(each, torch.float16) for each in source.kernels_of(architecture)
    }


# What lstm.cu compiles to, by NVRTC.


@pytest.fixture(scope="module")
def compiling():
    compile_ = pytest.importorskip("gpu_lstm.kernels.cupy_lstm.compile")
    try:
        compile_.architectures()
    except ImportError as error:
        pytest.skip(str(error))
    return compile_


@pytest.fixture(scope="module")
def rows(compiling) -> list:
    return [row for rows in compiling.reports(compiling.cases(quick=False)) for row in rows]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_and_dtype_without_warnings(compiling, rows):
    architectures = compiling.architectures()
    assert {80, 90, 100, 120} <= set(architectures)
    assert {(row.architecture, row.case.split()[0], row.kernel) for row in rows} == {
        (architecture, str(dtype).removeprefix("torch."), kernel)
        for architecture in architectures
        for dtype in DTYPES
        for kernel in source.kernels_of(architecture)
    }
    assert {compiling.compile_for(a, dtype).log for a in architectures for dtype in DTYPES} == {""}


@pytest.mark.slow
def test_no_kernel_spills_and_every_block_fits(rows):
    assert [row for row in rows if not row.fits] == []


def test_a_kernel_that_spills_does_not_fit(compiling):
    row = compiling.Report("lstm_step_forward", "float32", 80, STEP_PLAN, 128, "", registers=32, spills=0, shared=0)
    assert row.fits
    for change in (dict(spills=8), dict(shared=164 * 1024), dict(registers=160, threads=512)):
        assert not replace(row, **change).fits


@pytest.mark.slow
def test_how_many_units_a_block_and_a_cluster_hold(rows):
    """About 128 in half precision, and 640 by the largest cluster."""
    held = {(row.kernel, row.case.split()[0]): int(row.case.split("=")[1]) for row in rows
            if row.architecture == 90 and "H=" in row.case}  # fmt: skip
    for half in ("float16", "bfloat16"):
        assert held["lstm_sequence_forward", half] == held["lstm_sequence_backward", half] == 128
        assert held["lstm_cluster_forward<8>", half] >= 450
        assert held["lstm_cluster_forward<16>", half] >= 640


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loads_and_stores_of_16_bytes(compiling, tmp_path, dtype):
    """In the instructions of the step kernels, and of the products in shared memory."""
    from triton import knobs

    binary = compiling.compile_for(90, dtype)
    cubin = tmp_path / "lstm.cubin"
    cubin.write_bytes(binary.cubin)
    command = [knobs.nvidia.cuobjdump.path, "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = dict(part.split("\n", 1) for part in text.split("Function : ")[1:])
    for kernel, symbol in binary.symbols.items():
        for wide in ("LDG.E.128", "STG.E.128") if "step" in kernel else ("LDS.128",):
            assert wide in instructions[symbol], (kernel, wide)
