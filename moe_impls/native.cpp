// Products of rows with the weights of their experts, each active expert's weights read from memory once.
//
// out[n][f] = sum_d rows[index[n]][d] * weight[e][f][d] + bias[e][f]   for begin[e] <= n < begin[e + 1]
//
// Sums are float32; weights float32, bfloat16 or float16; rows float32, or bfloat16 beside weights of that dtype
// where the processor has an instruction that multiplies pairs of those (it takes subnormal numbers as zeros).
// Both operands lie along d, so a tile of rows times features is a set of dot products, in vectors as wide as the
// processor's. Written with the vector extensions of GCC and Clang; compiled for the machine that it runs on.
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int WIDTH = 16, ROWS = 6;  // 6 rows x 4 features of sums in 32 registers
#else
constexpr int WIDTH = 8, ROWS = 2;
#endif
constexpr int64_t BLOCK = 16;  // features of one expert that a thread takes at a time
constexpr int BLOCKS = 4;      // of those, one after the other

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef _Float16 Float16s __attribute__((vector_size(2 * WIDTH), aligned(2)));
struct BFloat16 { uint16_t bits; };

static float value(float v) { return v; }
static float value(_Float16 v) { return (float)v; }
static float value(BFloat16 v) {
    uint32_t word = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

static Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static Floats load(const BFloat16* p) {
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
static Floats load(const _Float16* p) {
    return __builtin_convertvector(*reinterpret_cast<const Float16s*>(p), Floats);
}

// How rows are multiplied with weights of a type: STEP numbers of each at a time, rows of type Row.
template <class W>
struct Multiply {
    using Row = float;
    using Vector = Floats;
    static constexpr int STEP = WIDTH;
    static Vector row(const Row* p) { return load(p); }
    static Vector weight(const W* p) { return load(p); }
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
    static Floats add(Floats sum, Vector x, Vector w) { return _mm512_dpbf16_ps(sum, x, w); }
};
#endif

static float total(Floats v) {
    float parts[WIDTH];
    std::memcpy(parts, &v, sizeof parts);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

// The dot products of R rows with N features. The first rows of an expert find its weights in memory, not in a
// cache: to go AHEAD, they fetch the features after these meanwhile.
template <int R, int N, bool AHEAD, class W>
static void tile(const typename Multiply<W>::Row* const* rows, const W* weight, const W* bias, int64_t D,
                 float* const* out) {
    using M = Multiply<W>;
    Floats sums[R][N] = {};
    int64_t d = 0;
    for (; d + M::STEP <= D; d += M::STEP) {
        typename M::Vector w[N];
        for (int n = 0; n < N; n++) {
            w[n] = M::weight(weight + n * D + d);
            if (AHEAD) __builtin_prefetch(weight + (n + N) * D + d, 0, 2);
        }
        for (int r = 0; r < R; r++) {
            const typename M::Vector x = M::row(rows[r] + d);
            for (int n = 0; n < N; n++) sums[r][n] = M::add(sums[r][n], x, w[n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float sum = total(sums[r][n]);
            for (int64_t i = d; i < D; i++) sum += value(rows[r][i]) * value(weight[n * D + i]);
            out[r][n] = bias ? sum + value(bias[n]) : sum;
        }
}

template <int R, bool AHEAD, class W>
static void features(const typename Multiply<W>::Row* const* rows, const W* weight, const W* bias, int64_t D,
                     int64_t count, float** out) {
    constexpr int N = R <= 2 ? 8 : 4;  // with few rows more features at once, to keep the adders busy
    int64_t f = 0;
    auto advance = [&](int64_t by) {
        f += by;
        for (int r = 0; r < R; r++) out[r] += by;
    };
    for (; f + N <= count; advance(N))
        tile<R, N, AHEAD>(rows, weight + f * D, bias ? bias + f : bias, D, out);
    for (; f < count; advance(1)) tile<R, 1, AHEAD>(rows, weight + f * D, bias ? bias + f : bias, D, out);
}

#define ROWS_OF(R) \
    ahead ? features<R, true>(in, w, b, D, count, to) : features<R, false>(in, w, b, D, count, to)

template <class W>
static void products(const typename Multiply<W>::Row* rows, const int64_t* index, const int64_t* begin, const W* weight,
                     const W* bias, float* out, int64_t E, int64_t F, int64_t D, int threads) {
    const int64_t blocks = (F + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, BLOCKS) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < E * blocks; item++) {
        const int64_t e = item / blocks, f = item % blocks * BLOCK;
        const int64_t count = F - f < BLOCK ? F - f : BLOCK;
        const W* w = weight + (e * F + f) * D;
        const W* b = bias ? bias + e * F + f : nullptr;
        for (int64_t n = begin[e]; n < begin[e + 1]; n += ROWS) {
            const int64_t left = begin[e + 1] - n;
            const typename Multiply<W>::Row* in[ROWS];
            float* to[ROWS];
            for (int r = 0; r < ROWS && r < left; r++) {
                in[r] = rows + (index ? index[n + r] : n + r) * D;
                to[r] = out + (n + r) * F + f;
            }
            const bool ahead = n == begin[e];
            switch (left < ROWS ? left : ROWS) {
                case 1: ROWS_OF(1); break;
#ifdef __AVX512F__
                case 2: ROWS_OF(2); break;
                case 3: ROWS_OF(3); break;
                case 4: ROWS_OF(4); break;
                case 5: ROWS_OF(5); break;
#endif
                default: ROWS_OF(ROWS);
            }
        }
    }
}

#define EXPORT(NAME, W)                                                                                        \
    extern "C" void NAME(const void* rows, const int64_t* index, const int64_t* begin, const W* weight,        \
                         const W* bias, float* out, int64_t E, int64_t F, int64_t D, int threads) {            \
        products((const Multiply<W>::Row*)rows, index, begin, weight, bias, out, E, F, D, threads);             \
    }
EXPORT(products_float32, float)
EXPORT(products_bfloat16, BFloat16)
EXPORT(products_float16, _Float16)

// Bytes of a number in the rows that products_bfloat16 takes: bfloat16 or float.
extern "C" int bfloat16_row_bytes() { return sizeof(Multiply<BFloat16>::Row); }
