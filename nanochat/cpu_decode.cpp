// One step of the network on a processor, as a single function: new tokens of some rows, one each or a stretch of a prompt.
//
// PyTorch spends some 5 us on each of the 40 operations of a layer, more than the arithmetic of a small model
// takes. Here all of them happen between a few barriers. Activations are fp32; matrices are fp32, bf16 or int8
// with a factor per output; keys and values are fp32 or bf16. The order of additions behind a number depends only on
// the row's tokens, so that a row's result has the same bits in any company, with any number of threads, and whether its
// tokens come one by one or together. Compiled once per machine by cpu_decode.py, which describes the structs with
// ctypes: change both together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#include "cpu_products.h"

namespace {

constexpr float kNormEps = 1.0f / (1 << 23);
constexpr int kSmearChannels = 24;
constexpr int kPage = 32;  // positions, as in page_pool.py

struct Layer {
    Matrix q, k, v, o, fc, proj, value_table, value_gate;  // value_table.data is null without one
    int32_t window, ring;    // position p of a row is in page p / kPage % ring of its own
    void *keys, *values;     // (pages, kPage, kv heads, head size)
    const int32_t* pages;    // (rows, ring): where these pages are

    // The slot of a position among those of all pages.
    int64_t slot(int row, int position) const {
        int32_t own = position / kPage;
        if (own >= ring) own %= ring;
        return int64_t(pages[int64_t(row) * ring + own]) * kPage + position % kPage;
    }
};

// What a step adds: `count` tokens, those of a row one behind the other in the order of their positions.
struct Tokens {
    int32_t count, rows;  // rows: of the cache that get tokens
    const int64_t* ids;
    const int32_t *owners, *positions;  // row of the cache

    bool continues(int b) const { return b > 0 && owners[b] == owners[b - 1]; }
    bool is_last(int b) const { return b + 1 == count || owners[b] != owners[b + 1]; }
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

// Eight positions' keys or values, and those of the next eight, which are asked for meanwhile.
template <typename C>
struct Eight {
    const C *now[kLanes], *next[kLanes];

