// Products of rows with the weights of their experts. Of few rows, each active expert's weights are read from memory
// once; of many, once for each part of the rows that stays in a cache.
//
// out[n][f] = sum_d rows[index[n]][d] * weight[e][f][d] + bias[e][f]   for begin[e] <= n + begin[0] < begin[e + 1]
//
// Sums are float32; weights float32, bfloat16 or float16; rows float32, or bfloat16 beside weights of that dtype
// where the processor has an instruction that multiplies pairs of those (it takes subnormal numbers as zeros).
// A few rows are multiplied along d: a tile of rows times features is a set of dot products. Where an expert has more,
// they lie side by side in panels, and a vector of them is multiplied with one weight. Vectors are as wide as the
// processor's. Written with the vector extensions of GCC and Clang; compiled for the machine that it runs on.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "gradients.h"
#include "multiply.h"
#include "threads.h"
#include "tiles.h"
#include "vectors.h"

#ifdef __AVX512F__
constexpr int ROWS = 6;  // 6 rows x 4 features of sums in 32 registers
constexpr int FEATURES[] = {0, 8, 8, 8};
#else
constexpr int ROWS = 2;
constexpr int FEATURES[] = {0, 8, 6, 4};
#endif
// Of a tile of a panel, by the vectors of that: a dozen sums keep the adders busy where the processor has registers
// for them, but lines of more than eight features, at distances of D, may share one set of a cache and drive each other
// out of it.
constexpr int VECTORS = 3;           // of rows in a panel, at most
constexpr int64_t BLOCK = 24;        // features of one expert that a thread takes at a time: whole tiles of each kind
constexpr int BLOCKS = 4;            // at most, of those one after the other
constexpr int64_t PANELS = 1 << 17;  // numbers, about, in the panels that stay in a cache for all features
constexpr int64_t SMALL = 1 << 15;   // numbers to pack that no other thread is woken for
constexpr int64_t COLUMNS = 64;      // of y that a thread takes at a time, at least
constexpr int64_t LONG = 1024;       // numbers of a feature from which on the processor fetches what comes next itself

static int64_t padded(int64_t D, int64_t step) { return (D + step - 1) / step * step; }

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

// Rows go over weights in passes of about the same number of rows, at most ROWS.
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

// Rows become columns.
static void transpose(Floats* v) {
#ifdef __clang__  // has no shuffle that takes its places as a vector
    float from[WIDTH][WIDTH];
    std::memcpy(from, v, sizeof from);
    for (int i = 0; i < WIDTH; i++)
        for (int l = 0; l < WIDTH; l++) v[i][l] = from[l][i];
#else
    for (int s = 1; s < WIDTH; s *= 2) {  // of each square of 2 s the two squares of s that are off the diagonal
        Places upper, lower;
        for (int l = 0; l < WIDTH; l++) {
            upper[l] = l & s ? WIDTH + (l ^ s) : l;
            lower[l] = l & s ? WIDTH + l : l | s;
        }
        for (int i = 0; i < WIDTH; i++)
            if (!(i & s)) {
                const Floats a = v[i], b = v[i | s];
                v[i] = __builtin_shuffle(a, b, upper);
                v[i | s] = __builtin_shuffle(a, b, lower);
            }
    }
#endif
}

// The rows [n, end) side by side, all of one d before those of the next, and zeros up to V whole vectors.
static void pack_panel(const float* rows, const int64_t* index, int64_t n, int64_t end, int64_t V, int64_t D,
                       float* to) {
    for (int64_t v = 0; v < V; v++, n += WIDTH, to += WIDTH) {
        const float* from[WIDTH];
        const int64_t some = std::min<int64_t>(end - n, WIDTH);
        for (int64_t r = 0; r < some; r++) from[r] = rows + (index ? index[n + r] : n + r) * D;
        for (int64_t d = 0; d < D; d += WIDTH) {
            const int64_t numbers = std::min<int64_t>(D - d, WIDTH);
            Floats square[WIDTH] = {};
            if (numbers == WIDTH)
                for (int64_t r = 0; r < some; r++) square[r] = load(from[r] + d);
            else
                for (int64_t r = 0; r < some; r++) std::memcpy(square + r, from[r] + d, numbers * sizeof(float));
            transpose(square);
            for (int64_t i = 0; i < numbers; i++) std::memcpy(to + (d + i) * V * WIDTH, square + i, sizeof(Floats));
        }
    }
}

