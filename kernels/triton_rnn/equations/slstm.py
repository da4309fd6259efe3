"""The sLSTM cell (Beck et al., 2024) on a tile of [rows, units], in float32, in two numbers a unit instead of three:

    k = l_prev + log sigmoid(z_f)    a = z_i - k    u = sigmoid(a)    q = q_prev + u * (tanh(z_g) - q_prev)
    l = max(k, z_i) + log(1 + e^-|a|)               o = sigmoid(z_o)  m = o * q

gpu_lstm/equations/slstm.py says why these are the paper's. An empty state is q = 0 and l = -inf. Backward reads the
gates u, v = sigmoid(-z_f), g and o, and q before the step; of l the gradient is carried, l itself is not read.
"""

import triton
import triton.language as tl

from .lstm import exp, sigmoid, tanh

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least float32 that is finite


@triton.jit
def above(x):
    """log(1 + e^-|x|): by how much log(e^a + e^b) is above the larger of a and b, x apart."""
    return tl.log(1.0 + exp(-tl.abs(x)))


@triton.jit
def slstm_next_cell(gates, q_prev):
    """q, [rows, units], of the gates u and g."""
    return q_prev + gates[0] * (gates[2] - q_prev)


@triton.jit
def slstm_forward(x, z, q_prev, rest_prev):
    """The parts of the pre-activations from the input and from h, and the state before the step
    -> ((u, v, g, o), q, (l,))."""
    z_i, z_f = x[0] + z[0], x[1] + z[1]
    k = rest_prev[0] + tl.minimum(z_f, 0.0) - above(z_f)
    a = z_i - tl.where(k < LOWEST, LOWEST, k)  # -inf, not NaN, where z_i and k are -inf
    gates = (sigmoid(a), sigmoid(-z_f), tanh(x[2] + z[2]), sigmoid(x[3] + z[3]))
    return gates, slstm_next_cell(gates, q_prev), (tl.maximum(k, z_i) + above(a),)


@triton.jit
def slstm_output_backward(o, q, dm):
    """Gradient of m = o q -> (dz_o, gradient of q)."""
    return dm * q * o * (1.0 - o), dm * o


@triton.jit
def slstm_backward(gates, q_prev, dz_o, dq, drest):
    """dz_o, and the gradients of q and l from m and the next step
    -> ((dz_i, dz_f, dz_g, dz_o), of q_prev, (of l_prev,))."""
    u, v, g, _ = gates
    stays, dl, d = 1.0 - u, drest[0], dq * (g - q_prev)
    dk = stays * (dl - u * d)
    return (u * (dl + stays * d), dk * v, dq * u * (1.0 - g * g), dz_o), dq * stays, (dk,)
