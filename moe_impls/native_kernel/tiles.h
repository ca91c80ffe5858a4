// Products of rows with weights that were laid out in tiles, once: TILE features side by side, all of one d before those
// of the next, so that they are read in one stream and a number of a row is multiplied with vectors of them.
//
// tiles [E][ceil(F / TILE)][ceil(D / PAIR)][TILE][PAIR], with zeros beyond F and D
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "multiply.h"
#include "parts.h"
#include "threads.h"
#include "vectors.h"

#ifdef __AVX512F__
constexpr int TILED_ROWS = 8;  // 8 rows x 3 vectors of sums in 32 registers
#else
constexpr int TILED_ROWS = 4;
#endif
constexpr int TILE_VECTORS = 3;
constexpr int TILE = TILE_VECTORS * WIDTH;
// Numbers of a feature, or pairs: all rows are multiplied with them while they are in a cache. No more are one after the
// other in a sum: it rounds the more, the longer it is.
constexpr int64_t CHUNK = 512;
constexpr int64_t MOST_ROWS = 96;  // of one expert, that a thread multiplies with a tile
constexpr int64_t STEPS = 8;       // after which cache lines are fetched
constexpr int STREAMS = 4;         // at least, that the weights of an expert with few rows are read in
constexpr int64_t FEW_ROWS = 2 * TILED_ROWS;

// The products of R rows with `steps` numbers, or pairs, of each feature of a tile are added to sums; where an expert has
// few rows, from several places at once: memory is read faster in several streams. Each has sums of its own where there
// are registers for them. Meanwhile so many cache lines are fetched after every few steps.
template <int R, class W>
static void tile_rows(const typename Multiply<W>::Row* const* rows, int64_t first, const W* tile, int64_t steps,
                      bool streams, const char* fetched, int64_t lines, Floats (*sums)[TILE_VECTORS]) {
    using M = Multiply<W>;
    constexpr int64_t PAIR = M::STEP / WIDTH, STRIDE = TILE_VECTORS * M::STEP;
    auto multiply = [&](auto places, int64_t begin, int64_t count) {
        constexpr int P = decltype(places)::value, OWN = std::min(P, TILED_ROWS / R);
        Floats s[OWN][R][TILE_VECTORS] = {};
        const typename M::Row* x[R];
        for (int r = 0; r < R; r++) x[r] = rows[r] + first + begin * PAIR;
        const W* from = tile + begin * STRIDE;
        for (int64_t d = 0; d < count;) {
            for (int64_t line = 0; line < lines; line++, fetched += 64) __builtin_prefetch(fetched, 0, 2);
            for (const int64_t end = std::min(d + STEPS, count); d < end; d++)
                for (int p = 0; p < P; p++) {
                    const W* w = from + (p * count + d) * STRIDE;
                    const auto w0 = kept(M::weight(w)), w1 = kept(M::weight(w + M::STEP)),
                               w2 = kept(M::weight(w + 2 * M::STEP));
                    for (int r = 0; r < R; r++) {
                        const auto one = M::all(x[r] + (p * count + d) * PAIR);
                        s[p % OWN][r][0] = M::add(s[p % OWN][r][0], one, w0);
                        s[p % OWN][r][1] = M::add(s[p % OWN][r][1], one, w1);
                        s[p % OWN][r][2] = M::add(s[p % OWN][r][2], one, w2);
                    }
                }
        }
        for (int p = 0; p < OWN; p++)
            for (int r = 0; r < R; r++)
                for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] += s[p][r][v];
    };
    constexpr int P = std::max(TILED_ROWS / R, STREAMS);
    const int64_t count = streams ? steps / P : 0;
    if (count > 0) multiply(std::integral_constant<int, P>(), 0, count);
    multiply(std::integral_constant<int, 1>(), count * P, steps - count * P);
}

