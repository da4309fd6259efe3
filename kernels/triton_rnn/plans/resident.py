"""The plans of the resident family, and what the launcher must know of it."""

from collections.abc import Iterator
from math import ceil

from ...cards import Card
from ...cells import CELLS
from ...operands import as_words, transposed_gates
from ...problem import Problem, power_of_two
from ..threads.fragments import SEQUENCES
from ..threads.resident import resident_backward_kernel, resident_forward_kernel
from .planning import Family, Plan, Resident

MOST_REGISTERS = 160  # of a thread's 255 that may hold weights


def plans(problem: Problem, card: Card, backward: bool) -> Iterator[Plan]:
    """Where the registers of one block hold W_hh as operands of tensor cores."""
    if problem.batch == 0 or problem.exact_float32:
        return
    units = max(128 // problem.size, power_of_two(problem.hidden))  # two chunks of K or more, as `share` requires
    warps = units // 16 if backward else min(8, units // 8)
    gates = CELLS[problem.cell].rows
    registers = gates * units * units * problem.size // (4 * 32 * warps)  # of a thread
    if warps <= 8 and registers <= MOST_REGISTERS:
        rows = SEQUENCES.value
        shared = 2 * rows * units * problem.size * (gates if backward else 1)
        yield Plan(
            Resident(units * problem.size // 64), rows, units, 1, ceil(problem.batch / rows), warps, shared,
            f"one block holds W_hh in registers, {registers} a thread, so that no exchange is needed",
        )  # fmt: skip


FAMILY = Family(
    (resident_forward_kernel, resident_backward_kernel),
    lambda p, plan, backward: {"CHUNKS": plan.family.chunks},
    arguments=(
        lambda p, plan, r, memory: {"weights_ptr": as_words(r.inputs.weight_hh, p.hidden // p.heads)},
        lambda p, plan, r, memory: {
            "weights_ptr": transposed_gates(r.inputs.weight_hh, *2 * [CELLS[p.cell].rows], p.hidden // p.heads)
        },
    ),
)
