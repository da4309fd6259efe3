"""What a GPU's architecture offers a block, by compute capability: 90 stands for 9.0."""

KB = 1024

_SHARED = {60: 48, 70: 96, 75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KB; all others 99
REGISTERS = 65536  # per multiprocessor; one block may use all of them


def have_room(blocks: int, shared: int, most: int) -> bool:
    """Whether blocks of a multiprocessor fit its shared memory, of which one may use `most` bytes, the system 1 KB."""
    return blocks * (shared + KB) <= most + KB


def shared_memory_of(architecture: int) -> int:
    """Bytes of shared memory that a block may use (CUDA C++ Programming Guide, table of compute capabilities)."""
    return _SHARED.get(architecture, 99) * KB
