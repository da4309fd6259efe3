"""What kernels are passed: pointers, in named tuples of those that belong together, and one of all constants.

A pointer's name and shape mean the same in every kernel, for H units and P features of h (H without a projection).
Besides those here: lengths [B]; resets [T*B]; error [1] int32, and after it the poll limit, see timeouts.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Pointer = Any  # to a tensor of the shape that stands beside it, in the dtype of the call if none does; None if absent


class Sizes(NamedTuple):
    """The constants of a kernel: what its problem is, and how the plan divides it."""

    CELL: str
    GATES: int  # How many rows of W_hh a unit has. They belong to its last GATES gates.
    FROM_X: int  # How many of the four gates, from the first on, arrive with numbers in them.
    KEPT: int  # float32 numbers that a unit's c has, see kernels/cells.py
    EMPTY: float  # the last of them before the first step, and after a reset
    H: int  # units; P in a part of a step that begins with W_hr m
    HEADS: int
    D: int  # units of a head: without heads all H
    REVERSE: bool
    PRECISION: str  # of products of float32
    PER: int  # elements of a word of 32 bits
    W: int  # words of a row of D elements
    BLOCK_B: int  # sequences of a tile
    UNITS: int  # of a tile, or of a program
    TILES: int  # of UNITS units, that have D
    WARPS: int
    # Of families, by their `sizes`:
    K: int = 0  # what a product adds up: backward of a tile, of a part; in the cooperative family, words of a piece
    BLOCK_K: int = 0  # of K, multiplied at a time
    PARTS: int = 1  # of K, backward
    AHEAD: bool = False  # as planning.py explains it
    CHUNKS: int = 0  # of K, which a warp multiplies
    STRIDE: int = 0  # words of K from one chunk of a warp to the next
    PARTNERS: int = 1  # backward, which share the gates of their units
    OWN: int = 0  # of the last gates, how many each of them multiplies
    PIECES: int = 1  # of K, each for a share of the warps
    ZEROS: int = 0  # of these, the first ones, that are multiplied by zeros
    START: str = "z"  # what a launch of the pointwise family computes of a step, see by_steps.Part
    END: str = "h"


class HiddenPointers(NamedTuple):
    """Pointers to h, and to what is read or written with it."""

    h0_ptr: Pointer  # [B, P]
    h_ptr: Pointer  # [T*B, P] out: of every step
    h_n_ptr: Pointer  # [B, P] out: of every sequence's last
    dropout_h_ptr: Pointer  # [B, P]
    zoneout_h_ptr: Pointer  # [T*B, P], or one float32
    reset_h_ptr: Pointer  # [T*B, P], read with zoneout_h alone


class CellPointers(NamedTuple):
    """Pointers to gates and c, and to what is read or written with them."""

    gates_ptr: Pointer  # [T*B, 4H] x W_ih^T + b_ih, of an LSTM + b_hh; out, if c_ptr: activated
    weight_peephole_ptr: Pointer  # [3H]
    bias_hh_ptr: Pointer  # [GATES H] of a GRU
    c0_ptr: Pointer  # [KEPT, B, H] float32
    c_ptr: Pointer  # [T*B, H] float32 out, for backward: the first number
    c_n_ptr: Pointer  # [KEPT, B, H] float32 out: c after every step; in the cooperative family c0 beforehand
    zoneout_c_ptr: Pointer  # [T*B, H], or one float32
    reset_c_ptr: Pointer  # [T*B, H] float32


class HiddenBackward(NamedTuple):
    """Pointers to gradients of h, and to what is read with them."""

    dh_ptr: Pointer  # [T*B, P] given
    dh_n_ptr: Pointer  # [B, P] given
    dropout_h_ptr: Pointer  # [B, P]
    zoneout_h_ptr: Pointer  # [T*B, P], or one float32
    dh_from_zoneout_ptr: Pointer  # [B, P] float32 zeros; out: gradient of h before every step, as far as it stayed
    dreset_h_ptr: Pointer  # [T*B, P] float32 zeros; out at resets: the same


class CellBackward(NamedTuple):
    """Pointers to gradients of gates and of c, and to what is read with them."""

    dgates_ptr: Pointer  # [T*B, 4H] out: of the pre-activations
    weight_peephole_ptr: Pointer  # [3H]
    dc_ptr: Pointer  # [KEPT, B, H] float32 of c_n; out: of c before every step
    zoneout_c_ptr: Pointer  # [T*B, H], or one float32
    dreset_c_ptr: Pointer  # [T*B, H] float32 zeros; out at resets: of c before the step


class Saved(NamedTuple):
    """Pointers to what forward saved for backward."""

    gates_ptr: Pointer  # [T*B, 4H] activated
    c_ptr: Pointer  # [T*B, H] float32
    c0_ptr: Pointer  # [KEPT, B, H] float32
    reset_c_ptr: Pointer  # [T*B, H] float32


class Arrivals(NamedTuple):
    """Pointers to the counters of programs that have arrived, and to the error word."""

    arrivals_ptr: Pointer  # [HEADS, tiles of sequences] int32, programs that have arrived; None: plans/tiles.py, waits
    error_ptr: Pointer  # [1] int32, and after it the poll limit


def name_in_profiles(kernel: str) -> Callable[[Any], str]:
    """The name of a kernel as it was compiled, for Triton's `repr`: gru_step_forward_kernel."""
    return lambda compiled: f"{compiled.constants['S'].CELL}_{kernel}"


def names_of(kernel: Any) -> list[tuple[str, ...]]:
    """For each parameter of a kernel but its Sizes the names of its pointers, if it is such a tuple; else its own."""
    types = kernel.fn.__annotations__
    return [getattr(types.get(name), "_fields", (name,)) for name in kernel.arg_names[:-1]]


def in_tuples(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of pointers -> by those of the kernel's parameters."""
    rest, types = dict(arguments), kernel.fn.__annotations__
    for name in kernel.arg_names:
        if hasattr(types.get(name), "_fields"):
            rest[name] = types[name](*(rest.pop(field, None) for field in types[name]._fields))
    return rest
