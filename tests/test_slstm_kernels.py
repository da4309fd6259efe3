"""An sLSTM, and its heads, on the families of kernels that read or hold W_hh, against the float64 reference."""

import pytest
import torch
from places import INTERPRETED, KERNELS

from gpu_lstm.modules.slstm import SLSTM

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels are those that are chosen there"),
    pytest.mark.usefixtures("exact_float32_products", "nan_in_fresh_memory"),
]


@pytest.mark.parametrize(("place", "heads", "size"), [
    ("triton", 2, (4, 3, 3, 40)), ("triton", 3, (1, 3, 3, 15)), ("step", 1, (3, 3, 3, 20)),
    ("step", 2, (4, 18, 3, 40)), ("split/4", 2, (3, 3, 3, 40)), ("held", 2, (4, 18, 3, 36)),
    ("held/2", 1, (3, 3, 3, 18)), ("held/ahead", 2, (4, 35, 3, 36)), ("pointwise", 1, (4, 3, 3, 9)),
    ("pointwise", 3, (4, 3, 3, 15)),
])  # fmt: skip
def test_an_slstm(monkeypatch, place, heads, size):
    """Every result and gradient, in reverse too, with lengths, and resets that leave the empty state or a given one."""
    KERNELS[place].force(monkeypatch)
    steps, batch, inputs, hidden = size
    torch.manual_seed(heads)
    module = SLSTM(inputs, hidden, bidirectional=True, heads=heads, backend="reference").double()
    ours = SLSTM(inputs, hidden, bidirectional=True, heads=heads, backend="triton")
    ours.load_state_dict(module.state_dict())
    x = torch.randn(steps, batch, inputs)
    h, c, n, m = torch.randn(4, 2, batch, hidden)
    hx = h, c, n.abs() + 0.1, m
    ragged = dict(resets=torch.rand(steps, batch) < 0.3)
    ragged["lengths"] = torch.randint(steps + 1, (batch,))
    ragged["lengths"][0] = steps
    true, found = (gradients(each, x, hx, ragged) for each in (module, ours))
    wrong = {name: (found[name] - value).abs().max().item() for name, value in true.items()}
    assert {name: error for name, error in wrong.items() if not error < 2e-5 * (1 + true[name].abs().max())} == {}


def gradients(module, x, hx, ragged):
    """Output and final states, of these what does not depend on the stabiliser, and gradients of a weighted sum."""
    parameters = dict(module.named_parameters())
    x, *hx = (t.to(next(iter(parameters.values()))).requires_grad_() for t in (x, *hx))
    output, states = module(x, tuple(hx), **ragged)
    h, c, n, m = states
    found = dict(output=output, h=h, q=c / n, l=m + n.log())
    torch.manual_seed(3)
    weights = [torch.randn(t.shape).to(t) for t in found.values()]
    given = dict(x=x, **dict(zip("hcnm", hx))) | parameters
    of_all = torch.autograd.grad(list(found.values()), list(given.values()), weights)
    return {name: t.detach() for name, t in (found | {f"d{name}": d for name, d in zip(given, of_all)}).items()}
