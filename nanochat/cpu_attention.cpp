// Causal attention of whole sequences on a processor, with a sliding window, forward and backward, in fp32.
//
// A tile of queries at a time: its scores stay in the cache, what is not visible is not computed, and the backward
// pass makes the probabilities again from the logarithms of their sums instead of reading them from memory
// (FlashAttention-2, arXiv:2307.08691). A head's result has the same bits with any number of threads.
// Compiled once per machine and called by cpu_attention.py. B rows, T positions, H heads, D head size.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_vector.h"

namespace {

constexpr int kTile = 24;  // queries; a multiple of the six rows that `product` keeps in registers

struct Sizes {
    int64_t rows, length, heads, kv_heads, head_size, window;

    int64_t padded() const { return (length + kLanes - 1) / kLanes * kLanes; }
    float scale() const { return 1.0f / std::sqrt(float(head_size)); }
};

// C (m, n) = or += A (m, k) B (k, n), each with its own distance between rows, A also with one between columns,
// so that it can be read transposed. M rows of N vectors stay in registers.
template <int M, int N, bool kAccumulate>
inline void block(
    int k, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row) {
    Vec sums[M][N] = {};
    if (kAccumulate)
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sums[i][j] = load(c + i * c_row + j * kLanes);
    for (int p = 0; p < k; p++) {
        Vec row[N];
        for (int j = 0; j < N; j++) row[j] = load(b + p * b_row + j * kLanes);
        for (int i = 0; i < M; i++) {
            Vec factor = splat(a[i * a_row + p * a_column]);
            for (int j = 0; j < N; j++) sums[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) store(c + i * c_row + j * kLanes, sums[i][j]);
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

template <bool kAccumulate>
void product(
    int m, int n, int k, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
    int64_t c_row) {
    int j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes)
        columns<2, kAccumulate>(m, k, a, a_row, a_column, b + j, b_row, c + j, c_row);
    if (j < n) columns<1, kAccumulate>(m, k, a, a_row, a_column, b + j, b_row, c + j, c_row);
}

// x (length, size) with rows `stride` apart -> y (size, padded), zero behind the length
void transpose(const float* x, int64_t stride, const Sizes& sizes, float* y) {
    int64_t padded = sizes.padded();
    for (int64_t d = 0; d < sizes.head_size; d++) {
        for (int64_t t = 0; t < sizes.length; t++) y[d * padded + t] = x[t * stride + d];
        for (int64_t t = sizes.length; t < padded; t++) y[d * padded + t] = 0;
    }
}

// The queries of one tile and the keys that any of them sees, both ends on whole vectors.
struct Tile {
    int64_t first, queries, low, high;

    Tile(const Sizes& sizes, int64_t first) : first(first) {
        queries = std::min<int64_t>(kTile, sizes.length - first);
        low = sizes.window < 0 ? 0 : std::max<int64_t>(0, first - sizes.window) / kLanes * kLanes;
        high = (first + queries + kLanes - 1) / kLanes * kLanes;
    }
    int keys() const { return int(high - low); }
    // Overwrite what query i does not see.
    void hide(const Sizes& sizes, int64_t i, float* row, float value) const {
        int64_t at = first + i, start = sizes.window < 0 ? 0 : std::max<int64_t>(0, at - sizes.window);
        std::fill(row, row + std::max<int64_t>(0, start - low), value);
        std::fill(row + (at + 1 - low), row + keys(), value);
    }
};

void forward_head(
    const Sizes& sizes, const float* q, const float* k, const float* v, float* y, float* lse, float* scratch) {
    int64_t q_row = sizes.heads * sizes.head_size, kv_row = sizes.kv_heads * sizes.head_size;
    int64_t padded = sizes.padded();
    int size = int(sizes.head_size);
    float *keys = scratch, *scores = keys + size * padded, scale = sizes.scale();
    transpose(k, kv_row, sizes, keys);
    for (int64_t first = 0; first < sizes.length; first += kTile) {
        Tile tile(sizes, first);
        int n = tile.keys(), m = int(tile.queries);
        product<false>(m, n, size, q + first * q_row, q_row, 1, keys + tile.low, padded, scores, n);
        for (int i = 0; i < m; i++) {
            float* row = scores + int64_t(i) * n;
            tile.hide(sizes, i, row, -INFINITY);
            Vec largest = load(row);
            for (int j = kLanes; j < n; j += kLanes) {
                Vec x = load(row + j);
                largest = x > largest ? x : largest;
            }
            float top = largest[0];
            for (int lane = 1; lane < kLanes; lane++) top = std::max(top, largest[lane]);
            Vec total = {};
            for (int j = 0; j < n; j += kLanes) {
                Vec p = exp((load(row + j) - top) * scale);
                store(row + j, p);
                total += p;
            }
            tile.hide(sizes, i, row, 0);
            float all = sum(total);
            for (int j = 0; j < n; j += kLanes) store(row + j, load(row + j) * (1.0f / all));
            lse[first + i] = top * scale + std::log(all);
        }
        int seen = int(std::min(tile.high, sizes.length) - tile.low);
        product<false>(m, size, seen, scores, n, 1, v + tile.low * kv_row, kv_row, y + first * q_row, q_row);
    }
}

// dk and dv of the key head are added to, dq is overwritten.
void backward_head(
    const Sizes& sizes, const float* q, const float* k, const float* v, const float* y, const float* lse,
    const float* dy, float* dq, float* dk, float* dv, float* scratch) {
    int64_t q_row = sizes.heads * sizes.head_size, kv_row = sizes.kv_heads * sizes.head_size;
    int64_t padded = sizes.padded();
    int size = int(sizes.head_size);
    float *keys = scratch, *values = keys + size * padded, *probs = values + size * padded;
    float *grads = probs + kTile * padded, scale = sizes.scale();
    transpose(k, kv_row, sizes, keys);
    transpose(v, kv_row, sizes, values);
    for (int64_t first = 0; first < sizes.length; first += kTile) {
        Tile tile(sizes, first);
        int n = tile.keys(), m = int(tile.queries), seen = int(std::min(tile.high, sizes.length) - tile.low);
        const float *q_tile = q + first * q_row, *dy_tile = dy + first * q_row;
        product<false>(m, n, size, q_tile, q_row, 1, keys + tile.low, padded, probs, n);
        product<false>(m, n, size, dy_tile, q_row, 1, values + tile.low, padded, grads, n);
        for (int i = 0; i < m; i++) {
            const float *out = y + (first + i) * q_row, *grad = dy_tile + i * q_row;
            Vec dot = {};
            for (int d = 0; d < size; d += kLanes) dot += load(out + d) * load(grad + d);
            float mean = sum(dot), logarithm = lse[first + i];
            float *p_row = probs + int64_t(i) * n, *g_row = grads + int64_t(i) * n;
            for (int j = 0; j < n; j += kLanes) store(p_row + j, exp(load(p_row + j) * scale - logarithm));
            tile.hide(sizes, i, p_row, 0);
            for (int j = 0; j < n; j += kLanes)
                store(g_row + j, load(p_row + j) * (load(g_row + j) - mean) * scale);
        }
        product<false>(m, size, seen, grads, n, 1, k + tile.low * kv_row, kv_row, dq + first * q_row, q_row);
        product<true>(seen, size, m, grads, 1, n, q_tile, q_row, dk + tile.low * kv_row, kv_row);
        product<true>(seen, size, m, probs, 1, n, dy_tile, q_row, dv + tile.low * kv_row, kv_row);
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
        std::vector<float> scratch((size + kTile) * sizes.padded());
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < sizes.rows * sizes.heads; item++) {
            int64_t row = item / sizes.heads, head = item % sizes.heads;
            int64_t at = (row * sizes.length * sizes.heads + head) * size;
            int64_t kv_at = (row * sizes.length * sizes.kv_heads + head / group) * size;
            forward_head(sizes, q + at, k + kv_at, v + kv_at, y + at, lse + item * sizes.length, scratch.data());
        }
    }
}

// Gradients dq (as q), dk, dv (as k, and zero before) of dy (as y).
extern "C" void attention_backward(
    const Sizes* of, const float* q, const float* k, const float* v, const float* y, const float* lse,
    const float* dy, float* dq, float* dk, float* dv, int32_t threads) {
    const Sizes sizes = *of;
    int64_t size = sizes.head_size, group = sizes.heads / sizes.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(2 * (size + kTile) * sizes.padded());
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < sizes.rows * sizes.kv_heads; item++) {
            int64_t row = item / sizes.kv_heads, kv_head = item % sizes.kv_heads;
            int64_t kv_at = (row * sizes.length * sizes.kv_heads + kv_head) * size;
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
                int64_t at = (row * sizes.length * sizes.heads + head) * size;
                const float* sums = lse + (row * sizes.heads + head) * sizes.length;
                backward_head(
                    sizes, q + at, k + kv_at, v + kv_at, y + at, sums, dy + at, dq + at, dk + kv_at, dv + kv_at,
                    scratch.data());
            }
        }
    }
}
