"""What regularises the recurrence: recurrent dropout and zoneout. Drawn here, once a call, whatever the backend.

Torch's own generator draws, for one layer and direction after another, so that a seed means the same noise on every
backend.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .weights import Weights


class Noise(NamedTuple):
    """The noise of one layer in one direction for one call; None where there is none."""

    mask_h: Tensor | None = None  # [B, P], 0 or 1 / (1 - p): factors of h in the recurrent product, at every step
    zone_h: Tensor | None = None  # bool [T, B, P], in time: where h stays as it was; in eval() the probability, []
    zone_c: Tensor | None = None  # bool [T, B, H] or [], alike for c

    def within(self, start: int, stop: int) -> "Noise":
        """That of the times from `start` to `stop`."""
        zones = (None if zone is None else zone[start:stop] if zone.dim() else zone for zone in self[1:])
        return Noise(self.mask_h, *zones)

    def present(self) -> list[Tensor]:
        """The tensors that are there."""
        return [tensor for tensor in self if tensor is not None]


NO_NOISE = Noise()


def draw(
    layers: list[list[Weights]],  # [L][D]
    steps: int,
    batch: int,
    dtype: torch.dtype,  # that the layers compute in
    recurrent_dropout: float,
    zoneout: tuple[float, float],  # of h and c
    training: bool,
) -> list[list[Noise]]:
    """The noise of one call, [L][D]."""
    device = layers[0][0].weight_hh.device

    def mask(features: int) -> Tensor | None:
        if not training or not recurrent_dropout:
            return None
        return F.dropout(torch.ones(batch, features, dtype=dtype, device=device), recurrent_dropout)

    def zone(probability: float, features: int) -> Tensor | None:
        if not probability:
            return None
        if training:
            return torch.rand(steps, batch, features, dtype=torch.float32, device=device) < probability
        return torch.full((), probability, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def of_direction(weights: Weights) -> Noise:
        rows, width = weights.weight_hh.shape  # 4H, P
        return Noise(mask(width), zone(zoneout[0], width), zone(zoneout[1], rows // 4))

    return [[of_direction(weights) for weights in layer] for layer in layers]
