"""The concurrent interpreter: programs that wait for ever are ended.

That a missing wait is detected is in test_sequence_kernels.py, that all programs end with one that fails in
test_memory_checks.py, and that stores are released in test_exchange_ptx.py.
"""

import pytest
import torch
import triton
import triton.language as tl
from concurrent_interpreter import ConcurrentRun


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


@pytest.mark.skipif(isinstance(endless_kernel, triton.JITFunction), reason="kernels are compiled")
@pytest.mark.parametrize("kernel", [one_never_comes_kernel, endless_kernel], ids=["deadlock", "endless loop"])
def test_what_does_not_end_is_ended(kernel):
    with pytest.raises(TimeoutError) as caught:
        ConcurrentRun(timeout=1.0)(kernel, (3,), out_ptr=torch.zeros(1, dtype=torch.int32))
    message = str(caught.value)
    assert kernel.__name__ in message
    assert [f"({p}, 0, 0) in line" in message for p in range(3)] == [kernel is endless_kernel, True, True]
