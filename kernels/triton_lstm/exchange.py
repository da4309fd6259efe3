"""How the programs of one launch hand each other what every one of them needs at the next step.

Nothing is overwritten while somebody may still read it, and nothing is reset inside a launch. Two exchanges:

    words   A word is its own flag. What is handed over is written and read as words of 32 bits, one element of float32
            or two neighbouring ones of half precision, by relaxed stores and loads of gpu scope (PTX ISA, "Memory
            Consistency Model": of one width, so that a race of them is defined). Either every step's words have places
            of their own, filled beforehand with a word that `pack` never makes; or two steps take turns in one place,
            and a word's last bit is its step's phase. A reader loads a word again until it is the one it waits for.
            One write and one read a step, and no barrier.
    meet    A counter of arrivals: store everything, count up (release), wait for the count (acquire), then load.

Waiting is bounded. A poll is one look at a counter or at words, and POLL_LIMIT is how many polls one wait may take. When
that was not enough, the error word is set to step + 1 and no later step waits for long, so that the launch ends.
"""

import triton
import triton.language as tl

from .assembly import operands, types
from .features import constexpr_function

POLL_LIMIT = 1 << 22  # seconds, where a step takes microseconds

POLLS_BETWEEN_LOOKS = 64  # a power of two
"""How often a reader that waits for words looks whether another gave up: the error word is far away, at the host."""


@triton.jit
def pack(x, DTYPE: tl.constexpr):
    """[THREADS] float32, rounded to DTYPE -> words [THREADS], never the fill. Of half precision an even thread's word
    holds its element and, in the high half, the next thread's; an odd thread's means nothing.

    The fill has all bits one, which is a NaN in every floating-point format; a NaN that was computed becomes another.
    """
    x = tl.where(x == x, x, float("nan")).to(DTYPE)
    if DTYPE.primitive_bitwidth == 32:
        words = x.to(tl.int32, bitcast=True)
    else:
        halves = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = halves | (of_the_next_thread(halves) << 16)
    return words


@triton.jit
def in_phase(words, phase):
    """Words of float32 whose last bit is a phase, 0 or 1: it costs half a unit in the last place."""
    return (words & -2) | phase


