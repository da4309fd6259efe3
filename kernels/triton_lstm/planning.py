"""Cards, plans and their estimated times, for all kernel families. Pure Python, so that it is tested without a GPU.

A plan is a proposal. Registers depend on the Triton version, so the launcher uses the first plan of a list whose
kernel compiles without spills on the Triton and card at hand; that of the step family always works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import ceil, inf
from typing import Any, get_type_hints

import torch

from ..architectures import KB, REGISTERS, shared_memory_of
from ..problem import Problem

Launch = Callable[..., None]
"""launch(kernel, grid, **arguments), every argument by the name of the kernel's parameter: `launch.launch_kernel`."""


class Family(Enum):
    """How the time loop is run."""

    RESIDENT = "resident"  # one launch; a program runs the whole sequence alone
    COOPERATIVE = "cooperative"  # one launch; programs share W_hh and exchange h
    POINTWISE = "pointwise"  # a product by cuBLAS and a launch for each step
    STEP = "step"  # one launch; programs read W_hh at every step, which a grid-wide barrier ends


@dataclass(frozen=True)
class Device:
    """What planning needs to know of a card."""

    name: str
    architecture: int  # compute capability, 90 for 9.0
    multiprocessors: int
    shared: int  # bytes of shared memory a block may have
    clock: float = 1.5e9  # Hz
    memory: float = inf  # bytes a second


# Data sheets and CUDA C++ Programming Guide (shared memory per block: table of compute capabilities).
DEVICES = {
    "h100": Device("NVIDIA H100 SXM", 90, 132, 227 * KB, 1.755e9, 3.35e12),
    "a100": Device("NVIDIA A100 SXM 80 GB", 80, 108, 163 * KB, 1.41e9, 2.04e12),
    "l4": Device("NVIDIA L4", 89, 58, 99 * KB, 2.04e9, 0.3e12),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 89, 128, 99 * KB, 2.52e9, 1.008e12),
    "rtx5090": Device("NVIDIA GeForce RTX 5090", 120, 170, 99 * KB, 2.407e9, 1.792e12),
    "b200": Device("NVIDIA B200", 100, 148, 227 * KB, 1.85e9, 8.0e12),
}
INTERPRETER = Device("Triton's interpreter", 0, 1, 227 * KB)
"""It runs programs one after another, so that one cannot wait for another."""


