"""Tile sizes for a problem: pure Python, so that it is tested and compiled ahead of time without a GPU."""

from typing import NamedTuple


class StepTiles(NamedTuple):
    """Tiles of a step kernel: rows, columns (hidden units or projected features), and the K of one product."""

    rows: int
    columns: int
    k: int
    num_warps: int
    num_stages: int


def step_tiles(batch: int, bytes_per_element: int, *, gates: int) -> StepTiles:
    """Tiles for a step over `batch` sequences whose product has `gates` columns a unit (4 forward, 1 backward).

    The product of a step is small, so what counts is that many programs share it: the narrowest tiles that
    still fill tensor-core instructions.
    """
    rows = 16 if batch <= 16 else 32 if batch <= 32 else 64
    columns = 16 if gates == 4 else 32
    k = 128 // bytes_per_element  # 128 bytes of each row at a time
    return StepTiles(rows, columns, k, num_warps=4, num_stages=3)
