// Products of few or many rows of activations with the matrices of a network, whose weights are fp32, bf16 or int8.
// The order of additions behind a number depends on the row alone, whatever the number of rows.

#pragma once

#include <algorithm>
#include <cmath>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu_vector.h"

namespace {

typedef uint16_t Half __attribute__((vector_size(16)));
typedef int8_t Byte __attribute__((vector_size(8)));

enum Type : int32_t { kFloat = 0, kBfloat = 1, kInt8 = 2 };
enum Epilogue { kStore, kAdd, kReluSquared };

struct bf16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const bf16* p) {
    Half h;
    std::memcpy(&h, p, 16);
    VecInt wide = __builtin_convertvector(h, VecInt) << 16;
    Vec v;
    std::memcpy(&v, &wide, 32);
    return v;
}
inline Vec load(const int8_t* p) {
#ifdef __AVX2__  // GCC 12 widens bytes one by one, five times as slowly
    __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtepi32_ps(wide);
#else
    Byte b;
    std::memcpy(&b, p, 8);
    return __builtin_convertvector(__builtin_convertvector(b, VecInt), Vec);
#endif
}

struct Matrix {  // (out, in) row by row, or a table of `out` vectors
    const void* data;
    const float* scale;
    int32_t type, in, out;
};

// Said to be fused, or the compiler would decide anew for each caller, and with it about the last bit.
inline void put(float* to, float total, float scale, Epilogue epilogue) {
    float value = total * scale;
    if (epilogue == kAdd) *to = std::fma(total, scale, *to);
    else if (epilogue == kReluSquared) *to = value > 0 ? value * value : 0;
    else *to = value;
}

inline void put(float* to, Vec total, const float* scale, Epilogue epilogue) {  // the same for eight outputs
    Vec factor = scale ? load(scale) : splat(1.0f), value = total * factor, before = load(to);
    if (epilogue == kAdd)
        for (int i = 0; i < kLanes; i++) value[i] = std::fma(total[i], factor[i], before[i]);
    else if (epilogue == kReluSquared) value = value > 0.0f ? value * value : Vec{};
    store(to, value);
}

// fetch: ask for the next O outputs' weights meanwhile. They are too few for the processor to notice how they go on, and
// waiting for them would take as long as the arithmetic.
template <typename W, int O, int B>
inline void tile(const W* w, const float* x, float* y, int in, int out, const float* scale, Epilogue epilogue, bool fetch) {
    Vec acc[O][B] = {};
    for (int i = 0; i < in; i += kLanes) {
        Vec v[B];
        for (int b = 0; b < B; b++) v[b] = load(x + size_t(b) * in + i);
        if (fetch && i * sizeof(W) % 64 == 0)
            for (int o = 0; o < O; o++) __builtin_prefetch(w + size_t(O + o) * in + i);
        for (int o = 0; o < O; o++) {
            Vec weight = load(w + size_t(o) * in + i);
            for (int b = 0; b < B; b++) acc[o][b] += weight * v[b];
        }
    }
    for (int o = 0; o < O; o++)
        for (int b = 0; b < B; b++)
            put(y + size_t(b) * out + o, sum(acc[o][b]), scale ? scale[o] : 1.0f, epilogue);
}

template <typename W, int O>
inline void tiles(const W* w, const float* x, float* y, int rows, int in, int out, const float* s, Epilogue e) {
    int b = 0;
    for (; b + 3 <= rows; b += 3) tile<W, O, 3>(w, x + size_t(b) * in, y + size_t(b) * out, in, out, s, e, b == 0);
    if (b + 2 == rows) tile<W, O, 2>(w, x + size_t(b) * in, y + size_t(b) * out, in, out, s, e, b == 0);
    if (b + 1 == rows) tile<W, O, 1>(w, x + size_t(b) * in, y + size_t(b) * out, in, out, s, e, b == 0);
}

#ifdef __AVX512F__
// Two rows in one register, eight lanes each: the additions of `tile`, twice as many at a time.
inline Wide both(Vec v) { return Wide(_mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(__m256(v))))); }

// Of x (rows, in), as (in / kLanes, pair, 2, kLanes). Without a partner a row is its own.
inline void pair_up(const float* x, float* to, int rows, int in) {
    int halves = (rows + 1) / 2 * 2;
    for (int i = 0; i < in; i += kLanes)
        for (int b = 0; b < halves; b++, to += kLanes) store(to, load(x + size_t(std::min(b, rows - 1)) * in + i));
}

