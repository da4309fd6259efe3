"""The random numbers of a call: recurrent dropout, zoneout, dropout between layers, weight drop.

Drawn once per call, for whole sequences: a seed gives the same noise on every backend, and in any chunks of time.
"""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.tensors import Noise
from .options import Options
from .weights import Weights

NO_NOISE = Noise()


def within(noise: Noise, span: slice | None) -> Noise:
    """The noise at the times of a span; None: at all times."""
    if span is None:
        return noise
    return Noise(*[t[span] if t is not None and t.dim() == 3 else t for t in noise])


def draw(
    layers: list[list[Weights]], sizes: tuple[int, int], dtype: torch.dtype, options: Options
) -> tuple[list[list[Noise]], list[Tensor | None]]:
    """The noise of one call, [L][D]; and of each layer's output, [L] of bool [T, B, D*P], which elements dropout keeps.

    The latter is None without dropout, and for the last layer. `sizes` is (T, B), `dtype` that which layers compute in.
    """
    if not options.noisy:
        return [[NO_NOISE] * len(layer) for layer in layers], [None] * len(layers)
    steps, batch = sizes
    device = layers[0][0].weight_hh.device

    def zoneout(probability: float, features: int) -> Tensor | None:
        if not probability:
            return None
        if options.training:
            return torch.rand(steps, batch, features, dtype=torch.float32, device=device) < probability
        return torch.full((), probability, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def of_direction(weights: Weights) -> Noise:
        width, dropout_h = weights.weight_hh.shape[1], None  # P
        if options.recurrent_dropout:
            dropout_h = F.dropout(torch.ones(batch, width, dtype=dtype, device=device), options.recurrent_dropout)
        zoneout_h = zoneout(options.zoneout[0], width)
        if options.one_state:  # c is h
            return Noise(dropout_h, zoneout_h, zoneout_h)
        return Noise(dropout_h, zoneout_h, zoneout(options.zoneout[1], len(weights.weight_hh) // options.cell.rows))

    noise = [[of_direction(weights) for weights in layer] for layer in layers]
    kept: list[Tensor | None] = [None] * len(layers)
    for k, layer in enumerate(layers[:-1] if options.dropout else ()):
        width = sum(weights.weight_hh.shape[1] for weights in layer)
        kept[k] = torch.empty(steps, batch, width, dtype=torch.bool, device=device).bernoulli_(1 - options.dropout)
    return noise, kept


def with_weight_drop(weights: list[list[Weights]], probability: float) -> list[list[Weights]]:
    """The weights [L][D] of a call: DropConnect on W_hh (Merity et al., 2018)."""
    return [[w._replace(weight_hh=F.dropout(w.weight_hh, probability)) for w in layer] for layer in weights]
