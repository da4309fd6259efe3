// What C++ has no words for, in PTX. tests/host_cuda.h says the same for the CPU.
//
__device__ inline uint4* shared_memory() {
    extern __shared__ uint4 shared_storage[];
    return shared_storage;
}

// Types of two bytes are our own, since not every CuPy brings CUDA's headers for them.

struct float16 {
    unsigned short bits;
};

struct bfloat16 {
    unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

// To the nearest, of two the even one; every NaN becomes the same positive one.
__device__ inline void round_to(float& y, float x) { y = x; }

__device__ inline void round_to(float16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

__device__ inline void round_to(bfloat16& y, float x) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
}

// Both in a word, rounded; two NaN are not all ones.
template <typename E>
__device__ unsigned pack_two(E, float low, float high) {
    E first, second;
    round_to(first, low);
    round_to(second, high);
    return first.bits | second.bits << 16;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline unsigned pack_two(float16, float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <>
__device__ inline unsigned pack_two(bfloat16, float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

// 2^x and 1 / x to 2 units in the last place, without the many instructions for results below 2^-126: they are 0.
__device__ inline float exp2_of(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

__device__ inline float reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// yes ? a : b, where the compiler would make a branch.
__device__ inline float choose(bool yes, float a, float b) {
    float x;
    asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
        : "=f"(x) : "f"(a), "f"(b), "r"(static_cast<int>(yes)));
    return x;
}

// *from, or zero: by a predicate, so that the threads of a warp stay together.
__device__ inline int load_if(bool yes, const int* from) {
    int x;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%1]; }"
                 : "=r"(x) : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(yes)) : "memory");
    return x;
}

__device__ inline unsigned load_if(bool yes, const unsigned* from) {
    return load_if(yes, reinterpret_cast<const int*>(from));
}

__device__ inline float load_if(bool yes, const float* from) {
    return __int_as_float(load_if(yes, reinterpret_cast<const int*>(from)));
}

__device__ inline unsigned short load_if(bool yes, const unsigned short* from) {
    unsigned short x;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.b16 %0, [%1]; }"
                 : "=h"(x) : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(yes)) : "memory");
    return x;
}

__device__ inline float16 load_if(bool yes, const float16* from) { return {load_if(yes, &from->bits)}; }
__device__ inline bfloat16 load_if(bool yes, const bfloat16* from) { return {load_if(yes, &from->bits)}; }

__device__ inline bool load_if(bool yes, const bool* from) {
    int x;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.u8 %0, [%1]; }"
                 : "=r"(x) : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(yes)) : "memory");
    return x != 0;
}

__device__ inline uint4 load_if(bool yes, const uint4* from) {
    uint4 x;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
                 " @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(yes)) : "memory");
    return x;
}

__device__ inline void store_if(bool yes, float* to, float x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.f32 [%0], %1; }"
                 :: "l"(__cvta_generic_to_global(to)), "f"(x), "r"(static_cast<int>(yes)) : "memory");
}

__device__ inline void store_if(bool yes, unsigned short* to, unsigned short x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b16 [%0], %1; }"
                 :: "l"(__cvta_generic_to_global(to)), "h"(x), "r"(static_cast<int>(yes)) : "memory");
}

__device__ inline void store_if(bool yes, float16* to, float16 x) { store_if(yes, &to->bits, x.bits); }
__device__ inline void store_if(bool yes, bfloat16* to, bfloat16 x) { store_if(yes, &to->bits, x.bits); }

// Words that blocks of one launch exchange: relaxed accesses of gpu scope (PTX ISA, "Memory Consistency Model").
__device__ inline void load_relaxed_if(bool yes, uint4& x, const unsigned* from) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %5, 0; @p ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
                 : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(yes)) : "memory");
}

__device__ inline void load_relaxed_if(bool yes, unsigned& x, const unsigned* from) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.relaxed.gpu.global.b32 %0, [%1]; }"
                 : "+r"(x) : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(yes)) : "memory");
}

__device__ inline void store_relaxed_if(bool yes, unsigned* to, unsigned x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.relaxed.gpu.global.b32 [%0], %1; }"
                 :: "l"(__cvta_generic_to_global(to)), "r"(x), "r"(static_cast<int>(yes)) : "memory");
}

// The same with the host.
__device__ inline int load_from_host(const int* from) {
    int x;
    asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
    return x;
}

__device__ inline void store_to_host(int* to, int x) {
    asm volatile("st.relaxed.sys.global.b32 [%0], %1;" :: "l"(__cvta_generic_to_global(to)), "r"(x) : "memory");
}

// Of all threads of a warp: whether any says yes; that each sees what the others stored; what a thread's neighbour has.
__device__ inline bool any_of_warp(bool yes) { return __any_sync(0xFFFFFFFF, yes); }
__device__ inline void barrier_of_warp() { __syncwarp(); }
__device__ inline float of_neighbour(float x) { return __shfl_xor_sync(0xFFFFFFFF, x, 1); }

// d = a b + d on a tensor core, by a warp: 16 rows of a, 8 columns of b; a word of them is two elements of two bytes, or
// a float of which 10 bits of the fraction count. PTX ISA, "Matrix Fragments for mma.m16n8k16" and, for float, "m16n8k8".
#define MULTIPLY(E, KIND)                                                                                          \
    __device__ inline void multiply_tile(E, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {     \
        asm volatile("mma.sync.aligned." KIND " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                              \
    }
#if __CUDA_ARCH__ >= 800
MULTIPLY(float16, "m16n8k16.row.col.f32.f16.f16.f32")
MULTIPLY(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MULTIPLY(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#endif
#undef MULTIPLY
