"""The cells on a tile: up to UNITS units of one sequence, in float32.

A tile is one array [ROWS, UNITS] whose rows have names; a function reads rows and replaces others. Since all rows are in
one array at known distances, LLVM knows that they do not overlap. triton_rnn/equations/ states the formulas.

    forward     Z 0..3: from h, GATES 0..3: from x, C, REST  ->  GATES, C, REST;  GATES, C  ->  M
    backward    GATES, C before the step, M: dm, DC, DREST  ->  Z 0..3: of the pre-activations, DC and DREST before it
"""

from numba import njit

from .functions import HOW, F, above, sigmoid, tanh

UNITS = 128
GATES, Z, CONSTANTS, C, REST, M, DZ_O, DV, BEFORE, ROWS = (row * UNITS for row in (0, 4, 8, 11, 12, 13, 14, 15, 16, 17))
"""Where rows begin. CONSTANTS: peepholes, or the biases of h. DZ_O and DV: gradients of the pre-activation of o and of
v, which is c or LN(c). BEFORE: c before a step. Backward DC is in C, DREST in REST."""
LSTM, GRU, SLSTM = range(3)
NUMBERS = {"lstm": LSTM, "gru": GRU, "slstm": SLSTM}
LOWEST = F(-3.4028234663852886e38)  # that is finite


@njit(**HOW)
def lstm(w, n, peepholes):
    for j in range(n):
        z_i, z_f = w[j] + w[Z + j], w[UNITS + j] + w[Z + UNITS + j]
        z_g, z_o, c = w[2 * UNITS + j] + w[Z + 2 * UNITS + j], w[3 * UNITS + j] + w[Z + 3 * UNITS + j], w[C + j]
        if peepholes:
            z_i += w[CONSTANTS + j] * c
            z_f += w[CONSTANTS + UNITS + j] * c
        i, f, g = sigmoid(z_i), sigmoid(z_f), tanh(z_g)
        c = f * c + i * g
        if peepholes:
            z_o += w[CONSTANTS + 2 * UNITS + j] * c
        w[j], w[UNITS + j], w[2 * UNITS + j], w[3 * UNITS + j] = i, f, g, sigmoid(z_o)
        w[C + j] = c


@njit(**HOW)
def gru(w, n):
    for j in range(n):
        r = sigmoid(w[j] + w[Z + UNITS + j] + w[CONSTANTS + j])
        z = sigmoid(w[UNITS + j] + w[Z + 2 * UNITS + j] + w[CONSTANTS + UNITS + j])
        s = w[3 * UNITS + j] + w[Z + 3 * UNITS + j] + w[CONSTANTS + 2 * UNITS + j]
        g = tanh(w[2 * UNITS + j] + r * s)
        w[j], w[UNITS + j], w[2 * UNITS + j], w[3 * UNITS + j] = r, z, g, s
        w[C + j] = g + z * (w[C + j] - g)


@njit(**HOW)
def slstm(w, n):
    for j in range(n):
        z_i, z_f = w[j] + w[Z + j], w[UNITS + j] + w[Z + UNITS + j]
        k = w[REST + j] + (z_f if z_f < F(0) else F(0)) - above(z_f)
        a = z_i - (LOWEST if k < LOWEST else k)  # -inf, not NaN, where z_i and k are -inf
        u, g = sigmoid(a), tanh(w[2 * UNITS + j] + w[Z + 2 * UNITS + j])
        o = sigmoid(w[3 * UNITS + j] + w[Z + 3 * UNITS + j])
        w[j], w[UNITS + j], w[2 * UNITS + j], w[3 * UNITS + j] = u, sigmoid(-z_f), g, o
        w[C + j] = w[C + j] + u * (g - w[C + j])
        w[REST + j] = (z_i if k < z_i else k) + above(a)


@njit(**HOW)
def output(w, n, cell):
    """M of o and v, which is in C."""
    for j in range(n):
        if cell == LSTM:
            w[M + j] = w[3 * UNITS + j] * tanh(w[C + j])
        elif cell == SLSTM:
            w[M + j] = w[3 * UNITS + j] * w[C + j]
        else:
            w[M + j] = w[C + j]


@njit(**HOW)
def next_cell(w, n, cell):
    """DV becomes v, c after the step."""
    for j in range(n):
        c = w[BEFORE + j]
        if cell == LSTM:
            w[DV + j] = w[UNITS + j] * c + w[j] * w[2 * UNITS + j]
        elif cell == SLSTM:
            w[DV + j] = c + w[j] * (w[2 * UNITS + j] - c)


@njit(**HOW)
def output_backward(w, n, cell):
    """DV, v -> its gradient, and DZ_O."""
    for j in range(n):
        o, v, dm = w[3 * UNITS + j], w[DV + j], w[M + j]
        if cell == LSTM:
            t = tanh(v)
            w[DZ_O + j], w[DV + j] = dm * t * o * (F(1) - o), dm * o * (F(1) - t * t)
        elif cell == SLSTM:
            w[DZ_O + j], w[DV + j] = dm * v * o * (F(1) - o), dm * o
        else:
            w[DV + j] = dm


@njit(**HOW)
def lstm_backward(w, n, peepholes):
    for j in range(n):
        i, f, g, dz_o, dc = w[j], w[UNITS + j], w[2 * UNITS + j], w[DZ_O + j], w[C + j]
        if peepholes:
            dc += dz_o * w[CONSTANTS + 2 * UNITS + j]
        dz_i, dz_f = dc * g * i * (F(1) - i), dc * w[BEFORE + j] * f * (F(1) - f)
        w[Z + j], w[Z + UNITS + j] = dz_i, dz_f
        w[Z + 2 * UNITS + j], w[Z + 3 * UNITS + j] = dc * i * (F(1) - g * g), dz_o
        dc = dc * f
        if peepholes:
            dc += dz_i * w[CONSTANTS + j] + dz_f * w[CONSTANTS + UNITS + j]
        w[C + j] = dc


@njit(**HOW)
def gru_backward(w, n):
    for j in range(n):
        r, z, g, s, dc = w[j], w[UNITS + j], w[2 * UNITS + j], w[3 * UNITS + j], w[C + j]
        dz_n = dc * (F(1) - z) * (F(1) - g * g)
        w[Z + j], w[Z + UNITS + j] = dz_n, dz_n * s * r * (F(1) - r)
        w[Z + 2 * UNITS + j], w[Z + 3 * UNITS + j] = dc * (w[BEFORE + j] - g) * z * (F(1) - z), dz_n * r
        w[C + j] = dc * z


@njit(**HOW)
def slstm_backward(w, n):
    for j in range(n):
        u, g, dq, dl = w[j], w[2 * UNITS + j], w[C + j], w[REST + j]
        stays, dg = F(1) - u, dq * (g - w[BEFORE + j])
        dk = stays * (dl - u * dg)
        w[Z + j], w[Z + UNITS + j] = u * (dl + stays * dg), dk * w[UNITS + j]
        w[Z + 2 * UNITS + j], w[Z + 3 * UNITS + j] = dq * u * (F(1) - g * g), w[DZ_O + j]
        w[C + j], w[REST + j] = dq * stays, dk
