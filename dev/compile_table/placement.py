"""Check in PTX whether wgmma reads the weights in shared memory from the addresses where the kernel stored them.

Triton computes the layout of an operand in shared memory twice: for the stores, and for the descriptors of products.
The two must agree; triton_issue.md has a case where they do not. So this module computes the addresses for all threads,
backwards from the instructions that use them.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", re.MULTILINE)
_APART = 1 << 48  # the assumed distance between the pointers that the kernel is given
_K_BYTES = 32  # bytes of a row of an operand that one wgmma reads
_OPERATIONS = {
    "mov": lambda a: a, "cvt": lambda a: a, "cvta": lambda a: a, "neg": lambda a: -a, "not": lambda a: ~a,
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b, "bfe": lambda a, b, c: a >> b & (1 << c) - 1,
    "shfl": lambda a, *_: a[np.arange(len(a)) & ~31],  # the value of the first thread of each warp
}  # fmt: skip


class _Block:
    """The first block of a launch. It computes registers, as [threads] or as one number. Integer arguments are 0."""

    def __init__(self, ptx: str) -> None:
        (threads,) = re.findall(r"\.(?:req|max)ntid (\d+)", ptx)
        self.instructions: list[tuple[str, str]] = _INSTRUCTION.findall(ptx)
        self.threads = np.arange(int(threads))
        self.values: dict[str, Any] = {"%tid.x": self.threads}
        self.written: dict[str, list[tuple[str, str]]] = {}  # for each register, the instructions that write it
        for kind, text in self.instructions:
            self.written.setdefault(text.split(",")[0], []).append((kind, text))

    def value(self, name: str) -> Any:
        """Return the value of a register or number, or None if it is not known: it is loaded, or changes in a loop."""
        if name[0] in "-0123456789":
            return int(name, 0)
        if name not in self.values:
            self.values[name] = self._result(name)
        return self.values[name]

    def _result(self, name: str) -> Any:
        if name not in self.written:
            return 0  # the number of the block, or the beginning of shared memory
        (kind, text), *more = self.written[name]
        if kind.startswith("ld.param"):
            return int(re.findall(r"_param_(\d+)", text)[0]) * _APART if "64" in kind else 0
        operation = _OPERATIONS.get(kind.split(".")[0])
        of = [self.value(each.strip()) for each in text.split(",")[1:]] if operation and not more else [None]
        return None if any(each is None for each in of) else operation(*of)

    def address(self, text: str) -> Any:
        """Return the address [threads] of an operand like `[%r1+16]`, or None."""
        base, offset = re.findall(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", text)[0]
        begin = self.value(base)
        return None if begin is None else begin + int(offset or 0) + 0 * self.threads


def misplaced(ptx: str, weights: int, place: Callable[[int], int], size: int, blocks: int) -> int:
    """Return how many products of a chain over K do not begin at the weights that the kernel stored for them.

    Args:
        ptx: the PTX of a kernel that loads all weights before its time loop. They are the left operand of wgmma.
        weights: the number of the parameter that points to the weights.
        place: place(k) is the distance in global memory, in bytes, from the first k of a column to the k-th.
        size: bytes of an element.
        blocks: the number of blocks of 64 columns of weights.
    """
    block = _Block(ptx)
    loaded: dict[str, Any] = {}  # register: the global address that it was loaded from
    stored: dict[int, int] = {}  # address in shared memory: offset in `weights`
    # By accumulators and warpgroup: where in shared memory the products of a chain begin.
    chains: dict[tuple[str, int], list[int]] = {}
    for kind, text in block.instructions:
        width = int(kind[-2:]) // 8 if kind[-2:].isdigit() else 0
        if kind.startswith("ld.global") and (begin := block.address(text)) is not None:
            names = re.findall(r"%r\w*", text.split("[")[0])
            loaded |= {name: begin + width * i - weights * _APART for i, name in enumerate(names)}
        elif kind.startswith("st.shared") and (begin := block.address(text)) is not None:
            for i, name in enumerate(re.findall(r"%r\w*", text.split("]")[1])):
                # abs(), since the address of a gate that has no rows is before the weights.
                if name in loaded and abs(loaded[name][0]) < _APART // 2:
                    stored |= zip((begin + width * i).tolist(), loaded[name].tolist())
        elif kind.startswith("wgmma.mma_async"):
            sums, descriptor = re.findall(r"\{(.*?)\}, (%rd\d+)", text)[0]
            begin = ((block.value(descriptor) & 0x3FFF) << 4) + 0 * block.threads
            for warpgroup, at in enumerate(begin[::128].tolist()):
                chains.setdefault((sums, warpgroup), []).append(at)
    first, wrong, k = set(), 0, _K_BYTES // size
    for chain in chains.values():
        source = stored[chain[0]]
        first.add(source)
        wrong += sum(stored.get(at) != source + place(j * k) for j, at in enumerate(chain))
    return wrong + abs(len(first) - blocks)
