"""The random numbers of a call, of all its regularisers.

Drawn once per call, for whole sequences: a seed gives the same noise on every backend, and in any chunks of time.
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
    """A call's noise, [L][D]; and which elements of a layer's output dropout keeps, [L] of bool [T, B, D*P].

    The latter is None without dropout, and for the last layer. `sizes` is (T, B); layers compute in `dtype`.
    """
    if not options.noisy:
        return [[NO_NOISE] * len(layer) for layer in layers], [None] * len(layers)
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
    """The weights [L][D] of a call, with what regularises W_hh itself."""
    for thing, rate in options.on:
        layers = [[w._replace(weight_hh=thing.weight_hh(w.weight_hh, rate)) for w in layer] for layer in layers]
    return layers


def scaled(h: Tensor, noise: Noise) -> Tensor:
    """What W_hh multiplies: h with the factors of all regularisers; `noise` may be Inputs, which have its tensors."""
    for thing in SCALING:
        h = thing.scaled(h, noise)
    return h
