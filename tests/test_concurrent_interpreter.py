"""The concurrent interpreter: programs that wait for each other end, and a missing release is detected.

That a missing wait is detected is in test_sequence_kernels.py, and that all programs end with one that fails in
test_memory_checks.py.
"""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from concurrent_interpreter import ConcurrentRun

STEPS, WIDTH = 4, 8
OFTEN = 0.3  # a yield_rate at which something happens at most steps
_zeros = partial(torch.zeros, dtype=torch.int32)


@triton.jit
def next_tile(tile, q):
    return tile * (q + 1)


pytestmark = pytest.mark.skipif(isinstance(next_tile, triton.JITFunction), reason="kernels are compiled")


@triton.jit
def counter_kernel(x_ptr, arrivals_ptr, T, N: tl.constexpr, SEM: tl.constexpr):
    """x[t+1, p] = (sum over q of (q+1) x[t, q] + p) mod 97, waiting for a counter; x is [T+1, programs, N]."""
    p, programs, n = tl.program_id(0), tl.num_programs(0), tl.arange(0, N)
    for t in range(T):
        while tl.atomic_add(arrivals_ptr, 0, sem="acquire") < programs * t:
            pass
        tile = tl.zeros((N,), tl.float32) + p
        for q in range(programs):
            tile += next_tile(tl.load(x_ptr + (t * programs + q) * N + n), q)
        tl.store(x_ptr + ((t + 1) * programs + p) * N + n, tile % 97.0)
        tl.atomic_add(arrivals_ptr, 1, sem=SEM)


@triton.jit
def one_never_comes_kernel(out_ptr):
    """Program 0 ends; the others wait for one arrival more than there are programs."""
    tl.atomic_add(out_ptr, 1)
    if tl.program_id(0) > 0:
        while tl.load(out_ptr, volatile=True) <= tl.num_programs(0):
            pass


@triton.jit
def endless_kernel(out_ptr):
    x = tl.load(out_ptr)
    while x >= 0:
        x = x * 1


def _is_right(programs: int, seed: int, rate: float, sem: str) -> bool:
    x = torch.full((STEPS + 1, programs, WIDTH), float("nan"))
    x[0] = torch.arange(programs * WIDTH).view(programs, WIDTH) % 89
    truth, p = x.clone(), torch.arange(programs)[:, None]
    for t in range(STEPS):
        truth[t + 1] = (((p + 1) * truth[t]).sum(0) + p) % 97
    options = dict(arrivals_ptr=_zeros(1), SEM=sem, T=STEPS, N=WIDTH)
    ConcurrentRun(seed, rate)(counter_kernel, (programs,), x_ptr=x, **options)
    return torch.equal(x, truth)


@pytest.mark.parametrize(("programs", "rate", "seeds", "sem"), [
    (2, 0.0, 1, "release"), (8, 0.05, 1, "release"), (3, OFTEN, 3, "release"), (3, OFTEN, 30, "relaxed"),
])  # fmt: skip
def test_a_missing_release_is_detected_and_only_that(programs, rate, seeds, sem):
    assert all(_is_right(programs, seed, rate, sem) for seed in range(seeds)) == (sem == "release")


@pytest.mark.parametrize("kernel", [one_never_comes_kernel, endless_kernel], ids=["deadlock", "endless loop"])
def test_what_does_not_end_is_ended(kernel):
    with pytest.raises(TimeoutError) as caught:
        ConcurrentRun(most_in_vain=20_000)(kernel, (3,), out_ptr=_zeros(1))
    message = str(caught.value)
    assert kernel.__name__ in message
    assert [f"({p}, 0, 0) in line" in message for p in range(3)] == [kernel is endless_kernel, True, True]
