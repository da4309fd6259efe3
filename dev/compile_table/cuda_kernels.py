"""Compile the kernels in CUDA C++ by NVRTC from NVIDIA's wheel. CuPy is not needed."""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from gpu_lstm.kernels.by_steps import parts_of
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.cupy_rnn.launch import ELEMENTS, KERNELS, OPTIONS, PLAN, THREADS, join, name_of, texts
from gpu_lstm.kernels.problem import Problem

from .report import Report, read

ARCHITECTURES = 70, 75, 80, 86, 89, 90, 100, 120
DIVIDED = {}, dict(gain_c=True), dict(projected=1, dropout_h=True)
"""Fields of a Problem: the first is launched once per step, the others divide a step into two launches."""


class Case(NamedTuple):
    """A kernel. It is the same for all sizes."""

    kernel: str
    name: str  # the name in C++
    architecture: int

    def __str__(self) -> str:
        element, cell, start, end = re.findall(r"\w+", self.name.partition("<")[2])
        dtype = {"float": "float32"}.get(element, element)
        return f"{dtype} {cell}, {start} to {end}"


class Binary(NamedTuple):
    """One kernel for one architecture."""

    ptx: str
    cubin: bytes
    log: str  # the warnings of the compiler, without warnings about old architectures


def cases(h100: bool) -> list[Case]:
    """Return all cases. If `h100`, return only those of an H100 in bfloat16."""
    names = {
        (KERNELS[backward], name_of(part, backward)): None
        for dtype, cell, change, backward in product(ELEMENTS, CELLS, DIVIDED, (False, True))
        if not change or CELLS[cell].normalises
        for part in parts_of(Problem(2, 1, 1, dtype, cell=cell)._replace(**change), backward)
    }
    every = [Case(*name, architecture) for name, architecture in product(names, ARCHITECTURES)]
    return [case for case in every if not h100 or (case.architecture == 90 and "<bfloat16" in case.name)]


def reports(cases: Iterable[Case]) -> Iterator[Report]:
    """Yield a report of each case."""
    for case in cases:
        of_binary = read(compile_for(case).cubin, case.architecture, 0)
        yield Report(case.kernel, str(case), case.architecture, PLAN, THREADS, "a thread for each cell", **of_binary)


def architectures() -> list[int]:
    """Return the ARCHITECTURES that the installed NVRTC supports. From CUDA 13 on it supports none before sm_75."""
    count = ctypes.c_int()
    _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(known)
    return [architecture for architecture in ARCHITECTURES if architecture in known]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Return NVRTC from NVIDIA's wheel. Of several it is the oldest, which supports the most architectures.

    Raises:
        ImportError: there is no such wheel.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    libraries = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    if not libraries:
        raise ImportError("NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(min(libraries, key=lambda path: path.name)))


@functools.cache
def compile_for(case: Case) -> Binary:
    """Compile a kernel in the same way as the launcher.

    Raises:
        ImportError: NVRTC is missing.
        RuntimeError: the kernel does not compile. The text has the compiler's messages.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC failed with status {status}\n{log() if program else ''}")

    def result(name: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{name}")(program, buffer))
        return buffer.raw

    def log() -> str:
        lines = result("ProgramLog").rstrip(b"\0").decode().splitlines()
        return "\n".join(line for line in lines if not re.match("nvrtc: warning: Architectures prior to", line))

    options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture=sm_{case.architecture}")]
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), join(texts()).encode(), b"steps.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcAddNameExpression(program, case.name.encode()))
        check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
        return Binary(result("PTX").rstrip(b"\0").decode(), result("CUBIN"), log())
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
