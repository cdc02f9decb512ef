// One layer for pairs of images (SPEC C2 to C4, C8, C9): patch sums, scalar function, and either pooling or the
// weighted sum over all pairs of positions that the last pooling and the trace come to.
//
// One block takes one pair of images and, where memory asks for it, some of the pooled rows of the second image.
// It walks over rows i of the first image; each of its threads keeps a column and ROWS rows k of the second. For
// these row pairs (i, k) the columns j of the first image arrive one after the other:
//   sums over patch rows        a product of pixels, or a sum of entries of the array from the layer before
//   sums over patch columns     along diagonals (j, column): neighbouring lanes, one column earlier or later
//   scalar function             nothing of it is ever stored
//   pooling of j                in registers, over the columns as they come
//   pooling of the column       between lanes
//   pooling of k, then i        in shared memory; each result is written once
// Arrays are (pair, row i, row k, column j, column m).

constexpr int AFTER = (PATCH - 1) / 2;
constexpr int BEFORE = PATCH - 1 - AFTER;
constexpr int GROUPS = 32 / SEGMENT;  // of lanes in a warp; each has rows of its own
constexpr unsigned ALL = 0xffffffffu;

// Columns of the first image come in groups of COLUMN_STRIDE.
constexpr int FIRST_GROUP = floor_of_quotient(COLUMN_BEGIN, COLUMN_STRIDE);
#if POOL
// Offset COLUMN_STRIDE * q + r of a pooling window is met q groups after the pooled column's own.
constexpr int FIRST_GROUP_OFFSET = floor_of_quotient(COLUMN_FIRST, COLUMN_STRIDE);
constexpr int LAST_GROUP_OFFSET = floor_of_quotient(COLUMN_FIRST + COLUMN_TAP_COUNT - 1, COLUMN_STRIDE);
constexpr int LIVE = LAST_GROUP_OFFSET - FIRST_GROUP_OFFSET + 1;
constexpr int ROWS_LIVE = (ROW_TAP_COUNT + ROW_STRIDE - 1) / ROW_STRIDE;
#endif

constexpr int ARRAYS = TANGENT ? 2 : 1;
constexpr int SOURCES = IMAGES ? 1 : ARRAYS;  // in the first layer both arrays start from the images

struct alignas(4 * (CHANNEL_STRIDE < 4 ? CHANNEL_STRIDE : 4)) Pixel {
    float channel[CHANNEL_STRIDE];
};

struct Norm {
    float inverse, norm;
};

// Shared memory, in this order.
constexpr int TOTAL_BYTES = POOL ? 0 : THREADS * ARRAYS * 8;
constexpr int PIXEL_BYTES = IMAGES ? ((HEIGHT + PATCH - 1) * WIDTH * CHANNEL_STRIDE + 3) / 4 * 16 : 0;
constexpr int NORM_BYTES = HEIGHT * WIDTH * 8;
constexpr int PASSING_FLOATS = POOL ? ARRAYS * WINDOW_ROWS * PHASE_COLUMNS * POOLED_WIDTH : 0;
constexpr int STORED_FLOATS = POOL ? ARRAYS * STORED_ROWS * POOLED_ROWS * POOLED_WIDTH * POOLED_WIDTH : 0;
static_assert(TOTAL_BYTES + PIXEL_BYTES + NORM_BYTES + 4 * (2 * PASSING_FLOATS + STORED_FLOATS) == SHARED_BYTES,
              "the launch reserves other shared memory than the kernel uses");

