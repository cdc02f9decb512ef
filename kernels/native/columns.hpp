// A block of a matrix times a few columns, and its transpose times others, in one pass over the block.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.hpp"

namespace {

// So many rows of the block by so many columns of V are summed in registers: AVX-512 and 64-bit ARM have
// twice as many as the others.
#if defined(__aarch64__)
constexpr int STRIP = 8;
#else
constexpr int STRIP = VECTOR_BYTES == 64 ? 8 : 4;
#endif
constexpr int GROUP = 2;

// Rows of the next strip that the processor is asked for while a group of columns is multiplied. Into its second
// cache: the rows of a tile are a power of two apart, and would drive each other out of the first.
constexpr int AHEAD = 2;

// Columns of the block that are gone through at a time: so few that what goes with them stays in the cache, as
// much of V and as much of the result.
inline int64_t panel(int64_t t) { return std::clamp<int64_t>((1 << 15) / t / 64 * 64, 64, 1024); }

ALWAYS_INLINE Vector<double> load(const double* numbers) {
    Vector<double> found;
    std::memcpy(&found, numbers, sizeof(found));
    return found;
}
ALWAYS_INLINE Vector<double> load(const float* numbers) {
    typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    Half found;
    std::memcpy(&found, numbers, sizeof(found));
#if defined(__AVX512F__) && defined(__AVX512DQ__)  // what GCC 12 makes of the conversion takes twice as long
    return (Vector<double>)_mm512_cvtps_pd((__m256)found);
#elif defined(__AVX2__)
    return (Vector<double>)_mm256_cvtps_pd((__m128)found);
#else
    return __builtin_convertvector(found, Vector<double>);
#endif
}

// A strip of a block and a group of columns. V, out: [vector][column], a vector of consecutive rows of V, or of
// `out`, for each column. FORWARD: the lanes of `sums` add up to strip V; BACKWARD: out += strip^T factors.
// ahead: rows that will be wanted soon.
template <class T, bool FORWARD, bool BACKWARD>
void multiply(const T* const (&strip)[STRIP], const T* const (&ahead)[AHEAD], int64_t vectors,
              const Vector<double>* V, const double (&factors)[STRIP][GROUP],
              Vector<double> (&sums)[STRIP][GROUP], Vector<double>* out) {
    Vector<double> sum[STRIP][GROUP] = {};
    for (int64_t k = 0; k < vectors; ++k) {
        Vector<double> x[STRIP];
        for (int r = 0; r < STRIP; ++r) x[r] = load(strip[r] + k * LANES<double>);
        for (int r = 0; r < AHEAD; ++r) __builtin_prefetch(ahead[r] + k * LANES<double>, 0, 2);
        for (int c = 0; c < GROUP; ++c) {
            if (FORWARD)
                for (int r = 0; r < STRIP; ++r) sum[r][c] += x[r] * V[k * GROUP + c];
            if (BACKWARD) {
                Vector<double> column = out[k * GROUP + c];
                for (int r = 0; r < STRIP; ++r) column += x[r] * spread(factors[r][c]);
                out[k * GROUP + c] = column;
            }
        }
    }
    for (int r = 0; r < STRIP; ++r)
        for (int c = 0; c < GROUP; ++c) sums[r][c] = sum[r][c];
}

// Adds block V_columns to out_rows (FORWARD) and block^T V_rows to out_columns (BACKWARD), n x m with rows
// `pitch` bytes apart. All others have t columns, in C order. In which order sums are taken depends on n, m and t
// alone.
template <class T, bool FORWARD, bool BACKWARD>
void add_products(const char* block, int64_t pitch, int64_t n, int64_t m, int64_t t, const double* V_columns,
                  const double* V_rows, double* out_rows, double* out_columns) {
    constexpr int64_t L = LANES<double>;
    const int64_t most = panel(t), widest = (std::min(m, most) + L - 1) / L;
    const int64_t groups = (t + GROUP - 1) / GROUP;
    std::vector<Vector<double>> V(FORWARD ? groups * widest * GROUP : 0);
    std::vector<Vector<double>> out(BACKWARD ? groups * widest * GROUP : 0);
    std::vector<T> padded(STRIP * widest * L);
    const auto row_of = [&](int64_t i, int64_t first) {
        return reinterpret_cast<const T*>(block + i * pitch) + first;
    };
    const auto entry = [&](std::vector<Vector<double>>& packed, int64_t j, int64_t c) -> double& {
        const int64_t vector = (c / GROUP * widest + j / L) * GROUP + c % GROUP;
        return reinterpret_cast<double*>(packed.data())[vector * L + j % L];
    };
    for (int64_t first = 0; first < m; first += most) {
        const int64_t width = std::min(most, m - first), vectors = (width + L - 1) / L;
        std::fill(V.begin(), V.end(), Vector<double>{});
        std::fill(out.begin(), out.end(), Vector<double>{});
        if (FORWARD)
            for (int64_t j = 0; j < width; ++j)
                for (int64_t c = 0; c < t; ++c) entry(V, j, c) = V_columns[(first + j) * t + c];
        for (int64_t i = 0; i < n; i += STRIP) {
            const int64_t rows = std::min<int64_t>(STRIP, n - i);
            const T* strip[STRIP];
            for (int64_t r = 0; r < STRIP; ++r) {
                T* copy = padded.data() + r * widest * L;
                strip[r] = copy;
                if (r >= rows)
                    std::fill_n(copy, vectors * L, T(0));
                else if (width == vectors * L)
                    strip[r] = row_of(i + r, first);
                else
                    std::fill(std::copy_n(row_of(i + r, first), width, copy), copy + vectors * L, T(0));
            }
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t begin = group * GROUP, count = std::min<int64_t>(GROUP, t - begin);
                const T* ahead[AHEAD];
                for (int64_t r = 0; r < AHEAD; ++r)
                    ahead[r] = row_of(std::min(i + STRIP + (group * AHEAD + r) % STRIP, n - 1), first);
                Vector<double> sums[STRIP][GROUP];
                double factors[STRIP][GROUP] = {};
                if (BACKWARD)
                    for (int64_t r = 0; r < rows; ++r)
                        std::copy_n(V_rows + (i + r) * t + begin, count, factors[r]);
                const int64_t place = group * widest * GROUP;
                multiply<T, FORWARD, BACKWARD>(strip, ahead, vectors, V.data() + place, factors, sums,
                                               out.data() + place);
                if (FORWARD)
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t c = 0; c < count; ++c) {
                            double sum = 0;
                            for (int64_t lane = 0; lane < L; ++lane) sum += sums[r][c][lane];
                            out_rows[(i + r) * t + begin + c] += sum;
                        }
            }
        }
        if (BACKWARD)
            for (int64_t j = 0; j < width; ++j)
                for (int64_t c = 0; c < t; ++c) out_columns[(first + j) * t + c] += entry(out, j, c);
    }
}

}  // namespace
