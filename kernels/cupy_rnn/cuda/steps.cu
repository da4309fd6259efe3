// One step of a layer, without its product with W_hh. Each thread computes a cell, one unit of one sequence, in
// float32.
//
// kernels/by_steps.py launches a kernel at every step: after_product forward, before_product backward. If a step is
// divided, a launch computes the part from START to END, which are 'z', 'c', 'm' or 'h'. The time that a step visits is
// explained in triton_rnn/cell/indexing.py.

constexpr int THREADS = 128;  // threads of a block

// The arguments of both kernels, in this order. A pointer is null if the call has no such tensor. kernels/tensors.py,
// triton_rnn/parameters.py and triton_rnn/tiles/pointwise.py describe the tensors. In the part between W_hr m and h the
// units are the features of h.
template <typename E>
struct Call {
    E *gates, *dgates, *z, *dz;                              // [T*B, 4H]; z and dz [B, 4H], or [B, heads, 4 D]
    E *h, *dh, *dh_total, *reset_h;                          // [T*B, H]
    E *h0, *h_n, *dh_n, *h_next, *dh_next, *dropout_h, *m;   // [B, H]
    E *weight_peephole, *bias_hh;                            // [3H]
    float *c, *reset_c, *dreset_h, *dreset_c, *normed_c;     // [T*B, H]
    float *c0, *c_n, *dc;                                    // [KEPT, B, H]
    float *o, *v, *dh_from_zoneout;                          // [B, H]
    void *zoneout_h, *zoneout_c;                             // [T*B, H] bool, or one float: a rate
    bool *resets;                                            // [T*B]
    int *lengths;                                            // [B]
    int step, T, B, H, heads, from_x, reverse, rate_h, rate_c;
};

// The position of one sequence at one step: its row in tensors [T*B, *], whether the step is within its length, whether
// the state is not reset before the step, and whether the sequence ends with it.
struct Position {
    long long row;
    bool valid, continues, last;

    template <typename E>
    __device__ Position(const Call<E>& a, int step, int sequence) {
        const int length = a.lengths ? element(a.lengths, sequence) : a.T;
        valid = step < length;
        const int time = a.reverse && valid ? length - 1 - step : step;
        row = static_cast<long long>(time) * a.B + sequence;
        // A reset at t separates t from t - 1 in both directions. In reverse the step before visited time + 1.
        const int later = a.reverse ? time + 1 : time;
        continues = valid && !(a.resets && later < length && element(a.resets, a.reverse ? row + a.B : row));
        last = step == length - 1;
    }
};

// The thread's cell, in a grid of (sequences, tiles of units). A field `..._at` is its offset in tensors of one shape.
struct Place : Position {
    const int sequence = blockIdx.x, unit = blockIdx.y * THREADS + threadIdx.x;
    const bool exists, next_continues;
    const long long at, prev_at, gates_at, state_at, rest_at, z_at;  // prev_at: the state before, at steps >= 1

    template <typename E>
    __device__ Place(const Call<E>& a, long long H, long long D)
        : Position(a, a.step, blockIdx.x), exists(unit < H),
          next_continues(Position(a, a.step + 1, sequence).continues), at(row * H + unit),
          prev_at(at + (a.reverse ? a.B : -a.B) * H), gates_at(row * 4 * H + unit), state_at(sequence * H + unit),
          rest_at(a.B * H + state_at), z_at(sequence * 4 * H + unit / D * 3 * D + unit) {}
};

template <typename E>
__device__ void load_gates(Gates& gates, const E* from, long long at, long long H, int count = GATES) {
    for (int n = 0; n < GATES; ++n) gates[n] = load(from, at + n * H, n < count);
}

template <typename E>
__device__ void store_gates(E* to, long long at, long long H, const Gates& gates) {
    for (int n = 0; n < GATES; ++n) store(to, at + n * H, gates[n]);
}

template <typename E>
__device__ Constants load_constants(const E* from, int unit, long long H) {
    return {{load(from, unit), load(from, H + unit), load(from, 2 * H + unit)}, from != nullptr};
}

// Return c before a step. In inference c of all steps is not kept, and the step before stored its c in c_n.
template <typename E>
__device__ float load_c_before(const Call<E>& a, const Place& p) {
    if (!p.continues) return load(a.reset_c, p.at);
    return a.step == 0 ? load(a.c0, p.state_at) : a.c ? load(a.c, p.prev_at) : load(a.c_n, p.state_at);
}

template <typename E>
__device__ float load_h_before(const Call<E>& a, const Place& p) {
    if (!p.continues) return load(a.reset_h, p.at);
    return a.step == 0 ? load(a.h0, p.state_at) : load(a.h, p.prev_at);
}

// Return the share of the state before the step that stays: a rate, or the mask of the cell.
__device__ inline float share_of(const void* zoneout, bool is_rate, long long at) {
    if (!zoneout) return 0.0f;
    if (is_rate) return element(static_cast<const float*>(zoneout), 0);
    return element(static_cast<const bool*>(zoneout), at) ? 1.0f : 0.0f;
}

__device__ inline float zoneout(float x, float before, float share) {
    return share == 0.0f ? x : share * before + (1.0f - share) * x;
}

