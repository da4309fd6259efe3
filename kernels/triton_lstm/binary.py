"""Launches that are recorded, and whether Triton compiles for an architecture at all."""

import contextlib
import functools
import io
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .features import OPTIONS


class RecordedLaunch(NamedTuple):
    """One kernel launch as the launcher would make it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters, and Triton's options


@triton.jit
def empty_kernel():
    pass


@functools.cache
def compile_problem(architecture: int) -> str | None:
    """Why the installed Triton cannot compile for an architecture, e.g. one newer than its ptxas; None if it can."""
    target = GPUTarget("cuda", architecture, 32)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton would print the whole kernel
            triton.compile(ASTSource(empty_kernel, {}), target=target, options=OPTIONS)
    except Exception as error:  # of many kinds: from LLVM, ptxas, or the folder of Triton's cache
        lines = [line for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "fatal" in line), f"{type(error).__name__}: {lines[0] if lines else ''}")
    return None
