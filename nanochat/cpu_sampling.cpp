// Draws one id per row from logits on a processor. Compiled once per machine and called by sampling.py.
//
// Among the k largest: values are dealt into groups. The k-th largest of the groups' maxima is a bound that k values
// reach, and with several groups per wanted value few more do: what is left to sort are some k values, after reading the
// row twice. What a row draws depends on that row alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu_vector.h"

namespace {

constexpr int64_t kGroupsPerValue = 5, kBlock = 32;  // kBlock values are compared, or added up, at once
constexpr int64_t kThreadsFrom = 1 << 16;            // values from which several threads are worth waking

struct Entry {
    float value;
    int64_t id;
    bool operator<(const Entry& other) const {  // comes before
        return value > other.value || (value == other.value && id < other.id);
    }
};

float bound(const float* x, int64_t size, int64_t k, std::vector<float>& maxima) {
    int64_t groups = int64_t(maxima.size());
    std::fill(maxima.begin(), maxima.end(), -INFINITY);
    for (int64_t first = 0; first < size; first += groups) {
        int64_t count = std::min(groups, size - first);
        for (int64_t i = 0; i < count; i++) maxima[i] = x[first + i] > maxima[i] ? x[first + i] : maxima[i];
    }
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
    return maxima[k - 1];
}

// The k largest of x (size), 1 <= k <= size, in descending order; of equal ones the first. NaN comes last, as minus infinity.
void top_k(const float* x, int64_t size, int64_t k, std::vector<Entry>& found) {
    std::vector<float> maxima((kGroupsPerValue * k + kBlock - 1) / kBlock * kBlock);
    float least = bound(x, size, k, maxima);
    found.clear();
    int64_t id = 0;
    for (; id + kBlock <= size; id += kBlock) {
        int reached = 0;
        for (int64_t i = 0; i < kBlock; i++) reached |= x[id + i] >= least;
        if (reached)
            for (int64_t i = id; i < id + kBlock; i++)
                if (x[i] >= least) found.push_back({x[i], i});
    }
    for (; id < size; id++)
        if (x[id] >= least) found.push_back({x[id], id});
    for (id = 0; int64_t(found.size()) < k; id++)
        if (std::isnan(x[id])) found.push_back({-INFINITY, id});
    std::partial_sort(found.begin(), found.begin() + k, found.end());
    found.resize(k);
}

struct Settings {
    float temperature, top_p, min_p, uniform;
};

// The first i whose sum of weights up to it exceeds the draw; never one of weight zero, unless all are.
template <typename F>
int64_t first_beyond(double draw, int64_t begin, int64_t end, double sum, F weight) {
    int64_t last = begin;
    for (int64_t i = begin; i < end; i++) {
        if (!(weight(i) > 0)) continue;
        last = i, sum += weight(i);
        if (sum > draw) break;
    }
    return last;
}

// Among all of x, whose weights are put into `weights` (size, rounded up to a block) and added up block by block.
int64_t draw_any(const float* x, int64_t size, const Settings& s, std::vector<float>& weights, std::vector<double>& sums) {
    int64_t whole = size / kWide * kWide, padded = (size + kBlock - 1) / kBlock * kBlock;
    weights.resize(padded), sums.resize(padded / kBlock);
    Wide most = Wide{} - INFINITY;
    for (int64_t i = 0; i < whole; i += kWide) {
        Wide v = load_wide(x + i);
        most = v > most ? v : most;
    }
    float best = -INFINITY;
    for (int i = 0; i < kWide; i++) best = std::max(best, most[i]);
    for (int64_t i = whole; i < size; i++) best = x[i] > best ? x[i] : best;

    std::copy(x, x + size, weights.begin());
    std::fill(weights.begin() + size, weights.end(), -INFINITY);
    double total = 0;
    for (int64_t block = 0; block < padded; block += kBlock) {
        Wide sum = {};
        for (int64_t i = block; i < block + kBlock; i += kWide) {
            Wide v = exp_or_zero((load_wide(&weights[i]) - best) / s.temperature);
            v = v >= s.min_p ? v : Wide{};  // the largest weight is 1; NaN is none
            std::memcpy(&weights[i], &v, sizeof v);
            sum += v;
        }
        double block_sum = 0;
        for (int i = 0; i < kWide; i++) block_sum += sum[i];
        sums[block / kBlock] = block_sum;
        total += block_sum;
    }
    double draw = s.uniform * total, before = 0;
    int64_t block = first_beyond(draw, 0, padded / kBlock, 0, [&](int64_t i) { return sums[i]; });
    for (int64_t i = 0; i < block; i++) before += sums[i];
    return first_beyond(draw, block * kBlock, std::min(size, (block + 1) * kBlock), before, [&](int64_t i) { return weights[i]; });
}

// Among candidates in descending order, as few as reach a probability of top_p together.
int64_t draw_among(std::vector<Entry>& found, const Settings& s) {
    float best = found[0].value;
    double total = 0, before = 0, left = 0;
    for (Entry& e : found) e.value = exp_or_zero(Vec{} + (e.value - best) / s.temperature)[0], total += e.value;
    for (Entry& e : found) {
        if (e.value < s.min_p) e.value = 0;
        float weight = e.value;
        if (s.top_p < 1 && before >= s.top_p * total) e.value = 0;
        before += weight, left += e.value;
    }
    // In the order of the vocabulary: another rounding, as of other company, swaps candidates that nearly tie, and then
    // the same draw would mean another token.
    std::sort(found.begin(), found.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
    return found[first_beyond(s.uniform * left, 0, int64_t(found.size()), 0, [&](int64_t i) { return found[i].value; })].id;
}

}  // namespace

// x (rows, size) and settings (rows) -> chosen (rows), each in [0, size). k: candidates, all if 0; where there are settings of
// top_p, k is not 0. top_p and min_p may be null.
extern "C" void draw(const float* x, int64_t rows, int64_t size, int64_t k, const float* temperature, const float* top_p,
                     const float* min_p, const float* uniform, int64_t* chosen) {
#pragma omp parallel if (rows * size >= kThreadsFrom)
    {
        std::vector<Entry> found;
        std::vector<float> weights;
        std::vector<double> sums;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            Settings s{temperature[row], top_p ? top_p[row] : 1, min_p ? min_p[row] : 0, uniform[row]};
            if (k) {
                top_k(x + row * size, size, k, found);
                chosen[row] = draw_among(found, s);
            } else {
                chosen[row] = draw_any(x + row * size, size, s, weights, sums);
            }
        }
    }
}
