// The equations of the cells in float32, as kernels/equations.py states them. The order of the gates is i, f, g, o for
// an LSTM, r, z, n, s for a GRU, and u, v, g, o for an sLSTM.
//
//     x            the part of each pre-activation that comes from the input
//     z            the part of each pre-activation that comes from h. A GRU's z, and its gradients dz, are n, r, z, s
//     Constants    the peepholes of the unit, or its biases b_hh
//     State        cell_forward replaces the state before the step by the state after it
//                  cell_backward replaces the gradient of the state after the step by the gradient before the step
//     v            c or LN(c)
//     dz_o, dv     the gradients of the last pre-activation and of v that come from m

enum Cell { Lstm, Gru, Slstm };
template <Cell CELL> constexpr int KEPT = CELL == Slstm ? 2 : 1;  // the numbers of a State that are used
constexpr int GATES = 4;  // every cell has four gates and four pre-activations a unit
using Gates = float[GATES];
constexpr float LOWEST = -3.4028234663852886e38f;  // the lowest finite float

struct Constants {
    float k[3];
    bool there;
};

struct State {
    float c, rest;  // q and l in an sLSTM, where q = c / n. Other cells have no rest
};

__device__ inline float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

// Return log(1 + e^-|x|). With x = a - b this is how far log(e^a + e^b) lies above max(a, b).
__device__ inline float above(float x) { return log1pf(expf(-fabsf(x))); }

template <Cell CELL>
__device__ float next_cell(const Gates& gates, float c_prev) {
    if (CELL == Slstm) return c_prev + gates[0] * (gates[2] - c_prev);
    if (CELL == Gru) return gates[2] + gates[1] * (c_prev - gates[2]);
    return gates[1] * c_prev + gates[0] * gates[2];
}

template <Cell CELL>
__device__ void cell_forward(const Gates& z_x, const Gates& z_h, const Constants& of, State& state, Gates& gates) {
    const float c_prev = state.c;
    if (CELL == Slstm) {
        const float z_i = z_x[0] + z_h[0], z_f = z_x[1] + z_h[1], k = state.rest + fminf(z_f, 0.0f) - above(z_f);
        const float a = z_i - (k < LOWEST ? LOWEST : k);  // where z_i and k are both -inf, z_i - k would be NaN
        gates[0] = sigmoid(a);
        gates[1] = sigmoid(-z_f);
        gates[2] = tanhf(z_x[2] + z_h[2]);
        gates[3] = sigmoid(z_x[3] + z_h[3]);
        state = {next_cell<CELL>(gates, c_prev), fmaxf(k, z_i) + above(a)};
    } else if (CELL == Gru) {
        gates[0] = sigmoid(z_x[0] + z_h[1] + of.k[0]);
        gates[1] = sigmoid(z_x[1] + z_h[2] + of.k[1]);
        gates[3] = z_x[3] + z_h[3] + of.k[2];
        gates[2] = tanhf(z_x[2] + gates[0] * gates[3]);
        state.c = next_cell<CELL>(gates, c_prev);
    } else {
        gates[0] = sigmoid(z_x[0] + z_h[0] + (of.there ? of.k[0] * c_prev : 0.0f));
        gates[1] = sigmoid(z_x[1] + z_h[1] + (of.there ? of.k[1] * c_prev : 0.0f));
        gates[2] = tanhf(z_x[2] + z_h[2]);
        state.c = next_cell<CELL>(gates, c_prev);
        gates[3] = sigmoid(z_x[3] + z_h[3] + (of.there ? of.k[2] * state.c : 0.0f));
    }
}

template <Cell CELL>
__device__ float output(float o, float v) { return CELL == Slstm ? o * v : CELL == Gru ? v : o * tanhf(v); }

template <Cell CELL>
__device__ void output_backward(float o, float v, float dm, float& dz_o, float& dv) {
    if (CELL == Slstm) {
        dz_o = dm * v * o * (1.0f - o), dv = dm * o;
    } else if (CELL == Gru) {
        dz_o = 0.0f, dv = dm;
    } else {
        const float t = tanhf(v);
        dz_o = dm * t * o * (1.0f - o), dv = dm * o * (1.0f - t * t);
    }
}

template <Cell CELL>
__device__ void cell_backward(const Gates& gates, float c_prev, float dz_o, const Constants& of, State& d, Gates& dz) {
    if (CELL == Slstm) {
        const float u = gates[0], g = gates[2], stays = 1.0f - u, dg = d.c * (g - c_prev), dk = stays * (d.rest - u * dg);
        dz[0] = u * (d.rest + stays * dg);
        dz[1] = dk * gates[1];
        dz[2] = d.c * u * (1.0f - g * g);
        dz[3] = dz_o;
        d = {d.c * stays, dk};
    } else if (CELL == Gru) {
        const float r = gates[0], update = gates[1], n = gates[2], s = gates[3];
        dz[0] = d.c * (1.0f - update) * (1.0f - n * n);
        dz[1] = dz[0] * s * r * (1.0f - r);
        dz[2] = d.c * (c_prev - n) * update * (1.0f - update);
        dz[3] = dz[0] * r;
        d.c *= update;
    } else {
        const float i = gates[0], f = gates[1], g = gates[2], dc = d.c + (of.there ? dz_o * of.k[2] : 0.0f);
        dz[0] = dc * g * i * (1.0f - i);
        dz[1] = dc * c_prev * f * (1.0f - f);
        dz[2] = dc * i * (1.0f - g * g);
        dz[3] = dz_o;
        d.c = dc * f + (of.there ? dz[0] * of.k[0] + dz[1] * of.k[1] : 0.0f);
    }
}
