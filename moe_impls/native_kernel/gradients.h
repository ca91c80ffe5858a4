// Products of a backward: those of rows with weights along the features of these, and those of rows with rows, which are
// the gradients of weights. In both, numbers of a few rows are multiplied with a panel, vectors of columns side by side.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "multiply.h"
#include "parts.h"
#include "threads.h"
#include "vectors.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int SUM_ROWS = 8, SUM_VECTORS = 3;  // 24 sums in 32 registers
#else
constexpr int SUM_ROWS = 6, SUM_VECTORS = 2;  // 12 in 16
#endif
constexpr int64_t PANEL = SUM_VECTORS * WIDTH;  // columns
// What a thread takes at a time of weights: so many rows of an expert times columns, features after features of a
// DEPTH that stay in a cache for all those rows.
constexpr int64_t BLOCK_ROWS = 96, BLOCK_COLUMNS = 256 / PANEL * PANEL, DEPTH = 128;
constexpr int64_t APART = 16;  // numbers between what would share one set of a cache at a distance of a power of two
constexpr int64_t LINE_STEPS = 8;  // after which a cache line of each row is fetched
// And of a gradient: so many of its rows, times as many columns as these numbers have, packed.
constexpr int64_t GRADIENT_ROWS = 8 * SUM_ROWS, GRADIENT_NUMBERS = 1 << 15;
constexpr int64_t BEYOND_CACHES = 1 << 25;  // bytes of gradients from which on they are written past caches

// What is fetched into a cache meanwhile: rows, one cache line of each at a time.
struct Ahead {
    const char* line;
    int64_t rows, stride;
};

// put(r, v, s) of the vectors s of sum_k a[r * ROW + k * STEP] * panel[k][c].
template <int R, int ROW, int STEP, class Put>
static void multiply_panel(const float* a, const float* panel, int64_t depth, Ahead ahead, const Put& put) {
    Floats sums[R][SUM_VECTORS];
    std::memset(sums, 0, sizeof sums);
    auto add = [&](int64_t k) {
        Floats columns[SUM_VECTORS];
        for (int v = 0; v < SUM_VECTORS; v++) columns[v] = kept(load(panel + k * PANEL + v * WIDTH));
        for (int r = 0; r < R; r++) {
            const Floats one = all(a[r * ROW + k * STEP]);
            for (int v = 0; v < SUM_VECTORS; v++) sums[r][v] += one * columns[v];
        }
    };
    int64_t k = 0;
    for (; k + LINE_STEPS <= depth; k += LINE_STEPS, ahead.line += 64) {
        for (int64_t row = 0; row < ahead.rows; row++) __builtin_prefetch(ahead.line + row * ahead.stride, 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < LINE_STEPS; i++) add(k + i);
    }
    for (; k < depth; k++) add(k);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < SUM_VECTORS; v++) put(r, v, sums[r][v]);
}

template <class Put>
static void multiply_rows(int64_t R, const float* rows, const float* panel, int64_t depth, Ahead ahead, const Put& put) {
    constexpr int ROW = DEPTH + APART;
    switch (R) {
        case 1: multiply_panel<1, ROW, 1>(rows, panel, depth, ahead, put); break;
        case 2: multiply_panel<2, ROW, 1>(rows, panel, depth, ahead, put); break;
        case 3: multiply_panel<3, ROW, 1>(rows, panel, depth, ahead, put); break;
        case 4: multiply_panel<4, ROW, 1>(rows, panel, depth, ahead, put); break;
        case 5: multiply_panel<5, ROW, 1>(rows, panel, depth, ahead, put); break;
        case 6: multiply_panel<6, ROW, 1>(rows, panel, depth, ahead, put); break;
#ifdef __AVX512F__
        case 7: multiply_panel<7, ROW, 1>(rows, panel, depth, ahead, put); break;
        case 8: multiply_panel<8, ROW, 1>(rows, panel, depth, ahead, put); break;
#endif
    }
}

// A row of `count` columns to its place in panels that lie `stride` numbers apart, with zeros up to a whole panel.
template <class W>
static void pack_columns(const W* row, int64_t count, int64_t stride, float* to) {
    int64_t c = 0;
    for (; c + PANEL <= count; c += PANEL, to += stride)
        for (int v = 0; v < SUM_VECTORS; v++) store(to + v * WIDTH, load(row + c + v * WIDTH));
    if (c < count)
        for (int64_t i = 0; i < PANEL; i++) to[i] = c + i < count ? value(row[c + i]) : 0;
}