@triton.jit
def of_the_next_thread(x):
    """[THREADS] int32: an even thread's neighbour's."""
    if INTERPRETED:
        pairs = tl.reshape(x, (x.shape[0] // 2, 2))
        even, odd = tl.split(pairs)
        x = tl.reshape(tl.join(odd, even), x.shape)
    else:
        x = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
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
def meet(arrivals_ptr, times, patience, error_ptr, step):
    """All programs wait for each other: what any of them stored before, all can load after.

    `times` is how often they met, this time included: arrivals are counted up and never reset. Returns the patience
    that is left. Past 2^31 arrivals the count begins anew below zero, which the difference does not see.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    expected = times * tl.num_programs(0)
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") + 1
    polls = 0
    while (arrived - expected < 0) & (polls < patience):
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
        polls += 1
    tl.debug_barrier()  # nobody reads before the one thread's acquire
    failed = arrived - expected < 0
    tl.store(error_ptr, step + 1, mask=failed)
    return tl.where(failed, 0, patience)


@triton.jit
def collect(
    at,  # [THREADS] pointers to words: of the first group
    left,  # [THREADS] how many words there are from here on; none where not positive
    phase,  # 0 or 1, if PHASED
    error_ptr,
    step,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # words of a group, neighbours
    STRIDE: tl.constexpr,  # words from one group to the next
    TOGETHER: tl.constexpr,  # 1, 2 or 4: neighbours that one load takes; they lie at a multiple of as many words
    PHASED: tl.constexpr,
    POLL_LIMIT: tl.constexpr,
):
    """Words that other programs published, a tuple of GROUPS * SIZE [THREADS] int32. Words that are not there are zero.

    Relaxed loads of gpu scope, repeated while a word is the fill or, if PHASED, of the other phase. Each warp polls for
    itself, without a barrier: `polling_loop` says how. The interpreter takes a loop over all.
    """
    COUNT: tl.constexpr = GROUPS * SIZE
    if INTERPRETED:
        words = load_volatile(at, left, GROUPS, SIZE, STRIDE)
        polls = 0
        while (count_missing(words, left, phase, COUNT, SIZE, STRIDE, PHASED) > 0) & (polls < POLL_LIMIT):
            words = load_volatile(at, left, GROUPS, SIZE, STRIDE)
            polls += 1
            if tl.load(error_ptr, volatile=True) != 0:
                polls = POLL_LIMIT
        missing = count_missing(words, left, phase, COUNT, SIZE, STRIDE, PHASED)
        tl.store(error_ptr, step + 1, mask=missing > 0)
    else:
        words = tl.inline_asm_elementwise(
            polling_loop(GROUPS, SIZE, STRIDE, TOGETHER, PHASED, POLL_LIMIT),
            operands("=&r", COUNT, "l", 1, "r", 2, "l", 1, "r", 1),
            [at, left, phase, error_ptr, step + 1], dtype=types(tl.int32, COUNT), is_pure=False, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def load_volatile(at, left, GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """The words of `collect` as they are now."""
    words = ()
    for n in tl.static_range(GROUPS * SIZE):
        offset = n // SIZE * STRIDE + n % SIZE
        words = words + (tl.load(at + offset, mask=left > offset, other=0, volatile=True),)
    return words


@triton.jit
def count_missing(
    words, left, phase, COUNT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PHASED: tl.constexpr
):
    """How many of the words are not there yet."""
    missing = 0
    for n in tl.static_range(COUNT):
        absent = (words[n] & 1) != phase if PHASED else words[n] == -1
        missing += tl.sum((absent & (left > n // SIZE * STRIDE + n % SIZE)).to(tl.int32))
    return missing


@constexpr_function
def polling_loop(groups: int, size: int, stride: int, together: int, phased: bool, patience: int) -> str:
    """PTX that loads words until all are there, or somebody gave up.

    Operands: the words, the place of the first, how many are left, the phase, the error word, its value. A pass loads,
    all at once, the neighbours of which one is still missing. The lanes of a warp loop together, by their
    vote.
    """
    count = groups * size
    at, left, phase, error, step = (f"${count + n}" for n in range(5))
    firsts = range(0, count, together)  # the first words of all loads
    offset = {n: n // size * stride + n % size for n in firsts}
    lines = [
        ".reg .pred any, yes, " + ", ".join(f"missing{n}" for n in firsts) + ";", ".reg .b32 seen, polls, rest;",
        "mov.b32 polls, 0;",
    ]  # fmt: skip
    for n in firsts:
        lines.append(f"setp.gt.s32 missing{n}, {left}, {offset[n]};")
        lines += [f"mov.b32 ${n + i}, 0;" for i in range(together)]
    lines.append("POLL:")
    for n in firsts:
        words = ", ".join(f"${n + i}" for i in range(together))
        into = f"v{together}.b32 {{{words}}}" if together > 1 else f"b32 {words}"
        lines.append(f"@missing{n} ld.relaxed.gpu.global.{into}, [{at} + {4 * offset[n]}];")
    lines.append("setp.ne.u32 any, polls, polls;")
    for n in firsts:
        if phased:
            lines.append(f"xor.b32 seen, ${n}, {phase};")
            for i in range(1, together):
                lines += [f"xor.b32 rest, ${n + i}, {phase};", "or.b32 seen, seen, rest;"]
            lines += ["and.b32 seen, seen, 1;", "setp.ne.u32 yes, seen, 0;"]
            lines.append(f"and.pred missing{n}, missing{n}, yes;")
        else:  # the fill is the greatest word
            lines.append(f"mov.b32 seen, ${n};")
            lines += [f"max.u32 seen, seen, ${n + i};" for i in range(1, together)]
            lines.append(f"setp.eq.u32 missing{n}, seen, -1;")
        lines.append(f"or.pred any, any, missing{n};")
    lines += [
        "vote.sync.any.pred any, any, -1;", "@!any bra DONE;",
        "add.s32 polls, polls, 1;", f"and.b32 rest, polls, {POLLS_BETWEEN_LOOKS - 1};",
        "setp.ne.s32 any, rest, 0;", "@any bra POLL;",
        f"ld.relaxed.sys.global.b32 rest, [{error}];",
        "setp.ne.s32 any, rest, 0;", "vote.sync.any.pred any, any, -1;", "@any bra DONE;",
        f"setp.lt.s32 any, polls, {patience};", "@any bra POLL;",
        f"st.relaxed.sys.global.b32 [{error}], {step};",
        "DONE:",
    ]  # fmt: skip
    return "\n".join(["{", *lines, "}"])
