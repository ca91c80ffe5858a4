// Products of rows with the weights of their experts, each active expert's weights read from memory once.
//
// out[n][f] = sum_d rows[index[n]][d] * weight[e][f][d] + bias[e][f]   for begin[e] <= n < begin[e + 1]
//
// Sums are float32; weights float32, bfloat16 or float16; rows float32, or bfloat16 beside weights of that dtype
// where the processor has an instruction that multiplies pairs of those (it takes subnormal numbers as zeros).
// Both operands lie along d, so a tile of rows times features is a set of dot products, in vectors as wide as the
// processor's. Written with the vector extensions of GCC and Clang; compiled for the machine that it runs on.
#include <algorithm>
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
constexpr int BLOCKS = 8;      // at most, of those one after the other

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float Quad __attribute__((vector_size(16)));
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
    Quad parts[WIDTH / 4];
    std::memcpy(parts, &v, sizeof parts);
    for (int half = WIDTH / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

template <class W>
static int64_t padded(int64_t D) {
    constexpr int STEP = Multiply<W>::STEP;
    return (D + STEP - 1) / STEP * STEP;
}

// R rows, STEP numbers of each in turn and zeros after the last: read one after the other, and not at distances
// of D, at which the lines of all rows would share one set of a cache.
template <class W>
static void pack(const typename Multiply<W>::Row* rows, const int64_t* index, int64_t n, int64_t R, int64_t D,
                 typename Multiply<W>::Row* to) {
    constexpr int64_t STEP = Multiply<W>::STEP;
    for (int64_t r = 0; r < R; r++) {
        const auto* from = rows + (index ? index[n + r] : n + r) * D;
        auto* step = to + r * STEP;
        int64_t d = 0;
        for (; d + STEP <= D; d += STEP, step += R * STEP) std::memcpy(step, from + d, STEP * sizeof *to);
        if (d < D) {
            std::memset(static_cast<void*>(step), 0, STEP * sizeof *to);
            std::memcpy(step, from + d, (D - d) * sizeof *to);
        }
    }
}

// The rows of an expert go over its weights in passes of about the same number of rows, at most ROWS.
struct Passes {
    int64_t size, count;
    explicit Passes(int64_t size) : size(size), count((size + ROWS - 1) / ROWS) {}
    int64_t first(int64_t pass) const { return size * pass / count; }
    int64_t rows(int64_t pass) const { return first(pass + 1) - first(pass); }
};

// What is fetched into a cache meanwhile: of every N features one in PARTS, from the first-th of them on, at a
// distance of `ahead` numbers.
struct Fetch {
    int64_t ahead;
    int first;
};

// The dot products of R packed rows with N features.
template <int R, int N, int PARTS, class W>
static void tile(const typename Multiply<W>::Row* rows, const W* weight, const W* bias, int64_t D, Fetch fetch,
                 float* out, int64_t F) {
    using M = Multiply<W>;
    Floats sums[R][N] = {};
    typename M::Vector w[N];
    auto add = [&] {
        for (int r = 0; r < R; r++, rows += M::STEP) {
            const typename M::Vector x = M::row(rows);
            for (int n = 0; n < N; n++) sums[r][n] = M::add(sums[r][n], x, w[n]);
        }
    };
    const W* fetched = weight + fetch.ahead + fetch.first * D;
    int64_t d = 0;
    for (; d + M::STEP <= D; d += M::STEP) {
        for (int n = 0; n < N; n++) w[n] = M::weight(weight + n * D + d);
        if constexpr (PARTS > 0)
            for (int n = 0; n < std::max(N / PARTS, 1); n++) __builtin_prefetch(fetched + n * D + d, 0, 2);
        add();
    }
    if (d < D) {
        W last[N][M::STEP] = {};
        for (int n = 0; n < N; n++) {
            std::memcpy(last[n], weight + n * D + d, (D - d) * sizeof(W));
            w[n] = M::weight(last[n]);
        }
        add();
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) out[r * F + n] = total(sums[r][n]) + (bias ? value(bias[n]) : 0);
}

template <int R, int PARTS, class W>
static void features(const typename Multiply<W>::Row* rows, const W* weight, const W* bias, int64_t D,
                     int64_t count, int quarter, float* out, int64_t F) {
    constexpr int N = R <= 2 ? 8 : 4;  // with few rows more features at once, to keep the adders busy
    int64_t f = 0;
    // A pass that is the only one fetches the next features, others fetch a part of the next block each.
    const Fetch fetch = PARTS == 1 ? Fetch{N * D, 0} : Fetch{count * D, quarter * N / 4};
    for (; f + N <= count; f += N)
        tile<R, N, PARTS>(rows, weight + f * D, bias ? bias + f : bias, D, fetch, out + f, F);
    for (; f < count; f++) tile<R, 1, 0>(rows, weight + f * D, bias ? bias + f : bias, D, fetch, out + f, F);
}

template <int R, class W>
static void pass_of(int64_t pass, int64_t passes, const typename Multiply<W>::Row* rows, const W* weight,
                    const W* bias, int64_t D, int64_t count, float* out, int64_t F) {
    if (passes == 1)
        features<R, 1>(rows, weight, bias, D, count, 0, out, F);
    else if (passes == 2 || (passes == 3 && pass == 0))
        features<R, 2>(rows, weight, bias, D, count, 2 * pass, out, F);
    else if (const int64_t quarter = passes == 3 ? pass + 1 : pass; quarter < 4)
        features<R, 4>(rows, weight, bias, D, count, quarter, out, F);
    else
        features<R, 0>(rows, weight, bias, D, count, 0, out, F);
}

template <class W>
static void products(const typename Multiply<W>::Row* rows, const int64_t* index, const int64_t* begin, const W* weight,
                     const W* bias, float* out, typename Multiply<W>::Row* packed, int64_t E, int64_t F, int64_t D,
                     int threads) {
    const int64_t blocks = (F + BLOCK - 1) / BLOCK, wide = padded<W>(D);
    const int64_t chunk = std::clamp<int64_t>(E * blocks / (4 * threads), 1, BLOCKS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < E; e++) {
            const Passes passes(begin[e + 1] - begin[e]);
            for (int64_t pass = 0; pass < passes.count; pass++) {
                const int64_t n = begin[e] + passes.first(pass);
                pack<W>(rows, index, n, passes.rows(pass), D, packed + n * wide);
            }
        }
#pragma omp for schedule(dynamic, chunk)
        for (int64_t item = 0; item < E * blocks; item++) {
            const int64_t e = item / blocks, f = item % blocks * BLOCK, count = std::min(BLOCK, F - f);
            const W* w = weight + (e * F + f) * D;
            const W* b = bias ? bias + e * F + f : nullptr;
            const Passes passes(begin[e + 1] - begin[e]);
            for (int64_t pass = 0; pass < passes.count; pass++) {
                const int64_t n = begin[e] + passes.first(pass);
                const auto* in = packed + n * wide;
                float* to = out + n * F + f;
                switch (passes.rows(pass)) {
                    case 1: pass_of<1>(pass, passes.count, in, w, b, D, count, to, F); break;
#ifdef __AVX512F__
                    case 2: pass_of<2>(pass, passes.count, in, w, b, D, count, to, F); break;
                    case 3: pass_of<3>(pass, passes.count, in, w, b, D, count, to, F); break;
                    case 4: pass_of<4>(pass, passes.count, in, w, b, D, count, to, F); break;
                    case 5: pass_of<5>(pass, passes.count, in, w, b, D, count, to, F); break;
#endif
                    default: pass_of<ROWS>(pass, passes.count, in, w, b, D, count, to, F);
                }
            }
        }
    }
}

