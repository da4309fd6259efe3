"""The sLSTM, with and without heads, on every family of kernels, against the reference in float64."""

import copy

import pytest
import torch
from comparing import assert_same
from pairs import weighing
from places import INTERPRETED, KERNELS, forget

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products", "nan_in_fresh_memory")


def numbers(module, x, hx, **ragged):
    """Output and final states, of which n is constant, and gradients of a random sum of them."""
    like = next(module.parameters())
    leaves = [t.to(like).requires_grad_() for t in (x, *hx)]
    y, (h, c, _, m) = module(leaves[0], tuple(leaves[1:]), **ragged)
    found = [y, h, c, m]
    gradients = torch.autograd.grad(found, [*leaves, *module.parameters()], weighing(found))
    names = ["y", "h", "c", "m", "dx", "dh", "dc", "dn", "dm", *(f"d{name}" for name, _ in module.named_parameters())]
    return dict(zip(names, (t.to(like) for t in (*found, *gradients)), strict=True))  # c and m are in float32


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels are those that are chosen there")
@pytest.mark.parametrize(("place", "dtype", "size", "heads"), [
    ("resident", torch.float16, (4, 3, 3, 11), 1), ("resident", torch.float32, (4, 9, 3, 22), 2),
    ("cooperative/8/2/4", torch.float32, (3, 17, 3, 20), 1), ("cooperative/8/2/4", torch.float32, (3, 17, 3, 20), 2),
    ("cooperative/16/1/1", torch.float16, (4, 3, 3, 33), 3), ("triton", torch.float32, (1, 3, 3, 15), 3),
    ("step", torch.float32, (3, 3, 3, 20), 1), ("step", torch.float32, (4, 18, 3, 40), 2),
    ("split/4", torch.float32, (3, 3, 3, 40), 2), ("held", torch.float32, (4, 18, 3, 36), 2),
    ("held/2", torch.float32, (3, 3, 3, 18), 1), ("held/ahead", torch.float32, (4, 35, 3, 36), 2),
    ("pointwise", torch.float32, (4, 3, 3, 9), 1), ("pointwise", torch.float32, (4, 3, 3, 15), 3),
    ("cupy", torch.float32, (4, 3, 3, 9), 1), ("cupy", torch.float32, (4, 3, 3, 15), 3),
    ("cupy", torch.float16, (4, 5, 3, 130), 1),
])  # fmt: skip
def test_every_result_and_gradient(monkeypatch, place, dtype, size, heads):
    """In both directions, with lengths from 0 on and resets, from states of which one is empty."""
    KERNELS[place].force(monkeypatch)
    forget()
    steps, batch, inputs, hidden = size
    torch.manual_seed(0)
    module = gpu_lstm.SLSTM(inputs, hidden, bidirectional=True, heads=heads, backend=KERNELS[place].backend).to(dtype)
    x, hx = torch.randn(steps, batch, inputs).to(dtype), torch.randn(4, 2, batch, hidden).to(dtype)
    hx[2] = hx[2].abs() + 0.5
    hx[2, :, 0] = 0
    lengths = torch.randint(steps + 1, (batch,))
    lengths[0], lengths[1] = steps, 0
    ragged = dict(lengths=lengths, resets=torch.rand(steps, batch) < 0.3)
    ragged["resets"][steps // 2, 0] = True  # also in the middle of a sequence
    twin = copy.deepcopy(module).double()
    twin.backend = "reference"
    assert_same(numbers(module, x, hx, **ragged), numbers(twin, x, hx, **ragged))