template <typename W, int O, int P>
inline void pair_tile(const W* w, const float* pairs, float* y, int rows, int in, int out, const float* scale, Epilogue epilogue) {
    Wide acc[O][P] = {};
    for (int i = 0; i < in; i += kLanes, pairs += P * kWide) {
        if (i * sizeof(W) % 64 == 0)
            for (int o = 0; o < O; o++) __builtin_prefetch(w + size_t(O + o) * in + i);
        Wide v[P];
        for (int p = 0; p < P; p++) v[p] = load_wide(pairs + p * kWide);
        for (int o = 0; o < O; o++) {
            Wide weight = both(load(w + size_t(o) * in + i));
            for (int p = 0; p < P; p++) acc[o][p] += weight * v[p];
        }
    }
    float all[O][P][kWide];
    std::memcpy(all, acc, sizeof(all));
    constexpr int Q = kLanes / 2;
    for (int p = 0; p < P; p++)
        for (int o = 0; o < O; o += Q) {
            Vec halves[kLanes];
            for (int j = 0; j < kLanes; j++) halves[j] = load(&all[o + j % Q][p][j / Q * kLanes]);
            Vec totals = sums(halves);
            for (int j = 0; j < (2 * p + 1 < rows ? kLanes : Q); j++)
                put(y + size_t(2 * p + j / Q) * out + o + j % Q, totals[j], scale ? scale[o + j % Q] : 1.0f, epilogue);
        }
}

template <typename W, int O, int P>
void product_of_pairs(const Matrix& m, const float* pairs, float* y, int rows, int first, int last, Epilogue e) {
    const W* w = static_cast<const W*>(m.data);
    for (int o = first; o < last; o += O)
        pair_tile<W, O, P>(w + size_t(o) * m.in, pairs, y + o, rows, m.in, m.out, m.scale ? m.scale + o : nullptr, e);
}
#endif

// Many rows: lanes are rows, so that no vector has to be summed up. What `tile` adds in lane c is added here in pass c,
// and the passes in the order in which `sum` adds the lanes: the same bits.
constexpr int kMany = kWide == 16 ? 25 : 8;  // rows from which that is fastest
constexpr int kFew = kWide == 16 ? 12 : kMany;  // of fewer, those that are multiplied together
constexpr int kPassOutputs = 8, kPassVectors = kWide == 16 ? 2 : 1, kPassRows = kPassVectors * kWide;

// Of x (rows, in), as (lane, in / kLanes, padded).
void transpose(const float* x, float* to, int rows, int in, int padded) {
    for (int b = 0; b < padded; b += kLanes)
        for (int i = 0; i < in; i += kLanes) {
            Vec v[kLanes];
            for (int j = 0; j < kLanes; j++) v[j] = b + j < rows ? load(x + size_t(b + j) * in + i) : Vec{};
            transpose(v);
            for (int c = 0; c < kLanes; c++) store(to + (size_t(c) * in + i) / kLanes * padded + b, v[c]);
        }
}

inline const float* widened(const float* from, float*, int) { return from; }
template <typename W>
const float* widened(const W* from, float* to, int count) {
    for (int i = 0; i < count; i += kLanes) store(to + i, load(from + i));
    return to;
}

inline void passes(const float* w, const float* xt, float* y, int rows, int in, int out, const float* scale, Epilogue e) {
    constexpr int O = kPassOutputs, V = kPassVectors;
    Wide parts[kLanes][O][V];
    for (int c = 0; c < kLanes; c++) {
        Wide acc[O][V] = {};
        const float* next = w + size_t(O) * in + c * in;  // of the next outputs this pass asks for an eighth
        for (int i = c; i < in; i += kLanes, xt += V * kWide, next += kLanes) {
            if (i / kLanes % 2 == 0) __builtin_prefetch(next);
            Wide v[V];
            for (int j = 0; j < V; j++) v[j] = load_wide(xt + j * kWide);
            for (int o = 0; o < O; o++)
                for (int j = 0; j < V; j++) acc[o][j] += w[size_t(o) * in + i] * v[j];
        }
        std::memcpy(parts[c], acc, sizeof(acc));
    }
    float totals[O][V * kWide];
    for (int o = 0; o < O; o++)
        for (int j = 0; j < V; j++) {
            Wide total = total_of([&](int c) { return parts[c][o][j]; });
            std::memcpy(&totals[o][j * kWide], &total, sizeof(total));
        }
    for (int b = 0; b < rows; b += kLanes) {
        Vec v[kLanes];
        for (int o = 0; o < O; o++) v[o] = load(&totals[o][b]);
        transpose(v);
        for (int j = 0; j < std::min(rows - b, kLanes); j++) put(y + size_t(b + j) * out, v[j], scale, e);
    }
}

