"""Time and memory of calls, in interleaved rounds, so that a drift of the machine affects all; the device's limits."""

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .cases import DTYPES

Name = TypeVar("Name")
Call = Callable[[int], object]  # something to time; the number of the call, so that it may use another set of inputs

WARM_UP = 3  # calls
SHORTEST = 1e-3  # seconds of a sample; quicker calls are repeated within it
ROUNDS = (10, 100)  # at least, at most; even, so that of any two each is first equally often
RESAMPLES = 2000
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
CEILING_SECONDS = 1.0  # for both together


def interleaved(
    calls: Mapping[Name, Any], device: str, seconds: float, rounds: tuple[int, int] = ROUNDS, sample: Any = None
) -> dict[Name, np.ndarray]:
    """Seconds a call, for each of `calls` and every round, all of them by turns: a random order, then its reverse.

    `device` is "cpu", or a CUDA device, where events measure, unless there is another `sample`. All rounds together
    should take `seconds`, without the warm-up; there are `rounds` at least and at most.
    """
    sample = sample or _sample
    estimates = {name: [sample(call, n, 1, device) for n in range(WARM_UP)][-1] for name, call in calls.items()}
    repeats = {name: max(1, round(SHORTEST / estimate)) for name, estimate in estimates.items()}
    a_round = sum(estimates[name] * repeats[name] for name in calls)
    count = min(max(rounds[0], 2 * int(seconds / (a_round or 1) / 2)), rounds[1])
    shuffle, order, taken = random.Random(0), list(calls), {name: np.empty(count) for name in calls}
    for number in range(count):
        if number % 2 == 0:
            shuffle.shuffle(order)
        for name in order[:: -1 if number % 2 else 1]:
            taken[name][number] = sample(calls[name], number * repeats[name], repeats[name], device)
    return taken


def _sample(call: Call, first: int, repeats: int, device: str) -> float:
    start = time.perf_counter()
    if device != "cpu":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    for number in range(first, first + repeats):
        call(number)
    if device == "cpu":
        return (time.perf_counter() - start) / repeats
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def percentiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, (0.5, 0.2, 0.8)).tolist()


def bootstrapped(values: np.ndarray) -> list[float]:
    """Median, and the ends of the interval that has it with 95 %: the percentile bootstrap over rounds."""
    medians = np.median(np.random.default_rng(0).choice(values, (RESAMPLES, len(values))), axis=1)
    return [float(np.median(values)), *np.quantile(medians, (0.025, 0.975)).tolist()]


@functools.cache
def ceilings(dtype: str, device: str) -> tuple[float, float]:
    """The most that the device can do: bytes a second of a copy, read and written; FLOPs a second of a matmul."""
    kind = torch.device(device).type
    source, size = torch.ones(COPY_BYTES[kind] // 4, device=device), PRODUCT_SIZE[kind]
    target = torch.empty_like(source)
    a, b, product = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(3))
    calls: dict[str, Call] = {"copy": lambda _: target.copy_(source), "product": lambda _: torch.mm(a, b, out=product)}
    taken = interleaved(calls, device, CEILING_SECONDS)  # of which the best counts: no ceiling is exceeded
    return 2 * COPY_BYTES[kind] / float(taken["copy"].min()), 2 * size**3 / float(taken["product"].min())


def captured(call: Call) -> Call:
    """`call` as a replay of a CUDA graph, always with the first set of inputs."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(WARM_UP):
            call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(0)
    return lambda number: graph.replay()


def peak_bytes(call: Call, device: str) -> int | None:
    """The peak allocation of a call, above what was allocated before; None on the CPU, which does not count."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(forward: Callable[[], object], but: Sequence[Tensor]) -> int:
    """The bytes that autograd saves in a forward pass, without the tensors `but`: each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    given = {tensor.untyped_storage()._cdata for tensor in but}
    return sum(size for storage, size in storages.items() if storage not in given)


@contextlib.contextmanager
def float32_products(dtype: str) -> Iterator[None]:
    """Matmuls of float32 tensors in TF32 within the block, or exactly, as a DTYPE says."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
