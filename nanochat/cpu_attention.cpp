// Causal attention of whole sequences on a processor, with a sliding window, forward and backward, in fp32.
//
// Some queries against some keys at a time: their scores stay in the cache, what is not visible is not computed, and
// the backward pass makes the probabilities again from the logarithms of their sums instead of reading them from memory
// (FlashAttention-2, arXiv:2307.08691). A head's result has the same bits with any number of threads.
// Compiled once per machine and called by cpu_attention.py. B rows, T positions, H heads, D head size.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_vector.h"

namespace {

constexpr int kQueries = 48;  // of a tile; a multiple of the six rows that `product` keeps in registers
constexpr int kKeys = 64;     // of a tile; whole vectors
constexpr int kColumns = kWide == 16 ? 4 : 2;  // vectors that `product` keeps in registers, times six rows
constexpr float kLowest = -1e30f;              // below every score, and finite

struct Sizes {
    int64_t rows, length, heads, kv_heads, head_size, window;

    int64_t q_row() const { return heads * head_size; }
    int64_t kv_row() const { return kv_heads * head_size; }
    float scale() const { return 1.0f / std::sqrt(float(head_size)); }
    // Packed: heads filled up to whole vectors, sequences to whole tiles of keys, with zeros.
    int width() const { return int((head_size + kWide - 1) / kWide * kWide); }
    int64_t padded() const { return (length + kKeys - 1) / kKeys * kKeys; }
    int64_t packed() const { return padded() * width(); }
};

// C (m, n) = or += A (m, k) B (k, n), each with its own distance between rows, A also with one between columns,
// so that it can be read transposed. M rows of N vectors stay in registers.
template <int M, int N, bool kAccumulate>
inline void block(
    int k, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row) {
    Wide sums[M][N] = {};
    if (kAccumulate)
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sums[i][j] = load_wide(c + i * c_row + j * kWide);
    for (int p = 0; p < k; p++) {
        Wide row[N];
        for (int j = 0; j < N; j++) row[j] = load_wide(b + p * b_row + j * kWide);
        for (int i = 0; i < M; i++) {
            float factor = a[i * a_row + p * a_column];
            for (int j = 0; j < N; j++) sums[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) std::memcpy(c + i * c_row + j * kWide, &sums[i][j], sizeof(Wide));
}

template <int N, bool kAccumulate>
void columns(
    int m, int k, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
    int64_t c_row) {
    int i = 0;
    auto run = [&](auto height) {
        constexpr int M = decltype(height)::value;
        for (; i + M <= m; i += M)
            block<M, N, kAccumulate>(k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row);
    };
    run(std::integral_constant<int, 6>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
}

// n: whole vectors
template <bool kAccumulate>
void product(
    int m, int n, int k, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
    int64_t c_row) {
    int j = 0;
    auto run = [&](auto width) {
        constexpr int N = decltype(width)::value;
        for (; j + N * kWide <= n; j += N * kWide)
            columns<N, kAccumulate>(m, k, a, a_row, a_column, b + j, b_row, c + j, c_row);
    };
    run(std::integral_constant<int, kColumns>());
    if (kColumns > 2) run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
}

// x (count, size), rows `stride` apart, times a factor -> y (count, width), zero behind the size
void pack(const float* x, int64_t stride, int64_t count, const Sizes& sizes, float factor, float* y) {
    for (int64_t t = 0; t < count; t++, x += stride, y += sizes.width()) {
        for (int64_t d = 0; d < sizes.head_size; d++) y[d] = x[d] * factor;
        std::fill(y + sizes.head_size, y + sizes.width(), 0.0f);
    }
}

// x (length, size), rows `stride` apart -> tiles (width, kKeys), zero behind length and size
void pack_transposed(const float* x, int64_t stride, const Sizes& sizes, float* y) {
    std::fill(y, y + sizes.packed(), 0.0f);
    for (int64_t first = 0; first < sizes.length; first += kKeys, y += sizes.width() * kKeys)
        for (int64_t t = first; t < std::min(first + kKeys, sizes.length); t++)
            for (int64_t d = 0; d < sizes.head_size; d++) y[d * kKeys + (t - first)] = x[t * stride + d];
}

void unpack(const float* x, const Sizes& sizes, int64_t count, float* y, int64_t stride) {
    for (int64_t t = 0; t < count; t++) std::copy_n(x + t * sizes.width(), sizes.head_size, y + t * stride);
}

// Queries of one tile and a tile of keys that some of them see, no more of it than that in whole vectors.
struct Pair {
    int64_t query, key, window;
    int m, n;

    Pair(const Sizes& sizes, int64_t query, int64_t key) : query(query), key(key), window(sizes.window) {
        m = int(std::min<int64_t>(kQueries, sizes.length - query));
        n = int(std::min<int64_t>(kKeys, (query + m - key + kWide - 1) / kWide * kWide));
    }
    bool hides() const { return key + n - 1 > query || (window >= 0 && query + m - 1 - window > key); }
    // Overwrite what the queries do not see.
    void hide(float* scores, float value) const {
        for (int i = 0; i < m; i++, scores += kKeys) {
            int64_t at = query + i - key, start = window < 0 ? 0 : at - window;
            std::fill(scores, scores + std::clamp<int64_t>(start, 0, n), value);
            std::fill(scores + std::clamp<int64_t>(at + 1, 0, n), scores + n, value);
        }
    }
};

template <typename F>
void for_each_pair(const Sizes& sizes, int64_t query, F f) {
    int64_t last = std::min(query + kQueries, sizes.length) - 1;
    int64_t low = sizes.window < 0 ? 0 : std::max<int64_t>(0, query - sizes.window) / kKeys * kKeys;
    for (int64_t key = low; key <= last; key += kKeys) f(Pair(sizes, query, key));
}

void forward_head(
    const Sizes& sizes, const float* q, const float* k, const float* v, float* y, float* lse, float* scratch) {
    int width = sizes.width();
    float *keys = scratch, *values = keys + sizes.packed(), *queries = values + sizes.packed();
    float *sums = queries + kQueries * width, *scores = sums + kQueries * width;
    pack_transposed(k, sizes.kv_row(), sizes, keys);
    pack(v, sizes.kv_row(), sizes.length, sizes, 1.0f, values);
    std::fill(values + sizes.length * width, values + sizes.packed(), 0.0f);
    for (int64_t first = 0; first < sizes.length; first += kQueries) {
        int64_t count = std::min<int64_t>(kQueries, sizes.length - first);
        float largest[kQueries], total[kQueries] = {};
        std::fill_n(largest, kQueries, kLowest);
        std::fill_n(sums, kQueries * width, 0.0f);
        pack(q + first * sizes.q_row(), sizes.q_row(), count, sizes, sizes.scale(), queries);
        for_each_pair(sizes, first, [&](const Pair& pair) {
            product<false>(pair.m, pair.n, width, queries, width, 1, keys + pair.key * width, kKeys, scores, kKeys);
            if (pair.hides()) pair.hide(scores, -INFINITY);
            for (int i = 0; i < pair.m; i++) {
                float* row = scores + i * kKeys;
                Wide highest = load_wide(row);
                for (int j = kWide; j < pair.n; j += kWide) {
                    Wide x = load_wide(row + j);
                    highest = x > highest ? x : highest;
                }
                float before = largest[i];
                for (int lane = 0; lane < kWide; lane++) largest[i] = std::max(largest[i], highest[lane]);
                Wide all = {};
                for (int j = 0; j < pair.n; j += kWide) {
                    Wide p = exp_or_zero(load_wide(row + j) - largest[i]);
                    std::memcpy(row + j, &p, sizeof(p));
                    all += p;
                }
                float part = 0;
                for (int lane = 0; lane < kWide; lane++) part += all[lane];
                if (before != largest[i]) {
                    float factor = std::exp(before - largest[i]);
                    total[i] *= factor;
                    for (int d = 0; d < width; d++) sums[i * width + d] *= factor;
                }
                total[i] += part;
            }
            product<true>(pair.m, width, pair.n, scores, kKeys, 1, values + pair.key * width, width, sums, width);
        });
        for (int i = 0; i < count; i++) {
            lse[first + i] = largest[i] + std::log(total[i]);
            for (int d = 0; d < width; d++) sums[i * width + d] *= 1.0f / total[i];
        }
        unpack(sums, sizes, count, y + first * sizes.q_row(), sizes.q_row());
    }
}

// Keys and values of a head, packed for the backward pass, and the sums of their gradients.
struct KeyHead {
    float *keys, *keys_t, *values_t, *dk, *dv;

    KeyHead(const Sizes& sizes, const float* k, const float* v, float* scratch) {
        int64_t packed = sizes.packed();
        keys = scratch, keys_t = keys + packed, values_t = keys_t + packed, dk = values_t + packed, dv = dk + packed;
        pack(k, sizes.kv_row(), sizes.length, sizes, 1.0f, keys);
        std::fill(keys + sizes.length * sizes.width(), keys + packed, 0.0f);
        pack_transposed(k, sizes.kv_row(), sizes, keys_t);
        pack_transposed(v, sizes.kv_row(), sizes, values_t);
        std::fill_n(dk, 2 * packed, 0.0f);
    }
};

void backward_head(
    const Sizes& sizes, const KeyHead& head, const float* q, const float* y, const float* lse, const float* dy,
    float* dq, float* scratch) {
    int width = sizes.width();
    int64_t q_row = sizes.q_row();
    float *queries = scratch, *grads = queries + kQueries * width, *sums = grads + kQueries * width;
    float *probs = sums + kQueries * width, *slopes = probs + kQueries * kKeys;
    for (int64_t first = 0; first < sizes.length; first += kQueries) {
        int64_t count = std::min<int64_t>(kQueries, sizes.length - first);
        pack(q + first * q_row, q_row, count, sizes, sizes.scale(), queries);
        pack(dy + first * q_row, q_row, count, sizes, 1.0f, grads);
        std::fill_n(sums, kQueries * width, 0.0f);
        float mean[kQueries] = {};
        for (int i = 0; i < count; i++)
            for (int64_t d = 0; d < sizes.head_size; d++)
                mean[i] += y[(first + i) * q_row + d] * dy[(first + i) * q_row + d];
        for_each_pair(sizes, first, [&](const Pair& pair) {
            int64_t at = pair.key * width;
            product<false>(pair.m, pair.n, width, queries, width, 1, head.keys_t + at, kKeys, probs, kKeys);
            product<false>(pair.m, pair.n, width, grads, width, 1, head.values_t + at, kKeys, slopes, kKeys);
            if (pair.hides()) pair.hide(probs, -INFINITY);
            for (int i = 0; i < pair.m; i++)
                for (int j = i * kKeys; j < i * kKeys + pair.n; j += kWide) {
                    Wide p = exp_or_zero(load_wide(probs + j) - lse[first + i]);
                    Wide slope = p * (load_wide(slopes + j) - mean[i]);
                    std::memcpy(probs + j, &p, sizeof(p));
                    std::memcpy(slopes + j, &slope, sizeof(slope));
                }
            product<true>(pair.m, width, pair.n, slopes, kKeys, 1, head.keys + at, width, sums, width);
            product<true>(pair.n, width, pair.m, slopes, 1, kKeys, queries, width, head.dk + at, width);
            product<true>(pair.n, width, pair.m, probs, 1, kKeys, grads, width, head.dv + at, width);
        });
        for (int64_t i = 0; i < count * width; i++) sums[i] *= sizes.scale();
        unpack(sums, sizes, count, dq + first * q_row, q_row);
    }
}

}  // namespace

// q, y (B, T, H, D); k, v (B, T, Hkv, D); lse (B, H, T), natural logarithms of the sums. All contiguous.
extern "C" void attention_forward(
    const Sizes* of, const float* q, const float* k, const float* v, float* y, float* lse, int32_t threads) {
    const Sizes sizes = *of;
    int64_t size = sizes.head_size, group = sizes.heads / sizes.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(2 * sizes.packed() + kQueries * (2 * sizes.width() + kKeys));
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < sizes.rows * sizes.heads; item++) {
            int64_t row = item / sizes.heads, head = item % sizes.heads;
            int64_t at = (row * sizes.length * sizes.heads + head) * size;
            int64_t kv_at = (row * sizes.length * sizes.kv_heads + head / group) * size;
            forward_head(sizes, q + at, k + kv_at, v + kv_at, y + at, lse + item * sizes.length, scratch.data());
        }
    }
}

// Gradients dq (as q), dk, dv (as k) of dy (as y).
extern "C" void attention_backward(
    const Sizes* of, const float* q, const float* k, const float* v, const float* y, const float* lse,
    const float* dy, float* dq, float* dk, float* dv, int32_t threads) {
    const Sizes sizes = *of;
    int64_t size = sizes.head_size, group = sizes.heads / sizes.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(5 * sizes.packed() + kQueries * (3 * sizes.width() + 2 * kKeys));
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < sizes.rows * sizes.kv_heads; item++) {
            int64_t row = item / sizes.kv_heads, kv_head = item % sizes.kv_heads;
            int64_t kv_at = (row * sizes.length * sizes.kv_heads + kv_head) * size;
            KeyHead keys(sizes, k + kv_at, v + kv_at, scratch.data());
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
                int64_t at = (row * sizes.length * sizes.heads + head) * size;
                backward_head(
                    sizes, keys, q + at, y + at, lse + (row * sizes.heads + head) * sizes.length, dy + at, dq + at,
                    scratch.data() + 5 * sizes.packed());
            }
            unpack(keys.dk, sizes, sizes.length, dk + kv_at, sizes.kv_row());
            unpack(keys.dv, sizes, sizes.length, dv + kv_at, sizes.kv_row());
        }
    }
}
