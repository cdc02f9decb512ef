// Processors with AVX-512 (F, DQ, BW, VL).
#include "library.hpp"
