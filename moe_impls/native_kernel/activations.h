// The activations of hidden features, in float32.
#pragma once
#include <algorithm>

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

// A gate, or a feature where there are none: ReLU, its square, g sigmoid(alpha g), or GELU by tanh, which is
// g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
static Floats activated(Floats g, Activation activation, float alpha) {
    if (activation == RELU || activation == RELU2) {
        const Floats positive = g < 0 ? Floats{} : g;
        return activation == RELU ? positive : positive * positive;
    }
    const Floats s = activation == SIGMOID ? g * alpha : (g + 0.044715f * g * g * g) * 1.5957691216f;
    return g / (exponential(-s) + 1);
}

// The hidden features of rows h [N][F]: to [N][H], H = F or, of gates and what they multiply, F / 2. Gates are at
// most `limit`, the others within it, and `offset` is added to those.
template <class Row>
static void activate(const float* h, Row* to, int64_t N, int64_t H, bool gated, Activation activation, float limit,
                     float alpha, float offset, int threads) {
    const int64_t chunk = std::max<int64_t>((1 << 13) / std::max<int64_t>(H, 1), 1);
    share(N, chunk, threads, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float *gates = h + n * H * (gated ? 2 : 1), *ups = gates + H;
            auto some = [&](Floats g, Floats u) {
                const Floats a = activated(g > limit ? all(limit) : g, activation, alpha);
                return gated ? a * ((u > limit ? all(limit) : u < -limit ? all(-limit) : u) + offset) : a;
            };
            int64_t i = 0;
            for (; i + WIDTH <= H; i += WIDTH)
                store(to + n * H + i, some(load(gates + i), load(gated ? ups + i : gates + i)));
            if (i < H) {
                Floats g = {}, u = {};
                std::memcpy(&g, gates + i, (H - i) * sizeof(float));
                if (gated) std::memcpy(&u, ups + i, (H - i) * sizeof(float));
                Row last[WIDTH];
                store(last, some(g, u));
                std::memcpy(to + n * H + i, last, (H - i) * sizeof(Row));
            }
        }
    });
}
extern "C" void activate_rows(const float* h, void* to, bool halves, int64_t N, int64_t H, bool gated, int activation,
                              float limit, float alpha, float offset, int threads) {
    if (halves)
        activate(h, (BFloat16*)to, N, H, gated, (Activation)activation, limit, alpha, offset, threads);
    else
        activate(h, (float*)to, N, H, gated, (Activation)activation, limit, alpha, offset, threads);
}