// Sums along diagonals: columns of the first image arrive in order, a lane is a column of the second.
struct Diagonals {
    float earlier[BEFORE + 1][ROWS];  // [n]: sum over the newest column and the n before it; [0] the newest alone
    float later[AFTER + 1][ROWS];     // [n]: the column n before the newest with all that has arrived for it

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int q = 0; q < ROWS; ++q) {
#pragma unroll
            for (int n = 0; n <= BEFORE; ++n) earlier[n][q] = 0.0f;
#pragma unroll
            for (int n = 0; n <= AFTER; ++n) later[n][q] = 0.0f;
        }
    }

    // Takes the newest column, gives the patch sums of the column AFTER before it.
    __device__ __forceinline__ void feed(const float (&arrived)[ROWS], int column, float (&sums)[ROWS]) {
#pragma unroll
        for (int q = 0; q < ROWS; ++q) {
#pragma unroll
            for (int n = BEFORE; n > 0; --n)
                earlier[n][q] = fmaf(has(column - 1), from(earlier[n - 1][q], column - 1), arrived[q]);
            earlier[0][q] = arrived[q];
#pragma unroll
            for (int n = AFTER; n > 0; --n)
                later[n][q] = fmaf(has(column + n), from(arrived[q], column + n), later[n - 1][q]);
            later[0][q] = earlier[BEFORE][q];
            sums[q] = later[AFTER][q];
        }
    }

    static __device__ __forceinline__ float has(int column) {
        return PERIODIC || within(column, WIDTH) ? 1.0f : 0.0f;
    }

    static __device__ __forceinline__ float from(float value, int column) {
        return __shfl_sync(ALL, value, PERIODIC ? wrapped(column, WIDTH) : column, SEGMENT);
    }
};

// Whether pooling has a use for columns that are r after a multiple of the stride.
__device__ __forceinline__ constexpr bool used(int r) {
    for (int tap = 0; tap < COLUMN_TAP_COUNT; ++tap)
        if ((COLUMN_FIRST + tap - r) % COLUMN_STRIDE == 0) return true;
    return false;
}

// Where a pair's sums over patch rows come from.
#if IMAGES
struct Source {
    const Pixel* first;                        // rows -BEFORE to HEIGHT - 1 + AFTER of the first image
    float second[ROWS + PATCH - 1][CHANNELS];  // this lane's pixels of the second
    int row;

    __device__ __forceinline__ void open(const float* image, int begin, int column) {
#pragma unroll
        for (int n = 0; n < ROWS + PATCH - 1; ++n) {
            const int k = begin + n - BEFORE;
            const bool there = column < WIDTH && (PERIODIC || within(k, HEIGHT));
            const int pixel = (PERIODIC ? wrapped(k, HEIGHT) : k) * WIDTH + column;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) second[n][c] = there ? image[pixel * CHANNELS + c] : 0.0f;
        }
    }

    __device__ __forceinline__ void load(int j, float (&sums)[ROWS]) const {
#pragma unroll
        for (int q = 0; q < ROWS; ++q) sums[q] = 0.0f;
#pragma unroll
        for (int d = 0; d < PATCH; ++d) {
            const Pixel pixel = first[(row + d) * WIDTH + j];
#pragma unroll
            for (int q = 0; q < ROWS; ++q)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    sums[q] = fmaf(pixel.channel[c], second[q + d][c], sums[q]);
        }
    }
};
#else
struct Source {
    const float* array;  // of the pair, (row i, row k, column j, column m)
    int row, begin, column;

    __device__ __forceinline__ void load(int j, float (&sums)[ROWS]) const {
#pragma unroll
        for (int q = 0; q < ROWS; ++q) {
            float sum = 0.0f;
#pragma unroll
            for (int d = -BEFORE; d <= AFTER; ++d) {
                int i = row + d, k = begin + q + d;
                if (PERIODIC) i = wrapped(i, HEIGHT), k = wrapped(k, HEIGHT);
                if (column < WIDTH && (PERIODIC || (within(i, HEIGHT) && within(k, HEIGHT))))
                    sum += array[((i * HEIGHT + k) * WIDTH + j) * WIDTH + column];
            }
            sums[q] = sum;
        }
    }
};
#endif

