"""How the programs of one launch hand each other what every one of them needs at the next step.

What is exchanged is written and read as words of 32 bits: one element of float32, or two neighbouring ones of half
precision. Every step's words have a place of their own in global memory, so nothing is overwritten while somebody may
still read it and nothing is reset inside a launch. Two exchanges behind one interface, chosen by FLAGGED:

    counter   a monotonic counter per batch tile: publish everything, count up (release); wait for the count
              (acquire), then read.
    flagged   a word is its own flag: the buffer is filled beforehand with words that `publish` never writes, and a
              reader loads a word again until it is another. One write and one read a step.

Waiting is bounded. A poll is one look at a counter or at words, and PATIENCE is how many polls one wait may take. When
that was not enough, the error word is set to step + 1 and no later step waits for long, so that the launch ends.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

from .features import constexpr_function

POLLS_BETWEEN_LOOKS = 64  # a power of two
"""How often a reader that waits for words looks whether another gave up: the error word is far away, at the host."""


@triton.jit
def pack(x, DTYPE: tl.constexpr):
    """[UNITS, COLUMNS] float32, rounded to DTYPE -> words [UNITS / units of a word, COLUMNS], never the fill.

    The fill has all bits one, which is a NaN in every floating-point format; a NaN that was computed becomes another.
    """
    x = tl.where(x == x, x, float("nan")).to(DTYPE)
    if DTYPE.primitive_bitwidth == 32:
        words = x.to(tl.int32, bitcast=True)
    else:  # the first of two units in the low half
        halves = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pairs = tl.reshape(halves, (x.shape[0] // 2, 2, x.shape[1]))
        words = tl.sum(pairs << 16 * tl.arange(0, 2)[None, :, None], axis=1)
    return words


@triton.jit
def unpack(words, DTYPE: tl.constexpr):
    """Words [PARTS, COLUMNS, WORDS] -> elements [PARTS, COLUMNS, WORDS * units of a word]."""
    if DTYPE.primitive_bitwidth == 32:
        x = words.to(tl.float32, bitcast=True)
    else:
        halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        x = tl.reshape(halves, (words.shape[0], words.shape[1], 2 * words.shape[2])).to(DTYPE, bitcast=True)
    return x


@triton.jit
def publish(at, words, mask):
    """Store words for the other programs, by relaxed stores of gpu scope."""
    if INTERPRETED:
        tl.store(at, words, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred yes; setp.ne.b32 yes, $3, 0; @yes st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [at, words, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


INTERPRETED = tl.constexpr(not isinstance(publish, triton.JITFunction))


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
        failed = arrived < expected
        tl.store(error_ptr, step + 1, mask=failed)
        patience = tl.where(failed, 0, patience)
    return patience


@triton.jit
def collect(
    at,  # [PARTS, COLUMNS, BLOCK] pointers to words: of the first tile
    left,  # [PARTS, COLUMNS, BLOCK] how many words there are from here on; none where not positive
    error_ptr,
    step,
    TILES: tl.constexpr,
    STRIDE: tl.constexpr,
    PATIENCE: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Load the words that other programs published: TILES tiles [PARTS, COLUMNS, BLOCK], each STRIDE further on.

    Words that are not there are zero. All tiles are loaded before any is looked at.
    """
    if FLAGGED:
        tiles = load_when_published(at, left, error_ptr, step, TILES, STRIDE, PATIENCE)
    else:
        tiles = ()
        for tile in tl.static_range(TILES):  # from L2, where others store, not from L1, which may hold older words
            present = left > tile * STRIDE
            tiles = tiles + (tl.load(at + tile * STRIDE, mask=present, other=0, cache_modifier=".cg"),)  # noqa: RUF005
    return tiles


