// How vectors of rows and of weights are multiplied.
#pragma once
#include <cstdint>
#include <cstring>

#include "vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int64_t SUMMED = 512;  // numbers one after the other in a sum: it rounds the more, the longer it is

// How rows are multiplied with weights of a type: STEP numbers of each at a time, rows of type Row.
template <class W>
struct Multiply {
    using Row = float;
    using Vector = Floats;
    static constexpr int STEP = WIDTH;
    static Vector row(const Row* p) { return load(p); }
    static Vector weight(const W* p) { return load(p); }
    static Vector all(const Row* p) { return ::all(*p); }  // of the row, beside the weights of WIDTH features
    static Floats add(Floats sum, Vector x, Vector w) { return sum + x * w; }
};

#ifdef __AVX512BF16__  // products of pairs, summed in float32: no conversion, twice the numbers
template <>
struct Multiply<BFloat16> {
    using Row = BFloat16;
    using Vector = __m512bh;
    static constexpr int STEP = 2 * WIDTH;
    static Vector row(const Row* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vector weight(const BFloat16* p) { return row(p); }
    static Vector all(const Row* p) {
        int32_t pair;
        std::memcpy(&pair, p, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Floats add(Floats sum, Vector x, Vector w) { return _mm512_dpbf16_ps(sum, x, w); }
};
#endif
