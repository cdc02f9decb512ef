// Scalar functions of inner products entry by entry, in one pass, as feature maps need them (SPEC F3).
#pragma once

#include <algorithm>

#include "functions.hpp"

namespace {

// What the factors before leave in B: negated cosines for relu, numbers to raise to powers, exponents for the rest.
// shift is subtracted from exponents, so that rows of equal directions are 1.
template <class T>
ALWAYS_INLINE Vector<T> value_of(Function function, int degree, T shift, Vector<T> b) {
    constexpr double PI = 3.14159265358979323846, LOG2_E = 1.44269504088896340736;
    if (function == Function::relu) return kappa_1<T>(-b) * T(PI);
    if (function == Function::power) return to_the(b, degree);
    const Vector<T> value = power_of_2(Vector<T>((b - shift) * T(LOG2_E)));
    return b == b ? value : b;  // on narrow vectors the power of what is no number would be 0
}

template <class T, Function FUNCTION>
void map_entries(int degree, T shift, int64_t n, int64_t m, const T* weights, T* B) {
    for (int64_t i = 0; i < n; ++i, B += m) {
        const T weight = weights ? weights[i] : T(1);
        for (int64_t j = 0; j < m; j += LANES<T>) {
            const size_t bytes = std::min<int64_t>(LANES<T>, m - j) * sizeof(T);
            Vector<T> b{};
            if (bytes == sizeof(b))
                std::memcpy(&b, B + j, sizeof(b));
            else
                std::memcpy(&b, B + j, bytes);
            b = value_of<T>(FUNCTION, degree, shift, b) * weight;
            if (bytes == sizeof(b))
                std::memcpy(B + j, &b, sizeof(b));
            else
                std::memcpy(B + j, &b, bytes);
        }
    }
}

template <class T>
void map_entries(Function function, int degree, T shift, int64_t n, int64_t m, const T* weights, T* B) {
    if (function == Function::exponential)
        map_entries<T, Function::exponential>(degree, shift, n, m, weights, B);
    else if (function == Function::relu)
        map_entries<T, Function::relu>(degree, shift, n, m, weights, B);
    else
        map_entries<T, Function::power>(degree, shift, n, m, weights, B);
}

}  // namespace
