// What CUDA source needs to be compiled as C++: the threads of a block are fibres that run one at a time, and change
// over at shuffles and barriers alone. A warp's lanes meet at every shuffle, a block's threads at every barrier;
// where some wait that the others will never join, the launch ends with a message.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __constant__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline Index threadIdx, blockIdx;

namespace fibres {

constexpr size_t STACK = 256 * 1024;
constexpr unsigned WARP = 32;

// A place to come back to. Changing contexts asks the system for the signal mask each time, which takes nearly all
// of a run; a jump does not, but sanitizers cannot follow it to another stack.
struct Place {
    ucontext_t context;
    jmp_buf jump;
    bool entered;  // left by a jump before
};

inline void change(Place& from, Place& to) {
#ifndef __SANITIZE_ADDRESS__
    from.entered = true;
    if (_setjmp(from.jump) != 0) return;
    if (to.entered) _longjmp(to.jump, 1);
    setcontext(&to.context);
#else
    swapcontext(&from.context, &to.context);
#endif
}

enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };

struct Fibre {
    Place place;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state;
    unsigned shuffles;  // how many this thread has come to
    char offered[2][8];
};

inline std::vector<std::unique_ptr<Fibre>> all;
inline Place scheduler;
inline unsigned current;
inline void (*body)();
inline const char* message;

inline void wait(State state) {
    Fibre& fibre = *all[current];
    fibre.state = state;
    change(fibre.place, scheduler);
}

inline void enter() {
    body();
    all[current]->state = DONE;
    change(all[current]->place, scheduler);
}

inline unsigned count(unsigned begin, unsigned end, State state) {
    unsigned found = 0;
    for (unsigned n = begin; n < end; ++n) found += all[n]->state == state;
    return found;
}

inline void release(unsigned begin, unsigned end) {
    for (unsigned n = begin; n < end; ++n) all[n]->state = READY;
}

// Runs a warp until all of its lanes are at a barrier or done.
inline bool run_warp(unsigned begin) {
    const unsigned end = begin + WARP;
    for (;;) {
        for (unsigned n = begin; n < end; ++n) {
            if (all[n]->state != READY) continue;
            current = n;
            threadIdx.x = n;
            change(scheduler, all[n]->place);
        }
        if (count(begin, end, AT_SHUFFLE) == 0) return true;
        if (count(begin, end, AT_SHUFFLE) < WARP) {
            message = "lanes of one warp wait at a shuffle that other lanes do not come to";
            return false;
        }
        release(begin, end);
    }
}

// Runs a block; backwards takes its warps last to first.
inline bool run_block(unsigned threads, bool backwards) {
    while (all.size() < threads) all.push_back(std::make_unique<Fibre>());
    for (unsigned n = 0; n < threads; ++n) {
        Fibre& fibre = *all[n];
        ucontext_t& context = fibre.place.context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibre.stack.get();
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, enter, 0);
        fibre.place.entered = false;
        fibre.state = READY;
        fibre.shuffles = 0;
    }
    for (;;) {
        for (unsigned n = 0; n < threads; n += WARP)
            if (!run_warp(backwards ? threads - WARP - n : n)) return false;
        if (count(0, threads, DONE) == threads) return true;
        if (count(0, threads, AT_BARRIER) < threads) {
            message = "some threads of a block wait at a barrier and others have left";
            return false;
        }
        release(0, threads);
    }
}

}  // namespace fibres

using std::max;
using std::min;

inline void __syncthreads() { fibres::wait(fibres::AT_BARRIER); }

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
    using namespace fibres;
    const unsigned own = current;
    const unsigned slot = all[own]->shuffles++ % 2;
    std::memcpy(all[own]->offered[slot], &value, sizeof value);
    wait(AT_SHUFFLE);
    const unsigned lane = (own & ~(unsigned)(width - 1)) + ((unsigned)source & (unsigned)(width - 1));
    std::memcpy(&value, all[lane]->offered[slot], sizeof value);
    return value;
}
