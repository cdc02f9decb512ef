// The recursion over layers for one first image against a group of second images, one in each lane (C1 to
// C10).
#pragma once

#include <cmath>

#include "pooling.hpp"
#include "products.hpp"

namespace {

template <class T>
using Vectors = std::vector<Vector<T>>;

// What an image contributes before and after the scalar function of a layer at a position of the given patch
// norm (C3). Constants go to the first image before the function, and to the second after it.
struct Factors {
    double before_first, before_second, after_first, after_second, addend;
    // Not inlined: contracted differently in two places, it would give a sample two values.
    __attribute__((noinline)) Factors(const LayerDescription& layer, double norm) {
        const bool exponential = Function(layer.function) == Function::exponential;
        const double inverse = layer.homogeneous ? 1 / std::max(norm, layer.floor) : 1;
        const double exponent = exponential ? layer.number * M_LOG2E : 1;
        before_first = inverse * layer.patch_weight * exponent;
        before_second = inverse;
        after_first = layer.homogeneous ? norm : 1;
        after_second = exponential ? after_first : after_first * layer.number;
        // 2 to the power of that is zero, whatever is added: the kernel of a zero patch (K2).
        constexpr double NOTHING = -1e30;
        addend = norm > 0 ? std::log2(norm) - exponent : NOTHING;
    }
};

// The cosine of a position of a sample with itself is exactly 1 where the norm is above the floor (K13).
// `at_1` is the norm times the function's value at 1. Not inlined, for the same reason.
template <class T>
__attribute__((noinline)) void set_same_position(const LayerDescription& layer,
                                                 const ScalarFunction<T>& function, int lane, T norm, T at_1,
                                                 bool folded, Rows<T> tangent_rows, Vector<T>* value,
                                                 Vector<T>* tangent) {
    if (!layer.homogeneous || !(norm > T(layer.floor))) return;
    const T entry = at_1 * norm;
    (*value)[lane] = folded ? at_1 : entry;
    if (!function.tangent) return;
    T before = entry;
    if (!function.first_layer) {
        before = 0;
        for (int k = 0; k < tangent_rows.count; ++k) before += tangent_rows.row[k][tangent_rows.offset][lane];
        before *= function.tangent_weight;
    }
    (*tangent)[lane] = before + entry;
}

// X is T for a first image apart from the group, and Vector<T> where each image of the group has a first image of
// its own, itself where nothing else is said.
template <class T, class X>
class Pairs {
    using V = Vector<T>;
    static constexpr bool PAIRED = !std::is_same_v<X, T>;
    static constexpr int BLOCK = 4;  // columns of the first image at a time

    struct FirstFactors {
        std::vector<X> before, after;
    };
    struct SecondFactors {
        Vectors<T> before, after, addend;
    };
    // Scratch memory of a layer. Index 0 of two is for B, 1 for T.
    struct Scratch {
        Vectors<T> pooled[2];   // (pooled rows, pooled rows, pooled columns, pooled columns)
        Vectors<T> values[2];   // (BLOCK, value pitch): rows after the scalar function
        Vectors<T> columns[2];  // a pair of rows with the second image's columns pooled: (value pitch, pooled
                                // columns)
        Vectors<T> rows[2];     // (ring, pooled columns, pooled columns)
        Vectors<T>
            padded[2];  // a pair of rows summed over the rows of a patch, with what lies beyond the border
    };

    const Plan<T>& plan_;
    const int arrays_;
    const bool allocate_;
    size_t bytes_ = 0;
    const bool folded_;  // the norms of the first image multiply sums over the columns of the second
    std::vector<ScalarFunction<T>> function_;
    std::vector<Scratch> scratch_;
    Vectors<T> second_;  // (height, width + 2, channels), a pixel of zeros at either end
    std::vector<SecondFactors> second_factors_;
    const X* first_ = nullptr;  // (height, width, channels)
    std::vector<X> own_;        // first images, where each lane has its own
    std::vector<FirstFactors> first_factors_;
    int same_ = -1;          // the lane of the sample that the first image is
    bool all_same_ = PAIRED;  // the same, where each lane has its own
    // 0, or NaN where an image or its norms are not finite, or so large that products overflow: comparisons
    // make numbers of what is none, so that a trace alone could look finite.
    T first_defect_ = 0, second_defect_[LANES<T>] = {};
    double trace_[2][LANES<T>];

