"""A cache of weights that torch.autocast has cast: each weight is cast once in a block, as torch's own operators do.

As in torch, a weight that is changed in place inside a block is cast again only in the next block.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.private import is_tracing, is_view, saved_by_product
from .isolation import without_hooks
from .modes import autocasts, is_transformed


def cast(weights: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Return the weights of a layer in another dtype.

    Inside a block of autocast to `dtype` the casts are cached, if torch would cache all of them. See `_is_kept`.
    """
    present = [weight for weight in weights if weight is not None]
    if not (_keeps_casts(present[0], dtype) and all(map(_is_kept, present))):
        return [None if weight is None else weight.to(dtype) for weight in weights]
    casts = _casts_of_this_block(present[0].device.type, dtype)
    for weight in present:
        if weight not in casts:
            casts[weight] = _torchs_cast(weight, dtype)
    return [None if weight is None else casts[weight] for weight in weights]


def _keeps_casts(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast to `dtype` may be cached. Autocast must be on and cast to `dtype`.

    It is not cached while a graph is traced or captured, since the graph has to cast the weights at every run. Nor is
    it cached inside a transform of torch.func.
    """
    if torch.compiler.is_compiling() or is_tracing() or is_transformed() or not autocasts(weight):
        return False
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    return not captured and dtype is torch.get_autocast_dtype(weight.device.type)


def _is_kept(weight: Tensor) -> bool:
    """Whether torch's autocast would cache the cast of this weight: a float32 leaf that requires gradients."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.dtype is not torch.float32 or weight.is_inference():
        return False
    return weight.requires_grad and weight.is_leaf and not is_view(weight)


def _torchs_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cast of a weight that torch's own cache has, so that torch's operators and ours share one tensor.

    torch has no function that returns it. But a product with the weight saves the cast for backward, where we read it.
    The product has no rows, so it costs nothing. Inside a nested block torch's cache may have a cast to the dtype of
    the outer block. There the weight is cast without torch's cache.
    """
    torch.autocast_increment_nesting()
    is_inner = torch.autocast_decrement_nesting() > 1
    with _differentiable(), without_hooks():
        if is_inner:
            return weight.to(dtype)
        no_rows = weight.new_empty(0, len(weight), dtype=dtype).requires_grad_()
        return saved_by_product(torch.matmul(no_rows, weight), weight)


def _casts_of_this_block(device_type: str, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Return the casts of the current block, by weight. They are dropped when the outermost block of autocast ends.

    torch does not report when the block ends, but it drops its own casts then. So the dict is attached to one of them:
    the cast of a weight without elements. The dict is in the metadata of this cast's graph node. To reach the node, the
    weight is given to an operator that casts it. If the cache of autocast is turned off, every call makes a new node,
    with an empty dict.
    """
    weight, factor = _without_elements(device_type, dtype)
    with contextlib.nullcontext() if torch.is_grad_enabled() else _differentiable():
        node = torch.addmm(weight, factor, factor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return node.metadata.setdefault("gpu_lstm", {})  # type: ignore[union-attr]


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """A block in which autograd records, even inside inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@functools.cache
def _without_elements(device_type: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a float32 weight and a factor in `dtype`, both without elements, for `_casts_of_this_block`."""
    with torch.inference_mode(False):
        weight = torch.empty(0, 0, device=device_type, dtype=torch.float32, requires_grad=True)
        return weight, torch.empty(0, 0, device=device_type, dtype=dtype)
