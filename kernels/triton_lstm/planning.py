"""Which kernel family runs a problem, with which tiles: pure Python, so that it is tested without a GPU.

A plan is a proposal. Registers depend on the Triton version, so the launcher takes the first plan of a list whose
kernel compiles without spills on the Triton and card at hand; the step family comes last and always works.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import ceil

import torch


class Family(Enum):
    """How the time loop is run."""

    RESIDENT = "resident"  # one launch; a program walks the whole sequence alone
    COOPERATIVE = "cooperative"  # one launch; programs share W_hh and exchange h
    STEP = "step"  # one launch a step


@dataclass(frozen=True)
class Problem:
    """One layer in one direction: T steps, B sequences, H units, P projected features (0 without projection)."""

    steps: int
    batch: int
    hidden: int
    dtype: torch.dtype
    projected: int = 0
    precision: str = "ieee"  # of float32 products
    directions: int = 1  # that run side by side and share the card
    regularised: bool = False  # by recurrent dropout or zoneout

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Device:
    """What planning needs to know of a card. The rates are ceilings, for the expected bound of a step."""

    name: str
    architecture: int  # compute capability, 90 for 9.0
    multiprocessors: int
    shared: int  # bytes of shared memory a block may have
    clock: float  # Hz
    memory: float  # bytes a second
    half: float  # multiply-adds * 2 a second on tensor cores, float16 and bfloat16, float32 accumulation
    tf32: float
    single: float  # float32 without tensor cores


KB = 1024
# Data sheets and CUDA C++ Programming Guide (shared memory a block: table of compute capabilities).
DEVICES = {
    "h100": Device("NVIDIA H100 SXM", 90, 132, 227 * KB, 1.755e9, 3.35e12, 989e12, 494e12, 67e12),
    "a100": Device("NVIDIA A100 SXM 80 GB", 80, 108, 163 * KB, 1.41e9, 2.04e12, 312e12, 156e12, 19.5e12),
    "l4": Device("NVIDIA L4", 89, 58, 99 * KB, 2.04e9, 0.3e12, 121e12, 60e12, 30.3e12),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 89, 128, 99 * KB, 2.52e9, 1.008e12, 165e12, 82.6e12, 82.6e12),
    "b200": Device("NVIDIA B200", 100, 148, 227 * KB, 1.85e9, 8.0e12, 2250e12, 1100e12, 80e12),
}
INTERPRETER = Device("Triton's interpreter", 0, 0, 227 * KB, 0, 0, 0, 0, 0)
"""It runs programs one after another: there are no multiprocessors for programs that wait for each other."""


def shared_memory_of(architecture: int) -> int:
    """Bytes of shared memory that a block may have."""
    return {80: 163 * KB, 87: 163 * KB, 90: 227 * KB, 100: 227 * KB, 103: 227 * KB}.get(architecture, 99 * KB)


@dataclass(frozen=True)
class Plan:
    """A family with its tiles."""

    family: Family
    rows: int  # batch tile
    columns: int  # hidden units of a program
    k: int  # inner dimension of one product
    k_split: int  # parts of k that different warps take (cooperative)
    programs: int  # that share W_hh
    groups: int  # batch tiles that one launch takes
    num_warps: int
    num_stages: int
    shared: int  # bytes a block is expected to take
    why: str
    flagged: bool = True  # cooperative: data as its own flag, else a counter

    def launches(self, batch: int) -> int:
        """How many launches one after another a batch takes: more than one where its tiles are too many at once."""
        return ceil(ceil(batch / self.rows) / self.groups)

    @property
    def registers(self) -> int:
        """The most that a thread may take, where a block has a multiprocessor to itself."""
        return min(255, 65536 // (32 * self.num_warps))


def device_of(properties: "torch.cuda._CudaDeviceProperties") -> Device:
    """A real card. Its rates are left at zero: planning does not use them."""
    architecture = properties.major * 10 + properties.minor
    shared = shared_memory_of(architecture)
    return Device(properties.name, architecture, properties.multi_processor_count, shared, 0, 0, 0, 0, 0)


def plans(problem: Problem, device: Device, backward: bool) -> list[Plan]:
    """What to try, best first (expected, until it is measured); the step family last."""
    if problem.steps == 1 or problem.regularised:
        return [step_plan(problem, backward)]  # holding W_hh on chip pays from the second step on
    return [
        *_resident(problem, device, backward),
        *_cooperative(problem, device, backward),
        step_plan(problem, backward),
    ]


def step_plan(problem: Problem, backward: bool) -> Plan:
    """One launch a step: works for every problem.

    The product of a step is small, so what counts is that many programs share it: the narrowest tiles that still
    fill tensor-core instructions.
    """
    rows = 16 if problem.batch <= 16 else 32 if problem.batch <= 32 else 64
    columns = 32 if backward else 16  # a unit has four columns in the forward product
    most, stages = (32, 2) if problem.regularised else (64, 3)  # masks take registers
    no_tensor_cores = problem.dtype is torch.float32 and problem.precision == "ieee"
    if no_tensor_cores:
        most, columns = most // 2, 16  # and so do products without them
    rows = min(rows, most)
    warps = 8 if no_tensor_cores and problem.regularised else 4
    k = 128 // problem.size  # 128 bytes of each row at a time
    stage = (rows + columns * (1 if backward else 4)) * k * problem.size
    if problem.regularised:
        why = "recurrent dropout and zoneout run step by step"
    elif problem.projected:
        why = "a projection runs step by step"
    else:
        why = "W_hh is read from L2 at every step"
    return Plan(
        Family.STEP, rows, columns, k, 1, ceil(problem.hidden / columns), ceil(problem.batch / rows), warps,
        stages, 2 * stage, why,
    )  # fmt: skip


def _resident(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    if problem.projected or problem.batch == 0:
        return
    units = max(16, _power_of_two(problem.hidden))
    weights = 4 * units * units * problem.size
    for rows in _batch_tiles(problem.batch):
        gates = 4 * units * rows * 4  # they change places through shared memory
        if backward:
            gates = gates * (20 if problem.size == 4 else 13 if device.architecture >= 100 else 8) // 4 + 10 * KB
        shared = weights + gates
        if shared <= device.shared and 4 * units * rows <= 8192:
            yield Plan(
                Family.RESIDENT, rows, units, units, 1, 1, ceil(problem.batch / rows), 8 if units >= 64 else 4, 1,
                shared, f"W_hh ({weights // KB} KB) fits one block, so that no exchange is needed",
            )  # fmt: skip


def _cooperative(problem: Problem, device: Device, backward: bool) -> Iterator[Plan]:
    if problem.projected or problem.batch == 0:
        return
    k = min(256, max(64, _power_of_two(problem.hidden)))
    tiles = ceil(problem.hidden / k)
    candidates = []
    for columns, rows in itertools.product((8, 16, 32), _batch_tiles(problem.batch)):
        # Forward a program holds four gates of its units; backward one gate for the units of its team of four.
        programs = 4 * ceil(problem.hidden / (4 * columns)) if backward else ceil(problem.hidden / columns)
        weights = 4 * columns * tiles * k * problem.size
        exchanged = k * rows * problem.size
        summed = 4 * 4 * columns * rows * 4  # the parts of K that different warps took
        shared = weights + max(exchanged, summed) + KB
        batch_tiles = ceil(problem.batch / rows)
        groups = min(batch_tiles, device.multiprocessors // (programs * problem.directions))
        if groups and shared <= device.shared:
            why = f"{programs} programs hold W_hh, {weights // KB} KB each, and exchange " + (
                "dgates" if backward else "h"
            )
            candidates.append(Plan(Family.COOPERATIVE, rows, columns, k, 4, programs, groups, 8, 1, shared, why))
    # In one launch if possible; then, on as many multiprocessors as possible.
    candidates.sort(key=lambda plan: (plan.launches(problem.batch), -plan.programs * plan.groups, plan.rows))
    yield from candidates


@dataclass(frozen=True)
class Bound:
    """The least time that a step can take, seconds: every term is a ceiling of the card, and the largest bounds."""

    terms: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the term that bounds."""
        return max(self.terms.values())

    @property
    def by(self) -> str:
        """The name of the term that bounds."""
        return max(self.terms, key=self.terms.__getitem__)


