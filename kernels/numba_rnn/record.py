"""The record of addresses and sizes that a call of the loops is given, and the constants in it."""

import numpy as np
from numba import from_dtype, types

from .functions import cast
from .tile import ROWS, UNITS

OF_PLAIN = (
    "weight_ih", "weight_hh", "bias_ih", "bias_hh",  # [GATES H, I]; [GATES H, D]; [GATES H], if not in gates
    "taken",  # int64, the counter of shares that are taken
    "x", "h0", "c0",  # [T*B, I], where the loop multiplies x; [B, H]; [K, B, H]
    "h", "h_n", "c_n",  # [T*B, H]; [B, H]; [K, B, H]
    "z", "gates", "h_next", "scratch",  # [B, heads, 4 D]; [T*B, 4H], or [chunk*B, 4H] with x; [B, H]; [shares, SCRATCH]
    "panels",  # see `make_panels`
    "resets", "lengths",  # [T*B] bool; [B] int64
)  # fmt: skip
"""The tensors of a plain inference."""
PLAIN = (
    *OF_PLAIN,
    "I", "T", "share", "chunk",  # input features; steps; sequences that a thread takes; steps whose W_ih x is in gates
    "by_rows",  # the number of first steps whose products read the weights as they are, instead of panels
    "makes_panels",  # whether the call only makes the panels
)  # fmt: skip
"""The fields that differ between plain inferences. They are the first in a record, see `launch.inference_of`."""
TENSORS = (
    *OF_PLAIN,
    "dgates", "dz",  # of the sizes of gates and z
    "dh", "dh_total", "reset_h", "c", "reset_c", "dreset_h", "dreset_c",  # [T*B, H]
    "zoneout_h", "zoneout_c",  # [T*B, H] bool, where the state before stays; or float32 [], the share of it that stays
    "dh_n", "dh_next", "dropout_h", "m", "o", "v", "dh_from_zoneout",  # [B, H]
    "dc",  # [K, B, H]
    "weight_peephole",  # [3H]
    "gain_hh", "gain_c", "bias_c",  # [4H]; [H]; [H], of the layer norms inside a step
    "v_hh", "mean_hh", "scale_hh", "v_c", "mean_c", "scale_c",  # backward a problem.Normed of each
)  # fmt: skip
OF_A_PART = (
    "B", "H", "heads", "from_x", "h_start", "reverse", "cell", "kept", "start", "end", "masks",
    "stride_head", "stride_k", "stride_n",
)  # fmt: skip
"""The sizes that follow from a by_steps.Part, in the order of `launch.call_of`."""
SIZES = *OF_A_PART, "step", "multiplies"  # the first step; whether all steps and their products run, or one without
CALL = np.dtype([(name, np.int64) for name in dict.fromkeys((*PLAIN, *TENSORS, *SIZES))])
"""The argument of the loops: the addresses of tensors, 0 for absent ones, and sizes."""
call_at = cast(types.intp, from_dtype(CALL), "inttoptr")
MATMUL = np.dtype([(name, np.int64) for name in (
    "a", "b", "out", "memory", "taken",  # [M, K]; [K, N]; [M, N]; [shares, size]; int64, the shares that are taken
    "M", "K", "N", "a_m", "a_k", "b_k", "b_n", "share", "size",  # a_m to b_n are strides; rows of a share; see `memory`
)])  # fmt: skip
"""The argument of `matmul`. One of a_m and a_k is 1, and one of b_k and b_n."""
product_at = cast(types.intp, from_dtype(MATMUL), "inttoptr")
STOPS = OF_Z, OF_C, OF_M, OF_HIDDEN = range(4)
SCRATCH = ROWS * UNITS  # numbers of a tile; during a product, sums of a tile of the product
