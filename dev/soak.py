"""Make random calls for ten minutes, and compare each with the oracle. The use of resources must not grow.

    make soak                       # SOAK="--minutes 1 --seed 7" for another time and seed

The resources are memory, open files, threads and temporary files. The calls use the backends torch, reference, numba
and triton (in its interpreter), and the kernels in CUDA C++ compiled for the host, each with all options that it
supports. The seed is printed at the start.
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
CONFLICTS = [NORMS, NOISE | {"reverse"}, {"reverse", "batch-first"}]  # "reverse" is an argument of lstm_layer
WARM = 0.3  # the fraction of the time in which caches fill
GROWTH = 32 << 20  # bytes by which the allocator may still grow after that


def words_of(rng: random.Random, place: str, shape: tuple[int, ...]) -> list[str]:
    """Return random options that a place supports, at most one of each conflict."""
    (backend, _), (family, *_) = KERNELS[place], place.split("/")
    known = OF_TORCH if backend == "torch" else OURS
    words = rng.sample(known, rng.randint(1, min(4, len(known))))
    for conflict in CONFLICTS:
        for word in [word for word in words if word in conflict][1:]:
            words.remove(word)
    # A layer norm is not defined with a projection. With few units of similar values it multiplies rounding errors, in
    # kernels up to twenty times as much as in the reference. So test_layer compares kernels with layer norms, with
    # other numbers.
    if len(shape) == 5 or backend in ("triton", "cupy", "numba"):
        words = [word for word in words if word not in NORMS]
    if len(shape) == 5 and family in ("step", "split", "held", "resident", "cooperative"):
        words = [word for word in words if word not in NOISE]
    return words


def call(rng: random.Random) -> str:
    """Make a random call, compare it with the oracle, and return it in words."""
    place = rng.choice(list(KERNELS))
    backend, force = KERNELS[place]
    # The kernels in CUDA C++ round as on a card. In half precision they round as torch's own LSTM does.
    dtype = dict(triton=torch.float32, numba=torch.float32, cupy=torch.float16).get(backend, torch.float64)
    # Kernels are compared by the root mean square, which says little for few numbers. So they have several sequences.
    shapes = [shape for shape in SHAPES if shape[1] > 1 or dtype is torch.float64]
    if place == "split/8":
        shapes = [shape for shape in shapes if shape[3] % 2 == 0]  # K = 4H is divided into equal parts
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
    """Return the use of the resources that must not grow."""
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
        tempfile.tempdir = folder  # so that files of other processes do not count
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
