"""What depends on Triton's version, which only this file asks for."""

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


@triton.jit
def nothing():
    """What stands for a value that a call does not have: a tuple of none. (In Triton 3.4 no function returns None.)"""
    return ()
