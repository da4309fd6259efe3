"""Within a block of torch.autocast a weight is cast once for all calls, as torch's operators do it, and kept in a dict.

The dict hangs on a cast of torch's own cache, so that it goes when torch drops that one: see `_casts_of_this_block`. A
weight that was changed in place since is cast again.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .modes import autocasts, is_transformed


def cast(weights: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """A layer's weights in another dtype; in an autocast block by the cache."""
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
    """Whether torch's autocast would cache the cast (of a float32 leaf that learns), and no graph is being recorded.

    A graph that is traced or captured has to cast at every run.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or is_transformed() or not autocasts(weight):
        return False
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.dtype is not torch.float32:
        return False
    if weight.is_inference() or not (weight.requires_grad and weight.is_leaf) or weight._is_view():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _casts_of_this_block(device_type: str, dtype: torch.dtype) -> dict[tuple[Tensor, bool], tuple[int, Tensor]]:
    """By weight and whether autograd is on: its version and its cast. Dropped when the outermost autocast block ends.

    torch does not report when that is, but then drops its own casts. So ours are attached to one of these: to the graph
    node of the cast of an empty weight, which is found through an operator that casts it. With autocast's cache turned
    off there is a new node, and an empty dict, at every call.
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
