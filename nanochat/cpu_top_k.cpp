// The k largest of each row on a processor, in descending order; of equal ones the first.
//
// Values are dealt into groups. The k-th largest of the groups' maxima is a bound that k values reach, and with
// several groups per wanted value few more do: what is left to sort are some k values, after reading the row twice.
// Compiled once per machine and called by sampling.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

constexpr int64_t kGroupsPerValue = 5, kBlock = 32;  // kBlock values are compared at once

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

}  // namespace

// x (rows, size) -> values and ids (rows, k), 1 <= k <= size. NaN comes last, as minus infinity.
extern "C" void top_k(const float* x, int64_t rows, int64_t size, int64_t k, float* values, int64_t* ids) {
    std::vector<float> maxima((kGroupsPerValue * k + kBlock - 1) / kBlock * kBlock);
    std::vector<Entry> found;
    for (int64_t row = 0; row < rows; row++, x += size, values += k, ids += k) {
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
        for (int64_t i = 0; i < k; i++) values[i] = found[i].value, ids[i] = found[i].id;
    }
}
