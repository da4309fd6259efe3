"""The operators as torch.library sees them: schemas, fakes, gradients, and use under torch.compile."""

import pytest
import torch
from comparing import example

from gpu_lstm.backends import graph
from gpu_lstm.backends.fused import DIFFERENTIABLE, Inputs

T, B, I, H = 2, 2, 3, 5


def _mask(*size):
    return torch.arange(torch.Size(size).numel()).view(size) % 2 == 1


RATES = dict(zoneout_h=torch.tensor(0.1), zoneout_c=torch.tensor(0.2))
MASKS = dict(dropout_h=torch.full((B, H), 2.0), zoneout_h=_mask(T, B, H), zoneout_c=_mask(T, B, H))
RAGGED = dict(ragged=True, resets=0.4)
VARIANTS = {
    "plain": ({}, {}), "projected ragged reverse": (dict(P=2, reverse=True, **RAGGED), {}),
    "states, masks, peepholes": (dict(**RAGGED, bias=False, peepholes=True, states=True), MASKS),
    "norms, rates": (dict(norms=("ih", "hh", "c")), RATES),
}  # fmt: skip


def _given(variant, device) -> tuple[Inputs, bool]:
    """The inputs of a layer, and whether it is reverse."""
    options, noise = VARIANTS[variant]
    made = example(T, B, I, H, **options)
    tensors = [None if t is None else t.to(torch.float32) for t in (*made.tensors, *made.reset_states)]
    given = Inputs(*tensors)._replace(lengths=made.lengths, resets=made.resets, **noise)
    return Inputs(*(None if t is None else t.to(device) for t in given)), made.reverse


def _both_directions(device) -> list:
    """Inputs of torch's own layer with two directions."""
    lstm = torch.nn.LSTM(I, H, bidirectional=True, device=device)
    states = (torch.randn(2, B, H, device=device) for _ in range(2))
    first, second = (list(lstm.parameters())[k : k + 4] for k in (0, 4))
    return [*Inputs(torch.randn(T, B, I, device=device), *states, *first), *second]


@pytest.mark.parametrize(("variant", "backend"), [
    ("plain", "torch"), ("projected ragged reverse", "torch"), ("both directions", "torch"),
    *((variant, backend) for variant in ("norms, rates", "states, masks, peepholes")
      for backend in ("reference", "triton")), ("projected ragged reverse", "triton"),
])  # fmt: skip
def test_a_layer(variant, backend, device):
    """Forward with and without what backward reads; backward of all, of the output alone, of the states alone."""
    given, reverse = (_both_directions(device), False) if variant == "both directions" else _given(variant, device)
    recompute = (variant, backend) == ("projected ragged reverse", "triton")
    given = [None if t is None else t.detach() for t in given]
    flat = graph._flat(given)
    torch.library.opcheck(graph.OPERATOR, (*flat, reverse, backend, False, recompute))
    tensors, places = flat
    there = [k < DIFFERENTIABLE or k >= graph.SECOND for k in places]
    leaves = [t.clone().requires_grad_() if learns else t for t, learns in zip(tensors, there)]
    torch.library.opcheck(graph.OPERATOR, (leaves, places, reverse, backend, True, recompute))
    h, h_n, c_n, *kept = graph.OPERATOR(*flat, reverse, backend, True, recompute)
    one = [k == 1 for k in places]
    for needed, gradients in ((there, [h, h_n, c_n]), (there, [h, None, None]), (one, [None, h_n, c_n])):
        torch.library.opcheck(graph.BACKWARD, (gradients, [h, *kept], *flat, reverse, backend, needed))


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_leaves_what_was_saved_alone_and_accepts_expanded_gradients(device, recompute):
    given, reverse = _given("projected ragged reverse", device)
    tensors, places = graph._flat(given)
    flat = tensors, places, reverse, "triton"
    h, h_n, c_n, *kept = graph.OPERATOR(*flat, True, recompute)
    # In padding nothing was ever written, so NaN stands for whatever the memory held.
    before = [t.nan_to_num() for t in kept]
    needed = [k < DIFFERENTIABLE for k in places]
    one = torch.ones((), device=device)  # sum() gives an expanded gradient, whose strides are zero
    found = [
        graph.BACKWARD([dh, h_n, c_n], [h, *kept], *flat, needed)
        for dh in (torch.ones_like(h), torch.ones_like(h), one.expand_as(h))
    ]
    assert all(torch.equal(t.nan_to_num(), b) for t, b in zip(kept, before))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
