"""Which calls on a CPU cause a compilation of the loops. Where no race is allowed, the loops run the same calls.

The loops need Numba. Its import takes a second, and the compilation takes 15 seconds, once for a CPU. Most calls take
milliseconds. So only a call that gains much causes a compilation. Once the loops are compiled, every kind of call is
raced, as on a card.
"""

from .kind import Kind

MOST_SHORT_STEPS = 8  # a call of so many steps or fewer is not worth a compilation
MOST_UNITS = 1 << 20  # T B H of a race
EXPECTED = "expected: torch runs a step as many small operations, the compiled loop as one"
PLAIN = "torch's own LSTM is one loop on a CPU as well"
SHORT = f"a call of {MOST_SHORT_STEPS} steps or fewer is short"


def without_loops(kind: Kind) -> str | None:
    """Return why a kind of call causes no compilation, and torch is expected to be faster; None if it does."""
    first = kind.problems[0]
    ragged = first.resets or first.lengths is not None
    if first.cell == "lstm" and first.heads == 1 and not (ragged or kind.feature):
        return PLAIN
    return SHORT if kind.steps <= MOST_SHORT_STEPS else None


def steps_of_a_race(kind: Kind, longest: int) -> int:
    """Return the number of steps of a race: at most `longest`, and fewer for a large batch or layer."""
    units = max(1, *(p.batch * p.hidden for p in kind.problems))  # 1: for an empty batch
    return min(longest, max(2 * MOST_SHORT_STEPS, MOST_UNITS // units))