    Vectors<T> products_;  // a pair of rows before patches, with what lies beyond the border
    Vectors<T> sums_;      // (patch, width, width): sums along diagonals of as many pairs of rows
    Vectors<T> displaced_[2],
        across_[2];         // pairs of one displacement: (height, row with border), (height, width)
    Vectors<T> spread_[2];  // all pairs of the rows of one displacement: (height, width, value pitch)

  public:
    // With `allocate` false it can do nothing: what its arrays would take is only counted.
    explicit Pairs(const Plan<T>& plan, bool allocate = true)
        : plan_(plan),
          arrays_(plan.arrays()),
          allocate_(allocate),
          folded_(!plan.tangent),
          scratch_(plan.levels.size()),
          second_factors_(plan.levels.size()),
          first_factors_(plan.levels.size()) {
        const Level<T>& input = plan.levels[0];
        take(second_, size_t(input.height) * (input.width + 2) * plan.channels);
        if constexpr (PAIRED) {
            take(own_, size_t(input.positions()) * plan.channels);
            first_ = own_.data();
        }
        for (size_t number = 0; number < plan.levels.size(); ++number) {
            const Level<T>& level = plan.levels[number];
            function_.push_back({Function(level.layer.function), level.layer.degree, plan.tangent != 0,
                                 number == 0, T(level.layer.patch_weight)});
            take(first_factors_[number].before, level.positions());
            take(first_factors_[number].after, level.positions());
            for (auto* factors : {&second_factors_[number].before, &second_factors_[number].after,
                                  &second_factors_[number].addend})
                take(*factors, level.positions());
            take_scratch(number);
        }
    }

    // Memory of all arrays. Patch norms of images that meet themselves are handed out on top of them.
    static size_t bytes(const Plan<T>& plan) {
        size_t total = Pairs(plan, false).bytes_;
        if constexpr (PAIRED)
            for (const Level<T>& level : plan.levels) total += level.positions() * sizeof(V);
        return total;
    }

    // Lane `lane` of the second side: an image (height, width, channels). Its norms are set after it.
    template <class Number>
    void set_second(int lane, const Number* image) {
        const int w = plan_.levels[0].width, channels = plan_.channels;
        second_defect_[lane] = 0;
        for (int r = 0; r < plan_.levels[0].height; ++r)
            for (int k = 0; k < w * channels; ++k) {
                const T value = T(image[r * w * channels + k]);
                second_defect_[lane] += value - value;
                second_[(r * (w + 2) + 1) * channels + k][lane] = value;
                if constexpr (PAIRED) own_[r * w * channels + k][lane] = value;
            }
    }

    // Its patch norms (positions) in a layer.
    void set_norms(size_t number, int lane, const T* norms) {
        for (int u = 0; u < plan_.levels[number].positions(); ++u) set_norm(number, u, lane, norms[u]);
    }

    // An image that the second one in this lane meets, and its patch norms in each layer: set after those of the
    // second. Lanes that are the same sample need none of this, and either all of them are or none.
    void set_partner(int lane, const T* image, const T* const* norms) {
        static_assert(PAIRED, "one first image meets all");
        all_same_ = false;
        const int size = plan_.levels[0].positions() * plan_.channels;
        for (int k = 0; k < size; ++k) own_[k][lane] = image[k];
        second_defect_[lane] += defect(image, size_t(size));
        for (size_t number = 0; number < plan_.levels.size(); ++number)
            for (int u = 0; u < plan_.levels[number].positions(); ++u) {
                second_defect_[lane] += norm_defect(number, norms[number][u]);
                set_first_factors(number, u, lane, Factors(plan_.levels[number].layer, norms[number][u]));
            }
    }

    // The first image (height, width, channels), its patch norms in each layer, the lane with the same sample
    // or -1.
    void set_first(const T* image, const T* const* norms, int same) {
        static_assert(!PAIRED, "each lane has a first image of its own");
        first_ = image;
        first_defect_ = defect(image, size_t(plan_.levels[0].positions()) * plan_.channels);
        same_ = same;
        for (size_t number = 0; number < plan_.levels.size(); ++number)
            for (int u = 0; u < plan_.levels[number].positions(); ++u) {
                const Factors factors(plan_.levels[number].layer, norms[number][u]);
                first_factors_[number].before[u] = T(factors.before_first);
                first_factors_[number].after[u] = T(factors.after_first);
                first_defect_ += norm_defect(number, norms[number][u]);
            }
    }

