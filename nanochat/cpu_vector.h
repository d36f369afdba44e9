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
inline float sum(Vec v) {
    float p[kLanes];
    std::memcpy(p, &v, 32);
    return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
}

// e^x by a polynomial on [-ln2/2, ln2/2], to about one unit in the last place; below -87 it is e^-87.
inline Vec exp(Vec x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    Vec n = shifted - 12582912.0f;
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    VecInt power = (__builtin_convertvector(n, VecInt) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, 32);
    return p * scale;
}

// As many floats as a register holds.
#ifdef __AVX512F__
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif
typedef float Wide __attribute__((vector_size(4 * kWide)));

inline Wide load_wide(const float* p) { Wide v; std::memcpy(&v, p, 4 * kWide); return v; }

}  // namespace
