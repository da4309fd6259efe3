"""What every backend is given: the recurrence of one layer in one direction."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MOST = 2**31 - 2**16
"""Steps, sequences, gates of all units: kernels count them in int32, and past the last one to the end of a tile."""


class Norms(NamedTuple):
    """The layer norms inside the time loop, of W_hh h and of c in tanh(c); that of W_ih x is outside."""

    gain_hh: Tensor | None  # [4H]
    gain_c: Tensor | None  # [H]
    bias_c: Tensor | None  # [H]
    # What was normalised at every step, before the gains, for backward: with mean 0 and variance 1, and by what scaled.
    unit_hh: Tensor | None = None  # [T, B, 4H]
    scale_hh: Tensor | None = None  # [T, B] float32
    unit_c: Tensor | None = None  # [T, B, H] float32
    scale_c: Tensor | None = None  # [T, B] float32


NO_NORMS = Norms(None, None, None)


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """Weights, initial states and everything else but the input product. Tensors are contiguous.

    Regularisation is recurrent dropout and zoneout. Of the kernels only Triton's take it, peepholes
    and layer norms.

    A reset step begins with h = 0 and c = 0, or with `reset_c`. What W_hh takes of another h is in the input product.
    """

    weight_hh: Tensor  # [4H, P]
    weight_hr: Tensor | None = None  # [P, H]; None without projection, then P = H
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H] float32
    lengths: Tensor | None = None  # [B]
    resets: Tensor | None = None  # [T, B] bool
    reverse: bool = False
    precision: str = "ieee"  # of float32 products: "tf32" or "ieee"
    dropout_h: Tensor | None = None  # [B, P] factors of h in the recurrent product
    zoneout_h: Tensor | None = None  # the share of h that stays as it was: bool [T, B, P], or float32 [] for all
    zoneout_c: Tensor | None = None  # of c: bool [T, B, H], or float32 [] for all
    reset_h: Tensor | None = (
        None  # [T, B, P] h before the steps that are reset, by the step's time: for zoneout_h alone
    )
    reset_c: Tensor | None = None  # [T, B, H] float32 c before them
    weight_peephole: Tensor | None = None  # [3H] to the gates i, f and o
    norms: Norms = NO_NORMS
    side_by_side: int = 1  # as many such layers or directions run at once, on streams of their own

    def __post_init__(self) -> None:
        if self.projected and self.normalised:  # programs would meet as often for the one as for the other
            raise ValueError("expected no projection beside a layer norm inside the time loop")

    @property
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return self.c0.shape[1]

    @property
    def width(self) -> int:
        """Features of h: P with a projection, else H."""
        return self.h0.shape[1]

    @property
    def projected(self) -> bool:
        """Whether h is W_hr m rather than m."""
        return self.weight_hr is not None

    @property
    def normalised(self) -> bool:
        """Whether there is a layer norm inside the time loop."""
        return self.norms.gain_hh is not None or self.norms.gain_c is not None

    @property
    def regularised(self) -> bool:
        """Whether there is recurrent dropout or zoneout."""
        return not self.dropout_h is self.zoneout_h is self.zoneout_c is None


def check_counts(gates: Tensor) -> None:
    """Raise unless T, B and 4H of `gates` [T, B, 4H] are numbers that kernels can count to.

    Raises:
        ValueError: one is larger than MOST.
    """
    for name, count in zip(("steps", "sequences", "gates of all units"), gates.shape):
        if count > MOST:
            raise ValueError(f"expected at most {MOST} {name}, got {count}")
