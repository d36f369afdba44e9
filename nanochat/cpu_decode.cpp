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

#include "cpu_vector.h"

namespace {

constexpr float kNormEps = 1.0f / (1 << 23);
constexpr int kSmearChannels = 24;
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
    Byte b;
    std::memcpy(&b, p, 8);
    return __builtin_convertvector(__builtin_convertvector(b, VecInt), Vec);
}
struct Matrix {  // (out, in) row by row, or a table of `out` vectors
    const void* data;
    const float* scale;
    int32_t type, in, out;
};

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

// --- products ------------------------------------------------------------------------------------------

// Said to be fused, or the compiler would decide anew for each caller, and with it about the last bit.
inline void put(float* to, float total, float scale, Epilogue epilogue) {
    float value = total * scale;
    if (epilogue == kAdd) *to = std::fma(total, scale, *to);
    else if (epilogue == kReluSquared) *to = value > 0 ? value * value : 0;
    else *to = value;
}

template <typename W, int O, int B>
inline void tile(const W* w, const float* x, float* y, int in, int out, const float* scale, Epilogue epilogue) {
    Vec acc[O][B] = {};
    for (int i = 0; i < in; i += kLanes) {
        Vec v[B];
        for (int b = 0; b < B; b++) v[b] = load(x + size_t(b) * in + i);
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
    for (; b + 3 <= rows; b += 3) tile<W, O, 3>(w, x + size_t(b) * in, y + size_t(b) * out, in, out, s, e);
    if (b + 2 == rows) tile<W, O, 2>(w, x + size_t(b) * in, y + size_t(b) * out, in, out, s, e);
    if (b + 1 == rows) tile<W, O, 1>(w, x + size_t(b) * in, y + size_t(b) * out, in, out, s, e);
}

// Many rows: lanes are rows, so that no vector has to be summed up. What `tile` adds in lane c is added here in pass c,
// and the passes as `sum` adds the lanes: the same bits.
constexpr int kMany = 6;  // rows from which that is faster
constexpr int kPassOutputs = kWide == 16 ? 8 : 4, kPassVectors = 2, kPassRows = kPassVectors * kWide;

// Of x (rows, in), as (lane, in / kLanes, V * kWide).
void transpose(const float* x, float* to, int rows, int in, int padded) {
    for (int c = 0; c < kLanes; c++)
        for (int i = c; i < in; i += kLanes, to += padded) {
            for (int b = 0; b < rows; b++) to[b] = x[size_t(b) * in + i];
            for (int b = rows; b < padded; b++) to[b] = 0;
        }
}

inline const float* widened(const float* from, float*, int) { return from; }
template <typename W>
const float* widened(const W* from, float* to, int count) {
    for (int i = 0; i < count; i += kLanes) store(to + i, load(from + i));
    return to;
}

template <int V>
inline void passes(const float* w, const float* xt, float* y, int rows, int in, int out, const float* scale, Epilogue e) {
    constexpr int O = kPassOutputs;
    Wide parts[kLanes][O][V];
    for (int c = 0; c < kLanes; c++) {
        Wide acc[O][V] = {};
        for (int i = c; i < in; i += kLanes, xt += V * kWide) {
            Wide v[V];
            for (int j = 0; j < V; j++) v[j] = load_wide(xt + j * kWide);
            for (int o = 0; o < O; o++)
                for (int j = 0; j < V; j++) acc[o][j] += w[size_t(o) * in + i] * v[j];
        }
        std::memcpy(parts[c], acc, sizeof(acc));
    }
    auto at = [&](int c, int o, int j) { return parts[c][o][j]; };
    for (int o = 0; o < O; o++)
        for (int j = 0; j < V; j++) {
            Wide total = ((at(0, o, j) + at(4, o, j)) + (at(2, o, j) + at(6, o, j))) +
                         ((at(1, o, j) + at(5, o, j)) + (at(3, o, j) + at(7, o, j)));
            for (int b = j * kWide; b < std::min(rows, (j + 1) * kWide); b++)
                put(y + size_t(b) * out + o, total[b - j * kWide], scale ? scale[o] : 1.0f, e);
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
        for (; o + 8 <= last; o += 8) tile<W, 8, 1>(w + size_t(o) * m.in, x, y + o, m.in, m.out, scale(o), e);
    for (; o + 4 <= last; o += 4) tiles<W, 4>(w + size_t(o) * m.in, x, y + o, rows, m.in, m.out, scale(o), e);
    for (; o < last; o++) tiles<W, 1>(w + size_t(o) * m.in, x, y + o, rows, m.in, m.out, scale(o), e);
}

// The same for many rows. scratch: kPassRows + kPassOutputs times m.in floats.
template <typename W>
void product_of_many(const Matrix& m, const float* x, float* y, int rows, int first, int last, Epilogue e, float* scratch) {
    const W* w = static_cast<const W*>(m.data);
    int whole = first + (last - first) / kPassOutputs * kPassOutputs;
    for (int b = 0; b < rows; b += kPassRows) {
        int part = std::min(rows - b, kPassRows), padded = part > kWide ? kPassRows : kWide;
        transpose(x + size_t(b) * m.in, scratch, part, m.in, padded);
        for (int o = first; o < whole; o += kPassOutputs) {
            float *wide = scratch + size_t(kPassRows) * m.in, *to = y + size_t(b) * m.out + o;
            const float *panel = widened(w + size_t(o) * m.in, wide, kPassOutputs * m.in), *scale = m.scale ? m.scale + o : nullptr;
            if (padded == kWide) passes<1>(panel, scratch, to, part, m.in, m.out, scale, e);
            else passes<kPassVectors>(panel, scratch, to, part, m.in, m.out, scale, e);
        }
    }
    product<W>(m, x, y, rows, whole, last, e);
}

template <typename W>
void multiply_by(const Matrix& m, const float* x, float* y, int rows, int first, int last, Epilogue e, float* scratch) {
    if (rows < kMany) product<W>(m, x, y, rows, first, last, e);
    else product_of_many<W>(m, x, y, rows, first, last, e, scratch);
}

void multiply(const Matrix& m, const float* x, float* y, int rows, int thread, int threads, Epilogue e, float* scratch) {
    int blocks = (m.out + kLanes - 1) / kLanes;
    int first = std::min(m.out, blocks * thread / threads * kLanes);
    int last = std::min(m.out, blocks * (thread + 1) / threads * kLanes);
    if (m.type == kFloat) multiply_by<float>(m, x, y, rows, first, last, e, scratch);
    else if (m.type == kBfloat) multiply_by<bf16>(m, x, y, rows, first, last, e, scratch);
    else multiply_by<int8_t>(m, x, y, rows, first, last, e, scratch);
}

float element(const Matrix& m, int64_t row, int i) {
    int64_t at = row * m.in + i;
    float scale = m.scale ? m.scale[row] : 1.0f;
    if (m.type == kFloat) return static_cast<const float*>(m.data)[at];
    if (m.type == kBfloat) return to_float(static_cast<const bf16*>(m.data)[at]);
    return scale * static_cast<const int8_t*>(m.data)[at];
}

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

// One query head over the keys that its row sees, from position `first` on. scores has room for all of them.
template <typename C>
void attend(const Network& n, const Layer& l, const float* q, float* y, int row, int kv_head, int first, int count,
            float* scores) {
    int size = n.head_size, step = n.kv_heads * size;
    const C* keys = static_cast<const C*>(l.keys) + row * l.row_stride + kv_head * size;
    const C* values = static_cast<const C*>(l.values) + row * l.row_stride + kv_head * size;
    float scale = 1.0f / std::sqrt(float(size)), most = -INFINITY;
    auto slot = [&](int i) { return size_t(l.ring ? (first + i) % l.ring : first + i) * step; };
    for (int i = 0; i < count; i++) {
        const C* key = keys + slot(i);
        Vec a = {}, b = {};
        int d = 0;
        for (; d + 2 * kLanes <= size; d += 2 * kLanes) {
            a += load(q + d) * load(key + d);
            b += load(q + d + kLanes) * load(key + d + kLanes);
        }
        if (d < size) a += load(q + d) * load(key + d);
        scores[i] = sum(a + b) * scale;
        most = std::max(most, scores[i]);
    }
    int padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int i = count; i < padded; i++) scores[i] = -INFINITY;
    for (int i = 0; i < padded; i += kLanes) store(scores + i, exp(load(scores + i) - most));
    float total = 0;
    for (int i = 0; i < count; i++) total += scores[i];
    for (int d = 0; d < size; d += kLanes) {
        Vec acc = {};
        for (int i = 0; i < count; i++) acc += load(values + slot(i) + d) * scores[i];
        store(y + d, acc * (1.0f / total));
    }
}

template <typename C>
void attention(const Network& n, const Layer& l, float* q, float* k, float* v, float* y, const float* x,
               const int64_t* ids, const int32_t* positions, int rows, int thread, int threads, float* scores) {
    int group = n.heads / n.kv_heads, size = n.head_size;
    int work = rows * n.kv_heads;
    for (int item = work * thread / threads; item < work * (thread + 1) / threads; item++) {
        int row = item / n.kv_heads, h = item % n.kv_heads, position = positions[row];
        float* key = k + size_t(item) * size;
        float* value = v + size_t(item) * size;
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
        int first = std::max(0, position - l.window);
        for (int head = h * group; head < (h + 1) * group; head++) {
            float* query = q + (size_t(row) * n.heads + head) * size;
            turn(n, query, position);
            attend<C>(n, l, query, y + (size_t(row) * n.heads + head) * size, row, h, first, position + 1 - first, scores);
        }
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
    float* scores = m.scores + size_t(thread) * longest;
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
    int64_t blocks = int64_t(rows) * n.vocab / kLanes, rest = blocks * kLanes;
    for (int64_t i = blocks * thread / threads * kLanes; i < blocks * (thread + 1) / threads * kLanes; i += kLanes) {
        // tanh(y) = 1 - 2 / (e^2y + 1)
        Vec e = exp(load(logits + i) * (2.0f / n.softcap));
        store(logits + i, n.softcap - 2.0f * n.softcap / (e + 1.0f));
    }
    if (thread == 0)
        for (int64_t i = rest; i < int64_t(rows) * n.vocab; i++)
            logits[i] = n.softcap * std::tanh(logits[i] / n.softcap);
}

}  // namespace

// Bytes of scratch memory that `decode` needs; longest is the largest position plus one.
extern "C" int64_t decode_scratch(const Network* n, int32_t rows, int32_t longest, int32_t threads) {
    int64_t kv = n->kv_heads * n->head_size;
    return 4 * (int64_t(rows) * (6 * n->width + 2 * kv + n->hidden) + threads * (longest + kLanes + wide_floats(*n)));
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
    m.wide = scratch + int64_t(threads) * longest;
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