SHARED_BYTES_PER_CLOCK = 128  # of one multiprocessor (CUDA C++ Programming Guide)
L2_BYTES_PER_CLOCK = 30  # that each multiprocessor gets when all read from L2 at once; measured on an H100 by others
L2_LATENCY_CLOCKS = 300  # measured on an H100 by others, 260 to 410
LAUNCH_SECONDS = 2e-6  # of a kernel in a CUDA graph


def expected_bound(problem: Problem, device: Device, plan: Plan, backward: bool) -> Bound:
    """What bounds a step of `plan`, from bytes and operations over the card's ceilings. Expected, not measured."""
    hidden, batch, size = problem.hidden, problem.batch, problem.size
    width = problem.projected or hidden
    rate = device.half if size == 2 else device.tf32 if problem.precision == "tf32" else device.single
    launches = plan.launches(batch)
    blocks = plan.programs * ceil(batch / plan.rows)
    busy = min(blocks, device.multiprocessors)
    # Through memory: x W_ih^T and h, c and the gates forward; the gates, c twice, dh and dgates backward.
    moved = batch * hidden * (13 * size + 8 if backward else 9 * size + 4)
    terms = {
        "memory: gates, states": moved / device.memory,
        "tensor cores: recurrent product": 8 * hidden * width * batch / (rate * busy / device.multiprocessors),
    }
    weights = 4 * hidden * width * size
    if plan.family is Family.STEP:
        read = weights * ceil(batch / plan.rows) + blocks * plan.rows * width * size * (4 if backward else 1)
        terms["L2: weights, states"] = read / (busy * L2_BYTES_PER_CLOCK * device.clock)
        terms["launch of a kernel"] = LAUNCH_SECONDS
    else:
        held = weights / plan.programs
        terms["shared memory: weights"] = launches * held / (SHARED_BYTES_PER_CLOCK * device.clock)
    if plan.family is Family.COOPERATIVE:
        read = plan.rows * hidden * size + (16 * plan.columns * plan.rows if backward else 0)  # a program, a step
        terms["L2: exchange"] = launches * read / (L2_BYTES_PER_CLOCK * device.clock)
        exchanges = 2 if backward else 1
        terms["latency: exchange"] = launches * exchanges * 2 * L2_LATENCY_CLOCKS / device.clock
    return Bound(terms)


def _batch_tiles(batch: int) -> list[int]:
    """Batch tiles worth trying: none that is more than half empty."""
    return [rows for rows in (64, 32, 16, 8) if rows < 2 * batch or rows == 8]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
