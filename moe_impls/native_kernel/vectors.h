// Vectors of numbers, as wide as the processor's: float32 to compute with, float32, bfloat16 and float16 in memory.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Places __attribute__((vector_size(4 * WIDTH)));
#ifdef __aarch64__  // where GCC 12 has no other in C++
typedef __fp16 Float16;
#else
typedef _Float16 Float16;
#endif
typedef Float16 Float16s __attribute__((vector_size(2 * WIDTH), aligned(2)));
struct BFloat16 { uint16_t bits; };

static inline float value(float v) { return v; }
static inline float value(Float16 v) { return (float)v; }
static inline float value(BFloat16 v) {
    uint32_t word = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline Floats load(const BFloat16* p) {
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
static inline Floats load(const Float16* p) {
    return __builtin_convertvector(*reinterpret_cast<const Float16s*>(p), Floats);
}

static inline Floats all(float v) { return v - Floats{}; }  // without an addition, which + 0 is for -0

static inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
static inline void store(BFloat16* to, Floats v) {  // to the nearest, of two the even one; NaN stays NaN
    const Words bits = (Words)v, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, Halves);
    std::memcpy(to, &halves, sizeof halves);
}
static inline void store(Float16* to, Floats v) {
    const Float16s halves = __builtin_convertvector(v, Float16s);
    std::memcpy(to, &halves, sizeof halves);
}

// Of a vector in memory the first `count` numbers; those that are not there are zeros.
static inline Floats load_some(const float* p, int64_t count) {
    if (count == WIDTH) return load(p);
    Floats v = {};
    std::memcpy(&v, p, count * sizeof *p);
    return v;
}
template <class W>
static inline void store_some(W* to, Floats v, int64_t count) {
    if (count == WIDTH) return store(to, v);
    W all[WIDTH];
    store(all, v);
    std::memcpy(to, all, count * sizeof *to);
}

static inline float total(Floats v) {
    Quad parts[WIDTH / 4];
    std::memcpy(parts, &v, sizeof parts);
    for (int half = WIDTH / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// A vector that stays in a register, where a compiler would load it for each of its uses.
template <class Vector>
static inline Vector kept(Vector v) {
#ifdef __x86_64__
    asm("" : "+v"(v));
#endif
    return v;
}