// The products of a panel of V vectors of rows with N features, of which the first `rows` rows are kept. Meanwhile
// `lines` cache lines are fetched for every WIDTH numbers.
template <int V, int N>
__attribute__((noinline)) static void panel_tile(const float* panel, const float* weight, const float* bias, int64_t D,
                                                 const char* fetched, int64_t lines, int64_t rows, float* out,
                                                 int64_t F) {
    Floats totals[N][V] = {}, sums[N][V];
    auto add = [&](int64_t d) {
        Floats x[V];
        for (int v = 0; v < V; v++) x[v] = load(panel + (d * V + v) * WIDTH);
        for (int n = 0; n < N; n++) {
            const float w = weight[n * D + d];
            for (int v = 0; v < V; v++) sums[n][v] += x[v] * w;
        }
    };
    for (int64_t d = 0; d < D;) {
        std::memset(sums, 0, sizeof sums);
        const int64_t end = std::min(d + SUMMED, D);
        for (; d + WIDTH <= end; d += WIDTH) {
            for (int64_t line = 0; line < lines; line++, fetched += 64) __builtin_prefetch(fetched, 0, 2);
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; i++) add(d + i);
        }
        for (; d < end; d++) add(d);
        for (int n = 0; n < N; n++)
            for (int v = 0; v < V; v++) totals[n][v] += sums[n][v];
    }
    for (int v = 0; v < V; v++)
        for (int r = 0; r < WIDTH && v * WIDTH + r < rows; r++)
            for (int n = 0; n < N; n++) out[(v * WIDTH + r) * F + n] = totals[n][v][r] + bias[n];
}

// The products of one of so many panels with `count` features. Each panel fetches its share of the block that is
// next, of numbers of so many bytes.
template <int V>
static void panel_of(int64_t number, int64_t panels, const float* panel, const float* weight, const char* next,
                     int64_t bytes, const float* bias, int64_t D, int64_t count, int64_t rows, float* out, int64_t F) {
    constexpr int N = FEATURES[V];
    const int64_t all = N * WIDTH * bytes / 64;  // cache lines of a tile, for WIDTH numbers of its features
    const int64_t first = all * number / panels, lines = D < LONG ? all * (number + 1) / panels - first : 0;
    int64_t f = 0;
    for (; f + N <= count; f += N)
        panel_tile<V, N>(panel, weight + f * D, bias + f, D, next + f * D * bytes + first * (D / WIDTH) * 64,
                                lines, rows, out + f, F);
    for (; f < count; f++)
        panel_tile<V, 1>(panel, weight + f * D, bias + f, D, nullptr, 0, rows, out + f, F);
}

static const float* floats(const float* weight, int64_t, std::vector<float>&) { return weight; }
template <class W>
static const float* floats(const W* weight, int64_t count, std::vector<float>& to) {
    to.resize(count);
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        const Floats v = load(weight + i);
        std::memcpy(to.data() + i, &v, sizeof v);
    }
    for (; i < count; i++) to[i] = value(weight[i]);
    return to.data();
}

// How the rows [first, end) of expert e are multiplied: from LEAST of them on, as many as fill more than half of a
// vector in panels of float32, the rest in passes.
template <class W>
struct Rows {
    static constexpr bool IN_PANELS = std::is_same_v<typename Multiply<W>::Row, float>;
    static constexpr int64_t FEW = WIDTH / 2, LEAST = sizeof(W) == 4 ? FEW + 1 : 2 * WIDTH - 4;  // others are converted
    int64_t first, end, vectors, panels;
    int64_t place;  // of the first, packed, behind those of the experts before and what fills their vectors
    Passes rest;
    Rows(int64_t e, int64_t first, int64_t end)
        : first(first),
          end(end),
          vectors(IN_PANELS && end - first >= LEAST ? (end - first + WIDTH - 1 - FEW) / WIDTH : 0),
          panels((vectors + VECTORS - 1) / VECTORS),
          place(first + (IN_PANELS ? (FEW - 1) * std::min(e, first / LEAST) : 0)),
          rest(std::max<int64_t>(end - first - vectors * WIDTH, 0)) {}
    int64_t vectors_of(int64_t panel) const { return std::min<int64_t>(vectors - panel * VECTORS, VECTORS); }
};

