// A matrix of products of rows, COLUMNS wide, entry by entry in place: each is read once and written once.
// With FUNCTION this is the scalar function of a layer (SPEC F3), else random Fourier features (SPEC F2).

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

#ifdef FUNCTION

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
