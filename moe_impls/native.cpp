// Products of rows with the weights of their experts, each active expert's weights read from memory once.
//
// out[n][f] = sum_d rows[index[n]][d] * weight[e][f][d] + bias[e][f]   for begin[e] <= n < begin[e + 1]
//
// Rows and sums are float32, weights float32, bfloat16 or float16. Both operands lie along d, so a tile of rows
// times features is a set of dot products, in vectors as wide as the processor's. Written with the vector
// extensions of GCC and Clang; compiled for the machine that it runs on.
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int WIDTH = 16, ROWS = 6;  // 6 rows x 4 features of sums in 32 registers
#else
constexpr int WIDTH = 8, ROWS = 2;
#endif
constexpr int64_t BLOCK = 16;  // features that a thread takes at a time

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef _Float16 Float16s __attribute__((vector_size(2 * WIDTH), aligned(2)));
struct BFloat16 { uint16_t bits; };

static Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static Floats load(const BFloat16* p) {
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
static Floats load(const _Float16* p) {
    return __builtin_convertvector(*reinterpret_cast<const Float16s*>(p), Floats);
}
static float value(float v) { return v; }
static float value(_Float16 v) { return (float)v; }
static float value(BFloat16 v) {
    uint32_t word = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

// The dot products of R rows with N features.
template <int R, int N, class W>
static void tile(const float* const* rows, const W* weight, const W* bias, int64_t D, float* const* out) {
    Floats sums[R][N] = {};
    int64_t d = 0;
    for (; d + WIDTH <= D; d += WIDTH) {
        Floats w[N];
        for (int n = 0; n < N; n++) w[n] = load(weight + n * D + d);
        for (int r = 0; r < R; r++) {
            const Floats x = load(rows[r] + d);
            for (int n = 0; n < N; n++) sums[r][n] += x * w[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int i = 0; i < WIDTH; i++) sum += sums[r][n][i];
            for (int64_t i = d; i < D; i++) sum += rows[r][i] * value(weight[n * D + i]);
            out[r][n] = bias ? sum + value(bias[n]) : sum;
        }
}

template <int R, class W>
static void features(const float* const* rows, const W* weight, const W* bias, int64_t D, int64_t count,
                     float** out) {
    constexpr int N = R <= 2 ? 8 : 4;  // with few rows more features at once, to keep the adders busy
    int64_t f = 0;
    auto advance = [&](int64_t by) {
        f += by;
        for (int r = 0; r < R; r++) out[r] += by;
    };
    for (; f + N <= count; advance(N)) tile<R, N>(rows, weight + f * D, bias ? bias + f : bias, D, out);
    for (; f < count; advance(1)) tile<R, 1>(rows, weight + f * D, bias ? bias + f : bias, D, out);
}

template <class W>
static void products(const float* rows, const int64_t* index, const int64_t* begin, const W* weight,
                     const W* bias, float* out, int64_t E, int64_t F, int64_t D, int threads) {
    const int64_t blocks = (F + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < E * blocks; item++) {
        const int64_t e = item / blocks, f = item % blocks * BLOCK;
        const int64_t count = F - f < BLOCK ? F - f : BLOCK;
        const W* w = weight + (e * F + f) * D;
        const W* b = bias ? bias + e * F + f : nullptr;
        for (int64_t n = begin[e]; n < begin[e + 1]; n += ROWS) {
            const int64_t left = begin[e + 1] - n;
            const float* in[ROWS];
            float* to[ROWS];
            for (int r = 0; r < ROWS && r < left; r++) {
                in[r] = rows + (index ? index[n + r] : n + r) * D;
                to[r] = out + (n + r) * F + f;
            }
            switch (left < ROWS ? left : ROWS) {
                case 1: features<1>(in, w, b, D, count, to); break;
#ifdef __AVX512F__
                case 2: features<2>(in, w, b, D, count, to); break;
                case 3: features<3>(in, w, b, D, count, to); break;
                case 4: features<4>(in, w, b, D, count, to); break;
                case 5: features<5>(in, w, b, D, count, to); break;
#endif
                default: features<ROWS>(in, w, b, D, count, to);
            }
        }
    }
}

#define EXPORT(NAME, W)                                                                                        \
    extern "C" void NAME(const float* rows, const int64_t* index, const int64_t* begin, const W* weight,       \
                         const W* bias, float* out, int64_t E, int64_t F, int64_t D, int threads) {            \
        products(rows, index, begin, weight, bias, out, E, F, D, threads);                                     \
    }
EXPORT(products_float32, float)
EXPORT(products_bfloat16, BFloat16)
EXPORT(products_float16, _Float16)
