// One decode step of the network on a processor: B rows, one new token each, as a single function.
//
// PyTorch spends some 5 us on each of the 40 operations of a layer, more than the arithmetic of a small model
// takes. Here all of them happen between a few barriers. Activations are fp32; matrices are fp32, bf16 or int8
// with a factor per output; keys and values are fp32 or bf16. The order of additions behind a number depends only on
// the row, so that a row's result has the same bits in any company and with any number of threads.
// Compiled once per machine by cpu_decode.py, which describes the structs with ctypes: change both together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#include "cpu_products.h"

namespace {

constexpr float kNormEps = 1.0f / (1 << 23);
constexpr int kSmearChannels = 24;

struct Layer {
    Matrix q, k, v, o, fc, proj, value_table, value_gate;  // value_table.data is null without one
    int32_t window, ring;  // ring 0: position p is in slot p, else in slot p % ring
    void *keys, *values;   // (rows, slots, kv heads, head size)
    int64_t row_stride;    // elements from row to row
};

struct Network {
    int32_t num_layers, width, heads, kv_heads, head_size, hidden, vocab, cache_type;
    float qk_scale, gate_scale, softcap;
    int32_t gate_channels;
    Matrix table, head, smear_gate;  // smear_gate.data is null without a smear
    const float *cos, *sin;          // (positions, head size / 2)
    const float *resid, *skip;       // a factor per layer each, or null
    const float *smear, *backout;    // one number each, or null
    void* previous;                  // (rows, width), the smear's state
    Layer* layers;
};

void norm(const float* x, float* y, int size) {
    Vec squares = {};
    for (int i = 0; i < size; i += kLanes) squares += load(x + i) * load(x + i);
    float factor = 1.0f / std::sqrt(sum(squares) / size + kNormEps);
    for (int i = 0; i < size; i += kLanes) store(y + i, load(x + i) * factor);
}

float gate(const Matrix& m, int64_t output, const float* x, int channels) {
    float total = 0;
    for (int i = 0; i < channels; i++) total += element(m, output, i) * x[i];
    return 1.0f / (1.0f + std::exp(-total));
}

// --- attention -----------------------------------------------------------------------------------------

// Rotates by the position and normalises one head.
void turn(const Network& n, float* head, int position) {
    int half = n.head_size / 2;
    const float *cos = n.cos + size_t(position) * half, *sin = n.sin + size_t(position) * half;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] + b * sin[i];
        head[i + half] = b * cos[i] - a * sin[i];
    }
    norm(head, head, n.head_size);
    for (int i = 0; i < n.head_size; i++) head[i] *= n.qk_scale;
}

// y += the values of eight positions (N vectors each) times their weights.
template <int N, typename C>
inline void weigh(const C* const* values, int offset, const float* weights, float* y) {
    Vec acc[N];
    for (int c = 0; c < N; c++) acc[c] = load(y + c * kLanes);
    for (int j = 0; j < kLanes; j++)
        for (int c = 0; c < N; c++) acc[c] += load(values[j] + offset + c * kLanes) * weights[j];
    for (int c = 0; c < N; c++) store(y + c * kLanes, acc[c]);
}

