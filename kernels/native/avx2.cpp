// Processors with AVX2 and FMA.
#include "library.hpp"
