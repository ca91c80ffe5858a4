// A whole layer in one call, for few slots: the operations of Python and torch between two products would take as
// long as these do.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

// What is computed, y[t] = sum_k gates[t][k] f_e(x[t]) with e = ids[t][k], by addresses of contiguous tensors. x, weights,
// biases and y have one type; weights may lie in tiles. The fields are those of `Layer` in kernel_library.py.
struct Layer {
    const void *x, *w_in, *b_in, *w_out, *b_out;
    const int64_t* ids;
    const float* gates;
    void* y;
    int64_t T, K, E, D, F, H, O;
    bool gated;
    int activation;
    float limit, alpha, offset;
    bool positive, tiled;
    int threads;
};

struct Freed {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
// Memory for so many numbers, which are not set.
template <class Number>
static std::unique_ptr<Number[], Freed> scratch(int64_t count) {
    return std::unique_ptr<Number[], Freed>(
        static_cast<Number*>(::operator new(count * sizeof(Number), std::align_val_t{64})));
}

template <class From, class To>
static void convert(const From* from, int64_t count, To* to) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
    From last[WIDTH] = {};
    std::memcpy(last, from + i, (count - i) * sizeof(From));
    store_some(to + i, load(last), count - i);
}

// False if an id is not in [0, E).
template <class W>
static bool compute(const Layer& of) {
    using Row = typename Multiply<W>::Row;
    const int64_t N = of.T * of.K, threads = of.threads;
    const auto sorted = scratch<int64_t>(of.E + 1 + 2 * N);
    if (!sort_slots(of.ids, N, of.E, of.K, sorted.get())) return false;
    const int64_t *begin = sorted.get(), *slot = begin + of.E + 1, *token = slot + N;
    const auto multiply = [&](const Row* rows, const int64_t* index, const void* weight, const void* bias, float* out,
                              int64_t F, int64_t D) {
        const W *w = static_cast<const W*>(weight), *b = static_cast<const W*>(bias);
        if (of.tiled) return tiled_products(rows, index, begin, w, b, out, of.E, F, D, threads);
        const auto packed = scratch<Row>(packed_numbers(of.E, N, D));
        products(rows, index, begin, w, b, out, packed.get(), of.E, F, D, threads);
    };
    const W* x = static_cast<const W*>(of.x);
    W* y = static_cast<W*>(of.y);
    constexpr bool ROWS_AS_THEY_ARE = std::is_same_v<Row, W>, FLOATS = std::is_same_v<float, W>;
    const auto converted = scratch<Row>(ROWS_AS_THEY_ARE ? 0 : of.T * of.D);
    const auto h = scratch<float>(N * of.F), out = scratch<float>(N * of.O), sums = scratch<float>(FLOATS ? 0 : of.T * of.O);
    const auto hidden = scratch<Row>(N * of.H);
    const Row* rows = converted.get();
    if constexpr (ROWS_AS_THEY_ARE)
        rows = x;
    else
        convert(x, of.T * of.D, converted.get());
    float* to = sums.get();
    if constexpr (FLOATS) to = y;
    multiply(rows, token, of.w_in, of.b_in, h.get(), of.F, of.D);
    activate(h.get(), hidden.get(), N, of.H, {of.gated, Activation(of.activation), of.limit, of.alpha, of.offset}, threads);
    multiply(hidden.get(), nullptr, of.w_out, of.b_out, out.get(), of.O, of.H);
    add_slots(out.get(), slot, token, of.gates, to, N, of.T, of.O, true, of.positive, threads);
    if constexpr (!FLOATS) convert(to, of.T * of.O, y);
    return true;
}

enum Outcome { DONE, WRONG_ID, NO_MEMORY };
template <class W>
static Outcome outcome(const Layer& of) {
    try {
        return compute<W>(of) ? DONE : WRONG_ID;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

extern "C" int layer_float32(const Layer* of) { return outcome<float>(*of); }
extern "C" int layer_bfloat16(const Layer* of) { return outcome<BFloat16>(*of); }
extern "C" int layer_float16(const Layer* of) { return outcome<Float16>(*of); }
