// The cell, in float32. Gate order as in torch; m is named as by Sak, Senior & Beaufays (2014).
//
//     i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)      z = gates_x + W_hh h_prev
//     c = f * c_prev + i * g                                  m = o * tanh(c)    h = m, or W_hr m with a projection

enum Gate { I, F, G, O, GATES };

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
struct Cell {
    float i, f, g, o;  // gates
    float c, m;

    // From the pre-activations and the cell state before the step.
    __device__ static Cell forward(float z_i, float z_f, float z_g, float z_o, float c_prev) {
        Cell cell;
        cell.i = sigmoid(z_i);
        cell.f = sigmoid(z_f);
        cell.g = tanh_of(z_g);
        cell.o = sigmoid(z_o);
        cell.c = cell.f * c_prev + cell.i * cell.g;
        cell.m = cell.o * tanh_of(cell.c);
        return cell;
    }

    struct Gradient {
        float i, f, g, o;  // of the pre-activations: sigmoid' = s (1 - s), tanh' = 1 - t^2
        float c_prev;
    };

    // From the gradients of m and (from the step after) of c. It needs all fields of the cell but m.
    __device__ Gradient backward(float c_prev, float dm, float dc) const {
        const float t = tanh_of(c);
        dc += dm * o * (1.0f - t * t);
        Gradient d;
        d.i = dc * g * i * (1.0f - i);
        d.f = dc * c_prev * f * (1.0f - f);
        d.g = dc * i * (1.0f - g * g);
        d.o = dm * t * o * (1.0f - o);
        d.c_prev = dc * f;
        return d;
    }
};
