"""Report the resources and the time loop of a compiled kernel, read from the binary by Triton's cuobjdump.

Counts are static: an instruction of the time loop counts once. Its predicate does not matter, nor do inner loops over
polls, tiles or K.
"""

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from gpu_lstm.kernels.cards import REGISTERS, Card

PRECISIONS = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))

# Bytes of shared memory per block that the system reserves. From compute capability 9.0 on, ptxas counts them, but the
# limit per block (cards.py) does not.
RESERVED = 1024
READABLE = 75  # the oldest architecture that the disassembler of CUDA 13, shipped with recent Tritons, reads


@dataclass(frozen=True)
class Loop:
    """One pass of a time loop: a step, or one batch tile of it."""

    instructions: int  # instructions of a warp
    barriers: int  # barriers of all warps of a block
    products: int  # products of a warp on tensor cores
    shared: int  # bytes of shared memory that a thread reads and writes, without the reads of tensor cores
    loads: int  # loads of a thread from global memory
    stores: int


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture."""

    kernel: str
    case: str  # the dtype and sizes of the problem
    architecture: int  # compute capability, 90 for 9.0
    plan: Any  # the backend's own plan
    threads: int  # per block
    tiles: str  # the plan in a few words
    registers: int  # per thread
    spills: int  # bytes of stack per thread
    shared: int  # bytes per block
    loop: Loop | None = None  # the time loop, if the kernel has one
    tensor_core: str = ""  # the PTX instruction, or "" if there is none
    weight_loads: int = 0  # loads of W_hh inside the time loop
    in_profiles: str = ""  # the name that a profiler shows
    digest: str = ""  # of the binary
    misplaced: int = 0  # products that do not read W_hh where it was stored in shared memory, see placement.py

    @property
    def fits(self) -> bool:
        """Whether nothing spills, and the registers and the shared memory of a block are within the limits."""
        registers = -(-self.registers // 8) * 8 * self.threads  # allocated in units of 256 per warp
        return self.spills == 0 and registers <= REGISTERS and self.shared <= Card(self.architecture, 1).shared


def read(cubin: bytes, architecture: int, dynamic: int) -> dict[str, Any]:
    """Return fields of a Report from the binary of a kernel.

    `dynamic` is the number of bytes of shared memory that the binary does not declare.
    """
    usage = re.findall(r"Function \w+:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _cuobjdump("-res-usage", cubin))
    ((registers, spills, declared),) = (map(int, numbers) for numbers in usage)
    declared = max(0, declared - RESERVED * (architecture >= 90))
    loop = time_loop(_cuobjdump("-sass", cubin)) if architecture >= READABLE else None
    shared, digest = declared + dynamic, hashlib.sha256(cubin).hexdigest()
    return dict(registers=registers, spills=spills, shared=shared, loop=loop, digest=digest)


def time_loop(sass: str) -> Loop | None:
    """Return the time loop of a kernel, which is its longest loop; None if it has no loop."""
    # /*0c80*/  @!P0 LDG.E.64 R4, [R2] ;
    begin_of_line = r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?"
    jumps = [(int(a, 16), int(to, 16)) for a, to in re.findall(begin_of_line + r"BRA[^;]*?0x([0-9a-f]+)", sass)]
    end, begin = max(jumps, key=lambda jump: jump[0] - jump[1], default=(0, 0))
    if end <= begin:
        return None
    names = [n for a, n in re.findall(begin_of_line + r"([A-Z][^\s;]*)[^;]*;", sass) if begin <= int(a, 16) <= end]
    count = Counter(name.split(".")[0] for name in names)
    return Loop(
        instructions=len(names), barriers=count["BAR"], products=count["HMMA"] + count["HGMMA"] + count["UTCHMMA"],
        shared=sum(map(_bytes, names)), loads=count["LDG"] + count["LDGSTS"], stores=count["STG"],
    )  # fmt: skip


def _bytes(name: str) -> int:
    """Return the bytes of shared memory that an instruction moves per thread: 4 per matrix of LDSM and STSM."""
    kind, *modifiers = name.split(".")
    if kind in ("LDSM", "STSM"):
        return 4 * int(modifiers[-1]) if modifiers[-1] in "24" else 4
    if kind in ("LDS", "STS", "LDGSTS"):
        return next((size for width, size in _WIDTHS.items() if width in modifiers), 4)
    return 0


_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _cuobjdump(option: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
