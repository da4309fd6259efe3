"""The tensors of one layer in one direction: one table, from which everything that lists them follows.

Everyone uses these names, for their gradients and for the kernels' pointers, too. CONTRIBUTING says what else a new one
needs. Rows of one role stand together, in the order in which `layer_loop.inputs_of` is given them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

X, STATE, WEIGHT, VARIANT, RESET, NOISE, TRAVERSAL = "x", "state", "weight", "variant", "reset", "noise", "traversal"
"""Roles. Weights are what torch's own layer has; those of a variant are ours alone."""
LOOP = True
BY_LOOP, AFTER, NONE = "by the loop", "after the loop", None
"""Where a gradient comes from: the time loop, or products and sums over all steps after it."""
THERE, DIMENSIONS, DTYPE = torch.is_tensor, Tensor.dim, lambda t: t.dtype  # which torch.compile traces
"""What a Problem is told of a tensor."""


class Row(NamedTuple):
    """What is known of a tensor whatever the problem is."""

    name: str
    # T steps, B sequences, I input features, H units, P features of h, D of these that W_hh multiplies with each other:
    # all, or those of a head; K numbers of a unit, see cells.py. A GRU's weights have 3H for 4H.
    size: str
    dtype: torch.dtype | None  # None: that of x
    role: str
    loop: bool  # the time loop reads it; x, W_ih and b_ih are in the gates
    gradient: str | None
    told: Callable[[Tensor], Any] | None = None  # what a Problem is told of it where it is there; None: nothing
    sample: str = "normal"  # its random numbers in verification, see gpu_lstm/verification/verify.py

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its size, by those of the letters."""
        return tuple([sizes[letter] for letter in self.size.split()])


F32, BOOL = torch.float32, torch.bool
TENSORS = tuple(Row(*row) for row in (
    ("x",               "T B I", None, X,         not LOOP, BY_LOOP),
    ("h0",              "1 B P", None, STATE,     LOOP,     BY_LOOP),
    ("c0",              "K B H", F32,  STATE,     LOOP,     BY_LOOP),  # outside the loop maybe in the dtype of x
    ("weight_ih",       "4H I",  None, WEIGHT,    not LOOP, AFTER,   None,       "matrix"),
    ("weight_hh",       "4H D",  None, WEIGHT,    LOOP,     BY_LOOP, None,       "matrix"),
    ("bias_ih",         "4H",    None, WEIGHT,    not LOOP, AFTER),  # from here on a tensor may be None: not there
    ("bias_hh",         "4H",    None, WEIGHT,    LOOP,     AFTER,   THERE),
    ("weight_hr",       "P H",   None, WEIGHT,    LOOP,     AFTER,   None,       "matrix"),
    ("weight_peephole", "3H",    None, VARIANT,   LOOP,     AFTER,   THERE),
    ("gain_ih",         "4H",    None, VARIANT,   not LOOP, AFTER,   None,       "near one"),
    ("gain_hh",         "4H",    None, VARIANT,   LOOP,     AFTER,   THERE,      "near one"),
    ("gain_c",          "H",     None, VARIANT,   LOOP,     AFTER,   THERE,      "near one"),
    ("bias_c",          "H",     None, VARIANT,   LOOP,     AFTER,   THERE,      "near one"),
    ("reset_h",         "T B P", None, RESET,     LOOP,     BY_LOOP, THERE),
    ("reset_c",         "T B H", F32,  RESET,     LOOP,     BY_LOOP, THERE),  # float64 with an x of float64
    ("dropout_h",       "B P",   None, NOISE,     LOOP,     NONE,    THERE,      "factors"),
    ("zoneout_h",       "T B P", BOOL, NOISE,     LOOP,     NONE,    DIMENSIONS, "mask"),  # or a rate, float32 []
    ("zoneout_c",       "T B H", BOOL, NOISE,     LOOP,     NONE,    DIMENSIONS, "mask"),
    ("lengths",         "B",     None, TRAVERSAL, LOOP,     NONE,    DTYPE,      "lengths"),  # int32 or int64
    ("resets",          "T B",   BOOL, TRAVERSAL, LOOP,     NONE,    THERE,      "resets"),
))  # fmt: skip
BY_NAME = {row.name: row for row in TENSORS}


def names_of(*roles: str) -> tuple[str, ...]:
    """The names of the tensors of these roles, in order."""
    return tuple(row.name for row in TENSORS if row.role in roles)


LEARNT = tuple(row.name for row in TENSORS if row.gradient is not NONE)
COMPARED = tuple(row.name for row in TENSORS if row.gradient == BY_LOOP)
"""What may have a gradient; whose gradient verification compares."""


class Noise(NamedTuple):
    """What regularises one layer in one direction in one call."""

    dropout_h: Tensor | None = None  # [B, P], factors of h in the recurrent product
    zoneout_h: Tensor | None = None  # [T, B, P], where h stays as it was; or [], a share of it
    zoneout_c: Tensor | None = None  # [T, B, H], where c does


class Inputs(NamedTuple):
    """All tensors. W_hh, W_hr, states, lengths and resets may have any strides; what has times is ordered by time."""

    x: Tensor  # [T, B, I]
    h0: Tensor  # [1, B, P]; as torch.nn.LSTM has it for one layer
    c0: Tensor  # [K, B, H]
    weight_ih: Tensor | None  # [4H, I]; None: x is W_ih x already
    weight_hh: Tensor  # [4H, D]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]; the time loop reads that of a GRU, an LSTM's is in the gates
    weight_hr: Tensor | None = None  # [P, H]; None: no projection, P = H
    weight_peephole: Tensor | None = None  # [3H], to the gates i, f and o
    gain_ih: Tensor | None = None  # [4H], of the layer norm of W_ih x, whose bias is bias_ih
    gain_hh: Tensor | None = None  # [4H], of that of W_hh h, whose bias is bias_hh
    gain_c: Tensor | None = None  # [H], of that of c
    bias_c: Tensor | None = None  # [H]
    reset_h: Tensor | None = None  # [T, B, P], h that reset steps begin with; None: zeros
    reset_c: Tensor | None = None  # [T, B, H]
    dropout_h: Tensor | None = None  # as in Noise
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    lengths: Tensor | None = None  # [B]
    resets: Tensor | None = None  # [T, B]
