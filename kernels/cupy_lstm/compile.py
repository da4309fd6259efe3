"""The compile report of lstm.cu: what every kernel becomes on every architecture, by NVRTC, without a GPU or CuPy.

NVRTC comes from NVIDIA's wheel; CUDA's headers and cuobjdump are the ones that the triton wheel brings along.
"""

import ctypes
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..architectures import shared_memory_of
from ..report import Report
from ..sass import time_loops, usage
from .planning import Plan
from .sequence import sequence_plan
from .source import CLUSTER_KERNELS, CLUSTER_SIZES, ELEMENTS, OPTIONS, SOURCE, kernels_of, name_expression
from .step import STEP_PLAN

ARCHITECTURES = (60, 70, 75, 80, 90, 100, 120)
READABLE = 75  # by the disassembler of CUDA 13, which recent Tritons bring


@dataclass(frozen=True)
class Binary:
    """lstm.cu for one architecture and dtype."""

    cubin: bytes
    symbols: dict[str, str]  # of each kernel
    log: str  # the compiler's warnings, other than of old architectures


def cases(quick: bool) -> list[tuple[int, torch.dtype]]:
    """Architectures and dtypes, every one with every other; if `quick`, an H100 and bfloat16."""
    return [(90, torch.bfloat16)] if quick else list(itertools.product(architectures(), ELEMENTS))


def reports(cases: Iterable[tuple[int, torch.dtype]]) -> Iterator[list[Report]]:
    """Of each architecture and dtype, every kernel."""
    for architecture, dtype in cases:
        binary = compile_for(architecture, dtype)
        taken = usage(binary.cubin, architecture)
        loops = time_loops(binary.cubin) if architecture >= READABLE else {}
        rows = []
        for kernel in kernels_of(architecture):
            hidden, plan = _largest(kernel, architecture, dtype)
            registers, spills, declared = taken[binary.symbols[kernel]]
            row = Report(
                kernel=kernel,
                # For whole sequences, the most hidden units that a block or cluster holds.
                case=str(dtype).removeprefix("torch.") + f" H={hidden}" * bool(hidden),
                architecture=architecture,
                plan=plan,
                threads=plan.threads,
                tiles=f"{plan.threads} threads",
                registers=registers,
                spills=spills,
                shared=declared + plan.shared,
                loop=loops.get(binary.symbols[kernel])
                if hidden
                else None,  # a kernel of one step loops over other things
            )
            rows.append(row)
        yield rows


def _largest(kernel: str, architecture: int, dtype: torch.dtype) -> tuple[int, Plan]:
    """The most hidden units that a kernel can hold on an architecture, and its plan; 0 where there is no bound."""
    if kernel.startswith("lstm_step"):
        return 0, STEP_PLAN
    blocks = CLUSTER_SIZES[CLUSTER_KERNELS.index(kernel)] if kernel in CLUSTER_KERNELS else 1
    limit = shared_memory_of(architecture)
    held, plan = 0, STEP_PLAN
    while (larger := sequence_plan(held + 1, dtype, limit, kernel.endswith("backward"), blocks)) is not None:
        held, plan = held + 1, larger
    return held, plan


def architectures() -> list[int]:
    """Those of ARCHITECTURES that the NVRTC at hand knows; from CUDA 13 on it knows none before sm_75."""
    count = ctypes.c_int()
    _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(known)
    return [architecture for architecture in ARCHITECTURES if architecture in known]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC out of NVIDIA's wheel; the oldest there is, which knows the most architectures.

    Raises:
        ImportError: there is no such wheel.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    if not found:
        raise ImportError("NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(min(found, key=lambda path: path.name)))


def _headers() -> Path:
    """CUDA's headers, as the triton wheel brings them along."""
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__path__[0], "include")


@functools.cache
def compile_for(architecture: int, dtype: torch.dtype) -> Binary:
    """lstm.cu for an architecture and a dtype, every kernel of it.

    Raises:
        ImportError: NVRTC is missing.
        RuntimeError: lstm.cu does not compile, with the compiler's messages.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC failed with status {status}\n{log() if program else ''}")

    def text(size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, size_of)(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, get)(program, buffer))
        return buffer.raw

    def log() -> str:
        lines = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode().splitlines()
        return "\n".join(line for line in lines if not re.match("nvrtc: warning: Architectures prior to", line))

    def symbol(expression: str) -> str:
        name = ctypes.c_char_p()
        check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)))
        assert name.value is not None
        return name.value.decode()

    expressions = {kernel: name_expression(kernel, dtype) for kernel in kernels_of(architecture)}
    options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture=sm_{architecture}", f"-I{_headers()}")]
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None))
    try:
        for expression in expressions.values():
            check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
        symbols = {kernel: symbol(expression) for kernel, expression in expressions.items()}
        return Binary(text("nvrtcGetCUBINSize", "nvrtcGetCUBIN"), symbols, log())
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
