"""The LSTM cell on a tile of [rows, units], in float32.

Gate order i, f, g, o, as in torch. Equations: Hochreiter & Schmidhuber (1997) with the forget gate of
Gers, Schmidhuber & Cummins (2000), as torch.nn.LSTM states them:

    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
    c = f * c_prev + i * g                                  m = o * tanh(c)

With peepholes (Gers & Schmidhuber, 2000) gates depend on the cell state of their unit, by weights p_i, p_f, p_o:

    z_i += p_i * c_prev      z_f += p_f * c_prev      z_o += p_o * c

With a layer norm of c m = o * tanh(LN(c)). m is the cell's output, named as by Sak, Senior & Beaufays
(2014): with a projection h = W_hr m, without one h = m.
"""

import triton
import triton.language as tl

from ..features import INTERPRETED

# Triton's division and exp need more instructions, for subnormal results, which do not matter here.


@triton.jit
def approximate(PTX: tl.constexpr, x):
    return tl.inline_asm_elementwise(PTX, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, to one unit in the last place; 0 where the result is below 2^-126, and for inf."""
    return 1.0 / x if INTERPRETED else approximate("rcp.approx.ftz.f32 $0, $1;", x)


@triton.jit
def exp(x):
    """e^x, 0 where it is below 2^-126."""
    return tl.exp(x) if INTERPRETED else approximate("ex2.approx.ftz.f32 $0, $1;", x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    # exp overflows to inf for x << 0, and 1 / inf is the right limit.
    return reciprocal(1.0 + exp(-x))


@triton.jit
def tanh(x, DTYPE: tl.constexpr = tl.float32):
    """tanh to 2 units in the last place, finite for every finite x; where bfloat16 is enough, to 2^-11. (libdevice's is
    not in the interpreter.)"""
    if DTYPE.is_bf16() and not INTERPRETED:
        return approximate("tanh.approx.f32 $0, $1;", x)
    # Near 0, where 1 - 2 / (exp(2x) + 1) cancels: x + x^3 P(x^2), a Chebyshev fit on |x| < 0.6.
    u = x * x
    p = (((-0.005893945 * u + 0.020794617) * u - 0.053783294) * u + 0.13331915) * u - 0.333333
    far = 1.0 - 2.0 * reciprocal(exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def lstm_next_cell(gates, c_prev):
    """c, [rows, units], of the gates i, f and g."""
    return gates[1] * c_prev + gates[0] * gates[2]


@triton.jit
def lstm_forward(x, z, c_prev, peepholes):
    """The parts of the pre-activations from the input and from h, and c before the step -> ((i, f, g, o), c, ())."""
    z_i, z_f, z_g, z_o = x[0] + z[0], x[1] + z[1], x[2] + z[2], x[3] + z[3]
    if len(peepholes) > 0:
        z_i += peepholes[0] * c_prev
        z_f += peepholes[1] * c_prev
    i, f, g = sigmoid(z_i), sigmoid(z_f), tanh(z_g)
    c = lstm_next_cell((i, f, g), c_prev)
    if len(peepholes) > 0:
        z_o += peepholes[2] * c
    return (i, f, g, sigmoid(z_o)), c, ()


@triton.jit
def lstm_output_backward(o, v, dm):
    """Gradient of m = o tanh(v) -> (dz_o, gradient of v). dz is of a pre-activation: sigmoid' = s (1 - s)."""
    t = tanh(v)
    return dm * t * o * (1.0 - o), dm * o * (1.0 - t * t)


@triton.jit
def lstm_backward(gates, c_prev, dz_o, dc, peepholes):
    """dz_o, and the gradient of c from m and the next step -> ((dz_i, dz_f, dz_g, dz_o), of c_prev, ())."""
    i, f, g, _ = gates
    if len(peepholes) > 0:
        dc += dz_o * peepholes[2]
    dz_i = dc * g * i * (1.0 - i)
    dz_f = dc * c_prev * f * (1.0 - f)
    dz_g = dc * i * (1.0 - g * g)
    dc_prev = dc * f
    if len(peepholes) > 0:
        dc_prev += dz_i * peepholes[0] + dz_f * peepholes[1]
    return (dz_i, dz_f, dz_g, dz_o), dc_prev, ()