// Panels of an expert, about PANELS numbers, and beside the last of them the rest of its rows.
template <class W>
struct Part {
    Rows<W> of;
    int64_t e, first, end;
};

template <class W>
static void products(const typename Multiply<W>::Row* rows, const int64_t* index, const int64_t* begin, const W* weight,
                     const W* bias, float* out, typename Multiply<W>::Row* packed, int64_t E, int64_t F, int64_t D,
                     int threads) {
    const int64_t blocks = (F + BLOCK - 1) / BLOCK, wide = padded(D, Multiply<W>::STEP);
    std::vector<Part<W>> parts;
    parts.reserve(E);
    for (int64_t e = 0; e < E; e++) {
        const Rows<W> of(e, begin[e] - begin[0], begin[e + 1] - begin[0]);
        const int64_t wanted = of.panels * VECTORS * WIDTH * D / PANELS, least = of.end > of.first;
        const int64_t count = std::clamp(wanted, least, std::max(of.panels, least));
        for (int64_t part = 0; part < count; part++)
            parts.push_back({of, e, of.panels * part / count, of.panels * (part + 1) / count});
    }
    const int64_t items = int64_t(parts.size()) * blocks, chunk = std::clamp<int64_t>(items / (4 * threads), 1, BLOCKS);
    share(int64_t(parts.size()), 1, wide * (begin[E] - begin[0]) < SMALL ? 1 : threads, [&](int64_t i, int64_t end) {
        for (; i < end; i++) {
            const Part<W>& part = parts[i];
            const Rows<W>& of = part.of;
            if constexpr (Rows<W>::IN_PANELS)
                for (int64_t panel = part.first; panel < part.end; panel++) {
                    const int64_t r = panel * VECTORS * WIDTH;
                    pack_panel(rows, index, of.first + r, of.end, of.vectors_of(panel), D, packed + (of.place + r) * wide);
                }
            for (int64_t pass = 0; pass < of.rest.count && part.end == of.panels; pass++) {
                const int64_t r = of.vectors * WIDTH + of.rest.first(pass);
                pack<W>(rows, index, of.first + r, of.rest.rows(pass), D, packed + (of.place + r) * wide);
            }
        }
    });
    share(items, chunk, threads, [&](int64_t item, int64_t last) {
        static thread_local std::vector<float> converted;
        for (; item < last; item++) {
            const Part<W>& part = parts[item / blocks];
            const Rows<W>& of = part.of;
            const int64_t f = item % blocks * BLOCK, count = std::min(BLOCK, F - f), panels = part.end - part.first;
            const W* w = weight + (part.e * F + f) * D;
            const W* b = bias ? bias + part.e * F + f : nullptr;
            if constexpr (Rows<W>::IN_PANELS)
                if (panels > 0) {
                    const float* v = floats(w, count * D, converted);
                    float biases[BLOCK] = {};
                    for (int64_t i = 0; b && i < count; i++) biases[i] = value(b[i]);
                    for (int64_t panel = 0; panel < panels; panel++) {
                        const int64_t r = (part.first + panel) * VECTORS * WIDTH, n = of.first + r;
                        const auto* in = packed + (of.place + r) * wide;
                        float* to = out + n * F + f;
                        const char* next = (const char*)(w + BLOCK * D);
                        const int64_t left = of.end - n, bytes = sizeof(W);
                        switch (of.vectors_of(part.first + panel)) {
                            case 1: panel_of<1>(panel, panels, in, v, next, bytes, biases, D, count, left, to, F); break;
                            case 2: panel_of<2>(panel, panels, in, v, next, bytes, biases, D, count, left, to, F); break;
                            default: panel_of<3>(panel, panels, in, v, next, bytes, biases, D, count, left, to, F);
                        }
                    }
                    if (part.end < of.panels) continue;
                }
            // Beside panels the rest fetches nothing, as where many passes went before it.
            const int64_t before = panels > 0 ? 4 : 0, passes = before + of.rest.count;
            for (int64_t pass = 0; pass < of.rest.count; pass++) {
                const int64_t r = of.vectors * WIDTH + of.rest.first(pass);
                const auto* in = packed + (of.place + r) * wide;
                float* to = out + (of.first + r) * F + f;
                switch (of.rest.rows(pass)) {
                    case 1: pass_of<1>(before + pass, passes, in, w, b, D, count, to, F); break;
#ifdef __AVX512F__
                    case 2: pass_of<2>(before + pass, passes, in, w, b, D, count, to, F); break;
                    case 3: pass_of<3>(before + pass, passes, in, w, b, D, count, to, F); break;
                    case 4: pass_of<4>(before + pass, passes, in, w, b, D, count, to, F); break;
                    case 5: pass_of<5>(before + pass, passes, in, w, b, D, count, to, F); break;
#endif
                    default: pass_of<ROWS>(before + pass, passes, in, w, b, D, count, to, F);
                }
            }
        }
    });
}

