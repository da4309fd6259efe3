"""Ahead-of-time compilation of the kernels for any architecture, without a GPU, and what came out.

The launches are recorded from the backend's own entry points, run on meta tensors, so that what is compiled here is
what would be launched: the same tiles, constants and argument types.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

SHARED_MEMORY_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one block may have, by architecture (CUDA C++ Programming Guide, table of compute
capabilities)."""

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


@dataclass(frozen=True)
class Problem:
    """What kernels are compiled for."""

    dtype: torch.dtype
    batch: int
    hidden: int
    projected: int = 0
    ragged: bool = False  # with lengths and resets
    reverse: bool = False
    precision: str = "ieee"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.dtype is torch.float32:
            name += f" {self.precision}"
        words = [name, f"B={self.batch}", f"H={self.hidden}"]
        words += [f"P={self.projected}"] * bool(self.projected) + ["ragged"] * self.ragged + ["reverse"] * self.reverse
        return " ".join(words)


SHAPES = (
    dict(batch=16, hidden=768),
    dict(batch=64, hidden=130, projected=33, ragged=True, reverse=True),
)
PRECISIONS = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
PROBLEMS = tuple(Problem(dtype, precision=precision, **shape) for dtype, precision in PRECISIONS for shape in SHAPES)
"""The problems that `python -m gpu_lstm kernels` and the tests compile: every dtype, precision and kernel."""


@dataclass(frozen=True)
class Report:
    """What one kernel became on one architecture."""

    kernel: str
    problem: str
    architecture: int
    registers: int  # a thread
    spills: int  # bytes of stack a thread
    shared: int  # bytes a block
    tensor_core: str  # the PTX instruction, or "" if there is none

    @property
    def fits(self) -> bool:
        """No spills, and no more shared memory than a block may have."""
        return self.spills == 0 and self.shared <= SHARED_MEMORY_LIMIT[self.architecture]


def recorded_launches(problem: Problem) -> list[Launch]:
    """The distinct launches of a forward pass with everything saved, and of its backward pass."""
    launches: dict[str, Launch] = {}

    def record(kernel, grid, *args, **constants):
        launches.setdefault(kernel.__name__, Launch(kernel, tuple(grid), args, constants))

    def meta(*shape, dtype=problem.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    steps, batch, hidden = 2, problem.batch, problem.hidden
    width = problem.projected or hidden
    weights = meta(4 * hidden, width), meta(width, hidden) if problem.projected else None
    states = meta(batch, width), meta(batch, hidden)
    lengths = meta(batch, dtype=torch.int64) if problem.ragged else None
    resets = meta(steps, batch, dtype=torch.bool) if problem.ragged else None
    what = *weights, *states, lengths, resets, problem.reverse
    gates = meta(steps, batch, 4 * hidden)
    *_, c = launch.layer_forward(gates, *what, True, problem.precision, run=record)
    launch.layer_backward(meta(steps, batch, width), *states, gates, c, *what, problem.precision, run=record)
    return list(launches.values())


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


def report(launch: Launch, problem: Problem, architecture: int) -> Report:
    """Compile a launch for `architecture` and look at what came out."""
    compiled = compile_for(launch, architecture)
    registers, stack = _resources(compiled.asm["cubin"])
    tensor_core = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
    return Report(
        kernel=launch.kernel.__name__,
        problem=str(problem),
        architecture=architecture,
        registers=registers,
        spills=stack,
        shared=compiled.metadata.shared,
        tensor_core=tensor_core[1] if tensor_core else "",
    )


def reports() -> Iterator[Report]:
    """A report for every problem, kernel and architecture."""
    if launch.INTERPRETED:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1 in the environment")
    for problem in PROBLEMS:
        for recorded in recorded_launches(problem):
            for architecture in ARCHITECTURES:
                yield report(recorded, problem, architecture)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, read by the cuobjdump that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(usage[1]), int(usage[2])
