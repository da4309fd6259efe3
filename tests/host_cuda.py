"""The kernels in CUDA C++ on the CPU, compiled by g++ with host_cuda.h, launched by a stand-in for launch_kernel."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from memory_checks import bytes_of, refusal
from torch import Tensor

from gpu_lstm.kernels.cupy_rnn.planning import Plan
from gpu_lstm.kernels.cupy_rnn.source import in_order, join, name_expression, parameters, present_in, texts

HEADER = Path(__file__).with_name("host_cuda.h")
FLAGS = (
    "-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-w",
    "-fsanitize=bounds", "-fno-sanitize-recover=bounds",  # a thread's own arrays: what is past their end is not NaN
)  # fmt: skip
FAILURES = (
    "", "a block wrote past its shared memory", "threads of a warp did different things",
    "threads waited in vain for each other", "", "an access to no tensor, or by no function of instructions.cu",
)  # fmt: skip


@functools.cache
def _function(source: str, expression: str) -> Callable[..., int]:
    """One kernel of a version of the source; kept for the next process."""
    entry = (
        'extern "C" int run(const int* grid, int threads, int shared, unsigned seed, void** args, '
        "const long long* bytes, int count, host::Access* outside) { "
        f"return host::run(host::Entry<{expression}>::with, {{grid[0], grid[1]}}, threads, shared, seed, args, bytes, "
        "count, outside); }"
    )
    text = "\n".join((HEADER.read_text(), source, entry))
    digest = hashlib.sha256("\0".join((text, *FLAGS)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"gpu_lstm_host_cuda_{os.getuid()}")
    result = folder / f"{digest}.so"
    if not result.exists():
        with tempfile.TemporaryDirectory() as build:
            Path(build, "lstm.cpp").write_text(text)
            subprocess.run(["g++", *FLAGS, "lstm.cpp", "-o", "lstm.so"], cwd=build, check=True)
            folder.mkdir(exist_ok=True)
            partial = folder / f"{digest}.{os.getpid()}"
            partial.write_bytes(Path(build, "lstm.so").read_bytes())
            partial.rename(result)
    return ctypes.CDLL(str(result)).run


def launcher(changes: dict[str, str] | None = None, seed: int = 0) -> Callable[..., None]:
    """A stand-in for launch.launch_kernel, of the source with some parts changed; a seed is an order of turns."""
    source = join({name: text for name, text in (texts() | (changes or {})).items() if name != "instructions"})

    def launch_kernel(kernel: str, dtype: torch.dtype, plan: Plan, **arguments: Tensor | int | None) -> None:
        given, count = in_order(kernel, arguments), len(arguments)
        values = [_by_value(a) for a in given]
        addresses = (ctypes.c_void_p * count)(*(ctypes.addressof(v) for v in values))
        sizes = (ctypes.c_longlong * count)(*(bytes_of(a) if isinstance(a, Tensor) else -1 for a in given))
        outside = (ctypes.c_longlong * 4)()
        run = _function(
            source, name_expression(kernel, dtype, plan.template("backward" in kernel), present_in(kernel, arguments))
        )
        failure = run((ctypes.c_int * 2)(*plan.grid), plan.threads, plan.shared, seed, addresses, sizes, count, outside)
        assert not failure, f"{kernel}: {FAILURES[failure] or _what_is(outside, parameters(kernel), given)}"

    return launch_kernel


def _what_is(outside: ctypes.Array, names: Sequence[str], given: Sequence[Tensor]) -> str:
    number, first, size, stores = outside
    tensor = given[number]
    return refusal("store" if stores else "load", size, first, bytes_of(tensor), names[number], tensor.shape)


def _by_value(argument: Tensor | int | None) -> ctypes._SimpleCData:
    if argument is None or isinstance(argument, Tensor):
        assert argument is None or argument.is_contiguous()
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return (ctypes.c_bool if isinstance(argument, bool) else ctypes.c_int32)(argument)
