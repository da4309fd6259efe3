"""Plans: sizes and numbers of the blocks that run the time loop. Pure Python."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any, ClassVar

import torch

from ..cards import SHARED_BYTES, Card
from ..cells import CELLS
from ..problem import Problem
from ..timeouts import spare_multiprocessors
from .source import found

SEQUENCES, CHUNK, AHEAD = (int(found(rf"int {name} = (\d+);")) for name in ("SEQUENCES", "CHUNK", "AHEAD"))
MOST_REGISTERS = 192  # of a thread's 255 that may hold weights, words and sums

# Clocks of an H100, for the order of plans. Rates are published ones, see cards.py; the last two are fitted to the
# cycles of tests/cycles.csv, which were estimated instruction by instruction from SASS.
MULTIPLY_ADDS = 128  # per clock and multiprocessor
PRODUCTS = 1.57  # clocks per product of 16 rows by 8 words by 8 sequences on tensor cores
TURN = 1240  # per batch tile: until words arrive, gates and cell, the barrier
PARTIAL_SUMS = 950  # from a store until all that share gates have it


HOST = Card(80, 8)  # stands in where the tensors are on the CPU


def card_of(device: torch.device) -> Card:
    """The card of a device, without the multiprocessors that are left to other kernels."""
    if device.type != "cuda":
        return HOST
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    return Card(10 * properties.major + properties.minor, count - spare_multiprocessors(count))


def words_of(problem: Problem) -> int:
    """W: how many words of 32 bits a row of H elements has, padded to 16 bytes."""
    return 4 * ceil(problem.hidden * problem.size / 16)


@dataclass(frozen=True)
class Plan:
    """Sizes of blocks, as the template arguments of cuda/cooperative.cu name them, and how many there are."""

    cell: str
    hidden: int
    units: int
    warps: int
    chunks: int  # of K whose weights a warp keeps; 0: they are read at every step
    partners: int  # blocks that share the gates of a unit, backward; 1 forward
    grid: tuple[int, int]  # blocks of a group, groups
    shared: int  # bytes of a block
    clocks: float  # per step, estimated by a model that is meant for ranking plans
    side_by_side: int = 1  # launches of this plan that fit the card at once
    slower: ClassVar = "cupy's kernels are slower"

    @property
    def identity(self) -> dict[str, Any]:
        """What its numbers may depend on, as JSON values; how many groups there are is not among it."""
        names = "cell", "hidden", "units", "warps", "chunks", "partners"
        return {name: getattr(self, name) for name in names} | {"blocks": self.grid[0], "several": self.grid[1] > 1}

    def sequences_enough(self, problem: Problem) -> int:
        """How many of a problem's sequences show all that its blocks do: a group has two batch tiles if it has several
        in the problem, and one tile is not full.
        """
        tiles = max(2, self.grid[1])
        return min(problem.batch, (tiles + 1) * SEQUENCES - SEQUENCES // 2)

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def template(self, backward: bool) -> tuple[str | int, ...]:
        """The arguments of the kernel, after the element type."""
        sizes = self.hidden, self.units, self.warps, self.chunks, self.partners
        return self.cell.capitalize(), *sizes[: 5 if backward else 4]


@functools.lru_cache(256)
def choose_plan(problem: Problem, card: Card, backward: bool) -> Plan:
    """The plan that is estimated to be the fastest. There is always one, since weights can be read at every step."""
    return min(plans(problem, card, backward), key=lambda plan: plan.clocks)


def plans(problem: Problem, card: Card, backward: bool) -> Iterator[Plan]:
    shares = [n for n in (1, 2, 3, 4) if CELLS[problem.cell].rows % n == 0]
    for partners, warps in product(shares if backward else (1,), (4, 8)):
        for units, kept in product(range(4, 4 * warps + 1, 4), (True, False)):
            yield from _plan(problem, card, backward, partners, warps, units, kept)


def _plan(
    problem: Problem, card: Card, backward: bool, partners: int, warps: int, units: int, kept: bool
) -> Iterator[Plan]:
    """The plan of these sizes, if there are kernels for them, and all blocks can be resident at once."""
    # Rows: gates of a block's units; backward units of all the blocks that it shares gates with.
    gates = CELLS[problem.cell].rows
    rows = units * partners if backward else ceil(units * gates / 16) * 16
    k = words_of(problem) * (gates // partners if backward else 1)
    chunks = ceil(k / (CHUNK * warps)) if kept else 0
    if kept:
        tensor_cores = card.architecture >= 80 and not problem.exact_float32
        possible = tensor_cores and rows % 16 == 0 and (rows // 2 + 4) * chunks + rows // 2 <= MOST_REGISTERS
    else:
        possible = warps == 8 and rows in (32, 64)
    multiprocessors = card.multiprocessors // problem.side_by_side
    shared = 16 * warps * SEQUENCES * (rows // 2 + 2)
    shared += 0 if kept else 4 * warps * AHEAD * SEQUENCES * CHUNK
    wanted, most = partners * ceil(problem.hidden / (partners * units)), multiprocessors // partners * partners
    blocks = wanted if kept else min(wanted, most)
    if not (possible and 0 < blocks <= most and shared <= card.shared):
        return
    tiles = ceil(problem.batch / SEQUENCES)
    groups = max(1, min(tiles, multiprocessors // blocks))
    turns = ceil(tiles / groups) * ceil(wanted / blocks)  # of a step
    l2 = card.l2_bytes(blocks * groups * problem.side_by_side)
    turn = TURN + PARTIAL_SUMS * (partners > 1) + SEQUENCES * 4 * k / l2
    in_shared = SEQUENCES * 8 * warps * rows / SHARED_BYTES
    if kept:
        turn += (in_shared + PRODUCTS * rows / 16 * k / 8) / 2  # which overlap
    else:
        multiply_adds = rows * k * 4 // problem.size * SEQUENCES
        turn += in_shared + max(4 * rows * k / l2, 1.5 * multiply_adds / MULTIPLY_ADDS)
    sizes = units, warps, chunks, partners, (blocks, groups), shared
    yield Plan(problem.cell, problem.hidden, *sizes, turns * turn, problem.side_by_side)
