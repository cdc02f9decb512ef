// Vectors of numbers, one lane for each of several images, as wide as the instruction set of this build
// allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr size_t VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr size_t VECTOR_BYTES = 32;
#else
constexpr size_t VECTOR_BYTES = 16;
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t integers __attribute__((vector_size(VECTOR_BYTES)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

// The same number in all lanes. Subtracting zero is exact for either sign of zero, so that it costs nothing.
ALWAYS_INLINE Vector<float> spread(float value) { return value - Vector<float>{}; }
ALWAYS_INLINE Vector<double> spread(double value) { return value - Vector<double>{}; }
ALWAYS_INLINE Vector<float> spread(Vector<float> value) { return value; }
ALWAYS_INLINE Vector<double> spread(Vector<double> value) { return value; }

ALWAYS_INLINE float lane_of(float value, int) { return value; }
ALWAYS_INLINE double lane_of(double value, int) { return value; }
ALWAYS_INLINE float lane_of(const Vector<float>& value, int lane) { return value[lane]; }
ALWAYS_INLINE double lane_of(const Vector<double>& value, int lane) { return value[lane]; }

// 0 where all n numbers are finite, otherwise NaN.
template <class T>
T defect(const T* numbers, size_t n) {
    Vector<T> sum{};
    size_t k = 0;
    for (; k + LANES<T> <= n; k += LANES<T>) {
        Vector<T> several;
        std::memcpy(&several, numbers + k, sizeof(several));
        sum += several - several;
    }
    T total = 0;
    for (int lane = 0; lane < LANES<T>; ++lane) total += sum[lane];
    for (; k < n; ++k) total += numbers[k] - numbers[k];
    return total;
}

template <class V>
ALWAYS_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1)
template <class V, class T, size_t N>
ALWAYS_INLINE V polynomial(const T (&c)[N], V x) {
    V p = spread(c[N - 1]);
    for (size_t k = N - 1; k-- > 0;) p = p * x + c[k];
    return p;
}

// The square root of d >= a tiny positive number.
ALWAYS_INLINE Vector<double> square_root(Vector<double> d) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (Vector<double>)_mm512_sqrt_pd((__m512d)d);
#elif defined(__AVX2__)
    return (Vector<double>)_mm256_sqrt_pd((__m256d)d);
#elif defined(__SSE2__)
    return (Vector<double>)_mm_sqrt_pd((__m128d)d);
#elif defined(__aarch64__)
    return (Vector<double>)vsqrtq_f64((float64x2_t)d);
#else
    for (int lane = 0; lane < LANES<double>; ++lane) d[lane] = __builtin_sqrt(d[lane]);
    return d;
#endif
}

ALWAYS_INLINE Vector<float> square_root(Vector<float> d) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    // An estimate with 14 bits and one step of Newton's: multiplications alone, without the unit that divides.
    const Vector<float> inverse = (Vector<float>)_mm512_rsqrt14_ps((__m512)d);
    const Vector<float> root = d * inverse;
    return root + root * (0.5f - root * (0.5f * inverse));
#elif defined(__AVX2__)
    return (Vector<float>)_mm256_sqrt_ps((__m256)d);
#elif defined(__SSE2__)
    return (Vector<float>)_mm_sqrt_ps((__m128)d);
#elif defined(__aarch64__)
    return (Vector<float>)vsqrtq_f32((float32x4_t)d);
#else
    for (int lane = 0; lane < LANES<float>; ++lane) d[lane] = __builtin_sqrtf(d[lane]);
    return d;
#endif
}

// 2^x; 0 where that is below the smallest normal number. Minimax polynomials of 2^f: relative error 7.5e-8 in
// float, 4e-17 in double, before rounding.
#if defined(__AVX512F__) && defined(__AVX512DQ__)

ALWAYS_INLINE Vector<float> power_of_2(Vector<float> x) {
    constexpr float c[] = {0.99999994f,   0.693153083f,  0.240153611f,
                           0.0558263212f, 0.0089893369f, 0.00187757751f};
    const auto fraction =
        (Vector<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (Vector<float>)_mm512_scalef_ps((__m512)polynomial(c, fraction), (__m512)x);
}

ALWAYS_INLINE Vector<double> power_of_2(Vector<double> x) {
    constexpr double c[] = {1.0,
                            0.69314718055994629,
                            0.2402265069590547,
                            0.055504108665711156,
                            0.0096181290987925501,
                            0.0013333558661577745,
                            0.00015403511446464594,
                            1.5253190248810176e-05,
                            1.3208193501292039e-06,
                            1.0254457302700387e-07,
                            6.5544576166575785e-09,
                            6.2724334194915649e-10};
    const auto fraction =
        (Vector<double>)_mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (Vector<double>)_mm512_scalef_pd((__m512d)polynomial(c, fraction), (__m512d)x);
}

#else

// Adding `magic` rounds x to an integer, which then stands in the low bits of the sum.
template <class T, size_t N>
ALWAYS_INLINE Vector<T> power_of_2(Vector<T> x, const T (&c)[N], T magic, int mantissa_bits, T smallest) {
    using Integers = typename VectorOf<T>::integers;
    const Vector<T> shifted = x + magic;
    const Vector<T> power = polynomial(c, x - (shifted - magic));
    const Vector<T> scaled = (Vector<T>)((Integers)power + ((Integers)shifted << mantissa_bits));
    return x > smallest ? scaled : Vector<T>{};
}

ALWAYS_INLINE Vector<float> power_of_2(Vector<float> x) {
    constexpr float c[] = {1.00000012f,   0.693146944f,   0.240221202f,
                           0.0555071309f, 0.00967554096f, 0.00132764783f};
    return power_of_2(x, c, 12582912.0f, 23, -125.0f);
}

ALWAYS_INLINE Vector<double> power_of_2(Vector<double> x) {
    constexpr double c[] = {1.0,
                            0.69314718055994529,
                            0.24022650695910155,
                            0.055504108664819925,
                            0.0096181291075883354,
                            0.0013333558146789964,
                            0.00015403530462513535,
                            1.5252733489948579e-05,
                            1.3215433090103254e-06,
                            1.0178198038247798e-07,
                            7.0741055407433757e-09,
                            4.43528020546361e-10};
    return power_of_2(x, c, 6755399441055744.0, 52, -1021.0);
}

#endif

}  // namespace
