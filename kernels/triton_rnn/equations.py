"""The equations of kernels/equations.py, compiled by Triton. The constant S.CELL of a kernel chooses the cell."""

import triton
import triton.language as tl

from ..equations import compiled_by
from .features import INTERPRETED

# Triton's own division and exp also compute subnormal results, which takes more instructions. Here subnormal results
# may become zero.


@triton.jit
def approximate(PTX: tl.constexpr, x):
    """Apply one PTX instruction, with $0 as its result and $1 as its operand, to each element of x."""
    return tl.inline_asm_elementwise(PTX, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """Return 1 / x for x >= 1, to one unit in the last place. A result below 2^-126 becomes 0, as does 1 / inf."""
    return 1.0 / x if INTERPRETED else approximate("rcp.approx.ftz.f32 $0, $1;", x)


@triton.jit
def exp(x):
    """Return e^x. A result below 2^-126 becomes 0."""
    return tl.exp(x) if INTERPRETED else approximate("ex2.approx.ftz.f32 $0, $1;", x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    # For x << 0 exp(-x) overflows to inf, and 1 / inf = 0 is the right limit.
    return reciprocal(1.0 + exp(-x))


@triton.jit
def tanh(x, DTYPE: tl.constexpr = tl.float32):
    """Return tanh(x), finite for every finite x, to 2 units in the last place, or to 2^-11 if DTYPE is bfloat16.

    libdevice has a tanh as well, but Triton's interpreter cannot run it.
    """
    if DTYPE.is_bf16() and not INTERPRETED:
        return approximate("tanh.approx.f32 $0, $1;", x)
    # Near 0 the formula 1 - 2 / (exp(2x) + 1) cancels. There tanh is x + x^3 P(x^2), a Chebyshev fit on |x| < 0.6.
    u = x * x
    p = (((-0.005893945 * u + 0.020794617) * u - 0.053783294) * u + 0.13331915) * u - 0.333333
    far = 1.0 - 2.0 * reciprocal(exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def above(x):
    """Return log(1 + e^-|x|). With x = a - b this is how far log(e^a + e^b) lies above max(a, b)."""
    return tl.log(1.0 + exp(-tl.abs(x)))


@triton.jit
def after_zeros(z):
    """Return the four parts of the pre-activations that come from h: zeros for the gates h does not reach, then z."""
    return (0.0,) * (4 - len(z)) + z


@triton.jit
def tanh_as(x, like):
    """Return tanh(x), as exact as the dtype of `like` needs."""
    return tanh(x, like.dtype)


# Each is a function here. The interpreter replaces attributes of `tl` only, so it would miss `where = tl.where`.


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
