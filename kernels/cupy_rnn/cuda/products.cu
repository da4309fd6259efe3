// Products of weights [ROWS, W words] and 8 sequences of words that other blocks publish, by all warps of a block.
//
// The warps split K, counted in words: a chunk is 16 words of every row, and warp w has the chunks w, w + WARPS, ...
// The words of a chunk are spread over a warp's threads like operand B of a tensor core. A thread has
//
//     column   lane / 4: a sequence
//     quarter  lane % 4: a quad, four words of a chunk
//
// Rows come in pairs, `pair` and half 0 or 1. The warps' parts of a sum are added in shared memory.

constexpr int SEQUENCES = 8;
constexpr int CHUNK = 16;

template <typename E>
constexpr int PER_WORD = 4 / sizeof(E);

template <typename E>
__device__ float unpack(unsigned word, int n) {
    if constexpr (sizeof(E) == 4) return __uint_as_float(word);
    else return to_float(E{static_cast<unsigned short>(word >> 16 * n)});
}

// A float, rounded to the nearest TF32, ties away from zero: tensor cores would cut off the rest.
__device__ inline unsigned to_tf32(unsigned word) {
    return (word & 0x7F800000) == 0x7F800000 ? word : (word + 0x1000) & 0xFFFFE000;  // except infinity and NaN
}

// sum += the products of a quad's elements, in their order.
template <typename E>
__device__ void add_products(float& sum, const uint4& a, const uint4& b) {
    const unsigned a_words[4] = {a.x, a.y, a.z, a.w}, b_words[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int n = 0; n < PER_WORD<E>; ++n) sum += unpack<E>(a_words[word], n) * unpack<E>(b_words[word], n);
}

struct Lane {
    const int warp = threadIdx.x / 32, column = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    const int first_word = warp * CHUNK + quarter * 4;
};

// Shared memory float2 [2, WARPS, SEQUENCES, PITCH]: while one half is read, the other half is written, so that one
// barrier per turn suffices; `turn` is 0 and 1 alternately.
template <int PAIRS, int WARPS>
struct Parts {
    static constexpr int PITCH = PAIRS + 2;  // from one sequence to the next: no two threads have a bank conflict

    __device__ static float2* of_warp(int warp, int turn) {
        return reinterpret_cast<float2*>(shared_memory()) + (turn * WARPS + warp) * SEQUENCES * PITCH;
    }

    // A pair of rows of a sequence, summed over all warps in the same order every time.
    __device__ static float2 sum(int pair, int sequence, int turn) {
        const float2* const parts = of_warp(0, turn) + sequence * PITCH + pair;
        float2 total = parts[0];
#pragma unroll
        for (int warp = 1; warp < WARPS; ++warp) {
            const float2 part = parts[warp * SEQUENCES * PITCH];
            total.x += part.x, total.y += part.y;
        }
        return total;
    }
};

// On tensor cores. A warp has CHUNKS chunks, and keeps the weights of these in registers as operands A. In a tile of 16
// rows pair 8 tile + column is the rows `column` and `column + 8`; in a product's result a thread has that pair of the
// sequences 2 quarter and 2 quarter + 1. Which words of K are multiplied together is free as long as A and B agree.
template <typename E, int ROWS, int W, int WARPS, int CHUNKS>
struct Product : Parts<ROWS / 2, WARPS> {
    static constexpr int TILES = ROWS / 16;
    static constexpr int STRIDE = CHUNK * WARPS;  // words from one chunk of a warp to its next
    using Words = Quads<CHUNKS, STRIDE>;
    using Sums = Parts<ROWS / 2, WARPS>;

    const Lane lane;
    const unsigned* const rows;  // [*, W]
    unsigned weights[CHUNKS][TILES][2][4];  // for the two products of a quad

    __device__ Product(const unsigned* rows) : rows(rows) {}

