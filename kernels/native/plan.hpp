// What a network makes of all pairs of images alike: pooling as taps, supports as ranges, the order of the
// work.
#pragma once

#include <algorithm>
#include <vector>

#include "functions.hpp"

extern "C" {

struct LayerDescription {
    int32_t function;     // as in Function
    int32_t degree;       // of a power
    int32_t homogeneous;  // 0 for the power that does not divide by norms (square)
    int32_t patch;
    int32_t height, width, pooled_height, pooled_width;
    int32_t passes_on;      // there is a next layer, and pooling changes nothing
    int32_t halved;  // of a pair of rows and its mirror image only one is in the support, and counts for both
    double number;          // 1/sigma^2 of the exponential, scale of the linear function, else 1
    double floor;           // norms below it normalise no further (K2)
    double patch_weight;    // of a sum over a patch (C2)
    const double* rows;     // (pooled_height, height), pooling of rows
    const double* columns;  // (pooled_width, width)
    const uint8_t*
        support_rows;  // (height, height), pairs of rows at which the layer's function is needed (C9)
    const uint8_t* support_columns;  // (width, width)
    const uint8_t*
        pooled_rows;  // (pooled_height, pooled_height), pairs of rows that the next layer's patches need
    const uint8_t* pooled_columns;  // (pooled_width, pooled_width)
};

struct NetworkDescription {
    int32_t layers, channels, periodic, tangent;
    const LayerDescription* layer;
    const double* row_weights;     // (height, height) of the last layer: weights of the trace (C9)
    const double* column_weights;  // (width, width)
};

}  // extern "C"

namespace {

struct Range {
    int begin = 0, end = 0;
    bool empty() const { return begin >= end; }
    int size() const { return end - begin; }
    void include(Range other) {
        if (other.empty()) return;
        *this = empty() ? other : Range{std::min(begin, other.begin), std::max(end, other.end)};
    }
};

// The hull of what is true in each row of an n x n mask.
inline std::vector<Range> hulls(const uint8_t* mask, int n) {
    std::vector<Range> result(n);
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < n; ++k)
            if (mask[i * n + k]) result[i].include({k, k + 1});
    return result;
}

inline int wrapped(int i, int n) { return ((i % n) + n) % n; }

// The offsets of a patch along one axis go from -before to after (C2).
struct Patch {
    int size, before, after;
    explicit Patch(int size) : size(size), before(size - 1 - (size - 1) / 2), after((size - 1) / 2) {}
};

// A pooling matrix by its rows: output o takes weight[t] of input[t], t from first[o] to first[o + 1].
template <class T>
struct Taps {
    std::vector<int> first{0}, input;
    std::vector<T> weight;

    int outputs() const { return int(first.size()) - 1; }

    Taps() = default;
    Taps(const double* matrix, int outputs, int inputs) {
        for (int o = 0; o < outputs; ++o) {
            for (int i = 0; i < inputs; ++i)
                if (matrix[o * inputs + i] != 0) {
                    input.push_back(i);
                    weight.push_back(T(matrix[o * inputs + i]));
                }
            first.push_back(int(input.size()));
        }
    }
};

// What most pooling matrices are: each output takes the same, symmetric taps of inputs `stride` further than
// those of the output before. Inputs beyond the border count as zeros; `left` and `right` of them are taken.
template <class T>
struct RegularTaps {
    bool exists = false;
    int stride = 0, first = 0, left = 0, right = 0;  // output 0 takes inputs from `first` on
    std::vector<T> weight;

    RegularTaps() = default;
    RegularTaps(const Taps<T>& taps, int inputs) {
        const int outputs = taps.outputs(), middle = outputs / 2;
        const auto input = [&](int o) { return taps.input[taps.first[o]]; };
        for (int o = 0; o < outputs; ++o)
            if (taps.first[o] == taps.first[o + 1] ||
                taps.input[taps.first[o + 1] - 1] - input(o) != taps.first[o + 1] - 1 - taps.first[o])
                return;  // nothing, or more than one piece
        stride = outputs > 1 ? input(middle) - input(middle - 1) : 1;
        first = input(middle) - middle * stride;
        weight.assign(&taps.weight[taps.first[middle]],
                      &taps.weight[taps.first[middle]] + (taps.first[middle + 1] - taps.first[middle]));
        const int count = int(weight.size());
        for (int t = 0; t < count; ++t)
            if (weight[t] != weight[count - 1 - t]) return;
        for (int o = 0; o < outputs; ++o)
            for (int t = 0, at = taps.first[o]; t < count; ++t) {
                const int i = first + o * stride + t;
                if (i < 0 || i >= inputs) continue;
                if (at == taps.first[o + 1] || taps.input[at] != i || taps.weight[at] != weight[t]) return;
                ++at;
                if (t == count - 1 && at != taps.first[o + 1]) return;
            }
        left = std::max(0, -first);
        right = std::max(0, first + (outputs - 1) * stride + count - inputs);
        exists = true;
    }
};

