"""The resources of a compiled kernel, for the launchers and for the tables of `python -m gpu_lstm kernels`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .architectures import REGISTERS, shared_memory_of
from .sass import Loop


class Resources(NamedTuple):
    """What a kernel uses."""

    registers: int  # a thread
    spills: int  # bytes of stack a thread
    shared: int  # bytes a block

    def fit(self, threads: int, shared_limit: int) -> bool:
        """No spills, and no more than a block of so many threads may have."""
        registers = -(-self.registers // 8) * 8 * threads  # allocated by 256 a warp
        return self.spills == 0 and registers <= REGISTERS and self.shared <= shared_limit


@dataclass(frozen=True)
class Report:
    """A row of the table: what one kernel became on one architecture."""

    kernel: str
    case: str  # what it was compiled for: dtype and sizes
    architecture: int  # compute capability, 90 for 9.0
    plan: Any  # the backend's own
    threads: int  # a block
    tiles: str  # the plan in few words
    registers: int  # a thread
    spills: int  # bytes of stack a thread
    shared: int  # bytes a block
    loop: Loop | None = None  # the time loop, if the kernel has one
    tensor_core: str = ""  # the PTX instruction, or "" if there is none
    weight_loads: int = 0  # of W_hh inside the time loop

    @property
    def fits(self) -> bool:
        """No spills, and no more registers and shared memory than a block may have."""
        used = Resources(self.registers, self.spills, self.shared)
        return used.fit(self.threads, shared_memory_of(self.architecture))