#if POOL
// Pools one column of the second image between lanes: right in the lanes that are multiples of the stride.
__device__ __forceinline__ float between_lanes(float value, int column) {
    float result = 0.0f;
    float near[COLUMN_STRIDE];
#pragma unroll
    for (int r = 0; r < COLUMN_STRIDE; ++r)
        near[r] = r == 0     ? value
                  : used(r) ? Diagonals::has(column + r) * Diagonals::from(value, column + r)
                            : 0.0f;
#pragma unroll
    for (int offset = FIRST_GROUP_OFFSET; offset <= LAST_GROUP_OFFSET; ++offset) {
        float part = 0.0f;
#pragma unroll
        for (int r = 0; r < COLUMN_STRIDE; ++r) {
            const int tap = COLUMN_STRIDE * offset + r - COLUMN_FIRST;
            if (within(tap, COLUMN_TAP_COUNT)) part = fmaf(COLUMN_TAPS[tap], near[r], part);
        }
        const int lane = column + COLUMN_STRIDE * offset;
        result = offset == 0 ? result + part : fmaf(Diagonals::has(lane), Diagonals::from(part, lane), result);
    }
    return result;
}

// A thread's share of the pooling of rows: entries of a phase and, where several teams of threads have all entries,
// every TEAMS-th row.
constexpr int PHASE_ENTRIES = PHASE_COLUMNS * POOLED_WIDTH;
constexpr int ROUNDS = POOLED_ROWS / TEAMS;
static_assert(TEAMS == 1 || TEAMS * PHASE_ENTRIES <= THREADS, "every team has a thread for each entry");
static_assert(POOLED_ROWS % TEAMS == 0, "every thread pools as many rows as the others");

// Pools rows k of what one phase left in shared memory, adds it to the pooled rows i that row i belongs to, and
// writes those that are complete. i counts beyond the border where patches and pooling wrap.
__device__ __forceinline__ void pool_rows(const float* passing, float* stored, float* result, int i,
                                          int first_pooled, int first_column, int team, int own_entry) {
    constexpr int PLANE = POOLED_WIDTH * POOLED_WIDTH;
    const int newest = floor_of_quotient(i - ROW_FIRST, ROW_STRIDE);
    if (team >= TEAMS) return;
    for (int entry = own_entry; entry < PHASE_ENTRIES; entry += THREADS) {
        if (first_column * POOLED_WIDTH + entry >= PLANE) continue;
        float sums[ROUNDS];
        const float* const row = passing + team * (ROW_STRIDE * PHASE_ENTRIES) + entry;
#pragma unroll
        for (int n = 0; n < ROUNDS; ++n) {
            sums[n] = 0.0f;
#pragma unroll
            for (int tap = 0; tap < ROW_TAP_COUNT; ++tap)
                sums[n] = fmaf(ROW_TAPS[tap], row[(n * TEAMS * ROW_STRIDE + tap) * PHASE_ENTRIES], sums[n]);
        }
        const int place = team * PLANE + first_column * POOLED_WIDTH + entry;
        const int rows_left = POOLED_HEIGHT - first_pooled - team;
#pragma unroll
        for (int age = ROWS_LIVE - 1; age >= 0; --age) {  // the oldest first: the newest may take its place
            const int pooled_i = newest - age;
            const int tap = i - ROW_STRIDE * pooled_i - ROW_FIRST;
            if (!within(pooled_i, POOLED_HEIGHT) || tap >= ROW_TAP_COUNT) continue;
            const bool begins = tap == 0 || i == ROW_BEGIN;
            const float weight = ROW_TAPS[tap];
            const int slot = pooled_i % (STORED_ROWS > 0 ? STORED_ROWS : 1);
            float* const kept = stored + slot * (POOLED_ROWS * PLANE) + place;
            if (tap == ROW_TAP_COUNT - 1 || i == ROW_END - 1) {
                float* const complete = result + (pooled_i * POOLED_HEIGHT + first_pooled) * PLANE + place;
#pragma unroll
                for (int n = 0; n < ROUNDS; ++n)
                    if (n * TEAMS < rows_left)
                        complete[n * TEAMS * PLANE] =
                            fmaf(weight, sums[n], begins ? 0.0f : kept[n * TEAMS * PLANE]);
            } else if (begins) {
#pragma unroll
                for (int n = 0; n < ROUNDS; ++n) kept[n * TEAMS * PLANE] = weight * sums[n];
            } else {
#pragma unroll
                for (int n = 0; n < ROUNDS; ++n)
                    kept[n * TEAMS * PLANE] = fmaf(weight, sums[n], kept[n * TEAMS * PLANE]);
            }
        }
    }
}
#endif

