"""The GRU cell (Cho et al., 2014) on a tile of [rows, units], in float32, as torch.nn.GRU states it:

    r, z = sigmoid(z_r), sigmoid(z_z)      n = tanh(z_n + r * s)      h = (1 - z) * n + z * h_prev

where z_n is W_in x + b_in, and s is W_hn h_prev + b_hn: four pre-activations a unit, in the order n, r, z, s, of which
x reaches the first three and h the last three. c is h in float32; m, what the next product multiplies, is h as well.
"""

import triton
import triton.language as tl  # noqa: F401  # which the interpreter looks for

from .lstm import sigmoid, tanh


@triton.jit
def gru_next_cell(gates, c_prev):
    """h, [rows, units], of the gates n and z."""
    return gates[0] + gates[2] * (c_prev - gates[0])


@triton.jit
def gru_forward(x, z, c_prev):
    """The parts of the pre-activations from the input and from h, and h before the step -> ((n, r, z, s), h)."""
    r, update, s = sigmoid(x[1] + z[1]), sigmoid(x[2] + z[2]), x[3] + z[3]
    gates = (tanh(x[0] + r * s, x[0].dtype), r, update, s)
    return gates, gru_next_cell(gates, c_prev)


@triton.jit
def gru_backward(gates, c_prev, d):
    """Gradient of h, by what it multiplies and from the next step -> ((dz_n, dz_r, dz_z, ds), gradient of c_prev)."""
    n, r, update, s = gates
    dz_n = d * (1.0 - update) * (1.0 - n * n)
    dz_r, dz_z = dz_n * s * r * (1.0 - r), d * (c_prev - n) * update * (1.0 - update)
    return (dz_n, dz_r, dz_z, dz_n * r), d * update
