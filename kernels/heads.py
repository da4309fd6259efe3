"""Products with W_hh [GATES H, D] outside the time loop.

A row of W_hh has D weights. Without heads, D is the width of h. With several heads, a row has only the weights of its
own head, and D is the number of units of a head.
"""

import torch
from torch import Tensor


def arranged(weight: Tensor, width: int) -> Tensor:
    """Return W_hh as [heads, D, GATES D], once for many products with h. With one head, return W_hh as it is.

    `width` is the number of features of h.
    """
    if (head := weight.shape[1]) == width:
        return weight
    return weight.view(-1, width // head, head, head).permute(1, 3, 0, 2).flatten(2).contiguous()  # a view if D = 1


def product(h: Tensor, weight: Tensor) -> Tensor:
    """Return W_hh h [..., GATES H] for h [..., P]. W_hh may be arranged."""
    weight = arranged(weight, h.shape[-1]) if weight.dim() == 2 else weight
    if weight.dim() == 2:
        return h @ weight.T
    head = weight.shape[1]
    by_head = torch.bmm(h.reshape(-1, len(weight), head).transpose(0, 1), weight)  # [heads, rows, GATES D]
    return by_head.unflatten(2, (-1, head)).permute(1, 2, 0, 3).reshape(*h.shape[:-1], weight[:, 0].numel())


def gradient_of_h(dz: Tensor, weight: Tensor, width: int) -> Tensor:
    """Return W_hh^T dz [..., P] for dz [..., GATES H], where P = `width`."""
    if (head := weight.shape[1]) == width:
        return dz @ weight
    weight = weight.view(-1, width // head, head, head)
    return torch.einsum("...gnd,gnde->...ne", dz.unflatten(-1, weight.shape[:3]), weight).flatten(-2)


def gradient_of_weight(dz: Tensor, h: Tensor, heads: int) -> Tensor:
    """Return dW_hh [GATES H, D] for dz [GATES H, T*B] and h [T*B, H]."""
    h = h.unflatten(-1, (heads, -1)).transpose(0, 1)  # [heads, T*B, D]
    dz = dz.unflatten(0, (-1, h.shape[2]))  # [GATES heads, D, T*B]
    return torch.bmm(dz, h.repeat(len(dz) // heads, 1, 1)).flatten(0, 1)


def dense(weight: Tensor, width: int) -> Tensor:
    """Return W_hh as the matrix [GATES H, P] of a layer without heads, with zeros between the heads. P = `width`."""
    if (head := weight.shape[1]) == width:
        return weight
    heads = width // head
    number = torch.arange(heads, device=weight.device)
    here = (number[:, None] == number)[:, None, :, None]  # [heads, 1, heads, 1]; ONNX has no eye of bool
    return torch.where(here, weight.view(-1, heads, head, 1, head), 0).flatten(3).flatten(0, 2)
