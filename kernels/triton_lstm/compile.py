"""The compile report: what every kernel becomes on every architecture, without a GPU.

The launches are recorded from the backend's own entry points, so that what is compiled here is what would be launched:
the same tiles, constants and argument types.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .binary import Launch, compile_for, fits, resources_of
from .launch import INTERPRETED, recorded_launches
from .planning import Family, Plan, Problem, shared_memory_of, step_plan

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PRECISIONS = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))


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
        return fits(self, shared_memory_of(self.architecture))


def report(launch: Launch, problem: str, architecture: int) -> Report:
    """Compile a launch for `architecture` and look at what came out."""
    compiled = compile_for(launch, architecture)
    tensor_core = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
    instruction = tensor_core[1] if tensor_core else ""
    return Report(launch.kernel.__name__, problem, architecture, *resources_of(compiled), instruction)


def step_reports() -> Iterator[Report]:
    """The step family: every kernel, dtype, precision and architecture."""
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1 in the environment")
    for dtype, precision in PRECISIONS:
        for batch, hidden, projected, ragged in ((16, 768, 0, False), (64, 130, 33, True)):
            problem = Problem(2, batch, hidden, dtype, projected, precision)
            name = describe(problem) + " ragged reverse" * ragged
            for backward in (False, True):
                plan = step_plan(problem, backward)
                for launch in recorded_launches(problem, backward, plan, ragged, ragged):
                    for architecture in ARCHITECTURES:
                        yield report(launch, name, architecture)


def describe(problem: Problem) -> str:
    """A problem in few words."""
    name = str(problem.dtype).removeprefix("torch.")
    if problem.dtype is torch.float32:
        name += f" {problem.precision}"
    return f"{name} B={problem.batch} H={problem.hidden}" + f" P={problem.projected}" * bool(problem.projected)
