"""The tensors of one layer in one direction, in one table. Every other list of tensors follows from it.

Gradients and pointers of kernels have the same names. CONTRIBUTING says what a new tensor needs besides a row. Rows of
one role stand together, in the order of the arguments of `layer_loop.inputs_of`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

X, STATE, WEIGHT, VARIANT, RESET, NOISE, TRAVERSAL = "x", "state", "weight", "variant", "reset", "noise", "traversal"
"""Roles. Tensors of role WEIGHT are the parameters of torch's own layer. VARIANT are parameters that torch lacks."""
LOOP = True
BY_LOOP, AFTER, NONE = "by the loop", "after the loop", None
"""How a gradient is computed. BY_LOOP: the time loop returns it, or it is one product with the dgates of the loop.
Verification compares these gradients. AFTER: it follows from the loop's results by products and sums over all steps.
"""
THERE, DIMENSIONS, DTYPE = torch.is_tensor, Tensor.dim, lambda t: t.dtype  # torch.compile traces all three
"""Values of Row.field: whether the tensor is there, its number of dimensions, or its dtype."""
Shape = tuple[int, ...]


class Row(NamedTuple):
    """The facts about a tensor that do not depend on the problem."""

    name: str
    # T steps, B batch size, I input features, H hidden units, P features of h, D columns of W_hh (P, or the units of a
    # head), K numbers per unit in the cell state. In weights and biases of a GRU, 4H stands for 3H.
    size: str
    dtype: torch.dtype | None  # None stands for the dtype of x
    role: str
    loop: bool  # whether the time loop reads it; x, W_ih and b_ih are in the gates
    gradient: str | None  # BY_LOOP, AFTER or NONE
    field: Callable[[Tensor], Any] | None = None  # computes the Problem's field of this name, if there is one
    sample: str = "normal"  # the kind of random numbers in verification, see gpu_lstm/verification/verify.py

    def sized(self, sizes: Mapping[str, int]) -> Shape:
        """Return the size as numbers, from the size of each letter."""
        return tuple([sizes[letter] for letter in self.size.split()])


F32, BOOL = torch.float32, torch.bool
TENSORS = tuple(Row(*row) for row in (
    ("x",               "T B I", None, X,         not LOOP, BY_LOOP),
    ("h0",              "1 B P", None, STATE,     LOOP,     BY_LOOP),
    ("c0",              "K B H", F32,  STATE,     LOOP,     BY_LOOP),  # outside the loop it may have the dtype of x
    ("weight_ih",       "4H I",  None, WEIGHT,    not LOOP, AFTER,   None,       "matrix"),
    ("weight_hh",       "4H D",  None, WEIGHT,    LOOP,     BY_LOOP, None,       "matrix"),
    ("bias_ih",         "4H",    None, WEIGHT,    not LOOP, AFTER),  # from here on a tensor may be None
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
    """Return the names of the tensors of these roles, in order."""
    return tuple(row.name for row in TENSORS if row.role in roles)


LEARNT = tuple(row.name for row in TENSORS if row.gradient is not NONE)
COMPARED = tuple(row.name for row in TENSORS if row.gradient == BY_LOOP)
"""The names of the tensors that may have a gradient, and of the tensors whose gradients verification compares."""


class Noise(NamedTuple):
    """The random tensors that regularise one layer in one direction in one call."""

    dropout_h: Tensor | None = None  # [B, P], factors of h in the recurrent product
    zoneout_h: Tensor | None = None  # [T, B, P], where h stays as it was; or [], the share of h that stays
    zoneout_c: Tensor | None = None  # [T, B, H] or [], the same for c


class Inputs(NamedTuple):
    """All tensors of one layer in one direction.

    W_hh, W_hr, states, lengths and resets may have any strides. Tensors with a dimension T are ordered by time.
    """

    x: Tensor  # [T, B, I]
    h0: Tensor  # [1, B, P], as in torch.nn.LSTM with one layer
    c0: Tensor  # [K, B, H]
    weight_ih: Tensor | None  # [4H, I]; None if x is W_ih x already
    weight_hh: Tensor  # [4H, D]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]; for a GRU the time loop reads it, for an LSTM it is in the gates
    weight_hr: Tensor | None = None  # [P, H]; None without a projection, where P = H
    weight_peephole: Tensor | None = None  # [3H], of the gates i, f and o
    gain_ih: Tensor | None = None  # [4H], of the layer norm of W_ih x, which has bias_ih as its bias
    gain_hh: Tensor | None = None  # [4H], of the layer norm of W_hh h, which has bias_hh as its bias
    gain_c: Tensor | None = None  # [H], of the layer norm of c
    bias_c: Tensor | None = None  # [H], of the layer norm of c
    reset_h: Tensor | None = None  # [T, B, P], the h with which reset steps begin; None stands for zeros
    reset_c: Tensor | None = None  # [T, B, H], the c with which they begin
    dropout_h: Tensor | None = None  # this and the two below as in Noise
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    lengths: Tensor | None = None  # [B]
    resets: Tensor | None = None  # [T, B]
