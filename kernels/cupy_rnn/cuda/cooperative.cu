// All steps in one launch, by blocks that share W_hh and exchange h. Grid (blocks of a group, groups).
//
// A group's blocks own UNITS hidden units each; at every step each block reads h of all units of 8 sequences from L2.
// The batch tiles of 8 sequences are split among groups, which never wait for each other. All blocks of a launch must
// be resident at once.
//
// forward    A block holds the rows of W_hh for its units' gates, OF_H each, and publishes h of its units.
//
// backward   dh of a unit needs the dgates of all units, four times as wide as h. PARTNERS blocks own PARTNERS * UNITS
//            units together. Each holds W_hh^T of all of these for its own share of the gates, reads that share of
//            dgates, and publishes its sums of dh in a second, small exchange, which PARTNERS = 1 does not need.
//
// WITH_...: false where an argument is known to be null, or false, so that nothing is compiled for it.
//
// CHUNKS > 0 keeps the weights in registers and multiplies on tensor cores (sm_80 and newer); 0 reads them every step.
//
// OF_H, of the Cell: how many gates of a unit h reaches, its last; so many rows a unit W_hh has.
//
// A row of H elements is padded to W words, a multiple of 16 bytes: W is a multiple of 4. All beyond H is zero.

// The thread's cell: unit `unit` of the block, in sequence `sequence` of a batch tile. Every warp has equally many, so
// that none waits before its block has published. UNITS is even: neighbours in a word are neighbours in a warp.
template <int UNITS, int WARPS>
struct Own {
    static constexpr int OF_WARP = SEQUENCES / WARPS;  // sequences
    const int lane = threadIdx.x % 32;
    const bool cell = lane < UNITS * OF_WARP;
    const int unit = lane % UNITS, sequence = threadIdx.x / 32 * OF_WARP + min(lane / UNITS, OF_WARP - 1);
};

template <typename E, int H>
constexpr int WORDS = (H * sizeof(E) + 15) / 16 * 4;  // W

// What a block processes in turn at every step: batch tiles and, unless it keeps the weights of ONE, shares of rows.
template <bool ONE>
struct Walk {
    const int first_row, rows, H;
    int tile = blockIdx.y * SEQUENCES, row;

    __device__ Walk(int share, int shares, int rows, int H)
        : first_row(share * rows), rows(shares * rows), H(H), row(first_row) {}

    __device__ void next() {
        if (!ONE) row += rows;
        if (ONE || row >= H) tile += SEQUENCES * gridDim.y, row = first_row;
    }
};

template <typename E, typename Cell, int H, int UNITS, int WARPS, int CHUNKS, bool WITH_BIAS_HH, bool WITH_C,
          bool WITH_LENGTHS, bool WITH_RESETS, bool WITH_RESET_C, bool WITH_REVERSE>
