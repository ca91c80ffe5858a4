// The activations of hidden features, in float32.
#pragma once
#include <algorithm>

#include "multiply.h"
#include "threads.h"
#include "vectors.h"

// e^x to a rounding or two: 2^n e^r with the nearest whole n, and a polynomial of r (that of Cephes' expf). Infinite
// above 88; below -87 as at -87.
static Floats exponential(Floats x) {
    const Floats least = x < -87 ? all(-87) : x;
    const Floats shifted = least * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // n is in its last bits
    const Floats r = least - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    for (const float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    const Floats power = (Floats)(((Words)shifted << 23) + (127u << 23));
    return x > 88 ? all(__builtin_inff()) : (p * r * r + r + 1) * power;
}

enum Activation { RELU, RELU2, SIGMOID, GELU_TANH };

// What is made of a gate, or of a feature where there are none: ReLU, its square, g sigmoid(alpha g), or GELU by tanh,
// which is g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)); and the derivative of that.
struct Activated {
    Floats value, slope;
};
static Activated activated(Floats g, Activation activation, float alpha) {
    if (activation == RELU || activation == RELU2) {
        const Floats positive = g < 0 ? Floats{} : g;
        if (activation == RELU2) return {positive * positive, 2 * positive};
        return {positive, g <= 0 ? Floats{} : all(1)};
    }
    constexpr float SCALE = 1.5957691216f, CUBIC = 0.044715f;
    const Floats s = activation == SIGMOID ? g * alpha : (g + CUBIC * g * g * g) * SCALE;
    const Floats slope = activation == SIGMOID ? all(alpha) : (3 * CUBIC * g * g + 1) * SCALE;  // of s
    const Floats divisor = exponential(-s) + 1, sigmoid = 1 / divisor;
    return {g / divisor, sigmoid + g * (slope * (sigmoid * (1 - sigmoid)))};  // far from 0 the last is 0, and not g^3 * 0
}

// Activations of features: h [N][F] to [N][H], H = F or, of gates and what they multiply, F / 2. Gates are at most
// `limit`, the others within it, and `offset` is added to those.
struct Features {
    bool gated;
    Activation activation;
    float limit, alpha, offset;

    Floats within(Floats u) const { return u > limit ? all(limit) : u < -limit ? all(-limit) : u; }
    Floats value(Floats g, Floats u) const {
        const Floats a = activated(g > limit ? all(limit) : g, activation, alpha).value;
        return gated ? a * (within(u) + offset) : a;
    }
    // Also what a gate and the other get of the derivative `d` by the value.
    Floats backward(Floats g, Floats u, Floats d, Floats& dg, Floats& du) const {
        const Activated a = activated(g > limit ? all(limit) : g, activation, alpha);
        const Floats multiplied = gated ? within(u) + offset : all(1);
        dg = g > limit ? Floats{} : d * multiplied * a.slope;
        if (activation == RELU || activation == RELU2) dg = g <= 0 ? Floats{} : dg;  // infinite d, too
        du = u > limit || u < -limit ? Floats{} : d * a.value;
        return a.value * multiplied;
    }
};

// visit(i, count) for all vectors of H numbers, of the last of which `count` are there.
template <class Visit>
static void each_vector(int64_t H, const Visit& visit) {
    int64_t i = 0;
    for (; i + WIDTH <= H; i += WIDTH) visit(i, WIDTH);
    if (i < H) visit(i, H - i);
}

template <class Row>
static void activate(const float* h, Row* to, int64_t N, int64_t H, Features features, int threads) {
    const int64_t chunk = std::max<int64_t>((1 << 13) / std::max<int64_t>(H, 1), 1);
    share(N, chunk, threads, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float *gates = h + n * H * (features.gated ? 2 : 1), *ups = features.gated ? gates + H : gates;
            each_vector(H, [&](int64_t i, int64_t count) {
                store_some(to + n * H + i, features.value(load_some(gates + i, count), load_some(ups + i, count)), count);
            });
        }
    });
}

// The backward: of the derivatives da [N][H] by the hidden features, before they are multiplied with gates, those by h,
// dh [N][F], the hidden features times gates, and the derivatives by gates. Those two lie at the slot of each row; no
// gates are ones, and where d_gates is none it is not wanted.
static void activate_backward(const float* h, const float* da, const float* gates, const int64_t* slot, float* dh,
                              float* a, float* d_gates, int64_t N, int64_t H, Features features, int threads) {
    const int64_t chunk = std::max<int64_t>((1 << 12) / std::max<int64_t>(H, 1), 1), F = features.gated ? 2 * H : H;
    share(N, chunk, threads, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float *of_gates = h + n * F, *ups = features.gated ? of_gates + H : of_gates;
            const float gate = gates ? gates[slot[n]] : 1;
            Floats sum = {}, sums = {};
            each_vector(H, [&](int64_t i, int64_t count) {
                if (i % (SUMMED * WIDTH) == 0) sums += sum, sum = Floats{};
                const Floats d = load_some(da + n * H + i, count);
                Floats dg, du;
                const Floats value = features.backward(load_some(of_gates + i, count), load_some(ups + i, count),
                                                       d * gate, dg, du);
                store_some(a + n * H + i, value * gate, count);
                store_some(dh + n * F + i, dg, count);
                if (features.gated) store_some(dh + n * F + H + i, du, count);
                sum += d * value;
            });
            if (d_gates) d_gates[slot[n]] = total(sums + sum);
        }
    });
}
extern "C" void activate_rows(const float* h, void* to, bool halves, int64_t N, int64_t H, bool gated, int activation,
                              float limit, float alpha, float offset, int threads) {
    const Features features{gated, (Activation)activation, limit, alpha, offset};
    if (halves)
        activate(h, (BFloat16*)to, N, H, features, threads);
    else
        activate(h, (float*)to, N, H, features, threads);
}
extern "C" void activate_rows_backward(const float* h, const float* da, const float* gates, const int64_t* slot,
                                       float* dh, float* a, float* d_gates, int64_t N, int64_t H, bool gated,
                                       int activation, float limit, float alpha, float offset, int threads) {
    activate_backward(h, da, gates, slot, dh, a, d_gates, N, H,
                      {gated, (Activation)activation, limit, alpha, offset}, threads);
}
