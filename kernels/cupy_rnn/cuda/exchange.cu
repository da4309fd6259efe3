// How the blocks of one launch exchange what all of them need at the next step: each word doubles as its ready flag.
//
// Words have 32 bits, one float or two neighbouring two-byte elements. Either every step's words have memory of their
// own, initialised with a sentinel that `pack` never returns; or two steps alternate in the same memory, and a word's
// last bit is its step's phase. A reader loads a word until it is the one it waits for.
//
// The word after the error word says how often a warp may poll. A warp beyond this limit times out: it writes step + 1
// into the error word, and the missing values count as NaN. It remembers that, since the host may have cleared the error
// word by then, and looks once where it would wait, so that the launch ends.

constexpr unsigned SENTINEL = 0xFFFFFFFF;
constexpr unsigned A_NAN = 0x7FC00000;    // not the sentinel
constexpr int POLLS_BETWEEN_CHECKS = 64;  // the error word is in host memory

// How long a warp waits before it polls first, in sixteenths of a turn of a loop, which takes some 30 clocks. A poll in
// vain costs as much as what it loads, ten turns or more; so next time it waits two turns longer, and each time that
// words are there at once a sixteenth of a turn less.
struct Delay {
    static constexpr int LONGER = 32, SHORTER = 1, LONGEST = 4096;
    int sixteenths = 0;

    __device__ void pass() const {
        for (int turns = sixteenths / 16; any_of_warp(turns > 0); --turns) {}  // the vote keeps it from being left out
    }

    __device__ void learn(bool in_vain) {
        sixteenths = min(max(sixteenths + (in_vain ? LONGER : -SHORTER), 0), LONGEST);
    }
};

// With two-byte elements, an even thread's word has its own element in the low half and the next thread's in the high
// half; an odd thread's word is not used.
template <typename E>
__device__ unsigned pack(float x) {
    if constexpr (sizeof(E) == 4) return x == x ? __float_as_uint(x) : A_NAN;
    else return pack_two(E{}, x, of_neighbour(x));
}

// A float whose last bit is a phase, 0 or 1: it costs half a unit in the last place.
__device__ inline unsigned in_phase(float x, int phase) { return (pack<float>(x) & ~1u) | phase; }

// Limits how long a warp polls. `lost`, of the whole launch: whether it timed out, or saw that another one did.
struct Polling {
    int* error;
    int step;
    bool& lost;
    int polls = 0;

    // Whether to poll again.
    __device__ bool goes_on() {
        if (lost) return false;
        if (++polls % POLLS_BETWEEN_CHECKS) return true;
        lost = any_of_warp(load_from_host(error) != 0);
        if (!lost && any_of_warp(polls >= load_from_host(error + 1))) {
            store_to_host(error, step + 1);
            lost = true;
        }
        return !lost;
    }
};

// Quads of words at from[0], from[STRIDE], ..., of `left` words; zeros beyond.
template <int COUNT, int STRIDE>
struct Quads {
    const unsigned* from;
    int left;
    uint4 quad[COUNT];

    __device__ Quads(const unsigned* from, int left) : from(from), left(left) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) quad[n] = {0, 0, 0, 0};
        load();
    }

    __device__ void load() {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) load_relaxed_if(left > n * STRIDE, quad[n], from + n * STRIDE);
    }

    __device__ bool all_there() const {
        unsigned most = 0;  // of all words; the sentinel is the greatest
#pragma unroll
        for (int n = 0; n < COUNT; ++n) most = max(most, max(max(quad[n].x, quad[n].y), max(quad[n].z, quad[n].w)));
        return most != SENTINEL;
    }

    __device__ void await(Polling& polling) {
        while (any_of_warp(!all_there()) && polling.goes_on()) load();
    }
};

// Floats of a phase at from[0], from[stride], ...; zeros if they are not wanted. Whether a poll was in vain.
template <int COUNT>
__device__ bool await_phase(float (&x)[COUNT], const unsigned* from, int stride, bool wanted, int phase,
                            Polling polling) {
    unsigned word[COUNT];
    bool missing;
    do {
        missing = false;
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            word[n] = phase;
            load_relaxed_if(wanted, word[n], from + n * stride);
        }
#pragma unroll
        for (int n = 0; n < COUNT; ++n) missing |= (word[n] & 1) != phase;
        missing = any_of_warp(missing);
    } while (missing && polling.goes_on());
    if (missing)
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
            if ((word[n] & 1) != phase) word[n] = A_NAN;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] = wanted ? __uint_as_float(word[n]) : 0.0f;
    return polling.polls > 0;
}
