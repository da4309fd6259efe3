"""Compile the functions of steps.py for this CPU when they are first needed, keep them on disk, and call them."""

import contextlib
import ctypes
import functools
import logging
import os
import re
import shutil
import tempfile
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import torch

from .. import cache
from . import name_of_folder, steps
from .functions import HOW

logger = logging.getLogger("gpu_lstm")


def folder(name: str, copies: contextlib.ExitStack) -> Path:
    """Return the folder that has a compiled function, or else the folder to keep it in. Raise an OSError if none.

    Numba reads no folder that it cannot write to. Such a folder is copied to a temporary one, which `copies` removes.
    """
    digest = name_of_folder()
    for root in cache.folders():
        if files := files_of(found := root / "compiled" / digest, name):
            if root == cache.folder() and os.access(found, os.W_OK):
                return found
            try:
                return copied(files, copies)
            except OSError as error:
                what = f"the compiled {name} loop in {found} cannot be copied"
                cache.warn_once(f"{what}: {error.strerror}; TMPDIR names another place")
    path = cache.made_folder("compiled", digest)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is read-only")
    return path


def kept_in(*names: str) -> Path | None:
    """Return the folder that keeps all these compiled functions for later processes, or None if no folder has all."""
    own = [root / "compiled" / name_of_folder() for root in cache.folders()]
    paths = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else own
    return next((path for path in paths if all(files_of(path, name) for name in names)), None)


def of_others() -> str:
    """Return words to append to a log line if the cache has loops of another version or CPU, else an empty string."""
    names = {path.name for root in cache.folders() for path in root.glob("compiled/*")}
    return "; the loops in the cache are of another version or CPU" * bool(names - {name_of_folder()})


def files_of(path: Path, name: str) -> list[Path]:
    """Return the files of a compiled function in a folder. The list is empty if it is not kept there."""
    return list(path.rglob(f"*.{name}-*.nb?"))


def copied(files: list[Path], copies: contextlib.ExitStack) -> Path:
    """Return a temporary folder with copies of the files of a compiled function. `copies` removes it."""
    copy = Path(copies.enter_context(tempfile.TemporaryDirectory(prefix="gpu_lstm-")))
    (kept := copy / "__pycache__").mkdir()
    for file in files:
        shutil.copy2(file, kept)
    return copy


@functools.cache
def function(name: str) -> Callable[[int], None]:
    """Return a function of steps.py, compiled. It is called without Python's lock.

    If Numba cannot compile it, a RuntimeError has Numba's reason and the line of the source.
    """
    path, not_kept = None, f"the compiled {name} loop is not kept"
    with contextlib.ExitStack() as copies:
        try:
            path = folder(name, copies)
        except OSError as error:
            cache.warn_of_nothing_kept(error, not_kept)
        if not (path and files_of(Path(numba.config.CACHE_DIR or path), name)):
            level = logging.WARNING if os.isatty(2) else logging.INFO  # somebody may wait at the terminal
            logger.log(
                level, "gpu_lstm compiles its %s loop for this CPU, once, in up to 10 seconds%s", name, of_others()
            )
        try:
            compiled = compile_in(path, name)
        except numba.core.errors.NumbaError as error:
            raise RuntimeError(
                f"Numba {numba.__version__} cannot compile the {name} loop: {last_frame(error)}"
            ) from error
        except Exception as error:  # Numba documents no errors for a damaged file or a full disk
            if path is None or isinstance(error, MemoryError):
                raise
            for each in files_of(Path(numba.config.CACHE_DIR or path), name):  # so that the next process keeps it again
                each.unlink(missing_ok=True)
            if isinstance(error, OSError):
                cache.warn_of_nothing_kept(error, not_kept)
            else:
                what = f"a compiled loop in {kept_in(name) or path} is damaged, and is compiled again"
                cache.warn_once(f"{what}: {type(error).__name__}: {error}")
            compiled = compile_in(None, name)
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(compiled.address)
    function.compiled = compiled  # a reference, so that its machine code is not freed
    return function


def compile_in(path: Path | None, name: str) -> Any:
    """Compile a function of steps.py, or read it from the folder `path`. If `path` is None, it is not kept."""
    source = getattr(steps, name)
    if path is not None:  # Numba keeps a function next to the file that its code names
        file = path / "steps.py"
        if not file.exists():
            file.touch()
            os.utime(file, (0, 0))  # Numba compares the time, which a copy would change
        source = types.FunctionType(source.__code__.replace(co_filename=str(file)), source.__globals__, name)
    return numba.cfunc("void(intp)", cache=path is not None, **HOW)(source)


def last_frame(error: Exception) -> str:
    """Return the reason and the innermost line of an error of Numba. The error itself names all callers, too."""
    lines = re.sub(r"\x1b\[\d+m", "", str(error)).splitlines()
    told = [line for line in lines if line.strip() and not line.startswith(("Failed in", "During: "))]
    places = [line for line in lines if line.startswith("During: typing of")]
    return " ".join([*told[:1], *places[:1], "Please report this; backend 'torch' or 'reference' does without Numba"])


@functools.cache
def parallel() -> Callable[..., None] | None:
    """Return GOMP_parallel(function, argument, threads, flags) of torch's OpenMP, or None if that is not GNU's."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None


@functools.cache
def pool(process: int) -> ThreadPoolExecutor:
    """Return our own pool of threads for a process. A forked process needs a new one: a fork copies no threads."""
    return ThreadPoolExecutor(os.cpu_count(), "gpu_lstm")


def run(function: Callable[[int], None], argument: int, threads: int) -> None:
    """Call function(argument) in several threads at once, one of which is the calling thread, and wait for all.

    The threads are torch's own. Idle threads of OpenMP spin for a while, and would keep a second pool from the cores.
    """
    if threads == 1:
        function(argument)
    elif os.getpid() == cache.PROCESS and (run_parallel := parallel()) is not None:
        run_parallel(function, ctypes.c_ssize_t(argument), threads, 0)
    else:  # after a fork OpenMP would wait forever for threads that the fork did not copy
        others = [pool(os.getpid()).submit(function, argument) for _ in range(threads - 1)]
        function(argument)
        for other in others:
            other.result()
