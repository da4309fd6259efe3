"""Plans and their estimated times, for all kernel families. Pure Python, so that it is tested without a GPU."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch

from ...by_steps import launches_of, within
from ...cards import L2_BYTES, SHARED_BYTES, Card
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


# Clocks of an H100, of pairs forward and backward. Latencies are published, see cards.py; "fitted" is to the cycles in
# tests/cycles.csv, which were estimated from SASS, instruction by instruction.
BARRIER = 30  # a block's, from the arrival of its last warp
PRODUCT, LOAD = 25, 270  # until the next product of a chain can start; from L2
EXCHANGE = 800  # from a store until all readers have it; 650 to 850, from two latencies of L2 and a poll
PARTIAL_SUMS = 1060, 600  # the same for the second exchange of a step, with one batch tile and with several; fitted
TURN_AHEAD = 1080  # the shortest turn where words are requested a turn ahead; fitted
GATES_AHEAD = 640  # until gates are there, which nothing hides in some of these; fitted
GRID_BARRIER = 1500  # a barrier, a fence and an atomic of all programs, and as long until all have seen it
ISSUE = 0.6  # of each instruction's clock; the rest falls into waits of other warps; fitted
IN_EXCHANGE = 0.33  # the share of these that the exchange does not hide, backward with one batch tile; fitted
LOOP = 145  # a pass of the step family's loop over K: barriers, fragments and products; fitted
RESIDENT_CELL, COOPERATIVE_CELL = (530, 1050), (350, 530)  # gates and cell, and loads that nothing hides; fitted
STEP_CELL = (300, 500), (1000, 150)  # the same: a tile, and a thread's cell
STEP_PART = 2500, 90  # a tile of a part of K: until its first operands are there, and after the last; each warp; fitted
HELD_CELL = (1120, 0.87, 110), (1780, 0.27, 370)  # a tile, each of its cells, and a thread's cell beyond the fourth
HELD_BESIDE = 0.65  # the share of reads that shows where a multiprocessor has two blocks, one of which computes; fitted
HELD_AHEAD = 0.6  # the share of an operand's read that shows where it is asked for a tile ahead; fitted
HELD_ARRIVALS = 950  # the part of GRID_BARRIER that is not in these
# Instructions of a thread's cell that no tile size changes, and of each sigmoid or tanh; fitted.
RESIDENT_INSTRUCTIONS, COOPERATIVE_INSTRUCTIONS = ((40, 11), (82, 18)), ((130, 16), (198, 20))


def expected(problem: Problem, card: Card, plan: Plan, backward: bool) -> dict[str, float]:
    """The estimated seconds of a step of `plan`, by cause; none was measured. A model to rank plans by their sum."""
    problem = problem.of_head
    clocks = CLOCKS[type(plan.family)](problem, card, plan, backward)
    terms = {name: each / card.clock for name, each in clocks.items()}
    terms["memory, beyond the rest"] = max(0.0, memory_seconds(problem, card, plan, backward) - sum(terms.values()))
    return terms


def expected_seconds(problem: Problem, card: Card, plan: Plan, backward: bool) -> float:
    """Estimated time of a step of both directions, where they run side by side."""
    rounds = problem.of_head.side_by_side // plan.side_by_side if isinstance(plan.family, Cooperative) else 1
    return rounds * sum(expected(problem, card, plan, backward).values())


def memory_seconds(problem: Problem, card: Card, plan: Plan, backward: bool) -> float:
    """Time of a step's memory traffic: forward x W_ih^T, h, c and the gates; backward the gates, c, dh and dgates."""
    c = 8 if backward and not isinstance(plan.family, Pointwise) else 4  # bytes of a cell: of two steps, or of one
    moved = problem.batch * problem.hidden * ((13 if backward else 5 + problem.from_x) * problem.size + c)
    return moved * max(plan.side_by_side, plan.heads) / card.memory


def _l2_clocks(count: float, card: Card, plan: Plan) -> float:
    """Clocks until each program has read `count` bytes from L2."""
    return count / card.l2_bytes(plan.programs * plan.groups * plan.side_by_side)


