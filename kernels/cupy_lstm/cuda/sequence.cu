// All steps in one launch, by blocks that keep W_hh in shared memory and walk BATCH_TILE sequences each, side by side. Their
// threads are
//
//     [slices, GATES, H]    in a product: thread (slice, gate, unit) takes a slice of the sum over H of one gate of
//                           one unit, for all sequences; its weights, its own alone, lie in shared memory
//     [BATCH_TILE, H]       in the cell: the threads of slice 0 take one unit of one sequence each
//
// which are the same in number where there is one slice, since BATCH_TILE is GATES.
constexpr int BATCH_TILE = GATES;
constexpr int MAX_THREADS = 512;

// 16 bytes, the widest access there is.
template <typename E>
struct alignas(16) Pack {
    static constexpr int SIZE = 16 / sizeof(E);
    E element[SIZE];

    __device__ static Pack read(const void* from) {
        Pack pack;
        *reinterpret_cast<uint4*>(&pack) = *static_cast<const uint4*>(from);
        return pack;
    }

    __device__ void write(void* to) const { *static_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(this); }
};

struct Thread {
    int slice, gate, unit;  // in a product
    int sequence;           // in the cell, with the same unit
    int slices;
    int packs;  // of weights of a thread
    int K;      // H rounded up to a whole number of packs in every slice

    __device__ Thread(int H, int pack_size) {
        const int width = GATES * H;
        slices = blockDim.x / width;
        slice = threadIdx.x / width;
        gate = sequence = threadIdx.x % width / H;
        unit = threadIdx.x % H;
        packs = (H + slices * pack_size - 1) / (slices * pack_size);
        K = slices * packs * pack_size;
    }

    __device__ bool has_cell() const { return slice == 0; }
};

// The thread's weights, from[0], from[stride], ..., into shared memory, where those of a block's threads interleave.
// There are `count`, and zeros after them.
template <typename E>
__device__ void hold(Pack<E>* weights, int packs, const E* from, int stride, int count) {
    constexpr int N = Pack<E>::SIZE;
    for (int p = 0; p < packs; ++p) {
        Pack<E> pack;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int k = p * N + n;
            round_to(pack.element[n], k < count ? to_float(from[static_cast<long long>(k) * stride]) : 0.0f);
        }
        pack.write(weights + p * blockDim.x);
    }
}

// y[sequence] = sum over k of weights[k] * x[sequence * stride + k]
template <typename E>
__device__ void multiply(float (&y)[BATCH_TILE], const Pack<E>* weights, int packs, const float* x, int stride) {
    constexpr int N = Pack<E>::SIZE;
#pragma unroll
    for (int b = 0; b < BATCH_TILE; ++b) y[b] = 0.0f;
#pragma unroll 2
    for (int p = 0; p < packs; ++p) {
        const auto w = Pack<E>::read(weights + p * blockDim.x);
#pragma unroll
        for (int b = 0; b < BATCH_TILE; ++b)
#pragma unroll
            for (int n = 0; n < N; n += 4) {
                const auto four = Pack<float>::read(x + b * stride + p * N + n);
#pragma unroll
                for (int e = 0; e < 4; ++e) y[b] += to_float(w.element[n + e]) * four.element[e];
            }
    }
}