#define EXPORT(NAME, W)                                                                                        \
    extern "C" void NAME(const void* rows, const int64_t* index, const int64_t* begin, const W* weight,        \
                         const W* bias, float* out, void* packed, int64_t E, int64_t F, int64_t D, int threads) { \
        using Row = Multiply<W>::Row;                                                                          \
        products((const Row*)rows, index, begin, weight, bias, out, (Row*)packed, E, F, D, threads);           \
    }
EXPORT(products_float32, float)
EXPORT(products_bfloat16, BFloat16)
EXPORT(products_float16, _Float16)

// Slots by expert, in each by token: where the slots of each expert begin [E + 1], the token of each place [N],
// and the place of each slot [N], one after the other. False if an id is not in [0, E).
extern "C" bool sort_slots(const int64_t* ids, int64_t N, int64_t E, int64_t K, int64_t* sorted) {
    int64_t *begin = sorted, *token = begin + E + 1, *place = token + N;
    std::fill(begin, begin + E + 1, 0);
    for (int64_t n = 0; n < N; n++) {
        if (ids[n] < 0 || ids[n] >= E) return false;
        begin[ids[n] + 1]++;
    }
    for (int64_t e = 0; e < E; e++) begin[e + 1] += begin[e];
    for (int64_t n = 0; n < N; n++) {
        place[n] = begin[ids[n]]++;
        token[place[n]] = n / K;
    }
    std::move_backward(begin, begin + E, begin + E + 1);
    begin[0] = 0;
    return true;
}

// y[t] = sum_k gates[t][k] * out[place[t][k]], of out or of its positive part.
extern "C" void combine_sum(const float* out, const int64_t* place, const float* gates, float* y, int64_t T, int64_t K,
                            int64_t O, bool positive, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && T * K * O > 65536)
    for (int64_t t = 0; t < T; t++) {
        float* to = y + t * O;
        for (int64_t k = t * K; k < (t + 1) * K; k++) {
            const float *from = out + place[k] * O, gate = gates[k];
            for (int64_t o = 0; o < O; o++) {
                const float v = positive && from[o] < 0 ? 0 : from[o];
                to[o] = k == t * K ? gate * v : to[o] + gate * v;
            }
        }
    }
}

// Bytes of a number in the rows that products_bfloat16 takes: bfloat16 or float.
extern "C" int bfloat16_row_bytes() { return sizeof(Multiply<BFloat16>::Row); }
// Rows are packed as a multiple of this many numbers.
extern "C" int widest_step() { return 2 * WIDTH; }