def _resident_clocks(problem: Problem, card: Card, plan: Plan, backward: bool) -> dict[str, float]:
    count, products, shared = _on_chip(problem, card, plan, backward)
    programs = plan.groups * plan.heads
    waves = ceil(programs / card.multiprocessors)  # of programs, where not all are resident at once
    # What the cells read, and dgates. Beside other programs that takes longer than what is fitted, which is of a few.
    of_cell = 9 * problem.size + 4 * CELLS[problem.cell].kept if backward else problem.from_x * problem.size
    moved = plan.rows * problem.hidden * of_cell
    beside = moved / card.l2_bytes(min(programs, card.multiprocessors)) - moved / card.l2_bytes(1)
    return {
        "instructions or shared memory": waves * max(count, shared),
        "products": waves * products,
        "gates and cell": waves * RESIDENT_CELL[backward],
        "L2: gates, states": waves * beside,
        "barriers": waves * BARRIER,
    }


def _cooperative_clocks(problem: Problem, card: Card, plan: Plan, backward: bool) -> dict[str, float]:
    """A program processes its batch tiles one after another, each in a turn."""
    count, products, shared = _on_chip(problem, card, plan, backward)
    partners, several_tiles = plan.family.partners, plan.tiles_per_program > 1
    if backward and not several_tiles:
        count *= IN_EXCHANGE
    gates = CELLS[problem.cell].rows // partners if backward else 1
    words = _l2_clocks(gates * plan.rows * problem.hidden * problem.size, card, plan)
    turn: dict[str, float] = {
        "instructions, shared memory, or words from L2": max(count, shared, words),
        "products": products,
        "gates and cell": COOPERATIVE_CELL[backward],
        "barriers": BARRIER,
    }
    if not backward and 32 % plan.units:  # two sums of a warp's cells lie in the same bank
        turn["bank conflicts"] = CELLS[problem.cell].rows * plan.num_warps * ceil(plan.rows * plan.units / 32)
    # With several batch tiles, forward requests the words of the next one ahead. In backward they arrive in time, too,
    # but gates from memory, and words from L2, take as long.
    ahead = plan.family.ahead and several_tiles
    turn["exchange"] = max(0.0, TURN_AHEAD - sum(turn.values())) if ahead else EXCHANGE
    if ahead and plan.rows * plan.units == 32 * plan.num_warps:  # all warps have cells: ptxas lets them wait for gates
        turn |= {"exchange": 0.0, "gates from memory": GATES_AHEAD}
    if backward and partners > 1:
        turn["exchange of partial sums"] = PARTIAL_SUMS[several_tiles]
    return {name: plan.tiles_per_program * clocks for name, clocks in turn.items()}


