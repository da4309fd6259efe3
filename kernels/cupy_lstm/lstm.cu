// The LSTM recurrence in CUDA C++: one layer, one direction. Compiled by NVRTC through launch.py.
//
//     i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)      z = gates_x + W_hh h_prev
//     c = f * c_prev + i * g                                  m = o * tanh(c)    h = m, or W_hr m with a projection
//
// m is named as by Sak, Senior & Beaufays (2014). Gate order i, f, g, o, as in torch. Elements E are float, __half or
// __nv_bfloat16; arithmetic and cell states are float32; a row of a [T*B, *] tensor is time * B + batch.
//
//     step      one launch a step. cuBLAS takes the recurrent product into a buffer, and the kernel does the rest.
//     sequence  one launch for all steps: a block walks BATCH_TILE sequences, with W_hh in its shared memory.
//     cluster   the same, where a cluster of blocks shares W_hh, and h through distributed shared memory. sm_90.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// ---------------------------------------------------------------------------------------------- elements

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void round_to(float& y, float x) { y = x; }
__device__ inline void round_to(__half& y, float x) { y = __float2half_rn(x); }
__device__ inline void round_to(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

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

__device__ inline bool is_aligned(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

// x = from[0 .. count), then zeros: N elements in accesses of 16 bytes where all are there and aligned.
template <int N, typename E>
__device__ void load(float (&x)[N], const E* from, int count) {
    constexpr int SIZE = Pack<E>::SIZE;
    if (count == N && is_aligned(from)) {
#pragma unroll
        for (int p = 0; p < N; p += SIZE) {
            const auto pack = Pack<E>::read(from + p);
#pragma unroll
            for (int e = 0; e < SIZE; ++e) x[p + e] = to_float(pack.element[e]);
        }
    } else {
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] = n < count ? to_float(from[n]) : 0.0f;
    }
}

// The reverse of load: to[0 .. count) = x, rounded.
template <int N, typename E>
__device__ void store(E* to, const float (&x)[N], int count) {
    constexpr int SIZE = Pack<E>::SIZE;
    if (count == N && is_aligned(to)) {
#pragma unroll
        for (int p = 0; p < N; p += SIZE) {
            Pack<E> pack;
#pragma unroll
            for (int e = 0; e < SIZE; ++e) round_to(pack.element[e], x[p + e]);
            pack.write(to + p);
        }
    } else {
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (n < count) round_to(to[n], x[n]);
    }
}

// -------------------------------------------------------------------------------------------------- cell

enum Gate { I, F, G, O, GATES };

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The cell after a step. With a projection m is what W_hr takes.
struct Cell {
    float i, f, g, o;  // gates
    float c, m;

    // From the pre-activations and the cell state before the step.
    __device__ static Cell forward(float z_i, float z_f, float z_g, float z_o, float c_prev) {
        Cell cell;
        cell.i = sigmoid(z_i);
        cell.f = sigmoid(z_f);
        cell.g = tanhf(z_g);
        cell.o = sigmoid(z_o);
        cell.c = cell.f * c_prev + cell.i * cell.g;
        cell.m = cell.o * tanhf(cell.c);
        return cell;
    }

    struct Gradient {
        float i, f, g, o;  // of the pre-activations: sigmoid' = s (1 - s), tanh' = 1 - t^2
        float c_prev;
    };

    // From the gradients of m and (from the step after) of c. Of the cell it takes all but m.
    __device__ Gradient backward(float c_prev, float dm, float dc) const {
        const float t = tanhf(c);
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

// ---------------------------------------------------------------------------------------------- indexing

// A step counts in the order of processing. With a sequence of length L in a batch padded to T:
//
//     forward   step s visits time s
//     reverse   step s visits time L - 1 - s
//     padding   steps s >= L visit time s in both directions, so that each padded position is visited once
__device__ inline int time_of(int step, int length, bool reverse) {
    return reverse && step < length ? length - 1 - step : step;
}

__device__ inline long long row_of(int time, int batch, int B) { return static_cast<long long>(time) * B + batch; }

// Row of the state before `step`: in c0 [B, H] at step 0, in c [T*B, H] after.
__device__ inline long long row_before(int step, int time, int batch, int B, bool reverse) {
    return step == 0 ? batch : row_of(reverse ? time + 1 : time - 1, batch, B);
}

// Whether the state is zeroed before the step at `time`. A reset at t separates time t from time t - 1, either way
// round; the reverse direction comes from time + 1.
__device__ inline bool is_reset(const bool* resets, int time, int length, int batch, int B, bool reverse) {
    const int later = reverse ? time + 1 : time;  // of the two times that a reset may separate
    return resets != nullptr && later < length && resets[row_of(later, batch, B)];
}

// Where one sequence is at one step.
struct Position {
    long long row;       // in [T*B, *]
    long long row_prev;  // in c0 or c, of the state before
    bool valid;          // not in the padding, nor past the batch
    bool continues;      // valid, and the step starts from the state before, not from zeros
    bool last;           // the final states are those after this step

    __device__ Position(int step, int batch, const int* lengths, const bool* resets, int T, int B, bool reverse) {
        const int length = batch >= B ? 0 : lengths == nullptr ? T : lengths[batch];
        const int time = time_of(step, length, reverse);
        row = row_of(time, batch, B);
        row_prev = row_before(step, time, batch, B, reverse);
        valid = step < length;
        continues = valid && !is_reset(resets, time, length, batch, B, reverse);
        last = step == length - 1;
    }
};

// ------------------------------------------------------------------------------------------ step kernels

// What a thread owns of a [B, width] matrix: `count` neighbouring elements of one row, Pack<E>::SIZE but at the end.
template <typename E>
struct Share {
    int batch, column, count;

    __device__ Share(int B, int width) {
        constexpr int N = Pack<E>::SIZE;
        const int shares = (width + N - 1) / N;  // of a row
        const long long n = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
        batch = static_cast<int>(n / shares);
        column = static_cast<int>(n % shares) * N;
        count = batch < B ? min(N, width - column) : 0;
    }
};

template <int N, typename E>
__device__ void load_gates(float (&z)[GATES][N], const E* gates, int H, int count) {
#pragma unroll
    for (int gate = I; gate < GATES; ++gate) load(z[gate], gates + gate * H, count);
}

template <int N, typename E>
__device__ void store_gates(E* gates, const float (&z)[GATES][N], int H, int count) {
#pragma unroll
    for (int gate = I; gate < GATES; ++gate) store(gates + gate * H, z[gate], count);
}

// One step after its product. h_n and c_n are the running states: before the step going in, after it coming out, and
// left alone once a sequence has ended.
template <typename E>
__global__ void lstm_step_forward(
    E* gates,            // [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, where c is given: activated gates
    const E* product,    // [B, 4H] h_n W_hh^T
    E* h,                // [T*B, H] out; null with a projection
    E* m,                // [B, H] out: h_n, or what the projection takes
    float* c,            // [T*B, H] out, or null
    float* c_n,          // [B, H] in and out
    const int* lengths,  // [B] or null
    const bool* resets,  // [T*B] or null
    int step, int T, int B, int H, bool reverse) {
    constexpr int N = Pack<E>::SIZE;
    const Share<E> own(B, H);
    if (own.count == 0) return;
    const Position at(step, own.batch, lengths, resets, T, B, reverse);
    const long long state_at = static_cast<long long>(own.batch) * H + own.column;
    const long long product_at = static_cast<long long>(own.batch) * 4 * H + own.column;
    const long long gates_at = at.row * 4 * H + own.column;
    const int valid_count = at.valid ? own.count : 0;
    const int continues_count = at.continues ? own.count : 0;

    // Load. What does not count is zero.
    float z[GATES][N], zh[GATES][N], c_prev[N];
    load_gates(z, gates + gates_at, H, valid_count);
    load_gates(zh, product + product_at, H, continues_count);
    load(c_prev, c_n + state_at, continues_count);

    // Cell.
    float c_next[N], m_next[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const Cell cell = Cell::forward(z[I][n] + zh[I][n], z[F][n] + zh[F][n], z[G][n] + zh[G][n],
                                        z[O][n] + zh[O][n], c_prev[n]);
        z[I][n] = cell.i, z[F][n] = cell.f, z[G][n] = cell.g, z[O][n] = cell.o;
        c_next[n] = at.valid ? cell.c : 0.0f;
        m_next[n] = at.valid ? cell.m : 0.0f;
    }

    // Store. Padding gets zeros, but its gates nothing.
    store(m + state_at, m_next, valid_count);
    store(c_n + state_at, c_next, valid_count);
    if (h != nullptr) store(h + at.row * H + own.column, m_next, own.count);
    if (c != nullptr) {
        store(c + at.row * H + own.column, c_next, own.count);
        store_gates(gates + gates_at, z, H, valid_count);
    }
}

// With a projection, the end of the step: h = W_hr m, taken by cuBLAS, goes where it belongs.
template <typename E>
__global__ void lstm_step_project_forward(
    const E* product,    // [B, P] m W_hr^T
    E* h,                // [T*B, P] out
    E* h_n,              // [B, P] in and out
    const int* lengths,  // [B] or null
    int step, int T, int B, int P, bool reverse) {
    const Share<E> own(B, P);
    if (own.count == 0) return;
    const Position at(step, own.batch, lengths, nullptr, T, B, reverse);
    const long long state_at = static_cast<long long>(own.batch) * P + own.column;
    const int valid_count = at.valid ? own.count : 0;

    float x[Pack<E>::SIZE];
    load(x, product + state_at, valid_count);
    store(h + at.row * P + own.column, x, own.count);
    store(h_n + state_at, x, valid_count);
}

// The whole gradient of h at one step: from the output, from the final state, and from the step after.
template <int N, typename E>
__device__ void load_hidden_gradient(float (&dh)[N], const E* dh_output, const E* dh_n, const E* product,
                                     const Position& at, long long output_at, long long state_at, int count) {
    float more[N];
    load(dh, product + state_at, at.valid ? count : 0);
    if (dh_output != nullptr) {
        load(more, dh_output + output_at, at.valid ? count : 0);
#pragma unroll
        for (int n = 0; n < N; ++n) dh[n] += more[n];
    }
    if (dh_n != nullptr) {
        load(more, dh_n + state_at, at.last ? count : 0);
#pragma unroll
        for (int n = 0; n < N; ++n) dh[n] += more[n];
    }
}

// With a projection, the beginning of a step backward.
template <typename E>
__global__ void lstm_step_project_backward(
    const E* dh,         // [T*B, P] or null
    const E* dh_n,       // [B, P] or null
    const E* product,    // [B, P] what the step after hands back through W_hh
    E* dh_total,         // [T*B, P] out
    E* dh_step,          // [B, P] out: the same, of this step
    const int* lengths,  // [B] or null
    int step, int T, int B, int P, bool reverse) {
    const Share<E> own(B, P);
    if (own.count == 0) return;
    const Position at(step, own.batch, lengths, nullptr, T, B, reverse);
    const long long state_at = static_cast<long long>(own.batch) * P + own.column;
    const long long output_at = at.row * P + own.column;

    float total[Pack<E>::SIZE];
    load_hidden_gradient(total, dh, dh_n, product, at, output_at, state_at, own.count);
    store(dh_total + output_at, total, own.count);
    store(dh_step + state_at, total, own.count);
}

// One step backward, before its product dz W_hh.
template <typename E>
__global__ void lstm_step_backward(
    const E* dh,          // [T*B, H] or null
    const E* dh_n,        // [B, H] or null
    const E* product,     // [B, H] what the step after hands back through W_hh; with a projection dh_step W_hr
    const E* gates,       // [T*B, 4H] activated
    const float* c,       // [T*B, H]
    const float* c_prev,  // c0 [B, H] at step 0, then c
    E* dgates,            // [T*B, 4H] out
    E* dz,                // [B, 4H] out: the same, of this step, where the state before is what it starts from
    float* dc,            // [B, H] in: gradient of c after this step; out: before it. Starts as dc_n, ends as dc0
    const int* lengths,   // [B] or null
    const bool* resets,   // [T*B] or null
    int step, int T, int B, int H, bool reverse) {
    constexpr int N = Pack<E>::SIZE;
    const Share<E> own(B, H);
    if (own.count == 0) return;
    const Position at(step, own.batch, lengths, resets, T, B, reverse);
    const long long state_at = static_cast<long long>(own.batch) * H + own.column;
    const long long dz_at = static_cast<long long>(own.batch) * 4 * H + own.column;
    const long long output_at = at.row * H + own.column;
    const long long gates_at = at.row * 4 * H + own.column;
    const int valid_count = at.valid ? own.count : 0;
    const int continues_count = at.continues ? own.count : 0;

    // Load. In padding all is zero, and so are the gradients.
    float z[GATES][N], dm[N], c_after[N], c_before[N], dc_state[N];
    load_hidden_gradient(dm, dh, dh_n, product, at, output_at, state_at, own.count);
    load_gates(z, gates + gates_at, H, valid_count);
    load(c_after, c + output_at, valid_count);
    load(c_before, c_prev + at.row_prev * H + own.column, continues_count);
    load(dc_state, dc + state_at, valid_count);

    // Cell.
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const Cell cell = {z[I][n], z[F][n], z[G][n], z[O][n], c_after[n]};
        const Cell::Gradient d = cell.backward(c_before[n], dm[n], dc_state[n]);
        z[I][n] = d.i, z[F][n] = d.f, z[G][n] = d.g, z[O][n] = d.o;
        dc_state[n] = at.continues ? d.c_prev : 0.0f;
    }

    // Store. Nothing flows back into a state that was zeroed.
    store_gates(dgates + gates_at, z, H, own.count);
    store(dc + state_at, dc_state, valid_count);
#pragma unroll
    for (int gate = I; gate < GATES; ++gate)
#pragma unroll
        for (int n = 0; n < N; ++n) z[gate][n] = at.continues ? z[gate][n] : 0.0f;
    store_gates(dz + dz_at, z, H, own.count);
}

// -------------------------------------------------------------------------------------- sequence kernels

// A block walks BATCH_TILE sequences side by side, and owns `units` of the H hidden units. Its threads are
//
//     [slices, GATES, units]    in a product: thread (slice, gate, unit) takes a slice of the sum over H of one gate of
//                               one unit, for all sequences; its weights, its own alone, lie in shared memory
//     [BATCH_TILE, units]       in the cell: the threads of slice 0 take one unit of one sequence each
//
// which are the same in number where there is one slice, since BATCH_TILE is GATES.
constexpr int BATCH_TILE = GATES;
constexpr int MAX_THREADS = 512;

__device__ inline uint4* shared_memory() {
    extern __shared__ uint4 shared_storage[];
    return shared_storage;
}

struct Thread {
    int slice, gate, unit;  // in a product
    int sequence;           // in the cell, with the same unit
    int slices;
    int packs;  // of weights of a thread
    int K;      // H rounded up to a whole number of packs in every slice

    __device__ Thread(int H, int units, int pack_size) {
        const int width = GATES * units;
        slices = blockDim.x / width;
        slice = threadIdx.x / width;
        gate = sequence = threadIdx.x % width / units;
        unit = threadIdx.x % units;
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

// The blocks that share W_hh: one alone ...
struct Alone {
    static constexpr int COUNT = 1;

    __device__ static int rank() { return 0; }
    __device__ static float* of_block(float* p, int) { return p; }
    __device__ static void sync() { __syncthreads(); }
};

#if __CUDA_ARCH__ >= 900
// ... or a cluster, whose blocks write to each other's shared memory.
template <int SIZE>
struct Cluster {
    static constexpr int COUNT = SIZE;

    __device__ static int rank() { return __clusterRelativeBlockRank(); }
    __device__ static float* of_block(float* p, int block) {
        return static_cast<float*>(__cluster_map_shared_rank(p, block));
    }
    __device__ static void sync() {
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
    }
};
#endif

// All steps forward. h_n and c_n hold the initial states going in, the final ones coming out.
template <typename Blocks, typename E>
__device__ void walk_forward(E* gates, const E* weight_hh, E* h, E* h_n, float* c, float* c_n, const int* lengths,
                             const bool* resets, int T, int B, int H, bool reverse) {
    constexpr int N = Pack<E>::SIZE;
    const int units = (H + Blocks::COUNT - 1) / Blocks::COUNT;
    const Thread my(H, units, N);
    const int tile = blockIdx.x / Blocks::COUNT * BATCH_TILE, batch = tile + my.sequence;
    const int unit = Blocks::rank() * units + my.unit;
    const bool has_cell = my.has_cell() && batch < B && unit < H;
    const long long state_at = static_cast<long long>(batch) * H + unit;

    auto* const weights = reinterpret_cast<Pack<E>*>(shared_memory());               // [packs, threads]
    auto* const h_prev = reinterpret_cast<float*>(weights + my.packs * blockDim.x);  // [2, BATCH_TILE, K]
    auto* const sums = h_prev + 2 * BATCH_TILE * my.K;  // [slices, GATES, BATCH_TILE, units]
    float* const my_sums = sums + (my.slice * GATES + my.gate) * BATCH_TILE * units + my.unit;
    const int first = my.slice * my.packs * N;  // k of the slice

    // Load: the weights once, and the initial states.
    hold(weights + threadIdx.x, my.packs, weight_hh + static_cast<long long>(my.gate * H + unit) * H + first, 1,
         unit < H ? H - first : 0);
    for (int n = threadIdx.x; n < 2 * BATCH_TILE * my.K; n += blockDim.x) {
        const int b = tile + n / my.K, k = n % my.K;
        const bool is_state = n < BATCH_TILE * my.K && b < B && k < H;
        h_prev[n] = is_state ? to_float(h_n[static_cast<long long>(b) * H + k]) : 0.0f;
    }
    float c_state = has_cell ? c_n[state_at] : 0.0f;
    E h_state;
    if (has_cell) h_state = h_n[state_at];
    Blocks::sync();

    for (int step = 0; step < T; ++step) {
        // Load what does not wait for the product.
        const Position at(step, batch, lengths, resets, T, B, reverse);
        E* const my_gates = gates + at.row * 4 * H + unit;
        float z[GATES] = {};
        if (has_cell && at.valid)
#pragma unroll
            for (int gate = I; gate < GATES; ++gate) z[gate] = to_float(my_gates[gate * H]);

        // Product.
        float y[BATCH_TILE];
        multiply(y, weights + threadIdx.x, my.packs, h_prev + step % 2 * BATCH_TILE * my.K + first, my.K);
#pragma unroll
        for (int b = 0; b < BATCH_TILE; ++b) my_sums[b * units] = y[b];
        __syncthreads();

        // Gates and cell; publish h to all blocks, before anything else is stored.
        Cell cell;
        if (has_cell && at.valid) {
            for (int slice = 0; slice < (at.continues ? my.slices : 0); ++slice)
#pragma unroll
                for (int gate = I; gate < GATES; ++gate)
                    z[gate] += sums[((slice * GATES + gate) * BATCH_TILE + my.sequence) * units + my.unit];
            cell = Cell::forward(z[I], z[F], z[G], z[O], at.continues ? c_state : 0.0f);
            c_state = cell.c;
            round_to(h_state, cell.m);
            float* const h_next = h_prev + ((step + 1) % 2 * BATCH_TILE + my.sequence) * my.K + unit;
            for (int block = 0; block < Blocks::COUNT; ++block) *Blocks::of_block(h_next, block) = to_float(h_state);
        }
        Blocks::sync();

        // Store. Padding gets zeros, but its gates nothing.
        if (has_cell) {
            round_to(h[at.row * H + unit], at.valid ? to_float(h_state) : 0.0f);
            if (c != nullptr) {
                c[at.row * H + unit] = at.valid ? c_state : 0.0f;
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
    walk_forward<Alone>(gates, weight_hh, h, h_n, c, c_n, lengths, resets, T, B, H, reverse);
}

#if __CUDA_ARCH__ >= 900
template <typename E, int BLOCKS>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(MAX_THREADS, 1) lstm_cluster_forward(
    E* gates,            // [T*B, 4H] in: x W_ih^T + b_ih + b_hh; out, where c is given: activated gates
    const E* weight_hh,  // [4H, H]
    E* h,                // [T*B, H] out
    E* h_n,              // [B, H] in and out
    float* c,            // [T*B, H] out, or null
    float* c_n,          // [B, H] in and out
    const int* lengths,  // [B] or null
    const bool* resets,  // [T*B] or null
    int T, int B, int H, bool reverse) {
    walk_forward<Cluster<BLOCKS>>(gates, weight_hh, h, h_n, c, c_n, lengths, resets, T, B, H, reverse);
}
#endif

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
    E* dh0,              // [B, H] out: what the first step hands back, zero where there is none
    float* dc,           // [B, H] in: dc_n; out: dc0
    const int* lengths,  // [B] or null
    const bool* resets,  // [T*B] or null
    int T, int B, int H, bool reverse) {
    constexpr int N = Pack<E>::SIZE;
    const Thread my(H, H, N);
    const int batch = blockIdx.x * BATCH_TILE + my.sequence;
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
        const Position at(step, batch, lengths, resets, T, B, reverse);
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
    if (has_cell) {
        round_to(dh0[state_at], handed_back);
        dc[state_at] = dc_state;
    }
}
