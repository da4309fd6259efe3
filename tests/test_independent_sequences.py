"""A sequence of a batch that is NaN or infinite leaves the others as they are, to the bit."""

import pytest
import torch

import gpu_lstm

T, B, I, H = 6, 5, 4, 6
BAD = 2  # the sequence


def results(backend, device, options, value):
    """The output, the final states, and the gradients of the input and the initial states, all with the batch first."""
    torch.manual_seed(0)
    lstm = gpu_lstm.LSTM(I, H, num_layers=2, bidirectional=True, device=device, backend=backend)
    generator = torch.Generator().manual_seed(1)
    x, *states = (torch.randn(n, B, size, generator=generator).to(device) for n, size in ((T, I), (4, H), (4, H)))
    if value is not None:
        x[3, BAD], states[0][1, BAD] = value, value
    inputs = [t.requires_grad_() for t in (x, *states)]
    y, (h_n, c_n) = lstm(x, tuple(states), **{name: t.to(device) for name, t in options.items()})
    weights = torch.linspace(-1, 1, H, device=device)
    (y.view(T, B, 2, H) * weights).sum().add(h_n.sum() + c_n.sum()).backward()
    return [t.detach().movedim(1, 0).cpu() for t in (y, h_n, c_n, *(t.grad for t in inputs))]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [
    {}, dict(lengths=torch.tensor([6, 0, 6, 3, 5]), resets=(torch.arange(T * B).view(T, B) % 7 == 2)),
], ids=["plain", "ragged"])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_what_is_not_finite_in_one_sequence_does_not_reach_the_others(device, backend, options, value):
    whole, spoilt = (results(backend, device, options, each) for each in (None, value))
    others = [n for n in range(B) if n != BAD]
    assert not spoilt[0][BAD].isfinite().all()
    for expected, found in zip(whole, spoilt):
        assert expected.isfinite().all()
        assert torch.equal(found[others], expected[others])