def _on_chip(problem: Problem, card: Card, plan: Plan, backward: bool) -> tuple[float, float, float]:
    """Clocks of a turn where W_hh is in registers: (instructions, products, shared memory)."""
    share = plan.num_warps / 4  # warps of each of a multiprocessor's four schedulers
    count, products, shared = counts_of_turn(problem, plan, backward)
    chain = min(2 * plan.family.chunks, products // 2) * PRODUCT
    of_products = max(chain, products * product_clocks(card) * share)
    return ISSUE * count * share, of_products, 32 * plan.num_warps * shared / SHARED_BYTES


def counts_of_turn(problem: Problem, plan: Plan, backward: bool) -> tuple[float, int, int]:
    """(instructions, products, bytes in shared memory) of a thread's pass of the time loop, as in the compile table.

    Instructions are fitted to it, to 10 %; the others are exact.
    """
    units, warps, chunks = plan.units, plan.num_warps, plan.family.chunks
    of_unit, functions = CELLS[problem.cell].rows, CELLS[problem.cell].functions[backward]
    if isinstance(plan.family, Resident):
        cells = units // (4 * warps)  # of a thread
        products, gates = 2 * chunks * ceil(of_unit * units / (16 * warps)), of_unit if backward else 1
        of_cell, of_function = RESIDENT_INSTRUCTIONS[backward]
        instructions = (of_cell + of_function * functions) * cells + products
        return instructions, products, gates * (cells * problem.size + 16 * chunks)
    partners = plan.family.partners
    rows = ceil(units * (partners if backward else of_unit) / 16) * 16  # of weights
    sums = ceil(rows / (4 * warps)) if backward else of_unit
    of_turn, of_function = COOPERATIVE_INSTRUCTIONS[backward]
    instructions = of_turn + of_function * functions + 18 * chunks
    if partners > 1:
        instructions += 27 + 42 * sums
    elif not backward:
        instructions += 1.5 * units + 8 * chunks * plan.family.ahead
    return instructions, 2 * chunks * rows // 16, rows + 4 * sums * warps


def product_clocks(card: Card) -> float:
    """From one product on a tensor core to the next: mma.sync of 16 x 8 x 16 half precision, or 16 x 8 x 8 TF32.

    By the data sheets' rates, but as measured on an H100; with sums in float32 that of GeForce cards is a quarter.
    """
    return {80: 8, 90: 6.26, 100: 8, 103: 8}.get(card.architecture, 32)


def _step_clocks(problem: Problem, card: Card, plan: Plan, backward: bool) -> dict[str, float]:
    """W_hh is read tile by tile from L2, which is assumed to hold it; a barrier ends each round."""
    parts, (of_tile, of_cell) = plan.family.parts, STEP_CELL[backward]
    gates, k = (parts, CELLS[problem.cell].rows * problem.hidden // parts) if backward else (4, problem.hidden)
    at_once = min(plan.programs, card.multiprocessors / plan.side_by_side)  # less than one of more heads than fit
    tiles = ceil(ceil(problem.batch / plan.rows) * ceil(problem.hidden / plan.units) / at_once)
    columns, passes = gates * plan.units, ceil(k / plan.family.k)
    # Multiply-adds a clock, without tensor cores by the CUDA C++ Programming Guide.
    rate = 128 if problem.exact_float32 else 4 * 4096 / problem.size / product_clocks(card)
    products = plan.rows * columns * plan.family.k / rate
    l2 = _l2_clocks((plan.rows + columns) * plan.family.k * problem.size, card, plan)
    each_pass = max(l2, products, (LOAD + l2) / (plan.num_stages - 1) + LOOP)  # so many passes' loads are in flight
    step: dict[str, float] = {
        "grid-wide barriers": (1 + (parts > 1)) * GRID_BARRIER,
        "L2: weights, states": tiles * passes * l2,
        "products, and loads in flight": tiles * passes * (each_pass - l2),
        "gates and cell": tiles * (of_tile + of_cell * plan.rows * plan.units / (32 * plan.num_warps)),
    }
    if parts > 1:  # float32, written and read; and there what cells read and write hides behind nothing
        of_sums = _l2_clocks((8 * parts + 10 * problem.size) * plan.rows * plan.units, card, plan)
        step["partial sums"] = plan.tiles_per_program * (of_sums + STEP_PART[0] + STEP_PART[1] * plan.num_warps)
    return step


def _held_clocks(problem: Problem, card: Card, plan: Plan, backward: bool) -> dict[str, float]:
    """W_hh is in shared memory, and each tile waits for those of the same sequences."""
    of_tile, of_cell, beyond_four = HELD_CELL[backward]
    cells = plan.rows * plan.units
    read = cells * (5 * problem.size + 16 if backward else problem.from_x * problem.size + 8)
    operand = plan.rows * plan.family.k * problem.size
    ahead = plan.family.ahead and plan.tiles_per_program > 1
    read += operand * (HELD_AHEAD if ahead else 1)  # h or dgates, ahead while the cells before are computed
    beside = HELD_BESIDE if plan.blocks > 1 else 1
    tile: dict[str, float] = {
        "L2: states, gates": _l2_clocks(read, card, plan) * beside,
        "products": _wgmma_clocks(problem, plan, plan.units * (1 if backward else 4)),
        "gates and cell": of_tile + of_cell * cells + beyond_four * max(0, cells / (32 * plan.num_warps) - 4),
    }
    step = {name: plan.tiles_per_program * clocks for name, clocks in tile.items()}
    return step | {"arrivals": HELD_ARRIVALS}


def _wgmma_clocks(problem: Problem, plan: Plan, columns: int) -> float:
    """Clocks of the products of a tile with the columns of W_hh that a program holds.

    An instruction takes 64 columns, 32 bytes of K, and the sequences of a warpgroup: of fewer than 64, it takes as long
    as its operands in shared memory. Warpgroups share the columns out before they share the sequences.
    """
    blocks, warpgroups = columns // 64, plan.num_warps // 4
    sequences = plan.rows * min(blocks, warpgroups) // warpgroups  # of one instruction
    each = max(sequences / 2, 32 * (64 + sequences) / SHARED_BYTES)
    return each * blocks * (plan.rows // sequences) * plan.family.k * problem.size / 32


# For a step by cuBLAS and kernels.
CUBLAS = (0.65, 0.85)  # large products reach this share of the tensor cores' rate, and of float32's
CUBLAS_TILE = 64  # rows and columns of a product that a multiprocessor computes at a time, or more
CUBLAS_K = 512  # where tiles are few, K is split among multiprocessors, in parts of so many or more
FASTER = {90: 6.26 / 4, 100: 4, 103: 4}  # how many times as fast as mma.sync cuBLAS's products are there (data sheets)
LAUNCH_SECONDS = 2.2e-6  # of a short kernel
HOST_SECONDS = 5e-6  # of a product or a launch, which nothing shorter hides


def _pointwise_clocks(problem: Problem, card: Card, plan: Plan, backward: bool) -> dict[str, float]:
    """Products, then what the kernel moves through memory. Plans are chosen as if there were no CUDA graph."""
    problem = within(problem)
    batch, hidden, width, size = problem.batch, problem.hidden, problem.width, problem.size
    sizes = [(CELLS[problem.cell].rows * hidden, width)] + [(width, hidden)] * (problem.projected > 0)
    # The gates twice, c twice, h and what the next product reads; backward dh twice, c before, and dc twice.
    moved = batch * hidden * (10 * size + (12 if backward else 8)) * problem.side_by_side
    launches = launches_of(problem, backward)
    step = {
        "products": sum(_cublas_clocks(problem, card, *(of[::-1] if backward else of)) for of in sizes),
        "memory": card.clock * moved / card.memory,
        "launches": launches * card.clock * LAUNCH_SECONDS,
    }
    return step | {"host, but in a CUDA graph": max(0.0, launches * card.clock * HOST_SECONDS - sum(step.values()))}


def _cublas_clocks(problem: Problem, card: Card, outputs: int, k: int) -> float:
    """A product of a whole batch with weights [outputs, k]."""
    multiprocessors = max(1, card.multiprocessors // problem.side_by_side)
    tiles = max(1, ceil(problem.batch / CUBLAS_TILE)) * ceil(outputs / CUBLAS_TILE)
    parts = max(1, min(multiprocessors // tiles, k // CUBLAS_K))
    rate = CUBLAS[1] * 128  # multiply-adds a clock
    if not problem.exact_float32:
        rate = CUBLAS[0] * FASTER.get(card.architecture, 1) * 4 * 4096 / problem.size / product_clocks(card)
    of_tiles = ceil(tiles * parts * problem.side_by_side / card.multiprocessors) * CUBLAS_TILE**2 * k / parts / rate
    weights = outputs * k * problem.size * problem.side_by_side  # from L2, which is assumed to hold them
    return max(of_tiles, weights / (L2_BYTES * card.multiprocessors))


CLOCKS = {
    Resident: _resident_clocks, Cooperative: _cooperative_clocks, Pointwise: _pointwise_clocks, Step: _step_clocks,
    Held: _held_clocks,
}  # fmt: skip
"""What each family's step is made of, by name; it adds up."""