template <class W>
static void tile_of(int64_t R, const typename Multiply<W>::Row* const* rows, int64_t first, const W* tile,
                    int64_t steps, bool streams, const char* fetched, int64_t lines, Floats (*sums)[TILE_VECTORS]) {
    switch (R) {
        case 1: tile_rows<1>(rows, first, tile, steps, streams, fetched, lines, sums); break;
        case 2: tile_rows<2>(rows, first, tile, steps, streams, fetched, lines, sums); break;
        case 3: tile_rows<3>(rows, first, tile, steps, streams, fetched, lines, sums); break;
        case 4: tile_rows<4>(rows, first, tile, steps, streams, fetched, lines, sums); break;
#ifdef __AVX512F__
        case 5: tile_rows<5>(rows, first, tile, steps, streams, fetched, lines, sums); break;
        case 6: tile_rows<6>(rows, first, tile, steps, streams, fetched, lines, sums); break;
        case 7: tile_rows<7>(rows, first, tile, steps, streams, fetched, lines, sums); break;
        case 8: tile_rows<8>(rows, first, tile, steps, streams, fetched, lines, sums); break;
#endif
    }
}

// out[n][f] = sum_d rows[index[n]][d] * weight[e][f][d] + bias[e][f]   for begin[e] <= n + begin[0] < begin[e + 1]
template <class W>
static void tiled_products(const typename Multiply<W>::Row* rows, const int64_t* index, const int64_t* begin,
                           const W* tiles, const W* bias, float* out, int64_t E, int64_t F, int64_t D, int threads) {
    using M = Multiply<W>;
    using Row = typename M::Row;
    constexpr int64_t PAIR = M::STEP / WIDTH, STRIDE = TILE_VECTORS * M::STEP;  // numbers of a tile for one d, or pair
    constexpr int64_t LINES = CHUNK * STRIDE * int64_t(sizeof(W)) / 64;
    const std::vector<ExpertRows> parts = parts_of(begin, E, MOST_ROWS);
    const int64_t steps = (D + PAIR - 1) / PAIR, tiles_of = (F + TILE - 1) / TILE;
    share(int64_t(parts.size()) * tiles_of, 1, threads, [&](int64_t item, int64_t last) {
        Floats sums[MOST_ROWS][TILE_VECTORS];
        const Row *x[MOST_ROWS], *x_ends[MOST_ROWS];
        Row ends[MOST_ROWS][PAIR];  // the last number of rows that have an odd one, and a zero
        for (; item < last; item++) {
            const ExpertRows& part = parts[item / tiles_of];
            const int64_t f = item % tiles_of * TILE, count = std::min<int64_t>(TILE, F - f);
            const int64_t size = part.end - part.first;
            const bool streams = size <= FEW_ROWS;
            const int64_t groups = (size + TILED_ROWS - 1) / TILED_ROWS, most = (size + groups - 1) / groups;
            const W* tile = tiles + (part.e * tiles_of * TILE + f) * steps * PAIR;
            for (int64_t r = 0; r < size; r++) {
                const int64_t n = part.first + r;
                x[r] = rows + (index ? index[n] : n) * D;
                std::memset(sums[r], 0, sizeof sums[r]);
            }
            auto multiply = [&](const Row* const* rows, int64_t first, int64_t d, int64_t end) {
                const char* next = (const char*)(tile + end * STRIDE);
                for (int64_t group = 0; group < groups; group++) {
                    const int64_t r = size * group / groups, fetched = LINES * group / groups;
                    const int64_t lines = (LINES * (group + 1) / groups - fetched) * STEPS / CHUNK;
                    tile_of<W>(size * (group + 1) / groups - r, rows + r, first, tile + d * STRIDE, end - d,
                               streams, next + fetched * 64, streams && group == 0 ? 0 : lines, sums + r);
                }
            };
            const int64_t whole = D / PAIR;
            const int64_t chunk = streams ? CHUNK * (TILED_ROWS / most) : CHUNK;
            for (int64_t d = 0; d < whole; d += chunk) multiply(x, d * PAIR, d, std::min(d + chunk, whole));
            if (whole < steps) {
                for (int64_t r = 0; r < size; r++) {
                    ends[r][0] = x[r][D - 1];
                    std::memset(ends[r] + 1, 0, sizeof ends[r] - sizeof(Row));
                    x_ends[r] = ends[r];
                }
                multiply(x_ends, 0, whole, steps);
            }
            for (int64_t r = 0; r < size; r++) {
                const float* sum = (const float*)sums[r];
                float* to = out + (part.first + r) * F + f;
                for (int64_t i = 0; i < count; i++) to[i] = sum[i] + (bias ? value(bias[part.e * F + f + i]) : 0);
            }
        }
    });
}
