"""A race of two functions: their times, taken in turns, and what they decide."""

import statistics
import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import torch

from ..call.choices import Backend

BUDGET = 0.3  # seconds that a race may last, after everything is compiled
ROUND = 2e-3  # seconds of calls between two looks at the clock
MOST_CALLS, MOST_ROUNDS = 64, 200  # of a round; of a race
UNCERTAIN = 0.5  # if a rival's quartiles differ by more than this share of its median, nothing is cached


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
    """Seconds per call of each rival, timed in turn until the budget is spent; at least three times each, and once more
    before that, which may compile.
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
        if number >= 2 and now() >= end:
            break
    return times


def judge(times: dict[str, list[float]], expected: Decision) -> tuple[Decision, bool]:
    """The winner, and whether it is certain enough to be cached. A difference within the times' spread is a tie."""
    quartiles = {name: statistics.quantiles(seconds, n=4) for name, seconds in times.items()}
    medians = {name: middle for name, (_, middle, _) in quartiles.items()}
    spread = max(high - low for low, _, high in quartiles.values())
    first, second = sorted(medians, key=medians.__getitem__)
    if any(middle <= 0 or high - low > UNCERTAIN * middle for low, middle, high in quartiles.values()):
        return Decision(expected.backend, f"its times are too noisy; {expected.why}", medians), False
    if medians[second] - medians[first] <= spread:
        return Decision(expected.backend, f"a tie; {expected.why}", medians), True
    why = f"won a race, {medians[second] / medians[first]:.2f} times as fast"
    return Decision(Backend(first), why, medians), True
