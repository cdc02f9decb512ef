// Every processor of the architecture, and the choice among the instruction sets of this one.
#include "library.hpp"

// 2: AVX-512 (F, DQ, BW, VL), 1: AVX2 and FMA, 0: neither.
EXPORT int processor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}
