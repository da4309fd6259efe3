"""What regularises the recurrence: recurrent dropout, zoneout, weight drop. Drawn here, once a call, for all backends.

Torch's own generator draws, for one layer and direction after another, so that a seed means the same noise on every
backend.
"""

from __future__ import annotations  # torch 2.8 does not trace a function whose annotations it has to evaluate

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .weights import Weights

REGULARISERS = ("recurrent_dropout", "zoneout", "weight_drop")  # attributes of the modules


class Noise(NamedTuple):
    """The noise of one layer in one direction for one call; None where there is none."""

    mask_h: Tensor | None = None  # [B, P], 0 or 1 / (1 - p): factors of h in the recurrent product, at every step
    zone_h: Tensor | None = None  # bool [T, B, P], in time: where h stays as it was; in eval() the probability, []
    zone_c: Tensor | None = None  # bool [T, B, H] or [], alike for c

    def within(self, start: int, stop: int) -> Noise:
        """That of the times from `start` to `stop`."""
        zones = [zone[start:stop] if zone is not None and zone.dim() else zone for zone in (self.zone_h, self.zone_c)]
        return Noise(self.mask_h, zones[0], zones[1])

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


def set_regularisation(
    module: Any,
    recurrent_dropout: float,
    zoneout: float | tuple[float, float],
    weight_drop: float,
) -> None:
    """The arguments as attributes, checked; zoneout as one number where it is the same for h and c."""
    for name, value in (("recurrent_dropout", recurrent_dropout), ("weight_drop", weight_drop)):
        if not is_probability(value):
            raise ValueError(
                f"{name} should be a number in range [0, 1] representing the probability of an element being zeroed, "
                f"got {value!r}"
            )
    pair = of_h_and_c(zoneout)
    if len(pair) != 2 or not all(map(is_probability, pair)):
        raise ValueError(
            "zoneout should be a number in range [0, 1] representing the probability of an element staying as it was, "
            f"or a pair of them for h and c, got {zoneout!r}"
        )
    h, c = map(float, pair)
    module.recurrent_dropout, module.weight_drop = float(recurrent_dropout), float(weight_drop)
    module.zoneout = h if h == c else (h, c)


def is_probability(value: object) -> bool:
    """Whether it is a number from 0 to 1."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def of_h_and_c(zoneout: float | tuple[float, float]) -> tuple[float, float]:
    """The module's attribute as a pair."""
    return zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)


def noise_of(module: Any) -> str | None:
    """The name of what regularises the recurrence of a call."""
    if any(of_h_and_c(module.zoneout)):
        return "zoneout"
    return "recurrent_dropout" if module.training and module.recurrent_dropout else None


def with_weight_drop(module: Any, layers: list[list[Weights]]) -> list[list[Weights]]:
    """The weights [L][D] of a call: DropConnect on W_hh, when training."""
    if not module.training or not module.weight_drop:
        return layers
    return [[w.with_weight_hh(F.dropout(w.weight_hh, module.weight_drop)) for w in layer] for layer in layers]
