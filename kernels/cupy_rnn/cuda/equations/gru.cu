// The GRU's cell, as torch.nn.GRU states it; gates in the order r, z, n, s, their gradients and W_hh h in n, r, z, s.
//
//     r, z = sigmoid(z_r), sigmoid(z_z)      n = tanh(z_n + r * s)      h = (1 - z) * n + z * h_prev
//
// z_n is W_in x + b_in, and s is W_hn h_prev + b_hn: h has no part in the first. c is h, and so is m.
struct Gru {
    static constexpr int OF_H = 3;
    static constexpr bool HAS_CONSTANT = true;  // s before the time loop, if h of no step is known, is b_hn
    enum Gate { R, Z, N, S };
    enum Gradient { OF_N, OF_R, OF_Z, OF_S };
    float gates[GATES];
    float c, m;

    __device__ static Gru forward(const float (&x)[GATES], const float (&of_h)[GATES], const float (&bias)[3], float c_prev) {
        Gru cell;
        cell.gates[R] = sigmoid(x[R] + of_h[OF_R] + bias[0]);
        cell.gates[Z] = sigmoid(x[Z] + of_h[OF_Z] + bias[1]);
        cell.gates[S] = x[S] + of_h[OF_S] + bias[2];
        cell.gates[N] = tanh_of(x[N] + cell.gates[R] * cell.gates[S]);
        cell.c = cell.m = cell.gates[N] + cell.gates[Z] * (c_prev - cell.gates[N]);
        return cell;
    }

    __device__ float backward(float c_prev, float dm, float dc, float (&dz)[GATES]) const {
        const float n = gates[N], r = gates[R], update = gates[Z], d = dm + dc;
        dz[OF_N] = d * (1.0f - update) * (1.0f - n * n);
        dz[OF_R] = dz[OF_N] * gates[S] * r * (1.0f - r);
        dz[OF_Z] = d * (c_prev - n) * update * (1.0f - update);
        dz[OF_S] = dz[OF_N] * r;
        return d * update;
    }
};