@dataclass(frozen=True)
class Plan:
    """A family with its tiles."""

    family: Family
    rows: int  # batch tile
    columns: int  # hidden units of a program
    k: int  # inner dimension of one product; in registers: chunks of K that a warp multiplies
    programs: int  # that share W_hh
    groups: int  # of programs, each with batch tiles of its own
    num_warps: int
    num_stages: int
    shared: int  # estimated bytes per block
    why: str
    tiles_per_group: int = 1  # batch tiles of a group, processed one after another at every step
    side_by_side: int = 1  # launches of this plan that fit the card at once
    parts: int = 1  # backward: how many cooperative programs share the gates of a unit; of the step family, parts of K
    held: int = 0  # of the step family: how many programs of a multiprocessor hold W_hh of their units; or none does
    ahead: bool = False  # a program asks for what its next batch tile multiplies before the cells of this one

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of a launch."""
        match self.family:
            case Family.RESIDENT:
                return (self.groups,)
            case Family.COOPERATIVE:
                return self.programs, self.groups
            case Family.POINTWISE:
                return (self.programs * self.groups,)
            case Family.STEP:
                return (self.programs, self.groups) if self.held else (self.programs,)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its launch from those that may compute other numbers, as JSON values; not the number of groups."""
        names = "rows", "columns", "k", "programs", "num_warps", "num_stages", "parts", "held", "ahead"
        several = {"several groups": self.groups > 1, "several tiles": self.tiles_per_group > 1}
        return {"family": self.family.value} | {name: getattr(self, name) for name in names} | several

    def sequences_enough(self, problem: Problem) -> int:
        """How many of a problem's sequences show all that its programs do: two batch tiles and part of a third, or more
        where programs, or groups of them, have several tiles.
        """
        tiles = 2
        if self.tiles_per_group > 1 and self.family is Family.STEP and not self.held:
            tiles = max(tiles, self.programs // ceil(problem.hidden / self.columns))
        elif self.tiles_per_group > 1:
            tiles = max(tiles, self.groups)
        return min(problem.batch, (tiles + 1) * self.rows - self.rows // 2)

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.num_warps

    @property
    def registers(self) -> int:
        """The most that a thread may use, where a multiprocessor has as many blocks as planned."""
        return min(255, REGISTERS // self.threads // max(1, self.held))


def plan_of(fields: Any) -> Plan:
    """A plan read from a file, with every field checked.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    types = get_type_hints(Plan)
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise ValueError(f"expected the fields {sorted(types)}, got {fields!r}")
    for name, needed in types.items():
        if type(fields[name]) is not (str if needed is Family else needed):
            raise ValueError(f"expected {name} of type {needed.__name__}, got {fields[name]!r}")
    return Plan(**fields | {"family": Family(fields["family"])})


def device_of(properties: "torch.cuda._CudaDeviceProperties") -> Device:
    """A real card. Rates that torch does not know, or the card reports as 0, are those of the most similar card."""
    architecture, multiprocessors = properties.major * 10 + properties.minor, properties.multi_processor_count

    def unlike(other: Device) -> tuple[int, int]:
        return abs(other.architecture - architecture), abs(other.multiprocessors - multiprocessors)

    alike = min(DEVICES.values(), key=unlike)
    names = "clock_rate", "memory_clock_rate", "memory_bus_width"  # kHz, with two transfers a clock; bits
    clock, memory_clock, bits = (getattr(properties, name, 0) for name in names)
    rates = 1e3 * clock or alike.clock, 2e3 * memory_clock * bits / 8 or alike.memory
    return Device(properties.name, architecture, multiprocessors, shared_memory_of(architecture), *rates)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Expected:
    """The estimated time of one step of a plan. None of it was measured."""

    terms: dict[str, float]  # seconds; they add up

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return sum(self.terms.values())


# Clocks of an H100. Latencies and rates are published ones (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
# GPU Architecture via Microbenchmarking", 2024; CUDA C++ Programming Guide). Fitted values are fitted to the cycles of
# tests/cycles.csv, which were estimated instruction by instruction from SASS.
BARRIER = 30  # of a block, from the last warp's arrival
PRODUCT = 33  # until the next product of a chain can start
LOAD = 270  # from L2
L2_BYTES, L2_ALONE = 28.7, 64  # that a multiprocessor reads from L2 per clock: when all do, and at most
SHARED_BYTES = 128  # that a multiprocessor reads or writes in shared memory per clock
EXCHANGE = 800  # from a store until all readers have it; 650 to 850, from two latencies of L2 and a poll
PARTIAL_SUMS = 900, 600  # the same for the second exchange of a step, with one batch tile and with several; fitted
TURN_AHEAD = 1050  # the shortest turn where words are requested a turn ahead; fitted
SHUFFLES = 145  # a sum over the threads of a warp: five, one after another, and an addition each
GRID_BARRIER = 1500  # of all programs: a barrier, a fence, an atomic, and as long until all have seen it
ISSUE = 0.6  # of an instruction, which takes a clock; the rest falls into the waits of other warps; fitted
TURN = 145  # of the step family's loop over K: barriers, fragments, and products; fitted
# Waits for loads, gates and cell that nothing hides, fitted; those of a tuple are of forward and backward.
RESIDENT_CELL = 470, 820
COOPERATIVE_CELL = 400
STEP_CELL = (0, 535), (1000, 150)  # of a tile, and of each cell of a thread
STEP_PART = 2400  # of a tile's product of a part of K: until its first operands are there, and after the last; fitted
# The same where W_hh is held: of a tile, of each of its cells, and of each cell of a thread beyond four.
HELD_CELL = (1120, 0.87, 110), (1780, 0.27, 370)
HELD_PARTS = 2060  # of a tile, where the product is split into parts of K; fitted
HELD_BESIDE = 0.65  # of what two blocks of a multiprocessor read, as one loads while the other computes; fitted
HELD_ARRIVALS = 700  # of GRID_BARRIER, what is not in them


def expected(problem: Problem, device: Device, plan: Plan, backward: bool) -> Expected:
    """The estimated time of a step of `plan` on a card, by a model that is meant for ranking plans."""
    clocks = CLOCKS[plan.family](problem, device, plan, backward)
    terms = {name: each / device.clock for name, each in clocks.items()}
    terms["memory, beyond the rest"] = max(0.0, memory_seconds(problem, device, plan, backward) - sum(terms.values()))
    return Expected(terms)


def memory_seconds(problem: Problem, device: Device, plan: Plan, backward: bool) -> float:
    """Of memory traffic: x W_ih^T and h, c and the gates forward; the gates, c, dh and dgates backward."""
    c = 8 if backward and plan.family is not Family.POINTWISE else 4  # bytes of a cell: of two steps, or of one
    moved = problem.batch * problem.hidden * ((13 if backward else 9) * problem.size + c)
    return moved * plan.side_by_side / device.memory


def l2_clocks(count: float, device: Device, plan: Plan) -> float:
    """Clocks until each program has read `count` bytes from L2, which all share."""
    return count / min(L2_ALONE, L2_BYTES * device.multiprocessors / (plan.programs * plan.groups * plan.side_by_side))


def _resident_clocks(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    count, products, shared = _on_chip(problem, device, plan, backward)
    turns = ceil(plan.groups / device.multiprocessors)  # of programs, where not all are resident at once
    return {
        "instructions or shared memory": turns * max(count, shared),
        "products": turns * products,
        "gates and cell": turns * RESIDENT_CELL[backward],
        "barriers": turns * (9 if problem.normalised else 1) * BARRIER,
    }


def _cooperative_clocks(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """A program processes its batch tiles one after another."""
    count, products, shared = _on_chip(problem, device, plan, backward)
    gates = 4 // plan.parts if backward else 1
    words = l2_clocks(gates * plan.rows * problem.hidden * problem.size, device, plan)
    turn: dict[str, float] = {
        "instructions, shared memory, or words from L2": max(count, shared, words),
        "products": products,
        "gates and cell": COOPERATIVE_CELL,
        "barriers": BARRIER,
    }
    if not (backward or problem.normalised) and 32 % plan.columns:  # two sums of a warp's cells lie in the same bank
        turn["bank conflicts"] = 4 * plan.num_warps * ceil(plan.rows * plan.columns / 32)
    # With several batch tiles, forward requests the words of the next one ahead. In backward they arrive in time, too,
    # but gates from memory, and words from L2, take as long.
    turn["exchange"] = max(0.0, TURN_AHEAD - sum(turn.values())) if _asks_ahead(plan) else EXCHANGE
    if backward and plan.parts > 1:
        turn["exchange of partial sums"] = PARTIAL_SUMS[plan.tiles_per_group > 1]
    if problem.normalised:  # of W_hh h and of c, whose sums over all units nothing hides
        turn["exchanges of layer norms"] = 2 * (EXCHANGE + (2 if backward else 3) * SHUFFLES)
    return {name: plan.tiles_per_group * clocks for name, clocks in turn.items()}


def _asks_ahead(plan: Plan) -> bool:
    """A plan for a larger batch may have one batch tile."""
    return plan.ahead and plan.tiles_per_group > 1


def _on_chip(problem: Problem, device: Device, plan: Plan, backward: bool) -> tuple[float, float, float]:
    """Clocks of a turn of families that hold W_hh: its instructions, products, and shared memory."""
    share = plan.num_warps / 4  # warps of each of a multiprocessor's four schedulers
    count, products, shared = counts_of_turn(problem, plan, backward)
    of_products = max(min(2 * plan.k, products // 2) * PRODUCT, products * product_clocks(device) * share)
    return ISSUE * count * share, of_products, 32 * plan.num_warps * shared / SHARED_BYTES


def counts_of_turn(problem: Problem, plan: Plan, backward: bool) -> tuple[float, int, int]:
    """(instructions, products, bytes in shared memory) of a thread's pass of the time loop: those of the compile table.

    The first is fitted to it, to 10 %, and the others are exact.
    """
    units, warps = plan.columns, plan.num_warps
    if plan.family is Family.RESIDENT:
        cells = units // (4 * warps)  # of a thread
        products, gates = 2 * plan.k * cells, 4 if backward else 1
        instructions = (100 if backward else 95) * cells + products
        shared = gates * (cells * problem.size + 16 * plan.k)
        if problem.normalised:  # eight sums over the block, of a word written and read each
            instructions, shared = instructions + (400 if backward else 170), shared + 8 * 8
        return instructions, products, shared
    rows = units * (plan.parts if backward else 4)  # of weights
    sums = ceil(rows / (4 * warps)) if backward else 4
    instructions = 18 * plan.k + 290 * problem.normalised
    if backward:
        instructions += 245 + 42 * sums if plan.parts > 1 else 218
    else:
        instructions += 210 + 1.5 * units + 8 * plan.k * plan.ahead  # words are requested ahead
    return instructions, 2 * plan.k * rows // 16, rows + 4 * sums * warps


def product_clocks(device: Device) -> int:
    """From one product on a tensor core to the next: mma.sync of 16 x 8 x 16 half precision, or 16 x 8 x 8 TF32.

    By the data sheets' rates; with sums in float32 that of GeForce cards is a quarter.
    """
    return 8 if device.architecture in (80, 90, 100, 103) else 32


def _step_clocks(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """W_hh is read tile by tile from L2, which is assumed to hold it; a barrier ends each round."""
    if plan.held:
        return _held_clocks(problem, device, plan, backward)
    hidden, width = problem.hidden, problem.width
    # Units of each round, columns of the product for each, and K.
    rounds = [(width, plan.parts, 4 * hidden // plan.parts)] if backward else [(hidden, 4, width)]
    if problem.projected:
        rounds.append((hidden, 1, width) if backward else (width, 1, hidden))
    barriers = len(rounds) + (plan.parts > 1) + problem.normalised * (1 if backward else 2)
    step: dict[str, float] = {"grid-wide barriers": barriers * GRID_BARRIER}
    of_tile, of_cell = STEP_CELL[backward]
    for units, gates, k in rounds:
        tiles = ceil(ceil(problem.batch / plan.rows) * ceil(units / plan.columns) / plan.programs)
        columns, turns = gates * plan.columns, ceil(k / plan.k)
        # Multiply-adds a clock, without tensor cores by the CUDA C++ Programming Guide.
        rate = 128 if problem.exact_float32 else 4 * 4096 / problem.size / product_clocks(device)
        products = plan.rows * columns * plan.k / rate
        l2 = l2_clocks((plan.rows + columns) * plan.k * problem.size, device, plan)
        turn = max(l2, products, (LOAD + l2) / (plan.num_stages - 1) + TURN)  # loads of so many turns are in flight
        clocks = {
            "L2: weights, states": turns * l2,
            "products, and loads in flight": turns * (turn - l2),
            "gates and cell": of_tile + of_cell * plan.rows * plan.columns / plan.threads,
        }
        for name, each in clocks.items():
            step[name] = step.get(name, 0) + tiles * each
    if plan.parts > 1:  # float32, written and read; and there what cells read and write hides behind nothing
        of_sums = l2_clocks((8 * plan.parts + 10 * problem.size) * plan.rows * plan.columns, device, plan)
        step["partial sums"] = plan.tiles_per_group * (of_sums + STEP_PART)
    return step


def _held_clocks(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """W_hh is in shared memory, and each tile waits for those of the same sequences."""
    of_tile, of_cell, beyond_four = HELD_CELL[backward]
    cells, times = plan.rows * plan.columns, plan.parts if backward else 4
    read = cells * (5 * problem.size + 16 if backward else 4 * problem.size + 8)
    operand, ahead = plan.rows * plan.k * problem.size, _asks_ahead(plan)
    if not ahead:  # else h or dgates are loaded while the cells before are computed, but for the first tile
        read += operand
    if plan.parts > 1:  # sums in float32, written and read
        of_tile, read = HELD_PARTS, read + 8 * plan.parts * cells
    beside = HELD_BESIDE if plan.held > 1 else 1
    tile: dict[str, float] = {
        "L2: states, gates": l2_clocks(read, device, plan) * beside,
        "products": _wgmma_clocks(problem, plan, plan.columns * times),
        "gates and cell": of_tile + of_cell * cells + beyond_four * max(0, cells / plan.threads - 4),
    }
    step = {name: plan.tiles_per_group * clocks for name, clocks in tile.items()}
    step["L2: states, gates"] += l2_clocks(operand, device, plan) * ahead
    return step | {"arrivals": HELD_ARRIVALS * (2 if plan.parts > 1 else 1)}


def _wgmma_clocks(problem: Problem, plan: Plan, columns: int) -> float:
    """Of products with so many columns of W_hh that a program holds, for a tile of sequences.

    An instruction takes 64 columns, 32 bytes of K, and the sequences of a warpgroup: of fewer than 64, it takes as long
    as its operands in shared memory. Warpgroups share the columns out before they share the sequences.
    """
    blocks, warpgroups = columns // 64, plan.num_warps // 4
    sequences = plan.rows * min(blocks, warpgroups) // warpgroups  # of one instruction
    each = max(sequences / 2, 32 * (64 + sequences) / SHARED_BYTES)
    return each * blocks * (plan.rows // sequences) * plan.k * problem.size / 32


# For a step by cuBLAS and a kernel.
CUBLAS = (0.65, 0.85)  # the fraction that large products reach of the rate of tensor cores, and of that of float32
CUBLAS_TILE = 64  # rows and columns of a product that a multiprocessor computes at a time, or more
CUBLAS_K = 512  # where tiles are few, K is split among multiprocessors, in parts of so many or more
FASTER = {90: 2, 100: 4, 103: 4}  # how many times as fast as mma.sync cuBLAS's products are there (data sheets)
LAUNCH_SECONDS = 2.2e-6  # of a short kernel
HOST_SECONDS = 10e-6  # of a product and a launch, which nothing shorter hides


def _pointwise_clocks(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """The product, then what its kernel moves through memory. Plans are chosen as if there were no CUDA graph."""
    batch, hidden, size = problem.batch, problem.hidden, problem.size
    multiprocessors = max(1, device.multiprocessors // problem.side_by_side)
    outputs, k = (hidden, 4 * hidden) if backward else (4 * hidden, hidden)
    tiles = ceil(batch / CUBLAS_TILE) * ceil(outputs / CUBLAS_TILE)
    parts = max(1, min(multiprocessors // tiles, k // CUBLAS_K))
    rate = CUBLAS[1] * 128  # multiply-adds a clock
    if not problem.exact_float32:
        rate = CUBLAS[0] * FASTER.get(device.architecture, 1) * 4 * 4096 / size / product_clocks(device)
    of_tiles = ceil(tiles * parts / multiprocessors) * CUBLAS_TILE**2 * k / parts / rate
    weights = outputs * k * size * problem.side_by_side  # from L2, which is assumed to hold them
    # The gates twice, c twice, h and what the next product reads; backward dh twice, c before, and dc twice.
    moved = batch * hidden * (10 * size + (12 if backward else 8)) * problem.side_by_side
    step = {
        "product": max(of_tiles, weights / (L2_BYTES * device.multiprocessors)),
        "memory": device.clock * moved / device.memory,
        "launches": 2 * device.clock * LAUNCH_SECONDS,
    }
    return step | {"host, but in a CUDA graph": max(0.0, device.clock * HOST_SECONDS - sum(step.values()))}


CLOCKS = {
    Family.RESIDENT: _resident_clocks, Family.COOPERATIVE: _cooperative_clocks, Family.STEP: _step_clocks,
    Family.POINTWISE: _pointwise_clocks,
}  # fmt: skip
"""What each family's step is made of, by name; it adds up."""
