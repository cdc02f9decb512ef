// The interface to Python: plain functions on plain arrays.
#pragma once

#include <new>

#include "columns.hpp"
#include "entrywise.hpp"
#include "pairs.hpp"

namespace {

// The group of images from `begin` on. Lanes beyond the last image repeat it.
template <class T, class X, class Number>
void set_images(Pairs<T, X>& pairs, const Plan<T>& plan, int64_t begin, int64_t n, const Number* images) {
    const int64_t size = int64_t(plan.levels[0].positions()) * plan.channels;
    for (int lane = 0; lane < LANES<T>; ++lane)
        pairs.set_second(lane, images + std::min(begin + lane, n - 1) * size);
}
template <class T, class X>
void set_norms(Pairs<T, X>& pairs, const Plan<T>& plan, int64_t begin, int64_t n, const T* const* norms) {
    for (size_t number = 0; number < plan.levels.size(); ++number)
        for (int lane = 0; lane < LANES<T>; ++lane)
            pairs.set_norms(number, lane,
                            norms[number] + std::min(begin + lane, n - 1) * plan.levels[number].positions());
}

// The outputs that were asked for, from the traces of B and T.
template <class T>
void write(const Plan<T>& plan, const double (&trace)[2][LANES<T>], int64_t count, T* out,
           int64_t output_stride) {
    for (int output = 0; output < (plan.tangent == 2 ? 2 : 1); ++output)
        for (int64_t j = 0; j < count; ++j)
            out[output * output_stride + j] = T(trace[plan.tangent == 1 ? 1 : output][j]);
}

template <class T>
void run_pairs(const Plan<T>& plan, int64_t n, const T* first, const T* const* first_norms, int64_t m,
               const T* second, const T* const* second_norms, const int64_t* same, T* out,
               int64_t output_stride, int64_t stride) {
    Pairs<T, T> pairs(plan);
    set_images(pairs, plan, 0, m, second);
    set_norms(pairs, plan, 0, m, second_norms);
    std::vector<const T*> norms(plan.levels.size());
    double trace[2][LANES<T>];
    for (int64_t i = 0; i < n; ++i) {
        for (size_t number = 0; number < norms.size(); ++number)
            norms[number] = first_norms[number] + i * plan.levels[number].positions();
        pairs.set_first(first + i * plan.levels[0].positions() * plan.channels, norms.data(), int(same[i]));
        pairs.run(trace);
        write(plan, trace, m, out + i * stride, output_stride);
    }
}

template <class T>
void run_paired(const Plan<T>& plan, int64_t n, const T* first, const T* const* first_norms, const T* second,
                const T* const* second_norms, bool same, T* out) {
    Pairs<T, Vector<T>> pairs(plan);
    std::vector<const T*> norms(plan.levels.size());
    double trace[2][LANES<T>];
    for (int64_t begin = 0; begin < n; begin += LANES<T>) {
        set_images(pairs, plan, begin, n, second);
        set_norms(pairs, plan, begin, n, second_norms);
        for (int lane = 0; lane < LANES<T> && !same; ++lane) {
            const int64_t i = std::min(begin + lane, n - 1);
            for (size_t number = 0; number < norms.size(); ++number)
                norms[number] = first_norms[number] + i * plan.levels[number].positions();
            pairs.set_partner(lane, first + i * plan.levels[0].positions() * plan.channels, norms.data());
        }
        pairs.run(trace);
        write(plan, trace, std::min<int64_t>(LANES<T>, n - begin), out + begin, n);
    }
}

template <class Number>
void run_norms(const Plan<double>& plan, int64_t n, const Number* images, Number* const* out) {
    Pairs<double, Vector<double>> pairs(plan);
    for (int64_t begin = 0; begin < n; begin += LANES<double>) {
        std::vector<Vectors<double>> norms;
        set_images(pairs, plan, begin, n, images);
        pairs.run_norms(norms);
        for (size_t number = 0; number < norms.size(); ++number)
            for (int64_t i = begin; i < std::min<int64_t>(begin + LANES<double>, n); ++i)
                for (size_t u = 0; u < norms[number].size(); ++u)
                    out[number][i * norms[number].size() + u] = Number(norms[number][u][i - begin]);
    }
}

// 0, or what went wrong: an exception must not reach the caller, who knows none.
template <class Action>
int guarded(const Action& action) {
    constexpr int NO_MEMORY = 1, FAILED = 2;
    try {
        action();
        return 0;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int lanes(int itemsize) { return itemsize == 4 ? LANES<float> : LANES<double>; }

EXPORT int make_plan(const NetworkDescription* network, int itemsize, void** plan) {
    return guarded([&] {
        if (itemsize == 4)
            *plan = new Plan<float>(*network);
        else
            *plan = new Plan<double>(*network);
    });
}

EXPORT void free_plan(void* plan, int itemsize) {
    if (itemsize == 4)
        delete static_cast<Plan<float>*>(plan);
    else
        delete static_cast<Plan<double>*>(plan);
}

// Memory that a call takes on each thread, whichever of those below, and the plan.
EXPORT int scratch_bytes(const void* plan, int itemsize, size_t* bytes) {
    const auto count = [&](auto zero) {
        using T = decltype(zero);
        const auto& of = *static_cast<const Plan<T>*>(plan);
        *bytes = Pairs<T, Vector<T>>::bytes(of) + of.bytes();
    };
    return guarded([&] { itemsize == 4 ? count(0.0f) : count(0.0); });
}

// n first images against m second ones, at most as many as there are lanes: out[output][i][j] with the given
// strides. same[i]: which second image is the same sample as first image i, or -1.
EXPORT int pairs(const void* plan, int itemsize, int64_t n, const void* first, const void* const* first_norms,
                 int64_t m, const void* second, const void* const* second_norms, const int64_t* same,
                 void* out, int64_t output_stride, int64_t stride) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        run_pairs<T>(*static_cast<const Plan<T>*>(plan), n, static_cast<const T*>(first),
                     reinterpret_cast<const T* const*>(first_norms), m, static_cast<const T*>(second),
                     reinterpret_cast<const T* const*>(second_norms), same, static_cast<T*>(out),
                     output_stride, stride);
    };
    return guarded([&] { itemsize == 4 ? run(0.0f) : run(0.0); });
}

// n first images, each with the second one of its number: out (outputs, n). same: they are the same samples.
EXPORT int paired(const void* plan, int itemsize, int64_t n, const void* first, const void* const* first_norms,
                  int64_t, const void* second, const void* const* second_norms, int same, void* out) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        run_paired<T>(*static_cast<const Plan<T>*>(plan), n, static_cast<const T*>(first),
                      reinterpret_cast<const T* const*>(first_norms), static_cast<const T*>(second),
                      reinterpret_cast<const T* const*>(second_norms), same != 0, static_cast<T*>(out));
    };
    return guarded([&] { itemsize == 4 ? run(0.0f) : run(0.0); });
}

