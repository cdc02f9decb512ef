// All layers of networks that do not pool before the end (SPEC C8 to C10).
//
// Without pooling, entries (u, v) of a pair's arrays meet only entries of the same displacement v - u: a layer maps
// the HEIGHT x WIDTH image of one displacement to another such image. Displacements are taken cyclically, so that
// each image is full: its position (i, j) stands for rows i, i + down and columns j, j + right, both modulo the
// grid. Where that wraps, the image has a seam, across which patches see zeros (unless the network is periodic).
//
// One block takes one pair of images; each group of SEGMENT lanes takes a displacement, each lane a column of its
// image, kept in registers through all layers. Weighted by the last pooling and the trace, images become numbers.

constexpr unsigned ALL = 0xffffffffu;
constexpr int POSITIONS = HEIGHT * WIDTH;
constexpr int ARRAYS = TANGENT ? 2 : 1;
constexpr int AT_A_TIME = THREADS / SEGMENT;

struct Norm {
    float inverse, norm;
};

// Shared memory, in this order: sums of the threads, norms of the first image, twice those of the second.
constexpr int TOTAL_BYTES = THREADS * ARRAYS * 8;
static_assert(TOTAL_BYTES + 3 * POSITIONS * 8 == SHARED_BYTES,
              "the launch reserves other shared memory than the kernel uses");

struct Place {
    int column, source_column;  // of the first and of the second image
    int down, seam_row, seam_column;
    bool zero;  // no displacement
};

// Sums over patch columns of one row of the image.
template <int PATCH>
__device__ __forceinline__ float across(float value, const Place& place) {
    constexpr int AFTER = (PATCH - 1) / 2, BEFORE = PATCH - 1 - AFTER;
    float sum = value;
#pragma unroll
    for (int e = -BEFORE; e <= AFTER; ++e) {
        if (e == 0) continue;
        const int column = place.column + e;
        const float near = __shfl_sync(ALL, value, PERIODIC ? wrapped(column, WIDTH) : column, SEGMENT);
        const bool joined =
            PERIODIC || (within(column, WIDTH) && (column < place.seam_column) == (place.column < place.seam_column));
        sum = fmaf(joined ? 1.0f : 0.0f, near, sum);
    }
    return sum;
}

// Sums over patches, row after row; rows of the image may be overwritten once their sums were asked for.
template <int PATCH>
struct PatchSums {
    static constexpr int AFTER = (PATCH - 1) / 2, BEFORE = PATCH - 1 - AFTER;
    float recent[PATCH];
    float top[AFTER + 1], bottom[BEFORE + 1];  // rows that the other end of a periodic image needs

    __device__ __forceinline__ void open(const float (&image)[HEIGHT], const Place& place) {
        if (PERIODIC) {
#pragma unroll
            for (int n = 0; n < BEFORE; ++n)
                bottom[n] = across<PATCH>(image[(n - BEFORE + PATCH * HEIGHT) % HEIGHT], place);
#pragma unroll
            for (int n = 0; n < AFTER; ++n) top[n] = across<PATCH>(image[n % HEIGHT], place);
        }
#pragma unroll
        for (int n = 0; n < AFTER && n < HEIGHT; ++n) recent[n % PATCH] = across<PATCH>(image[n], place);
    }

    __device__ __forceinline__ float at(int i, const float (&image)[HEIGHT], const Place& place) {
        if (i + AFTER < HEIGHT) recent[(i + AFTER) % PATCH] = across<PATCH>(image[i + AFTER], place);
        float sum = 0.0f;
#pragma unroll
        for (int d = -BEFORE; d <= AFTER; ++d) {
            const int row = i + d;
            if (PERIODIC) {
                if (BEFORE > 0 && row < 0) {
                    sum += bottom[row + BEFORE];
                } else if (AFTER > 0 && row >= HEIGHT) {
                    sum += top[row - HEIGHT];
                } else {
                    sum += recent[row % PATCH];
                }
            } else if (within(row, HEIGHT)) {
                const bool joined = (row < place.seam_row) == (i < place.seam_row);
                sum = fmaf(joined ? 1.0f : 0.0f, recent[row % PATCH], sum);
            }
        }
        return sum;
    }
};

// One layer: patch sums and scalar function, in place. SAME: of a sample with itself.
template <bool SAME, int FUNCTION, bool SIGNED, int DEGREE, int PATCH>
__device__ __forceinline__ void apply(float (&image)[HEIGHT], float (&tangent)[TANGENT ? HEIGHT : 1],
                                      const Place& place, const Norm* left, const Norm* right, float number,
                                      float scale, float floor) {
    PatchSums<PATCH> sums;
    sums.open(image, place);
#if TANGENT
    PatchSums<PATCH> tangent_sums;
    tangent_sums.open(tangent, place);
#endif
    const Norm* const first = left + (place.column < WIDTH ? place.column : 0);
    const Norm* const second = right + place.down * WIDTH + place.source_column;
#pragma unroll
    for (int i = 0; i < HEIGHT; ++i) {
        const float sum = sums.at(i, image, place) * scale;
        const Norm a = first[i * WIDTH], b = second[i * WIDTH];
        const Patches patches = {a.inverse, b.inverse, a.norm * b.norm};
        const bool equal = SAME && FUNCTION != SQUARE && place.zero && a.norm > floor;
        float kappa_0 = 1.0f;
        float value = pointwise<FUNCTION, TANGENT, SIGNED, DEGREE>(sum, patches, number, kappa_0);
        if (equal) {
            value = pointwise_of_equal<FUNCTION>(patches.norms, number);
            kappa_0 = 1.0f;
        }
        // Lanes beside the image stay finite, whatever the layers do.
        const bool beside = WIDTH < SEGMENT && place.column >= WIDTH;
#if TANGENT
        const float tangent_sum = tangent_sums.at(i, tangent, place) * scale;
        tangent[i] = beside ? 0.0f : fmaf(tangent_sum, kappa_0, value);
#endif
        image[i] = beside ? 0.0f : value;
    }
}

