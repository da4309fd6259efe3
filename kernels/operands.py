"""Weights and masks as the words that tensor cores take (fragments.py): 32 bits, two elements of half precision."""

import torch
from torch import Tensor


def as_words(x: Tensor) -> Tensor:
    """[*, H] -> [*, W] int32; in half precision with one zero more if H is odd."""
    if x.shape[-1] * x.itemsize % 4:
        x = torch.nn.functional.pad(x, (0, 1))
    if not x.is_contiguous() or x.storage_offset() * x.itemsize % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)


def transposed_gates(weight_hh: Tensor) -> Tensor:
    """W_hh [4H, H] -> the words of each gate's W_hh^T, [4, H, W] int32."""
    hidden = weight_hh.shape[1]
    return as_words(weight_hh.view(4, hidden, hidden).transpose(1, 2))
