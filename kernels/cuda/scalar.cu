// Scalar functions of layers (SPEC K3, K5, K6) and index arithmetic, shared by all kernels.

enum Function { RELU, EXPONENTIAL, POLYNOMIAL, LINEAR, SQUARE };

// An inner product of patches and what its patches' norms give.
struct Patches {
    float inverse_left;   // 1 / max(norm, floor)
    float inverse_right;  // the same times the factor of the cosine that the function wants
    float norms;          // product of the two norms
};

// By Horner's rule, highest power first.
template <class... Rest>
__device__ __forceinline__ float polynomial(float a, float leading, Rest... rest) {
    float value = leading;
    ((value = fmaf(value, a, rest)), ...);
    return value;
}

// sqrt(1 - a) times these polynomials are arccos(a) / pi and (sqrt(1 - a^2) - a arccos(a)) / pi on [0, 1];
// minimax, off by at most 3e-8 and 7e-9.
__device__ __forceinline__ float angle_polynomial(float a) {
    return polynomial(a, 0.0008313364232890308f, -0.0038207992911338806f, 0.008837210014462471f,
                      -0.015660030767321587f, 0.028277341276407242f, -0.06830646842718124f, 0.4999999701976776f);
}

__device__ __forceinline__ float arc_polynomial(float a) {
    return polynomial(a, 0.00023506220895797014f, -0.0011910126777365804f, 0.003321242518723011f,
                      -0.008336443454027176f, 0.028505628928542137f, -0.3408442735671997f, 0.31830987334251404f);
}

// Value of a layer's kernel of two patches; for RELU with TANGENT also kappa_0 of their cosine.
// SIGNED: the product may be negative. DEGREE: of POLYNOMIAL. number: 1 / sigma^2 times log2(e) for EXPONENTIAL,
// which its inverse_right carries too.
template <int FUNCTION, bool TANGENT, bool SIGNED, int DEGREE>
__device__ __forceinline__ float pointwise(float product, Patches patches, float number, float& kappa_0) {
    if (FUNCTION == SQUARE) return product * product;
    const float cosine = product * patches.inverse_left * patches.inverse_right;
    if (FUNCTION == EXPONENTIAL)
        return exp2f(fmaf(product * patches.inverse_left, patches.inverse_right, -number)) * patches.norms;
    if (FUNCTION == POLYNOMIAL) {
        float power = cosine;
        int leading = 1;
        while (2 * leading <= DEGREE) leading *= 2;
        for (int bit = leading / 2; bit > 0; bit /= 2) {
            power *= power;
            if (DEGREE & bit) power *= cosine;
        }
        return power * patches.norms;
    }
    if (FUNCTION == LINEAR) return cosine * patches.norms;
    if (SIGNED) {
        const float size = fminf(fabsf(cosine), 1.0f);
        const float root = sqrtf(1.0f - size);
        if (TANGENT) kappa_0 = 0.5f + copysignf(fmaf(-root, angle_polynomial(size), 0.5f), cosine);
        return fmaf(root, arc_polynomial(size), fmaxf(cosine, 0.0f)) * patches.norms;
    }
    const float size = fminf(cosine, 1.0f);
    const float root = sqrtf(1.0f - size);
    if (TANGENT) kappa_0 = fmaf(-root, angle_polynomial(size), 1.0f);
    return fmaf(root, arc_polynomial(size), size) * patches.norms;
}

// The same for a patch and itself, where cosine and kappa_0 are 1 (K13).
template <int FUNCTION>
__device__ __forceinline__ float pointwise_of_equal(float norms, float number) {
    return FUNCTION == LINEAR ? number * norms : norms;
}

__device__ __forceinline__ int wrapped(int position, int size) {
    const int rest = position % size;
    return rest < 0 ? rest + size : rest;
}

__device__ __forceinline__ bool within(int position, int size) {
    return position >= 0 && position < size;
}

__device__ __forceinline__ constexpr int floor_of_quotient(int a, int b) {
    return a >= 0 ? a / b : -((b - 1 - a) / b);
}
