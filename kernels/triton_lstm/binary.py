"""A kernel launch as a compiled binary, for any architecture, without a GPU."""

import contextlib
import functools
import io
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .features import OPTIONS

_POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


class RecordedLaunch(NamedTuple):
    """One kernel launch as the launcher would make it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters, and Triton's options


def compile_for(launch: RecordedLaunch, architecture: int) -> CompiledKernel:
    """The compiled kernel of a launch. Pointers count as aligned to 16 bytes, as torch's allocator gives them."""
    kernel, signature, constants, aligned = launch.kernel, {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif kernel.params[i].is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = "i32"
    options = {k: v for k, v in launch.arguments.items() if k not in signature}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


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
