"""How the programs of one launch exchange what all of them need at the next step; docs/design.md says why it is sound.

No memory is overwritten while a program may still read it, and none is reset inside a launch. Two exchanges:

    words         of 32 bits, each its own ready flag: an element of float32 or two neighbouring ones of half precision.
                  Either every step's words have memory of their own, initialised with a sentinel that `pack` never
                  returns; or two steps alternate in the same memory, and a word's last bit is its step's phase.
    grid_barrier  A counter of arrivals: store everything, count up (release), wait for it (acquire), then load. Or
                  by halves, `arrive` and `wait_for`, with a counter for each tile of sequences.

Waits are bounded. A poll is one load of a counter or of words, and the word after the error word limits the polls of a
wait (timeouts.py). A longer wait times out: the error word is set to step + 1, and the missing values count as NaN.
A program remembers that, since the host may have cleared the error word by then, and looks once where it would wait.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .assembly import operands, types
from .features import INTERPRETED, constexpr_function

# How long a warp waits before it polls first, in sixteenths of a turn of a loop, which takes some 30 clocks. A poll in
# vain costs as much as what it loads, ten turns or more; so next time it waits two turns longer, and each time that
# words are there at once a sixteenth of a turn less.
LONGER, SHORTER, LONGEST = 32, 1, 4096

AGAIN = tl.constexpr("""
add.s32 polls, polls, 1;
and.b32 rest, polls, 63;
setp.ne.s32 any, rest, 0;
@any bra POLL;
ld.relaxed.sys.global.b32 rest, [error];
setp.ne.s32 any, rest, 0;
vote.sync.any.pred any, any, -1;
@any bra TIMED_OUT;
ld.relaxed.sys.global.b32 rest, [error + 4];
setp.lt.s32 any, polls, rest;
vote.sync.all.pred any, any, -1;
@any bra POLL;
st.relaxed.sys.global.b32 [error], step;
TIMED_OUT:
""")
"""PTX after a poll in vain: polls again, or goes on once another program timed out, or this one does. Every 64 polls it
checks whether another one did: the error word is in host memory."""

WAIT = tl.constexpr(f"""{{
.reg .pred any, missing; .reg .b32 seen, polls, rest, step; .reg .b64 error;
mov.b64 error, $4; mov.b32 step, $5; mov.b32 polls, 0;
mov.u32 rest, %tid.x;
setp.ge.u32 any, rest, 32;
setp.le.s32 missing, $3, 0;
@any bra DONE;
@missing bra DONE;
POLL:
ld.acquire.gpu.global.b32 seen, [$1];
sub.s32 seen, seen, $2;
setp.lt.s32 missing, seen, 0;
vote.sync.any.pred missing, missing, -1;
@!missing bra DONE;
{AGAIN.value}
DONE:
bar.red.or.pred missing, 0, missing;
selp.b32 $0, 0, $3, missing;
}}""")
"""PTX of `wait_for`, whose result and arguments are its operands."""


@triton.jit
def pack(x, DTYPE: tl.constexpr):
    """[THREADS] float32, rounded to DTYPE -> words [THREADS]. In half precision an even thread's word holds its element
    and, in the high half, the next thread's; an odd thread's is not used. None is the sentinel, all bits one, a NaN in
    every floating-point format: a NaN that was computed becomes another."""
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
    """[THREADS] int32: for an even thread, its neighbour's."""
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def publish(at, words, mask):
    """Store words for the other programs, by relaxed stores of gpu scope."""
    tl.inline_asm_elementwise(
        "{ .reg .pred yes; setp.ne.b32 yes, $3, 0; @yes st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r", [at, words, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def grid_barrier(arrivals, times, poll_limit, step):
    """All programs wait for each other: what any of them stored before, all can load after.

    `times` is the number of barriers so far, this one included: arrivals are counted up and never reset. Returns the
    poll limit of later barriers, 0 if this one timed out.
    """
    arrive(arrivals.arrivals_ptr, poll_limit)
    return wait_for(arrivals.arrivals_ptr, times * tl.num_programs(0), poll_limit, arrivals.error_ptr, step)


@triton.jit
def arrive(arrivals_ptr, poll_limit):
    """Count this program in: who waits for it can load what it stored before."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    own = tl.where(poll_limit > 0, 1, 0)  # after a timeout none arrives: later arrivals would release others
    tl.atomic_add(arrivals_ptr, own, sem="release")


@triton.jit
def wait_for(arrivals_ptr, expected, poll_limit, error_ptr, step):
    """Wait for so many arrivals; returns the poll limit of later waits, 0 if this one timed out.

    The first warp polls, and a barrier tells the others whether they are there: what is loaded after it comes after the
    acquire. Past 2^31 arrivals the count wraps around below zero, which the difference ignores.
    """
    if INTERPRETED:
        arrived, polls = tl.atomic_add(arrivals_ptr, 0, sem="acquire"), 0
        while (arrived - expected < 0) & (polls < poll_limit):
            arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
            polls = tl.where(tl.load(error_ptr, volatile=True) != 0, poll_limit, polls + 1)
        failed = arrived - expected < 0
        tl.store(error_ptr, step + 1, mask=failed & (poll_limit > 0))
        limit = tl.where(failed, 0, poll_limit)
    else:
        limit = tl.inline_asm_elementwise(
            WAIT, "=r,l,r,r,l,r", [arrivals_ptr, expected, poll_limit, error_ptr, step + 1],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return limit


@triton.jit
def unless_timed_out(x, poll_limit):
    """x, computed from what other programs stored; NaN after a barrier that timed out, since that may be missing."""
    return tl.where(poll_limit > 0, x, float("nan"))


# The words that each thread reads: pointers to the first one, and how many there are from there on; none where not
# positive. They are GROUPS of SIZE neighbours, one STRIDE words after the other.
Words = namedtuple("Words", "at left")
# How a program waits for words at a step: the delay before the first poll, [THREADS], see LONGER, or -1 once a wait of
# the program timed out; the last bit of words that are there, or None if any word but the sentinel is there.
Wait = namedtuple("Wait", "error_ptr step delay phase")


@triton.jit
def collect(
    words, wait, GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TOGETHER: tl.constexpr,  # 1, 2 or 4: neighbours of one load; they lie at a multiple of as many words
    seen=None,  # what `look` returned for the same words, instead of a delay and a first poll
):  # fmt: skip
    """Wait for words that other programs publish -> (a tuple of GROUPS * SIZE [THREADS] int32, zero where there is no
    word; the delay of the next wait for the same words). Loads are relaxed, of gpu scope, and repeated until a word is
    there; each warp polls for itself."""
    PHASED: tl.constexpr = wait.phase is not None
    SEEN: tl.constexpr = seen is not None
    COUNT: tl.constexpr = GROUPS * SIZE
    phase = wait.phase if PHASED else 0
    operands_in = (words.at, words.left, phase, wait.error_ptr, wait.step + 1, wait.delay)
    operands_in = operands_in + seen if SEEN else operands_in
    found = tl.inline_asm_elementwise(
        polling_loop(GROUPS, SIZE, STRIDE, TOGETHER, PHASED, SEEN),
        operands("=&r", COUNT + 1, "l", 1, "r", 2, "l", 1, "r", len(operands_in) - 4),
        operands_in, dtype=types(tl.int32, COUNT + 1), is_pure=False, pack=1,
    )  # fmt: skip
    return found[:COUNT], found[COUNT]


@triton.jit
def collect_at_once(
    words, wait, GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, TOGETHER: tl.constexpr
):
    """The words of `collect`, polled without a delay; but after a timeout they are not waited for."""
    delay = tl.where(wait.delay < 0, -1, 0)
    wait = Wait(wait.error_ptr, wait.step, delay, wait.phase)
    return collect(words, wait, GROUPS, SIZE, STRIDE, TOGETHER)[0]


@triton.jit
def look(words, GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, TOGETHER: tl.constexpr):
    """The words of `collect` as they are now, for its `seen`. A thread does not wait for them until it uses them."""
    return tl.inline_asm_elementwise(
        polling_loop(GROUPS, SIZE, STRIDE, TOGETHER, once=True), operands("=&r", GROUPS * SIZE, "l", 1, "r", 1),
        words, dtype=types(tl.int32, GROUPS * SIZE), is_pure=False, pack=1,
    )  # fmt: skip


@constexpr_function
def polling_loop(
    groups: int, size: int, stride: int, together: int,
    phased: bool = False, seen: bool = False, once: bool = False,
) -> str:  # fmt: skip
    """PTX that loads words until all are there, or a program timed out; missing words become the sentinel, a NaN.

    Operands: the words and, unless they are loaded `once`, the next delay; the place of the first, how many are left;
    unless `once` the phase, the error word, its value, the delay, and the words of a first look if they were `seen`.
    A pass loads at once all groups of neighbours of which one is still missing. A warp's lanes loop together, by vote.
    """
    count = groups * size
    results = count + (not once)
    at, left, phase, error, step, delay = (f"${results + n}" for n in range(6))
    firsts = range(0, count, together)  # the first words of all loads
    offset = {n: n // size * stride + n % size for n in firsts}
    lines = [
        ".reg .pred any, yes, lost, " + ", ".join(f"missing{n}" for n in firsts) + ";",
        ".reg .b32 seen, polls, rest, step;", ".reg .b64 error;", "mov.b32 polls, 0;",
    ]  # fmt: skip
    if not once:
        lines += [f"mov.b64 error, {error};", f"mov.b32 step, {step};", f"setp.lt.s32 lost, {delay}, 0;"]
    for n in firsts:
        lines.append(f"setp.gt.s32 missing{n}, {left}, {offset[n]};")
        lines += [f"mov.b32 ${n + i}, {f'${results + 6 + n + i}' if seen else 0};" for i in range(together)]
    if not (once or seen):  # the vote keeps the compiler from leaving out a loop that computes nothing
        lines += [
            f"shr.s32 rest, {delay}, 4;", "DELAY:", "add.s32 rest, rest, -1;", "setp.ge.s32 any, rest, 0;",
            "vote.sync.any.pred any, any, -1;", "@any bra DELAY;",
        ]  # fmt: skip
    lines += ["bra SEEN;"] * seen + ["POLL:"] * (not once)
    for n in firsts:
        words = ", ".join(f"${n + i}" for i in range(together))
        into = f"v{together}.b32 {{{words}}}" if together > 1 else f"b32 {words}"
        lines.append(f"@missing{n} ld.relaxed.gpu.global.{into}, [{at} + {4 * offset[n]}];")
    if once:
        return "\n".join(["{", *lines, "}"])
    lines += ["SEEN:"] * seen
    lines.append("setp.ne.u32 any, polls, polls;")
    for n in firsts:
        if phased:
            lines.append(f"xor.b32 seen, ${n}, {phase};")
            for i in range(1, together):
                lines += [f"xor.b32 rest, ${n + i}, {phase};", "or.b32 seen, seen, rest;"]
            lines += ["and.b32 seen, seen, 1;", "setp.ne.u32 yes, seen, 0;"]
            lines.append(f"and.pred missing{n}, missing{n}, yes;")
        else:  # the sentinel is the greatest word
            lines.append(f"mov.b32 seen, ${n};")
            lines += [f"max.u32 seen, seen, ${n + i};" for i in range(1, together)]
            lines.append(f"setp.eq.u32 missing{n}, seen, -1;")
        lines.append(f"or.pred any, any, missing{n};")
    lines += ["vote.sync.any.pred any, any, -1;", "@!any bra DONE;", "@lost bra TIMED_OUT;", AGAIN.value]
    lines.append("setp.eq.s32 lost, polls, polls;")
    lines += [f"@missing{n} mov.b32 ${n + i}, -1;" for n in firsts for i in range(together)] if phased else []
    lines += ["DONE:", "mov.b32 rest, 0;"]
    if not seen:
        lines += [
            "setp.eq.s32 any, polls, 0;", f"selp.b32 rest, -{SHORTER}, {LONGER}, any;", f"add.s32 rest, rest, {delay};",
            "max.s32 rest, rest, 0;", f"min.s32 rest, rest, {LONGEST};",
        ]  # fmt: skip
    return "\n".join(["{", *lines, f"selp.b32 ${count}, -1, rest, lost;", "}"])
