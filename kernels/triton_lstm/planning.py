"""Problems, cards and plans: what every kernel family proposes in. Pure Python, so that it is tested without a GPU.

A plan is a proposal. Registers depend on the Triton version, so the launcher uses the first plan of a list whose
kernel compiles without spills on the Triton and card at hand; the step family comes last and always works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import ceil

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
    memory: float = 1e12  # bytes a second


# Data sheets and CUDA C++ Programming Guide (shared memory a block: table of compute capabilities).
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
    shared: int  # bytes a block is expected to take
    why: str
    walks: int = 1  # batch tiles of a group, processed one after another at every step
    side_by_side: int = 1  # launches of this plan that fit the card at once

    @property
    def grid(self) -> tuple[int, ...]:
        """Of a launch."""
        match self.family:
            case Family.RESIDENT:
                return (self.groups,)
            case Family.COOPERATIVE:
                return self.programs, self.groups
            case Family.POINTWISE:
                return (self.programs * self.groups,)
            case Family.STEP:
                return (self.programs,)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.num_warps

    @property
    def registers(self) -> int:
        """The most that a thread may take, where a block has a multiprocessor to itself."""
        return min(255, REGISTERS // self.threads)


def device_of(properties: "torch.cuda._CudaDeviceProperties") -> Device:
    """A real card. Not every version of torch knows its rates; then they are those of the card most like it."""
    architecture = properties.major * 10 + properties.minor

    def unlike(other: Device) -> tuple[int, int]:
        return abs(other.architecture - architecture), abs(other.multiprocessors - properties.multi_processor_count)

    alike = min(DEVICES.values(), key=unlike)
    known = dict(clock=alike.clock, memory=alike.memory)
    if hasattr(properties, "clock_rate"):  # kHz
        known["clock"] = 1e3 * properties.clock_rate
    if hasattr(properties, "memory_clock_rate"):  # kHz, bits; two transfers a clock
        known["memory"] = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
    return Device(
        properties.name, architecture, properties.multi_processor_count, shared_memory_of(architecture), **known
    )


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Expected:
    """What one step of a plan is expected to take. Nothing of it was measured."""

    terms: dict[str, float]  # seconds; they add up

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.terms.values())


# Clocks of an H100. Latencies and rates are published ones (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
# GPU Architecture via Microbenchmarking", 2024; CUDA C++ Programming Guide). The last two are fitted to the cycles that
# were estimated instruction by instruction from SASS: 54 kernels of an H100, bfloat16, 16 sequences, 32 to 1,536 units.
BARRIER = 30  # of a block, from the last warp's arrival
PRODUCT = 33  # until the next product of a chain can start
L2_BYTES = 64  # that a multiprocessor reads from L2 in a clock; 30 to 64
SHARED_BYTES = 128  # that a multiprocessor reads or writes in shared memory in a clock
EXCHANGE = 800  # from a store until all readers have it; 650 to 850, from two latencies of L2 and a poll
SHUFFLES = 145  # a sum over the threads of a warp: five, one after another, and an addition each
GRID_BARRIER = 1500  # of all programs: a barrier, a fence, an atomic, and as long until all have seen it
ISSUE = 0.6  # of an instruction, which takes a clock; the rest falls into the waits of other warps
CELL = (470, 820)  # forward and backward: waits for loads, gates and cell that nothing hides


def expected(problem: Problem, device: Device, plan: Plan, backward: bool) -> Expected:
    """What a step of `plan` is expected to take on a card, by a model that is meant to put plans in order."""
    of_family = {Family.STEP: _clocks_of_tiles, Family.POINTWISE: _clocks_of_launches}.get(plan.family, _clocks_on_chip)
    terms = {name: clocks / device.clock for name, clocks in of_family(problem, device, plan, backward).items()}
    # Through memory: x W_ih^T and h, c and the gates forward; the gates, c twice, dh and dgates backward.
    moved = problem.batch * problem.hidden * (13 * problem.size + 8 if backward else 9 * problem.size + 4)
    terms["memory, beyond the rest"] = max(0.0, moved * plan.side_by_side / device.memory - sum(terms.values()))
    return Expected(terms)


def _clocks_on_chip(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """Of families that hold W_hh: a program processes its batch tiles one after another."""
    share = plan.num_warps / 4  # warps of each of a multiprocessor's four schedulers
    count, products, shared = counts_of_turn(problem, plan, backward)
    turn: dict[str, float] = {
        "instructions or shared memory": max(ISSUE * count * share, 32 * plan.num_warps * shared / SHARED_BYTES),
        "products": max(2 * plan.k * PRODUCT, products * product_clocks(device) * share),
        "gates and cell": CELL[backward],
        "barriers": (9 if problem.normalised and plan.family is Family.RESIDENT else 1) * BARRIER,
    }
    if plan.family is Family.RESIDENT:
        turns = ceil(plan.groups / device.multiprocessors)  # of programs, where not all are resident at once
        return {name: turns * clocks for name, clocks in turn.items()}
    turn["L2: words of others"] = plan.rows * problem.hidden * problem.size / L2_BYTES
    if backward:
        turn["exchange of partial sums"] = EXCHANGE
    if problem.normalised:  # of W_hh h and of c, whose sums over all units nothing hides
        turn["exchanges of layer norms"] = 2 * (EXCHANGE + (2 if backward else 3) * SHUFFLES)
    other_turns = (plan.walks - 1) * sum(turn.values())
    step = {name: plan.walks * clocks for name, clocks in turn.items()}
    return step | {"exchange, beyond other batch tiles": max(0, EXCHANGE - other_turns)}


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
    sums = ceil(units / warps) if backward else 4
    instructions = (255 + 5 * units if backward else 210 + 1.5 * units) + 18 * plan.k
    return instructions + 270 * problem.normalised, 2 * plan.k * units // 4, 4 * units + 4 * sums * warps


def product_clocks(device: Device) -> int:
    """From one product on a tensor core to the next: mma.sync of 16 x 8 x 16 half precision, or 16 x 8 x 8 TF32.

    By the data sheets' rates; with sums in float32 that of GeForce cards is a quarter.
    """
    return 8 if device.architecture in (80, 90, 100, 103) else 32


def _clocks_of_tiles(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """Of the step family: tile by tile W_hh comes from L2, which is assumed to hold it; a barrier ends each round."""
    hidden, width = problem.hidden, problem.width
    # Units of each round, columns of the product for each, and K.
    rounds = [(hidden, 1, 4 * hidden)] if backward else [(hidden, 4, width)]
    if problem.projected:
        rounds = [(width, 1, 4 * hidden), (hidden, 1, width)] if backward else [*rounds, (width, 1, hidden)]
    barriers = len(rounds) + problem.normalised * (1 if backward else 2)
    step: dict[str, float] = {"grid-wide barriers": barriers * GRID_BARRIER}
    for units, gates, k in rounds:
        tiles = ceil(ceil(problem.batch / plan.rows) * ceil(units / plan.columns) / plan.programs)
        columns, turns = gates * plan.columns, ceil(k / plan.k)
        if problem.exact_float32:
            products = plan.rows * columns * k / 128  # multiply-adds a clock (CUDA C++ Programming Guide)
        else:
            products = plan.rows * columns * k / (4 * 4096 / problem.size) * product_clocks(device)
        clocks = {
            "L2: weights, states": (plan.rows + columns) * k * problem.size / L2_BYTES,
            "instructions": ISSUE * (330 + 42 * turns) * plan.rows / 16,  # about those of the compile table
            "products": products,
            "barriers": (20 + 2 * turns) * BARRIER,
            "gates and cell": CELL[backward],
        }
        for name, each in clocks.items():
            step[name] = step.get(name, 0) + tiles * each
    return step


# Of a step by cuBLAS and a kernel.
CUBLAS = (0.65, 0.85)  # of the rate of tensor cores, and of that of float32, what large products reach
CUBLAS_TILE = 64  # rows and columns of a product that a multiprocessor computes at a time, or more
FASTER = {90: 2, 100: 4, 103: 4}  # times mma.sync are the products that cuBLAS has there (data sheets)
LAUNCH_SECONDS = 2.2e-6  # of a short kernel
HOST_SECONDS = 10e-6  # of a product and a launch, which nothing shorter hides


def _clocks_of_launches(problem: Problem, device: Device, plan: Plan, backward: bool) -> dict[str, float]:
    """Of the pointwise family: the product, then what its kernel moves through memory."""
    batch, hidden, size = problem.batch, problem.hidden, problem.size
    multiprocessors = max(1, device.multiprocessors // problem.side_by_side)
    outputs, k = (hidden, 4 * hidden) if backward else (4 * hidden, hidden)
    tiles = ceil(batch / CUBLAS_TILE) * ceil(outputs / CUBLAS_TILE)
    rate = CUBLAS[1] * 128  # multiply-adds a clock
    if not problem.exact_float32:
        rate = CUBLAS[0] * FASTER.get(device.architecture, 1) * 4 * 4096 / size / product_clocks(device)
    # The gates twice, h, c thrice and forward what the next product reads; backward dh twice, c before and dc, too.
    moved = batch * hidden * (10 * size + (16 if backward else 12)) * problem.side_by_side
    step = {
        "product": ceil(tiles / multiprocessors) * CUBLAS_TILE**2 * k / rate,
        "memory": device.clock * moved / device.memory,
        "launches": 2 * device.clock * LAUNCH_SECONDS,
    }
    return step | {"host, beyond the rest": max(0.0, device.clock * HOST_SECONDS - sum(step.values()))}
