"""The operators as torch.library sees them: schemas, fakes, and use under torch.compile."""

import itertools

import pytest
import torch
from comparing import example

from gpu_lstm import ops, whole_layer

VARIANTS = [dict(P=0), dict(P=2, ragged=True, resets=0.4, reverse=True)]


def _arguments(variant, device, noise=(None, None, None), side_by_side=1):
    """(gates, the tensors of the recurrence, which are given, reverse, side_by_side, backend) of a small problem."""
    given = example(3, 2, 3, 5, **variant)
    x, h0, c0, weight_ih, weight_hh, _, _, weight_hr, *_ = (
        None if t is None else t.to(device, torch.float32) for t in given.tensors
    )
    lengths, resets = (None if t is None else t.to(device) for t in (given.lengths, given.resets))
    recurrence = [weight_hh, weight_hr, None, h0, c0, lengths, resets, *noise, None, None]
    return x @ weight_ih.T, *ops.flat(recurrence), given.reverse, side_by_side, "triton"


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layer_forward(variant, save, device):
    torch.library.opcheck(ops.layer_forward, (*_arguments(variant, device), save))


@pytest.mark.parametrize("kind", ["masks", "rates"])
def test_noise_and_neighbours(kind, device):
    steps, batch, hidden = 3, 2, 5
    if kind == "masks":
        noise = (
            torch.rand(batch, hidden),
            torch.rand(steps, batch, hidden) < 0.5,
            torch.rand(steps, batch, hidden) < 0.5,
        )
    else:
        noise = None, torch.tensor(0.1), torch.tensor(0.2)
    gates, *rest = _arguments(VARIANTS[0], device, (None if t is None else t.to(device) for t in noise), 2)
    torch.library.opcheck(ops.layer_forward, (gates, *rest, True))
    h, h_n, c_n, c = ops.layer_forward(gates, *rest, True)
    torch.library.opcheck(ops.layer_backward, ([h, h_n, c_n], gates, c, *rest))


@pytest.mark.parametrize("which", ["all", "output", "states"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layer_backward(variant, which, device):
    gates, *rest = _arguments(variant, device)
    h, h_n, c_n, c = ops.layer_forward(gates, *rest, True)
    dh, dh_n, dc_n = (torch.ones_like(t) for t in (h, h_n, c_n))
    gradients = {"all": (dh, dh_n, dc_n), "output": (dh, None, None), "states": (None, dh_n, dc_n)}[which]
    torch.library.opcheck(ops.layer_backward, ([*gradients], gates, c, *rest))


def test_backward_leaves_what_was_saved_alone(device):
    gates, *rest = _arguments(VARIANTS[1], device)
    h, h_n, c_n, c = ops.layer_forward(gates, *rest, True)
    # In padding nothing was ever written, so NaN stands for whatever the memory held.
    saved = gates.nan_to_num(), c.nan_to_num()
    first = ops.layer_backward([h, h_n, c_n], gates, c, *rest)
    second = ops.layer_backward([h, h_n, c_n], gates, c, *rest)
    assert torch.equal(gates.nan_to_num(), saved[0])
    assert torch.equal(c.nan_to_num(), saved[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_stride_of_zero_in_the_gradient(device):
    """sum() hands back an expanded gradient; it means the same as a contiguous one."""
    gates, *rest = _arguments(VARIANTS[0], device)
    h, *_, c = ops.layer_forward(gates, *rest, True)
    one = torch.ones((), device=device)
    expanded = ops.layer_backward([one.expand_as(h), None, None], gates, c, *rest)
    contiguous = ops.layer_backward([torch.ones_like(h), None, None], gates, c, *rest)
    assert all(torch.equal(a, b) for a, b in zip(expanded, contiguous, strict=True))


WHOLE = {
    "both directions": dict(bidirectional=True), "projected": dict(proj_size=2, bias=False), "ragged": {},
    "reverse": {}, "projected ragged reverse": dict(proj_size=2),
    "states": dict(proj_size=2), "peepholes": dict(bias=False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "backend"),
    [*((name, "torch") for name in list(WHOLE)[:-2]), *((name, "triton") for name in list(WHOLE)[-2:])],
)
def test_whole_layer(variant, backend, device):
    lstm = torch.nn.LSTM(3, 5, **WHOLE[variant], device=device)
    directions, P = 1 + lstm.bidirectional, lstm.proj_size or 5
    x, h0, c0 = (torch.randn(*size, device=device) for size in ((3, 2, 3), (directions, 2, P), (directions, 2, 5)))
    weights = [t.detach() for t in lstm.parameters()]
    weights += [torch.randn(15, device=device)] * (variant == "peepholes")
    there = [True, True, *[lstm.bias] * 2, lstm.proj_size > 0, variant == "peepholes", *[False] * 4]
    lengths, resets = torch.tensor([3, 1], device=device), torch.rand(3, 2, device=device) < 0.5
    ragged = (lengths, resets) if "ragged" in variant or variant == "states" else (None, None)
    left = [torch.randn(3, 2, size, device=device) for size in (P, 5)] if variant == "states" else []
    rest = there, *ragged, "reverse" in variant, backend
    for save in (False, True) if backend == "torch" else ():  # the interpreter is slow
        torch.library.opcheck(whole_layer.whole_layer, (x, h0, c0, weights, *rest, save, *left))
    leaves = [t.clone().requires_grad_() for t in (x, h0, c0, *weights, *left)]
    end = 3 + len(weights)
    torch.library.opcheck(whole_layer.whole_layer, (*leaves[:3], leaves[3:end], *rest, True, *leaves[end:]))
    h, h_n, c_n, kept = whole_layer.whole_layer(x, h0, c0, weights, *rest, True, *left)
    for needed, gradients in itertools.product(
        ([True] * len(leaves), [False, True] + [False] * (len(leaves) - 2)), ((h, h_n, c_n), (None, h_n, None))
    ):
        if backend == "torch" or needed[0] is (gradients[0] is None):
            torch.library.opcheck(
                whole_layer.whole_layer_backward, (*gradients, kept, x, h0, c0, weights, *rest, needed, *left)
            )
