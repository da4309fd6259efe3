"""The exchange of values between the programs of one launch. docs/design.md says why it is sound.

In the cooperative family, programs publish and collect words, and each word is its own ready flag. In the other
families, programs count arrivals: all programs at once in `grid_barrier`, or the programs of one batch tile by its two
halves, `arrive` and `wait_for`.

A poll is one load of a counter or of words. The word after the error word limits the polls of a wait (timeouts.py). A
longer wait times out. Then the error word is set to step + 1, and missing values count as NaN. The program remembers
the timeout, since the host may clear the error word. From then on it polls once where it would wait.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .features import INTERPRETED, constexpr_function, constraints, types

# A warp waits before its first poll, for some passes of a loop. The delay counts sixteenths of a pass. After a poll in
# vain the next delay is two passes longer, otherwise it is a sixteenth shorter. These are estimates: a pass takes 30
# clocks, and a poll in vain takes as long as the load itself, which is ten passes or more.
LONGER, SHORTER, LONGEST = tl.constexpr(32), tl.constexpr(1), tl.constexpr(4096)

AGAIN = tl.constexpr("""\
add.s32 polls, polls, 1; and.b32 rest, polls, 63; setp.ne.s32 any, rest, 0;
@any bra POLL;
ld.relaxed.sys.global.b32 rest, [error]; setp.ne.s32 any, rest, 0; vote.sync.any.pred any, any, -1;
@any bra TIMED_OUT;
ld.relaxed.sys.global.b32 rest, [error + 4]; setp.lt.s32 any, polls, rest; vote.sync.all.pred any, any, -1;
@any bra POLL;
st.relaxed.sys.global.b32 [error], step;
TIMED_OUT:""")
"""PTX after a poll in vain. It polls again, or goes on after a timeout of this program or of another one.

It looks for a timeout of another program every 64 polls only, since the error word is in host memory.
"""

WAIT = tl.constexpr(f"""{{
.reg .pred any, missing; .reg .b32 seen, polls, rest, step; .reg .b64 error;
mov.b64 error, $4; mov.b32 step, $5; mov.b32 polls, 0;
mov.u32 rest, %tid.x; setp.ge.u32 any, rest, 32; setp.le.s32 missing, $3, 0;
@any bra DONE;
@missing bra DONE;
POLL:
ld.acquire.gpu.global.b32 seen, [$1]; sub.s32 seen, seen, $2; setp.lt.s32 missing, seen, 0;
vote.sync.any.pred missing, missing, -1;
@!missing bra DONE;
{AGAIN.value}
DONE:
bar.red.or.pred missing, 0, missing;
selp.b32 $0, 0, $3, missing;
}}""")
"""PTX of `wait_for`. $0 is its result, and $1 to $5 are its arguments."""


@triton.jit
def pack(x, DTYPE: tl.constexpr):
    """Round x [THREADS] float32 to DTYPE and return it as words [THREADS].

    In half precision the word of an even thread holds its element and, in the high half, the element of the next
    thread. The word of an odd thread is not used. No word is the sentinel. The sentinel has all bits set, which is a
    NaN in every floating-point format, and a NaN that was computed becomes another NaN.
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
    """Return words of float32 with a phase, 0 or 1, as their last bit. It costs at most one unit in the last place."""
    return (words & -2) | phase