    // number_of(pair, half) is the number of a row, or -1 for zeros.
    template <typename NumberOf>
    __device__ void load(NumberOf number_of) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const long long row = number_of(8 * tile + lane.column, half);
                    const int word = lane.first_word + chunk * STRIDE;
                    const auto* const from = reinterpret_cast<const uint4*>(rows + row * W + word);
                    uint4 quad = load_if(row >= 0 & word < W, from);
                    if (sizeof(E) == 4) quad = {to_tf32(quad.x), to_tf32(quad.y), to_tf32(quad.z), to_tf32(quad.w)};
                    auto& of = weights[chunk][tile];
                    of[0][half] = quad.x, of[0][2 + half] = quad.y, of[1][half] = quad.z, of[1][2 + half] = quad.w;
                }
    }

    __device__ bool multiply(Words& x, int turn, Polling polling) const {
        x.await(polling);
        float even[TILES][4] = {}, odd[TILES][4] = {};  // two chains of dependent products
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const uint4& quad = x.quad[chunk];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                multiply_tile(E{}, even[tile], weights[chunk][tile][0], quad.x, quad.y);
                multiply_tile(E{}, odd[tile], weights[chunk][tile][1], quad.z, quad.w);
            }
        }
        float2* const parts = Sums::of_warp(lane.warp, turn);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int n = 0; n < 2; ++n)
                parts[(2 * lane.quarter + n) * Sums::PITCH + 8 * tile + lane.column] = {
                    even[tile][n] + odd[tile][n], even[tile][2 + n] + odd[tile][2 + n]};
        __syncthreads();
        return polling.polls > 0;
    }
};

// By multiply-add in float32: for every GPU, exact for float, and for any W, since weights come from L2 at every step.
// A thread has the rows `lane`, `lane + 32`, ... of all sequences, whose words its warp copies into shared memory.
template <typename E, int ROWS, int W, int WARPS>
struct Product<E, ROWS, W, WARPS, 0> : Parts<ROWS / 2, WARPS> {
    static constexpr int PAIRS = ROWS / 2;
    static constexpr int MINE = ROWS / 32;  // rows of a thread
    static constexpr int STRIDE = CHUNK * WARPS;
    static constexpr int AHEAD = 4;  // chunks that are loaded at once
    using Words = Quads<AHEAD, STRIDE>;
    using Sums = Parts<PAIRS, WARPS>;

    const Lane lane;
    const unsigned* const rows;
    long long row[MINE];

    __device__ Product(const unsigned* rows) : rows(rows) {}

    template <typename NumberOf>
    __device__ void load(NumberOf number_of) {
#pragma unroll
        for (int n = 0; n < MINE; ++n) row[n] = number_of(mine(n) % PAIRS, mine(n) / PAIRS);
    }

    __device__ static int mine(int n) { return threadIdx.x % 32 + 32 * n; }

    __device__ bool multiply(Words& x, int turn, Polling polling) const {
        uint4* const stage = reinterpret_cast<uint4*>(Sums::of_warp(0, 2)) + lane.warp * AHEAD * SEQUENCES * 4;
        float sums[MINE][SEQUENCES] = {};
        for (int first = 0; first < W; first += AHEAD * STRIDE) {
            if (first > 0) x = Words(x.from + AHEAD * STRIDE, x.left - AHEAD * STRIDE);
            x.await(polling);
            barrier_of_warp();  // all have read the words before; a vote orders no memory
#pragma unroll
            for (int chunk = 0; chunk < AHEAD; ++chunk)
                stage[(chunk * SEQUENCES + lane.column) * 4 + lane.quarter] = x.quad[chunk];
            barrier_of_warp();
#pragma unroll 1
            for (int n = 0; n < AHEAD * 4; ++n) {  // quads of a row
                const int chunk = n / 4, quarter = n % 4;
                const int at = first + chunk * STRIDE + lane.warp * CHUNK + 4 * quarter;
#pragma unroll
                for (int m = 0; m < MINE; ++m) {
                    const auto* const from = reinterpret_cast<const uint4*>(rows + row[m] * W + at);
                    const uint4 weights = load_if(row[m] >= 0 & at < W, from);
#pragma unroll
                    for (int s = 0; s < SEQUENCES; ++s)
                        add_products<E>(sums[m][s], weights, stage[(chunk * SEQUENCES + s) * 4 + quarter]);
                }
            }
        }
        float* const parts = reinterpret_cast<float*>(Sums::of_warp(lane.warp, turn));
#pragma unroll
        for (int n = 0; n < MINE; ++n)
#pragma unroll
            for (int s = 0; s < SEQUENCES; ++s)
                parts[2 * (s * Sums::PITCH + mine(n) % PAIRS) + mine(n) / PAIRS] = sums[n][s];
        __syncthreads();
        return polling.polls > 0;
    }
};