// All steps forward.
template <typename E>
__global__ void __launch_bounds__(MAX_THREADS, 1) lstm_sequence_forward(
    E* gates,            // [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, where c is given: activated gates
    const E* weight_hh,  // [4H, H]
    E* h,                // [T*B, H] out
    E* h_n,              // [B, H] in and out
    float* c,            // [T*B, H] out, or null
    float* c_n,          // [B, H] in and out
    const int* lengths,  // [B] or null
    const bool* resets,  // [T*B] or null
    int T, int B, int H, bool reverse) {
    constexpr int N = Pack<E>::SIZE;
    const Thread my(H, N);
    const int tile = blockIdx.x * BATCH_TILE, batch = tile + my.sequence, length = length_of(lengths, batch, T, B);
    const bool has_cell = my.has_cell() && batch < B;
    const long long state_at = static_cast<long long>(batch) * H + my.unit;

    auto* const weights = reinterpret_cast<Pack<E>*>(shared_memory());               // [packs, threads]
    auto* const h_prev = reinterpret_cast<float*>(weights + my.packs * blockDim.x);  // [2, BATCH_TILE, K]
    auto* const sums = h_prev + 2 * BATCH_TILE * my.K;  // [slices, GATES, BATCH_TILE, H]
    float* const my_sums = sums + (my.slice * GATES + my.gate) * BATCH_TILE * H + my.unit;
    const int first = my.slice * my.packs * N;  // k of the slice

    // Load: the weights once, and the initial states.
    hold(weights + threadIdx.x, my.packs, weight_hh + static_cast<long long>(my.gate * H + my.unit) * H + first, 1,
         H - first);
    for (int n = threadIdx.x; n < 2 * BATCH_TILE * my.K; n += blockDim.x) {
        const int b = tile + n / my.K, k = n % my.K;
        const bool is_state = n < BATCH_TILE * my.K && b < B && k < H;
        h_prev[n] = is_state ? to_float(h_n[static_cast<long long>(b) * H + k]) : 0.0f;
    }
    float c_state = has_cell ? c_n[state_at] : 0.0f;
    E h_state;
    if (has_cell) h_state = h_n[state_at];
    __syncthreads();

    for (int step = 0; step < T; ++step) {
        // Load what does not wait for the product.
        const Position at(step, batch, length, resets, B, reverse);
        E* const my_gates = gates + at.row * 4 * H + my.unit;
        float z[GATES] = {};
        if (has_cell && at.valid)
#pragma unroll
            for (int gate = I; gate < GATES; ++gate) z[gate] = to_float(my_gates[gate * H]);

        // Product.
        float y[BATCH_TILE];
        multiply(y, weights + threadIdx.x, my.packs, h_prev + step % 2 * BATCH_TILE * my.K + first, my.K);
#pragma unroll
        for (int b = 0; b < BATCH_TILE; ++b) my_sums[b * H] = y[b];
        __syncthreads();

        // Gates and cell, and h for the next product.
        Cell cell;
        if (has_cell && at.valid) {
            for (int slice = 0; slice < (at.continues ? my.slices : 0); ++slice)
#pragma unroll
                for (int gate = I; gate < GATES; ++gate)
                    z[gate] += sums[((slice * GATES + gate) * BATCH_TILE + my.sequence) * H + my.unit];
            cell = Cell::forward(z[I], z[F], z[G], z[O], at.continues ? c_state : 0.0f);
            c_state = cell.c;
            round_to(h_state, cell.m);
            h_prev[((step + 1) % 2 * BATCH_TILE + my.sequence) * my.K + my.unit] = to_float(h_state);
        }
        __syncthreads();

        // Store. Padding gets zeros, but its gates nothing.
        if (has_cell) {
            round_to(h[at.row * H + my.unit], at.valid ? to_float(h_state) : 0.0f);
            if (c != nullptr) {
                c[at.row * H + my.unit] = at.valid ? c_state : 0.0f;
                if (at.valid) {
                    round_to(my_gates[I * H], cell.i);
                    round_to(my_gates[F * H], cell.f);
                    round_to(my_gates[G * H], cell.g);
                    round_to(my_gates[O * H], cell.o);
                }
            }
        }
    }
    if (has_cell) {
        c_n[state_at] = c_state;
        h_n[state_at] = h_state;
    }
}

