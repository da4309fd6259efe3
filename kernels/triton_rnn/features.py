"""The differences between Triton's versions, and two functions that all inline assembly needs.

No other file asks for Triton's version.
"""

import triton
import triton.language as tl

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

MOST_ROWS = 64 if _VERSION >= (3, 9) else 32
"""The most sequences of a program of the step family. With 64, Triton 3.4 and 3.6 spill in TF32 with a projection."""

OPTIONS = {"enable_fp_fusion": True}
"""The options of every launch. A multiplication and an addition become one instruction, whatever the default is."""

constexpr_function = getattr(triton, "constexpr_function", None) or tl.constexpr_function  # in tl in older versions
"""A decorator for Python functions that kernels call while they are compiled."""

INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.JITFunction))
"""Whether kernels run in Triton's interpreter, on CPU tensors. TRITON_INTERPRET was 1 when triton was imported."""

if INTERPRETED and _VERSION < (3, 7):  # it takes an array of one element for a number, which NumPy 2.4 refuses
    import numpy

    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        raise ImportError(
            f"TRITON_INTERPRET=1: the interpreter of Triton {triton.__version__} needs NumPy below 2.4, got "
            f"{numpy.__version__}: pip install 'numpy<2.4', or Triton 3.7 or newer"
        )


@constexpr_function
def constraints(*letters: str | int) -> str:
    """Return the constraints of inline assembly, from letters and how many results or arguments have each of them.

    constraints("=r", 2, "l", 1) is "=r,=r,l".
    """
    return ",".join(",".join([letter] * count) for letter, count in zip(letters[::2], letters[1::2]))


@constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    """Return the types of `count` results of inline assembly, all of one dtype."""
    return (dtype,) * count