@triton.jit
def load_when_published(at, left, error_ptr, step, TILES: tl.constexpr, STRIDE: tl.constexpr, PATIENCE: tl.constexpr):
    """The tiles of `collect`, loaded by relaxed loads of gpu scope until no word is the fill.

    Each warp polls for itself, without a barrier: `polling_loop` says how. The interpreter takes a loop over all.
    """
    if INTERPRETED:
        tiles = load_volatile(at, left, TILES, STRIDE)
        polls = 0
        while (count_missing(tiles, TILES) > 0) & (polls < PATIENCE):
            tiles = load_volatile(at, left, TILES, STRIDE)
            polls += 1
            if tl.load(error_ptr, volatile=True) != 0:
                polls = PATIENCE
        tl.store(error_ptr, step + 1, mask=count_missing(tiles, TILES) > 0)
    else:
        WORDS: tl.constexpr = at.numel // num_threads() if at.numel > num_threads() else 1  # of a tile, in a thread
        tiles = tl.inline_asm_elementwise(
            polling_loop(TILES, WORDS, STRIDE, PATIENCE), polling_operands(TILES, WORDS),
            [at, left, error_ptr, step + 1], dtype=int32s(TILES), is_pure=False, pack=WORDS,
        )  # fmt: skip
    return tiles


@triton.jit
def load_volatile(at, left, TILES: tl.constexpr, STRIDE: tl.constexpr):
    """The tiles of `collect` as they are now."""
    tiles = ()
    for tile in tl.static_range(TILES):
        present = left > tile * STRIDE
        tiles = tiles + (tl.load(at + tile * STRIDE, mask=present, other=0, volatile=True),)  # noqa: RUF005
    return tiles


@triton.jit
def count_missing(tiles, TILES: tl.constexpr):
    """How many words of the tiles are still the fill."""
    missing = 0
    for tile in tl.static_range(TILES):
        missing += tl.sum((tiles[tile] == -1).to(tl.int32))
    return missing


@constexpr_function
def polling_loop(tiles: int, words: int, stride: int, patience: int) -> str:
    """PTX that loads `words` words of each tile until none is the fill, or somebody gave up.

    A pass loads, all at once, the words that are still missing. The lanes of a warp loop together, by their vote.
    """
    found = [f"${n}" for n in range(tiles * words)]
    at, left, error, step = ([f"${(tiles + n) * words + i}" for i in range(words)] for n in range(4))
    lines = [".reg .pred yes;", ".reg .b32 greatest, polls, rest;", "mov.b32 polls, 0;"]
    for n, word in enumerate(found):
        lines += [f"setp.gt.s32 yes, {left[n % words]}, {n // words * stride};", f"selp.b32 {word}, -1, 0, yes;"]
    lines += ["POLL:", "mov.b32 greatest, 0;"]
    for n, word in enumerate(found):
        place = f"[{at[n % words]} + {n // words * stride * 4}]"
        lines += [f"setp.eq.s32 yes, {word}, -1;", f"@yes ld.relaxed.gpu.global.b32 {word}, {place};"]
    lines += [f"max.u32 greatest, greatest, {word};" for word in found]  # the fill is the greatest word
    lines += [
        "setp.eq.s32 yes, greatest, -1;", "vote.sync.any.pred yes, yes, -1;", "@!yes bra DONE;",
        "add.s32 polls, polls, 1;", f"and.b32 rest, polls, {POLLS_BETWEEN_LOOKS - 1};",
        "setp.ne.s32 yes, rest, 0;", "@yes bra POLL;",
        f"ld.relaxed.sys.global.b32 rest, [{error[0]}];",
        "setp.ne.s32 yes, rest, 0;", "vote.sync.any.pred yes, yes, -1;", "@yes bra DONE;",
        f"setp.lt.s32 yes, polls, {patience};", "@yes bra POLL;",
        f"st.relaxed.sys.global.b32 [{error[0]}], {step[0]};",
        "DONE:",
    ]  # fmt: skip
    return "\n".join(["{", *lines, "}"])


@constexpr_function
def polling_operands(tiles: int, words: int) -> str:
    """Of polling_loop: what it finds; for each word its place and how many are left; the error word and its value."""
    return ",".join(["=&r"] * (tiles * words) + ["l"] * words + ["r"] * words + ["l"] * words + ["r"] * words)


@constexpr_function
def int32s(count: int) -> tuple[tl.dtype, ...]:
    """The types of what polling_loop finds."""
    return (tl.int32,) * count
