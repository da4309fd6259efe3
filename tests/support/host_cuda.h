// As much of CUDA as kernels/cupy_rnn/cuda uses, on the CPU: g++ compiles the very same source after this, in which it
// stands for instructions.cu. Threads run one after another, since none waits for another: of every other launch from the
// last to the first, so that a thread which reads what another one writes shows.

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#define __device__
#define __global__
#define __launch_bounds__(...)

inline struct {
    int x, y;
} blockIdx, threadIdx;

inline float __uint_as_float(std::uint32_t x) { return std::bit_cast<float>(x); }
inline std::uint32_t __float_as_uint(float x) { return std::bit_cast<std::uint32_t>(x); }

using float16 = _Float16;
inline float to_float(float16 x) { return x; }
inline void round_to(float16& y, float x) { y = static_cast<float16>(x); }

inline float reciprocal(float x) { return 1.0f / x; }

namespace host {

struct Tensor {
    char* start;
    long long bytes;
    long long allowed;  // bytes of these that a kernel may touch
    long long first, size;  // out: an access to others, from which byte on, and how many
};
inline Tensor *tensors, *end;  // of the launch

using Run = void(const void*, int, int, int, bool, Tensor*, int);

template <auto KERNEL, typename Call>
void run(const void* call, int columns, int rows, int threads, bool backwards, Tensor* given, int count) {
    tensors = given, end = given + count;
    const int all = columns * rows * threads;
    for (int k = 0; k < all; ++k) {
        const int n = backwards ? all - 1 - k : k;
        threadIdx.x = n % threads, blockIdx.y = n / threads % rows, blockIdx.x = n / threads / rows;
        KERNEL(*static_cast<const Call*>(call));
    }
}

}  // namespace host

template <typename E>
E& element(E* tensor, long long at) {
    static std::remove_const_t<E> nothing;
    const long long from = at * static_cast<long long>(sizeof(E)), end = from + sizeof(E);
    for (auto* t = host::tensors; t < host::end; ++t)
        if (t->start == reinterpret_cast<const char*>(tensor)) {
            if (from < 0 || end > t->allowed) t->first = from, t->size = sizeof(E);
            if (from >= 0 && end <= t->bytes) return tensor[at];
        }
    return nothing;
}
