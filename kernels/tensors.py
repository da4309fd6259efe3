"""The tensors of one layer in one direction: one table, from which everything that lists them follows.

Everyone uses these names, for their gradients and for the kernels' pointers, too. To add a tensor, add its row; an
optional one that the time loop reads also needs a flag of its name in `problem.Problem` and in gpu_lstm's `Kind`, a
weight a field in gpu_lstm/call/weights.py. Rows of one role stand together, in the order in which
`layer_loop.inputs_of` is given them.
"""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

X, STATE, WEIGHT, VARIANT, RESET, NOISE, TRAVERSAL = "x", "state", "weight", "variant", "reset", "noise", "traversal"
"""Roles. Weights are what torch's own layer has; those of a variant are ours alone."""
LOOP = True
BY_LOOP, AFTER, NONE = "by the loop", "after the loop", None
"""Where a gradient comes from: the time loop, or products and sums over all steps after it."""


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

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its size, by those of the letters."""
        return tuple([sizes[letter] for letter in self.size.split()])


F32, BOOL = torch.float32, torch.bool
TENSORS = tuple(Row(*row) for row in (
    ("x",               "T B I", None, X,         not LOOP, BY_LOOP),
    ("h0",              "1 B P", None, STATE,     LOOP,     BY_LOOP),  # as torch.nn.LSTM has it for one layer
    ("c0",              "K B H", F32,  STATE,     LOOP,     BY_LOOP),  # outside the loop maybe in the dtype of x
    ("weight_ih",       "4H I",  None, WEIGHT,    not LOOP, AFTER),
    ("weight_hh",       "4H D",  None, WEIGHT,    LOOP,     BY_LOOP),
    ("bias_ih",         "4H",    None, WEIGHT,    not LOOP, AFTER),  # from here on a tensor may be None: not there
    ("bias_hh",         "4H",    None, WEIGHT,    LOOP,     AFTER),  # of a GRU; an LSTM's is in the gates
    ("weight_hr",       "P H",   None, WEIGHT,    LOOP,     AFTER),  # None without projection, then P = H
    ("weight_peephole", "3H",    None, VARIANT,   LOOP,     AFTER),  # to the gates i, f and o
    ("gain_ih",         "4H",    None, VARIANT,   not LOOP, AFTER),  # of the layer norm of W_ih x; its bias: bias_ih
    ("gain_hh",         "4H",    None, VARIANT,   LOOP,     AFTER),  # of that of W_hh h; its bias: bias_hh
    ("gain_c",          "H",     None, VARIANT,   LOOP,     AFTER),  # of that of c
    ("bias_c",          "H",     None, VARIANT,   LOOP,     AFTER),
    ("reset_h",         "T B P", None, RESET,     LOOP,     BY_LOOP),  # h that reset steps begin with; None: zeros
    ("reset_c",         "T B H", F32,  RESET,     LOOP,     BY_LOOP),  # float64 with an x of float64
    ("dropout_h",       "B P",   None, NOISE,     LOOP,     NONE),  # factors of h in the recurrent product
    ("zoneout_h",       "T B P", BOOL, NOISE,     LOOP,     NONE),  # where h stays as it was; or float32 [], a share
    ("zoneout_c",       "T B H", BOOL, NOISE,     LOOP,     NONE),  # where c does
    ("lengths",         "B",     None, TRAVERSAL, LOOP,     NONE),  # int32 or int64
    ("resets",          "T B",   BOOL, TRAVERSAL, LOOP,     NONE),
))  # fmt: skip
BY_NAME = {row.name: row for row in TENSORS}


def names_of(*roles: str) -> tuple[str, ...]:
    """The names of the tensors of these roles, in order."""
    return tuple(row.name for row in TENSORS if row.role in roles)


LEARNT = tuple(row.name for row in TENSORS if row.gradient is not NONE)
KNOWN = tuple(row.name for row in TENSORS if row.name == "reset_h" or (row.role == NOISE and not row.loop))
COMPARED = tuple(row.name for row in TENSORS if row.gradient == BY_LOOP)
"""What may have a gradient; what makes h known before the time loop; whose gradient verification compares."""


Inputs: Any = namedtuple("Inputs", BY_NAME, defaults=[None] * (len(TENSORS) - [*BY_NAME].index("bias_ih")))
"""All of them. W_hh, W_hr, states, lengths and resets may be strided in any way; what has times is ordered by time."""
Noise: Any = namedtuple("Noise", names_of(NOISE), defaults=[None] * len(names_of(NOISE)))
"""What regularises one layer in one direction in one call."""
