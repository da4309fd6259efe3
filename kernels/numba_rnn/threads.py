"""A compiled function in several threads at once: torch's own, whose waiting ones would keep others from a core."""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PROCESS = os.getpid()


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
    """Call function(argument) in so many threads, one of them this one, and wait for all."""
    if threads == 1:
        function(argument)
    elif os.getpid() == PROCESS and (run_parallel := parallel()) is not None:
        run_parallel(function, ctypes.c_ssize_t(argument), threads, 0)
    else:  # after a fork OpenMP would wait for threads that do not exist
        others = [pool(os.getpid()).submit(function, argument) for _ in range(threads - 1)]
        function(argument)
        for other in others:
            other.result()
