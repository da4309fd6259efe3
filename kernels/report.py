"""A row of the table of `python -m gpu_lstm kernels`."""

from dataclasses import dataclass
from typing import Any

import torch

from .architectures import REGISTERS, shared_memory_of
from .sass import Loop

PRECISIONS = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))


@dataclass(frozen=True)
class Report:
    """What one kernel compiled to on one architecture."""

    kernel: str
    case: str  # what it was compiled for: dtype and sizes
    architecture: int  # compute capability, 90 for 9.0
    plan: Any  # the backend's own
    threads: int  # per block
    tiles: str  # the plan in a few words
    registers: int  # per thread
    spills: int  # bytes of stack per thread
    shared: int  # bytes per block
    loop: Loop | None = None  # the time loop, if the kernel has one
    tensor_core: str = ""  # the PTX instruction, or "" if there is none
    weight_loads: int = 0  # of W_hh inside the time loop

    @property
    def fits(self) -> bool:
        """Whether nothing spills, and a block needs no more registers and shared memory than it may use."""
        registers = -(-self.registers // 8) * 8 * self.threads  # allocated in units of 256 per warp
        return self.spills == 0 and registers <= REGISTERS and self.shared <= shared_memory_of(self.architecture)
