// The GRU's cell, as torch.nn.GRU states it; pre-activations in the order n, r, z, s.
//
//     r, z = sigmoid(z_r), sigmoid(z_z)      n = tanh(z_n + r * s)      h = (1 - z) * n + z * h_prev
//
// z_n is W_in x + b_in, and s is W_hn h_prev + b_hn: h has no part in the first. c is h, and so is m.
struct Gru {
    static constexpr int OF_H = 3;  // R, Z and S
    enum Gate { N, R, Z, S };
    float gates[GATES];
    float c, m;

    __device__ static Gru forward(const float (&z)[GATES], float c_prev) {
        Gru cell;
        cell.gates[R] = sigmoid(z[R]);
        cell.gates[Z] = sigmoid(z[Z]);
        cell.gates[S] = z[S];
        cell.gates[N] = tanh_of(z[N] + cell.gates[R] * z[S]);
        cell.c = cell.m = cell.gates[N] + cell.gates[Z] * (c_prev - cell.gates[N]);
        return cell;
    }

    __device__ float backward(float c_prev, float dm, float dc, float (&dz)[GATES]) const {
        const float n = gates[N], r = gates[R], update = gates[Z], d = dm + dc;
        dz[N] = d * (1.0f - update) * (1.0f - n * n);
        dz[R] = dz[N] * gates[S] * r * (1.0f - r);
        dz[Z] = d * (c_prev - n) * update * (1.0f - update);
        dz[S] = dz[N] * r;
        return d * update;
    }
};
