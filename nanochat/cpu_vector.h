// Eight floats at a time, in GCC's own vectors: the compiler picks the processor's instructions.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 8;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t VecInt __attribute__((vector_size(32)));

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, 32); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, 32); }
inline Vec splat(float x) { return Vec{} + x; }

// at(0) + ... + at(7), always in the same order: whatever adds up lanes does it here.
template <typename F>
inline auto total_of(F at) {
    return ((at(0) + at(4)) + (at(2) + at(6))) + ((at(1) + at(5)) + (at(3) + at(7)));
}

inline float sum(Vec v) {
    float p[kLanes];
    std::memcpy(p, &v, 32);
    return total_of([&](int i) { return p[i]; });
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif

// Eight vectors as the columns of a square become its rows.
inline void transpose(Vec* v) {
    Vec t[kLanes], u[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
        t[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < kLanes; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            u[i + 2 * j + 1] = SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = SHUFFLE(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = SHUFFLE(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// What `sum` gives for each of eight vectors. They are transposed in place.
inline Vec sums(Vec* v) {
    transpose(v);
    return total_of([&](int i) { return v[i]; });
}

// As many floats as a register holds.
#ifdef __AVX512F__
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif
typedef float Wide __attribute__((vector_size(4 * kWide)));

inline Wide load_wide(const float* p) { Wide v; std::memcpy(&v, p, 4 * kWide); return v; }

// e^x by a polynomial on [-ln2/2, ln2/2], to about one unit in the last place; below -87 it is e^-87.
template <typename V>
inline V exp(V x) {
    constexpr V zero = {};
    x = x < -87.0f ? zero - 87.0f : x;
    x = x > 88.0f ? zero + 88.0f : x;
    V shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    V n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = zero + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    auto power = (__builtin_convertvector(n, decltype(x < x)) + 127) << 23;
    V scale;
    std::memcpy(&scale, &power, sizeof(V));
    return p * scale;
}

// The same, but 0 where products with it would be denormal numbers, which are slow.
template <typename V>
inline V exp_or_zero(V x) {
    return x < -80.0f ? V{} : exp(x);
}

}  // namespace
