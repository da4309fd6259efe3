"""The plans of all families, and the order in which they are tried.

This file is pure Python, so that tests need no GPU.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch

from ...by_steps import launches_of, within
from ...cards import Card
from ...memory import Buffers, buffers_of
from ...problem import Pass, Problem

# Clocks and memory rates are from the data sheets.
DEVICES = {
    "h100": Card(90, 132, "NVIDIA H100 SXM", 1.755e9, 3.35e12),
    "a100": Card(80, 108, "NVIDIA A100 SXM 80 GB", 1.41e9, 2.04e12),
    "l4": Card(89, 58, "NVIDIA L4", 2.04e9, 0.3e12),
    "rtx4090": Card(89, 128, "NVIDIA GeForce RTX 4090", 2.52e9, 1.008e12),
    "rtx5090": Card(120, 170, "NVIDIA GeForce RTX 5090", 2.407e9, 1.792e12),
    "b200": Card(100, 148, "NVIDIA B200", 1.85e9, 8.0e12),
}
INTERPRETER = Card(0, 1, "Triton's interpreter")
"""Triton's interpreter, as a card. It runs programs one after another, so a program cannot wait for another one."""


@dataclass(frozen=True)
class Resident:
    """All steps are one launch. Each program holds W_hh in its registers and runs its sequences alone."""

    name: ClassVar = "resident"
    chunks: int  # the chunks of K that a warp multiplies


@dataclass(frozen=True)
class Cooperative:
    """All steps are one launch. The programs of a group hold W_hh in their registers together, and exchange h."""

    name: ClassVar = "cooperative"
    chunks: int  # the chunks of K that a warp multiplies
    partners: int = 1  # in backward, the programs that share the gates of their units
    ahead: bool = False  # whether the words of the next batch tile are requested before the cells of this one


@dataclass(frozen=True)
class Pointwise:
    """Each step is a product by cuBLAS and a launch."""

    name: ClassVar = "pointwise"


@dataclass(frozen=True)
class Step:
    """All steps are one launch. Programs read W_hh at every step, and a grid-wide barrier ends the step."""

    name: ClassVar = "step"
    k: int  # the elements of K that are multiplied at a time
    parts: int = 1  # in backward, the parts of K; each part has programs of its own
    ahead: ClassVar = False


@dataclass(frozen=True)
class Held:
    """All steps are one launch. Programs hold W_hh of their units in shared memory.

    A batch tile waits only for the programs that have the same sequences.
    """

    name: ClassVar = "held"
    k: int  # all of K, padded to a power of two and multiplied at once
    parts: ClassVar = 1
    ahead: bool = False  # whether the next batch tile's operand is loaded before the cells of this one


