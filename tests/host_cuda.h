// As much of CUDA as kernels/cupy_rnn/cuda uses, on the CPU: g++ compiles the very same source after this. It stands in
// the place of instructions.cu.
//
// A thread is a coroutine, and all threads of all blocks are alive at once. Whose turn it is, a seed decides; a turn ends
// where threads wait for each other. Now and then a warp is left alone for long. What is published becomes visible late, and out of order.
//
// A kernel's pointers have the number of their argument in the upper bits, which no address uses. The functions below
// look up that tensor's extent, and take the number off; whatever goes round them is stopped by the processor.

#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y, z;
};

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace host {

constexpr int ADDRESS_BITS = 48;
constexpr int WARP = 32;
constexpr int STACK = 1 << 16;
constexpr unsigned char NAN_BYTE = 0xFF;  // all of whose repetitions are NaN, in every element type
constexpr int GUARD = 1024;
constexpr int PATIENCE = 300;  // turns of every thread without a word or a barrier, after which nobody gets on any more

struct Meeting {  // of the threads of a warp or a block
    int count, missing = count;
    std::vector<int> waiting = {};
};

struct Warp {
    long asleep_until = 0;
    Meeting meeting{WARP};
    struct Slot {
        int what;  // they meet for
        std::uint32_t words[6];
    } slots[2][WARP];  // of two meetings in turn: one may be at the next while another still reads
};

struct Block {
    Block(int threads, int shared_bytes)
        : barrier{threads}, warps((threads + WARP - 1) / WARP), shared_bytes(shared_bytes),
          shared((shared_bytes + GUARD) / sizeof(uint4)) {
        for (auto& warp : warps) warp.meeting = {min(WARP, threads)};
        if (threads % WARP) warps.back().meeting = {threads % WARP};
        std::memset(shared.data(), NAN_BYTE, shared_bytes + GUARD);
    }

    bool kept_to_its_memory() const {
        const auto* const end = reinterpret_cast<const unsigned char*>(shared.data()) + shared_bytes;
        for (int n = 0; n < GUARD; ++n)
            if (end[n] != NAN_BYTE) return false;
        return true;
    }

    Meeting barrier;
    std::vector<Warp> warps;
    int shared_bytes;
    std::vector<uint4> shared;  // and GUARD bytes more
};

struct Thread {
    ucontext_t context;
    dim3 block_index, index;
    Block* block;
    int meetings = 0;  // of its warp
};

struct Published {
    std::uint32_t *to, word;
};

struct Access {
    long long argument, first, size, is_store;  // to which argument, from which of its bytes on, how many
};

struct Random {  // Marsaglia's xorshift
    std::uint64_t state;
    std::uint64_t operator()() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    }
};

struct Launch {
    Random random;
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    std::vector<int> ready;
    std::vector<Published> pending;
    ucontext_t scheduler;
    int current = 0;
    long turns = 0, progress = 0;  // the turn of the last word or barrier
    bool stuck = false, apart = false, strayed = false;
    Access outside{-1};
    long long count;         // of arguments
    char** starts;           // of each
    const long long* bytes;  // of each; -1 if it is no tensor

    Thread& thread() { return threads[current]; }
    Warp& warp() { return thread().block->warps[threadIdx.x / WARP]; }
    bool toss(int one_in) { return random() % one_in == 0; }

    // The end of a turn. The thread is in `ready`, or waits.
    void yield() { swapcontext(&thread().context, &scheduler); }

    [[noreturn]] void leave() {  // a thread that goes astray ends the launch
        strayed = true;
        setcontext(&scheduler);
        __builtin_unreachable();
    }

    // What a pointer to some bytes points to, which lies in its tensor.
    template <typename T>
    T* checked(T* pointer, long long size, bool is_store) {
        const auto word = reinterpret_cast<std::uintptr_t>(pointer);
        const auto n = static_cast<long long>(word >> ADDRESS_BITS) - 1;
        auto* const address = reinterpret_cast<char*>(word & ((std::uintptr_t{1} << ADDRESS_BITS) - 1));
        if (n < 0 || n >= count) leave();
        const long long first = address - starts[n];
        if (first < 0 || first + size > bytes[n]) {
            outside = {n, first, size, is_store};
            leave();
        }
        return reinterpret_cast<T*>(address);
    }

    void meet(Meeting& meeting) {
        if (--meeting.missing > 0) {
            meeting.waiting.push_back(current);
        } else {
            meeting.missing = meeting.count;
            ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
            meeting.waiting.clear();
            ready.push_back(current);
        }
        yield();
    }

