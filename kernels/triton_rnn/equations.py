"""The cells on tiles of [rows, units], in float32. Every kernel family computes the one that its constants name.

    LSTM   i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
           c = f * c_prev + i * g                                  m = o * tanh(c), or o * tanh(LN(c))
           with peepholes z_i += p_i * c_prev      z_f += p_f * c_prev      z_o += p_o * c
    GRU    r, z = sigmoid(z_r), sigmoid(z_z)       n = tanh(z_n + r * s)    c = m = (1 - z) * n + z * c_prev
    sLSTM  k = l_prev + log sigmoid(z_f)    a = z_i - k    u = sigmoid(a)    c = c_prev + u * (tanh(z_g) - c_prev)
           l = max(k, z_i) + log(1 + e^-|a|)               o = sigmoid(z_o)  m = o * c

m is the cell's output: with a projection h = W_hr m, without one h = m. Gates are i, f, g and o, in this order; r, z, n
and s; u, v = sigmoid(-z_f), g and o. gpu_lstm/equations/ says where the equations come from.

Of a GRU z_n is W_in x + b_in, and s is W_hn h_prev + b_hn: x reaches the first three gates. Gradients are in the order
n, r, z, s, of which x reaches the first three and h the last three; so is W_hh h, whose first is 0. What a cell keeps
of a unit beside c is a tuple, `rest`: of an sLSTM l, of others nothing. An empty state is c = 0 and l = -inf. Backward
reads c before the step; of l the gradient is carried, l itself is not read.
"""

import triton
import triton.language as tl

from .features import INTERPRETED

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least float32 that is finite


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
def above(x):
    """log(1 + e^-|x|): by how much log(e^a + e^b) is above the larger of a and b, x apart."""
    return tl.log(1.0 + exp(-tl.abs(x)))


@triton.jit
def after_zeros(z):
    """What h sends to the last gates -> to all four: zeros to those that it does not reach."""
    return (0.0,) * (4 - len(z)) + z


@triton.jit
def next_cell(gates, c_prev, S: tl.constexpr):
    """c after a step, [rows, units]."""
    return (
        c_prev + gates[0] * (gates[2] - c_prev) if S.CELL == "slstm" else
        gates[2] + gates[1] * (c_prev - gates[2]) if S.CELL == "gru" else gates[1] * c_prev + gates[0] * gates[2]
    )  # fmt: skip


@triton.jit
def cell_forward(x, z, c_prev, rest, constants, S: tl.constexpr):
    """The parts of the pre-activations from the input, of s only if h of some steps was known, and from h; c and the
    rest before the step; peepholes, or biases of h -> (four gates, c, the rest)."""
    if S.CELL == "slstm":
        z_i, z_f = x[0] + z[0], x[1] + z[1]
        k = rest[0] + tl.minimum(z_f, 0.0) - above(z_f)
        a = z_i - tl.where(k < LOWEST, LOWEST, k)  # -inf, not NaN, where z_i and k are -inf
        gates = (sigmoid(a), sigmoid(-z_f), tanh(x[2] + z[2]), sigmoid(x[3] + z[3]))
        c, rest = next_cell(gates, c_prev, S), (tl.maximum(k, z_i) + above(a),)
    elif S.CELL == "gru":
        z_r, z_z, s = x[0] + z[1], x[1] + z[2], z[3]
        if len(constants) > 0:
            z_r += constants[0]
            z_z += constants[1]
            s += constants[2]
        if len(x) == 4:
            s += x[3]
        r = sigmoid(z_r)
        gates = (r, sigmoid(z_z), tanh(x[2] + r * s, x[2].dtype), s)
        c = next_cell(gates, c_prev, S)
    else:
        z_i, z_f, z_g, z_o = x[0] + z[0], x[1] + z[1], x[2] + z[2], x[3] + z[3]
        if len(constants) > 0:
            z_i += constants[0] * c_prev
            z_f += constants[1] * c_prev
        i, f, g = sigmoid(z_i), sigmoid(z_f), tanh(z_g)
        c = next_cell((i, f, g), c_prev, S)
        if len(constants) > 0:
            z_o += constants[2] * c
        gates = (i, f, g, sigmoid(z_o))
    return gates, c, rest


@triton.jit
def output(o, v, S: tl.constexpr):
    """m, the cell's output, of its last gate o and v, which is c or, in a cell that `normalises`, LN(c)."""
    return o * v if S.CELL == "slstm" else v if S.CELL == "gru" else o * tanh(v)


@triton.jit
def output_backward(o, v, dm, S: tl.constexpr):
    """The gradients (of the last pre-activation, of v), as far as they come from that of m: sigmoid' = s (1 - s)."""
    if S.CELL == "slstm":
        dz_o, dv = dm * v * o * (1.0 - o), dm * o
    elif S.CELL == "gru":
        dz_o, dv = tl.zeros_like(dm), dm
    else:
        t = tanh(v)
        dz_o, dv = dm * t * o * (1.0 - o), dm * o * (1.0 - t * t)
    return dz_o, dv


@triton.jit
def cell_backward(gates, c_prev, dz_o, dc, drest, peepholes, S: tl.constexpr):
    """Gradients of the last pre-activation from m, and of c and the rest from m and the next step
    -> (of the four pre-activations; of c_prev; of the rest before)."""
    if S.CELL == "slstm":
        u, v, g, _ = gates
        stays, dl, d = 1.0 - u, drest[0], dc * (g - c_prev)
        dk = stays * (dl - u * d)
        dz = (u * (dl + stays * d), dk * v, dc * u * (1.0 - g * g), dz_o)
        dc_prev, drest = dc * stays, (dk,)
    elif S.CELL == "gru":
        r, update, n, s = gates
        dz_n = dc * (1.0 - update) * (1.0 - n * n)
        dz_r, dz_z = dz_n * s * r * (1.0 - r), dc * (c_prev - n) * update * (1.0 - update)
        dz, dc_prev = (dz_n, dz_r, dz_z, dz_n * r), dc * update
    else:
        i, f, g, _ = gates
        if len(peepholes) > 0:
            dc += dz_o * peepholes[2]
        dz_i = dc * g * i * (1.0 - i)
        dz_f = dc * c_prev * f * (1.0 - f)
        dz = (dz_i, dz_f, dc * i * (1.0 - g * g), dz_o)
        dc_prev = dc * f
        if len(peepholes) > 0:
            dc_prev += dz_i * peepholes[0] + dz_f * peepholes[1]
    return dz, dc_prev, drest
