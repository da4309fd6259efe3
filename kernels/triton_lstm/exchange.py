"""How the programs of one launch hand each other what every one of them needs at the next step.

Every step's data has a place of its own in global memory, so nothing is overwritten while somebody may still read it
and nothing is reset inside a launch. Two exchanges behind one interface, chosen by FLAGGED:

    counter   a monotonic counter per batch tile: publish everything, count up (release); wait for the count
              (acquire), then read.
    flagged   the data is its own flag: the buffer is filled beforehand with a NaN bit pattern that `publish` never
              writes, and a reader repeats its load until no element holds it. One write and one read a step.

Waiting is bounded: `patience` counts the turns that may still be taken. When it is gone, the error word is set to
step + 1 and no later step waits, so that the launch ends.
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
    """Say, on one of the counters, that everything that was published is there."""
    if not FLAGGED:
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        tl.atomic_add(arrivals_ptr + counter, 1, sem="release")


@triton.jit
def wait(arrivals_ptr, counter, expected, patience, error_ptr, step, FLAGGED: tl.constexpr):
    """Wait until `expected` announcements were made on a counter; the patience that is left."""
    if not FLAGGED:
        turns = 0
        arrived = tl.atomic_add(arrivals_ptr + counter, 0, sem="acquire")
        while (arrived < expected) & (turns < patience):
            arrived = tl.atomic_add(arrivals_ptr + counter, 0, sem="acquire")
            turns += 1
        tl.debug_barrier()  # nobody reads before the one thread's acquire
        patience = give_up(arrived < expected, patience, error_ptr, step)
    return patience


@triton.jit
def collect(
    ptr,
    at,  # [A, B, N] offsets of the first tile
    k,  # [A, B, 1] index of the first tile's elements in a dimension of size K
    mask,  # [1, 1, N]
    patience,
    error_ptr,
    step,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Load what other programs published: TILES tiles [A, B, N], each BLOCK_K further on; with the patience left.

    Elements where not `mask`, or past K, are zero. All tiles are asked for before any is looked at.
    """
    tiles = load_published(ptr, at, k, mask, K, TILES, BLOCK_K, FLAGGED)
    if FLAGGED:
        missing = count_missing(tiles, TILES)
        turns = 0
        while (missing > 0) & (turns < patience):
            tiles = load_published(ptr, at, k, mask, K, TILES, BLOCK_K, FLAGGED)
            missing = count_missing(tiles, TILES)
            turns += 1
        patience = give_up(missing > 0, patience, error_ptr, step)
    return tiles, patience


@triton.jit
def load_published(
    ptr, at, k, mask, K: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, FLAGGED: tl.constexpr
):
    """The tiles of `collect`, as they are now; from L2, where the others' stores are, never from L1."""
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
