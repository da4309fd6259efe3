"""The random numbers that the regularisers of a call need.

They are drawn once per call, for whole sequences. So a seed gives the same noise on every backend, and with every
division of the time into chunks.
"""

import torch
from torch import Tensor

from ..kernels.tensors import Noise
from .options import Options
from .regularisers import SCALING, Drawing
from .weights import Weights

NO_NOISE = Noise()


def draw(
    layers: list[list[Weights]], sizes: tuple[int, int], dtype: torch.dtype, options: Options
) -> tuple[list[list[Noise]], list[Tensor | None]]:
    """Return the noise of a call by layer and direction, [L][D], and the masks of dropout, [L].

    A mask is bool [T, B, D*P]. It is True where dropout keeps an element of a layer's output. It is None without
    dropout, and for the last layer. `sizes` is (T, B). `dtype` is the dtype that the layers compute in.
    """
    device = layers[0][0].weight_hh.device
    noise: list[list[Noise]] = []
    for size, layer in zip(options.sizes, layers):
        of = Drawing((*sizes, size.width), size.hidden, dtype, device, options.training, options.one_state)
        noise.append([])
        for _ in layer:
            drawn: dict[str, Tensor | None] = {}
            for thing, rate in options.on:
                drawn.update(zip(thing.tensors, thing.draw(rate, of)))
            noise[-1].append(Noise(**drawn))
    kept: list[Tensor | None] = [None] * len(layers)
    for k, size in enumerate(options.sizes[:-1] if options.dropout else ()):
        width = options.directions * size.width
        kept[k] = torch.empty(*sizes, width, dtype=torch.bool, device=device).bernoulli_(1 - options.dropout)
    return noise, kept


def with_weight_drop(layers: list[list[Weights]], options: Options) -> list[list[Weights]]:
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
