"""Time and memory of calls: interleaved rounds, so that a drift of the machine hits all alike."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name")
Run = Callable[[int], object]
"""One call; the number tells calls apart, so that each may take another set of inputs."""

WARM_UP = 3  # calls
SHORTEST = 1e-3  # seconds of a sample; quicker calls are repeated within it
ROUNDS = (9, 100)  # at least, at most


def interleaved(runs: Mapping[Name, Run], device: str, seconds: float) -> dict[Name, list[float]]:
    """Seconds a call, for each of `runs` and every round. Each round takes all of them, in an order of its own.

    Args:
        runs: what to time.
        device: "cpu", or a CUDA device; there events measure.
        seconds: that all rounds together should take, warm-up not counted.
    """
    estimates = {}
    for name, run in runs.items():
        for call in range(WARM_UP):
            estimates[name] = _sample(run, call, 1, device)
    repeats = {name: max(1, round(SHORTEST / estimate)) for name, estimate in estimates.items()}
    a_round = sum(estimates[name] * repeats[name] for name in runs)
    rounds = min(max(ROUNDS[0], int(seconds / a_round)), ROUNDS[1])

    shuffle = random.Random(0)
    taken: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            taken[name].append(_sample(runs[name], number * repeats[name], repeats[name], device))
    return taken


def _sample(run: Run, first: int, repeats: int, device: str) -> float:
    """Seconds a call, over some of them."""
    if device == "cpu":
        start = time.perf_counter()
        for call in range(first, first + repeats):
            run(call)
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for call in range(first, first + repeats):
        run(call)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[1], tenths[7]


def captured(run: Run) -> Run:
    """`run` as a replay of a CUDA graph, with the first set of inputs for ever."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0)
    return lambda call: graph.replay()


def peak_bytes(run: Run, device: str) -> int | None:
    """What a call allocates at most, above what was there before; None on the CPU, which does not count."""
    if device == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextlib.contextmanager
def kept_for_backward(but: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps within the block, besides the tensors `but`: each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def count() -> int:
        given = {_storage(tensor) for tensor in but}
        return sum(size for storage, size in storages.items() if storage not in given)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