@triton.jit
def of_the_next_thread(x):
    """Exchange x [THREADS] int32 within pairs: thread 2n gets x of thread 2n + 1, and thread 2n + 1 gets x of 2n."""
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def publish(word_ptr, words, mask):
    """Store words for the other programs, by relaxed stores of gpu scope."""
    tl.inline_asm_elementwise(
        "{ .reg .pred yes; setp.ne.b32 yes, $3, 0; @yes st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r", [word_ptr, words, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def grid_barrier(arrivals, times, poll_limit, step):
    """Let all programs wait for each other. After it, each can load the values that any of them stored before it.

    `times` counts the barriers so far, including this one, since arrivals are never reset. Returns the poll limit of
    later waits, as `wait_for` does.
    """
    arrive(arrivals.arrivals_ptr, poll_limit)
    return wait_for(arrivals, 0, times, poll_limit, step)


@triton.jit
def arrive(arrivals_ptr, poll_limit):
    """Count this program in. Programs that wait for it can load the values that it stored before."""
    tl.debug_barrier()  # the stores of all threads come before the release by one thread
    count = tl.where(poll_limit > 0, 1, 0)  # after a timeout no program arrives, since it would release others
    tl.atomic_add(arrivals_ptr, count, sem="release")


@triton.jit
def wait_for(arrivals, tile, times, poll_limit, step):
    """Wait until each program of the group has arrived `times` times at the counter of a batch tile.

    Returns the poll limit of later waits, which is 0 if this one timed out. The first warp polls, and a barrier tells
    the other warps. So all loads after the barrier come after the acquire. After 2^31 arrivals the counter wraps
    around, but only differences count.
    """
    if INTERPRETED:  # a plan for the interpreter has one program, which waits for no other; tests replace the function
        limit = poll_limit
    else:
        limit = tl.inline_asm_elementwise(
            WAIT, "=r,l,r,r,l,r",
            [arrivals.arrivals_ptr + tile, times * tl.num_programs(0), poll_limit, arrivals.error_ptr, step + 1],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return limit


@triton.jit
def unless_timed_out(x, poll_limit):
    """Return x, or NaN after a wait that timed out, since the values that x was computed from may be missing."""
    return tl.where(poll_limit > 0, x, float("nan"))


# The words that each thread reads: the place of the first one [THREADS], and how many words there are from it on
# [THREADS]. A thread reads GROUPS groups of SIZE neighbouring words, which are STRIDE words apart.
Words = namedtuple("Words", "first_ptr left")
# How a program waits for words at a step. `delay` [THREADS] is the delay before the first poll, or -1 after a timeout.
# `phase` is the last bit of words that have arrived. If it is None, every word but the sentinel has arrived.
Wait = namedtuple("Wait", "error_ptr step delay phase")


@constexpr_function
def neighbours(row: int) -> int:
    """Return how many words one load takes from rows of `row` words: the largest of 1, 2 and 4 that divides `row`."""
    return min(4, row & -row)


@triton.jit
def collect(
    words, wait,
    seen,  # the result of `look` for the same words, in place of a delay and a first poll; or ()
    GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, TOGETHER: tl.constexpr,  # see `neighbours`
):  # fmt: skip
    """Wait for words that other programs publish. Return the words, and the delay of the next wait for these words.

    The words are a tuple of GROUPS * SIZE tensors [THREADS] int32, with zero where there is no word. Loads are relaxed
    and of gpu scope. Each warp polls for itself.
    """
    PHASED: tl.constexpr = wait.phase is not None
    COUNT: tl.constexpr = GROUPS * SIZE
    phase = wait.phase if PHASED else 0
    given = (words.first_ptr, words.left, phase, wait.error_ptr, wait.step + 1, wait.delay) + seen
    found = tl.inline_asm_elementwise(
        polling_loop(GROUPS, SIZE, STRIDE, TOGETHER, PHASED, len(seen) > 0),
        constraints("=&r", COUNT + 1, "l", 1, "r", 2, "l", 1, "r", len(given) - 4),
        given, dtype=types(tl.int32, COUNT + 1), is_pure=False, pack=1,
    )  # fmt: skip
    return found[:COUNT], found[COUNT]


@triton.jit
def look(words, GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the words of `collect` as they are now, for its `seen`.

    A thread waits for the loads only when it uses the words.
    """
    return tl.inline_asm_elementwise(
        polling_loop(GROUPS, SIZE, STRIDE, TOGETHER, once=True), constraints("=&r", GROUPS * SIZE, "l", 1, "r", 1),
        words, dtype=types(tl.int32, GROUPS * SIZE), is_pure=False, pack=1,
    )  # fmt: skip


@constexpr_function
def polling_loop(
    groups: int, size: int, stride: int, together: int, phased: bool = False, seen: bool = False, once: bool = False,
) -> str:  # fmt: skip
    """Return the PTX of `collect` or, with `once`, of `look`.

    A poll loads all words of each load that misses a word. The lanes of a warp loop together, by vote. After a timeout,
    missing words become the sentinel, a NaN.

    The operands are, in this order:

    ```
    results    the words; unless `once`, the next delay
    arguments  the place of the first word; how many words are left
               unless `once`, the phase; the place of the error word; its value after a timeout; the delay
               if they were `seen`, the words that `look` found
    ```
    """
    given = groups * size + (not once)
    first_ptr, left, phase, error, step, delay = (f"${given + n}" for n in range(6))
    missing, start, load, check, give_up = [], [], [], [], []
    for n in range(0, groups * size, together):
        words, offset, is_missing = [f"${n + i}" for i in range(together)], n // size * stride + n % size, f"missing{n}"
        into = f"v{together}.b32 {{{', '.join(words)}}}" if together > 1 else f"b32 {words[0]}"
        missing += [is_missing]
        start += [f"setp.gt.s32 {is_missing}, {left}, {offset};"]
        start += [f"mov.b32 {word}, {f'${given + 6 + n + i}' if seen else 0};" for i, word in enumerate(words)]
        load += [f"@{is_missing} ld.relaxed.gpu.global.{into}, [{first_ptr} + {4 * offset}];"]
        if phased:
            check += [f"xor.b32 seen, {words[0]}, {phase};"]
            check += [f"xor.b32 rest, {word}, {phase}; or.b32 seen, seen, rest;" for word in words[1:]]
            check += [f"and.b32 seen, seen, 1; setp.ne.u32 yes, seen, 0; and.pred {is_missing}, {is_missing}, yes;"]
            give_up += [f"@{is_missing} mov.b32 {word}, -1;" for word in words]
        else:  # the sentinel is the greatest word as an unsigned number
            check += [f"mov.b32 seen, {words[0]};", *(f"max.u32 seen, seen, {word};" for word in words[1:])]
            check += [f"setp.eq.u32 {is_missing}, seen, -1;"]
        check += [f"or.pred any, any, {is_missing};"]
    if once:
        return "\n".join([f"{{ .reg .pred {', '.join(missing)};", *start, *load, "}"])
    before, learn = ["bra SEEN;"], []
    if not seen:  # the vote keeps the compiler from removing a loop that computes nothing
        before = [
            f"shr.s32 rest, {delay}, 4;", "DELAY:",
            "add.s32 rest, rest, -1; setp.ge.s32 any, rest, 0; vote.sync.any.pred any, any, -1;", "@any bra DELAY;",
        ]  # fmt: skip
        learn = [
            f"setp.eq.s32 any, polls, 0; selp.b32 rest, -{SHORTER.value}, {LONGER.value}, any;",
            f"add.s32 rest, rest, {delay}; max.s32 rest, rest, 0; min.s32 rest, rest, {LONGEST.value};",
        ]
    return "\n".join([
        "{", f".reg .pred any, yes, lost, {', '.join(missing)}; .reg .b32 seen, polls, rest, step; .reg .b64 error;",
        f"mov.b32 polls, 0; mov.b64 error, {error}; mov.b32 step, {step}; setp.lt.s32 lost, {delay}, 0;",
        *start, *before, "POLL:", *load, "SEEN:", "setp.ne.u32 any, polls, polls;", *check,
        "vote.sync.any.pred any, any, -1;", "@!any bra DONE;", "@lost bra TIMED_OUT;", AGAIN.value,
        "setp.eq.s32 lost, polls, polls;", *give_up, "DONE:", "mov.b32 rest, 0;", *learn,
        f"selp.b32 ${given - 1}, -1, rest, lost;", "}",
    ])  # fmt: skip