    // The trace of B, and of T, for each lane, by what was set.
    void run(double (&trace)[2][LANES<T>]) {
        for (auto& array : trace_) std::fill(std::begin(array), std::end(array), 0.0);
        if (plan_.chain == 1)
            layer_by_rows();
        else
            layers_by_displacement();
        for (size_t number = plan_.chain; number < plan_.levels.size(); ++number) later_layer(number);
        for (int a = 0; a < 2; ++a)
            for (int lane = 0; lane < LANES<T>; ++lane)
                trace[a][lane] = trace_[a][lane] + first_defect_ + second_defect_[lane];
    }

    // Patch norms of every layer (C6), positions of each, for images that meet themselves.
    void run_norms(std::vector<Vectors<T>>& norms) {
        static_assert(PAIRED, "norms come from images that meet themselves");
        const size_t chain = plan_.chain, layers = plan_.levels.size();
        const Level<T>& input = plan_.levels[0];
        const auto find = [&](size_t number, auto entry) { norms.push_back(find_norms(number, entry)); };
        if (chain == 1) {
            find(0, [&](int r, int c) {
                V square{};
                for (int channel = 0; channel < plan_.channels; ++channel) {
                    const V value = own_[(r * input.width + c) * plan_.channels + channel];
                    square += value * value;
                }
                return square;
            });
            if (layers > 1) layer_by_rows();
        } else {
            follow({0, {0, input.height}}, 0, find);
            if (layers > chain) layers_by_displacement();
        }
        for (size_t number = chain; number < layers; ++number) {
            const int h = plan_.levels[number].height, w = plan_.levels[number].width;
            const Vectors<T>& B = scratch_[number - 1].pooled[0];
            find(number, [&](int r, int c) { return B[(size_t(r * h + r) * w + c) * w + c]; });
            if (number + 1 < layers) later_layer(number);
        }
    }

  private:
    template <class Array>
    void take(Array& array, size_t size) {
        constexpr size_t PAGE = 4096;  // what the allocator may add
        bytes_ += size * sizeof(*array.data()) + PAGE;
        if (allocate_) array.resize(size);
    }

    void take_scratch(size_t number) {
        const Level<T>& level = plan_.levels[number];
        Scratch& scratch = scratch_[number];
        const int w = level.width, patch = level.patch.size;
        const bool in_chain = int(number) < plan_.chain, ends_chain = int(number) == plan_.chain - 1;
        const size_t padded = size_t(w + patch - 1) * (w + patch - 1);
        for (int a = 0; a < arrays_; ++a) {
            take(scratch.values[a], BLOCK * value_pitch(level));
            if (!in_chain) take(scratch.padded[a], padded);
            if (plan_.chain > 1 && number == 0) {
                // All layers that go by displacement have one grid.
                take(displaced_[a], size_t(level.height) * (w + largest_patch() - 1));
                take(across_[a], size_t(level.positions()));
            }
            if (level.last || (in_chain && !ends_chain)) continue;
            if (plan_.chain > 1 && ends_chain)
                take(spread_[a], size_t(level.positions()) * value_pitch(level));
            take(scratch.pooled[a], size_t(level.pooled_positions()) * level.pooled_positions());
            take(scratch.columns[a], size_t(value_pitch(level)) * level.pooled_width);
            take(scratch.rows[a], size_t(level.ring) * level.pooled_width * level.pooled_width);
        }
        if (number == 0 && plan_.chain == 1) {
            take(products_, padded);
            take(sums_, size_t(patch) * sums_stride());
        }
    }

    // Of the layers that go by displacement.
    int largest_patch() const {
        int largest = 0;
        for (int number = 0; number < plan_.chain; ++number)
            largest = std::max(largest, plan_.levels[number].patch.size);
        return largest;
    }

    // Rows after the scalar function have zeros at their ends where pooling takes what lies beyond the
    // border.
    static int value_pitch(const Level<T>& level) {
        return level.regular_taps.left + level.width + level.regular_taps.right;
    }

