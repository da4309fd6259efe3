"""A kernel launch as a compiled binary, for any architecture, without a GPU: registers, spills, shared memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the launcher would make it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


class Resources(NamedTuple):
    """What a kernel takes."""

    registers: int  # a thread
    spills: int  # bytes of stack a thread
    shared: int  # bytes a block


def compile_for(launch: Launch, architecture: int) -> CompiledKernel:
    """The compiled kernel of a launch. Pointers count as aligned to 16 bytes, as torch's allocator gives them."""
    kernel = launch.kernel
    names = kernel.arg_names
    values = dict(zip(names, launch.args)) | {k: v for k, v in launch.constants.items() if k in names}
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif kernel.params[i].is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = "i32"
    options = {k: v for k, v in launch.constants.items() if k not in names}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(launch: Launch, architecture: int) -> Resources:
    """What the kernel of a launch takes on `architecture`."""
    return resources_of(compile_for(launch, architecture))


def resources_of(compiled: CompiledKernel) -> Resources:
    """What a compiled kernel takes, read by the cuobjdump that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return Resources(int(usage[1]), int(usage[2]), compiled.metadata.shared)


def fits(taken: Resources, shared_limit: int) -> bool:
    """No spills, and no more shared memory than a block may have."""
    return taken.spills == 0 and taken.shared <= shared_limit
