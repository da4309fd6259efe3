// What C++ cannot express, in PTX. tests/host_cuda.h stands in for it on the CPU.

__device__ inline uint4* shared_memory() {
    extern __shared__ uint4 shared_storage[];
    return shared_storage;
}

// Our own two-byte types, since not every CuPy ships CUDA's headers for them.

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

// To nearest, ties to even; every NaN becomes the same positive one.
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

// Both in one word, rounded; even two NaNs are not all ones.
template <typename E>
__device__ unsigned pack_two(E, float low, float high) {
    E first, second;
    round_to(first, low);
    round_to(second, high);
    return first.bits | second.bits << 16;
}

#if __CUDA_ARCH__ >= 800
#define PACK_TWO(E, KIND)                                                                                          \
    __device__ inline unsigned pack_two(E, float low, float high) {                                                \
        unsigned word;                                                                                             \
        asm("cvt.rn." KIND ".f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));                                 \
        return word;                                                                                               \
    }
PACK_TWO(float16, "f16x2")
PACK_TWO(bfloat16, "bf16x2")
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

// yes ? a : b, where the compiler would emit a branch.
__device__ inline float choose(bool yes, float a, float b) {
    float x;
    asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
        : "=f"(x) : "f"(a), "f"(b), "r"(static_cast<int>(yes)));
    return x;
}

// Predicated loads and stores, so that the threads of a warp stay together. OTHERWISE: what x is without a load.
#define IF_YES(N, OTHERWISE, INSTRUCTION) "{ .reg .pred p; setp.ne.s32 p, %" N ", 0; " OTHERWISE "@p " INSTRUCTION "; }"
#define OPERANDS(ADDRESS) "l"(__cvta_generic_to_global(ADDRESS)), "r"(static_cast<int>(yes)) : "memory"
#define LOAD(NAME, OTHERWISE, KIND, X, REGISTER)                                                                   \
    __device__ inline void NAME(bool yes, X& x, const void* from) {                                                \
        asm volatile(IF_YES("2", OTHERWISE, "ld." KIND " %0, [%1]") : REGISTER(x) : OPERANDS(from));               \
    }
#define LOAD_QUAD(NAME, OTHERWISE, KIND, REGISTER)                                                                 \
    __device__ inline void NAME(bool yes, uint4& x, const void* from) {                                            \
        asm volatile(IF_YES("5", OTHERWISE, "ld." KIND ".v4.b32 {%0, %1, %2, %3}, [%4]")                           \
                     : REGISTER(x.x), REGISTER(x.y), REGISTER(x.z), REGISTER(x.w) : OPERANDS(from));               \
    }
#define STORE(NAME, KIND, X, REGISTER)                                                                             \
    __device__ inline void NAME(bool yes, X* to, X x) {                                                            \
        asm volatile(IF_YES("2", "", "st." KIND " [%1], %0") :: REGISTER(x), OPERANDS(to));                        \
    }
LOAD(load_byte_or_zero, "mov.b32 %0, 0; ", "global.u8", int, "=r")
LOAD(load_or_zero, "mov.b16 %0, 0; ", "global.b16", unsigned short, "=h")
LOAD(load_or_zero, "mov.b32 %0, 0; ", "global.b32", int, "=r")
LOAD_QUAD(load_or_zero, "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; ", "global", "=r")
STORE(store_if, "global.b16", unsigned short, "h")
STORE(store_if, "global.f32", float, "f")

// Words that blocks of one launch exchange: relaxed accesses of gpu scope (PTX ISA, "Memory Consistency Model").
LOAD(load_relaxed_if, "", "relaxed.gpu.global.b32", unsigned, "+r")
LOAD_QUAD(load_relaxed_if, "", "relaxed.gpu.global", "+r")
STORE(store_relaxed_if, "relaxed.gpu.global.b32", unsigned, "r")

// *from, or zero.
template <typename X>
__device__ inline X load_if(bool yes, const X* from) {
    X x;
    load_or_zero(yes, x, from);
    return x;
}

__device__ inline float load_if(bool yes, const float* from) {
    return __int_as_float(load_if(yes, reinterpret_cast<const int*>(from)));
}

__device__ inline float16 load_if(bool yes, const float16* from) { return {load_if(yes, &from->bits)}; }
__device__ inline bfloat16 load_if(bool yes, const bfloat16* from) { return {load_if(yes, &from->bits)}; }

__device__ inline bool load_if(bool yes, const bool* from) {
    int x;
    load_byte_or_zero(yes, x, from);
    return x != 0;
}

// Rounded.
template <typename E>
__device__ inline void store_if(bool yes, E* to, float x) {
    E rounded;
    round_to(rounded, x);
    store_if(yes, &to->bits, rounded.bits);
}

// Relaxed accesses to memory shared with the host.
__device__ inline int load_from_host(const int* from) {
    int x;
    asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
    return x;
}

__device__ inline void store_to_host(int* to, int x) {
    asm volatile("st.relaxed.sys.global.b32 [%0], %1;" :: "l"(__cvta_generic_to_global(to)), "r"(x) : "memory");
}

// Across a warp: whether any thread says yes; a barrier, after which each sees the others' stores; a neighbour's value.
__device__ inline bool any_of_warp(bool yes) { return __any_sync(0xFFFFFFFF, yes); }
__device__ inline void barrier_of_warp() { __syncwarp(); }
__device__ inline float of_neighbour(float x) { return __shfl_xor_sync(0xFFFFFFFF, x, 1); }

// d = a b + d on a tensor core, by a warp: 16 rows of a, 8 columns of b; a word of them is two two-byte elements, or a
// float, 10 bits of whose fraction are used. PTX ISA, "Matrix Fragments for mma.m16n8k16" and, for float, "m16n8k8".
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