// What a thread holds while it walks over the rows and columns of the first image. SAME: of a sample with itself.
template <bool SAME>
struct Walk {
    const Norm* norms;  // of the first image
    int column, own;    // this thread's column and first row k
    int i;
    float inverse_right[ROWS], norm_right[ROWS];
    Source sources[SOURCES];
    Diagonals diagonals[SOURCES];
    float sums[SOURCES][ROWS];
#if POOL
    float pooled[ARRAYS][LIVE][ROWS];  // columns of the first image whose pooling window is open
#else
    float row_sum[ARRAYS][ROWS];
#endif

    // The next column of the first image, or nothing beyond the border.
    __device__ __forceinline__ void arrive(int j) {
#pragma unroll
        for (int s = 0; s < SOURCES; ++s) {
            float arrived[ROWS];
            if (PERIODIC || within(j, WIDTH)) {
                sources[s].load(PERIODIC ? wrapped(j, WIDTH) : j, arrived);
            } else {
#pragma unroll
                for (int q = 0; q < ROWS; ++q) arrived[q] = 0.0f;
            }
            diagonals[s].feed(arrived, column, sums[s]);
#pragma unroll
            for (int q = 0; q < ROWS; ++q) sums[s][q] *= PATCH_SCALE;
        }
    }

    __device__ __forceinline__ void open_row(int row) {
        i = row;
#pragma unroll
        for (int s = 0; s < SOURCES; ++s) {
            sources[s].row = row;
            diagonals[s].clear();
        }
#pragma unroll
        for (int array = 0; array < ARRAYS; ++array) {
#pragma unroll
            for (int q = 0; q < ROWS; ++q) {
#if POOL
#pragma unroll
                for (int n = 0; n < LIVE; ++n) pooled[array][n][q] = 0.0f;
#else
                row_sum[array][q] = 0.0f;
#endif
            }
        }
    }

    // Columns that patches of the first group reach before its own.
    __device__ __forceinline__ void lead_in() {
        constexpr int START = COLUMN_STRIDE * FIRST_GROUP;
        for (int j = START - (PERIODIC ? BEFORE : 0); j < START + AFTER; ++j) arrive(j);
    }