    // The threads of a warp exchange words: those of all.
    const Warp::Slot* exchange(int what, std::initializer_list<std::uint32_t> words) {
        auto& slots = warp().slots[thread().meetings++ % 2];
        auto& mine = slots[threadIdx.x % WARP];
        mine.what = what;
        std::memcpy(mine.words, words.begin(), words.size() * sizeof(std::uint32_t));
        meet(warp().meeting);
        for (int lane = 0; lane < warp().meeting.count; ++lane) apart |= slots[lane].what != what;
        return slots;
    }

    void publish(std::uint32_t* to, std::uint32_t word) { pending.push_back({checked(to, sizeof word, true), word}); }

    void make_visible(std::size_t n) {  // but what went to the same place before comes first
        const auto* const to = pending[n].to;
        auto first = pending.begin();
        while (first->to != to) ++first;
        *first->to = first->word;
        pending.erase(first);
        progress = turns;
    }

    void run() {
        std::vector<int> asleep;
        while (!ready.empty() || !asleep.empty()) {
            if (strayed) return;
            ++turns;
            if (ready.empty()) {  // of those left alone, the first
                ready.swap(asleep);
                for (auto& block : blocks)
                    for (auto& warp : block.warps) warp.asleep_until = 0;
            }
            if (!pending.empty() && toss(32)) make_visible(random() % pending.size());
            const auto n = random() % ready.size();
            current = ready[n];
            ready[n] = ready.back();
            ready.pop_back();
            threadIdx = thread().index;
            if (toss(400)) warp().asleep_until = turns + (1L << random() % 14);
            if (turns < warp().asleep_until) {
                asleep.push_back(current);
                continue;
            }
            if (!asleep.empty() && toss(64)) {
                ready.insert(ready.end(), asleep.begin(), asleep.end());
                asleep.clear();
            }
            stuck |= turns - progress > PATIENCE * static_cast<long>(threads.size());
            if (stuck && turns - progress > 2 * PATIENCE * static_cast<long>(threads.size())) return;
            blockIdx = thread().block_index;
            swapcontext(&scheduler, &thread().context);
        }
        while (!pending.empty()) make_visible(0);
    }
};

inline Launch* launch;

template <typename T>
const T* to_load(const T* from, std::size_t size = sizeof(T)) { return launch->checked(from, size, false); }
template <typename T>
T* to_store(T* to) { return launch->checked(to, sizeof(T), true); }

}  // namespace host

inline uint4* shared_memory() { return host::launch->thread().block->shared.data(); }
inline void __syncthreads() {
    host::launch->meet(host::launch->thread().block->barrier);
    host::launch->progress = host::launch->turns;
}

// What instructions.cu has, in the same order.

struct float16 {
    std::uint16_t bits;
};

struct bfloat16 {
    std::uint16_t bits;
};

template <typename To, typename From>
To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }

inline float to_float(float x) { return x; }
inline float to_float(float16 x) { return bits_as<_Float16>(x.bits); }
inline float to_float(bfloat16 x) { return __uint_as_float(std::uint32_t{x.bits} << 16); }

