"""The facts about a card that planning needs, for all backends.

Architectures are compute capabilities: 90 stands for 9.0. The rates of L2 were measured on an H100 (Luo et al.,
"Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024; see also the CUDA C++
Programming Guide).
"""

import ctypes
import os
from dataclasses import dataclass
from math import inf

import torch

KB = 1024
REGISTERS = 65536  # the registers of a multiprocessor, all of which one block may use
# The bytes that a multiprocessor reads from L2 in a clock, when all multiprocessors read, and when it reads alone.
L2_BYTES, L2_ALONE = 28.7, 64

# KB of shared memory that a block may use, by architecture (CUDA C++ Programming Guide, table of compute capabilities).
# Other architectures have 99. Architecture 0 is Triton's interpreter.
_SHARED = {0: 227, 60: 48, 70: 96, 75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}


@dataclass(frozen=True)
class Card:
    """A GPU, as far as plans depend on it."""

    architecture: int
    multiprocessors: int
    name: str = ""
    clock: float = 1.5e9  # Hz
    memory: float = inf  # bytes a second

    @property
    def shared(self) -> int:
        """The bytes of shared memory that a block may use."""
        return _SHARED.get(self.architecture, 99) * KB

    def has_room(self, blocks: int, shared: int) -> bool:
        """Whether a multiprocessor has room for the blocks. Each takes `shared` bytes, and 1 KB for the system."""
        return blocks * (shared + KB) <= self.shared + KB

    def l2_bytes(self, programs: int) -> float:
        """Return the bytes that each of `programs` reads from L2 in a clock."""
        return min(L2_ALONE, L2_BYTES * self.multiprocessors / programs)


def driver() -> ctypes.CDLL:
    """Return the library of the CUDA driver, which torch has loaded."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def driver_version() -> int:
    """Return the newest CUDA that the driver supports, 13000 for CUDA 13.0.

    torch has no function for it in its builds for CUDA.
    """
    version = ctypes.c_int()
    driver().cuDriverGetVersion(ctypes.byref(version))
    return version.value


def cuda_obstacle(backend: str, device: torch.device, oldest: tuple[int, int], instead: str = "") -> Exception | None:
    """Return why a backend that needs CUDA and this compute capability cannot run on a device, or None if it can.

    `instead` ends the message about a device of another type.
    """
    if device.type != "cuda":
        return RuntimeError(f"backend {backend!r} runs on CUDA tensors, got {device}{instead}")
    if (capability := torch.cuda.get_device_capability(device)) >= oldest:
        return None
    at_least, has = (".".join(map(str, pair)) for pair in (oldest, capability))
    return RuntimeError(f"backend {backend!r} needs compute capability {at_least}, {device} has {has}")
