"""oneDNN, which torch gives an LSTM on a CPU.

torch's autocast casts all of such an LSTM, also to a dtype in which oneDNN has none on this CPU: torch's own raises.
With oneDNN off it casts the products alone.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch

from ..kernels.private import constant_when_traced, is_exporting


@constant_when_traced
def is_on() -> bool:
    """Whether torch gives LSTMs on a CPU to oneDNN. torch.export turns it off for as long as it exports."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled or is_exporting())


@constant_when_traced
def takes_whole_lstms(dtype: torch.dtype, grad: bool) -> bool:
    """Whether torch gives oneDNN an LSTM whose input has this dtype, and so casts all of it under autocast."""
    return is_on() and (dtype is torch.float32 or has_lstm(dtype, grad))


@functools.cache
def has_lstm(half: torch.dtype, grad: bool) -> bool:
    """Whether oneDNN has an LSTM in half precision on this CPU, with gradients or without.

    It is tried in a thread, where no mode of the caller acts.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_runs_under_autocast, half, grad).result()


def _runs_under_autocast(half: torch.dtype, grad: bool) -> bool:
    x = state = torch.zeros(1, 1, 1, dtype=torch.float32)
    weights = [torch.zeros(4, 1, dtype=torch.float32, requires_grad=True) for _ in range(2)]
    torch.autocast_increment_nesting()  # in this thread; the end of the outermost block drops the casts of all
    try:
        with torch.autocast("cpu", half, cache_enabled=False), torch.set_grad_enabled(grad):
            y, *_ = torch.lstm(x, (state, state), weights, False, 1, 0.0, True, False, False)
        if grad:
            torch.autograd.grad(y.sum(), weights)
    except RuntimeError as error:
        logging.getLogger("gpu_lstm").info("there is no LSTM under autocast to %s on this CPU: %s", half, error)
        return False
    return True
