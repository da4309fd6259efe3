"""How products of float32 tensors are taken inside the kernels, cell states that are kept in float32, autocast.

The recurrent product obeys the switch that torch.nn.LSTM itself obeys on CUDA, cuDNN's: TF32 unless the user
turned it off (``torch.backends.cudnn.allow_tf32`` or ``torch.backends.cudnn.rnn.fp32_precision``). Products over
all steps go through torch.matmul and obey ``torch.backends.cuda.matmul``.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.backends.cudnn.rnn as cudnn_rnn
from torch import Tensor

from .transforms import constant_when_traced, is_transformed


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


def cast(weights: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """A layer's weights in another dtype; in an autocast block once for all calls, as torch's operators do.

    Anew where one was changed in place since.
    """
    present = [weight for weight in weights if weight is not None]
    if not all(map(_is_kept, present)):
        return [None if weight is None else weight.to(dtype) for weight in weights]
    casts, differentiable = _casts_of_this_block(present[0].device.type, dtype), torch.is_grad_enabled()

    def of(weight: Tensor) -> Tensor:
        version, result = casts.get((weight, differentiable), (None, weight))
        if version != weight._version:
            result = weight.to(dtype)
            casts[weight, differentiable] = weight._version, result
        return result

    return [None if weight is None else of(weight) for weight in weights]


def _is_kept(weight: Tensor) -> bool:
    """Whether torch's autocast would keep the cast, that of a float32 leaf that learns, and no graph is being recorded.

    A graph that is traced or captured has to cast at every run.
    """
    if torch.compiler.is_compiling() or is_transformed() or not autocasts(weight):
        return False
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.dtype is not torch.float32:
        return False
    if weight.is_inference() or not (weight.requires_grad and weight.is_leaf) or weight._is_view():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _casts_of_this_block(device_type: str, dtype: torch.dtype) -> dict[tuple[Tensor, bool], tuple[int, Tensor]]:
    """By weight and whether autograd is on: its version and its cast. Gone when the outermost autocast block ends.

    torch tells nobody when that is, but then forgets its own casts. So ours are kept by one of them: by the graph node
    of the cast of a weight without elements, which is found through an operator that casts it. With autocast's cache
    turned off there is a new node, and an empty dict, at every call.
    """
    weight, factor = _without_elements(device_type, dtype)
    with contextlib.nullcontext() if torch.is_grad_enabled() else _differentiable():
        node = torch.addmm(weight, factor, factor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return node.metadata.setdefault("gpu_lstm", {})  # type: ignore[union-attr]


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


@functools.cache
def _without_elements(device_type: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        weight = torch.empty(0, 0, device=device_type, dtype=torch.float32, requires_grad=True)
        return weight, torch.empty(0, 0, device=device_type, dtype=dtype)
