// The cell, in float32. Gate order as in torch; m is named as by Sak, Senior & Beaufays (2014).
//
//     i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)      z = gates_x + W_hh h_prev
//     c = f * c_prev + i * g                                  m = o * tanh(c)    h = m, or W_hr m with a projection

constexpr int GATES = 4;  // and pre-activations of a unit, of every cell

enum Gate { I, F, G, O };

__device__ inline float exp_of(float x) { return exp2_of(x * 1.4426950408889634f); }

// exp overflows to inf for x << 0, and 1 / inf is the right limit.
__device__ inline float sigmoid(float x) { return reciprocal(1.0f + exp_of(-x)); }

// To 2 units in the last place, without a branch, finite for every finite x.
__device__ inline float tanh_of(float x) {
    // Near 0, where 1 - 2 / (exp(2x) + 1) cancels: x + x^3 P(x^2), a Chebyshev fit on |x| < 0.6.
    const float u = x * x;
    const float p = (((-0.005893945f * u + 0.020794617f) * u - 0.053783294f) * u + 0.13331915f) * u - 0.333333f;
    const float far = 1.0f - 2.0f * reciprocal(exp_of(2.0f * fabsf(x)) + 1.0f);
    return choose(fabsf(x) < 0.6f, x + x * u * p, copysignf(far, x));
}

// The cell after a step. With a projection m is the input of W_hr.
struct Lstm {
    static constexpr int OF_H = 4;
    static constexpr bool HAS_CONSTANT = false;
    float gates[GATES];
    float c, m;

    // From the parts of the pre-activations that come from the input and from h, and the cell state before the step.
    __device__ static Lstm forward(const float (&x)[GATES], const float (&of_h)[GATES], const float (&)[3], float c_prev) {
        float z[GATES];
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) z[gate] = x[gate] + of_h[gate];
        Lstm cell;
        cell.gates[I] = sigmoid(z[I]);
        cell.gates[F] = sigmoid(z[F]);
        cell.gates[G] = tanh_of(z[G]);
        cell.gates[O] = sigmoid(z[O]);
        cell.c = cell.gates[F] * c_prev + cell.gates[I] * cell.gates[G];
        cell.m = cell.gates[O] * tanh_of(cell.c);
        return cell;
    }

    // From the gradients of m and (from the step after) of c, those of the pre-activations, sigmoid' = s (1 - s) and
    // tanh' = 1 - t^2; returns that of c before. It needs all fields of the cell but m.
    __device__ float backward(float c_prev, float dm, float dc, float (&dz)[GATES]) const {
        const float i = gates[I], f = gates[F], g = gates[G], o = gates[O], t = tanh_of(c);
        dc += dm * o * (1.0f - t * t);
        dz[I] = dc * g * i * (1.0f - i);
        dz[F] = dc * c_prev * f * (1.0f - f);
        dz[G] = dc * i * (1.0f - g * g);
        dz[O] = dm * t * o * (1.0f - o);
        return dc * f;
    }
};
