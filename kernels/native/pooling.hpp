// Pooling along one axis of a pair of rows, and the sums over rows that complete it.
#pragma once

#include "plan.hpp"

namespace {

template <int COUNT, class Action>
ALWAYS_INLINE void tile(int at, int n, const Action& action) {
    if (n == COUNT)
        action(at, std::integral_constant<int, COUNT>{});
    else if constexpr (COUNT > 1)
        tile<COUNT - 1>(at, n, action);
}

// Calls action(position, count) for pieces of a range of about equal size, at most MOST.
template <int MOST, class Action>
ALWAYS_INLINE void in_tiles(Range range, const Action& action) {
    for (int left = (range.size() + MOST - 1) / MOST, at = range.begin; left > 0; --left) {
        const int n = (range.end - at) / left;
        tile<MOST>(at, n, action);
        at += n;
    }
}

// out[p * out_step] = factor * the pooled in[.. * step], for p in `range`.
template <class T, int TAPS, int STRIDE>
void pool_regular(const RegularTaps<T>& taps, Range range, const Vector<T>* in, int step, Vector<T> factor,
                  Vector<T>* out, int out_step) {
    constexpr int PAIRS = TAPS / 2;
    Vector<T> weight[PAIRS + 1];
    for (int t = 0; t <= PAIRS; ++t) weight[t] = taps.weight[t] * factor;
    in_tiles<5>(range, [&](int p, auto count) ALWAYS_INLINE_LAMBDA {
        constexpr int COUNT = decltype(count)::value, INPUTS = (COUNT - 1) * STRIDE + TAPS;
        const Vector<T>* first = in + (taps.first + p * STRIDE) * step;
        Vector<T> value[INPUTS], sum[COUNT];
        for (int k = 0; k < INPUTS; ++k) value[k] = first[k * step];
        for (int m = 0; m < COUNT; ++m) {
            const Vector<T>* window = &value[m * STRIDE];
            sum[m] = weight[0] * (window[0] + window[TAPS - 1]);
            for (int t = 1; t < PAIRS; ++t) sum[m] += weight[t] * (window[t] + window[TAPS - 1 - t]);
            if (TAPS % 2) sum[m] += weight[PAIRS] * window[PAIRS];
        }
        for (int m = 0; m < COUNT; ++m) out[(p + m) * out_step] = sum[m];
    });
}

template <class T>
void pool(const Level<T>& level, Range range, const Vector<T>* in, int step, Vector<T> factor, Vector<T>* out,
          int out_step) {
    const RegularTaps<T>& regular = level.regular_taps;
    const size_t count = regular.exists ? regular.weight.size() : 0;
    if (count == 5 && regular.stride == 2)
        return pool_regular<T, 5, 2>(regular, range, in, step, factor, out, out_step);
    if (count == 3 && regular.stride == 1)
        return pool_regular<T, 3, 1>(regular, range, in, step, factor, out, out_step);
    if (count == 2 && regular.stride == 2)
        return pool_regular<T, 2, 2>(regular, range, in, step, factor, out, out_step);
    const Taps<T>& taps = level.taps;
    for (int p = range.begin; p < range.end; ++p) {
        Vector<T> sum{};
        for (int t = taps.first[p]; t < taps.first[p + 1]; ++t)
            sum += taps.weight[t] * in[taps.input[t] * step];
        out[p * out_step] = sum * factor;
    }
}

// out[k] += the terms of an update, for k in `range`; rows: (ring, size).
template <class T>
void add_rows(const Level<T>& level, RowUpdate update, const Vector<T>* rows, int size, Range range,
              Vector<T>* out) {
    // Wide windows take more than one pass.
    in_tiles<5>({update.first, update.first + update.count}, [&](int at, auto count) ALWAYS_INLINE_LAMBDA {
        constexpr int COUNT = decltype(count)::value;
        const Vector<T>* row[COUNT];
        T weight[COUNT];
        for (int t = 0; t < COUNT; ++t) {
            row[t] = rows + level.slot[at + t] * size;
            weight[t] = level.slot_weight[at + t];
        }
        for (int k = range.begin; k < range.end; ++k) {
            Vector<T> sum = out[k];
            for (int t = 0; t < COUNT; ++t) sum += weight[t] * row[t][k];
            out[k] = sum;
        }
    });
}

}  // namespace