__global__ void __launch_bounds__(32 * WARPS, 1) cooperative_forward(
    E* gates,                 // [T*B, 4H] in: x W_ih^T + b_ih, of an LSTM + b_hh; out, where c is given: activated gates
    const E* bias_hh,         // [OF_H * H] of a GRU, or null
    const unsigned* weights,  // [OF_H * H, W] W_hh
    unsigned* h,              // [T*B + B, W] out and the exchange, sentinels beforehand; then h0
    E* h_n,                   // [B, H] out, of sequences that have a step
    float* c,                 // [T*B, H] out, or null
    float* c_n,               // [B, H] in: c0; out
    const int* lengths,       // [B] or null
    const bool* resets,       // [T*B] or null
    const float* reset_c,     // [T*B, H] what c is reset to; null: zeros
    int* error,               // [1]
    int T, int B, bool reverse) {
    if (!WITH_BIAS_HH) bias_hh = nullptr;
    if (!WITH_C) c = nullptr;
    if (!WITH_LENGTHS) lengths = nullptr;
    if (!WITH_RESETS) resets = nullptr;
    if (!WITH_RESET_C) reset_c = nullptr;
    if (!WITH_REVERSE) reverse = false;
    constexpr int W = WORDS<E, H>;
    constexpr int OF_H = Cell::OF_H;
    constexpr int FROM_X = Cell::HAS_CONSTANT & !WITH_RESET_C ? GATES - 1 : GATES;  // gates that come with something
    // Pairs are gates 0 and 1 of each unit. After them come 2 and 3; or where there are three, halves of the units.
    constexpr int PAIRS = (OF_H * UNITS + 15) / 16 * 8, REST = PAIRS - UNITS;
    using Rows = Product<E, 2 * PAIRS, W, WARPS, CHUNKS>;
    const Own<UNITS, WARPS> own;
    const Walk<(CHUNKS > 0)> begin(blockIdx.x, gridDim.x, UNITS, H);

    Rows product(weights);
    const auto load_rows_of = [&](int first_unit) {
        product.load([=](int pair, int half) {
            const int row = pair < UNITS ? half * UNITS + pair : UNITS + half * REST + pair;  // gate after gate
            const int unit = first_unit + row % UNITS, gate = row / UNITS;
            return unit < H & gate < OF_H ? gate * H + unit : -1;
        });
    };
    load_rows_of(begin.row);

    int turn = 0;
    bool lost = false;
    Delay delay;
    for (int step = 0; step < T; ++step)
        for (auto walk = begin; walk.tile < B; walk.next(), turn ^= 1) {
            if (CHUNKS == 0) load_rows_of(walk.row);
            const int unit = walk.row + own.unit;
            const bool has_cell = own.cell & unit < H;

            // Load the data of the thread's cell before waiting.
            const int batch = walk.tile + own.sequence, length = length_of(lengths, batch, T, B);
            const int of_column = walk.tile + product.lane.column, its_length = length_of(lengths, of_column, T, B);
            const Position at(step, batch, length, resets, B, reverse);
            const bool valid = has_cell & at.valid, in_batch = has_cell & batch < B;
            const long long state_at = static_cast<long long>(batch) * H + unit;
            E* const my_gates = gates + at.row * 4 * H + unit;
            E gates_x[GATES] = {}, biases[3] = {};
#pragma unroll
            for (int gate = 0; gate < FROM_X; ++gate) gates_x[gate] = load_if(valid, my_gates + gate * H);
            if (bias_hh != nullptr)
#pragma unroll
                for (int n = 0; n < 3; ++n) biases[n] = load_if(has_cell, bias_hh + n * H + unit);
            float c_prev = load_if(has_cell & at.continues, c_n + state_at);
            if (reset_c != nullptr) c_prev += load_if(valid & !at.continues, reset_c + at.row * H + unit);

            // Product with h of the step before.
            const int time_before = step == 0 ? T : time_of(step - 1, its_length, reverse);
            delay.pass();
            typename Rows::Words h_prev(h + row_of(time_before, of_column, B) * W + product.lane.first_word,
                                        of_column < B ? W - product.lane.first_word : 0);
            delay.learn(product.multiply(h_prev, turn, {error, step, lost}));

            // Gates and cell.
            const float2 low = Rows::sum(own.unit, own.sequence, turn);
            const float2 high = Rows::sum(UNITS + own.unit % REST, own.sequence, turn);
            float x[GATES], of_h[GATES] = {low.x, low.y, high.x, high.y}, bias[3];
            if (OF_H == 3) of_h[0] = 0, of_h[1] = low.x, of_h[2] = low.y, of_h[3] = own.unit < REST ? high.x : high.y;
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) {
                x[gate] = to_float(gates_x[gate]);
                of_h[gate] = at.continues ? of_h[gate] : 0.0f;
            }
#pragma unroll
            for (int n = 0; n < 3; ++n) bias[n] = to_float(biases[n]);
            const Cell cell = Cell::forward(x, of_h, bias, c_prev);
            const float h_next = valid ? cell.m : 0.0f;

            // Publish, before anything else is stored. Padding gets zeros.
            const unsigned word = pack<E>(h_next);
            store_relaxed_if(in_batch & unit % PER_WORD<E> == 0, h + at.row * W + unit / PER_WORD<E>, word);

            // Store.
            store_if(valid & at.last, h_n + state_at, h_next);
            store_if(valid, c_n + state_at, cell.c);
            if (c != nullptr) {
                store_if(in_batch, c + at.row * H + unit, valid ? cell.c : 0.0f);
#pragma unroll
                for (int gate = 0; gate < GATES; ++gate) store_if(valid, my_gates + gate * H, cell.gates[gate]);
            }
        }
}

