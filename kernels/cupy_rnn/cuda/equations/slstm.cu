// The sLSTM's cell, as ../../../triton_rnn/equations.py states it. Gates u, v, g, o; c is q, and the rest is l.
struct Slstm {
    static constexpr int KEPT = 2;
    static constexpr float LOWEST = -3.4028234663852886e38f;  // that is finite

    // log(1 + e^-|x|): by how much log(e^a + e^b) is above the larger of a and b, x apart.
    __device__ static float above(float x) { return log1pf(expf(-fabsf(x))); }

    __device__ static void forward(const Gates& x, const Gates& z, const Constants&, State& state, Gates& gates) {
        const float z_i = x[0] + z[0], z_f = x[1] + z[1], k = state.rest + fminf(z_f, 0.0f) - above(z_f);
        const float a = z_i - (k < LOWEST ? LOWEST : k);  // -inf, not NaN, where z_i and k are -inf
        gates[0] = sigmoid(a);
        gates[1] = sigmoid(-z_f);
        gates[2] = tanhf(x[2] + z[2]);
        gates[3] = sigmoid(x[3] + z[3]);
        state = {next(gates, state.c), fmaxf(k, z_i) + above(a)};
    }

    __device__ static float next(const Gates& gates, float q_prev) { return q_prev + gates[0] * (gates[2] - q_prev); }

    __device__ static float output(float o, float q) { return o * q; }

    __device__ static void output_backward(float o, float q, float dm, float& dz_o, float& dq) {
        dz_o = dm * q * o * (1.0f - o);
        dq = dm * o;
    }

    __device__ static void backward(const Gates& gates, float q_prev, float dz_o, const Constants&, State& d, Gates& dz) {
        const float u = gates[0], g = gates[2], stays = 1.0f - u, dg = d.c * (g - q_prev), dk = stays * (d.rest - u * dg);
        dz[0] = u * (d.rest + stays * dg);
        dz[1] = dk * gates[1];
        dz[2] = d.c * u * (1.0f - g * g);
        dz[3] = dz_o;
        d = {d.c * stays, dk};
    }
};
