"""Whether wgmma reads the weights that a kernel holds where the kernel stored them, as its PTX says.

Triton lays an operand out in shared memory twice: for the stores, and for the descriptors of products. The two must
agree; triton_issue.md has a case where they do not. So addresses are computed here for all threads, back from the
instructions that use them.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", re.MULTILINE)
_APART = 1 << 48  # that pointers given to the kernel are taken to be from each other
_K_BYTES = 32  # of a row of an operand, that one wgmma takes
_OPERATIONS = {
    "mov": lambda a: a, "cvt": lambda a: a, "cvta": lambda a: a, "neg": lambda a: -a, "not": lambda a: ~a,
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b, "bfe": lambda a, b, c: a >> b & (1 << c) - 1,
    "shfl": lambda a, *_: a[np.arange(len(a)) & ~31],  # of the first thread of each warp
}  # fmt: skip


class _Block:
    """The first block of a launch: its registers in every thread, [threads] or a number, where integers given are 0."""

    def __init__(self, ptx: str) -> None:
        (threads,) = re.findall(r"\.(?:req|max)ntid (\d+)", ptx)
        self.instructions: list[tuple[str, str]] = _INSTRUCTION.findall(ptx)
        self.threads = np.arange(int(threads))
        self.values: dict[str, Any] = {"%tid.x": self.threads}
        self.written: dict[str, list[tuple[str, str]]] = {}  # a register, by which instructions
        for kind, text in self.instructions:
            self.written.setdefault(text.split(",")[0], []).append((kind, text))

    def value(self, name: str) -> Any:
        """Of a register or a number; None where it is not known, as what is loaded, or changes in a loop."""
        if name[0] in "-0123456789":
            return int(name, 0)
        if name not in self.values:
            self.values[name] = self._result(name)
        return self.values[name]

    def _result(self, name: str) -> Any:
        if name not in self.written:
            return 0  # the number of the block; where shared memory begins
        (kind, text), *more = self.written[name]
        if kind.startswith("ld.param"):
            return int(re.findall(r"_param_(\d+)", text)[0]) * _APART if "64" in kind else 0
        operation = _OPERATIONS.get(kind.split(".")[0])
        of = [self.value(each.strip()) for each in text.split(",")[1:]] if operation and not more else [None]
        return None if any(each is None for each in of) else operation(*of)

    def address(self, text: str) -> Any:
        """[threads] of `[%r1+16]`, or None."""
        base, offset = re.findall(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", text)[0]
        begin = self.value(base)
        return None if begin is None else begin + int(offset or 0) + 0 * self.threads


def misplaced(ptx: str, weights: int, place: Callable[[int], int], size: int, blocks: int) -> int:
    """How many products of a chain over K do not begin at what the kernel stored for them.

    Args:
        ptx: of a kernel that loads all weights before its time loop, and multiplies with them on the left of wgmma.
        weights: which parameter they are.
        place: bytes in global memory from the first k of a column to the k-th.
        size: bytes of an element.
        blocks: of 64 columns of weights.
    """
    block = _Block(ptx)
    loaded: dict[str, Any] = {}  # a register: from where
    stored: dict[int, int] = {}  # where in shared memory: from where, in `weights`
    chains: dict[tuple[str, int], list[int]] = {}  # by accumulators and warpgroup: where the products of a chain begin
    for kind, text in block.instructions:
        width = int(kind[-2:]) // 8 if kind[-2:].isdigit() else 0
        if kind.startswith("ld.global") and (begin := block.address(text)) is not None:
            names = re.findall(r"%r\w*", text.split("[")[0])
            loaded |= {name: begin + width * i - weights * _APART for i, name in enumerate(names)}
        elif kind.startswith("st.shared") and (begin := block.address(text)) is not None:
            for i, name in enumerate(re.findall(r"%r\w*", text.split("]")[1])):
                if name in loaded and abs(loaded[name][0]) < _APART // 2:  # before them, of a gate that has no rows
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
