"""A race of two functions: their times, taken in turns, and what they decide."""

import statistics
import time
from collections.abc import Callable, Mapping
from math import ceil
from operator import truediv
from typing import NamedTuple

import torch

from ..call.choices import Backend

BUDGET = 0.3  # seconds that a race may last, after everything is compiled
ROUND = 2e-3  # seconds of calls between two looks at the clock
MOST_CALLS, MOST_ROUNDS = 64, 200  # of a round; of a race
CLEAR = 1.3  # the margin between all calls of two rivals that ends a race
UNCERTAIN = 0.5  # if the quartiles of the ratio differ by more than this share of its median, a tie is not cached


class Decision(NamedTuple):
    """Which backend runs a kind of call, and why."""

    backend: Backend
    why: str
    seconds: dict[str, float] | None = None  # the median of each rival's calls; None: there was no race

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in (self.seconds or {}).items())
        return f"{self.backend.value}: {self.why}" + (f" ({times})" if times else "")


def clock(device: torch.device) -> float:
    """The time in seconds, once the device's queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def race(rivals: Mapping[str, Callable[[], object]], now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds per call of each rival, timed in turn until the budget is spent or one is clearly faster.

    Each is timed at least three times, or twice if that takes longer than the budget, and runs twice before.
    """
    calls = {}
    for name, run in rivals.items():
        run()
        start = now()
        run()
        calls[name] = min(MOST_CALLS, max(1, ceil(ROUND / max(now() - start, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = now() + BUDGET
    for number in range(MOST_ROUNDS):  # whatever the clock says
        for name, run in rivals.items():
            start = now()
            for _ in range(calls[name]):
                run()
            times[name].append((now() - start) / calls[name])
        if (number >= 1 and now() >= end) or (number >= 2 and is_clear(*times.values())):
            break
    return times


def is_clear(one: list[float], other: list[float]) -> bool:
    """Whether every call of one rival was faster than all of the other, by a margin."""
    return max(one) * CLEAR < min(other) or max(other) * CLEAR < min(one)


def judge(times: dict[str, list[float]], expected: Decision) -> tuple[Decision, bool]:
    """The winner, and whether it is certain enough to be cached.

    The times of a round are compared with each other, since other programs slow down whole rounds. The winner is faster
    in three rounds of four.
    """
    (one, its_times), (other, others) = times.items()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    if min(map(min, times.values())) <= 0:
        return Decision(expected.backend, f"its times are too noisy; {expected.why}", medians), False
    low, middle, high = statistics.quantiles(map(truediv, others, its_times), n=4)  # how many times as fast one is
    if low > 1:
        return Decision(Backend(one), f"won a race, {middle:.2f} times as fast", medians), True
    if high < 1:
        return Decision(Backend(other), f"won a race, {1 / middle:.2f} times as fast", medians), True
    if high - low > UNCERTAIN * middle:
        return Decision(expected.backend, f"its times are too noisy; {expected.why}", medians), False
    return Decision(expected.backend, f"a tie; {expected.why}", medians), True
