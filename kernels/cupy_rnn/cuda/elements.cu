// Loads and stores of elements of tensors. Stores round to nearest, ties to even. The two-byte types are defined here,
// since not every CuPy ships CUDA's headers.

struct bfloat16 {
    unsigned short bits;
};

__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(float x) { return x; }

__device__ inline void round_to(bfloat16& y, float x) {  // before sm_80 there is no instruction
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
__device__ inline void round_to(float& y, float x) { y = x; }

// Load an element, as float. The result is 0 if `from` is null or `yes` is false.
template <typename E>
__device__ float load(const E* from, long long at, bool yes = true) {
    return from && yes ? to_float(element(from, at)) : 0.0f;
}

// Store an element, rounded to the tensor's dtype. Nothing is stored if `to` is null or `yes` is false.
template <typename E>
__device__ void store(E* to, long long at, float x, bool yes = true) {
    if (to && yes) round_to(element(to, at), x);
}