// Query heads of key heads begin to end of one row, over `count` positions from `first` on, eight at a time. q and y
// are the row's; scores has room for all heads times all positions.
template <typename C>
void attend(const Network& n, const Layer& l, const float* q, float* y, int row, int begin, int end, int first, int count,
            float* scores) {
    int size = n.head_size, group = n.heads / n.kv_heads, padded = (count + kLanes - 1) / kLanes * kLanes;
    float scale = 1.0f / std::sqrt(float(size));
    const C* eight[kLanes];
    auto find = [&](void* all, int i) {  // beyond the last position, that again
        for (int j = 0; j < kLanes; j++) {
            int at = first + std::min(i + j, count - 1);
            eight[j] = static_cast<const C*>(all) + row * l.row_stride + size_t(l.ring ? at % l.ring : at) * n.kv_heads * size;
        }
    };
    for (int i = 0; i < padded; i += kLanes) {
        find(l.keys, i);
        for (int head = begin * group; head < end * group; head++) {
            int offset = head / group * size;
            Vec acc[kLanes] = {};
            for (int d = 0; d < size; d += kLanes) {
                Vec query = load(q + head * size + d);
                for (int j = 0; j < kLanes; j++) acc[j] += query * load(eight[j] + offset + d);
            }
            store(scores + size_t(head) * padded + i, sums(acc) * scale);
        }
    }
    for (int head = begin * group; head < end * group; head++) {
        float *own = scores + size_t(head) * padded, most = -INFINITY;
        for (int i = count; i < padded; i++) own[i] = -INFINITY;
        for (int i = 0; i < count; i++) most = std::max(most, own[i]);
        Vec total = {};
        for (int i = 0; i < padded; i += kLanes) {
            Vec weight = exp(load(own + i) - most);
            total += weight;
            store(own + i, weight);
        }
        float factor = 1.0f / sum(total);
        for (int i = 0; i < padded; i += kLanes) store(own + i, load(own + i) * factor);
        std::fill(own + count, own + padded, 0.0f);  // not e^-87 times that: denormal numbers are slow
        std::memset(y + head * size, 0, 4 * size);
    }
    for (int i = 0; i < padded; i += kLanes) {
        find(l.values, i);
        for (int head = begin * group; head < end * group; head++) {
            int offset = head / group * size;
            const float* weights = scores + size_t(head) * padded + i;
            float* to = y + head * size;
            for (int d = 0; d < size;) {
                int left = (size - d) / kLanes;
                if (left >= 8) weigh<8>(eight, offset + d, weights, to + d), d += 8 * kLanes;
                else if (left >= 4) weigh<4>(eight, offset + d, weights, to + d), d += 4 * kLanes;
                else weigh<1>(eight, offset + d, weights, to + d), d += kLanes;
            }
        }
    }
}

// Threads share the rows, or where there are fewer, the key heads.
template <typename C>
void attention(const Network& n, const Layer& l, float* q, float* k, float* v, float* y, const float* x,
               const int64_t* ids, const int32_t* positions, int rows, int thread, int threads, float* scores) {
    int group = n.heads / n.kv_heads, size = n.head_size;
    int parts = rows < threads ? n.kv_heads : 1, heads = n.kv_heads / parts;
    int work = rows * parts;
    for (int item = work * thread / threads; item < work * (thread + 1) / threads; item++) {
        int row = item / parts, begin = item % parts * heads, position = positions[row];
        float* queries = q + size_t(row) * n.heads * size;
        for (int h = begin; h < begin + heads; h++) {
            float* key = k + (size_t(row) * n.kv_heads + h) * size;
            float* value = v + (size_t(row) * n.kv_heads + h) * size;
            if (l.value_table.data) {
                float g = n.gate_scale * gate(l.value_gate, h, x + size_t(row) * n.width, n.gate_channels);
                for (int i = 0; i < size; i++) value[i] += g * element(l.value_table, ids[row], h * size + i);
            }
            turn(n, key, position);
            int64_t slot = l.ring ? position % l.ring : position;
            int64_t at = row * l.row_stride + (slot * n.kv_heads + h) * size;
            for (int i = 0; i < size; i++) {
                put(static_cast<C*>(l.keys) + at + i, key[i]);
                put(static_cast<C*>(l.values) + at + i, value[i]);
            }
            for (int head = h * group; head < (h + 1) * group; head++) turn(n, queries + head * size, position);
        }
        int first = std::max(0, position - l.window);
        attend<C>(n, l, queries, y + size_t(row) * n.heads * size, row, begin, begin + heads, first,
                  position + 1 - first, scores);
    }
}

// --- the step ------------------------------------------------------------------------------------------

template <typename C>
void embed(const Network& n, int row, int64_t id, float* x, float* scratch) {
    for (int i = 0; i < n.width; i++) scratch[i] = element(n.table, id, i);
    norm(scratch, x, n.width);
    if (!n.smear_gate.data) return;
    C* previous = static_cast<C*>(n.previous) + size_t(row) * n.width;
    float g = *n.smear * gate(n.smear_gate, 0, x, kSmearChannels);
    for (int i = 0; i < n.width; i++) {
        float before = to_float(previous[i]);
        put(previous + i, x[i]);
        x[i] += g * before;
    }
}

struct Buffers {
    float *x, *x0, *middle, *normed, *q, *k, *v, *y, *hidden, *scores, *wide;
};

int64_t wide_floats(const Network& n) { return int64_t(kPassRows + kPassOutputs) * std::max(n.width, n.hidden); }

