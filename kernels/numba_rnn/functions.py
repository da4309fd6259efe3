"""Shared by all compiled functions: compiler options, memory by addresses, and elementary functions of float32.

exp, sigmoid, tanh and log(1 + e^-|x|) are polynomials, which LLVM vectorises. Their errors are at most 2 units in the
last place. NaN stays NaN.
"""

from functools import partial
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

F = np.float32
HOW: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
"""Options of the compiler. LLVM does not vectorise a division that may raise, as Python's does."""
compiled = partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True, **HOW)  # called by compiled functions alone
inlined = partial(compiled, forceinline=True)
summing = partial(compiled, fastmath={"contract", "reassoc"})  # LLVM vectorises a sum if it may change its order


def cast(source: Any, target: Any, instruction: str) -> Any:
    """Return a compiled function that converts a number or an address to another type by one instruction of LLVM."""

    @intrinsic
    def of(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, instruction)(arguments[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return of


@intrinsic
def take(context: Any, counter: Any) -> Any:
    """Return the counter at an address and add 1 to it, in one atomic instruction: each thread gets another number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", place, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(types.intp), generate


floats, flags, numbers = (
    cast(types.intp, types.CPointer(kind), "inttoptr") for kind in (types.float32, types.uint8, types.int64)
)
"""Pointers to be indexed. Numba would check each signed index of an array for counting from the end."""
_float_of, _bits_of = cast(types.int32, types.float32, "bitcast"), cast(types.float32, types.int32, "bitcast")
LOG2_E, LN_2, LN_2_LOW = F(1.442695040888963), F(0.693359375), F(-2.12194440e-4)
ROUND = F(1.5 * 2**23)  # added to a number of less than 2^22: rounds it to an integer, which is in its last bits


@inlined
def exp(x):
    """e^x within 2^-125 to 2^127: the polynomial of Cephes' expf."""
    x = F(87) if x > F(87) else x
    x = F(-87) if x < F(-87) else x
    k = x * LOG2_E + ROUND
    n = k - ROUND
    r = x - n * LN_2 - n * LN_2_LOW
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = ((p * r + F(8.3334519073e-3)) * r + F(4.1665795894e-2)) * r + F(1.6666665459e-1)
    p = (p * r + F(0.5)) * r * r + r + F(1)
    return p * _float_of((_bits_of(k) << np.int32(23)) + np.int32(127 << 23))


@inlined
def sigmoid(x):
    """1 / (1 + e^-x)."""
    # exp is clamped at 87, where the quotient is 1e-38. Its product with infinity would be infinite.
    return F(0) if x < F(-87) else F(1) / (F(1) + exp(-x))


@inlined
def tanh(x):
    """tanh(x), by the formulas of triton_rnn/equations.py: a polynomial near 0, elsewhere 1 - 2 / (e^(2 |x|) + 1)."""
    u = x * x
    p = (((F(-0.005893945) * u + F(0.020794617)) * u - F(0.053783294)) * u + F(0.13331915)) * u - F(0.333333)
    far = F(1) - F(2) / (exp(F(2) * abs(x)) + F(1))
    far = -far if x < F(0) else far
    return x + x * u * p if abs(x) < F(0.6) else far


@inlined
def above(x):
    """log(1 + e^-|x|), by 2 artanh(e / (2 + e)) as a series."""
    e = exp(-abs(x))
    s = e / (F(2) + e)
    u = s * s
    p = ((F(1 / 13) * u + F(1 / 11)) * u + F(1 / 9)) * u + F(1 / 7)
    p = ((p * u + F(1 / 5)) * u + F(1 / 3)) * u + F(1)
    return F(2) * s * p
