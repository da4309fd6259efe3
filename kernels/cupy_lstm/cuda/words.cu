// Words of 32 bits: one float, or two neighbouring elements of two bytes.

template <typename E>
constexpr int PER_WORD = 4 / sizeof(E);

template <typename E>
__device__ float unpack(unsigned word, int n) {
    if constexpr (sizeof(E) == 4) return __uint_as_float(word);
    else return to_float(E{static_cast<unsigned short>(word >> 16 * n)});
}

// A float, rounded to the nearest TF32, ties away from zero: tensor cores would cut off the rest.
__device__ inline unsigned to_tf32(unsigned word) {
    return (word & 0x7F800000) == 0x7F800000 ? word : (word + 0x1000) & 0xFFFFE000;  // except infinity and NaN
}

// sum += the products of a quad's elements, in their order.
template <typename E>
__device__ void add_products(float& sum, const uint4& a, const uint4& b) {
    const unsigned a_words[4] = {a.x, a.y, a.z, a.w}, b_words[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int n = 0; n < PER_WORD<E>; ++n) sum += unpack<E>(a_words[word], n) * unpack<E>(b_words[word], n);
}