    // Room for whole blocks of columns; an odd number of vectors, so that sums of several pairs of rows do
    // not compete for the same lines of a cache.
    size_t sums_stride() const {
        const size_t w = plan_.levels[0].width;
        return (w + BLOCK) * w | 5;
    }

    // No inner product of two patches exceeds the largest of a patch with itself.
    T norm_defect(size_t number, T norm) const {
        const T largest = norm * norm / T(plan_.levels[number].layer.patch_weight);
        return largest - largest;
    }

    void set_norm(size_t number, int u, int lane, double norm) {
        second_defect_[lane] += norm_defect(number, T(norm));
        const Factors factors(plan_.levels[number].layer, norm);
        SecondFactors& second = second_factors_[number];
        second.before[u][lane] = T(factors.before_second);
        second.after[u][lane] = T(factors.after_second);
        second.addend[u][lane] = T(factors.addend);
        if constexpr (PAIRED) set_first_factors(number, u, lane, factors);
    }

    void set_first_factors(size_t number, int u, int lane, const Factors& factors) {
        first_factors_[number].before[u][lane] = T(factors.before_first);
        first_factors_[number].after[u][lane] = T(factors.after_first);
    }

    // Patch norms from the entries (u, u) before patches, and what follows from them.
    template <class Entry>
    Vectors<T> find_norms(size_t number, const Entry& entry) {
        const Level<T>& level = plan_.levels[number];
        const int h = level.height, w = level.width;
        Vectors<T> norms;
        norms.reserve(level.positions());
        for (int r = 0; r < h; ++r)
            for (int c = 0; c < w; ++c) {
                V sum{};
                for (int e = -level.patch.before; e <= level.patch.after; ++e)
                    for (int f = -level.patch.before; f <= level.patch.after; ++f) {
                        if (level.periodic)
                            sum += entry(wrapped(r + e, h), wrapped(c + f, w));
                        else if (r + e >= 0 && r + e < h && c + f >= 0 && c + f < w)
                            sum += entry(r + e, c + f);
                    }
                for (int lane = 0; lane < LANES<T>; ++lane) {
                    sum[lane] = std::sqrt(std::max(sum[lane] * level.layer.patch_weight, 0.0)) +
                                second_defect_[lane];
                    if (!level.last) set_norm(number, r * w + c, lane, sum[lane]);
                }
                norms.push_back(sum);
            }
        return norms;
    }

    SecondPositions<T> second_positions(size_t number, int u) const {
        const SecondFactors& factors = second_factors_[number];
        return {&factors.before[u], &factors.after[u], &factors.addend[u]};
    }

    // The first layer by pairs of rows, where it pools or is the last

    void layer_by_rows() {
        const Level<T>& level = plan_.levels[0];
        const Patch patch = level.patch;
        std::vector<const V*> rows(patch.size);
        clear_pooled(0);
        for (size_t number = 0; number < level.displacements.size(); ++number) {
            const Displacement& displacement = level.displacements[number];
            const Range all = displacement.first;
            const auto sums = [&](int k) { return &sums_[(k + patch.size) % patch.size * sums_stride()]; };
            int next = all.begin - patch.before;
            for (int r = all.begin; r < all.end; ++r) {
                const int second_row = level.second_row(r, displacement.rows);
                if (!level.needs(r, second_row)) continue;
                int count = 0;
                for (int k = r - patch.before; k <= r + patch.after; ++k) {
                    if (!level.periodic && (k < all.begin || k >= all.end)) continue;
                    if (k >= next) {
                        const int row = level.periodic ? wrapped(k, level.height) : k;
                        inner_products(row, level.second_row(row, displacement.rows), sums(k));
                        next = k + 1;
                    }
                    rows[count++] = sums(k);
                }
                row_pair(0, number, r, second_row, rows.data(), rows.data(), count, level.width);
            }
        }
    }

