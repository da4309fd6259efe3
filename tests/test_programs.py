"""Compiled and exported programs: every result, gradient and gradient of a gradient is that of eager mode."""

import pytest
import torch
from torch import Tensor, nn

import gpu_lstm

T, B, I, H = 4, 3, 3, 4
STATES = tuple(torch.randn(1, T, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
RESETS = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]).bool()
VARIANTS = {  # of a module, and of a call
    "plain": ({}, {}), "chain": (dict(num_layers=2, bidirectional=True, proj_size=2), {}),
    "lengths": (dict(recompute=True), dict(lengths=torch.tensor([4, 2, 1]))), "resets": ({}, dict(resets=RESETS)),
    "variants": (dict(peepholes=True, layer_norm=True), {}),
    "reset states": ({}, dict(resets=RESETS, reset_states=STATES)),
    "noise": (dict(recurrent_dropout=0.3, zoneout=(0.3, 0.45), weight_drop=0.25), {}),
    "cell": ({}, {}),
}  # fmt: skip


class Program(nn.Module):
    """A module with the arguments of its call."""

    def __init__(self, variant: str, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        options, self.given = VARIANTS[variant]
        dtype = torch.float32 if backend == "triton" else torch.float64
        kind = gpu_lstm.LSTMCell if variant == "cell" else gpu_lstm.LSTM
        self.lstm = kind(I, H, backend=backend, dtype=dtype, **options)
        states = [state.to(dtype) for state in self.given.get("reset_states", ())]
        self.reset_states = nn.ParameterList(states)  # whose gradients are compared, too

    def forward(self, x: Tensor) -> Tensor:
        given = self.given | ({"reset_states": tuple(self.reset_states)} if len(self.reset_states) else {})
        if isinstance(self.lstm, gpu_lstm.LSTMCell):
            h, c = self.lstm(x[1], self.lstm(x[0]))
            return h.square().sum() + c.square().sum()
        y, (h_n, c_n) = self.lstm(x, **given)
        return y.square().sum() + h_n.sum() + c_n.square().sum()


def derivatives(program: nn.Module, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The result, all gradients, and the gradients of their squares."""
    torch.manual_seed(5)
    result = program(x)
    leaves = [x, *parameters]
    first = torch.autograd.grad(result, leaves, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
    assert all(t.any() for t in second)
    return [result, *first, *second]


@pytest.mark.deep
@pytest.mark.parametrize("way", ["compiled", "exported"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_programs_have_the_derivatives_of_eager_mode(exact_float32_products, variant, backend, way):
    if backend == "torch" and variant in ("variants", "reset states", "noise"):
        backend = "reference"
    program = Program(variant, backend)
    x = torch.randn(T, B, I, dtype=next(program.parameters()).dtype, requires_grad=True)
    true = derivatives(program, x, list(program.parameters()))
    if way == "compiled":
        torch._dynamo.reset()
        other = torch.compile(program, backend="eager")
    else:
        other = torch.export.export(program, (x.detach(),)).module()
    found = derivatives(other, x, list(other.parameters()))
    for one, its in zip(true, found, strict=True):
        torch.testing.assert_close(its, one)