template <typename E, typename Cell, int H, int UNITS, int WARPS, int CHUNKS, int PARTNERS, bool WITH_DH, bool WITH_DH_N,
          bool WITH_LENGTHS, bool WITH_RESETS, bool WITH_RESET_C, bool WITH_DRESET_C, bool WITH_REVERSE>
__global__ void __launch_bounds__(32 * WARPS, 1) cooperative_backward(
    const E* dh,              // [T*B, H] or null
    const E* dh_n,            // [B, H] or null
    const E* gates,           // [T*B, 4H] activated
    const float* c,           // [T*B, H]
    const float* c0,          // [B, H]
    const unsigned* weights,  // [PARTNERS, H, OF_H / PARTNERS * W] W_hh^T, of each partner's gates
    unsigned* dgates,         // [T*B, 4, W] out and the exchange, sentinels beforehand
    unsigned* partials,       // [B, PARTNERS, H] floats, the second exchange, phase 1 beforehand; null if PARTNERS is 1
    float* dc,                // [B, H] in: dc_n; out: dc0
    const int* lengths,       // [B] or null
    const bool* resets,       // [T*B] or null
    const float* reset_c,     // [T*B, H] what c is reset to; null: zeros
    float* dreset_c,          // [T*B, H] its gradient, out where there is a reset; null where reset_c is
    int* error,               // [1]
    int T, int B, bool reverse) {
    if (!WITH_DH) dh = nullptr;
    if (!WITH_DH_N) dh_n = nullptr;
    if (!WITH_LENGTHS) lengths = nullptr;
    if (!WITH_RESETS) resets = nullptr;
    if (!WITH_RESET_C) reset_c = nullptr;
    if (!WITH_DRESET_C) dreset_c = nullptr;
    if (!WITH_REVERSE) reverse = false;
    constexpr int W = WORDS<E, H>;
    constexpr int ROWS = PARTNERS * UNITS;  // pairs are the units n and n + ROWS / 2
    constexpr int OF_H = Cell::OF_H, K = OF_H / PARTNERS * W;
    using Rows = Product<E, ROWS, K, WARPS, CHUNKS>;
    const Own<UNITS, WARPS> own;
    const int partner = blockIdx.x % PARTNERS;
    const Walk<(CHUNKS > 0)> begin(blockIdx.x / PARTNERS, gridDim.x / PARTNERS, ROWS, H);

    Rows product(weights);
    const auto load_rows_of = [&](int first_unit) {
        product.load([=](int pair, int half) {
            const int unit = first_unit + pair + half * (ROWS / 2);
            return unit < H ? partner * H + unit : -1;
        });
    };
    load_rows_of(begin.row);

    int turn = 0;
    bool lost = false;
    Delay delay, delay_of_sums;
    for (int step = T - 1; step >= 0; --step)
        for (auto walk = begin; walk.tile < B; walk.next(), turn ^= 1) {
            if (CHUNKS == 0) load_rows_of(walk.row);
            const int unit = walk.row + partner * UNITS + own.unit;
            const bool has_cell = own.cell & unit < H;

            // Load the data of the thread's cell before waiting.
            const int batch = walk.tile + own.sequence, length = length_of(lengths, batch, T, B);
            const int of_column = walk.tile + product.lane.column, its_length = length_of(lengths, of_column, T, B);
            const Position at(step, batch, length, resets, B, reverse);
            const Position next(step + 1, batch, length, resets, B, reverse);
            const bool valid = has_cell & at.valid, in_batch = has_cell & batch < B;
            const long long state_at = static_cast<long long>(batch) * H + unit;
            const long long output_at = at.row * H + unit;
            const E* const my_gates = gates + at.row * 4 * H + unit;
            E activated[GATES], dh_output = {}, dh_last = {};
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) activated[gate] = load_if(valid, my_gates + gate * H);
            const float c_after = load_if(valid, c + output_at), dc_after = load_if(valid, dc + state_at);
            float c_prev = load_if(has_cell & at.continues, (step == 0 ? c0 : c) + at.row_prev * H + unit);
            if (reset_c != nullptr) c_prev += load_if(valid & !at.continues, reset_c + output_at);
            if (dh != nullptr) dh_output = load_if(valid, dh + output_at);
            if (dh_n != nullptr) dh_last = load_if(valid & at.last, dh_n + state_at);

            // Product with dgates of the step after. It waits in padding and at resets, too: otherwise it could
            // overwrite partial sums that another block still waits for.
            const long long row_after = row_of(time_of(step + 1, its_length, reverse), of_column, B);
            delay.pass();
            typename Rows::Words dz(dgates + (row_after * 4 + GATES - OF_H) * W + partner * K + product.lane.first_word,
                                    step < T - 1 & of_column < B ? K - product.lane.first_word : 0);
            delay.learn(product.multiply(dz, turn, {error, step, lost}));

            // The gradient through the step after, for the thread's cell.
            float from_next;
            if (PARTNERS == 1) {
                const float2 sums = Rows::sum(own.unit % (ROWS / 2), own.sequence, turn);
                from_next = own.unit < ROWS / 2 ? sums.x : sums.y;
            } else {
                // Publish the sums, and add up those of all partners in the same order every time.
                const int phase = (T - 1 - step) % 2;
#pragma unroll
                for (int n = 0; n < ROWS / 2 * SEQUENCES; n += 32 * WARPS) {
                    const int pair = (n + threadIdx.x) % (ROWS / 2), sequence = (n + threadIdx.x) / (ROWS / 2);
                    const bool wanted = sequence < SEQUENCES & walk.tile + sequence < B;
                    const float2 sums = Rows::sum(pair, sequence % SEQUENCES, turn);
                    const int low = walk.row + pair, high = low + ROWS / 2;
                    const long long index = walk.tile + sequence;
                    unsigned* const to = partials + (index * PARTNERS + partner) * H;
                    store_relaxed_if(wanted & low < H, to + low, in_phase(sums.x, phase));
                    store_relaxed_if(wanted & high < H, to + high, in_phase(sums.y, phase));
                }
                float of_partners[PARTNERS];
                delay_of_sums.pass();
                const unsigned* const from = partials + static_cast<long long>(batch) * PARTNERS * H + unit;
                delay_of_sums.learn(await_phase(of_partners, from, H, in_batch, phase, {error, step, lost}));
                from_next = of_partners[0];
#pragma unroll
                for (int n = 1; n < PARTNERS; ++n) from_next += of_partners[n];
            }

            // Cell.
            Cell cell = {{}, c_after};
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) cell.gates[gate] = to_float(activated[gate]);
            const float dm = to_float(dh_output) + to_float(dh_last) + (next.continues ? from_next : 0.0f);
            float d[GATES];
            const float dc_prev = cell.backward(c_prev, dm, dc_after, d);

            // Publish. In padding every factor was loaded as zero, and so are the gradients.
            const bool publishes = in_batch & unit % PER_WORD<E> == 0;
            unsigned* const to = dgates + at.row * 4 * W + unit / PER_WORD<E>;
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) store_relaxed_if(publishes, to + gate * W, pack<E>(d[gate]));

            // Store. Nothing flows back past a reset.
            store_if(valid, dc + state_at, at.continues ? dc_prev : 0.0f);
            if (dreset_c != nullptr) store_if(valid & !at.continues, dreset_c + output_at, dc_prev);
        }
}
