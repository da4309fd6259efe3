// Words of 32 bits: one float, or two neighbouring elements of two bytes.

template <typename E>
constexpr int PER_WORD = 4 / sizeof(E);

template <typename E>
__device__ void unpack(float (&x)[PER_WORD<E>], unsigned word) {
#pragma unroll
    for (int n = 0; n < PER_WORD<E>; ++n) {
        const E element = {static_cast<unsigned short>(word >> 16 * n)};
        x[n] = to_float(element);
    }
}

template <>
__device__ inline void unpack<float>(float (&x)[1], unsigned word) {
    x[0] = __uint_as_float(word);
}

// sum += the products of a quad's elements, in their order.
template <typename E>
__device__ void add_products(float& sum, const uint4& a, const uint4& b) {
    const unsigned a_words[4] = {a.x, a.y, a.z, a.w}, b_words[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        float x[PER_WORD<E>], y[PER_WORD<E>];
        unpack<E>(x, a_words[word]);
        unpack<E>(y, b_words[word]);
#pragma unroll
        for (int n = 0; n < PER_WORD<E>; ++n) sum += x[n] * y[n];
    }
}
