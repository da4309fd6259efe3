"""Plans: which kernels run the time loop, and by what blocks."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ..architectures import KB, shared_memory_of
from ..recurrence import Recurrence

PACK = 16  # bytes that a thread reads or writes at once

Launch = Callable[..., None]
"""launch(kernel, dtype, plan, **arguments): `launch.launch_kernel`."""


class Family(enum.Enum):
    """How the time loop is run."""

    SEQUENCE = "sequence"  # a block walks whole sequences alone
    COOPERATIVE = "cooperative"  # blocks share W_hh, and exchange h at every step


@dataclass(frozen=True)
class Card:
    """What planning needs to know of a GPU."""

    architecture: int  # compute capability, 90 for 9.0
    multiprocessors: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block may have."""
        return shared_memory_of(self.architecture)


HOST = Card(80, 8)  # stands in where the tensors are on the CPU


def card_of(device: torch.device) -> Card:
    """That of a device."""
    if device.type != "cuda":
        return HOST
    properties = torch.cuda.get_device_properties(device)
    return Card(10 * properties.major + properties.minor, properties.multi_processor_count)


@dataclass(frozen=True)
class Problem:
    """One layer in one direction: B sequences, H units."""

    batch: int
    hidden: int
    dtype: torch.dtype
    backward: bool
    precision: str = "ieee"  # of float32 products
    side_by_side: int = 1  # such layers or directions run at once, and share the card

    @property
    def words(self) -> int:
        """W: of 32 bits, that a row of H elements takes at 16 bytes."""
        return 4 * ceil(self.hidden * self.dtype.itemsize / PACK)


def problem_of(gates: Tensor, r: Recurrence, backward: bool) -> Problem:
    """What is asked for."""
    return Problem(gates.shape[1], r.hidden, gates.dtype, backward, r.precision, r.side_by_side)


@dataclass(frozen=True)
class Plan:
    """Kernels with their blocks."""

    family: Family
    grid: tuple[int, int]
    threads: int  # of a block
    shared: int  # bytes of a block
    clocks: float  # of a step, expected, by a model that is meant to put plans in order
    template: tuple[int, ...] = ()  # arguments of the kernel, after the element type
    side_by_side: int = 1  # launches of this plan that fit the card at once


STATIC_LIMIT = 48 * KB
"""Bytes of shared memory that a block has without asking for more."""

# Clocks of an H100, for plans' order. Latencies and rates are published ones (Luo et al., "Benchmarking and Dissecting
# the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024; CUDA C++ Programming Guide).
L2_BYTES = 40  # that a multiprocessor reads from L2 in a clock, when all do
SHARED_BYTES = 128  # that it reads or writes in shared memory in a clock
MULTIPLY_ADDS = 128  # that it does in a clock
TENSOR_PRODUCTS = 0.5  # of 16 x 8 sums of 8 words, in a clock
EXCHANGE = 700  # from a store until all readers have it
CELL = 450  # loads, gates and cell, a barrier
