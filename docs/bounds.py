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
from gpu_lstm.kernels.triton_rnn import planning
from gpu_lstm.kernels.triton_rnn.choose import plans

PAGE = Path(__file__).with_suffix(".md")
HIDDEN, BATCH = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64, 256, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "TF32": torch.float32}
DIRECTIONS = ("forward", "backward")
FAR = 2  # times the bound: from there on the page says why
HEAD = f"""<!-- make bounds-page writes this page: change docs/bounds.py. -->

# How far a step is from its bound

Nothing here was measured: the model that orders plans (`kernels/triton_rnn/planning.py`) estimates all figures. They
are for training a plain layer by the first plan of the list. *x* is the estimated time of a step, divided by the
greatest of three bounds:

- **memory**: what a step reads and writes, at the data sheet's rate;
- **products**: those with W_hh on the tensor cores of all multiprocessors, at the data sheet's rate;
- **latency**: of the gates and the cell (resident), one exchange between programs (cooperative), one grid-wide barrier
  (step), or two launches (pointwise).

Where all multiprocessors read from L2, each reads {L2_BYTES} bytes a clock, and at most {L2_ALONE}.
The estimate has the {1e6 * planning.HOST_SECONDS:.0f} us that the host needs for two launches without a CUDA graph.

In a clone `python docs/bounds.py h100` prints every size on one card, and `python -m gpu_lstm plan` all terms of one
problem.

## All cards

{len(HIDDEN) * len(BATCH)} sizes, with H from {HIDDEN[0]} to {HIDDEN[-1]} and B from {BATCH[0]} to {BATCH[-1]}:
the median of *x*, how many are over {FAR}, and where *x* is greatest, with the largest term of the estimate there."""


TRIED = """## What was tried for a step's latency

Cycles are estimates from SASS for an H100 in bfloat16, B = 16, if a load sees a store 400 cycles later.

### Tanh by an instruction

`tanh.approx.f32` may be off by 2^-11. A GRU's n in bfloat16 uses it, which saves 46 of 1,758 cycles forward at H = 768,
48 of 1,207 at 128. The others do not: the kernels' roundings were simulated over 1,024 steps, each tanh off by
2^-11, always to one side or in turns. The greatest RMS errors, as multiples of the limit of [the tests](testing.md):

| | to one side | in turns |
|---|--:|--:|
| GRU, bfloat16: n | 0.7 | 0.8 |
| GRU, float16: n | 2.0 | 1.1 |
| LSTM, bfloat16: tanh(c) | 6.8 | 1.1 |
| LSTM, bfloat16: g | 6.5 | 1.2 |
| LSTM, bfloat16: both | 6.6 | 1.7 |

It would save an LSTM 128 of 1,893 cycles at H = 768. But where a forget gate stays near 1, c adds up the errors of all
steps. A sigmoid by this instruction is off by up to 2^-12 near 1, after 1,024 steps by 22 % of c.

### Partners in a cluster

Backward at H = 768 every program reads 48 KB of dgates a step. Four partners read a quarter each, but hand each other
their sums through L2. As blocks of a cluster they could write them to each other's shared memory. Kernels compiled for
sm_90 and counted, not run, if it takes 150 to 400 cycles from the last store to the first load:

| | cycles |
|---|--:|
| Triton | 2,969 |
| CUDA C++ | 2,820 |
| in a cluster, `barrier.cluster`, a fence of the whole GPU | 2,456 to 2,706 |
| in a cluster, `st.async` to an mbarrier | 2,162 to 2,412 |

It is not in: the launch must be cooperative, too, and CuPy's `cuLaunchCooperativeKernel` is not documented to launch
clusters. The one report [is a failure](https://github.com/cupy/cupy/issues/8778), and CuPy [will not launch
clusters itself](https://github.com/cupy/cupy/issues/8780). `cuLaunchKernelEx` does both, but needs a launcher of our
own, which nobody can try without a card."""


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
    right = ["--:" if t in ("H", "B", "us", "bound", f"over {FAR}") or t.endswith("x") else "---" for t in columns]
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
    """A line for each card, dtype and direction: the middle and the greatest ratio, and why."""
    lines = []
    for card, dtype, direction in product(planning.DEVICES, DTYPES, DIRECTIONS):
        found = rows(planning.DEVICES[card], DTYPES[dtype], direction)
        far, worst = [row for row in found if row.ratio > FAR], max(found, key=lambda row: row.ratio)
        ratios = f"{median(row.ratio for row in found):.1f}", str(len(far)), f"{worst.ratio:.1f}"
        lines.append([f"`{card}`", f"{dtype}, {direction}", *ratios, worst.size, worst.family, worst.largest])
    return table(f"card | case | median x | over {FAR} | greatest x | H | B | family | largest term", lines)


def page() -> str:
    """The Markdown, for all cards."""
    return f"{HEAD}\n\n{summary()}\n\n{TRIED}\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(in_full(planning.DEVICES[sys.argv[1]]))
    else:
        PAGE.write_text(page())
