"""Weights and masks as the words that tensor cores read: 32 bits, two elements of half precision."""

import torch
from torch import Tensor


def as_words(x: Tensor, hidden: int) -> Tensor:
    """[*, H] -> [*, W] int32, with zeros past H."""
    missing = -hidden * x.itemsize % 4 // x.itemsize
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    # With H = 1 a tensor counts as contiguous whatever its strides are, which must be multiples of a word.
    if hidden == 1 or not x.is_contiguous() or x.storage_offset() * x.itemsize % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)


def transposed_gates(weight_hh: Tensor, partners: int, gates: int, columns: int) -> Tensor:
    """W_hh [GATES H, D] -> the words of W_hh^T of each partner's gates, [partners, H, GATES / partners, W] int32."""
    by_gate = weight_hh.view(partners, gates // partners, -1, columns, columns)  # [.., .., heads, D, D]
    return as_words(by_gate.permute(0, 2, 4, 1, 3), columns)
