"""What every backend is given: a problem, which decides the kernels, and the tensors of one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 2**31 - 2**16
"""Steps, sequences, gates of all units: kernels count them in int32, and past the last one to the end of a tile."""


class Problem(NamedTuple):
    """One layer in one direction: all that decides which kernels run it. The key of plans and of their verification."""

    steps: int  # T as far as it matters: 1, or 2 for more
    batch: int  # B
    hidden: int  # H
    dtype: torch.dtype
    projected: int = 0  # P, or 0 without a projection
    precision: str = "ieee"  # of float32 products: "tf32" or "ieee"
    side_by_side: int = 1  # how many such layers or directions run at once and share the card
    reverse: bool = False
    lengths: torch.dtype | None = None  # int32 or int64
    resets: bool = False
    dropout_h: bool = False
    zoneout_h: int | None = None  # dimensions of the tensor: 0 for a rate, 3 for a mask
    zoneout_c: int | None = None
    reset_h: bool = False  # states to reset to
    reset_c: bool = False
    peepholes: bool = False
    norms: tuple[bool, bool, bool] = (False, False, False)  # gain_hh, gain_c, bias_c

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def width(self) -> int:
        """Features of h: P with a projection, else H."""
        return self.projected or self.hidden

    @property
    def regularised(self) -> bool:
        """Whether there is recurrent dropout or zoneout."""
        return self.dropout_h or self.zoneout_h is not None or self.zoneout_c is not None

    @property
    def normalised(self) -> bool:
        """Whether there is a layer norm inside the time loop."""
        return self.norms[0] or self.norms[1]

    @property
    def exact_float32(self) -> bool:
        """Whether products are float32 without rounding, which tensor cores do not support."""
        return self.dtype is torch.float32 and self.precision == "ieee"

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values, for keys of cached results."""
        lengths = None if self.lengths is None else str(self.lengths)
        return self._asdict() | {"dtype": str(self.dtype), "lengths": lengths, "norms": list(self.norms)}


class Pass(NamedTuple):
    """Which part of a problem is run: forward, or backward and which gradients are given."""

    backward: bool = False
    save: bool = True  # forward: keep what backward reads
    dh: bool = True  # backward: whether there is a gradient of h
    dh_n: bool = True  # of h_n


class Recurrence(NamedTuple):
    """The tensors of one call, except for the input product, and what else defines its problem.

    Layer norms are those inside the time loop, of W_hh h and of c in tanh(c); that of W_ih x is outside. A reset step
    begins with h = 0 and c = 0, or with `reset_c`. For another h, its product with W_hh is in the gates.
    """

    weight_hh: Tensor  # [4H, P]
    h0: Tensor  # [B, P]; or [1, B, P], where there is no projection
    c0: Tensor  # [B, H] or [1, B, H], float32
    weight_hr: Tensor | None = None  # [P, H]; None without projection, then P = H
    lengths: Tensor | None = None  # [B]
    resets: Tensor | None = None  # [T, B] bool
    dropout_h: Tensor | None = None  # [B, P] factors of h in the recurrent product
    zoneout_h: Tensor | None = None  # the share of h that stays as it was: bool [T, B, P], or float32 [] for all
    zoneout_c: Tensor | None = None  # of c: bool [T, B, H], or float32 [] for all
    reset_h: Tensor | None = None  # [T, B, P] h before the steps that are reset, by the step's time; for zoneout_h
    reset_c: Tensor | None = None  # [T, B, H] float32 c before them
    weight_peephole: Tensor | None = None  # [3H] to the gates i, f and o
    gain_hh: Tensor | None = None  # [4H]
    gain_c: Tensor | None = None  # [H]
    bias_c: Tensor | None = None  # [H]
    # What was normalised at every step, before the gains, for backward: with mean 0 and variance 1, and by what scaled.
    unit_hh: Tensor | None = None  # [T, B, 4H]
    scale_hh: Tensor | None = None  # [T, B] float32
    unit_c: Tensor | None = None  # [T, B, H] float32
    scale_c: Tensor | None = None  # [T, B] float32
    reverse: bool = False  # the first field that is not a tensor
    precision: str = "ieee"
    side_by_side: int = 1


TENSORS = Recurrence._fields.index("reverse")  # how many of a Recurrence's fields, the first ones


def problem_of(gates: Tensor, r: Recurrence) -> Problem:
    """The problem of a call with `gates` [T, B, 4H]."""
    steps, batch, _ = gates.shape
    dimensions = [None if t is None else t.dim() for t in (r.zoneout_h, r.zoneout_c)]
    return Problem(
        1 if steps == 1 else 2, batch, r.c0.shape[-1], gates.dtype, 0 if r.weight_hr is None else r.h0.shape[-1],
        r.precision, r.side_by_side, r.reverse, None if r.lengths is None else r.lengths.dtype, r.resets is not None,
        r.dropout_h is not None, *dimensions, r.reset_h is not None, r.reset_c is not None,
        r.weight_peephole is not None, (r.gain_hh is not None, r.gain_c is not None, r.bias_c is not None),
    )  # fmt: skip


def end_index(r: Recurrence, first: bool) -> Any:
    """Index into [T, B, *] of every sequence's first or last step; of an arbitrary time if a sequence has no step."""
    if first != r.reverse:
        return 0
    if r.lengths is None:
        return -1
    return (r.lengths.long() - 1).clamp(min=0), torch.arange(len(r.lengths), device=r.lengths.device)
