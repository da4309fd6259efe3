"""The LSTM cell in torch's operators: for the reference, and for the gates that backward recomputes.

The order of the gates is i, f, g, o. The equations are the same as in torch.nn.LSTM:

    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
    c' = f c + i g                                          m = o tanh(c')

m is the hidden state h'. With a projection, h' = W_hr m (Sak et al., 2014). With peepholes p [3H] (Gers & Schmidhuber,
2000) the gates i, f and o also depend on the cell state of their own unit: z_i + p_i c, z_f + p_f c and z_o + p_o c'
replace z_i, z_f and z_o. With layer norms (Ba, Kiros & Hinton, 2016, their equations 20 to 22)

    z = LN(W_ih x) + LN(W_hh h)                             m = o tanh(LN(c'))

where LN(v) = gain (v - mean(v)) / sqrt(var(v) + EPS) + bias. The mean and the variance are over the 4H elements of W_ih
x and of W_hh h, and over the H elements of c'. The biases of the first two layer norms are b_ih and b_hh.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..kernels import heads
from ..kernels.layer_norm import EPS

FourGates = tuple[Tensor, Tensor, Tensor, Tensor]


class Gates(NamedTuple):
    """The gates and states of every step of a layer in one direction. They are zero past the end of a sequence."""

    input: Tensor  # [T, B, H] i, from 0 to 1
    forget: Tensor  # [T, B, H] f, from 0 to 1
    output: Tensor  # [T, B, H] o, from 0 to 1
    candidate: Tensor  # [T, B, H] g, from -1 to 1
    cell: Tensor  # [T, B, H] c, after the step
    hidden: Tensor  # [T, B, P] h, after the step; P = H without a projection


def gates_of(gates: Tensor, c: Tensor, h: Tensor) -> Gates:
    """Return the Gates, from the activated gates [T, B, 4H], c [T, B, H] and h [T, B, P]."""
    i, f, g, o = gates.chunk(4, dim=2)
    return Gates(i, f, o, g, c, h)


def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """Return x W^T + bias, or LN(x W^T) if there is a gain: x [..., K], W [N, K] -> [..., N].

    W may have heads and be [N, D]. If `weight` is None, x is the product itself.
    """
    if weight is not None and weight.shape[1] == x.shape[-1] and gain is None:
        return F.linear(x, weight, bias)
    product = x if weight is None else heads.product(x, weight)
    if gain is not None:
        return normalised(product, gain, bias)
    return product if bias is None else product + bias


def normalised(v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return LN(v) over the last dimension of v."""
    return F.layer_norm(v, v.shape[-1:], gain, bias, EPS)


def input_product(
    x: Tensor, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, gain: Tensor | None
) -> Tensor:
    """Return the terms of z that are known before the time loop, [T, B, 4H], in new memory.

    They are W_ih x + b_ih + b_hh. With a gain they are LN(W_ih x), where the bias of LN is b_ih + b_hh.
    """
    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
    if gain is None:
        return F.linear(x, weight, bias)
    return normalised(F.linear(x, weight), gain, bias).contiguous()


def add_product(z: Tensor, h: Tensor, weight: Tensor, gain: Tensor | None) -> None:
    """Add W_hh h, or LN(W_hh h) without a bias if there is a gain, to z [T, B, 4H]. h is [T, B, P]."""
    if gain is None and weight.shape[1] == h.shape[2]:
        z.flatten(0, 1).addmm_(h.flatten(0, 1), weight.T)
    else:
        z += linear(h, weight, None, gain)


def pre_activations(of_x: Tensor, of_h: Tensor) -> Tensor:
    """Return z [B, 4H] from W_ih x + b_ih and W_hh h + b_hh, [B, 4H] each."""
    return of_x + of_h


def step(z: Tensor, c: Tensor, peephole: Tensor | None) -> tuple[FourGates, Tensor]:
    """Return (i, f, g, o) and c', each [B, H], from the pre-activations z [B, 4H], the previous c and p."""
    z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
    if peephole is not None:
        p_i, p_f, p_o = peephole.chunk(3)
        z_i, z_f = z_i + p_i * c, z_f + p_f * c
    i, f, g = z_i.sigmoid(), z_f.sigmoid(), z_g.tanh()
    c = next_cell((i, f, g, z_o), c)  # which does not read z_o
    if peephole is not None:
        z_o = z_o + p_o * c
    return (i, f, g, z_o.sigmoid()), c


def activate_in_place(z: Tensor, peephole: Tensor | None, c: Tensor | None) -> Tensor:
    """Turn the pre-activations z [T, B, 4H] into gates in the same memory.

    c [T, B, H] has the state before each step. Only peepholes need it.
    """
    hidden = z.shape[2] // 4
    i_f, g, o = z.tensor_split((2 * hidden, 3 * hidden), dim=2)
    if peephole is not None and c is not None:
        p_i, p_f, p_o = peephole.chunk(3)
        i, f = i_f.chunk(2, dim=2)
        i.add_(p_i * c)
        f.add_(p_f * c)
    i_f.sigmoid_()
    g.tanh_()
    if peephole is not None and c is not None:
        o.add_(p_o * next_cell((i, f, g, o), c))
    o.sigmoid_()
    return z


def next_cell(gates: FourGates, c: Tensor) -> Tensor:
    """Return c' [..., H] in the dtype of c."""
    i, f, g, _ = gates
    return f * c + i.to(c.dtype) * g


def output(gates: FourGates, c: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return m [..., H] in the dtype of o. c is the state after the step. It is normalised if there is a gain."""
    o = gates[3]
    if gain is not None:
        c = normalised(c, gain.to(c.dtype), None if bias is None else bias.to(c.dtype))
    return o * c.tanh().to(o.dtype)