    void fetch(int j, int at) const {
        if (at * sizeof(C) % 64 == 0) __builtin_prefetch(next[j] + at);
    }
};

// y += the values of eight positions (N vectors each) times their weights.
template <int N, typename C>
inline void weigh(const Eight<C>& values, int offset, const float* weights, float* y) {
    Vec acc[N];
    for (int c = 0; c < N; c++) acc[c] = load(y + c * kLanes);
    for (int j = 0; j < kLanes; j++)
        for (int c = 0; c < N; c++) {
            acc[c] += load(values.now[j] + offset + c * kLanes) * weights[j];
            values.fetch(j, offset + c * kLanes);
        }
    for (int c = 0; c < N; c++) store(y + c * kLanes, acc[c]);
}

// Query heads of key heads begin to end of one row, over `count` positions from `first` on, eight at a time. q and y
// are the row's; scores has room for all heads times all positions.
template <typename C>
void attend(const Network& n, const Layer& l, const float* q, float* y, int row, int begin, int end, int first, int count,
            float* scores) {
    int size = n.head_size, group = n.heads / n.kv_heads, padded = (count + kLanes - 1) / kLanes * kLanes;
    float scale = 1.0f / std::sqrt(float(size));
    Eight<C> eight;
    auto find = [&](void* all, int i) {  // beyond the last position, that again
        if (i) std::copy(eight.next, eight.next + kLanes, eight.now);
        for (int j = i ? kLanes : 0; j < 2 * kLanes; j++)
            (j < kLanes ? eight.now[j] : eight.next[j - kLanes]) =
                static_cast<const C*>(all) + l.slot(row, first + std::min(i + j, count - 1)) * n.kv_heads * size;
    };
    for (int i = 0; i < padded; i += kLanes) {
        find(l.keys, i);
        for (int head = begin * group; head < end * group; head++) {
            int offset = head / group * size;
            Vec acc[kLanes] = {};
            for (int d = 0; d < size; d += kLanes) {
                Vec query = load(q + head * size + d);
                for (int j = 0; j < kLanes; j++) {
                    acc[j] += query * load(eight.now[j] + offset + d);
                    eight.fetch(j, offset + d);
                }
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

// Writes keys and values of a token's key heads to the cache, and turns the queries that look at them.
template <typename C>
void insert(const Network& n, const Layer& l, float* q, float* k, float* v, const float* x, int64_t id, int row, int position,
            int begin, int end) {
    int group = n.heads / n.kv_heads, size = n.head_size;
    int64_t slot = l.slot(row, position);
    for (int h = begin; h < end; h++) {
        float *key = k + h * size, *value = v + h * size;
        if (l.value_table.data) {
            float g = n.gate_scale * gate(l.value_gate, h, x, n.gate_channels);
            for (int i = 0; i < size; i++) value[i] += g * element(l.value_table, id, h * size + i);
        }
        turn(n, key, position);
        int64_t at = (slot * n.kv_heads + h) * size;
        for (int i = 0; i < size; i++) {
            put(static_cast<C*>(l.keys) + at + i, key[i]);
            put(static_cast<C*>(l.values) + at + i, value[i]);
        }
        for (int head = h * group; head < (h + 1) * group; head++) turn(n, q + head * size, position);
    }
}

// Threads share the tokens, or where there are fewer, the key heads. wait: for all threads.
template <typename C, typename W>
void attention(const Network& n, const Layer& l, const Tokens& t, float* q, float* k, float* v, float* y, const float* x,
               int thread, int threads, float* scores, W wait) {
    int size = n.head_size, parts = t.count < threads ? n.kv_heads : 1, heads = n.kv_heads / parts;
    int first = t.count * parts * thread / threads, last = t.count * parts * (thread + 1) / threads;
    for (int item = first; item < last; item++) {
        int b = item / parts, begin = item % parts * heads;
        int64_t kv = int64_t(b) * n.kv_heads * size;
        insert<C>(n, l, q + int64_t(b) * n.heads * size, k + kv, v + kv, x + int64_t(b) * n.width, t.ids[b], t.owners[b],
                  t.positions[b], begin, begin + heads);
    }
    if (t.count > t.rows) wait();  // tokens see those before them
    for (int item = first; item < last; item++) {
        int b = item / parts, begin = item % parts * heads, position = t.positions[b];
        int64_t own = int64_t(b) * n.heads * size;
        int start = std::max(0, position - l.window);
        attend<C>(n, l, q + own, y + own, t.owners[b], begin, begin + heads, start, position + 1 - start, scores);
    }
}

// --- the step ------------------------------------------------------------------------------------------

void embed(const Network& n, int64_t id, float* x, float* scratch) {
    for (int i = 0; i < n.width; i++) scratch[i] = element(n.table, id, i);
    norm(scratch, x, n.width);
}

// x = an embedding with a part of the one before, as the cache would keep that
template <typename C>
void smear(const Network& n, const float* embedding, const float* before, const C* kept, float* x) {
    float g = *n.smear * gate(n.smear_gate, 0, embedding, kSmearChannels);
    for (int i = 0; i < n.width; i++) {
        C rounded;
        if (before) put(&rounded, before[i]);
        x[i] = embedding[i] + g * to_float(before ? rounded : kept[i]);
    }
}

struct Buffers {
    float *x, *x0, *middle, *normed, *q, *k, *v, *y, *hidden, *scores, *wide;
};

int64_t wide_floats(const Network& n) { return int64_t(kPassRows + kPassOutputs) * std::max(n.width, n.hidden); }

template <typename C>
void run(const Network& n, const Tokens& t, float* logits, const Buffers& m, int longest, int thread, int threads) {
    int size = n.width, rows = t.count;
    int begin = rows * thread / threads, end = rows * (thread + 1) / threads;
    float* scores = m.scores + size_t(thread) * n.heads * longest;
    float* wide = m.wide + size_t(thread) * wide_floats(n);
    auto wait = [&] {
        if (threads > 1) {
#pragma omp barrier
        }
    };
    for (int b = begin; b < end; b++) embed(n, t.ids[b], m.x0 + size_t(b) * size, m.x + size_t(b) * size);
    if (n.smear_gate.data) {
        C* previous = static_cast<C*>(n.previous);
        wait();
        for (int b = begin; b < end; b++) {
            float* own = m.x0 + size_t(b) * size;
            smear<C>(n, own, t.continues(b) ? own - size : nullptr, previous + size_t(t.owners[b]) * size, m.x + size_t(b) * size);
        }
        wait();
        for (int b = begin; b < end; b++) {
            float* own = m.x0 + size_t(b) * size;
            if (t.is_last(b))
                for (int i = 0; i < size; i++) put(previous + size_t(t.owners[b]) * size + i, own[i]);
            std::memcpy(own, m.x + size_t(b) * size, 4 * size);
        }
    } else {
        std::memcpy(m.x + size_t(begin) * size, m.x0 + size_t(begin) * size, 4 * size_t(end - begin) * size);
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
        attention<C>(n, l, t, m.q, m.k, m.v, m.y, m.normed, thread, threads, scores, wait);
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
    for (int b = 0, row = 0; b < rows; b++) {  // the last token of each row says what comes next
        if (!t.is_last(b)) continue;
        if (b >= begin && b < end) {
            float *x = m.x + size_t(b) * size, *middle = m.middle + size_t(b) * size;
            if (n.backout)
                for (int c = 0; c < size; c++) x[c] -= *n.backout * middle[c];
            norm(x, m.normed + size_t(row) * size, size);
        }
        row++;
    }
    wait();
    multiply(n.head, m.normed, logits, t.rows, thread, threads, kStore, wide);
    wait();
    int64_t blocks = int64_t(t.rows) * n.vocab / kLanes;
    for (int64_t i = blocks * thread / threads * kLanes; i < blocks * (thread + 1) / threads * kLanes; i += kLanes) {
        // tanh(y) = 1 - 2 / (e^2y + 1)
        Vec e = exp(load(logits + i) * (2.0f / n.softcap));
        store(logits + i, n.softcap - 2.0f * n.softcap / (e + 1.0f));
    }
}

}  // namespace

// Bytes of scratch memory that `decode` needs.
extern "C" int64_t decode_scratch(const Network* n, int32_t tokens, int32_t longest, int32_t threads) {
    int64_t kv = n->kv_heads * n->head_size;
    return 4 * (int64_t(tokens) * (6 * n->width + 2 * kv + n->hidden) + threads * (int64_t(n->heads) * (longest + kLanes) + wide_floats(*n)));
}

// Adds tokens to rows of the cache; logits (rows, vocab) after the last of each. longest: the largest position plus one.
extern "C" void decode(const Network* n, const Tokens* tokens, float* logits, float* scratch, int32_t longest, int32_t threads) {
    int rows = tokens->count;
    Buffers m;
    auto take = [&](int64_t count) { float* p = scratch; scratch += rows * count; return p; };
    m.x = take(n->width), m.x0 = take(n->width), m.middle = take(n->width), m.normed = take(n->width);
    m.q = take(n->width), m.y = take(n->width), m.hidden = take(n->hidden);
    m.k = take(n->kv_heads * n->head_size), m.v = take(n->kv_heads * n->head_size);
    longest += kLanes;
    m.scores = scratch;
    m.wide = scratch + int64_t(threads) * n->heads * longest;
    auto work = [&](int thread) {
        if (n->cache_type == kFloat) run<float>(*n, *tokens, logits, m, longest, thread, threads);
        else run<bf16>(*n, *tokens, logits, m, longest, thread, threads);
    };
    if (threads == 1) return work(0);
#pragma omp parallel num_threads(threads)
    {
        work(omp_get_thread_num());
    }
}
