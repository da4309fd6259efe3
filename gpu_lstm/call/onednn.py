"""Facts about oneDNN, which runs torch's LSTM on a CPU.

If oneDNN runs an LSTM, torch's autocast casts all of it, even to a dtype in which oneDNN has no LSTM on this CPU. Then
torch's own LSTM raises an error. If oneDNN is off, autocast casts only the products.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch

from ..kernels.private import constant_when_traced, is_exporting


@constant_when_traced
def is_on() -> bool:
    """Whether torch gives LSTMs on a CPU to oneDNN. torch.export turns oneDNN off while it exports."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled or is_exporting())


@constant_when_traced
def takes_whole_lstms(dtype: torch.dtype, grad: bool) -> bool:
    """Whether torch gives oneDNN an LSTM whose input has this dtype. Then autocast casts all of the LSTM."""
    return is_on() and (dtype is torch.float32 or has_lstm(dtype, grad))


@functools.cache
def has_lstm(half: torch.dtype, grad: bool) -> bool:
    """Whether oneDNN has an LSTM in half precision on this CPU, with or without gradients.

    A small LSTM is run to find out. It runs in another thread, where the caller's modes do not act.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_runs_under_autocast, half, grad).result()


def _runs_under_autocast(half: torch.dtype, grad: bool) -> bool:
    """Whether a small LSTM runs under autocast, forward and, if `grad`, backward."""
    x = state = torch.zeros(1, 1, 1, dtype=torch.float32)
    weights = [torch.zeros(4, 1, dtype=torch.float32, requires_grad=True) for _ in range(2)]
    # The end of the outermost block drops the casts of all threads. So the block below must not be the outermost one.
    torch.autocast_increment_nesting()
    try:
        with torch.autocast("cpu", half, cache_enabled=False), torch.set_grad_enabled(grad):
            y, *_ = torch.lstm(x, (state, state), weights, False, 1, 0.0, True, False, False)
        if grad:
            torch.autograd.grad(y.sum(), weights)
    except RuntimeError as error:
        logging.getLogger("gpu_lstm").info("there is no LSTM under autocast to %s on this CPU: %s", half, error)
        return False
    return True
