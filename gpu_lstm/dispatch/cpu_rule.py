"""When the compiled loops for CPUs are faster than what torch has: a rule, since a race would cost their compilation.

`python -m bench cpu` measures the tables that it comes from, bench/results/cpu, with one thread and with two;
tests/test_numba.py holds it to them.
"""

from .kind import Kind

FEWEST_STEPS, FEWEST_RAGGED = 8, 2  # what a call costs in Python decides; where torch has more to do, it is sooner paid
MOST_UNITS = 256  # of a head of a GRU; with more, products decide, which torch has as well
MOST_CELLS = 1 << 15  # units of all sequences of a plain GRU; with more it is the same
LEAST_HEAD = 32  # units, for which a product in tiles pays
NARROW, FEW, MANY = 64, 16, 64  # units, and sequences, of an LSTM with lengths or resets that pays; of a GRU's step
RULE = "the rule for CPUs"


def slower(kind: Kind) -> str | None:
    """Why a kind of call is left to torch's own, or to the reference, in words; None: the compiled loops run it."""
    first, name = kind.problems[0], kind.problems[0].cell.upper()
    ragged, ours = first.resets or first.lengths is not None, kind.feature is not None
    if kind.one_step and (first.cell != "gru" or first.batch <= FEW):
        return None
    widest = max(p.columns for p in kind.problems)
    fewest = FEWEST_RAGGED if (ragged or ours) and widest <= MOST_UNITS else FEWEST_STEPS
    if kind.steps <= fewest:
        return f"{RULE}: not for {fewest} steps or fewer"
    if ours:  # instead of a loop in Python
        return None
    pays = first.resets and (widest <= NARROW or first.batch >= MANY)
    if first.cell == "lstm" and not (pays or (ragged and widest <= NARROW and first.batch <= FEW)):
        return f"{RULE}: torch's own LSTM is as fast"
    if widest > MOST_UNITS:
        return f"{RULE}: torch's own {name} is as fast with more than {MOST_UNITS} units"
    if not ragged and widest * first.batch > MOST_CELLS:
        return f"{RULE}: torch's own {name} is as fast with more than {MOST_CELLS:,} units in all sequences"
    if first.heads > 1 and min(p.columns for p in kind.problems) < LEAST_HEAD:
        return f"{RULE}: torch's own {name} is faster with heads of less than {LEAST_HEAD} units"
    return None


def faster(kind: Kind) -> str:
    """Why the compiled loops run what they do, in words."""
    if kind.one_step:
        return f"{RULE}: a step is one call of a compiled function"
    if kind.feature is not None:
        return f"torch's own does not support {kind.feature}"
    if kind.problems[0].cell == "lstm":
        return f"{RULE}: torch's own LSTM takes more operations for lengths and resets"
    return f"{RULE}: torch runs a step as many small operations, the compiled loop as one"
