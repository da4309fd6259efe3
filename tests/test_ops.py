"""The operators as torch.library sees them: schemas, fakes, gradients, and use under torch.compile."""

import pytest
import torch
from cases import inputs_of

from gpu_lstm.backends import graph
from gpu_lstm.backends.verify import LEARNT
from gpu_lstm.kernels.problem import Inputs

T, B, I, H = 2, 2, 3, 5
NORMS, MASKS = "norms expected", "no-bias ragged states peepholes masks"


def _given(words, device, backend) -> tuple[list, bool]:
    """The inputs of a layer, and whether it is reverse; or of torch's own layer with two directions."""
    if words == "both directions":
        lstm = torch.nn.LSTM(I, H, bidirectional=True, device=device).requires_grad_(False)
        states = (torch.randn(2, B, H, device=device) for _ in range(2))
        first, second = (list(lstm.parameters())[k : k + 4] for k in (0, 4))
        return [*Inputs(torch.randn(T, B, I, device=device), *states, *first), *second], False
    given = inputs_of((T, B, I, H, *[2] * ("norm" not in words and bool(words))), words)
    if backend == "triton":  # states are [1, B, *]
        given = given._replace(h0=given.h0[None], c0=given.c0[None])
    return [None if t is None else t.to(device) for t in given], "reverse" in words


def learnt(given) -> list[bool]:
    """Which of the tensors are there and may have a gradient."""
    return [t is not None and name.removesuffix("_reverse") in LEARNT for name, t in zip(graph.NAMES, given)]


@pytest.mark.parametrize(("words", "backend"), [
    ("", "torch"), ("ragged resets reverse", "torch"), ("both directions", "torch"),
    ("ragged resets reverse", "triton"), ("ragged states peepholes reverse norms masks", "triton"),
    (NORMS, "reference"), (NORMS, "triton"), (MASKS, "reference"), (MASKS, "triton")])  # fmt: skip
def test_a_layer(words, backend, device):
    """Forward with and without what backward reads; backward of all, of the output alone, of the states alone."""
    (given, reverse), recompute = (
        _given(words, device, backend),
        (words, backend) == ("ragged resets reverse", "triton"),
    )
    torch.library.opcheck(graph.OPERATOR, (reverse, backend, False, recompute, *given))
    there = learnt(given)
    leaves = [t.clone().requires_grad_() if learns else t for t, learns in zip(given, there)]
    torch.library.opcheck(graph.OPERATOR, (reverse, backend, True, recompute, *leaves))
    h, h_n, c_n, *kept = graph.OPERATOR(reverse, backend, True, recompute, *given)
    one = [k == 1 for k in range(len(given))]
    for needed, gradients in ((there, [h, h_n, c_n]), (there, [h, None, None]), (one, [None, h_n, c_n])):
        torch.library.opcheck(graph.BACKWARD, (reverse, backend, gradients, [h, *kept], needed, given))


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_leaves_what_was_saved_alone_and_accepts_expanded_gradients(device, recompute):
    given, reverse = _given("ragged resets reverse", device, "triton")
    h, h_n, c_n, *kept = graph.OPERATOR(reverse, "triton", True, recompute, *given)
    # In padding nothing was ever written, so NaN stands for whatever the memory held.
    before, needed = [t.nan_to_num() for t in kept], learnt(given)
    ones = torch.ones_like(h), torch.ones_like(h), torch.ones((), device=device).expand_as(h)  # the last as of sum()
    first, *others = (graph.BACKWARD(reverse, "triton", [dh, h_n, c_n], [h, *kept], needed, given) for dh in ones)
    assert all(torch.equal(t.nan_to_num(), b) for t, b in zip(kept, before))
    assert all(torch.equal(a, b) for again in others for a, b in zip(again, first, strict=True))
