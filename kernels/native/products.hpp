// The first layer's inner products of patches: products over channels, summed along the diagonals of a pair
// of rows.
#pragma once

#include "plan.hpp"

namespace {

// Products over channels of BLOCK pixels of one row of the first image with pixels of a row of the second.
// x[b]: the channels of a pixel, nullptr for one beyond the border; y: (pixels, channels); out[b * pitch +
// k].
template <class T, class X, int BLOCK>
void products(const X* const (&x)[BLOCK], const Vector<T>* y, int channels, int pixels, Vector<T>* out,
              int pitch) {
    constexpr int SECOND = 4;
    const auto tile = [&](int k, auto second) ALWAYS_INLINE_LAMBDA {
        constexpr int N = decltype(second)::value;
        Vector<T> sum[BLOCK][N] = {};
        for (int channel = 0; channel < channels; ++channel)
            for (int b = 0; b < BLOCK; ++b)
                for (int m = 0; m < N; ++m)
                    sum[b][m] += spread(x[b][channel]) * y[(k + m) * channels + channel];
        for (int b = 0; b < BLOCK; ++b)
            for (int m = 0; m < N; ++m) out[b * pitch + k + m] = sum[b][m];
    };
    int k = 0;
    for (; k + SECOND <= pixels; k += SECOND) tile(k, std::integral_constant<int, SECOND>{});
    for (; k < pixels; ++k) tile(k, std::integral_constant<int, 1>{});
}

// out[c][k] = sum over e of in[c + e][k + e], for one c, k in `range`. The row `in` of c begins at column 0;
// rows are `pitch` apart.
template <class T>
void sum_diagonals(const Vector<T>* in, int pitch, Patch patch, Range range, Vector<T>* out) {
    for (int k = range.begin; k < range.end; ++k) {
        Vector<T> sum = in[k - patch.before * (pitch + 1)];
        for (int e = 1 - patch.before; e <= patch.after; ++e) sum += in[k + e * (pitch + 1)];
        out[k] = sum;
    }
}

// Both steps at once for patches of 3 x 3 and few channels, columns first .. first + BLOCK - 1 of the first
// image. x: a row of the first image; y: a row of the second with a pixel of zeros at either end. before,
// here: products of columns first - 1 and first, (width + 2) with zeros at the ends; they advance to those of
// the next block.
template <class T, class X, int CHANNELS, int BLOCK>
void summed_products(const X* x, const Vector<T>* y, int width, int first, Range range, Vector<T>* before,
                     Vector<T>* here, Vector<T>* out, int pitch) {
    Vector<T> pixel[BLOCK][CHANNELS];
    for (int b = 0; b < BLOCK; ++b)
        for (int channel = 0; channel < CHANNELS; ++channel) {
            const int c = first + 1 + b;
            pixel[b][channel] = c < width ? spread(x[c * CHANNELS + channel]) : Vector<T>{};
        }
    // product[b]: of column first - 1 + b with column k of the second image; previous: with column k - 1;
    // partial[b]: the two terms of the sum at (first + b, k - 1) that are known before column k.
    Vector<T> product[BLOCK + 2], previous[BLOCK], partial[BLOCK];
    const auto advance = [&](int k) ALWAYS_INLINE_LAMBDA {
        product[0] = before[k + 1];
        product[1] = here[k + 1];
        for (int b = 0; b < BLOCK; ++b) {
            Vector<T>
                sum{};  // beginning with zero fixes which product is fused into which sum, as in `products`
            for (int channel = 0; channel < CHANNELS; ++channel)
                sum += pixel[b][channel] * y[(k + 1) * CHANNELS + channel];
            product[b + 2] = sum;
        }
        before[k + 1] = product[BLOCK];
        here[k + 1] = product[BLOCK + 1];
    };
    const auto keep = [&]() ALWAYS_INLINE_LAMBDA {
        for (int b = 0; b < BLOCK; ++b) previous[b] = product[b];
    };
    advance(range.begin - 1);
    keep();
    advance(range.begin);
    for (int b = 0; b < BLOCK; ++b) partial[b] = previous[b] + product[b + 1];
    keep();
    for (int k = range.begin + 1; k <= range.end; ++k) {
        advance(k);
        for (int b = 0; b < BLOCK; ++b) {
            out[b * pitch + k - 1] = partial[b] + product[b + 2];
            partial[b] = previous[b] + product[b + 1];
        }
        keep();
    }
}

}  // namespace
