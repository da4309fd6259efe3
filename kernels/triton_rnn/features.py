"""What depends on Triton's version, which only this file asks for; and what all inline assembly needs."""

import triton
import triton.language as tl

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

MOST_ROWS = 64 if _VERSION >= (3, 9) else 32
"""Sequences of a program of the step family: with 64 Triton 3.4 and 3.6 spill in TF32 with a projection."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. A multiplication and an addition become one instruction, whatever a version's default is."""

constexpr_function = getattr(triton, "constexpr_function", None) or tl.constexpr_function  # until Triton 3.5 in tl
"""Makes a Python function one that kernels call while they are compiled."""

INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.JITFunction))
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when triton was imported."""

if INTERPRETED and _VERSION < (3, 7):  # there it takes an array of one element for a number
    import numpy

    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        raise ImportError(
            f"TRITON_INTERPRET=1: the interpreter of Triton {triton.__version__} needs NumPy below 2.4, got "
            f"{numpy.__version__}: pip install 'numpy<2.4', or Triton 3.7 or newer"
        )


@constexpr_function
def constraints(*letters: str | int) -> str:
    """Those of inline assembly: a letter of PTX's, how many results or arguments have it, the next letter..."""
    return ",".join(",".join([letter] * count) for letter, count in zip(letters[::2], letters[1::2]))


@constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    """The types of its results."""
    return (dtype,) * count
