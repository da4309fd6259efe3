"""The GRU cell (Cho et al., 2014) on a tile of [rows, units], in float32, as torch.nn.GRU states it:

    r, z = sigmoid(z_r), sigmoid(z_z)      n = tanh(z_n + r * s)      h = (1 - z) * n + z * h_prev

where z_n is W_in x + b_in, and s is W_hn h_prev + b_hn: four gates a unit, in the order r, z, n, s, of which x reaches
the first three. Gradients are in the order n, r, z, s, of which x reaches the first three and h the last three; so is
W_hh h, whose first is 0. c is h in float32; m, what the next product multiplies, is h as well.
"""

import triton
import triton.language as tl  # noqa: F401  # which the interpreter looks for

from .lstm import sigmoid, tanh


@triton.jit
def gru_next_cell(gates, c_prev):
    """h, [rows, units], of the gates z and n."""
    return gates[2] + gates[1] * (c_prev - gates[2])


@triton.jit
def gru_forward(x, z, c_prev, bias_hh):
    """The parts of the pre-activations from the input, of s only if h of some steps was known, and from h, its biases,
    and h before the step -> ((r, z, n, s), h, ())."""
    z_r, z_z, s = x[0] + z[1], x[1] + z[2], z[3]
    if len(bias_hh) > 0:
        z_r += bias_hh[0]
        z_z += bias_hh[1]
        s += bias_hh[2]
    if len(x) == 4:
        s += x[3]
    r = sigmoid(z_r)
    gates = (r, sigmoid(z_z), tanh(x[2] + r * s, x[2].dtype), s)
    return gates, gru_next_cell(gates, c_prev), ()


@triton.jit
def gru_backward(gates, c_prev, d):
    """Gradient of h, by what it multiplies and from the next step -> ((dz_n, dz_r, dz_z, ds), of c_prev, ())."""
    r, update, n, s = gates
    dz_n = d * (1.0 - update) * (1.0 - n * n)
    dz_r, dz_z = dz_n * s * r * (1.0 - r), d * (c_prev - n) * update * (1.0 - update)
    return (dz_n, dz_r, dz_z, dz_n * r), d * update, ()
