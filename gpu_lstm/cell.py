"""The LSTM cell in torch's operators: for reference.py, and for what backward takes again in autograd.py.

Gate order i, f, g, o, as torch.nn.LSTM states the equations:

    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
    c' = f c + i g                                          m = o tanh(c')

m is the hidden state h', or what a projection W_hr takes to h' where there is one (Sak et al., 2014).
"""

from torch import Tensor


def activate(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations [B, 4H] -> i, f, g, o, each [B, H]."""
    i, f, g, o = z.chunk(4, dim=1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def activate_in_place(z: Tensor) -> Tensor:
    """Pre-activations [T, B, 4H] -> gates in the same memory."""
    hidden = z.shape[2] // 4
    i_f, g, o = z.tensor_split((2 * hidden, 3 * hidden), dim=2)
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    return z


def next_cell(i: Tensor, f: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """c' in the dtype of c, each [..., H]."""
    return f * c + i.to(c.dtype) * g


def output(o: Tensor, c: Tensor) -> Tensor:
    """m in the dtype of o, each [..., H]; c is the state after the step."""
    return o * c.tanh().to(o.dtype)
