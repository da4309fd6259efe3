"""The reference backend: NumPy's numbers, and derivatives that agree with finite differences."""

from functools import partial

import pytest
import torch
from comparing import NAMES, problem

from gpu_lstm import reference

VARIANTS = [
    dict(P=0),
    dict(P=2, reverse=True),
    dict(P=0, ragged=True, resets=0.4),
    dict(P=2, ragged=True, resets=0.4, reverse=True),
    dict(P=0, bias=False, resets=0.4, reverse=True),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 3), (7, 4, 3, 5)], ids=str)
def test_equals_the_oracle(size, variant):
    given = problem(*size, **variant)
    for name, true, our in zip(NAMES, given.truth(), given.run("reference", torch.float64), strict=True):
        if true is not None:
            torch.testing.assert_close(our.detach(), torch.from_numpy(true), rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_derivatives_by_finite_differences(check, variant):
    given = problem(3, 3, 2, 3, **variant)
    present = [t is not None for t in given.tensors]

    def layer(*tensors):
        remaining = iter(tensors)
        arguments = [next(remaining) if there else None for there in present]
        return reference.lstm_layer(*arguments, given.lengths, given.resets, given.reverse)

    assert check(layer, [t.requires_grad_() for t in given.tensors if t is not None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    given = problem(5, 3, 4, 6, ragged=True, resets=0.3).rounded(dtype)
    run = partial(reference.lstm_layer, lengths=given.lengths, resets=given.resets, reverse=False)
    inputs = [t if t is None else t.to(dtype) for t in given.tensors]
    wide = [t if t is None else t.float() for t in inputs]
    for narrow, exact in zip(run(*inputs), run(*wide), strict=True):
        assert narrow.dtype is dtype
        assert torch.equal(narrow, exact.to(dtype))
