"""How the programs of one launch hand each other what every one of them needs at the next step.

Every step's data has a place of its own in global memory, so nothing is overwritten while somebody may still read it
and nothing is reset inside a launch. Two exchanges behind one interface, chosen by FLAGGED:

    counter   a monotonic counter per batch tile: publish everything, count up (release); wait for the count
              (acquire), then read.
    flagged   the data is its own flag: the buffer is filled beforehand with a NaN bit pattern that `publish` never
              writes, and a reader repeats its load until no element holds it. One write and one read a step.

Waiting is bounded. A poll is one look at a counter or at the data, and `patience` is how many polls one wait may take.
When that was not enough, the error word is set to step + 1 and no later step waits, so that the launch ends.
"""

import triton
import triton.language as tl


@triton.jit
def is_missing(x):
    """Where x still holds the fill: all bits one, which is a NaN in every floating-point format."""
    if x.dtype == tl.float32:
        missing = x.to(tl.int32, bitcast=True) == -1
    else:
        missing = x.to(tl.int16, bitcast=True) == -1
    return missing


@triton.jit
def publish(at, value, mask):
    """Store `value` for the other programs. A NaN that was computed is stored as another NaN than the fill."""
    tl.store(at, tl.where(value == value, value, float("nan")).to(at.dtype.element_ty), mask=mask)


@triton.jit
def announce(arrivals_ptr, counter, FLAGGED: tl.constexpr):
    """Count up one of the counters: everything that this program published is there. Not needed if FLAGGED."""
    if not FLAGGED:
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        tl.atomic_add(arrivals_ptr + counter, 1, sem="release")


@triton.jit
def wait(arrivals_ptr, counter, expected, patience, error_ptr, step, FLAGGED: tl.constexpr):
    """Wait until `expected` announcements were made on a counter; returns the patience that is left."""
    if not FLAGGED:
        polls = 0
        arrived = tl.atomic_add(arrivals_ptr + counter, 0, sem="acquire")
        while (arrived < expected) & (polls < patience):
            arrived = tl.atomic_add(arrivals_ptr + counter, 0, sem="acquire")
            polls += 1
        tl.debug_barrier()  # nobody reads before the one thread's acquire
        patience = give_up(arrived < expected, patience, error_ptr, step)
    return patience


@triton.jit
def collect(
    ptr,
    at,  # [PARTS, BLOCK, COLUMNS] offsets of the first tile
    k,  # [PARTS, BLOCK, 1] where the first tile's elements are in a dimension of size K
    mask,  # [1, 1, COLUMNS]
    patience,
    error_ptr,
    step,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Load what other programs published: TILES tiles [PARTS, BLOCK, COLUMNS], each BLOCK_K further on.

    Elements where not `mask`, or past K, are zero. All tiles are loaded before any is looked at.
    Returns (tiles, patience that is left).
    """
    tiles = load_published(ptr, at, k, mask, K, TILES, BLOCK_K, FLAGGED)
    if FLAGGED:
        missing = count_missing(tiles, TILES)
        polls = 0
        while (missing > 0) & (polls < patience):
            tiles = load_published(ptr, at, k, mask, K, TILES, BLOCK_K, FLAGGED)
            missing = count_missing(tiles, TILES)
            polls += 1
        patience = give_up(missing > 0, patience, error_ptr, step)
    return tiles, patience


@triton.jit
def load_published(
    ptr, at, k, mask, K: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, FLAGGED: tl.constexpr
):
    """The tiles of `collect` as they are now: from L2, where others store, not from L1, which may hold older data."""
    tiles = ()
    for tile in tl.static_range(TILES):
        tile_at = ptr + at + tile * BLOCK_K
        tile_mask = mask & (k + tile * BLOCK_K < K)
        if FLAGGED:
            tiles = tiles + (tl.load(tile_at, mask=tile_mask, other=0.0, volatile=True),)  # noqa: RUF005
        else:
            tiles = tiles + (tl.load(tile_at, mask=tile_mask, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    return tiles


@triton.jit
def count_missing(tiles, TILES: tl.constexpr):
    """How many elements of the tiles still hold the fill."""
    missing = 0
    for tile in tl.static_range(TILES):
        missing += tl.sum(is_missing(tiles[tile]).to(tl.int32))
    return missing


@triton.jit
def give_up(failed, patience, error_ptr, step):
    """No patience is left where waiting has `failed`; the error word says at which step."""
    tl.store(error_ptr, step + 1, mask=failed)
    return tl.where(failed, 0, patience)
