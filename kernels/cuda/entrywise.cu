// A matrix of products of rows, COLUMNS wide, entry by entry in place: each is read once and written once.
// With KAPPA these are values of a kernel of vectors (SPEC F3), with FUNCTION alone the scalar function of a layer
// (SPEC F3), else random Fourier features (SPEC F2).

// function(entry, row, column) replaces every entry. A thread reads its ENTRIES entries before it computes
// any: one in flight for each thread leaves the memory waiting.
template <class Function>
__device__ __forceinline__ void replace(float* B, long long size, Function function) {
    constexpr int BLOCK = ENTRIES * THREADS;
    const long long start = (long long)blockIdx.x * BLOCK;
    const int count = (int)min(size - start, (long long)BLOCK);
    // Long divisions once for a block; those of its entries are short, and by a constant.
    const long long row = start / COLUMNS;
    const unsigned column = start % COLUMNS;
    float* const entries = B + start;
    float values[ENTRIES];
#pragma unroll
    for (int n = 0; n < ENTRIES; ++n) {
        const int i = n * THREADS + threadIdx.x;
        values[n] = i < count ? entries[i] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < ENTRIES; ++n) {
        const int i = n * THREADS + threadIdx.x;
        const unsigned place = column + i;
        if (i < count) entries[i] = function(values[n], row + place / COLUMNS, place % COLUMNS);
    }
}

#if defined(KAPPA)

enum Kappa { CLOSED, LAPLACE, STEP, NETWORK, TANGENT, BIASED, BIASED_TANGENT };

// Of a cosine (SPEC K3 to K9). CLOSED: FUNCTION, with RATE and DEGREE; LAPLACE: exp(-c (1 - u)^GAMMA), RATE being c
// log2(e); the others: of LAYERS layers of relu, the tangent kernel times RATE.
template <int KIND>
__device__ __forceinline__ float kappa(float cosine) {
    float kappa_0 = 1.0f;
    if constexpr (KIND == CLOSED) {
        const Patches patches = {1.0f, RATE, 1.0f};
        return pointwise<FUNCTION, false, true, DEGREE>(cosine, patches, RATE, kappa_0);
    } else if constexpr (KIND == LAPLACE) {
        return exp2f(-RATE * powf(fmaxf(1.0f - cosine, 0.0f), GAMMA));
    } else {
        const Patches patches = {1.0f, 1.0f, 1.0f};
        float sigma = cosine, theta = cosine;
        for (int layer = 0; layer < LAYERS; ++layer) {
            sigma = pointwise<RELU, true, true, 1>(sigma, patches, 0.0f, kappa_0);
            theta = fmaf(theta, kappa_0, sigma);
        }
        if constexpr (KIND == STEP) return kappa_0;
        if constexpr (KIND == TANGENT) return theta * RATE;
        if constexpr (KIND == BIASED) return (1.0f + cosine) * sigma;
        if constexpr (KIND == BIASED_TANGENT) return 0.5f * fmaf(1.0f + cosine, kappa_0, sigma);
        return sigma;
    }
}

// kappa of cosines B, times weights of each row and others of each column.
extern "C" __global__ void __launch_bounds__(THREADS)
kernel_values(float* __restrict__ B, const float* __restrict__ weights, const float* __restrict__ others,
              long long size) {
    replace(B, size, [=](float cosine, long long row, unsigned column) {
        return kappa<KAPPA>(cosine) * (weights[row] * others[column]);
    });
}

#elif defined(FUNCTION)

// B: inner products multiplied by the factors before; weights: the factors after, of each row, if WEIGHTED.
extern "C" __global__ void __launch_bounds__(THREADS)
scalar_function(float* __restrict__ B,
#if WEIGHTED
                const float* __restrict__ weights,
#endif
                long long size) {
    replace(B, size, [=](float product, long long row, unsigned) {
#if WEIGHTED
        const float after = weights[row] * AFTER;
#else
        const float after = AFTER;
#endif
        float kappa_0;
        const Patches patches = {1.0f, BEFORE, after};
        return pointwise<FUNCTION, false, true, DEGREE>(product - SHIFT, patches, 0.0f, kappa_0);
    });
}

#else

// weights of each row times the cosine of B and the phase of each column.
extern "C" __global__ void __launch_bounds__(THREADS)
weighted_cosines(float* __restrict__ B, const float* __restrict__ weights, const float* __restrict__ phases,
                 long long size) {
    replace(B, size, [=](float product, long long row, unsigned column) {
        return weights[row] * cosf(product + phases[column]);
    });
}

#endif
