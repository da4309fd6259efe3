"""The cells of kernels/equations.py as Triton compiles them. A kernel computes the cell that its constants name."""

import triton
import triton.language as tl

from ..equations import compiled_by
from .features import INTERPRETED

# Triton's division and exp need more instructions, for subnormal results, which do not matter here.


@triton.jit
def approximate(PTX: tl.constexpr, x):
    return tl.inline_asm_elementwise(PTX, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, to one unit in the last place; 0 where the result is below 2^-126, and for inf."""
    return 1.0 / x if INTERPRETED else approximate("rcp.approx.ftz.f32 $0, $1;", x)


@triton.jit
def exp(x):
    """e^x, 0 where it is below 2^-126."""
    return tl.exp(x) if INTERPRETED else approximate("ex2.approx.ftz.f32 $0, $1;", x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    # exp overflows to inf for x << 0, and 1 / inf is the right limit.
    return reciprocal(1.0 + exp(-x))


@triton.jit
def tanh(x, DTYPE: tl.constexpr = tl.float32):
    """tanh to 2 units in the last place, finite for every finite x; where bfloat16 is enough, to 2^-11. (libdevice's is
    not in the interpreter.)"""
    if DTYPE.is_bf16() and not INTERPRETED:
        return approximate("tanh.approx.f32 $0, $1;", x)
    # Near 0, where 1 - 2 / (exp(2x) + 1) cancels: x + x^3 P(x^2), a Chebyshev fit on |x| < 0.6.
    u = x * x
    p = (((-0.005893945 * u + 0.020794617) * u - 0.053783294) * u + 0.13331915) * u - 0.333333
    far = 1.0 - 2.0 * reciprocal(exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def above(x):
    """log(1 + e^-|x|): by how much log(e^a + e^b) is above the larger of a and b, x apart."""
    return tl.log(1.0 + exp(-tl.abs(x)))


@triton.jit
def after_zeros(z):
    """What h sends to the last gates -> to all four: zeros to those that it does not reach."""
    return (0.0,) * (4 - len(z)) + z


@triton.jit
def tanh_as(x, like):
    return tanh(x, like.dtype)


# Triton's interpreter replaces the functions of `tl`, not other names of them.


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def zeros_like(x):
    return tl.zeros_like(x)


GRU, SLSTM = tl.constexpr("gru"), tl.constexpr("slstm")
ZERO, ONE = tl.constexpr(0.0), tl.constexpr(1.0)
LOWEST = tl.constexpr(-3.4028234663852886e38)
next_cell, cell_forward, output, output_backward, cell_backward = compiled_by(triton.jit, globals())
