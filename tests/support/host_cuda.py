"""The kernels in CUDA C++ on the CPU: compiled by g++ with host_cuda.h, they take the place of the functions that CuPy
loads."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

from memory_checks import bytes_of, refusal
from torch import Tensor

from gpu_lstm.kernels.cupy_rnn import launch

HEADER = Path(__file__).with_name("host_cuda.h")
FLAGS = (
    "-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-w",
    "-fsanitize=bounds", "-fno-sanitize-recover=bounds",  # for a thread's own arrays, past whose end there is no NaN
)  # fmt: skip
PARTS = {"after_product": ("zh", "zc", "ch", "zm", "mh"), "before_product": ("hz", "hc", "cz", "hm", "mz")}


class HostTensor(ctypes.Structure):
    """The struct of the same name in host_cuda.h."""

    _fields_ = ("start", ctypes.c_void_p), *((n, ctypes.c_longlong) for n in ("bytes", "allowed", "first", "size"))


Run = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_bool, ctypes.POINTER(HostTensor), ctypes.c_int
)


@functools.cache
def library(source, dtype, cell):
    """Compile and load all kernels for an element type and a cell, from a version of the source. The file is kept for
    the next process."""
    entries = "\n".join(
        f"extern \"C\" host::Run* {kernel}_{a}{b} = host::run<{kernel}<{dtype}, {cell}, '{a}', '{b}'>, Call<{dtype}>>;"
        for kernel, parts in PARTS.items() for a, b in parts
    )  # fmt: skip
    text = "\n".join((HEADER.read_text(), source, entries))
    digest = hashlib.sha256("\0".join((text, *FLAGS)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"gpu_lstm_host_cuda_{os.getuid()}")
    result = folder / f"{digest}.so"
    if not result.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build, open(folder / f"{digest}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the first
            if not result.exists():
                Path(build, "steps.cpp").write_text(text)
                subprocess.run(["g++", *FLAGS, "steps.cpp", "-o", "steps.so"], cwd=build, check=True)
                Path(build, "steps.so").rename(result)
    return ctypes.CDLL(str(result))


def stand_in(patch, changes=None, less=0):
    """Put kernels for the CPU in CuPy's place, with `changes` to parts of the source.

    An access outside of a tensor, or to one of its last `less` elements, is an AssertionError.
    """
    source = launch.join({name: t for name, t in (launch.texts() | (changes or {})).items() if name != "instructions"})
    seen: dict[int, Tensor] = {}
    turn = itertools.count()

    def address(tensor):
        assert tensor.is_contiguous()
        seen[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def loaded(device, name):
        kernel, dtype, cell, start, end = re.findall(r"\w+", name)
        run = Run.in_dll(library(source, dtype, cell), f"{kernel}_{start}{end}")

        def function(grid, block, arguments):
            (call,) = arguments
            names = [n for n in call.dtype.names if call.dtype[n].kind == "u" and call[n]]
            tensors = [seen[int(call[n])] for n in names]
            table = (HostTensor * len(names))(
                *((t.data_ptr(), size := bytes_of(t), size - less * t.itemsize * (t.numel() > 1)) for t in tensors)
            )
            run(call.ctypes.data, *grid, *block, next(turn) % 2 == 1, table, len(names))
            for n, t, of in zip(names, tensors, table):
                assert not of.size, f"{kernel}: {refusal('access', of.size, of.first, of.allowed, n, t.shape)}"

        return function

    patch.setattr(launch, "address", address)
    patch.setattr(launch, "loaded", loaded)
    patch.setattr(launch, "stream", lambda device: contextlib.nullcontext())
