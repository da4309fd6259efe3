"""Ten minutes of random calls, each against the oracle; memory, open files, threads and temporary files may not grow.

    make soak                       # SOAK="--minutes 1 --seed 7" for others

Backends torch, reference, numba, triton in its interpreter, and the kernels in CUDA C++ compiled for the host, with
all options that each supports. The seed is printed at the start.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import check
from places import KERNELS

from gpu_lstm.dispatch import route

SHAPES = [(1, 1, 3, 5), (1, 9, 4, 8), (4, 3, 3, 8), (7, 2, 5, 6), (3, 10, 2, 9), (4, 3, 3, 8, 5)]
OF_TORCH = ["reverse", "ragged", "resets", "no-bias", "no-hx", "deep", "both", "batch-first"]  # words of cases.py
OURS = [*OF_TORCH, "states", "peepholes", "norms", "norm-hh", "norm-c", "masks", "dropout_h", "zoneout_h", "zoneout_c",
        "expected", "recompute"]  # fmt: skip
NORMS, NOISE = {"norms", "norm-hh", "norm-c"}, {"masks", "expected", "dropout_h", "zoneout_h", "zoneout_c"}
CONFLICTS = [NORMS, NOISE | {"reverse"}, {"reverse", "batch-first"}]  # "reverse" is of lstm_layer
WARM = 0.3  # of the time, in which caches fill
GROWTH = 32 << 20  # bytes that an allocator may still take after it


def words_of(rng: random.Random, place: str, shape: tuple[int, ...]) -> list[str]:
    """Random options of an example that a place supports, at most one of each conflict."""
    (backend, _), (family, *_) = KERNELS[place], place.split("/")
    known = OF_TORCH if backend == "torch" else OURS
    words = rng.sample(known, rng.randint(1, min(4, len(known))))
    for conflict in CONFLICTS:
        for word in [word for word in words if word in conflict][1:]:
            words.remove(word)
    # A layer norm is not defined with a projection. Of few units that are alike it multiplies rounding errors, and in
    # kernels up to twenty times as much as in the reference: test_layer compares kernels, of other numbers.
    if len(shape) == 5 or backend in ("triton", "cupy", "numba"):
        words = [word for word in words if word not in NORMS]
    if len(shape) == 5 and family in ("step", "split", "held", "resident", "cooperative"):
        words = [word for word in words if word not in NOISE]
    return words


def call(rng: random.Random) -> str:
    """One random call, compared; in words."""
    place = rng.choice(list(KERNELS))
    backend, force = KERNELS[place]
    # The kernels in CUDA C++ round as a card does, to half precision as torch's own LSTM.
    dtype = dict(triton=torch.float32, numba=torch.float32, cupy=torch.float16).get(backend, torch.float64)
    # Of few numbers the root mean square says little: kernels, which are compared by it, have more than one sequence.
    shapes = [shape for shape in SHAPES if shape[1] > 1 or dtype is torch.float64]
    if place == "split/8":
        shapes = [shape for shape in shapes if shape[3] % 2 == 0]  # parts of K = 4H are equal
    shape = rng.choice(shapes)
    words = " ".join(words_of(rng, place, shape))
    with pytest.MonkeyPatch.context() as patch:
        force(patch)
        try:
            check(shape, words, backend, dtype, seeds=1 if dtype is torch.float64 else 6)
        except Exception as error:
            raise AssertionError(f"{place}, (T, B, I, H[, P]) = {shape}, {words}: {error}") from error
    route.forget()
    return place


def held() -> dict[str, int]:
    """The resources whose use by a process must not grow."""
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files, temporary = len(os.listdir("/proc/self/fd")), len(os.listdir(tempfile.gettempdir()))
    return {"memory": memory, "open files": files, "threads": threading.active_count(), "temporary files": temporary}


def main() -> int:
    """Run until the time is up; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    rng, begin, counts, warm = random.Random(options.seed), time.monotonic(), Counter(), None
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # so that no other process's files count
        while (passed := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
            counts[call(rng)] += 1
            if warm is None and passed > WARM:
                warm = held()
        end = held()
    print(f"{counts.total()} calls: {dict(counts)}")
    grown = {name: (warm[name], n) for name, n in end.items() if n > warm[name] + GROWTH * (name == "memory")}
    print(f"held after {WARM:.0%} of the time and at the end: {grown or 'nothing more'}; {end}")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
