"""Layer norms (norm.py) in the cooperative family. ROW threads of one warp have the cells of a sequence: they sum up in
two numbers, exchange these with all programs of the group, and add up by shuffles."""

from collections import namedtuple

import triton
import triton.language as tl

from .exchange import Wait, Words, collect, in_phase, pack, publish
from .features import nothing
from .fragments import SEQUENCES
from .norm import EPS, normalise, normed_backward, squares_about, unit_backward, units_of

# What sums over all units need: the Sequences of the threads' cells; [THREADS] whether each has one; the Wait for the
# other programs' numbers.
Group = namedtuple("Group", "sequence is_cell wait")


@triton.jit
def sum_of_row(x):
    """[THREADS] float32 -> the sum over the threads of each sequence, for all of them: without a barrier."""
    THREADS: tl.constexpr = x.shape[0]
    total = tl.sum(tl.reshape(x, (SEQUENCES, THREADS // SEQUENCES)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (SEQUENCES, THREADS // SEQUENCES)), (THREADS,))


@triton.jit
def exchange_pairs(
    first, second,  # [THREADS] float32, the same in a sequence's whole row: of the program's units
    pairs_ptr,  # [B, programs, 2] int32: float32 words, whose last bits are one beforehand
    group, S: tl.constexpr,
):  # fmt: skip
    """Of each of a thread's programs, local + n ROW: (first number, second number, number of its units); zeros where
    there is none. Programs without units do nothing. It is called at every step: no phase is skipped."""
    THREADS: tl.constexpr = first.shape[0]
    ROW: tl.constexpr = THREADS // SEQUENCES
    PROGRAMS: tl.constexpr = S.TILES
    COUNT: tl.constexpr = (PROGRAMS + ROW - 1) // ROW
    local = tl.arange(0, THREADS) % ROW
    program = tl.zeros_like(local) + tl.program_id(0)
    is_there = group.sequence.in_batch & (program < PROGRAMS)
    pairs_ptr += group.sequence.index.to(tl.int64) * (2 * PROGRAMS)
    word = in_phase(pack(tl.where(local == 0, first, second), tl.float32), group.wait.phase)
    publish(pairs_ptr + 2 * program + local, word, is_there & (local < 2))
    pairs = Words(pairs_ptr + 2 * local, tl.where(is_there, 2 * (PROGRAMS - local), 0))
    # Polled without a delay; but after a timeout they are not waited for.
    wait = Wait(group.wait.error_ptr, group.wait.step, tl.where(group.wait.delay < 0, -1, 0), group.wait.phase)
    words = collect(pairs, wait, nothing(), COUNT, 2, 2 * ROW, 2)[0]
    found = ()
    for n in tl.static_range(COUNT):
        one, other = words[2 * n].to(tl.float32, bitcast=True), words[2 * n + 1].to(tl.float32, bitcast=True)
        found = found + ((one, other, units_of(local + n * ROW, S)),)
    return found


@triton.jit
def moments_of_group(v, pairs_ptr, group, S: tl.constexpr):
    """(mean, scale) over all units of v, a tuple of [THREADS] of the thread's cell; each [THREADS]."""
    COUNT: tl.constexpr = len(v)
    zeros = tl.zeros(v[0].shape, tl.float32)
    total, squares = zeros, zeros
    for n in tl.static_range(COUNT):
        total += tl.where(group.is_cell, v[n], 0.0)
    of_program = sum_of_row(total) / (COUNT * units_of(tl.program_id(0), S))
    for n in tl.static_range(COUNT):
        distance = tl.where(group.is_cell, v[n] - of_program, 0.0)
        squares += distance * distance
    of_programs = exchange_pairs(of_program, sum_of_row(squares), pairs_ptr, group, S)
    # About this program's mean, so that both sums can be computed at once. Little cancels: it is no further from the
    # mean of all than the square root of the number of programs times the deviation.
    shift, squares = zeros, zeros
    for n in tl.static_range(len(of_programs)):
        mean, its_squares, units = of_programs[n]
        shift += units * (mean - of_program)
        squares += squares_about(of_program, mean, its_squares, COUNT * units)
    shift = sum_of_row(shift) / S.H
    squares = sum_of_row(squares) - COUNT * S.H * shift * shift
    return of_program + shift, tl.rsqrt(squares / (COUNT * S.H) + EPS)


@triton.jit
def means_of_group(d, d_unit, pairs_ptr, group, lost, COUNT: tl.constexpr, S: tl.constexpr):
    """The sums over all units of d and d_unit, [THREADS] of the thread's cell and zero where there is none, divided by
    COUNT * H, [THREADS]: the means of `normalise_backward`. Last, whether a program timed out, now or, `lost`, before:
    what depends on it is NaN, past resets, too."""
    d = tl.where(lost, float("nan"), d)
    of_programs = exchange_pairs(sum_of_row(d), sum_of_row(d_unit), pairs_ptr, group, S)
    d, d_unit = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for n in tl.static_range(len(of_programs)):
        d += of_programs[n][0]
        d_unit += of_programs[n][1]
    mean_d, mean_d_unit = sum_of_row(d) / (COUNT * S.H), sum_of_row(d_unit) / (COUNT * S.H)
    error_ptr = group.wait.error_ptr + tl.zeros_like(mean_d).to(tl.int32)
    lost |= tl.load(error_ptr, mask=mean_d != mean_d, other=0, volatile=True) != 0
    return mean_d, mean_d_unit, lost


@triton.jit
def normalise_over_group(v, norm, affine, group, S: tl.constexpr):
    """v of the thread's cell -> LN(v)."""
    if norm.gain_ptr is not None:
        mean, scale = moments_of_group(v, norm.pairs_ptr, group, S)
        v = normalise(v, mean, scale, affine)
    return v


@triton.jit
def backward_over_group(d, norm, normed, group, lost, DTYPE: tl.constexpr, S: tl.constexpr):
    """Gradient of LN(v), as it is stored in DTYPE -> (of v; lost, see means_of_group)."""
    if norm.gain_ptr is not None:
        d_unit, sum_d, sum_d_unit = unit_backward(d, normed, DTYPE)
        mean_d, mean_d_unit, lost = means_of_group(sum_d, sum_d_unit, norm.pairs_ptr, group, lost, len(d), S)
        d = normed_backward(d_unit, normed, mean_d, mean_d_unit)
    return d, lost
