"""The functions of steps.py, compiled for this CPU when they are first called, and kept with our other results."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba

from .. import cache
from . import steps
from .functions import HOW

logger = logging.getLogger("gpu_lstm")


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
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is read-only")
        return path
    except OSError as error:
        cache.warn_once(f"{cache.NOT_KEPT}: {error}")
        return None


@functools.cache
def function(name: str) -> Callable[[int], None]:
    """A function of steps.py, which is called without Python's lock."""
    path, source = folder(), getattr(steps, name)
    if path is None or not any(Path(numba.config.CACHE_DIR or path).rglob(f"*.{name}-*.nbi")):
        logger.warning(
            "gpu_lstm compiles its %s loop, for GRUs and what torch lacks, once for this CPU, in about 10 seconds; "
            "backend 'torch' does without",
            name,
        )
    if path is not None:  # it is kept next to the file that it says to come from
        file = path / "steps.py"
        if not file.exists():
            file.touch()
            os.utime(file, (0, 0))  # the same in a copy, since Numba looks at the time
        source = types.FunctionType(source.__code__.replace(co_filename=str(file)), source.__globals__, name)
    compiled: Any = numba.cfunc("void(intp)", cache=path is not None, **HOW)(source)
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(compiled.address)
    function.compiled = compiled  # whose memory would be given back
    return function
