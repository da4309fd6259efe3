"""What a step could take at best, as a page: python docs/bounds.py writes docs/bounds.md from the planning model."""

from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_lstm import planning
from gpu_lstm.kernels.triton_lstm.choose import plans

PAGE = Path(__file__).with_suffix(".md")
HIDDEN, BATCH = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64, 256, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "TF32": torch.float32}
FAR = 2  # times the bound, from which on the page says why
HEAD = """<!-- make bounds-page writes this page: change docs/bounds.py. -->

# How far each step is from its bound

All of this is estimated by the model that orders plans (`kernels/triton_lstm/planning.py`), and nothing was measured.
A plain layer, all of whose steps have B sequences: the first plan of Triton's kernels, the time of a step, and the
greatest of three bounds:

- **memory**: what a step has to read and write, at the data sheet's rate;
- **products**: those with W_hh, on the tensor cores of all multiprocessors, at the rate of `mma.sync`;
- **latency**: of one exchange between programs; of the gates and the cell where one program runs a sequence alone.

*x* is the estimate as a multiple of the bound. Where it is over {far}, the largest term of the estimate follows.
`python -m gpu_lstm plan` prints all terms of one size."""


class Row(NamedTuple):
    """Of one size and direction on one card."""

    hidden: int
    batch: int
    family: str
    seconds: float
    bound: float  # seconds
    bounded_by: str
    largest: str  # term of the estimate

    @property
    def ratio(self) -> float:
        """The estimate as a multiple of the bound."""
        return self.seconds / self.bound


def row(card: planning.Device, hidden: int, batch: int, dtype: torch.dtype, backward: bool) -> Row:
    """What the first plan is expected to take, and its bound."""
    problem = Problem(2, batch, hidden, dtype, precision="tf32")
    plan = plans(problem, card, backward)[0]
    expected = planning.expected(problem, card, plan, backward)
    bounds = planning.bounds(problem, card, plan, backward)
    bounded_by = max(bounds, key=bounds.__getitem__)
    largest = max(expected.terms, key=expected.terms.__getitem__)
    return Row(hidden, batch, plan.family.value, expected.seconds, bounds[bounded_by], bounded_by, largest)


def rows(card: planning.Device, dtype: torch.dtype, backward: bool) -> list[Row]:
    """Of every size."""
    return [row(card, hidden, batch, dtype, backward) for hidden, batch in product(HIDDEN, BATCH)]


def in_full(card: planning.Device, dtype: str) -> str:
    """A table of every size, forward and backward side by side."""
    lines = ["| H | B | forward | us | bound | x | backward | us | bound | x |", "|--:|--:|---|--:|---|--:|---|--:|---|--:|"]
    directions = (rows(card, DTYPES[dtype], backward) for backward in (False, True))
    for forward, backward in zip(*directions):
        cells = [f"{forward.hidden:,}", f"{forward.batch:,}"]
        for each in (forward, backward):
            why = f", {each.largest}" if each.ratio > FAR else ""
            cells += [each.family + why, f"{1e6 * each.seconds:.2f}", f"{1e6 * each.bound:.2f} {each.bounded_by}", f"{each.ratio:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary() -> str:
    """A line for each card, dtype and direction: the middle and the worst ratio, and what is in the way there."""
    lines = ["| card | dtype | direction | x, median | x, worst | at | family | bound | largest term |", "|---|---|---|--:|--:|---|---|---|---|"]
    for card, (dtype, torch_dtype), backward in product(planning.DEVICES.values(), DTYPES.items(), (False, True)):
        found = rows(card, torch_dtype, backward)
        worst = max(found, key=lambda each: each.ratio)
        cells = [card.name, dtype, "backward" if backward else "forward", f"{median(each.ratio for each in found):.1f}",
                 f"{worst.ratio:.1f}", f"H={worst.hidden:,} B={worst.batch:,}", worst.family, worst.bounded_by, worst.largest]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The Markdown."""
    h100 = planning.DEVICES["h100"]
    parts = [HEAD.format(far=FAR), "## All cards", summary()]
    for dtype in DTYPES:
        parts += [f"## {h100.name}, {dtype}", in_full(h100, dtype)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
