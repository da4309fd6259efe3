"""lstm.cu on the CPU: compiled by g++ with host_cuda.h, and launched in the place of launch.launch_kernel."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpu_lstm.kernels.cupy_lstm.planning import Plan
from gpu_lstm.kernels.cupy_lstm.source import ELEMENTS, SOURCE, in_order, kernels_of, name_expression

HEADER = Path(__file__).with_name("host_cuda.h")
FLAGS = (
    "-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-pthread", "-w",
    "-fsanitize=bounds", "-fno-sanitize-recover=bounds",  # a thread's own arrays: what is past their end is not NaN
)  # fmt: skip


def library(source: str, *dtypes: torch.dtype) -> ctypes.CDLL:
    """A version of lstm.cu as a library with a function for each kernel and dtype; kept for the next process."""
    entries = "\n".join(_entry(kernel, dtype) for kernel in kernels_of(90) for dtype in dtypes)
    text = "\n".join((HEADER.read_text(), '#line 1 "lstm.cu"', source, entries))
    digest = hashlib.sha256("\0".join((text, *FLAGS)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"gpu_lstm_host_cuda_{os.getuid()}")
    result = folder / f"{digest}.so"
    if not result.exists():
        with tempfile.TemporaryDirectory() as build:
            for header in ("cuda_fp16.h", "cuda_bf16.h"):
                Path(build, header).touch()  # what they hold is in host_cuda.h
            Path(build, "lstm.cpp").write_text(text)
            subprocess.run(["g++", *FLAGS, "-I.", "lstm.cpp", "-o", "lstm.so"], cwd=build, check=True)
            folder.mkdir(exist_ok=True)
            partial = folder / f"{digest}.{os.getpid()}"
            partial.write_bytes(Path(build, "lstm.so").read_bytes())
            partial.rename(result)
    return ctypes.CDLL(str(result))


def launcher(source: str, *dtypes: torch.dtype) -> Callable[..., None]:
    """A stand-in for launch.launch_kernel, for some dtypes."""
    kernels = library(source, *dtypes)

    def launch_kernel(kernel: str, dtype: torch.dtype, grid: int, plan: Plan, **arguments: Tensor | int | None) -> None:
        values = [_by_value(a) for a in in_order(kernel, arguments)]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        function = getattr(kernels, _symbol(kernel, dtype))
        function.restype = ctypes.c_bool
        assert function(grid, plan.threads, plan.shared, addresses), f"{kernel} wrote past its {plan.shared} bytes"

    return launch_kernel


@functools.cache
def compiled_launcher() -> Callable[..., None]:
    """That of lstm.cu as it is."""
    return launcher(SOURCE.read_text(), *ELEMENTS)


def _by_value(argument: Tensor | int | None) -> ctypes._SimpleCData:
    match argument:
        case Tensor():
            assert argument.is_contiguous()
            return ctypes.c_void_p(argument.data_ptr())
        case None:
            return ctypes.c_void_p(None)
        case bool():
            return ctypes.c_bool(argument)
        case _:
            return ctypes.c_int32(argument)


def _entry(kernel: str, dtype: torch.dtype) -> str:
    """A C function that launches a kernel."""
    function = name_expression(kernel, dtype)
    blocks = int(kernel.partition("<")[2].rstrip(">") or 1)  # of a cluster, which run side by side
    return (
        f'extern "C" bool {_symbol(kernel, dtype)}(int grid, int threads, int shared, void** args) '
        f"{{ return host::launch({function}, grid, threads, shared, {blocks}, args); }}"
    )


def _symbol(kernel: str, dtype: torch.dtype) -> str:
    return f"{kernel.replace('<', '_').replace('>', '')}_{ELEMENTS[dtype]}"
