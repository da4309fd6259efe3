// The instructions that C++ cannot express, and the function of every access to memory. On a CPU tests/support/host_cuda.h
// replaces this file.

struct float16 {
    unsigned short bits;
};

__device__ inline float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline void round_to(float16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Return 1 / x for x >= 1, and 0 for infinity.
__device__ inline float reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

template <typename E>
__device__ inline E& element(E* tensor, long long at) { return tensor[at]; }
