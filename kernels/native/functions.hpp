// Scalar functions of a cosine (K3, K5, K6), on rows of the cross-Gram array, with the norms of both sides.
#pragma once

#include <type_traits>

#include "vector.hpp"

namespace {

enum class Function : int32_t { exponential = 0, relu = 1, power = 2 };

// With t = |u| and s = sqrt(1 - t), both arc-cosine functions are smooth functions of t times s:
//   kappa_1(u) = max(u, 0) + s Q(t),   kappa_0(u) = [u >= 0] - sign(u) s P(t),
//   P(t) = arccos(t) / (pi s),         Q(t) = sqrt(1 + t) / pi - t P(t).
// Minimax polynomials; absolute errors of s P and s Q: 7e-9 and 1.2e-8 in float, 3e-16 and 2e-16 in double.
template <class T>
struct ArcCosine;

template <>
struct ArcCosine<float> {
    static constexpr float tiny = 1e-30f;
    static constexpr float P[] = {0.5f,        -0.0683096945f,  0.0283367019f,  -0.0160627458f,
                                  0.01012096f, -0.00589903584f, 0.00248496421f, -0.000513103732f};
    static constexpr float Q[] = {0.318309873f,   -0.34084478f,    0.0285124779f,  -0.00836854149f,
                                  0.00338874524f, -0.00125602435f, 0.000258410175f};
};

template <>
struct ArcCosine<double> {
    static constexpr double tiny = 1e-300;
    static constexpr double P[] = {0.5,
                                   -0.068309886183772081,
                                   0.028345056904518232,
                                   -0.016167854809545214,
                                   0.010721081108451727,
                                   -0.0077585065486214739,
                                   0.0059427665187304574,
                                   -0.004733043089628409,
                                   0.0038631844305803157,
                                   -0.0031666501445985523,
                                   0.0025162874093219837,
                                   -0.0018370062526730064,
                                   0.0011521646815516196,
                                   -0.00057560222493927644,
                                   0.00020930255220055085,
                                   -4.8435715636724196e-05,
                                   5.2994426227134172e-06};
    static constexpr double Q[] = {
        0.31830988618379069,    -0.34084505690809447,    0.028521150409073433,   -0.0084506889327509108,
        0.0037338729576399171,  -0.0020172716033454779,  0.0012305001831209817,  -0.00081311044541223067,
        0.00056526077561197985, -0.00039944538979821016, 0.00027226108618384651, -0.00016640956008592036,
        8.3601885025288679e-05, -3.1178278831983556e-05, 7.4805875731524453e-06, -8.5294970571728721e-07};
};

// kappa_1(u), and kappa_0(u) where it is asked for; |u| may exceed 1 by rounding.
template <class T>
ALWAYS_INLINE Vector<T> kappa_1(Vector<T> u, Vector<T>* kappa_0 = nullptr) {
    const Vector<T> t = larger(u, -u);
    const Vector<T> s = square_root(larger(1 - t, spread(ArcCosine<T>::tiny)));
    if (kappa_0) {
        const Vector<T> upper = s * polynomial(ArcCosine<T>::P, t);
        *kappa_0 = u < 0 ? upper : 1 - upper;
    }
    return s * polynomial(ArcCosine<T>::Q, t) + larger(u, Vector<T>{});
}

template <class V>
ALWAYS_INLINE V to_the(V u, int degree) {
    V result = degree % 2 ? u : V{} + 1;
    for (V square = u * u; degree >>= 1; square *= square)
        if (degree % 2) result *= square;
    return result;
}

// Rows of numbers whose sum is taken: row[0][offset + k] + row[1][offset + k] + ...
template <class T>
struct Rows {
    const Vector<T>* const* row;
    int count;
    ptrdiff_t offset;
};

template <class T, int COUNT>
ALWAYS_INLINE Vector<T> sum_at(const Rows<T>& rows, const Vector<T>* const (&row)[3], int k) {
    if constexpr (COUNT == 3) return row[0][k] + row[1][k] + row[2][k];
    Vector<T> sum = row[0][k];
    for (int r = 1; r < rows.count; ++r) sum += rows.row[r][rows.offset + k];
    return sum;
}

// What a position of an image multiplies before and after the scalar function: the inverse norm with all
// constant factors, and the norm. The first image has either one position for the whole row of entries ...
template <class X>
struct OnePosition {
    X before_, after_;
    ALWAYS_INLINE auto before(int) const { return spread(before_); }
    ALWAYS_INLINE auto after(int) const { return spread(after_); }
};

// ... or one for each entry.
template <class X>
struct EachPosition {
    const X *before_, *after_;
    ALWAYS_INLINE auto before(int k) const { return spread(before_[k]); }
    ALWAYS_INLINE auto after(int k) const { return spread(after_[k]); }
};

// The second images; `addend` is the logarithm of the norm and of all constants, for the exponential.
template <class T>
struct SecondPositions {
    const Vector<T>*before, *after, *addend;
};

template <class T>
struct ScalarFunction {
    Function function;
    int degree;
    bool tangent;
    bool first_layer;  // the tangent array before the function is B itself
    T tangent_weight;  // what makes the sum over a patch the tangent array before the function
};

template <class T, Function FUNCTION, bool FOLDED, int COUNT, class First>
void map_rows(int degree, const Rows<T>& rows, First first, SecondPositions<T> second, int n,
              Vector<T>* out) {
    const Vector<T>* const row[3] = {rows.row[0] + rows.offset,
                                     COUNT == 3 ? rows.row[1] + rows.offset : nullptr,
                                     COUNT == 3 ? rows.row[2] + rows.offset : nullptr};
    for (int k = 0; k < n; ++k) {
        const Vector<T> u = sum_at<T, COUNT>(rows, row, k) * first.before(k) * second.before[k];
        Vector<T> value;
        if constexpr (FUNCTION == Function::exponential)
            value = power_of_2(u + second.addend[k]);
        else if constexpr (FUNCTION == Function::relu)
            value = kappa_1<T>(u) * second.after[k];
        else
            value = to_the(u, degree) * second.after[k];
        out[k] = FOLDED ? value : value * first.after(k);
    }
}

template <class T, bool FIRST_LAYER, int COUNT, class First>
void map_tangent_rows(T weight, const Rows<T>& rows, const Rows<T>& tangent_rows, First first,
                      SecondPositions<T> second, int n, Vector<T>* out, Vector<T>* tangent_out) {
    const Vector<T>* const row[3] = {rows.row[0] + rows.offset,
                                     COUNT == 3 ? rows.row[1] + rows.offset : nullptr,
                                     COUNT == 3 ? rows.row[2] + rows.offset : nullptr};
    const Vector<T>* const tangent_row[3] = {
        tangent_rows.row[0] + tangent_rows.offset,
        COUNT == 3 ? tangent_rows.row[1] + tangent_rows.offset : nullptr,
        COUNT == 3 ? tangent_rows.row[2] + tangent_rows.offset : nullptr};
    for (int k = 0; k < n; ++k) {
        const Vector<T> v = sum_at<T, COUNT>(rows, row, k);
        const Vector<T> before = FIRST_LAYER ? v : sum_at<T, COUNT>(tangent_rows, tangent_row, k);
        Vector<T> kappa_0;
        // The factors first, so that the two images may change sides: kappa_0 makes 1e-11 of a last bit.
        const Vector<T> u = v * (first.before(k) * second.before[k]);
        const Vector<T> value = kappa_1<T>(u, &kappa_0) * (first.after(k) * second.after[k]);
        out[k] = value;
        tangent_out[k] = before * weight * kappa_0 + value;
    }
}

// The scalar function on n entries of a row; FOLDED leaves the norm of the first image for the caller to
// multiply.
template <class T, bool FOLDED, class First>
void apply(const ScalarFunction<T>& f, const Rows<T>& rows, const Rows<T>& tangent_rows, First first,
           SecondPositions<T> second, int n, Vector<T>* out, Vector<T>* tangent_out) {
    const auto map = [&](auto count) {
        constexpr int COUNT = decltype(count)::value;
        if (f.tangent) {
            const auto tangent = [&](auto first_layer) {
                map_tangent_rows<T, decltype(first_layer)::value, COUNT>(f.tangent_weight, rows, tangent_rows,
                                                                         first, second, n, out, tangent_out);
            };
            f.first_layer ? tangent(std::true_type{}) : tangent(std::false_type{});
        } else if (f.function == Function::exponential)
            map_rows<T, Function::exponential, FOLDED, COUNT>(f.degree, rows, first, second, n, out);
        else if (f.function == Function::relu)
            map_rows<T, Function::relu, FOLDED, COUNT>(f.degree, rows, first, second, n, out);
        else
            map_rows<T, Function::power, FOLDED, COUNT>(f.degree, rows, first, second, n, out);
    };
    if (rows.count == 3)
        map(std::integral_constant<int, 3>{});
    else
        map(std::integral_constant<int, 0>{});
}

}  // namespace