    // Inner products of patches of one row each: (width, width).
    void inner_products(int row, int second_row, V* out) {
        const Level<T>& level = plan_.levels[0];
        const int w = level.width, channels = plan_.channels;
        const X* x = &first_[size_t(row) * w * channels];
        const V* y = &second_[size_t(second_row) * (w + 2) * channels];
        if (!PAIRED && level.patch.size == 3 && !level.periodic && channels <= 4) {
            switch (channels) {
                case 1:
                    return inner_products_3<1>(x, y, out);
                case 2:
                    return inner_products_3<2>(x, y, out);
                case 3:
                    return inner_products_3<3>(x, y, out);
                default:
                    return inner_products_3<4>(x, y, out);
            }
        }
        const Patch patch = level.patch;
        const int pitch = w + patch.size - 1;
        V* origin = &products_[patch.before * (pitch + 1)];
        for (int c = -patch.before; c < w + patch.after; c += BLOCK) {
            const int n = std::min(BLOCK, w + patch.after - c);
            const X* pixel[BLOCK];
            for (int b = 0; b < n; ++b) {
                const int column = level.periodic ? wrapped(c + b, w) : c + b;
                pixel[b] = column >= 0 && column < w ? x + column * channels : nullptr;
            }
            if (n == BLOCK && std::none_of(pixel, pixel + n, [](const X* p) { return p == nullptr; })) {
                products<T, X, BLOCK>(pixel, y + channels, channels, w, origin + c * pitch, pitch);
                continue;
            }
            for (int b = 0; b < n; ++b) {
                V* row_out = origin + (c + b) * pitch;
                const X* const one[1] = {pixel[b]};
                if (pixel[b])
                    products<T, X, 1>(one, y + channels, channels, w, row_out, pitch);
                else
                    std::fill(row_out, row_out + w, V{});
            }
        }
        for (int c = -patch.before; c < w + patch.after; ++c)
            pad(origin + c * pitch, w, patch, level.periodic);
        for (int c = 0; c < w; ++c)
            sum_diagonals<T>(origin + c * pitch, pitch, patch, level.columns[c], out + c * w);
    }

    template <int CHANNELS>
    void inner_products_3(const X* x, const V* y, V* out) {
        const Level<T>& level = plan_.levels[0];
        const int w = level.width;
        V* before = &products_[0];
        V* here = before + w + 2;
        std::fill(before, before + 2 * (w + 2), V{});
        const X* const pixel[1] = {x};
        products<T, X, 1>(pixel, y + CHANNELS, CHANNELS, w, here + 1, 0);
        for (int c = 0; c < w; c += BLOCK) {
            // The next block takes up the products of this one.
            Range range;
            for (int k = c; k < std::min(c + 2 * BLOCK, w); ++k) range.include(level.columns[k]);
            if (range.empty()) continue;
            summed_products<T, X, CHANNELS, BLOCK>(x, y, w, c, range, before, here, out + c * w, w);
        }
    }

    // What lies beyond both ends of a row of n: zeros, or the other end.
    static void pad(V* row, int n, Patch patch, bool periodic) {
        for (int k = 1; k <= patch.before; ++k) row[-k] = periodic ? row[wrapped(-k, n)] : V{};
        for (int k = 0; k < patch.after; ++k) row[n + k] = periodic ? row[wrapped(k, n)] : V{};
    }

    // Several first layers by displacement, where only the last of them pools or is the trace

    void layers_by_displacement() {
        const int end = plan_.chain - 1;
        const Level<T>& level = plan_.levels[end];
        const int w = level.width;
        if (!level.last) clear_pooled(end);
        for (size_t number = 0; number < level.displacements.size(); ++number) {
            const Displacement& displacement = level.displacements[number];
            for (int shift = level.periodic ? 0 : 1 - w; shift < w; ++shift) {
                bool needed = false;
                for (int c = 0; c < w; ++c) {
                    const int k = level.periodic ? wrapped(c + shift, w) : c + shift;
                    needed |= k >= level.columns[c].begin && k < level.columns[c].end;
                }
                if (needed) follow(displacement, shift, [](size_t, auto) {});
            }
            if (level.last) continue;
            for (int r = displacement.first.begin; r < displacement.first.end; ++r) {
                if (!level.needs(r, level.second_row(r, displacement.rows))) continue;
                for (int c = 0; c < w; c += BLOCK) {
                    const V* in[2];
                    for (int a = 0; a < arrays_; ++a)
                        in[a] = &spread_[a][size_t(r * w + c) * value_pitch(level)];
                    pool_second_columns(end, r, {c, std::min(c + BLOCK, w)}, in, false);
                }
                pool_rows(end, number, r);
            }
        }
    }

    // Columns of the first image from `first` on, n of them, against those of the second from `second` on.
    struct Segment {
        int first, second, n;
    };