    // Scalar function at column j, whose patch sums have just been completed.
    __device__ __forceinline__ void evaluate(int j, int r) {
        const int here = PERIODIC ? wrapped(j, WIDTH) : j;
        const Norm norm = norms[i * WIDTH + here];
        float values[ARRAYS][ROWS];
#pragma unroll
        for (int q = 0; q < ROWS; ++q) {
            const Patches patches = {norm.inverse, inverse_right[q], norm.norm * norm_right[q]};
            float kappa_0;
            float value = pointwise<FUNCTION, TANGENT, SIGNED, DEGREE>(sums[0][q], patches, NUMBER, kappa_0);
            if (SAME && FUNCTION != SQUARE && here == column && norm.norm > FLOOR &&
                i == (PERIODIC ? wrapped(own + q, HEIGHT) : own + q)) {
                value = pointwise_of_equal<FUNCTION>(patches.norms, NUMBER);
                kappa_0 = 1.0f;
            }
            values[0][q] = value;
            if (TANGENT) values[ARRAYS - 1][q] = fmaf(sums[SOURCES - 1][q], kappa_0, value);
        }
#if POOL
#pragma unroll
        for (int n = 0; n < LIVE; ++n) {
            const int tap = COLUMN_STRIDE * (n + FIRST_GROUP_OFFSET) + r - COLUMN_FIRST;
            if (!within(tap, COLUMN_TAP_COUNT)) continue;
#pragma unroll
            for (int array = 0; array < ARRAYS; ++array)
#pragma unroll
                for (int q = 0; q < ROWS; ++q)
                    pooled[array][n][q] = fmaf(COLUMN_TAPS[tap], values[array][q], pooled[array][n][q]);
        }
#else
        const float weight = column < WIDTH ? COLUMN_WEIGHTS[here * WIDTH + column] : 0.0f;
#pragma unroll
        for (int array = 0; array < ARRAYS; ++array)
#pragma unroll
            for (int q = 0; q < ROWS; ++q) row_sum[array][q] = fmaf(weight, values[array][q], row_sum[array][q]);
#endif
    }

    // All columns of a group; ENDING: some of them may be beyond the last.
    template <bool ENDING>
    __device__ __forceinline__ void columns(int group) {
#pragma unroll
        for (int r = 0; r < COLUMN_STRIDE; ++r) {
            const int j = COLUMN_STRIDE * group + r;
            if (ENDING && j >= COLUMN_END) continue;
            arrive(j + AFTER);
            if (used(r)) evaluate(j, r);
        }
    }

#if POOL
    // Leaves the pooled column that no later one adds to in shared memory, at most so many rows of it.
    __device__ __forceinline__ void leave(float* place, int rows) {
#pragma unroll
        for (int array = 0; array < ARRAYS; ++array) {
#pragma unroll
            for (int q = 0; q < ROWS; ++q) {
                const float value = between_lanes(pooled[array][LIVE - 1][q], column);
                if (q < rows) place[array * (PASSING_FLOATS / ARRAYS) + q * PHASE_ENTRIES] = value;
            }
        }
    }

    // Makes room for the pooled column that the next group opens.
    __device__ __forceinline__ void shift() {
#pragma unroll
        for (int array = 0; array < ARRAYS; ++array) {
#pragma unroll
            for (int q = 0; q < ROWS; ++q) {
#pragma unroll
                for (int n = LIVE - 1; n > 0; --n) pooled[array][n][q] = pooled[array][n - 1][q];
                pooled[array][0][q] = 0.0f;
            }
        }
    }
#endif
};