#define EXPORT(NAME, W)                                                                                        \
    extern "C" void NAME(const void* rows, const int64_t* index, const int64_t* begin, const W* weight,        \
                         const W* bias, float* out, void* packed, int64_t E, int64_t F, int64_t D, int threads) { \
        using Row = Multiply<W>::Row;                                                                          \
        products((const Row*)rows, index, begin, weight, bias, out, (Row*)packed, E, F, D, threads);           \
    }
#define EXPORT_TILED(NAME, W)                                                                                      \
    extern "C" void NAME(const void* rows, const int64_t* index, const int64_t* begin, const W* tiles, const W* bias, \
                         float* out, int64_t E, int64_t F, int64_t D, int threads) {                              \
        tiled_products(static_cast<const Multiply<W>::Row*>(rows), index, begin, tiles, bias, out, E, F, D, threads); \
    }
#define EXPORT_GRADIENTS(NAME, W)                                                                                    \
    extern "C" void products_along_##NAME(const float* rows, const int64_t* index, const int64_t* begin,              \
                                          const W* weight, const W* bias, float* out, int64_t E, int64_t F,           \
                                          int64_t D, int threads) {                                                   \
        products_along(rows, index, begin, weight, bias, out, E, F, D, threads);                                      \
    }                                                                                                                 \
    extern "C" void products_of_rows_##NAME(const float* a, const int64_t* a_index, const float* b,                   \
                                            const int64_t* b_index, const int64_t* begin, W* to, float* packed,       \
                                            int64_t E, int64_t P, int64_t Q, int threads) {                           \
        products_of_rows(a, a_index, b, b_index, begin, to, packed, E, P, Q, threads);                                \
    }
EXPORT_GRADIENTS(float32, float)
EXPORT_GRADIENTS(bfloat16, BFloat16)
EXPORT_GRADIENTS(float16, Float16)
// Numbers that products_of_rows packs of each row of P and the one of Q numbers beside it.
extern "C" int64_t packed_numbers_of_rows(int64_t P, int64_t Q) { return packed_row(P) + packed_columns(Q); }
EXPORT(products_float32, float)
EXPORT(products_bfloat16, BFloat16)
EXPORT(products_float16, Float16)
EXPORT_TILED(tiled_products_float32, float)
EXPORT_TILED(tiled_products_bfloat16, BFloat16)
EXPORT_TILED(tiled_products_float16, Float16)
// Features of a tile.
extern "C" int64_t tile_features() { return TILE; }

// Slots by expert, in each by token: where the slots of each expert begin [E + 1], the slot of each place [N], and its
// token [N], one after the other. False if an id is not in [0, E).
extern "C" bool sort_slots(const int64_t* ids, int64_t N, int64_t E, int64_t K, int64_t* sorted) {
    int64_t *begin = sorted, *slot = begin + E + 1, *token = slot + N;
    std::fill(begin, begin + E + 1, 0);
    for (int64_t n = 0; n < N; n++) {
        if (ids[n] < 0 || ids[n] >= E) return false;
        begin[ids[n] + 1]++;
    }
    for (int64_t e = 0; e < E; e++) begin[e + 1] += begin[e];
    for (int64_t n = 0; n < N; n++) {
        const int64_t place = begin[ids[n]]++;
        slot[place] = n;
        token[place] = n / K;
    }
    std::move_backward(begin, begin + E, begin + E + 1);
    begin[0] = 0;
    return true;
}

