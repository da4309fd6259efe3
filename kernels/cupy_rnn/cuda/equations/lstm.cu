// The LSTM's cell, in float32, as ../../../triton_rnn/equations.py states it. Gates i, f, g, o.
//
// Every cell has these functions. x and z are the parts of the pre-activations from the input and from h; constants are
// peepholes of the unit, or biases of h. State before a step becomes that after it; backward its gradient after the step
// becomes that before it. v is c, or LN(c); dz_o and dv, what comes from m.

constexpr int GATES = 4;  // of a unit, and pre-activations, of every cell
using Gates = float[GATES];

struct Constants {
    float k[3];
    bool there;
};

struct State {
    float c, rest;  // and what a cell of KEPT = 2 has besides
};

__device__ inline float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

struct Lstm {
    static constexpr int KEPT = 1;

    __device__ static void forward(const Gates& x, const Gates& z, const Constants& of, State& state, Gates& gates) {
        const float c_prev = state.c;
        gates[0] = sigmoid(x[0] + z[0] + (of.there ? of.k[0] * c_prev : 0.0f));
        gates[1] = sigmoid(x[1] + z[1] + (of.there ? of.k[1] * c_prev : 0.0f));
        gates[2] = tanhf(x[2] + z[2]);
        state.c = next(gates, c_prev);
        gates[3] = sigmoid(x[3] + z[3] + (of.there ? of.k[2] * state.c : 0.0f));
    }

    __device__ static float next(const Gates& gates, float c_prev) { return gates[1] * c_prev + gates[0] * gates[2]; }

    __device__ static float output(float o, float v) { return o * tanhf(v); }

    __device__ static void output_backward(float o, float v, float dm, float& dz_o, float& dv) {
        const float t = tanhf(v);
        dz_o = dm * t * o * (1.0f - o);
        dv = dm * o * (1.0f - t * t);
    }

    __device__ static void backward(
        const Gates& gates, float c_prev, float dz_o, const Constants& of, State& d, Gates& dz) {
        const float i = gates[0], f = gates[1], g = gates[2], dc = d.c + (of.there ? dz_o * of.k[2] : 0.0f);
        dz[0] = dc * g * i * (1.0f - i);
        dz[1] = dc * c_prev * f * (1.0f - f);
        dz[2] = dc * i * (1.0f - g * g);
        dz[3] = dz_o;
        d.c = dc * f + (of.there ? dz[0] * of.k[0] + dz[1] * of.k[1] : 0.0f);
    }
};
