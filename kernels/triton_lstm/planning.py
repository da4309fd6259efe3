"""Problems, cards and plans: what every kernel family proposes in. Pure Python, so that it is tested without a GPU.

A plan is a proposal. Registers depend on the Triton version, so the launcher takes the first plan of a list whose
kernel compiles without spills on the Triton and card at hand; the step family comes last and always works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import ceil

import torch

from ..architectures import KB, REGISTERS, shared_memory_of

Launch = Callable[..., None]
"""launch(kernel, grid, **arguments), every argument by the name of the kernel's parameter: `launch.launch_kernel`."""


class Family(Enum):
    """How the time loop is run."""

    RESIDENT = "resident"  # one launch; a program walks the whole sequence alone
    COOPERATIVE = "cooperative"  # one launch; programs share W_hh and exchange h
    STEP = "step"  # one launch; programs read W_hh at every step and meet after it


@dataclass(frozen=True)
class Problem:
    """One layer in one direction: T steps, B sequences, H units, P projected features (0 without projection)."""

    steps: int
    batch: int
    hidden: int
    dtype: torch.dtype
    projected: int = 0
    precision: str = "ieee"  # of float32 products
    side_by_side: int = 1  # such layers or directions run at once, and share the card
    regularised: bool = False  # by recurrent dropout or zoneout

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


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
    k: int  # inner dimension of one product; in registers: chunks of K that a warp takes
    programs: int  # that share W_hh
    groups: int  # of programs, each with batch tiles of its own
    num_warps: int
    num_stages: int
    shared: int  # bytes a block is expected to take
    why: str
    walks: int = 1  # batch tiles that a group takes one after another at every step
    side_by_side: int = 1  # launches of this plan that fit the card at once

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.num_warps

    @property
    def registers(self) -> int:
        """The most that a thread may take, where a block has a multiprocessor to itself."""
        return min(255, REGISTERS // self.threads)


def device_of(properties: "torch.cuda._CudaDeviceProperties") -> Device:
    """A real card. Not every version of torch knows its rates, and they change no order of plans."""
    architecture = properties.major * 10 + properties.minor
    known = {}
    if hasattr(properties, "clock_rate"):  # kHz
        known = dict(clock=1e3 * properties.clock_rate)
    if hasattr(properties, "memory_clock_rate"):  # kHz, bits; two transfers a clock
        known |= dict(memory=2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8)
    return Device(
        properties.name, architecture, properties.multi_processor_count, shared_memory_of(architecture), **known
    )


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


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
