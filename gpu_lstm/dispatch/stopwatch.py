"""A race of two functions, timed in turns, and the decision that follows from their times."""

import statistics
import time
from collections.abc import Callable, Mapping
from math import ceil
from operator import truediv
from typing import NamedTuple

import torch

from ..call.choices import Backend

BUDGET = 0.3  # seconds that a race may last, after everything is compiled
ROUND = 2e-3  # the least seconds between two readings of the clock: short calls are repeated
MOST_CALLS, MOST_ROUNDS = 64, 200  # calls of a round, rounds of a race
CLEAR = 1.3  # a race ends when every call of one rival was faster than every call of the other by this factor
UNCERTAIN = 0.5  # a tie is not cached if the quartiles of the ratio differ by more than this share of its median

Times = dict[str, list[float]]
"""The seconds of a call by each rival, in each round of a race."""


class Decision(NamedTuple):
    """Which backend runs a kind of call, and why."""

    backend: Backend
    why: str
    seconds: dict[str, float] | None = None  # the median of each rival's calls, or None if there was no race

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in (self.seconds or {}).items())
        return f"{self.backend.value}: {self.why}" + (f" ({times})" if times else "")


def clock(device: torch.device) -> float:
    """Wait for the device's queued work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def times_of(rivals: Mapping[str, Callable[[], object]], now: Callable[[], float]) -> Times:
    """Time the rivals in turns until the budget is spent or one of them is clearly faster.

    Each rival first runs twice. Then there are at least three rounds, or two if these take longer than the budget. In a
    round each rival is timed once, over one or more calls. Returns the seconds per call of each rival in each round.
    """
    calls = {}
    for name, run in rivals.items():
        run()
        start = now()
        run()
        calls[name] = min(MOST_CALLS, max(1, ceil(ROUND / max(now() - start, 1e-9))))
    times: Times = {name: [] for name in rivals}
    end = now() + BUDGET
    for number in range(MOST_ROUNDS):  # a limit that does not depend on the clock
        for name, run in rivals.items():
            start = now()
            for _ in range(calls[name]):
                run()
            times[name].append((now() - start) / calls[name])
        one, other = times.values()
        is_clear = max(one) * CLEAR < min(other) or max(other) * CLEAR < min(one)
        if (number >= 1 and now() >= end) or (number >= 2 and is_clear):
            break
    return times


def judge(times: Times, expected: Decision) -> tuple[Decision, bool]:
    """Return the decision, and whether it is certain enough to be cached.

    The times of the same round are compared with each other, since other programs slow down whole rounds. The winner is
    the rival that is faster in three rounds of four. Without a winner the `expected` backend is chosen.
    """
    (one, its_times), (other, others) = times.items()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    noisy = min(map(min, times.values())) <= 0
    if not noisy:
        # The speed of `one` in each round, as a multiple of the speed of `other`.
        low, middle, high = statistics.quantiles(map(truediv, others, its_times), n=4)
        if low > 1 or high < 1:
            winner, factor = (one, middle) if low > 1 else (other, 1 / middle)
            return Decision(Backend(winner), f"won a race, {factor:.2f} times as fast", medians), True
        noisy = high - low > UNCERTAIN * middle
    what = "its times are too noisy" if noisy else "a tie"
    return Decision(expected.backend, f"{what}; {expected.why}", medians), not noisy
