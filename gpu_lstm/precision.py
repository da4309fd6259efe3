"""How products of float32 tensors are taken inside the kernels, and cell states that are kept in float32.

The recurrent product obeys the switch that torch.nn.LSTM itself obeys on CUDA, cuDNN's: TF32 unless the user
turned it off (``torch.backends.cudnn.allow_tf32`` or ``torch.backends.cudnn.rnn.fp32_precision``). Products over
all steps go through torch.matmul and obey ``torch.backends.cuda.matmul``.
"""

import torch
import torch.backends.cudnn.rnn as cudnn_rnn
from torch import Tensor

from .transforms import constant_when_traced


def recurrent_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for the recurrent product in `dtype`: "tf32" or "ieee"."""
    if dtype is torch.float32 and _cudnn_takes_tf32():
        return "tf32"
    return "ieee"


def _cudnn_takes_tf32() -> bool:
    if hasattr(cudnn_rnn, "fp32_precision"):  # torch 2.9 and newer: a switch for each kind of operator
        return cudnn_rnn.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def is_exact(c: Tensor, x: Tensor) -> bool:
    """Whether a cell state is float32 beside an input of half precision: not rounded, as kernels keep it."""
    return c.dtype is torch.float32 and x.dtype in (torch.float16, torch.bfloat16) and not autocasts(x)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    if not torch._C._is_any_autocast_enabled():  # as torch.nn.LSTM asks: it takes no time
        return False
    return _knows_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


@constant_when_traced
def _knows_autocast(device_type: str) -> bool:
    """Whether there is autocast for a type of device (for "meta" there is none). Not to be traced: torch 2.8 cannot."""
    return torch.amp.is_autocast_available(device_type)