// Outputs first to last of y (rows, out) = x (rows, in) m^T. O is 8 for one row, where additions would otherwise wait
// for each other, and 4 for several, which is what the registers hold.
template <typename W>
void product(const Matrix& m, const float* x, float* y, int rows, int first, int last, Epilogue e) {
    const W* w = static_cast<const W*>(m.data);
    auto scale = [&](int o) { return m.scale ? m.scale + o : nullptr; };
    int o = first;
    if (rows == 1)
        for (; o + 8 <= last; o += 8) tile<W, 8, 1>(w + size_t(o) * m.in, x, y + o, m.in, m.out, scale(o), e, true);
    for (; o + 4 <= last; o += 4) tiles<W, 4>(w + size_t(o) * m.in, x, y + o, rows, m.in, m.out, scale(o), e);
    for (; o < last; o++) tiles<W, 1>(w + size_t(o) * m.in, x, y + o, rows, m.in, m.out, scale(o), e);
}

// The same for up to kPassRows rows. scratch: kPassRows + kPassOutputs times m.in floats.
template <typename W>
void product_of_many(const Matrix& m, const float* x, float* y, int rows, int first, int last, Epilogue e, float* scratch) {
    const W* w = static_cast<const W*>(m.data);
    float* panel = scratch + size_t(kPassRows) * m.in;
    int whole = first + (last - first) / kPassOutputs * kPassOutputs;
    transpose(x, scratch, rows, m.in, kPassRows);
    for (int o = first; o < whole; o += kPassOutputs)
        passes(widened(w + size_t(o) * m.in, panel, kPassOutputs * m.in), scratch, y + o, rows, m.in, m.out,
               m.scale ? m.scale + o : nullptr, e);
    product<W>(m, x, y, rows, whole, last, e);
}

// The same for up to kFew rows, in pairs where the registers are that wide. scratch: kFew times m.in floats.
template <typename W>
void product_of_few(const Matrix& m, const float* x, float* y, int rows, int first, int last, Epilogue e, float* scratch) {
#ifdef __AVX512F__
    if (rows > 1) {
        int whole = first + (last - first) / kLanes * kLanes;
        pair_up(x, scratch, rows, m.in);
        switch ((rows + 1) / 2) {  // outputs at once: with 16 to 24 sums no addition waits for another, and registers suffice
            case 1: product_of_pairs<W, 8, 1>(m, scratch, y, rows, first, whole, e); break;
            case 2: product_of_pairs<W, 8, 2>(m, scratch, y, rows, first, whole, e); break;
            case 3: product_of_pairs<W, 8, 3>(m, scratch, y, rows, first, whole, e); break;
            case 4: product_of_pairs<W, 4, 4>(m, scratch, y, rows, first, whole, e); break;
            case 5: product_of_pairs<W, 4, 5>(m, scratch, y, rows, first, whole, e); break;
            default: product_of_pairs<W, 4, kFew / 2>(m, scratch, y, rows, first, whole, e);
        }
        first = whole;
    }
#endif
    product<W>(m, x, y, rows, first, last, e);
}

template <typename W>
void multiply_by(const Matrix& m, const float* x, float* y, int rows, int first, int last, Epilogue e, float* scratch) {
    for (int part; rows > 0; rows -= part, x += size_t(part) * m.in, y += size_t(part) * m.out) {
        part = std::min(rows, rows < kMany ? kFew : kPassRows);
        auto multiply_part = rows < kMany ? product_of_few<W> : product_of_many<W>;
        multiply_part(m, x, y, part, first, last, e, scratch);
    }
}

void multiply(const Matrix& m, const float* x, float* y, int rows, int thread, int threads, Epilogue e, float* scratch) {
    int blocks = (m.out + kLanes - 1) / kLanes;
    int first = std::min(m.out, blocks * thread / threads * kLanes);
    int last = std::min(m.out, blocks * (thread + 1) / threads * kLanes);
    if (m.type == kFloat) multiply_by<float>(m, x, y, rows, first, last, e, scratch);
    else if (m.type == kBfloat) multiply_by<bf16>(m, x, y, rows, first, last, e, scratch);
    else multiply_by<int8_t>(m, x, y, rows, first, last, e, scratch);
}

inline float element(const Matrix& m, int64_t row, int i) {
    int64_t at = row * m.in + i;
    float scale = m.scale ? m.scale[row] : 1.0f;
    if (m.type == kFloat) return static_cast<const float*>(m.data)[at];
    if (m.type == kBfloat) return to_float(static_cast<const bf16*>(m.data)[at]);
    return scale * static_cast<const int8_t*>(m.data)[at];
}

}  // namespace