@dataclass(frozen=True)
class Plan:
    """A family, and the tiles, warps and grid of its kernels for one problem."""

    backend: ClassVar = "triton"
    family: Resident | Cooperative | Pointwise | Step | Held
    rows: int  # the sequences of a batch tile
    units: int  # the hidden units whose cells a program computes; in the step family, for each of its tiles
    programs: int  # the programs of a group, which together have all units
    groups: int  # each group has batch tiles of its own; in the step family one group has all of them
    num_warps: int
    shared: int  # the estimated bytes of shared memory of a program
    why: str
    num_stages: int = 1  # the stages in which a product loads its operands
    blocks: int = 1  # the programs of a multiprocessor, which must have room for them
    tiles_per_program: int = 1  # the tiles that a program processes one after another at every step
    side_by_side: int = 1  # how many launches of this plan, or of one of its heads, fit the card at once
    heads: int = 1  # all other fields describe one head, see Problem.of_head

    @property
    def grid(self) -> tuple[int, int, int]:
        """(programs of a group, groups, heads), or (all programs, 1, heads) where programs belong to no group."""
        in_groups = isinstance(self.family, Cooperative | Held)
        return *((self.programs, self.groups) if in_groups else (self.programs * self.groups, 1)), self.heads

    @property
    def slower(self) -> str | None:
        """See contract.OnlyPlan.

        A kernel is expected to be slower if it reads W_hh at every step, or if a program has several tiles.
        """
        if isinstance(self.family, Pointwise | Step) or self.tiles_per_program > 1:
            return f"a kernel of the {self.family.name} family is slower"
        return None

    @property
    def tiles(self) -> str:
        """How the programs share a layer, in words."""
        shared = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((self.programs, "program"), (self.groups, "group"))]
        of_head = f"{self.rows} sequences x {self.units} units, {' x '.join(shared)}"
        return of_head if self.heads == 1 else f"{of_head} x {self.heads} heads"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | asdict(self.family) | {"family": self.family.name}

    @property
    def identity(self) -> dict[str, Any]:
        """See contract.OnlyPlan. It only says whether there are several groups and several tiles, and not how many."""
        others = "groups", "tiles_per_program", "side_by_side", "shared", "why"
        several = {"several groups": self.groups > 1, "several tiles": self.tiles_per_program > 1}
        return {name: value for name, value in self.as_json().items() if name not in others} | several

    def fitted(self, problem: Problem) -> "Plan":
        """Return the same plan for fewer sequences, without programs or groups that would have no tile."""
        problem = problem.of_head
        tiles = ceil(problem.batch / self.rows)
        if isinstance(self.family, Step):
            tiles *= ceil(problem.hidden / self.units)
            programs = max(1, min(self.programs, tiles))
            return replace(self, programs=programs, tiles_per_program=ceil(tiles / programs))
        groups = min(self.groups, tiles)
        return replace(self, groups=groups, tiles_per_program=ceil(tiles / groups))

    def sequences_enough(self, problem: Problem) -> int:
        """See contract.OnlyPlan. The sequences fill two batch tiles and a part of a third.

        Where a program has several tiles, there are so many sequences that one program at least has two.
        """
        tiles = 2
        if self.tiles_per_program > 1:
            of_one = ceil(problem.of_head.hidden / self.units) if isinstance(self.family, Step) else self.programs
            tiles = max(tiles, self.programs * self.groups // of_one)
        return min(problem.batch, (tiles + 1) * self.rows - self.rows // 2)


class Family(NamedTuple):
    """The facts about a family that the launcher needs.

    ```
    kernels                             the kernels
    sizes(p, plan, backward)            further fields of parameters.Sizes
    waits(p, plan)                      whether programs wait for each other
    buffers(p, plan, pass_)             the tensors that the kernels write
    arguments(p, plan, r, memory)       tensors that the kernels read besides the tensors of the call
    loop(binds, arguments, p, backward) runs all steps, if each step is a launch, see by_steps.py
    results(p, memory)                  h or dgates, where they are not the buffers of these names
    within(p)                           the problem that the time loop runs
    ```

    `kernels`, `arguments` and `results` are pairs for (forward, backward).
    `memory` has the allocated buffers by their names.
    """

    kernels: tuple[Any, Any]
    sizes: Callable[[Problem, Plan, bool], dict[str, int]] = lambda p, plan, backward: {}
    waits: Callable[[Problem, Plan], bool] = lambda p, plan: False
    buffers: Callable[[Problem, Plan, Pass], Buffers] = lambda p, plan, pass_: buffers_of(p, pass_)
    arguments: tuple[Any, Any] = None, None
    loop: Any = None
    results: tuple[Any, Any] = None, None
    within: Callable[[Problem], Problem] = lambda p: p._replace(projected=0)


def card_with(properties: "torch.cuda._CudaDeviceProperties") -> Card:
    """Return a real card. Where torch or the card does not report a rate, the most similar card's rate is taken."""
    architecture, count = properties.major * 10 + properties.minor, properties.multi_processor_count
    alike = min(DEVICES.values(), key=lambda c: (abs(c.architecture - architecture), abs(c.multiprocessors - count)))
    names = "clock_rate", "memory_clock_rate", "memory_bus_width"  # in kHz, in kHz with two transfers a clock, in bits
    clock, memory_clock, bits = (getattr(properties, name, 0) for name in names)
    rates = 1e3 * clock or alike.clock, 2e3 * memory_clock * bits / 8 or alike.memory
    return Card(architecture, count, properties.name, *rates)


# The clocks of a step, or of a turn of a batch tile, that do not depend on sizes: latencies, gates and cell. A pair is
# for (forward, backward). These constants are estimates and only order the plans. A first call times the first plans,
# see choose.py.
FIXED = {Resident: (900, 2000), Cooperative: (1700, 2700), Step: (900, 1500), Held: (2600, 4000)}
SEVERAL_TILES = 1080, 1700  # replaces the above in the cooperative family if one tile waits while another is computed
PARTIAL_SUMS = {Cooperative: 1060, Step: 4000}  # clocks of an exchange of the sums of partners, or of parts of K
# The clocks of a barrier of all programs, of a cell in a thread, and of a chunk in a warp.
GRID_BARRIER, OF_A_CELL, OF_A_CHUNK = 1500, 40, 2
HOST_SECONDS = 5e-6  # the host's time for a product by cuBLAS, or for a launch


def rank(problem: Problem, card: Card, plan: Plan, backward: bool) -> float:
    """Return about how many clocks a step takes. The plan with the fewest is tried first."""
    p, family = problem.of_head, plan.family
    rate = 128 if p.exact_float32 else 4 * 4096 / p.size / product_clocks(card)  # multiply-adds a clock
    if isinstance(family, Pointwise):
        p = within(p)
        products = 2 * p.gates * p.hidden * p.width / rate / card.multiprocessors
        moved = 18 * p.hidden * p.size / card.memory * card.clock
        host = launches_of(p, backward) * HOST_SECONDS * card.clock
        return max(host, p.batch * p.side_by_side * (products + moved))
    sums = getattr(family, "partners", 1) * getattr(family, "parts", 1)
    k, columns = (p.gates * p.hidden // sums, plan.units * sums) if backward else (p.hidden, 4 * plan.units)
    turns, turn, read = plan.tiles_per_program, FIXED[type(family)][backward], plan.rows * k
    if isinstance(family, Resident):
        turns, read = ceil(plan.groups * plan.heads / card.multiprocessors), 0
    elif isinstance(family, Step):
        read += columns * k
    elif isinstance(family, Cooperative):
        turn = SEVERAL_TILES[backward] if turns > 1 else turn
        turns *= p.side_by_side // plan.side_by_side
    turn += PARTIAL_SUMS[type(family)] if sums > 1 else 0
    turn += plan.rows * (columns * k / rate + OF_A_CELL * plan.units / (8 * plan.num_warps))
    l2 = read * p.size / card.l2_bytes(plan.programs * plan.groups * plan.side_by_side)
    # A warp of the cooperative family multiplies the words that have arrived while it waits for the others.
    turn += max(l2, OF_A_CHUNK * family.chunks * plan.num_warps) if isinstance(family, Cooperative) else l2
    return turns * turn + GRID_BARRIER * isinstance(family, Step)


def product_clocks(card: Card) -> float:
    """Return the clocks from one product of a tensor core to the next.

    A product is an mma.sync of 16 x 8 x 16 in half precision, or of 16 x 8 x 8 in TF32. Others measured the number for
    an H100, and the other numbers follow from data sheets. GeForce cards have a quarter of the rate with sums in
    float32.
    """
    return {80: 8, 90: 6.26, 100: 8, 103: 8}.get(card.architecture, 32)
