"""Resources and the time loop of a compiled kernel, read from the binary by the cuobjdump that Triton ships.

Counts are static: an instruction of the time loop counts once, whatever its predicate, also within an inner loop (over
polls, tiles or K).
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

# Bytes of shared memory per block that the system reserves. From compute capability 9.0 on, ptxas counts them, but the
# limit per block (architectures.py) does not.
RESERVED = 1024


@dataclass(frozen=True)
class Loop:
    """One pass of a time loop: a step, or one batch tile of it."""

    instructions: int  # of a warp
    barriers: int  # of all warps of a block
    products: int  # of a warp, on tensor cores
    shared: int  # bytes of shared memory that a thread reads and writes; not what tensor cores read by themselves
    loads: int  # of a thread, from global memory
    stores: int


def usage(cubin: bytes, architecture: int) -> dict[str, tuple[int, int, int]]:
    """(registers, bytes of stack, bytes of shared memory that the kernel declares) of each kernel in a binary.

    Raises:
        RuntimeError: cuobjdump printed nothing of the kind.
    """
    text = _cuobjdump("-res-usage", cubin)
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    reserved = RESERVED if architecture >= 90 else 0
    return {name: (int(r), int(stack), max(0, int(shared) - reserved)) for name, r, stack, shared in found}


def time_loops(cubin: bytes) -> dict[str, Loop | None]:
    """The time loop of each kernel in a binary, the longest loop that it has; None if it has none.

    Raises:
        RuntimeError: cuobjdump printed no instructions.
    """
    text = _cuobjdump("-sass", cubin)
    _, *functions = re.split(r"Function : (\w+)", text)
    if not functions:
        raise RuntimeError(f"cuobjdump printed no instructions: {text!r}")
    return {name: _time_loop(lines) for name, lines in zip(functions[::2], functions[1::2], strict=True)}


def _time_loop(text: str) -> Loop | None:
    # /*0c80*/  @!P0 LDG.E.64 R4, [R2] ;
    begin_of_line = r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?"
    jumps = [(int(a, 16), int(to, 16)) for a, to in re.findall(begin_of_line + r"BRA[^;]*?0x([0-9a-f]+)", text)]
    end, begin = max(jumps, key=lambda jump: jump[0] - jump[1], default=(0, 0))
    if end <= begin:
        return None
    names = [n for a, n in re.findall(begin_of_line + r"([A-Z][^\s;]*)[^;]*;", text) if begin <= int(a, 16) <= end]
    count = Counter(name.split(".")[0] for name in names)
    return Loop(
        instructions=len(names), barriers=count["BAR"], products=count["HMMA"] + count["HGMMA"] + count["UTCHMMA"],
        shared=sum(map(_bytes, names)), loads=count["LDG"] + count["LDGSTS"], stores=count["STG"],
    )  # fmt: skip


def _bytes(name: str) -> int:
    """Bytes of shared memory that an instruction reads or writes per thread: 4 for each matrix of LDSM and STSM."""
    kind, *modifiers = name.split(".")
    if kind not in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
        return 0
    if kind in ("LDSM", "STSM"):
        return 4 * int(modifiers[-1]) if modifiers[-1] in "24" else 4
    return next((size for width, size in _WIDTHS.items() if width in modifiers), 4)


_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _cuobjdump(option: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
