"""The operators as torch.library sees them: schemas, fakes, gradients, and use under torch.compile."""

import pytest
import torch
from comparing import example_of

from gpu_lstm.backends import graph
from gpu_lstm.backends.fused import DIFFERENTIABLE, Inputs

T, B, I, H = 2, 2, 3, 5
NORMS, MASKS = "norms expected", "no-bias ragged states peepholes masks"


def _given(words, device) -> tuple[list, bool]:
    """The inputs of a layer, and whether it is reverse; or of torch's own layer with two directions."""
    if words == "both directions":
        lstm = torch.nn.LSTM(I, H, bidirectional=True, device=device).requires_grad_(False)
        states = (torch.randn(2, B, H, device=device) for _ in range(2))
        first, second = (list(lstm.parameters())[k : k + 4] for k in (0, 4))
        return [*Inputs(torch.randn(T, B, I, device=device), *states, *first), *second], False
    made = example_of((T, B, I, H, 0 if "norm" in words or words == "plain" else 2), words, 0)
    floats = {name: t.float() if name == "dropout_h" else t for name, t in made.noise.items()}
    tensors = [None if t is None else t.float() for t in (*made.tensors, *made.reset_states)]
    given = Inputs(*tensors)._replace(lengths=made.lengths, resets=made.resets, **floats)
    return [None if t is None else t.to(device) for t in given], made.reverse


@pytest.mark.parametrize(("words", "backend"), [
    ("plain", "torch"), ("ragged resets reverse", "torch"), ("both directions", "torch"),
    ("ragged resets reverse", "triton"), ("ragged states peepholes reverse norms masks", "triton"),
    (NORMS, "reference"), (NORMS, "triton"), (MASKS, "reference"), (MASKS, "triton")])  # fmt: skip
def test_a_layer(words, backend, device):
    """Forward with and without what backward reads; backward of all, of the output alone, of the states alone."""
    (given, reverse), recompute = _given(words, device), (words, backend) == ("ragged resets reverse", "triton")
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
    given, reverse = _given("ragged resets reverse", device)
    tensors, places = graph._flat(given)
    flat = tensors, places, reverse, "triton"
    h, h_n, c_n, *kept = graph.OPERATOR(*flat, True, recompute)
    # In padding nothing was ever written, so NaN stands for whatever the memory held.
    before, needed = [t.nan_to_num() for t in kept], [k < DIFFERENTIABLE for k in places]
    ones = torch.ones_like(h), torch.ones_like(h), torch.ones((), device=device).expand_as(h)  # the last as of sum()
    first, *others = (graph.BACKWARD([dh, h_n, c_n], [h, *kept], *flat, needed) for dh in ones)
    assert all(torch.equal(t.nan_to_num(), b) for t, b in zip(kept, before))
    assert all(torch.equal(a, b) for again in others for a, b in zip(again, first, strict=True))