    // All layers on the pairs ((r, c), (r + displacement, c + shift)). `before_layer` is called for each with
    // its number and what gives the entry at (r, c).
    template <class BeforeLayer>
    void follow(const Displacement& displacement, int shift, const BeforeLayer& before_layer) {
        const int h = plan_.levels[0].height, w = plan_.levels[0].width, channels = plan_.channels;
        const bool periodic = plan_.periodic;
        std::vector<Segment> segments;
        if (periodic) {
            segments.push_back({0, shift, w - shift});
            if (shift) segments.push_back({w - shift, 0, shift});
        } else {
            segments.push_back({std::max(0, -shift), std::max(0, shift), w - std::abs(shift)});
        }
        const int begin = segments[0].first, n = periodic ? w : segments[0].n;
        const int border = Patch(largest_patch()).before, pitch = w + largest_patch() - 1;
        const Range all = displacement.first;
        const auto second_row = [&](int r) { return plan_.levels[0].second_row(r, displacement.rows); };
        const auto row = [&](int array, int r) { return &displaced_[array][size_t(r) * pitch + border]; };

        for (int r = all.begin; r < all.end; ++r)
            for (const Segment& segment : segments) {
                const X* x = &first_[(size_t(r) * w + segment.first) * channels];
                const V* y = &second_[(size_t(second_row(r)) * (w + 2) + 1 + segment.second) * channels];
                V* out = row(0, r) + segment.first - begin;
                for (int k = 0; k < segment.n; ++k) {
                    V sum = spread(x[k * channels]) * y[k * channels];
                    for (int channel = 1; channel < channels; ++channel)
                        sum += spread(x[k * channels + channel]) * y[k * channels + channel];
                    out[k] = sum;
                }
            }

        std::vector<const V*> rows[2];
        for (int number = 0; number < plan_.chain; ++number) {
            const Level<T>& level = plan_.levels[number];
            const Patch patch = level.patch;
            const int carried = number ? arrays_ : 1;
            before_layer(number, [&](int r, int c) { return row(0, r)[c]; });
            for (int a = 0; a < carried; ++a)
                for (int r = all.begin; r < all.end; ++r) {
                    pad(row(a, r), n, patch, periodic);
                    const V* in = row(a, r) - patch.before;
                    V* out = &across_[a][size_t(r) * w];
                    for (int k = 0; k < n; ++k) {
                        V sum = in[k];
                        for (int e = 1; e < patch.size; ++e) sum += in[k + e];
                        out[k] = sum;
                    }
                }
            for (int r = all.begin; r < all.end; ++r) {
                for (int a = 0; a < carried; ++a) {
                    rows[a].clear();
                    for (int k = r - patch.before; k <= r + patch.after; ++k)
                        if (periodic || (k >= all.begin && k < all.end))
                            rows[a].push_back(&across_[a][size_t(periodic ? wrapped(k, h) : k) * w]);
                }
                const auto& tangent_rows = rows[carried - 1];
                const int count = int(rows[0].size());
                for (const Segment& segment : segments) {
                    const int at = segment.first - begin, u = r * w + segment.first;
                    const FirstFactors& factors = first_factors_[number];
                    apply<T, false>(function_[number], {rows[0].data(), count, at},
                                    {tangent_rows.data(), count, at},
                                    EachPosition<X>{&factors.before[u], &factors.after[u]},
                                    second_positions(number, second_row(r) * w + segment.second), segment.n,
                                    row(0, r) + at, arrays_ == 2 ? row(1, r) + at : nullptr);
                }
                if (displacement.rows == 0 && shift == 0)
                    for (int c = 0; c < w; ++c)
                        same_position(number, r * w + c, false, {tangent_rows.data(), count, c},
                                      row(0, r) + c, row(arrays_ - 1, r) + c);
            }
        }

        const Level<T>& level = plan_.levels[plan_.chain - 1];
        for (int a = 0; a < arrays_; ++a) {
            V total{};
            for (int r = all.begin; r < all.end; ++r) {
                V sum{};
                for (const Segment& segment : segments)
                    for (int k = 0; k < segment.n; ++k) {
                        const int c = segment.first + k, second = segment.second + k;
                        const V value = row(a, r)[c - begin];
                        if (level.last)
                            sum += level.column_weights[c * w + second] * value;
                        else
                            spread_[a][size_t(r * w + c) * value_pitch(level) + level.regular_taps.left +
                                       second] = value;
                    }
                if (level.last) total += level.row_weights[r * h + second_row(r)] * sum;
            }
            add_to_trace(a, total);
        }
    }

