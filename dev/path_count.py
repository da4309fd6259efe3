"""List the functions of the library that a call goes through. Kernels are not launched.

    python dev/path_count.py [CASE [MODE]]       the cases of bench/host.py in numbers, or the functions of one

A change of file is a call of a function in another file than the previously called function. A return is a change of
file to a file that was left before. Comprehensions and lambdas are not counted, since versions of Python differ in
them.
"""

import sys
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.host import CARD, KERNELS, made, stub  # noqa: E402

CASES, MODES = ("T=1", "T=128", "lengths", "resets", "two layers, bidirectional"), ("inference", "training")


def path_of(case: str, mode: str) -> list[tuple[int, str, str]]:
    """Return depth, file and name of each function of the library that a warmed-up call enters."""
    call, path, depth = made(case, mode, CARD, KERNELS), [], 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        code = frame.f_code
        ours = code.co_filename.startswith((f"{ROOT}/gpu_lstm/", f"{ROOT}/kernels/"))
        if ours and code.co_name[0] != "<" and event in ("call", "return"):
            if event == "call":
                path.append((depth, str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname))
            depth += 1 if event == "call" else -1

    with torch.set_grad_enabled(mode == "training"):
        for turn in range(5):
            sys.setprofile(profile if turn == 4 else None)
            call()
    sys.setprofile(None)
    return path


def main(case: str | None = None, mode: str = MODES[0]) -> None:
    stub()
    if case is not None:
        print(*(f"{'  ' * depth}{file} {name}" for depth, file, name in path_of(case, mode)), sep="\n")
        return
    for case, mode in ((case, mode) for case in CASES for mode in MODES):
        path = path_of(case, mode)
        stays = [file for file, _ in groupby(file for _, file, _ in path)]
        files, frames = len(set(stays)), 1 + max(depth for depth, _, _ in path)
        print(f"{case}, {mode}: {len(path)} calls, {files} files, {len(stays) - 1} changes", end=", ")
        print(f"{len(stays) - files} returns, {frames} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
