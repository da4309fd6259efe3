"""Plans and the order in which they are tried, of all families. Pure Python, so that it is tested without a GPU."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch

from ...by_steps import launches_of, within
from ...cards import Card
from ...cells import CELLS
from ...memory import Buffer, buffers_of
from ...problem import Pass, Problem

# Data sheets.
DEVICES = {
    "h100": Card(90, 132, "NVIDIA H100 SXM", 1.755e9, 3.35e12),
    "a100": Card(80, 108, "NVIDIA A100 SXM 80 GB", 1.41e9, 2.04e12),
    "l4": Card(89, 58, "NVIDIA L4", 2.04e9, 0.3e12),
    "rtx4090": Card(89, 128, "NVIDIA GeForce RTX 4090", 2.52e9, 1.008e12),
    "rtx5090": Card(120, 170, "NVIDIA GeForce RTX 5090", 2.407e9, 1.792e12),
    "b200": Card(100, 148, "NVIDIA B200", 1.85e9, 8.0e12),
}
INTERPRETER = Card(0, 1, "Triton's interpreter")
"""It runs programs one after another, so that one cannot wait for another."""


@dataclass(frozen=True)
class Resident:
    """One launch; a program runs the whole sequence alone, with W_hh in its registers."""

    name: ClassVar = "resident"
    chunks: int  # of K, which a warp multiplies


@dataclass(frozen=True)
class Cooperative:
    """One launch; programs hold W_hh in their registers, and exchange h."""

    name: ClassVar = "cooperative"
    chunks: int  # of K, which a warp multiplies
    partners: int = 1  # backward: programs that share the gates of their units
    ahead: bool = False  # whether words of the next batch tile are requested before the cells of this one


@dataclass(frozen=True)
class Pointwise:
    """A product by cuBLAS and a launch for each step."""

    name: ClassVar = "pointwise"


@dataclass(frozen=True)
class Step:
    """One launch; programs read W_hh at every step, which a grid-wide barrier ends."""

    name: ClassVar = "step"
    k: int  # how much of K is multiplied at a time
    parts: int = 1  # of K, backward, each for programs of its own
    ahead: ClassVar = False


@dataclass(frozen=True)
class Held:
    """One launch; programs hold W_hh of their units in shared memory, and a tile waits for those of its sequences."""

    name: ClassVar = "held"
    k: int  # all of K, multiplied at once; padded to a power of two
    parts: ClassVar = 1
    ahead: bool = False  # whether the next batch tile's operand is loaded before the cells of this one


@dataclass(frozen=True)
class Plan:
    """A family, with sizes that only its kernels have, and its tiles, warps and grid."""

    backend: ClassVar = "triton"
    family: Resident | Cooperative | Pointwise | Step | Held
    rows: int  # sequences of a batch tile
    units: int  # hidden units whose cells a program computes
    programs: int  # of a group; together they have all units
    groups: int  # each with batch tiles of its own; one group has all of them in Step
    num_warps: int
    shared: int  # estimated bytes of a program
    why: str
    num_stages: int = 1  # of a product's loads
    blocks: int = 1  # programs of a multiprocessor, which must have room for them
    tiles_per_program: int = 1  # which it processes one after another at every step
    side_by_side: int = 1  # launches of this plan, or of one of its heads, that fit the card at once
    heads: int = 1  # all else is a plan of one head, Problem.of_head

    @property
    def grid(self) -> tuple[int, int, int]:
        """(Programs of a group, groups, heads), or (programs, 1, heads) where programs belong to no group."""
        in_groups = isinstance(self.family, Cooperative | Held)
        return *((self.programs, self.groups) if in_groups else (self.programs * self.groups, 1)), self.heads

    @property
    def slower(self) -> str | None:
        """See contract.OnlyPlan: where W_hh is read at every step, or a group of programs has several batch tiles."""
        fast = isinstance(self.family, Resident | Cooperative | Held) and self.tiles_per_program == 1
        return None if fast else f"a kernel of the {self.family.name} family is slower"

    @property
    def tiles(self) -> str:
        """How its programs share a layer, in words."""
        of_head = f"{self.rows} sequences x {self.units} units, {self.programs} programs x {self.groups} groups"
        return of_head if self.heads == 1 else f"{of_head} x {self.heads} heads"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | asdict(self.family) | {"family": type(self.family).__name__.lower()}

    @property
    def identity(self) -> dict[str, Any]:
        """See contract.OnlyPlan: all fields, except for how many groups and tiles there are, beyond one."""
        others = "groups", "tiles_per_program", "side_by_side", "shared", "why"
        several = {"several groups": self.groups > 1, "several tiles": self.tiles_per_program > 1}
        return {name: value for name, value in self.as_json().items() if name not in others} | several

    def fitted(self, problem: Problem) -> "Plan":
        """The same plan for fewer sequences: all programs, or groups of them, have a batch tile."""
        problem = problem.of_head
        tiles = ceil(problem.batch / self.rows)
        if isinstance(self.family, Step):
            tiles *= ceil(problem.hidden / self.units)
            programs = max(1, min(self.programs, tiles))
            return replace(self, programs=programs, tiles_per_program=ceil(tiles / programs))
        groups = min(self.groups, tiles)
        return replace(self, groups=groups, tiles_per_program=ceil(tiles / groups))

    def sequences_enough(self, problem: Problem) -> int:
        """See contract.OnlyPlan: two batch tiles and part of a third; more where a program, or a group, has several."""
        tiles = 2
        if self.tiles_per_program > 1:
            of_one = ceil(problem.of_head.hidden / self.units) if isinstance(self.family, Step) else self.programs
            tiles = max(tiles, self.programs * self.groups // of_one)
        return min(problem.batch, (tiles + 1) * self.rows - self.rows // 2)


class Family(NamedTuple):
    """What the launcher must know of a family; pairs are forward and backward. `memory` is what a launch allocated."""

    kernels: tuple[Any, Any]
    sizes: Callable[[Problem, Plan, bool], dict[str, int]] = lambda p, plan, backward: {}  # more of parameters.Sizes
    waits: Callable[[Problem, Plan], bool] = lambda p, plan: False  # whether its programs wait for each other
    buffers: Callable[[Problem, Plan, Pass], dict[str, Buffer]] = lambda p, plan, pass_: buffers_of(p, pass_)  # written
    arguments: tuple[Any, Any] = None, None  # arguments(p, plan, r, memory): what is read besides the call's tensors
    loops: tuple[Any, Any] = None, None  # loop(binds, arguments, p): all steps, where each is a launch, see by_steps.py
    results: tuple[Any, Any] = None, None  # results(p, memory): h and dgates, where these are not their buffers
    within: Callable[[Problem], Problem] = lambda p: p._replace(projected=0)  # what the loop runs of a problem


def card_with(properties: "torch.cuda._CudaDeviceProperties") -> Card:
    """A real card. Rates that torch does not know, or the card reports as 0, are those of the most similar card."""
    architecture, count = properties.major * 10 + properties.minor, properties.multi_processor_count
    alike = min(DEVICES.values(), key=lambda c: (abs(c.architecture - architecture), abs(c.multiprocessors - count)))
    names = "clock_rate", "memory_clock_rate", "memory_bus_width"  # kHz, with two transfers a clock; bits
    clock, memory_clock, bits = (getattr(properties, name, 0) for name in names)
    rates = 1e3 * clock or alike.clock, 2e3 * memory_clock * bits / 8 or alike.memory
    return Card(architecture, count, properties.name, *rates)


# Clocks of a step, or of a turn of a batch tile, that no size changes: latencies, gates and cell, forward and backward.
# They only order plans; a first call times the first ones, see choose.py.
FIXED = {Resident: (900, 2000), Cooperative: (1700, 2700), Step: (900, 1500), Held: (2600, 4000)}
SEVERAL_TILES = 1080, 1700  # the same in the cooperative family, where one tile waits while another is computed
PARTIAL_SUMS = {Cooperative: 1060, Step: 4000}  # an exchange of the sums of partners, or of parts of K
GRID_BARRIER, OF_A_CELL, OF_A_CHUNK = 1500, 40, 2  # a barrier of all programs; what a thread and a warp compute
HOST_SECONDS = 5e-6  # of a product by cuBLAS, or of a launch


def rank(problem: Problem, card: Card, plan: Plan, backward: bool) -> float:
    """The order in which the plans of a problem are tried: roughly the clocks of a step."""
    p, family, gates = problem.of_head, plan.family, CELLS[problem.cell].rows
    rate = 128 if p.exact_float32 else 4 * 4096 / p.size / product_clocks(card)  # multiply-adds of a multiprocessor
    if isinstance(family, Pointwise):
        p = within(p)
        products = 2 * gates * p.hidden * p.width / rate / card.multiprocessors
        moved = 18 * p.hidden * p.size / card.memory * card.clock
        host = launches_of(p, backward) * HOST_SECONDS * card.clock
        return max(host, p.batch * p.side_by_side * (products + moved))
    sums = getattr(family, "partners", 1) * getattr(family, "parts", 1)
    k, columns = (gates * p.hidden // sums, plan.units * sums) if backward else (p.hidden, 4 * plan.units)
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
    # In the cooperative family a warp multiplies the words that are there, while it waits for others.
    turn += max(l2, OF_A_CHUNK * family.chunks * plan.num_warps) if isinstance(family, Cooperative) else l2
    return turns * turn + GRID_BARRIER * isinstance(family, Step)


def product_clocks(card: Card) -> float:
    """From one product on a tensor core to the next: mma.sync of 16 x 8 x 16 half precision, or 16 x 8 x 8 TF32.

    By the data sheets' rates, but as measured on an H100; with sums in float32 that of GeForce cards is a quarter.
    """
    return {80: 8, 90: 6.26, 100: 8, 103: 8}.get(card.architecture, 32)
