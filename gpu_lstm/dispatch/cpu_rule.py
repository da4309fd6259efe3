"""Which calls on a CPU the compiled loops may run, and which they run where no race is allowed.

Two things differ from a card. The loops need Numba, whose import takes a second. Their compilation takes ten seconds,
once for a CPU, while most calls take milliseconds. So a kind of call that cannot win costs neither, and a short call
does not cause a compilation. Everything else is raced as on a card.
"""

from ..call.choices import Backend
from ..kernels.contract import package_of
from .kind import Kind

FEWEST_STEPS = 8  # more are worth a compilation
MOST_UNITS = 1 << 20  # of all steps and sequences of a race
EXPECTED = "expected: torch runs a step as many small operations, the compiled loop as one"
SHORT = f"expected: a call of {FEWEST_STEPS} steps or fewer is short"


def left_to_torch(kind: Kind) -> str | None:
    """Why torch's own runs a kind of call without a race, in words; None: the compiled loops may run it."""
    first = kind.problems[0]
    ragged = first.resets or first.lengths is not None
    if first.cell == "lstm" and first.heads == 1 and not (ragged or kind.feature or kind.one_step):
        return "torch's own LSTM is one loop on a CPU as well"
    return None


def is_long(kind: Kind) -> bool:
    """Whether the loops are compiled for a kind of call, and expected to be faster."""
    return kind.steps > FEWEST_STEPS


def waits(kernels: Backend, kind: Kind) -> str | None:
    """Why a kind of call does without loops that are not compiled yet, in words; None: they are, or will be for it."""
    is_compiled = package_of(kernels.value).is_compiled
    if is_long(kind) or is_compiled is None or all(map(is_compiled, kind.passes)):
        return None
    return f"the loops are not compiled yet, and are not for {FEWEST_STEPS} steps or fewer"


def steps_of_a_race(kind: Kind, longest: int) -> int:
    """The steps of a race, so that it takes about a second at most."""
    units = max(p.batch * p.hidden for p in kind.problems)
    return min(longest, max(2 * FEWEST_STEPS, MOST_UNITS // units))