__device__ __forceinline__ void load_norms(Norm* left, Norm* right, const float* norms_left,
                                           const float* norms_right, float number, float floor) {
    __syncthreads();
    for (int u = threadIdx.x; u < POSITIONS; u += THREADS) {
        const float a = norms_left[u], b = norms_right[u];
        left[u] = {1.0f / fmaxf(a, floor), a};
        right[u] = right[u + POSITIONS] = {number / fmaxf(b, floor), b};
    }
    __syncthreads();
}

// left, right: the images (n, HEIGHT, WIDTH, CHANNELS) of the two sides.
// norms_left, norms_right: patch norms of all layers, (n, LAYERS, HEIGHT * WIDTH).
// first, second, partner, values, tangents: as for a layer.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
displacement(const float* __restrict__ left, const float* __restrict__ right, const float* __restrict__ norms_left,
             const float* __restrict__ norms_right, const int* __restrict__ first, const int* __restrict__ second,
             const int* __restrict__ partner, float* __restrict__ values, float* __restrict__ tangents) {
    extern __shared__ float4 shared[];
    double* const totals = reinterpret_cast<double*>(shared);
    Norm* const norms_a = reinterpret_cast<Norm*>(reinterpret_cast<char*>(shared) + TOTAL_BYTES);
    Norm* const norms_b = norms_a + POSITIONS;

    const int a = first[blockIdx.x], b = second[blockIdx.x];
    const float* const image_a = left + (size_t)a * (POSITIONS * CHANNELS);
    const float* const image_b = right + (size_t)b * (POSITIONS * CHANNELS);
    const bool same = partner[a] == b;
    double total = 0.0, total_tangent = 0.0;

    Place place;
    place.column = threadIdx.x % SEGMENT;
    for (int start = 0; start < DOWN_COUNT * RIGHT_COUNT; start += AT_A_TIME) {
        const int number_of = start + threadIdx.x / SEGMENT;
        const bool beyond = number_of >= DOWN_COUNT * RIGHT_COUNT;
        const bool idle = beyond || place.column >= WIDTH;
        place.down = beyond ? 0 : DOWN[number_of / RIGHT_COUNT];
        const int right_by = beyond ? 0 : RIGHT[number_of % RIGHT_COUNT];
        place.source_column = (place.column + right_by) % WIDTH;
        place.seam_row = HEIGHT - place.down;
        place.seam_column = WIDTH - right_by;
        place.zero = number_of == 0;

        float image[HEIGHT], tangent[TANGENT ? HEIGHT : 1];
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            const int k = i < place.seam_row ? i + place.down : i + place.down - HEIGHT;
            float product = 0.0f;
            if (!idle) {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    product = fmaf(image_a[(i * WIDTH + place.column) * CHANNELS + c],
                                   image_b[(k * WIDTH + place.source_column) * CHANNELS + c], product);
            }
            image[i] = product;
#if TANGENT
            tangent[i] = product;  // T^P of the first layer is B^P
#endif
        }

        const float* layer_a = norms_left + (size_t)a * (LAYERS * POSITIONS);
        const float* layer_b = norms_right + (size_t)b * (LAYERS * POSITIONS);
// Displacement zero comes first, in the first turn.
#define RUN(COUNT, FUNCTION, SIGNED, DEGREE, PATCH, NUMBER, SCALE, FLOOR)                                         \
    for (int n = 0; n < COUNT; ++n) {                                                                            \
        load_norms(norms_a, norms_b, layer_a, layer_b, NUMBER, FLOOR);                                           \
        if (same && start == 0)                                                                                  \
            apply<true, FUNCTION, SIGNED, DEGREE, PATCH>(image, tangent, place, norms_a, norms_b, NUMBER, SCALE, \
                                                         FLOOR);                                                 \
        else                                                                                                     \
            apply<false, FUNCTION, SIGNED, DEGREE, PATCH>(image, tangent, place, norms_a, norms_b, NUMBER,       \
                                                          SCALE, FLOOR);                                         \
        layer_a += POSITIONS;                                                                                    \
        layer_b += POSITIONS;                                                                                    \
    }
        RUNS
#undef RUN

        if (!idle) {
            float sum = 0.0f, sum_tangent = 0.0f;
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
                const int k = i < place.seam_row ? i + place.down : i + place.down - HEIGHT;
                const float weight = ROW_WEIGHTS[i * HEIGHT + k];
                sum = fmaf(weight, image[i], sum);
#if TANGENT
                sum_tangent = fmaf(weight, tangent[i], sum_tangent);
#endif
            }
            const double weight = COLUMN_WEIGHTS[place.column * WIDTH + place.source_column];
            total += weight * sum;
            total_tangent += weight * sum_tangent;
        }
    }

    totals[threadIdx.x] = total;
    if (TANGENT) totals[THREADS + threadIdx.x] = total_tangent;
    for (int count = THREADS; count > 1;) {
        const int kept = (count + 1) / 2;
        __syncthreads();
        if ((int)threadIdx.x < count - kept) {
#pragma unroll
            for (int array = 0; array < ARRAYS; ++array)
                totals[array * THREADS + threadIdx.x] += totals[array * THREADS + threadIdx.x + kept];
        }
        count = kept;
    }
    if (threadIdx.x == 0) {
        values[blockIdx.x] = (float)totals[0];
        if (TANGENT) tangents[blockIdx.x] = (float)totals[THREADS];
    }
}