// y[token[n]] += gates[slot[n]] * out[n], of out or of its positive part; y [T][O] is 0 before that if it is `anew`.
// Threads share the columns of y.
extern "C" void add_slots(const float* out, const int64_t* slot, const int64_t* token, const float* gates, float* y,
                          int64_t N, int64_t T, int64_t O, bool anew, bool positive, int threads) {
    const int64_t columns = std::max<int64_t>(O / (4 * threads) / WIDTH * WIDTH, COLUMNS);
    share(O, columns, N * O > 65536 ? threads : 1, [&](int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        for (int64_t t = 0; anew && t < T; t++) std::fill_n(y + t * O + begin, count, 0.0f);
        for (int64_t n = 0; n < N; n++) {
            const float *__restrict from = out + n * O + begin, gate = gates[slot[n]];
            float* __restrict to = y + token[n] * O + begin;
            if (positive)
                for (int64_t o = 0; o < count; o++) to[o] += gate * (from[o] < 0 ? 0 : from[o]);
            else
                for (int64_t o = 0; o < count; o++) to[o] += gate * from[o];
        }
    });
}

// to[e][f] = sum_n gates[slot[n]] rows[index[n]][f]   over begin[e] <= n + begin[0] < begin[e + 1]; no gates are ones
extern "C" void sum_rows(const float* rows, const int64_t* index, const float* gates, const int64_t* slot,
                         const int64_t* begin, float* to, int64_t E, int64_t F, int threads) {
    const int64_t blocks = (F + COLUMNS - 1) / COLUMNS;
    share(E * blocks, 1, F * (begin[E] - begin[0]) < SMALL ? 1 : threads, [&](int64_t item, int64_t last) {
        for (; item < last; item++) {
            const int64_t e = item / blocks, f = item % blocks * COLUMNS, count = std::min(COLUMNS, F - f);
            float totals[COLUMNS] = {}, sums[COLUMNS] = {};
            for (int64_t n = begin[e] - begin[0], row = 0; n < begin[e + 1] - begin[0]; n++) {
                const float* from = rows + (index ? index[n] : n) * F + f;
                const float gate = gates ? gates[slot[n]] : 1;
                for (int64_t i = 0; i < count; i++) sums[i] += gate * from[i];
                if (++row % SUMMED == 0)
                    for (int64_t i = 0; i < count; i++) totals[i] += sums[i], sums[i] = 0;
            }
            for (int64_t i = 0; i < count; i++) to[e * F + f + i] = totals[i] + sums[i];
        }
    });
}

// to[slot[n]] += sum_f rows[index[n]][f] vectors[e][f]   of begin[e] <= n + begin[0] < begin[e + 1]
extern "C" void add_dots(const float* rows, const int64_t* index, const int64_t* begin, const float* vectors,
                         const int64_t* slot, float* to, int64_t E, int64_t F, int threads) {
    const std::vector<ExpertRows> parts = parts_of(begin, E, BLOCK_ROWS);
    share(int64_t(parts.size()), 1, F * (begin[E] - begin[0]) < SMALL ? 1 : threads, [&](int64_t i, int64_t last) {
        for (; i < last; i++)
            for (int64_t n = parts[i].first; n < parts[i].end; n++) {
                Floats sum = {};
                each_vector(F, [&](int64_t f, int64_t count) {
                    sum += load_some(rows + index[n] * F + f, count) * load_some(vectors + parts[i].e * F + f, count);
                });
                to[slot[n]] += total(sum);
            }
    });
}

// How many numbers the packed rows of N slots of E experts take at most, with what fills vectors.
extern "C" int64_t packed_numbers(int64_t E, int64_t N, int64_t D) {
    return Rows<float>(E, N, N).place * padded(D, 2 * WIDTH);
}
// Bytes of a number in the rows that products_bfloat16 takes: bfloat16 or float.
extern "C" int bfloat16_row_bytes() { return sizeof(Multiply<BFloat16>::Row); }

#include "layer.h"