// out[n][d] = sum_f rows[index[n]][f] * weight[e][f][d] + bias[e][d]   for begin[e] <= n + begin[0] < begin[e + 1]
template <class W>
static void products_along(const float* rows, const int64_t* index, const int64_t* begin, const W* weight, const W* bias,
                           float* out, int64_t E, int64_t F, int64_t D, int threads) {
    constexpr int64_t STRIDE = DEPTH * PANEL + APART;
    const std::vector<ExpertRows> parts = parts_of(begin, E, BLOCK_ROWS);
    const int64_t blocks = (D + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    share(int64_t(parts.size()) * blocks, 1, threads, [&](int64_t item, int64_t last) {
        static thread_local std::vector<float> panels(BLOCK_COLUMNS / PANEL * STRIDE), x(BLOCK_ROWS * (DEPTH + APART)),
            sums(BLOCK_ROWS * BLOCK_COLUMNS);
        for (; item < last; item++) {
            const ExpertRows& part = parts[item / blocks];
            const int64_t d = item % blocks * BLOCK_COLUMNS, count = std::min(BLOCK_COLUMNS, D - d);
            const int64_t size = part.end - part.first, groups = (size + SUM_ROWS - 1) / SUM_ROWS;
            const int64_t tiles = (count + PANEL - 1) / PANEL * groups;
            int64_t starts[BLOCK_ROWS + 1];  // of groups of about the same number of rows
            for (int64_t group = 0; group <= groups; group++) starts[group] = size * group / groups;
            const W *first = weight + part.e * F * D + d, *following = d + BLOCK_COLUMNS < D ? first + BLOCK_COLUMNS : first;
            if (F == 0) std::fill_n(sums.data(), BLOCK_COLUMNS * size, 0.0f);
            for (int64_t f = 0; f < F; f += DEPTH) {
                const int64_t depth = std::min(DEPTH, F - f);
                for (int64_t k = 0; k < depth; k++) pack_columns(first + (f + k) * D, count, STRIDE, panels.data() + k * PANEL);
                for (int64_t r = 0; r < size; r++) {
                    const int64_t n = part.first + r;
                    std::memcpy(x.data() + r * (DEPTH + APART), rows + (index ? index[n] : n) * F + f, depth * sizeof(float));
                }
                const W* next = f + DEPTH < F ? first + (f + DEPTH) * D : following;
                Ahead ahead{(const char*)next, 0, D * int64_t(sizeof(W))};  // of all rows a tile fetches its share
                int64_t owed = 0;
                for (int64_t c = 0; c < count; c += PANEL)
                    for (int64_t group = 0; group < groups; group++) {
                        ahead.line += ahead.rows * ahead.stride;
                        for (ahead.rows = 0, owed += depth; owed >= tiles; owed -= tiles) ahead.rows++;
                        const int64_t r = starts[group], R = starts[group + 1] - r;
                        const float *of_rows = x.data() + r * (DEPTH + APART), *columns = panels.data() + c / PANEL * STRIDE;
                        float* to = sums.data() + c * size + r * PANEL;
                        auto write = [&](int i, int v, Floats sum) { store(to + i * PANEL + v * WIDTH, sum); };
                        auto add = [&](int i, int v, Floats sum) { write(i, v, load(to + i * PANEL + v * WIDTH) + sum); };
                        if (f == 0)
                            multiply_rows(R, of_rows, columns, depth, ahead, write);
                        else
                            multiply_rows(R, of_rows, columns, depth, ahead, add);
                    }
            }
            for (int64_t r = 0; r < size; r++)
                for (int64_t c = 0; c < count; c += PANEL) {
                    const float* sum = sums.data() + c * size + r * PANEL;
                    float* to = out + (part.first + r) * D + d + c;
                    const W* b = bias ? bias + part.e * D + d + c : nullptr;
                    for (int64_t i = 0; i < std::min(PANEL, count - c); i++) to[i] = sum[i] + (b ? value(b[i]) : 0);
                }
        }
    });
}

// Numbers that a row of P and one of Q numbers take when they are packed.
static int64_t packed_row(int64_t P) { return (P + SUM_ROWS - 1) / SUM_ROWS * SUM_ROWS; }
static int64_t packed_columns(int64_t Q) { return (Q + PANEL - 1) / PANEL * PANEL; }

template <class W>
static void store_past_caches(W* to, Floats v) { store(to, v); }
#if defined(__AVX512F__)
static void store_past_caches(float* to, Floats v) { _mm512_stream_ps(to, (__m512)v); }
#elif defined(__AVX__)
static void store_past_caches(float* to, Floats v) { _mm256_stream_ps(to, (__m256)v); }
#endif

// to[e][p][q] = sum_n a[a_index[n]][p] * b[b_index[n]][q]   of begin[e] <= n + begin[0] < begin[e + 1]
template <class W>
static void products_of_rows(const float* a, const int64_t* a_index, const float* b, const int64_t* b_index,
                             const int64_t* begin, W* to, float* packed, int64_t E, int64_t P, int64_t Q, int threads) {
    const int64_t of_a = packed_row(P), of_b = packed_columns(Q);
    auto rows_of = [&](int64_t e) { return begin[e + 1] - begin[e]; };
    auto packed_a = [&](int64_t e) { return packed + (begin[e] - begin[0]) * (of_a + of_b); };
    auto packed_b = [&](int64_t e) { return packed_a(e) + rows_of(e) * of_a; };
    const std::vector<ExpertRows> parts = parts_of(begin, E, BLOCK_ROWS);
    share(int64_t(parts.size()), 1, threads, [&](int64_t i, int64_t last) {
        for (; i < last; i++) {
            const ExpertRows& part = parts[i];
            const int64_t size = rows_of(part.e);
            for (int64_t n = part.first; n < part.end; n++) {
                const int64_t k = n - (begin[part.e] - begin[0]);
                const float* row = a + (a_index ? a_index[n] : n) * P;
                float* group = packed_a(part.e) + k * SUM_ROWS;
                int64_t p = 0;
                for (; p + SUM_ROWS <= P; p += SUM_ROWS, group += size * SUM_ROWS)
                    std::memcpy(group, row + p, SUM_ROWS * sizeof(float));
                for (int64_t r = 0; p < P && r < SUM_ROWS; r++) group[r] = p + r < P ? row[p + r] : 0;
                pack_columns(b + (b_index ? b_index[n] : n) * Q, Q, size * PANEL, packed_b(part.e) + k * PANEL);
            }
        }
    });
    const bool past = sizeof(W) * E * P * Q >= BEYOND_CACHES && uintptr_t(to) % 64 == 0 && Q % (64 / sizeof(W)) == 0;
    const int64_t blocks = (P + GRADIENT_ROWS - 1) / GRADIENT_ROWS;
    share(E * blocks, 1, threads, [&](int64_t item, int64_t last) {
        for (; item < last; item++) {
            const int64_t e = item / blocks, size = rows_of(e);
            const int64_t p = item % blocks * GRADIENT_ROWS, end = std::min(p + GRADIENT_ROWS, P);
            W* here = to + e * P * Q;
            if (size == 0) {
                std::memset(static_cast<void*>(here + p * Q), 0, (end - p) * Q * sizeof(W));
                continue;
            }
            auto tile = [&](int64_t row, int64_t column) {
                const float *numbers = packed_a(e) + row * size, *columns = packed_b(e) + column * size;
                W* place = here + row * Q + column;
                auto multiply = [&](const auto& put) {
                    if (size <= SUMMED) return multiply_panel<SUM_ROWS, 1, SUM_ROWS>(numbers, columns, size, {}, put);
                    Floats totals[SUM_ROWS][SUM_VECTORS] = {};
                    for (int64_t n = 0; n < size; n += SUMMED)
                        multiply_panel<SUM_ROWS, 1, SUM_ROWS>(
                            numbers + n * SUM_ROWS, columns + n * PANEL, std::min(SUMMED, size - n), {},
                            [&](int r, int v, Floats sum) { totals[r][v] += sum; });
                    for (int r = 0; r < SUM_ROWS; r++)
                        for (int v = 0; v < SUM_VECTORS; v++) put(r, v, totals[r][v]);
                };
                if (row + SUM_ROWS > end || column + PANEL > Q) {
                    W whole[SUM_ROWS][PANEL];
                    multiply([&](int r, int v, Floats sum) { store(whole[r] + v * WIDTH, sum); });
                    for (int64_t r = 0; r < std::min<int64_t>(SUM_ROWS, end - row); r++)
                        std::memcpy(place + r * Q, whole[r], std::min(PANEL, Q - column) * sizeof(W));
                } else if (past)
                    multiply([&](int r, int v, Floats sum) { store_past_caches(place + r * Q + v * WIDTH, sum); });
                else
                    multiply([&](int r, int v, Floats sum) { store(place + r * Q + v * WIDTH, sum); });
            };
            const int64_t wide = std::max<int64_t>(GRADIENT_NUMBERS / (size * PANEL), 1) * PANEL;
            for (int64_t block = 0; block < Q; block += wide)
                for (int64_t row = p; row < end; row += SUM_ROWS)
                    for (int64_t column = block; column < std::min(block + wide, Q); column += PANEL) tile(row, column);
        }
#ifdef __x86_64__
        _mm_sfence();  // before others read what was written past caches
#endif
    });
}