    // Later layers by pairs of rows

    void later_layer(size_t number) {
        const Level<T>& level = plan_.levels[number];
        const Patch patch = level.patch;
        const int w = level.width, pitch = w + patch.size - 1;
        clear_pooled(number);
        std::vector<const V*> rows[2];
        for (int a = 0; a < arrays_; ++a)
            for (int e = 0; e < patch.size; ++e)
                rows[a].push_back(&scratch_[number].padded[a][e * (pitch + 1)]);
        for (size_t d = 0; d < level.displacements.size(); ++d) {
            const Displacement& displacement = level.displacements[d];
            for (int r = displacement.first.begin; r < displacement.first.end; ++r) {
                const int s = level.second_row(r, displacement.rows);
                if (!level.needs(r, s)) continue;
                for (int a = 0; a < arrays_; ++a) sum_rows_of_patch(number, a, r, s);
                row_pair(number, d, r, s, rows[0].data(), rows[arrays_ - 1].data(), patch.size, pitch);
            }
        }
    }

    // The sum over the rows of a patch of what the layer before left, with its border.
    void sum_rows_of_patch(size_t number, int array, int r, int s) {
        const Level<T>& level = plan_.levels[number];
        const Patch patch = level.patch;
        const int h = level.height, w = level.width, pitch = w + patch.size - 1;
        const Vectors<T>& in = scratch_[number - 1].pooled[array];
        V* origin = &scratch_[number].padded[array][patch.before * (pitch + 1)];
        bool begun = false;
        for (int e = -patch.before; e <= patch.after; ++e) {
            int i = r + e, k = s + e;
            if (level.periodic) {
                i = wrapped(i, h);
                k = wrapped(k, h);
            } else if (std::min(i, k) < 0 || std::max(i, k) >= h) {
                continue;
            }
            const V* term = &in[size_t(i * h + k) * w * w];
            for (int c = 0; c < w; ++c)
                for (int z = 0; z < w; ++z)
                    origin[c * pitch + z] = begun ? origin[c * pitch + z] + term[c * w + z] : term[c * w + z];
            begun = true;
        }
        if (!level.periodic) return;
        for (int c = 0; c < w; ++c) pad(origin + c * pitch, w, patch, true);
        for (int k = 1; k <= patch.before; ++k)
            copy_row(origin + wrapped(-k, w) * pitch, origin - k * pitch, pitch, patch);
        for (int k = 0; k < patch.after; ++k)
            copy_row(origin + wrapped(k, w) * pitch, origin + (w + k) * pitch, pitch, patch);
    }
    static void copy_row(const V* from, V* to, int pitch, Patch patch) {
        std::copy(from - patch.before, from - patch.before + pitch, to - patch.before);
    }

    // What all layers by rows share

    // The scalar function on a pair of rows, then pooling or the trace. Entry (c, k) before it is the sum of
    // rows[..][c * pitch + k].
    void row_pair(size_t number, size_t displacement, int r, int s, const V* const* rows,
                  const V* const* tangent_rows, int count, int pitch) {
        const Level<T>& level = plan_.levels[number];
        Scratch& scratch = scratch_[number];
        const int w = level.width;
        V row_trace[2] = {};
        for (int c0 = 0; c0 < w; c0 += BLOCK) {
            const Range block{c0, std::min(c0 + BLOCK, w)};
            for (int c = block.begin; c < block.end; ++c) {
                const Range range = level.columns[c];
                if (range.empty()) continue;
                const int u = r * w + c;
                const ptrdiff_t at = ptrdiff_t(c) * pitch;
                const OnePosition<X> first{first_factors_[number].before[u], first_factors_[number].after[u]};
                V* value = &scratch.values[0][(c - c0) * value_pitch(level) + level.regular_taps.left];
                V* tangent =
                    &scratch.values[arrays_ - 1][(c - c0) * value_pitch(level) + level.regular_taps.left];
                const Rows<T> here{rows, count, at + range.begin},
                    tangent_here{tangent_rows, count, at + range.begin};
                const auto second = second_positions(number, s * w + range.begin);
                apply<T, true>(function_[number], here, tangent_here, first, second, range.size(),
                               value + range.begin, tangent + range.begin);
                if (r == s && c >= range.begin && c < range.end)
                    same_position(number, u, folded_, {tangent_rows, count, at + c}, value + c, tangent + c);
                if (level.last)
                    for (int a = 0; a < arrays_; ++a) {
                        const V* row = a ? tangent : value;
                        V sum{};
                        for (int k = range.begin; k < range.end; ++k)
                            sum += level.column_weights[c * w + k] * row[k];
                        row_trace[a] += sum * (folded_ ? spread(first.after_) : V{} + 1);
                    }
            }
            if (!level.last) {
                const V* const in[2] = {&scratch.values[0][0], &scratch.values[arrays_ - 1][0]};
                pool_second_columns(number, r, block, in, folded_);
            }
        }
        if (level.last)
            for (int a = 0; a < arrays_; ++a)
                add_to_trace(a, row_trace[a] * T(level.row_weights[r * level.height + s]));
        else
            pool_rows(number, displacement, r);
    }

