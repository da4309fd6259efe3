"""What kernels are passed: pointers, those that belong together in one named tuple, and all constants in another.

Pointers mean the same in every kernel, for H units and P features of h (H without a projection); those of absent
tensors are None:

    gates [T*B, 4H]                           forward in: x W_ih^T + b_ih + b_hh; out, if SAVE, and backward: activated
    h0 [B, P]  c0 [B, H] float32              the initial state
    h [T*B, P]  h_n [B, P]                    out: of every step; of every sequence's last
    c [T*B, H] float32                        out: None where nothing is saved for backward; gates are not either then
    c_n [B, H] float32                        out: c after every step; in the cooperative family c0 beforehand
    lengths [B]  resets [T*B]  error [1] int32, see timeouts.py
    weight_hh [4H, P]  weight_hr [P, H]  weight_peephole [3H]  dropout_h [B, P]
    zoneout_h [T*B, P] or one float32         reset_h [T*B, P], read with zoneout_h alone
    zoneout_c [T*B, H] or one float32         reset_c [T*B, H] float32
    gain_hh [4H]  gain_c [H]  bias_c [H]      of the layer norms of W_hh h and of c, and what they normalised:
    unit_hh [T*B, 4H]  unit_c [T*B, H] float32  scale_hh [T*B] float32  scale_c [T*B] float32
    dh [T*B, P]  dh_n [B, P]                  gradients given to backward
    dgates [T*B, 4H]                          out: the gradient of the pre-activations
    dc [B, H] float32                         gradient of c_n, becomes that of c before every step
    dh_from_zoneout [B, P] float32            zeros, becomes the gradient of h before every step through zoneout
    dh_total [T*B, P]                         out: the whole gradient of W_hr m, or with a layer norm of c that of m
    dreset_h [T*B, P]  dreset_c [T*B, H]      float32 zeros; out at resets: of h before, by zoneout, and of c before
"""

from collections import namedtuple
from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """The constants of a kernel: what its problem is, and how the plan divides it."""

    H: int
    P: int
    REVERSE: bool
    PRECISION: str  # of products of float32
    PER: int  # elements of a word of 32 bits
    W: int  # words of a row of H elements
    BLOCK_B: int  # sequences of a tile
    UNITS: int  # of a tile, or of a program
    WARPS: int
    HELD: bool  # and as planning.py explains them, of each family:
    BLOCK_K: int = 0
    PARTS: int = 1
    PARTNERS: int = 1
    CHUNKS: int = 0
    AHEAD: bool = False


# Of the states h and c, forward:
Hidden = namedtuple("Hidden", "h0_ptr h_ptr h_n_ptr dropout_h_ptr zoneout_h_ptr reset_h_ptr")
Cell = namedtuple("Cell", "gates_ptr weight_peephole_ptr c0_ptr c_ptr c_n_ptr zoneout_c_ptr reset_c_ptr")
# Of their gradients, and what forward saved for these:
HiddenBackward = namedtuple(
    "HiddenBackward", "dh_ptr dh_n_ptr dropout_h_ptr zoneout_h_ptr dh_from_zoneout_ptr dreset_h_ptr"
)
CellBackward = namedtuple("CellBackward", "dgates_ptr weight_peephole_ptr dc_ptr zoneout_c_ptr dreset_c_ptr")
Saved = namedtuple("Saved", "gates_ptr c_ptr c0_ptr reset_c_ptr")
# Of layer norms, where programs hold W_hh in registers; units and scales are for backward:
NormHH = namedtuple("NormHH", "gain_hh_ptr unit_hh_ptr scale_hh_ptr pairs_hh_ptr")
NormC = namedtuple("NormC", "gain_c_ptr bias_c_ptr unit_c_ptr scale_c_ptr pairs_c_ptr")


def names_of(kernel: Any) -> list[tuple[str, ...]]:
    """Of each parameter of a kernel but its Sizes: the names of its pointers, if it is such a tuple; else its own."""
    kinds = kernel.fn.__annotations__
    return [getattr(kinds.get(name), "_fields", (name,)) for name in kernel.arg_names[:-1]]


def in_tuples(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of pointers -> by those of the kernel's parameters."""
    rest, kinds = dict(arguments), kernel.fn.__annotations__
    tuples = {
        name: kinds[name](*(rest.pop(field, None) for field in kinds[name]._fields))
        for name in kernel.arg_names
        if hasattr(kinds.get(name), "_fields")
    }
    return tuples | rest