// Compute and store the gates and c. The results are o, the last gate, and v, c before zoneout.
template <typename E, Cell CELL>
__device__ void gates_and_cell(const Call<E>& a, const Place& p, float& o, float& v) {
    Gates x, z, gates;
    load_gates(x, a.gates, p.gates_at, a.H, a.from_x);
    load_gates(z, a.z, p.z_at, a.H / a.heads);
    const Constants constants = load_constants(a.bias_hh ? a.bias_hh : a.weight_peephole, p.unit, a.H);
    const float c_prev = load_c_before(a, p);
    State state = {c_prev, logf(0.0f)};  // logf(0) is -infinity, for which NVRTC has no name
    if (KEPT<CELL> > 1 && p.continues) state.rest = load(a.step ? a.c_n : a.c0, p.rest_at);
    cell_forward<CELL>(x, z, constants, state, gates);
    const float c = zoneout(state.c, c_prev, share_of(a.zoneout_c, a.rate_c, p.at));
    store(a.c_n, p.state_at, c, p.last || !a.c);
    if (KEPT<CELL> > 1) store(a.c_n, p.rest_at, state.rest);
    store(a.c, p.at, c);
    if (a.c) store_gates(a.gates, p.gates_at, a.H, gates);
    o = gates[3], v = state.c;
}

// A step forward, or a part of it, after its product.
template <typename E, Cell CELL, char START, char END>
__global__ void __launch_bounds__(THREADS) after_product(const Call<E> a) {
    const Place p(a, a.H, a.H / a.heads);
    if (!p.exists) return;
    float o = 0.0f, v = 0.0f, m = 0.0f;
    if (START == 'z' && p.valid) gates_and_cell<E, CELL>(a, p, o, v);
    if (START == 'z' && !p.valid) store(a.c, p.at, 0.0f);
    if (START == 'c') o = load(a.o, p.state_at, p.valid), v = load(a.v, p.state_at, p.valid);
    if (END == 'c') return store(a.o, p.state_at, o), store(a.v, p.state_at, v);
    if (START == 'm') m = load(a.m, p.state_at, p.valid);
    else if (p.valid) m = output<CELL>(o, v);
    if (END == 'm') return store(a.m, p.state_at, m);
    if (a.zoneout_h && p.valid) m = zoneout(m, load_h_before(a, p), share_of(a.zoneout_h, a.rate_h, p.at));
    store(a.h, p.at, m);
    store(a.h_n, p.state_at, m, p.last);
    const float h = a.dropout_h ? load(a.h, p.at) * load(a.dropout_h, p.state_at) : m;
    store(a.h_next, p.state_at, p.next_continues ? h : 0.0f);
}

// Return the gradient of m, or of W_hr m with a projection, before zoneout.
template <typename E>
__device__ float gradient_of_m(const Call<E>& a, const Place& p) {
    float d = load(a.dh_next, p.state_at, p.next_continues);
    if (a.dropout_h) d *= load(a.dropout_h, p.state_at);
    d += load(a.dh, p.at) + load(a.dh_n, p.state_at, p.last);
    if (!a.zoneout_h) return d;
    const float share = share_of(a.zoneout_h, a.rate_h, p.at);
    d += load(a.dh_from_zoneout, p.state_at);
    store(a.dh_from_zoneout, p.state_at, p.continues ? share * d : 0.0f);
    store(a.dreset_h, p.at, share * d, !p.continues);
    return (1.0f - share) * d;
}

// Compute dz, and store the gradients of c and the rest before the step. dz_o and dv come from m. No gradient flows
// past a reset.
template <typename E, Cell CELL>
__device__ void gradients_of_gates_and_cell(
    const Call<E>& a, const Place& p, const Gates& gates, float c_prev, float dz_o, float dv, Gates& dz) {
    const Constants constants = load_constants(a.weight_peephole, p.unit, a.H);
    const float share = share_of(a.zoneout_c, a.rate_c, p.at), dc = load(a.dc, p.state_at);
    State d = {(1.0f - share) * dc + dv, 0.0f};
    if (KEPT<CELL> > 1) d.rest = load(a.dc, p.rest_at);
    cell_backward<CELL>(gates, c_prev, dz_o, constants, d, dz);
    d.c += share * dc;
    store(a.dc, p.state_at, p.continues ? d.c : 0.0f);
    store(a.dreset_c, p.at, d.c, !p.continues);
    if (KEPT<CELL> > 1) store(a.dc, p.rest_at, p.continues ? d.rest : 0.0f);
}

// A step backward, or a part of it, before its product. In padding all gradients are 0.
template <typename E, Cell CELL, char START, char END>
__global__ void __launch_bounds__(THREADS) before_product(const Call<E> a) {
    const Place p(a, a.H, a.H / a.heads);
    if (!p.exists) return;
    float dm = 0.0f, dz_o = 0.0f, dv = 0.0f, c_prev = 0.0f;
    if (START == 'h') {
        if (p.valid) dm = gradient_of_m(a, p);
        store(a.dh_total, p.at, dm);
    }
    if (START == 'm') dm = load(a.m, p.state_at, p.valid);
    if (END == 'm') return store(a.m, p.state_at, dm);
    Gates gates, dz = {};
    if (p.valid) {
        load_gates(gates, a.gates, p.gates_at, a.H);
        c_prev = load_c_before(a, p);
        if (START == 'c') dz_o = load(a.o, p.state_at), dv = load(a.v, p.state_at);
        else output_backward<CELL>(
            gates[3], END == 'c' ? load(a.normed_c, p.at) : next_cell<CELL>(gates, c_prev), dm, dz_o, dv);
    }
    if (END == 'c') return store(a.o, p.state_at, dz_o), store(a.v, p.state_at, dv);
    if (p.valid) gradients_of_gates_and_cell<E, CELL>(a, p, gates, c_prev, dz_o, dv, dz);
    store_gates(a.dgates, p.gates_at, a.H, dz);
    store_gates(a.dz, p.z_at, a.H / a.heads, dz);
}