// Pairs of rows (r, r + displacement) that lie on the grid.
struct Displacement {
    int rows;
    Range first;  // of the first image
};

// One pair of pooled rows gets weight[t] of the pooled columns in slot[t], t from first to first + count.
struct RowUpdate {
    int block, first, count;
};

template <class T>
struct Level {
    LayerDescription layer;
    Patch patch;
    int height, width;
    bool periodic, last;
    std::vector<uint8_t> rows;   // (height, height): pairs of rows at which the function is needed
    std::vector<Range> columns;  // for each column of the first image those of the second
    std::vector<Displacement> displacements;

    // A layer that is not the last:
    int pooled_height = 0, pooled_width = 0;
    Taps<T> taps;                      // of columns
    RegularTaps<T> regular_taps;       // the same, where they are regular
    std::vector<Range> second_pooled;  // for each column of the first image pooled columns of the second
    std::vector<Range> first_pooled;   // for each pooled column of the second image those of the first
    std::vector<Range> runs;           // pairs of pooled columns that are needed, as runs of (width, width)
    int ring = 1;                      // pooled columns are kept for so many pairs of rows
    std::vector<int> updates_begin;    // for each displacement and row: updates that are due after it
    std::vector<RowUpdate> updates;
    std::vector<int> slot;
    std::vector<T> slot_weight;

    // The last layer:
    std::vector<T> row_weights, column_weights;

    Level(const LayerDescription& layer, bool periodic, bool last)
        : layer(layer),
          patch(layer.patch),
          height(layer.height),
          width(layer.width),
          periodic(periodic),
          last(last) {}

    int positions() const { return height * width; }
    int pooled_positions() const { return pooled_height * pooled_width; }
    bool needs(int r, int s) const { return rows[r * height + s]; }
    int second_row(int r, int displacement) const {
        return periodic ? wrapped(r + displacement, height) : r + displacement;
    }
};

template <class T>
struct Plan {
    int channels;
    bool periodic;
    int tangent;  // 0: B alone, 1: T alone, 2: both
    std::vector<Level<T>> levels;
    int chain;  // so many first layers act on pairs of equal displacement apart: none of them pools but the
                // last

    int arrays() const { return tangent ? 2 : 1; }

    // The most memory that the plan takes, which is while it is made.
    size_t bytes() const {
        const auto of = [](const auto&... arrays) {
            return (... + (arrays.capacity() * sizeof(*arrays.data())));
        };
        size_t total = of(levels);
        for (const Level<T>& level : levels) {
            total += of(level.rows, level.columns, level.displacements, level.taps.first, level.taps.input,
                        level.taps.weight, level.regular_taps.weight, level.second_pooled, level.first_pooled,
                        level.runs, level.slot, level.slot_weight, level.row_weights, level.column_weights);
            // Updates are sorted by the row after which they are due.
            total += 3 * of(level.updates) + of(level.updates_begin);
            total += level.updates_begin.size() * sizeof(std::vector<RowUpdate>);
        }
        return total;
    }

    explicit Plan(const NetworkDescription& network);

  private:
    void pool(Level<T>& level);
    void plan_row_updates(Level<T>& level);
};

template <class T>
Plan<T>::Plan(const NetworkDescription& network)
    : channels(network.channels), periodic(network.periodic), tangent(network.tangent) {
    for (int number = 0; number < network.layers; ++number) {
        const LayerDescription& layer = network.layer[number];
        const int h = layer.height, w = layer.width;
        Level<T> level(layer, periodic, number == network.layers - 1);
        level.rows.assign(layer.support_rows, layer.support_rows + h * h);
        level.columns = hulls(layer.support_columns, w);
        for (int d = periodic ? 0 : 1 - h; d < h; ++d) {
            Displacement displacement{d, periodic ? Range{0, h} : Range{std::max(0, -d), std::min(h, h - d)}};
            bool needed = false;
            for (int r = displacement.first.begin; r < displacement.first.end; ++r)
                needed |= level.needs(r, level.second_row(r, d));
            if (needed) level.displacements.push_back(displacement);
        }
        if (level.last) {
            level.row_weights.assign(network.row_weights, network.row_weights + h * h);
            level.column_weights.assign(network.column_weights, network.column_weights + w * w);
        } else {
            pool(level);
        }
        levels.push_back(std::move(level));
    }
    chain = 1;
    while (levels[chain - 1].layer.passes_on) ++chain;
}

