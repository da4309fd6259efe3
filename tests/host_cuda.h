// As much of CUDA as lstm.cu uses, on the CPU: g++ compiles the very same source with this included before it.
//
// A block's threads are real threads, and __syncthreads is a barrier between them. The blocks of a cluster run side by
// side, others one after another. Where a launch has no shared memory its threads have nothing to wait for, and run one
// after another, too.

#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
};

inline int min(int a, int b) { return a < b ? a : b; }

// Half precision: conversions only.

struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
    std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const std::uint32_t bits = std::uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return {0x7FFF};
    return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

// Blocks and their threads.

namespace host {

class Barrier {
  public:
    explicit Barrier(int count) : count_(count), missing_(count) {}

    void wait() {
        std::unique_lock lock(mutex_);
        const int round = round_;
        if (--missing_ == 0) {
            missing_ = count_;
            ++round_;
            all_here_.notify_all();
        } else {
            all_here_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    const int count_;
    int missing_, round_ = 0;
    std::mutex mutex_;
    std::condition_variable all_here_;
};

constexpr unsigned char NAN_BYTE = 0xFF;  // all of whose repetitions are NaN, in every element type
constexpr int GUARD = 1024;

struct Block {
    Block(int rank, int threads, int shared_bytes)
        : rank(rank), barrier(threads), shared_bytes(shared_bytes), shared((shared_bytes + GUARD) / sizeof(uint4)) {
        std::memset(shared.data(), NAN_BYTE, shared_bytes + GUARD);
    }

    bool kept_to_its_memory() const {
        const auto* const end = reinterpret_cast<const unsigned char*>(shared.data()) + shared_bytes;
        return std::all_of(end, end + GUARD, [](unsigned char byte) { return byte == NAN_BYTE; });
    }

    const int rank;  // in its cluster
    Barrier barrier;
    const int shared_bytes;
    std::vector<uint4> shared;  // and GUARD bytes more
};

struct Cluster {
    Cluster(int count, int threads, int shared_bytes) : barrier(count * threads) {
        for (int b = 0; b < count; ++b) blocks.push_back(std::make_unique<Block>(b, threads, shared_bytes));
    }

    Barrier barrier;
    std::vector<std::unique_ptr<Block>> blocks;
};

inline thread_local Cluster* cluster;
inline thread_local Block* block;

}  // namespace host

inline thread_local dim3 blockIdx, threadIdx, blockDim;

// `extern __shared__ uint4 shared_storage[]` declares a pointer to the block's own storage.
thread_local uint4 (*host_shared_storage)[];
#define __shared__ thread_local
#define shared_storage (*host_shared_storage)

inline void __syncthreads() { host::block->barrier.wait(); }
inline unsigned __clusterRelativeBlockRank() { return host::block->rank; }
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait() { host::cluster->barrier.wait(); }
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) {
    const auto offset = static_cast<const char*>(p) - reinterpret_cast<const char*>(host::block->shared.data());
    return reinterpret_cast<char*>(host::cluster->blocks[rank]->shared.data()) + offset;
}

namespace host {

// Like cuLaunchKernel: args holds the address of each argument. Whether all blocks kept to their shared memory.
template <typename... Args>
bool launch(void (*kernel)(Args...), int grid, int threads, int shared_bytes, int cluster_size, void** args) {
    const auto call = [&]<std::size_t... N>(std::index_sequence<N...>) { kernel(*static_cast<Args*>(args[N])...); };
    const auto run = [&](int block_index, int thread) {
        blockIdx = {static_cast<unsigned>(block_index), 0, 0};
        blockDim = {static_cast<unsigned>(threads), 1, 1};
        threadIdx = {static_cast<unsigned>(thread), 0, 0};
        call(std::index_sequence_for<Args...>{});
    };
    if (shared_bytes == 0) {
        for (int b = 0; b < grid; ++b)
            for (int t = 0; t < threads; ++t) run(b, t);
        return true;
    }
    bool kept = true;
    for (int first = 0; first < grid; first += cluster_size) {
        Cluster blocks(cluster_size, threads, shared_bytes);
        std::vector<std::thread> running;
        for (int b = 0; b < cluster_size; ++b)
            for (int t = 0; t < threads; ++t)
                running.emplace_back([&, b, t] {
                    cluster = &blocks;
                    block = blocks.blocks[b].get();
                    host_shared_storage = reinterpret_cast<uint4(*)[]>(block->shared.data());
                    run(first + b, t);
                });
        for (auto& thread : running) thread.join();
        for (const auto& b : blocks.blocks) kept &= b->kept_to_its_memory();
    }
    return kept;
}

}  // namespace host