template <typename C>
void run(const Network& n, int rows, const int64_t* ids, const int32_t* positions, float* logits, const Buffers& m,
         int longest, int thread, int threads) {
    int size = n.width;
    int begin = rows * thread / threads, end = rows * (thread + 1) / threads;
    float* scores = m.scores + size_t(thread) * n.heads * longest;
    float* wide = m.wide + size_t(thread) * wide_floats(n);
    auto wait = [&] {
        if (threads > 1) {
#pragma omp barrier
        }
    };
    for (int b = begin; b < end; b++) {
        embed<C>(n, b, ids[b], m.x + size_t(b) * size, m.normed + size_t(b) * size);
        std::memcpy(m.x0 + size_t(b) * size, m.x + size_t(b) * size, 4 * size);
    }
    for (int i = 0; i < n.num_layers; i++) {
        const Layer& l = n.layers[i];
        for (int b = begin; b < end; b++) {
            float *x = m.x + size_t(b) * size, *x0 = m.x0 + size_t(b) * size;
            if (n.resid)
                for (int c = 0; c < size; c++) x[c] = n.resid[i] * x[c] + n.skip[i] * x0[c];
            norm(x, m.normed + size_t(b) * size, size);
        }
        wait();
        multiply(l.q, m.normed, m.q, rows, thread, threads, kStore, wide);
        multiply(l.k, m.normed, m.k, rows, thread, threads, kStore, wide);
        multiply(l.v, m.normed, m.v, rows, thread, threads, kStore, wide);
        wait();
        attention<C>(n, l, m.q, m.k, m.v, m.y, m.normed, ids, positions, rows, thread, threads, scores);
        wait();
        multiply(l.o, m.y, m.x, rows, thread, threads, kAdd, wide);
        wait();
        for (int b = begin; b < end; b++) norm(m.x + size_t(b) * size, m.normed + size_t(b) * size, size);
        wait();
        multiply(l.fc, m.normed, m.hidden, rows, thread, threads, kReluSquared, wide);
        wait();
        multiply(l.proj, m.hidden, m.x, rows, thread, threads, kAdd, wide);
        wait();
        if (n.backout && i == n.num_layers / 2)
            for (int b = begin; b < end; b++) std::memcpy(m.middle + size_t(b) * size, m.x + size_t(b) * size, 4 * size);
    }
    for (int b = begin; b < end; b++) {
        float *x = m.x + size_t(b) * size, *middle = m.middle + size_t(b) * size;
        if (n.backout)
            for (int c = 0; c < size; c++) x[c] -= *n.backout * middle[c];
        norm(x, m.normed + size_t(b) * size, size);
    }
    wait();
    multiply(n.head, m.normed, logits, rows, thread, threads, kStore, wide);
    wait();
    int64_t blocks = int64_t(rows) * n.vocab / kLanes;
    for (int64_t i = blocks * thread / threads * kLanes; i < blocks * (thread + 1) / threads * kLanes; i += kLanes) {
        // tanh(y) = 1 - 2 / (e^2y + 1)
        Vec e = exp(load(logits + i) * (2.0f / n.softcap));
        store(logits + i, n.softcap - 2.0f * n.softcap / (e + 1.0f));
    }
}

}  // namespace

// Bytes of scratch memory that `decode` needs; longest is the largest position plus one.
extern "C" int64_t decode_scratch(const Network* n, int32_t rows, int32_t longest, int32_t threads) {
    int64_t kv = n->kv_heads * n->head_size;
    return 4 * (int64_t(rows) * (6 * n->width + 2 * kv + n->hidden) + threads * (int64_t(n->heads) * (longest + kLanes) + wide_floats(*n)));
}

// Adds the tokens ids (rows) at positions (rows) to the rows of the cache; logits (rows, vocab) after each.
extern "C" void decode(const Network* n, int32_t rows, const int64_t* ids, const int32_t* positions, float* logits,
                       float* scratch, int32_t longest, int32_t threads) {
    Buffers m;
    auto take = [&](int64_t count) { float* p = scratch; scratch += rows * count; return p; };
    m.x = take(n->width), m.x0 = take(n->width), m.middle = take(n->width), m.normed = take(n->width);
    m.q = take(n->width), m.y = take(n->width), m.hidden = take(n->hidden);
    m.k = take(n->kv_heads * n->head_size), m.v = take(n->kv_heads * n->head_size);
    longest += kLanes;
    m.scores = scratch;
    m.wide = scratch + int64_t(threads) * n->heads * longest;
    auto work = [&](int thread) {
        if (n->cache_type == kFloat) run<float>(*n, rows, ids, positions, logits, m, longest, thread, threads);
        else run<bf16>(*n, rows, ids, positions, logits, m, longest, thread, threads);
    };
    if (threads == 1) return work(0);
#pragma omp parallel num_threads(threads)
    {
        work(omp_get_thread_num());
    }
}
