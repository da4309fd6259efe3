"""The functions of steps.py: compiled for this CPU when they are first needed, kept with our other results, called."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import torch

from .. import cache
from . import steps
from .functions import HOW

logger = logging.getLogger("gpu_lstm")
PROCESS = os.getpid()


def folder() -> Path | None:
    """Where compiled functions are kept, by all that decides them; None: nowhere, which one warning says.

    Numba itself sees neither an edit of an imported file nor another CPU that has the same name; and it would keep them
    for each path that this package is installed at.
    """
    cpu = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    facts = cache.sources("kernels/numba_rnn"), numba.__version__, platform.python_version(), *cpu
    try:
        if (ours := cache.folder()) is None:
            raise OSError("there is no home directory, and XDG_CACHE_HOME is not set")
        path = ours / "compiled" / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        for each in (ours, path.parent, path):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
        if not any(path.rglob("*.nbi")):
            raise PermissionError(f"{path} is read-only")
        return Path(copied(path).name)
    except OSError as error:
        cache.warn_of_nothing_kept(error)
        return None


@functools.cache
def copied(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A copy of a folder for this process: Numba reads none that it cannot write to."""
    copy = tempfile.TemporaryDirectory(prefix="gpu_lstm-")
    for file in path.rglob("*.*"):
        target = copy.name / file.relative_to(path)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(file, target)
    return copy


@functools.cache
def function(name: str) -> Callable[[int], None]:
    """A function of steps.py, which is called without Python's lock."""
    path, source = folder(), getattr(steps, name)
    kept = [] if path is None else list(Path(numba.config.CACHE_DIR or path).rglob(f"*.{name}-*.nb?"))
    if not kept:
        logger.warning(
            "gpu_lstm compiles its %s loop, for GRUs and what torch lacks, once for this CPU, in 5 to 10 seconds; "
            "backend 'torch' does without",
            name,
        )
    try:
        if path is not None:  # it is kept next to the file that it says to come from
            file = path / "steps.py"
            if not file.exists():
                file.touch()
                os.utime(file, (0, 0))  # the same in a copy, since Numba looks at the time
            source = types.FunctionType(source.__code__.replace(co_filename=str(file)), source.__globals__, name)
        compiled: Any = numba.cfunc("void(intp)", cache=path is not None, **HOW)(source)
    except Exception as error:  # what Numba raises where a file is damaged, or the disk is full, is undocumented
        if path is None:
            raise
        for each in kept:  # so that the next process keeps it again
            each.unlink(missing_ok=True)
        what = f"a compiled loop in {path} is damaged, or cannot be kept, and is compiled for this process"
        cache.warn_once(f"{what}: {type(error).__name__}: {error}")
        compiled = numba.cfunc("void(intp)", **HOW)(source)
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(compiled.address)
    function.compiled = compiled  # whose memory would be given back
    return function


@functools.cache
def parallel() -> Callable[..., None] | None:
    """OpenMP's parallel(function, argument, threads, flags), of the library that torch uses; None without GNU's."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None


@functools.cache
def pool(process: int) -> ThreadPoolExecutor:
    """Threads of our own, of a process: those of its parent do not exist after a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "gpu_lstm")


def run(function: Callable[[int], None], argument: int, threads: int) -> None:
    """Call function(argument) in so many threads, one of them this one, and wait for all. They are torch's own, whose
    waiting ones would keep others from a core."""
    if threads == 1:
        function(argument)
    elif os.getpid() == PROCESS and (run_parallel := parallel()) is not None:
        run_parallel(function, ctypes.c_ssize_t(argument), threads, 0)
    else:  # after a fork OpenMP would wait for threads that do not exist
        others = [pool(os.getpid()).submit(function, argument) for _ in range(threads - 1)]
        function(argument)
        for other in others:
            other.result()
