"""The parameters of kernels: named tuples of pointers that belong together, and one tuple of all constants.

A pointer's name and shape mean the same in every kernel. There are H units and P features of h, where P = H without a
projection. Some kernels have these pointers, too:

```
lengths   [B]
resets    [T*B]
error     [1] int32, and after it the poll limit, see timeouts.py
```
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..memory import Arguments

Pointer = Any  # to a tensor of the shape and dtype beside it, by default in the dtype of the call; None if it is absent


class Sizes(NamedTuple):
    """The constants of a kernel: the sizes of its problem, and how the plan divides it."""

    CELL: str
    GATES: int  # the rows of W_hh that a unit has, which belong to its last GATES gates
    FROM_X: int  # the number of gates, from the first on, that have numbers in them before the loop
    KEPT: int  # the float32 numbers that a unit has in c, see kernels/cells.py
    EMPTY: float  # the last of these numbers before the first step, and after a reset
    H: int  # units, or P in a part of a step that begins with W_hr m
    HEADS: int
    D: int  # the units of a head, H without heads
    REVERSE: bool
    PRECISION: str  # the precision of products of float32
    PER: int  # the elements of a word of 32 bits
    W: int  # the words of a row of D elements
    BLOCK_B: int  # the sequences of a tile
    UNITS: int  # the units of a tile, or of a program
    TILES: int  # the tiles of UNITS units that make D units
    WARPS: int
    # The following ones are set by the `sizes` of a family:
    K: int = 0  # the terms of a sum in one part of backward; in the cooperative family, the words of a piece
    BLOCK_K: int = 0  # the elements of K that are multiplied at a time
    PARTS: int = 1  # the parts of K in backward
    AHEAD: bool = False  # whether the next batch tile is loaded before the cells of this one
    CHUNKS: int = 0  # the chunks of K that a warp multiplies
    STRIDE: int = 0  # the words of K from one chunk of a warp to the next
    PARTNERS: int = 1  # in backward, the programs that share the gates of their units
    OWN: int = 0  # how many of the last GATES gates each partner multiplies
    PIECES: int = 1  # the pieces of K, each for a share of the warps
    ZEROS: int = 0  # the pieces, from the first on, that are multiplied by zeros
    START: str = "z"  # where a launch of the pointwise family begins in a step, see by_steps.Part
    END: str = "h"  # and where it ends


class HiddenPointers(NamedTuple):
    """Pointers to h, and to the tensors that are read or written with it."""

    h0_ptr: Pointer  # [B, P]
    h_ptr: Pointer  # [T*B, P] out: h of every step
    h_n_ptr: Pointer  # [B, P] out: h of every sequence's last step
    dropout_h_ptr: Pointer  # [B, P]
    zoneout_h_ptr: Pointer  # [T*B, P], or one float32
    reset_h_ptr: Pointer  # [T*B, P], read only with zoneout_h


class CellPointers(NamedTuple):
    """Pointers to gates and c, and to the tensors that are read or written with them."""

    gates_ptr: Pointer  # [T*B, 4H] x W_ih^T + b_ih, and b_hh except for a GRU; out with c_ptr: the activated gates
    weight_peephole_ptr: Pointer  # [3H]
    bias_hh_ptr: Pointer  # [GATES H], only for a GRU
    c0_ptr: Pointer  # [KEPT, B, H] float32
    c_ptr: Pointer  # [T*B, H] float32 out: the first number of c, for backward
    c_n_ptr: Pointer  # [KEPT, B, H] float32 out: c after every step; in the cooperative family it begins as c0
    zoneout_c_ptr: Pointer  # [T*B, H], or one float32
    reset_c_ptr: Pointer  # [T*B, H] float32


class HiddenBackward(NamedTuple):
    """Pointers to gradients of h, and to the tensors that are read with them."""

    dh_ptr: Pointer  # [T*B, P] the given gradient of h
    dh_n_ptr: Pointer  # [B, P] the given gradient of h_n
    dropout_h_ptr: Pointer  # [B, P]
    zoneout_h_ptr: Pointer  # [T*B, P], or one float32
    dh_from_zoneout_ptr: Pointer  # [B, P] float32 zeros; out: the gradient of h before a step through zoneout
    dreset_h_ptr: Pointer  # [T*B, P] float32 zeros; out, only at resets: the same gradient


class CellBackward(NamedTuple):
    """Pointers to gradients of gates and of c, and to the tensors that are read with them."""

    dgates_ptr: Pointer  # [T*B, 4H] out: the gradient of the pre-activations
    weight_peephole_ptr: Pointer  # [3H]
    dc_ptr: Pointer  # [KEPT, B, H] float32, the gradient of c_n; out: the gradient of c before every step
    zoneout_c_ptr: Pointer  # [T*B, H], or one float32
    dreset_c_ptr: Pointer  # [T*B, H] float32 zeros; out, only at resets: the gradient of c before the step


class Saved(NamedTuple):
    """Pointers to the tensors that forward saved for backward."""

    gates_ptr: Pointer  # [T*B, 4H] the activated gates
    c_ptr: Pointer  # [T*B, H] float32
    c0_ptr: Pointer  # [KEPT, B, H] float32
    reset_c_ptr: Pointer  # [T*B, H] float32


class Arrivals(NamedTuple):
    """Pointers to the counters of programs that have arrived, and to the error word."""

    arrivals_ptr: Pointer  # [HEADS, batch tiles] int32; None if no program waits, see `waits` in plans/tiles.py
    error_ptr: Pointer  # [1] int32, and after it the poll limit


def name_in_profiles(kernel: str) -> Callable[[Any], str]:
    """Return a function for Triton's `repr`, which names a compiled kernel with its cell: gru_step_forward_kernel."""
    return lambda compiled: f"{compiled.constants['S'].CELL}_{kernel}"


def names_of(kernel: Any) -> list[tuple[str, ...]]:
    """Return the names of the pointers in each parameter of a kernel. A parameter that is no tuple has its own name.

    The last parameter, Sizes, is left out.
    """
    types = kernel.fn.__annotations__
    return [getattr(types.get(name), "_fields", (name,)) for name in kernel.arg_names[:-1]]


def in_tuples(kernel: Any, arguments: Arguments) -> Arguments:
    """Convert arguments by the names of pointers to arguments by the names of the kernel's parameters."""
    rest, types = dict(arguments), kernel.fn.__annotations__
    for name in kernel.arg_names:
        if hasattr(types.get(name), "_fields"):
            rest[name] = types[name](*(rest.pop(field, None) for field in types[name]._fields))
    return rest