template <class T>
void Plan<T>::pool(Level<T>& level) {
    const LayerDescription& layer = level.layer;
    const int w = level.width, pooled_w = level.pooled_width = layer.pooled_width;
    level.pooled_height = layer.pooled_height;
    level.taps = Taps<T>(layer.columns, pooled_w, w);
    level.regular_taps = RegularTaps<T>(level.taps, w);
    const auto needed = hulls(layer.pooled_columns, pooled_w);
    level.second_pooled.resize(w);
    level.first_pooled.resize(pooled_w);
    for (int o = 0; o < pooled_w; ++o) {
        for (int c = 0; c < w; ++c)
            if (layer.columns[o * w + c] != 0) level.second_pooled[c].include(needed[o]);
        for (int p = needed[o].begin; p < needed[o].end; ++p) level.first_pooled[p].include({o, o + 1});
    }
    // Runs are in the order of the pooled array: (columns of the first image, columns of the second).
    for (int o = 0; o < pooled_w; ++o) {
        if (needed[o].empty()) continue;
        const Range run{o * pooled_w + needed[o].begin, o * pooled_w + needed[o].end};
        if (!level.runs.empty() && level.runs.back().end == run.begin)
            level.runs.back().end = run.end;
        else
            level.runs.push_back(run);
    }
    plan_row_updates(level);
}

// A pair of pooled rows takes pairs of rows of one displacement after the other. What it takes of one
// displacement is added in one go once the last of these rows was done; `ring` of them are kept.
template <class T>
void Plan<T>::plan_row_updates(Level<T>& level) {
    constexpr int LONGEST_RING = 12;
    const int h = level.height, pooled_h = level.pooled_height;
    const double* H = level.layer.rows;
    std::vector<Range> window(pooled_h);
    for (int o = 0; o < pooled_h; ++o) {
        for (int r = 0; r < h; ++r)
            if (H[o * h + r] != 0) window[o].include({r, r + 1});
        level.ring = std::max(level.ring, std::min(window[o].size(), LONGEST_RING));
    }
    struct Due {
        int displacement, row, block;
        std::vector<int> slots;
        std::vector<T> weights;
    };
    std::vector<std::vector<RowUpdate>> due(level.displacements.size() * h);
    for (size_t number = 0; number < level.displacements.size(); ++number) {
        const Displacement& displacement = level.displacements[number];
        for (int o = 0; o < pooled_h; ++o)
            for (int p = 0; p < pooled_h; ++p) {
                if (!level.layer.pooled_rows[o * pooled_h + p]) continue;
                int first_row = 0, last_row = 0;
                RowUpdate update{o * pooled_h + p, int(level.slot.size()), 0};
                const auto close = [&] {
                    if (update.count) due[number * h + last_row].push_back(update);
                    update.first = int(level.slot.size());
                    update.count = 0;
                };
                const int end = std::min(displacement.first.end, window[o].end);
                for (int r = std::max(displacement.first.begin, window[o].begin); r < end; ++r) {
                    const int s = level.second_row(r, displacement.rows);
                    if (level.layer.halved && !level.needs(r, s)) continue;
                    const int count = level.layer.halved && r != s ? 2 : 1;
                    const double weight = count * H[o * h + r] * H[p * h + s];
                    if (weight == 0) continue;
                    if (update.count && r - first_row >= level.ring) close();
                    if (!update.count) first_row = r;
                    last_row = r;
                    level.slot.push_back(r % level.ring);
                    level.slot_weight.push_back(T(weight));
                    ++update.count;
                }
                close();
            }
    }
    for (const auto& updates : due) {
        level.updates_begin.push_back(int(level.updates.size()));
        level.updates.insert(level.updates.end(), updates.begin(), updates.end());
    }
    level.updates_begin.push_back(int(level.updates.size()));
}

}  // namespace
