"""The Triton kernels against the float64 oracle: every result and every gradient.

Without a GPU they run in Triton's interpreter, where bfloat16 products are wrong; so bfloat16 is in test_gpu.py.
"""

from functools import partial

import pytest
import torch
from comparing import assert_as_good_as_torch, example

VARIANTS = {
    "plain": {},
    "reverse": dict(reverse=True),
    "ragged": dict(ragged=True),
    "ragged reverse": dict(ragged=True, reverse=True),
    "resets": dict(resets=0.3),
    "ragged resets reverse": dict(ragged=True, resets=0.3, reverse=True),
    "no bias": dict(bias=False, ragged=True, resets=0.3),
}
ONE = (1, 1, 3, 1)  # step of one sequence
SIZES = {  # (T, B, I, H), and how many problems of that size: more of the small, whose rounding errors vary more
    ONE: 24,
    (2, 3, 4, 5): 8,
    (9, 3, 1, 5): 6,
    (1, 17, 5, 33): 3,
    (9, 17, 6, 33): 1,
    (2, 1, 2, 130): 3,
}
SLOW = [(9, 3, 1, 5), (9, 17, 6, 33), (2, 1, 2, 130)]
DIFFER_MOST = ("plain", "ragged resets reverse")


def in_variants(values, slow):
    """Each in every variant; ONE, and those that are `slow` to interpret, in the two that differ most."""
    return [
        pytest.param(value, variant, marks=[pytest.mark.slow] * (value in slow))
        for value in values for variant in (DIFFER_MOST if value in (ONE, *slow) else VARIANTS)
    ]  # fmt: skip


def example_of(size, variant, seed):
    return example(*size, **VARIANTS[variant], seed=seed)


@pytest.mark.parametrize(("size", "variant"), in_variants(SIZES, SLOW), ids=str)
def test_float32(size, variant, device):
    assert_as_good_as_torch(partial(example_of, size, variant), "triton", torch.float32, device, SIZES[size])


@pytest.mark.parametrize(("projected", "variant"), in_variants([1, 7, 32], slow=[1, 32]))
def test_projection(projected, variant, device):
    assert_as_good_as_torch(partial(example_of, (3, 4, 3, 33, projected), variant), "triton", torch.float32, device)


@pytest.mark.parametrize("variant", DIFFER_MOST)
def test_float16(variant, device):
    assert_as_good_as_torch(partial(example_of, (4, 5, 8, 40), variant), "triton", torch.float16, device)
