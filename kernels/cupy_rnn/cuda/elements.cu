// Elements of tensors, in memory and as float32, and what C++ cannot express. Our own two-byte types, since not every CuPy
// ships CUDA's headers for them. tests/host_cuda.h stands in for this file on the CPU.

struct float16 {
    unsigned short bits;
};

struct bfloat16 {
    unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// To nearest, ties to even.
__device__ inline void round_to(float& y, float x) { y = x; }
__device__ inline void round_to(float16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void round_to(bfloat16& y, float x) {  // before sm_80 there is no instruction
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// 1 / x for x >= 1, 0 for infinity.
__device__ inline float reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// Every access to a tensor.
template <typename E>
__device__ inline E& element(E* tensor, long long at) { return tensor[at]; }
