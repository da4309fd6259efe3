"""Cells that no module has, on the Triton kernels: with two rows of weights a unit, and with another empty state."""

import copy
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from places import INTERPRETED, KERNELS, forget

import gpu_lstm
from gpu_lstm import functional
from gpu_lstm.equations import EQUATIONS
from gpu_lstm.kernels.cells import CELLS, SLSTM, Cell
from gpu_lstm.kernels.triton_rnn import equations
from gpu_lstm.kernels.triton_rnn.equations.lstm import sigmoid, tanh

pytestmark = [
    pytest.mark.usefixtures("exact_float32_products", "nan_in_fresh_memory"),
    pytest.mark.skipif(not INTERPRETED, reason="functions of kernels are replaced"),
]

# The minimal gated unit (Zhou et al., 2016), in the form of torch's GRU: f = sigmoid(z_f), n = tanh(z_n + f s),
# h' = (1 - f) h + f n. Gates 0, f, n, s, of which x reaches f and n; gradients 0, n, f, s, of which h reaches f and s.
MINIMAL = Cell(
    "minimal", ("h",), rows=2, x_start=1, x_end=3, h_start=2, functions=(2, 0), of_torch=False, normalises=False
)


@triton.jit
def next_cell(gates, c_prev):
    return c_prev + gates[1] * (gates[2] - c_prev)


@triton.jit
def forward(x, z, c_prev, bias_hh):
    f, s = sigmoid(x[1] + z[2] + bias_hh[0]), z[3] + bias_hh[1]
    gates = (tl.zeros_like(f), f, tanh(x[2] + f * s), s)
    return gates, next_cell(gates, c_prev), ()


@triton.jit
def backward(gates, c_prev, dz_o, d, peepholes):
    _, f, n, s = gates
    dz_n = d * f * (1.0 - n * n)
    dz_f = (d * (n - c_prev) + dz_n * s) * f * (1.0 - f)
    return (tl.zeros_like(d), dz_n, dz_f, dz_n * f), d * (1.0 - f), ()


@triton.jit
def output(o, v):
    return v


@triton.jit
def output_backward(o, v, dm):
    return tl.zeros_like(dm), dm


def input_product(x, weight, bias_ih, bias_hh, gain):
    hidden = len(weight) // 2
    return torch.nn.functional.pad(torch.nn.functional.linear(x, weight, bias_ih), (hidden, hidden))


def plain_loop(x, h, weights):
    """h [T, B, H] and the last, [B, H]."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    dense, found = functional.dense(weight_hh, h.shape[1]), []
    for of_x in x @ weight_ih.T + bias_ih:
        (z_f, z_n), (h_f, s) = of_x.chunk(2, 1), (h @ dense.T + bias_hh).chunk(2, 1)
        f = (z_f + h_f).sigmoid()
        h = (1 - f) * h + f * (z_n + f * s).tanh()
        found.append(h)
    return torch.stack(found), h


@pytest.mark.parametrize(("place", "heads"), [
    ("step", 1), ("held", 2), ("split/4", 1), ("pointwise", 2), ("resident", 1), ("resident", 2),
    *((f"cooperative/{plan}", heads) for plan in ("4/1/4", "16/1/1") for heads in (1, 2)),
])  # fmt: skip
def test_two_rows_a_unit(monkeypatch, place, heads):
    """Results and gradients, with biases, as of a plain loop in float64."""
    for name in ("forward", "backward", "next_cell", "output", "output_backward"):
        monkeypatch.setattr(equations, f"lstm_{name}", globals()[name])  # which run where no other cell is named
    monkeypatch.setitem(CELLS, MINIMAL.name, MINIMAL)
    monkeypatch.setitem(EQUATIONS, MINIMAL.name, SimpleNamespace(input_product=input_product))
    monkeypatch.setattr(functional, "GRU", MINIMAL)
    KERNELS[place].force(monkeypatch)
    forget()
    torch.manual_seed(0)
    steps, batch, inputs, hidden = 3, 9, 3, 20
    weights = [(2 * hidden, inputs), (2 * hidden, hidden // heads), (2 * hidden,), (2 * hidden,)]
    leaves = [torch.randn(n, requires_grad=True) for n in ((steps, batch, inputs), (batch, hidden), *weights)]
    given = torch.randn(steps, batch, hidden), torch.randn(batch, hidden)
    x, h, *weights = leaves
    ours = functional.gru_layer(x, weights, h, backend="triton")
    truth = plain_loop(*(t.double() for t in (x, h)), [w.double() for w in weights])
    gradients = (torch.autograd.grad(y, leaves, [d.to(y[0].dtype) for d in given]) for y in (ours, truth))
    for our, true in zip((*ours, *next(gradients)), (*truth, *next(gradients)), strict=True):
        torch.testing.assert_close(our, true.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["resident", "cooperative/8/1/4", "step", "pointwise"])
def test_what_a_reset_leaves_is_what_the_cell_says(monkeypatch, place):
    """Of an sLSTM's l a half, say; as on the reference, which asks the same cell."""
    monkeypatch.setitem(CELLS, SLSTM.name, SLSTM._replace(empty=(0.0, 0.5)))
    KERNELS[place].force(monkeypatch)
    forget()
    torch.manual_seed(0)
    module, x, resets = gpu_lstm.SLSTM(3, 8, backend="triton"), torch.randn(3, 4, 3), torch.rand(3, 4) < 0.5
    twin = copy.deepcopy(module)
    twin.backend = "reference"
    (y, states), (true, theirs) = (each(x, resets=resets) for each in (module, twin))
    torch.testing.assert_close(torch.cat([y, *states]), torch.cat([true, *theirs]))
