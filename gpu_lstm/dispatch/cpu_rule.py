"""When the compiled loops for CPUs are faster than what torch has: a rule, since a race would cost its compilation.

`python -m bench cpu` measures the table that it comes from, bench/results/cpu-rule.csv, with one thread and with two;
tests/test_cpu_rule.py holds it to that: nowhere does it take 1.05 times the time of the other choice.
"""

from .kind import Kind

FEWEST_STEPS = 8  # with no more, what a call costs in Python decides
MOST_UNITS = 256  # with more, products decide, which torch has as well


def slower(kind: Kind) -> str | None:
    """Why a kind of call is left to torch's own, or to the reference, in words; None: the compiled loops run it."""
    cell, layers = kind.problems[0].cell, kind.problems
    if kind.steps <= FEWEST_STEPS:
        return f"the rule for CPUs: not for {FEWEST_STEPS} steps or fewer"
    if kind.feature is not None:
        return None  # instead of a loop in Python
    if cell == "lstm":
        return "the rule for CPUs: torch's own LSTM is as fast"
    if any(p.hidden // p.heads > MOST_UNITS for p in layers):
        return f"the rule for CPUs: torch's own GRU is as fast with more than {MOST_UNITS} units"
    return None


def faster(kind: Kind) -> str:
    """Why the compiled loops run what they do, in words."""
    if kind.only_ours:
        return f"torch's own does not support {kind.only_ours}"
    return "the rule for CPUs: torch runs a step of a GRU as many small operations, the compiled loop as one"
