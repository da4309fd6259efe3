"""What a step could take at best: python docs/bounds.py writes docs/bounds.md, python docs/bounds.py h100 every size.

The second prints the sizes of one card, as planning.DEVICES names it, instead of writing the page.
"""

import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from gpu_lstm.kernels.cards import L2_ALONE, L2_BYTES, Card
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn.plans import planning
from gpu_lstm.kernels.triton_rnn.plans.choose import plans

PAGE = Path(__file__).with_suffix(".md")
HIDDEN, BATCH = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64, 256, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "TF32": torch.float32}
DIRECTIONS = ("forward", "backward")
CYCLES_A_US = 1755  # of an H100
FAR = 2  # times the bound: from there on the tables of a card say why
HEAD = f"""<!-- make bounds-page writes this page: change docs/bounds.py. -->

# How far a step is from its bound

Nothing here was measured: the model that orders plans (`kernels/triton_rnn/plans/planning.py`) estimates all figures,
for training a plain layer by the first plan of the list. *x* is the estimated time of a step, divided by the greatest
of three bounds:

- **memory**: what a step reads and writes, at the data sheet's rate;
- **products**: those with W_hh on the tensor cores of all multiprocessors, at the data sheet's rate;
- **latency**: of the gates and the cell (resident), one exchange between programs (cooperative), one grid-wide barrier
  (step), or two launches (pointwise).

Where all multiprocessors read from L2, each reads {L2_BYTES} bytes a clock, and at most {L2_ALONE}. The estimate has
the {2e6 * planning.HOST_SECONDS:.0f} us that the host needs for two launches without a CUDA graph. In a clone
`python docs/bounds.py h100` prints every size on one card, and `python -m gpu_lstm plan` all terms of one problem.

For each card and dtype: the median of *x* at {len(HIDDEN) * len(BATCH)} sizes, H from {HIDDEN[0]} to {HIDDEN[-1]} and B
from {BATCH[0]} to {BATCH[-1]}, both directions; how many are over {FAR}; the greatest, and where that is. In the step
family the largest term is then reading weights and states from L2."""


PUBLISHED = {  # by units of a head: milliseconds, what was predicted of that at first and with the constants of now
    "Triton, forward": "16 1.97 1.07 1.01; 32 1.44 0.89 0.87; 64 1.99 0.99 0.93; 128 3.23 0.95 0.93",
    "Triton, backward": "16 1.50 1.15 1.16; 32 2.66 1.00 1.00; 64 16.95 0.48 0.48",
    "CUDA, forward": "16 3.56 0.88 1.07; 32 2.90 0.72 0.96; 64 3.10 0.69 0.93; 128 3.22 0.75 1.01; "
    "256 3.62 0.68 0.96; 768 4.87 0.61 0.98",
}
OTHERS = """## What was predicted of others' kernels

The model is fitted to the cycles in `tests/cycles.csv`, counted by an estimator that issues a kernel's machine code in
order, with published latencies. It was held against FlashRNN's LSTM on an H100, 768 units in heads, B=16, T=1024,
bfloat16, at 1.755 GHz (head_dim--lstm.svg in its repository; backward is forward+backward less forward). By units of a
head: published milliseconds and, in brackets, what was predicted as a multiple of them, at first, with the project's
own constants, and now, with DRAM (570 cycles), mma.sync (25, one each 6.26) and FlashRNN's grid-wide barrier (2,157;
the one here 1,500) as others measured them, loads counted by lines of L1, and 0.2 ms of copies for a call in CUDA."""
PROVEN = """\
- **Shown:** inside one multiprocessor the estimator is right to about 15 %: Triton's kernels, a program for each head,
  to which nothing was fitted. The backward of heads of 64 spills registers, which is not in the estimate.
- **Shown less well:** across programs. The CUDA kernel ends each step with a barrier of 96 programs, now as measured;
  lines of L1 are counted as they fit these rows.
- **Not shown:** the exchange without a barrier in the cooperative family. 300 to 500 cycles from a store to a load that
  finds it follow from 564 ns, published, from a release to an acquire of two programs; the last of 48 may take longer.
  Nor the clock under load.

So a step of H=768, B=16 in bfloat16 is expected to take {forward} us forward (0.86 to 1.29: the exchange at 300 to 500
cycles, and 15 % of the rest) and {backward} us backward (1.41 to 2.04) by the estimator, {model} us by the model. In
the same figure torch's nn.LSTM, by cuDNN in fp16, takes 1.96 and 3.1 us a step; that includes the product of x and
W_ih, these do not."""
TRIED = """## What was tried for a step's latency

Cycles are estimates from SASS for an H100 in bfloat16, H = 768, B = 16, if a load sees a store 400 cycles later.

### Tanh by an instruction

`tanh.approx.f32` may be off by 2^-11. A GRU's n in bfloat16 uses it: 46 of 1,758 cycles less forward. Simulated over
1,024 steps, with each tanh off by that to one side, the greatest RMS error is 0.7 of the limit of [the
tests](testing.md); of a GRU in float16 2.0, of an LSTM in bfloat16 6.8, since c adds up the errors where a forget gate
stays near 1. So these do not use it, though an LSTM would save 128 of 1,893 cycles.

### Partners in a cluster

Backward four programs read a quarter of dgates each, and hand each other their sums through L2: 2,969 cycles a step. As
blocks of a cluster, by `st.async` to each other's shared memory, it would be 2,162 to 2,412 in CUDA C++: compiled and
counted, not run.
"""