// Patch norms of n images, computed in double: out[layer] (n, positions). The plan is one for double, and its
// supports are those of norms.
EXPORT int patch_norms(const void* plan, int itemsize, int64_t n, const void* images, void* const* out) {
    const auto run = [&](auto zero) {
        using Number = decltype(zero);
        run_norms<Number>(*static_cast<const Plan<double>*>(plan), n, static_cast<const Number*>(images),
                          reinterpret_cast<Number* const*>(out));
    };
    return guarded([&] { itemsize == 4 ? run(0.0f) : run(0.0); });
}

// B (n, m) in place: the scalar function of each entry times the weight of its row; no weights stand for 1.
EXPORT void map_entries(int itemsize, int function, int degree, double shift, int64_t n, int64_t m,
                        const void* weights, void* B) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        map_entries<T>(Function(function), degree, T(shift), n, m, static_cast<const T*>(weights),
                       static_cast<T*>(B));
    };
    itemsize == 4 ? run(0.0f) : run(0.0);
}

// Adds block V_columns to out_rows, and block^T V_rows to out_columns; either one is left out where its result
// is nullptr. block: (n, m) of float or double, rows `pitch` bytes apart; the others (n or m, t) in C order.
EXPORT int add_products(const void* block, int itemsize, int64_t pitch, int64_t n, int64_t m, int64_t t,
                        const double* V_columns, const double* V_rows, double* out_rows, double* out_columns) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        const auto add = out_rows && out_columns ? &add_products<T, true, true>
                         : out_rows              ? &add_products<T, true, false>
                                                 : &add_products<T, false, true>;
        add(static_cast<const char*>(block), pitch, n, m, t, V_columns, V_rows, out_rows, out_columns);
    };
    return guarded([&] { itemsize == 4 ? run(0.0f) : run(0.0); });
}

// What this library was made from: the caller's half must be of the same sources.
EXPORT const char* sources() { return SOURCES; }
