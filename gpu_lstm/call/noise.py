"""The random numbers that the regularisers of a call need.

They are drawn once per call, for whole sequences. So a seed gives the same noise on every backend, and with every
division of the time into chunks.
"""

from __future__ import annotations  # torch.compile tries to evaluate annotations of nested functions, and fails

import torch
from torch import Tensor

from ..kernels.tensors import Noise
from .options import Options
from .regularisers import SCALING, Drawing
from .weights import AllWeights, Size

NO_NOISE = Noise()


def draw(
    layers: AllWeights, sizes: tuple[int, int], dtype: torch.dtype, options: Options
) -> tuple[list[list[Noise]], list[Tensor | None]]:
    """Return the noise of a call by layer and direction, [L][D], and the masks of dropout, [L].

    A mask is bool [T, B, D*P]. It is True where dropout keeps an element of a layer's output. It is None without
    dropout, and for the last layer. `sizes` is (T, B). `dtype` is the dtype that the layers compute in.
    """
    device = layers[0][0].weight_hh.device

    def noise_of(size: Size) -> Noise:
        of = Drawing((*sizes, size.width), size.hidden, dtype, device, options.training, options.one_state)
        return Noise(**{name: t for thing, rate in options.on for name, t in zip(thing.tensors, thing.draw(rate, of))})

    def mask_of(size: Size) -> Tensor | None:
        if not options.dropout:
            return None
        mask = torch.empty(*sizes, options.directions * size.width, dtype=torch.bool, device=device)
        return mask.bernoulli_(1 - options.dropout)

    noise = [[noise_of(size) for _ in layer] for size, layer in zip(options.sizes, layers)]
    return noise, [*map(mask_of, options.sizes[:-1]), None]


def with_weight_drop(layers: AllWeights, options: Options) -> AllWeights:
    """Return the weights [L][D] of a call, with W_hh as the regularisers changed it."""
    for thing, rate in options.on:
        layers = [[w._replace(weight_hh=thing.weight_hh(w.weight_hh, rate)) for w in layer] for layer in layers]
    return layers


def scaled(h: Tensor, noise: Noise) -> Tensor:
    """Return h times the factors of all regularisers. W_hh multiplies this product instead of h.

    `noise` may also be Inputs, which have the same tensors.
    """
    for thing in SCALING:
        h = thing.scaled(h, noise)
    return h
