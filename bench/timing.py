"""Measure time and memory of calls, and the limits of the device.

Calls are timed in interleaved rounds, so that the drift of the machine affects all of them alike.
"""

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cases import DTYPES

WARM_UP = 3  # calls
SHORTEST = 1e-3  # the shortest sample in seconds; shorter calls are repeated within it
ROUNDS = (10, 100)  # the fewest and the most; even, so that either of two calls is first equally often
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
CEILING_SECONDS = 1.0  # for both ceilings together


def interleaved(
    calls: Mapping[Any, Any], device: str, seconds: float, rounds: tuple[int, int] = ROUNDS, sample: Any = None
) -> dict[Any, np.ndarray]:
    """Return the seconds per call, for each of `calls` and every round.

    In a round all calls take turns, in a random order. The next round has the reverse order. All rounds together
    should last `seconds`, without the warm-up. `rounds` is the least and the greatest number of rounds.
    """
    sample = sample or _sample
    estimates = {name: [sample(call, 1, device) for _ in range(WARM_UP)][-1] for name, call in calls.items()}
    repeats = {name: max(1, round(SHORTEST / estimate)) for name, estimate in estimates.items()}
    a_round = sum(estimates[name] * repeats[name] for name in calls)  # 0 if there are no calls
    count = min(max(rounds[0], 2 * int(seconds / (a_round or 1) / 2)), rounds[1])
    shuffle, order, taken = random.Random(0), list(calls), {name: np.empty(count) for name in calls}
    for number in range(count):
        if number % 2 == 0:
            shuffle.shuffle(order)
        for name in order[:: -1 if number % 2 else 1]:
            taken[name][number] = sample(calls[name], repeats[name], device)
    return taken


def _sample(call: Callable[[], object], repeats: int, device: str) -> float:
    start = time.perf_counter()
    if device != "cpu":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    for _ in range(repeats):
        call()
    if device == "cpu":
        return (time.perf_counter() - start) / repeats
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def percentiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, (0.5, 0.2, 0.8)).tolist()


def bootstrapped(values: np.ndarray) -> list[float]:
    """Return the median, and the ends of its 95 % confidence interval by the percentile bootstrap over rounds."""
    medians = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
    return [float(np.median(values)), *np.quantile(medians, (0.025, 0.975)).tolist()]


@functools.cache
def ceilings(dtype: str, device: str) -> tuple[float, float]:
    """Return two measured limits of the device: bytes per second of a copy, and FLOPs per second of a matmul.

    The bytes of a copy are counted twice, since they are read and written.
    """
    kind = torch.device(device).type
    (source, target), size = torch.ones(2, COPY_BYTES[kind] // 4, device=device), PRODUCT_SIZE[kind]
    a, b, product = torch.randn(3, size, size, device=device).to(DTYPES[dtype])
    calls: dict[str, Any] = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    taken = interleaved(calls, device, CEILING_SECONDS)  # the best round counts, so that no call exceeds the ceiling
    return 2 * COPY_BYTES[kind] / float(taken["copy"].min()), 2 * size**3 / float(taken["product"].min())


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return `call` as a replay of a CUDA graph."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(WARM_UP):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the block waits for the device before it captures
        call()
    return graph.replay


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Return the peak allocation during a call on CUDA, minus the allocation before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(forward: Callable[[], object], but: Sequence[Tensor]) -> int:
    """Return the bytes that autograd saves in a forward pass, without the tensors `but`. A storage counts once."""
    saved = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        forward()
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return sum(size for storage, size in sizes.items() if storage not in {t.untyped_storage()._cdata for t in but})


@contextlib.contextmanager
def float32_products(dtype: str) -> Iterator[None]:
    """A block in which matmuls of float32 tensors are computed in TF32 or exactly, as the name of DTYPES says."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