    // Sums of rows are added up in double: one float sum over all positions would lose a digit.
    void add_to_trace(int array, V value) {
        for (int lane = 0; lane < LANES<T>; ++lane) trace_[array][lane] += value[lane];
    }

    // A position of a sample with itself (K13).
    void same_position(size_t number, int u, bool folded, Rows<T> tangent_rows, V* value, V* tangent) {
        const LayerDescription& layer = plan_.levels[number].layer;
        const Range lanes = PAIRED ? Range{0, all_same_ ? LANES<T> : 0} : Range{same_, same_ < 0 ? same_ : same_ + 1};
        for (int lane = lanes.begin; lane < lanes.end; ++lane)
            set_same_position(layer, function_[number], lane, lane_of(first_factors_[number].after[u], lane),
                              second_factors_[number].after[u][lane], folded, tangent_rows, value, tangent);
    }

    void clear_pooled(size_t number) {
        for (int a = 0; a < arrays_; ++a)
            std::fill(scratch_[number].pooled[a].begin(), scratch_[number].pooled[a].end(), V{});
    }

    // Pools the columns of the second images, for some columns of row r of the first; in[array]: (columns,
    // value pitch).
    void pool_second_columns(size_t number, int r, Range columns, const V* const (&in)[2], bool folded) {
        const Level<T>& level = plan_.levels[number];
        const int left = level.regular_taps.left;
        for (int a = 0; a < arrays_; ++a)
            for (int c = columns.begin; c < columns.end; ++c) {
                const V norm = folded ? spread(first_factors_[number].after[r * level.width + c]) : V{} + 1;
                pool(level, level.second_pooled[c], in[a] + (c - columns.begin) * value_pitch(level) + left,
                     1, norm, &scratch_[number].columns[a][(left + c) * level.pooled_width], 1);
            }
    }

    // Pools the columns of the first image, then adds to the pairs of pooled rows for which this was the last
    // row.
    void pool_rows(size_t number, size_t displacement, int r) {
        constexpr int PIECE = 48;  // so many vectors of all rows that are kept stay in the fastest cache
        const Level<T>& level = plan_.levels[number];
        const int w = level.pooled_width, size = w * w;
        Scratch& scratch = scratch_[number];
        const RowUpdate* const first = &level.updates[level.updates_begin[displacement * level.height + r]];
        const RowUpdate* const last =
            &level.updates[level.updates_begin[displacement * level.height + r + 1]];
        for (int a = 0; a < arrays_; ++a) {
            const V* in = &scratch.columns[a][level.regular_taps.left * w];
            V* rows = scratch.rows[a].data();
            for (int p = 0; p < w; ++p)
                pool(level, level.first_pooled[p], in + p, w, V{} + 1, rows + (r % level.ring) * size + p, w);
            for (const Range& run : level.runs)
                for (int begin = run.begin; begin < run.end; begin += PIECE) {
                    const Range piece{begin, std::min(begin + PIECE, run.end)};
                    for (const RowUpdate* update = first; update != last; ++update) {
                        V* out = &scratch.pooled[a][size_t(update->block) * size];
                        add_rows(level, *update, rows, size, piece, out);
                    }
                }
        }
    }
};

}  // namespace
