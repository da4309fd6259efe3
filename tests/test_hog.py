"""A cooperative grid while another kernel holds multiprocessors, such as NCCL's kernel that waits for a slow rank.

docs/first_gpu_run.md explains the results.
"""

import warnings

import pytest
import torch
import triton
import triton.language as tl

import gpu_lstm
from gpu_lstm.kernels.timeouts import POLLS_A_SECOND, error_word

pytestmark = pytest.mark.gpu
HELD, BLOCK = 16, 32768  # multiprocessors, and elements of a block, so many that no other block has registers beside it


@triton.jit
def occupy(memory_ptr, nanoseconds, BLOCK: tl.constexpr):
    """Stay for a given time, with the elements of a block in registers meanwhile."""
    at = memory_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    elements = tl.load(at)
    waited = tl.inline_asm_elementwise(
        """{
        .reg .u64 start, now;
        .reg .pred early;
        mov.u64 start, %globaltimer;
        WAIT:
        mov.u64 now, %globaltimer;
        sub.u64 now, now, start;
        setp.lt.u64 early, now, $1;
        @early bra WAIT;
        mov.u32 $0, 1;
        }""",
        "=r,l", [tl.zeros((256,), tl.int64) + nanoseconds], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(at, elements + tl.max(waited, 0))


@pytest.mark.parametrize(("cell", "seconds", "limit"), [
    ("LSTM", 0.2, None), ("LSTM", 8.0, None), ("LSTM", 8.0, 1.0), ("GRU", 8.0, 1.0),  # a GRU's cells must keep NaN, too
])  # fmt: skip
def test_a_grid_waits_for_multiprocessors_that_another_kernel_holds(cell, seconds, limit):
    lstm = getattr(gpu_lstm, cell)(768, 768, device="cuda", dtype=torch.bfloat16, backend="triton")
    x = torch.randn(64, 16, 768, device="cuda", dtype=torch.bfloat16)
    memory = torch.zeros(HELD * BLOCK, dtype=torch.int32, device="cuda")
    word = error_word(x.device, "cooperative_forward_kernel")
    before, told = int(word[1]), ""
    with torch.no_grad():
        expected, _ = lstm(x)
        occupy[(HELD,)](memory, 1000, BLOCK, num_warps=8)
        torch.cuda.synchronize()
        stream, start, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            occupy[(HELD,)](memory, int(seconds * 1e9), BLOCK, num_warps=8)
            end.record()
        try:
            word[1] = before if limit is None else int(limit * POLLS_A_SECOND)
            y, _ = lstm(x)
            gpu_lstm.check()
        except RuntimeError as error:
            told = str(error)
        finally:
            word[1] = before
    assert start.elapsed_time(end) >= 1e3 * seconds, "nothing was held"
    assert (memory == 2).all()
    if told and limit is not None:
        assert "cooperative_forward_kernel timed out at step 1" in told, "h0 is there, the first h is not"
        assert y[1:].isnan().all()
        warnings.warn("blocks of a cooperative grid start one by one on this card", stacklevel=1)
    else:
        assert not told
        assert torch.equal(y, expected)