// All steps backward.
template <typename E>
__global__ void __launch_bounds__(MAX_THREADS, 1) lstm_sequence_backward(
    const E* dh,         // [T*B, H] or null
    const E* dh_n,       // [B, H] or null
    const E* gates,      // [T*B, 4H] activated
    const float* c,      // [T*B, H]
    const float* c0,     // [B, H]
    const E* weight_hh,  // [4H, H]
    E* dgates,           // [T*B, 4H] out
    float* dc,           // [B, H] in: dc_n; out: dc0
    const int* lengths,  // [B] or null
    const bool* resets,  // [T*B] or null
    int T, int B, int H, bool reverse) {
    constexpr int N = Pack<E>::SIZE;
    const Thread my(H, N);
    const int batch = blockIdx.x * BATCH_TILE + my.sequence, length = length_of(lengths, batch, T, B);
    const bool has_cell = my.has_cell() && batch < B;
    const long long state_at = static_cast<long long>(batch) * H + my.unit;

    auto* const weights = reinterpret_cast<Pack<E>*>(shared_memory());           // [packs, threads]
    auto* const dz = reinterpret_cast<float*>(weights + my.packs * blockDim.x);  // [BATCH_TILE, GATES, K]
    auto* const sums = dz + BATCH_TILE * GATES * my.K;                           // [slices, GATES, BATCH_TILE, H]
    float* const my_sums = sums + (my.slice * GATES + my.gate) * BATCH_TILE * H + my.unit;
    const int first = my.slice * my.packs * N;  // k of the slice, which here counts the units of one gate

    // Load: the weights once, transposed.
    hold(weights + threadIdx.x, my.packs, weight_hh + static_cast<long long>(my.gate * H + first) * H + my.unit, H,
         H - first);
    for (int n = threadIdx.x; n < BATCH_TILE * GATES * my.K; n += blockDim.x) dz[n] = 0.0f;
    float dc_state = has_cell ? dc[state_at] : 0.0f;
    float handed_back = 0.0f;  // gradient of h through the step after
    __syncthreads();

    for (int step = T - 1; step >= 0; --step) {
        const Position at(step, batch, length, resets, B, reverse);
        const long long output_at = at.row * H + my.unit, gates_at = at.row * 4 * H + my.unit;

        // Load, and cell.
        Cell::Gradient d = {};
        if (has_cell && at.valid) {
            float dm = handed_back;
            if (dh != nullptr) dm += to_float(dh[output_at]);
            if (dh_n != nullptr && at.last) dm += to_float(dh_n[state_at]);
            const float* const c_prev = step == 0 ? c0 : c;
            const Cell cell = {to_float(gates[gates_at + I * H]), to_float(gates[gates_at + F * H]),
                               to_float(gates[gates_at + G * H]), to_float(gates[gates_at + O * H]), c[output_at]};
            d = cell.backward(at.continues ? c_prev[at.row_prev * H + my.unit] : 0.0f, dm, dc_state);
            dc_state = at.continues ? d.c_prev : 0.0f;
        }

        // Publish. Nothing flows back into a state that was zeroed.
        if (has_cell) {
            float* const my_dz = dz + my.sequence * GATES * my.K + my.unit;
            my_dz[I * my.K] = at.continues ? d.i : 0.0f;
            my_dz[F * my.K] = at.continues ? d.f : 0.0f;
            my_dz[G * my.K] = at.continues ? d.g : 0.0f;
            my_dz[O * my.K] = at.continues ? d.o : 0.0f;
        }
        __syncthreads();

        // Product.
        float y[BATCH_TILE];
        multiply(y, weights + threadIdx.x, my.packs, dz + my.gate * my.K + first, GATES * my.K);
#pragma unroll
        for (int b = 0; b < BATCH_TILE; ++b) my_sums[b * H] = y[b];
        __syncthreads();

        // Store.
        if (has_cell) {
            handed_back = 0.0f;
            for (int part = 0; part < my.slices * GATES; ++part)
                handed_back += sums[(part * BATCH_TILE + my.sequence) * H + my.unit];
            round_to(dgates[gates_at + I * H], d.i);
            round_to(dgates[gates_at + F * H], d.f);
            round_to(dgates[gates_at + G * H], d.g);
            round_to(dgates[gates_at + O * H], d.o);
        }
    }
    if (has_cell) dc[state_at] = dc_state;
}
