// The GRU's cell, as ../../../triton_rnn/equations.py states it. Gates r, z, n, s; W_hh h and gradients n, r, z, s.
struct Gru {
    static constexpr int KEPT = 1;

    __device__ static void forward(const Gates& x, const Gates& z, const Constants& of, State& state, Gates& gates) {
        gates[0] = sigmoid(x[0] + z[1] + of.k[0]);
        gates[1] = sigmoid(x[1] + z[2] + of.k[1]);
        gates[3] = x[3] + z[3] + of.k[2];
        gates[2] = tanhf(x[2] + gates[0] * gates[3]);
        state.c = next(gates, state.c);
    }

    __device__ static float next(const Gates& gates, float c_prev) { return gates[2] + gates[1] * (c_prev - gates[2]); }

    __device__ static float output(float, float v) { return v; }

    __device__ static void output_backward(float, float, float dm, float& dz_o, float& dv) { dz_o = 0.0f, dv = dm; }

    __device__ static void backward(const Gates& gates, float c_prev, float, const Constants&, State& d, Gates& dz) {
        const float r = gates[0], update = gates[1], n = gates[2], s = gates[3];
        dz[0] = d.c * (1.0f - update) * (1.0f - n * n);
        dz[1] = dz[0] * s * r * (1.0f - r);
        dz[2] = d.c * (c_prev - n) * update * (1.0f - update);
        dz[3] = dz[0] * r;
        d.c *= update;
    }
};