class Row(NamedTuple):
    """Of one size and direction on one card."""

    size: str
    family: str
    seconds: float
    bound: float  # seconds
    bound_by: str
    largest: str  # term of the estimate

    @property
    def ratio(self) -> float:
        """The estimate as a multiple of the bound."""
        return self.seconds / self.bound


def rows(card: Card, dtype: torch.dtype, direction: str) -> list[Row]:
    """Of every size."""
    found, backward = [], direction == "backward"
    for hidden, batch in product(HIDDEN, BATCH):
        problem = Problem(2, batch, hidden, dtype, precision="tf32")
        plan = plans(problem, card, backward)[0]
        expected = planning.expected(problem, card, plan, backward)
        bound_by, bound = max(bounds(problem, card, plan, backward).items(), key=lambda item: item[1])
        largest = max(expected, key=expected.__getitem__)
        found.append(Row(f"{hidden} | {batch}", plan.family.name, sum(expected.values()), bound, bound_by, largest))
    return found


def bounds(problem: Problem, card: Card, plan: planning.Plan, backward: bool) -> dict[str, float]:
    """Seconds that no step can be below, each for a reason of its own."""
    of_mma = 4 * 4096 / problem.size / planning.product_clocks(card)  # multiply-adds a clock of a multiprocessor
    of_a_multiprocessor = of_mma * planning.FASTER.get(card.architecture, 1)
    clocks = {
        planning.Resident: planning.RESIDENT_CELL[backward],
        planning.Cooperative: planning.EXCHANGE,
        planning.Step: planning.GRID_BARRIER,
        planning.Held: planning.GRID_BARRIER,
        planning.Pointwise: 2 * planning.LAUNCH_SECONDS * card.clock,
    }
    products = 4 * problem.batch * problem.hidden**2 / of_a_multiprocessor / card.multiprocessors
    return {
        "memory": planning.memory_seconds(problem, card, plan, backward),
        "products": products / card.clock,
        "latency": clocks[type(plan.family)] / card.clock,
    }


def table(titles: str, lines: Iterable[Iterable[str]]) -> str:
    """In Markdown; numbers are aligned to the right."""
    columns = titles.split(" | ")
    numbers = "H", "B", "us", "bound", f"over {FAR}"
    right = ["--:" if t in numbers or t.endswith("x") or t.isdigit() else "---" for t in columns]
    head = [f"| {titles} |", f"|{'|'.join(right)}|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in lines)])


def in_full(card: Card) -> str:
    """A table for each dtype and direction, with a line for each size."""
    parts = []
    for dtype, direction in product(DTYPES, DIRECTIONS):
        lines = []
        for row in rows(card, DTYPES[dtype], direction):
            figures = f"{1e6 * row.seconds:.2f}", f"{1e6 * row.bound:.2f}", row.bound_by, f"{row.ratio:.1f}"
            lines.append([row.size, row.family, *figures, row.largest if row.ratio > FAR else ""])
        parts += [
            f"## {card.name}: {dtype}, {direction}",
            table("H | B | family | us | bound | bound by | x | largest term", lines),
        ]
    return "\n\n".join(parts)


def summary() -> str:
    """A line for each card and dtype: the middle and the greatest ratio, and where that is."""
    lines = []
    for card, dtype in product(planning.DEVICES, DTYPES):
        found = [row for direction in DIRECTIONS for row in rows(planning.DEVICES[card], DTYPES[dtype], direction)]
        far, worst = sum(row.ratio > FAR for row in found), max(found, key=lambda row: row.ratio)
        ratios = f"{median(row.ratio for row in found):.1f}", str(far), f"{worst.ratio:.1f}"
        lines.append([f"`{card}`", dtype, *ratios, "H={}, B={}, {}".format(*worst.size.split(" | "), worst.family)])
    return table(f"card | dtype | median x | over {FAR} | greatest x | where", lines)


def others() -> str:
    """What was predicted of kernels whose times are published, and what that is worth."""
    figures = {
        kernel: dict(("{} {} ({}, {})".format(*row.split()).split(" ", 1)) for row in heads.split("; "))
        for kernel, heads in PUBLISHED.items()
    }
    heads = list(figures["CUDA, forward"])
    lines = [[kernel, *(its.get(head, "") for head in heads)] for kernel, its in figures.items()]
    card, headline = planning.DEVICES["h100"], Problem(2, 16, 768, torch.bfloat16)
    first = [(plans(headline, card, backward)[0], backward) for backward in (False, True)]
    steps = [sum(planning.expected(headline, card, *each).values()) for each in first]
    model = " and ".join(f"{1e6 * seconds:.2f}" for seconds in steps)
    ratios = table(" | ".join(["kernel", *heads]), lines)
    counts = PAGE.parents[1].joinpath("tests", "cycles.csv").read_text().splitlines()
    counted = [int(row.rpartition(",")[2]) for row in counts if row.startswith("cooperative,lstm,768,16,")]
    forward, backward = (f"{cycles / CYCLES_A_US:.2f}" for cycles in counted)
    return f"{OTHERS}\n\n{ratios}\n\n{PROVEN.format(forward=forward, backward=backward, model=model)}"


def page() -> str:
    """The Markdown, for all cards."""
    return f"{HEAD}\n\n{summary()}\n\n{others()}\n\n{TRIED}\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(in_full(planning.DEVICES[sys.argv[1]]))
    else:
        PAGE.write_text(page())