inline void round_to(float& y, float x) { y = x; }
inline void round_to(float16& y, float x) {
    y.bits = std::isnan(x) ? 0x7FFF : bits_as<std::uint16_t>(static_cast<_Float16>(x));
}
inline void round_to(bfloat16& y, float x) {
    const auto bits = __float_as_uint(x);
    y.bits = std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

template <typename E>
unsigned pack_two(E, float low, float high) {
    E first, second;
    round_to(first, low);
    round_to(second, high);
    return first.bits | second.bits << 16;
}

inline float exp2_of(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline float choose(bool yes, float a, float b) { return yes ? a : b; }

template <typename T>
T load_if(bool yes, const T* from) {
    return yes ? *host::to_load(from) : T{};
}
template <typename T>
void store_if(bool yes, T* to, float x) {
    if (yes) round_to(*host::to_store(to), x);
}

template <typename T>
void load_relaxed_if(bool yes, T& x, const unsigned* from) {
    if (yes) std::memcpy(&x, host::to_load(from, sizeof x), sizeof x);
}
inline void store_relaxed_if(bool yes, unsigned* to, unsigned x) {
    if (yes) host::launch->publish(to, x);
}

inline int load_from_host(const int* from) { return host::launch->stuck ? 1 : *host::to_load(from); }
inline void store_to_host(int* to, int x) { *host::to_store(to) = x; }

inline bool any_of_warp(bool yes) {
    const auto* const slots = host::launch->exchange(0, {yes});
    bool any = false;
    for (int lane = 0; lane < host::WARP; ++lane) any |= slots[lane].words[0] != 0;
    return any;
}
inline void barrier_of_warp() { host::launch->exchange(1, {}); }
inline float of_neighbour(float x) {
    return __uint_as_float(host::launch->exchange(2, {__float_as_uint(x)})[threadIdx.x % host::WARP ^ 1].words[0]);
}

template <typename E>
float product_of_words(unsigned a, unsigned b) {
    const auto element = [](unsigned word, int n) { return to_float(E{static_cast<std::uint16_t>(word >> 16 * n)}); };
    return element(a, 0) * element(b, 0) + element(a, 1) * element(b, 1);
}
template <>
inline float product_of_words<float>(unsigned a, unsigned b) {  // the last 13 bits do not count
    return __uint_as_float(a & ~0x1FFFu) * __uint_as_float(b & ~0x1FFFu);
}

template <typename E>
void multiply_tile(E, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const auto* const slots = host::launch->exchange(3, {a[0], a[1], a[2], a[3], b0, b1});
    const int column = threadIdx.x % host::WARP / 4, quarter = threadIdx.x % 4;
    for (int n = 0; n < 4; ++n)
        for (int k = 0; k < 4; ++k) {
            const auto* const of_a = slots[4 * column + k].words;
            const auto* const of_b = slots[4 * (2 * quarter + n % 2) + k].words;
            d[n] += product_of_words<E>(of_a[n / 2], of_b[4]) + product_of_words<E>(of_a[2 + n / 2], of_b[5]);
        }
}

namespace host {

inline void (*entry)(void**);
inline void** arguments;

inline void first_turn() {
    entry(arguments);
    launch->current = -1;  // it does not come back
    setcontext(&launch->scheduler);
}

inline void stopped(int) { launch->leave(); }

// Like cuLaunchCooperativeKernel: args holds the address of each argument, of `count`. 0; or 1: a block wrote past its
// shared memory, 2: threads of a warp did different things, 3: they waited in vain, 4: an access is `outside` of a
// tensor, 5: an access is to no tensor, or by none of the functions of this file.
inline int run(void (*kernel)(void**), const int (&grid)[2], int threads, int shared_bytes, unsigned seed, void** args,
               const long long* bytes, int count, Access* outside) {
    static std::vector<char*> stacks;  // kept
    Launch all;
    std::vector<std::uintptr_t> numbered(count);
    std::vector<void*> numbered_args(args, args + count);
    std::vector<char*> starts(count);
    all.count = count, all.starts = starts.data(), all.bytes = bytes;
    for (int n = 0; n < count; ++n)
        if (bytes[n] >= 0) {
            starts[n] = *static_cast<char**>(args[n]);
            numbered[n] = reinterpret_cast<std::uintptr_t>(starts[n]) | (n + std::uintptr_t{1}) << ADDRESS_BITS;
            numbered_args[n] = &numbered[n];
        }
    all.random = {seed * 2654435761ull + 88172645463325252ull};
    const int blocks = grid[0] * grid[1];
    all.blocks.reserve(blocks);
    all.threads.resize(blocks * threads);
    gridDim = {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), 1};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    launch = &all, entry = kernel, arguments = numbered_args.data();
    for (int b = 0; b < blocks; ++b) {
        all.blocks.emplace_back(threads, shared_bytes);
        for (int t = 0; t < threads; ++t) {
            const std::size_t n = b * threads + t;
            if (n == stacks.size())
                stacks.push_back(static_cast<char*>(
                    mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
            auto& thread = all.threads[n];
            thread.block_index = {static_cast<unsigned>(b % grid[0]), static_cast<unsigned>(b / grid[0]), 0};
            thread.index = {static_cast<unsigned>(t), 0, 0};
            thread.block = &all.blocks[b];
            getcontext(&thread.context);
            thread.context.uc_stack = {stacks[n], 0, STACK};
            makecontext(&thread.context, first_turn, 0);
            all.ready.push_back(static_cast<int>(n));
        }
    }
    struct sigaction then = {}, before;
    then.sa_handler = stopped;
    sigaction(SIGSEGV, &then, &before);
    all.run();
    sigaction(SIGSEGV, &before, nullptr);
    *outside = all.outside;
    if (all.strayed) return outside->argument < 0 ? 5 : 4;
    for (const auto& block : all.blocks)
        if (!block.kept_to_its_memory()) return 1;
    return all.apart ? 2 : all.stuck ? 3 : 0;
}

template <auto KERNEL>
struct Entry;

template <typename... Args, void (*KERNEL)(Args...)>
struct Entry<KERNEL> {
    template <std::size_t... N>
    static void call(void** args, std::index_sequence<N...>) {
        KERNEL(*static_cast<Args*>(args[N])...);
    }
    static void with(void** args) { call(args, std::index_sequence_for<Args...>{}); }
};

}  // namespace host