template <bool SAME>
__device__ __forceinline__ void walk_over(const float* left, const float* right, const float* norms_left,
                                          const float* norms_right, int a, int b, float* values, float* tangents,
                                          char* memory) {
    const int pair = blockIdx.x;
    // A shuffle with itself, for the compiler to keep the result: it would ask for the thread again and again.
    const int thread = __shfl_sync(ALL, (int)threadIdx.x, threadIdx.x, 32);
    const int group = thread / SEGMENT, column = thread % SEGMENT;
#if POOL
    const int first_pooled = blockIdx.y * POOLED_ROWS;
    const int reach = ROW_STRIDE * first_pooled + ROW_FIRST;  // the first row k in these rows' pooling windows
    const int begin = !PERIODIC && reach < 0 ? 0 : reach;
    const int end = PERIODIC ? reach + WINDOW_ROWS : min(HEIGHT, reach + WINDOW_ROWS);
    float* const passing = reinterpret_cast<float*>(memory + TOTAL_BYTES + PIXEL_BYTES + NORM_BYTES);
    float* const stored = passing + 2 * PASSING_FLOATS;
    const size_t pooled_entries = (size_t)POOLED_HEIGHT * POOLED_HEIGHT * POOLED_WIDTH * POOLED_WIDTH;
    float* const results[2] = {values + pair * pooled_entries, TANGENT ? tangents + pair * pooled_entries : values};
    const int team = thread / PHASE_ENTRIES;
    const int own_entry = THREADS > PHASE_ENTRIES ? thread % PHASE_ENTRIES : thread;
    // Where this thread leaves its rows; those beyond the border stay zero.
    const int leaves = (begin - reach + group * ROWS) * PHASE_ENTRIES + column / COLUMN_STRIDE;
    const bool leaving = column % COLUMN_STRIDE == 0 && column / COLUMN_STRIDE < POOLED_WIDTH;
    const int rows_left = leaving ? end - begin - group * ROWS : 0;
    for (int n = thread; n < 2 * PASSING_FLOATS; n += THREADS) passing[n] = 0.0f;
    int phase = 0;
#else
    const int begin = 0;
    double totals[ARRAYS] = {};
#endif

    Walk<SAME> walk;
    walk.column = column;
    walk.own = begin + group * ROWS;
    Norm* const norms = reinterpret_cast<Norm*>(memory + TOTAL_BYTES + PIXEL_BYTES);
    walk.norms = norms;
    for (int u = thread; u < HEIGHT * WIDTH; u += THREADS) {
        const float norm = norms_left[(size_t)a * (HEIGHT * WIDTH) + u];
        norms[u] = {1.0f / fmaxf(norm, FLOOR), norm};
    }
#pragma unroll
    for (int q = 0; q < ROWS; ++q) {
        const int k = PERIODIC ? wrapped(walk.own + q, HEIGHT) : walk.own + q;
        const bool there = column < WIDTH && k < HEIGHT;
        walk.norm_right[q] = there ? norms_right[(size_t)b * (HEIGHT * WIDTH) + k * WIDTH + column] : 0.0f;
        walk.inverse_right[q] = there ? NUMBER / fmaxf(walk.norm_right[q], FLOOR) : 0.0f;
    }
#if IMAGES
    Pixel* const pixels = reinterpret_cast<Pixel*>(memory + TOTAL_BYTES);
    for (int n = thread; n < (HEIGHT + PATCH - 1) * WIDTH; n += THREADS) {
        const int row = n / WIDTH - BEFORE, j = n % WIDTH;
        const float* pixel =
            left + ((size_t)a * HEIGHT + (PERIODIC ? wrapped(row, HEIGHT) : row)) * (WIDTH * CHANNELS);
#pragma unroll
        for (int c = 0; c < CHANNEL_STRIDE; ++c)
            pixels[n].channel[c] =
                c < CHANNELS && (PERIODIC || within(row, HEIGHT)) ? pixel[j * CHANNELS + c] : 0.0f;
    }
    walk.sources[0].first = pixels;
    walk.sources[0].open(right + (size_t)b * (HEIGHT * WIDTH * CHANNELS), walk.own, column);
#else
    const size_t entries = (size_t)HEIGHT * HEIGHT * WIDTH * WIDTH;
#pragma unroll
    for (int s = 0; s < SOURCES; ++s)
        walk.sources[s] = {(s == 0 ? left : right) + pair * entries, 0, walk.own, column};
#endif
    __syncthreads();

    for (int walked = ROW_BEGIN; walked < ROW_END; ++walked) {
        const int i = PERIODIC ? wrapped(walked, HEIGHT) : walked;
        // Rows k that row i is needed with; where things wrap these may be all.
        const int band_first = BANDS[2 * i], band_last = BANDS[2 * i + 1];
        if (band_first > band_last) continue;
        const int warp_first = begin + thread / 32 * (GROUPS * ROWS);
        const bool wanted =
            PERIODIC || (warp_first <= band_last && warp_first + GROUPS * ROWS > band_first && warp_first < HEIGHT);
        walk.open_row(i);
        if (wanted) walk.lead_in();
#if POOL
        if (wanted) {
            for (int n = FIRST_GROUP; n < LAST_GROUP_OFFSET; ++n) {
                walk.template columns<true>(n);
                walk.shift();
            }
        }
        for (int complete = 0; complete < POOLED_WIDTH; complete += PHASE_COLUMNS) {
            // Pooled column n is complete after group n + LAST_GROUP_OFFSET: no later one adds to it.
            const int next = complete + LAST_GROUP_OFFSET;
            float* const now = passing + phase % 2 * PASSING_FLOATS;
            if (wanted) {
                if (next + PHASE_COLUMNS <= COLUMN_END / COLUMN_STRIDE) {
#pragma unroll
                    for (int n = 0; n < PHASE_COLUMNS; ++n) {
                        walk.template columns<false>(next + n);
                        walk.leave(now + leaves + n * POOLED_WIDTH, rows_left);
                        walk.shift();
                    }
                } else {
#pragma unroll 1
                    for (int n = 0; n < PHASE_COLUMNS; ++n) {
                        walk.template columns<true>(next + n);
                        walk.leave(now + leaves + n * POOLED_WIDTH, rows_left);
                        walk.shift();
                    }
                }
            }
            __syncthreads();
#pragma unroll
            for (int array = 0; array < ARRAYS; ++array)
                pool_rows(now + array * (PASSING_FLOATS / ARRAYS), stored + array * (STORED_FLOATS / ARRAYS),
                          results[array], walked, first_pooled, complete, team, own_entry);
            ++phase;
        }
#else
        if (!wanted) continue;
        for (int j = 0; j < WIDTH; ++j) walk.template columns<false>(j);
#pragma unroll
        for (int q = 0; q < ROWS; ++q) {
            const double weight = walk.own + q < HEIGHT ? ROW_WEIGHTS[i * HEIGHT + walk.own + q] : 0.0f;
            // Row pairs that nothing needs may hold anything.
            if (weight == 0.0) continue;
#pragma unroll
            for (int array = 0; array < ARRAYS; ++array) totals[array] += weight * walk.row_sum[array][q];
        }
#endif
    }

#if !POOL
    double* const sums = reinterpret_cast<double*>(memory);
#pragma unroll
    for (int array = 0; array < ARRAYS; ++array) sums[array * THREADS + thread] = totals[array];
    for (int count = THREADS; count > 1;) {
        const int kept = (count + 1) / 2;
        __syncthreads();
        if (thread < count - kept) {
#pragma unroll
            for (int array = 0; array < ARRAYS; ++array)
                sums[array * THREADS + thread] += sums[array * THREADS + thread + kept];
        }
        count = kept;
    }
    if (thread == 0) {
        values[pair] = (float)sums[0];
        if (TANGENT) tangents[pair] = (float)sums[(ARRAYS - 1) * THREADS];
    }
#endif
}

// left, right: the images (n, HEIGHT, WIDTH, CHANNELS) of the two sides, or the arrays B and T of the pairs.
// norms_left, norms_right: patch norms of this layer, (n, HEIGHT * WIDTH).
// first, second: for each pair its image on either side; partner: for each first image the second one that is the
// same sample, or -1. values, tangents: of the pairs, a number each or an array each.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
layer(const float* __restrict__ left, const float* __restrict__ right, const float* __restrict__ norms_left,
      const float* __restrict__ norms_right, const int* __restrict__ first, const int* __restrict__ second,
      const int* __restrict__ partner, float* __restrict__ values, float* __restrict__ tangents) {
    extern __shared__ float4 shared[];
    char* const memory = reinterpret_cast<char*>(shared);
    const int a = first[blockIdx.x], b = second[blockIdx.x];
    if (partner[a] == b)
        walk_over<true>(left, right, norms_left, norms_right, a, b, values, tangents, memory);
    else
        walk_over<false>(left, right, norms_left, norms_right, a, b, values, tangents, memory);
}
