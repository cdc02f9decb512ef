"""Dot-product kernels of vectors: golden values, the facts of K1 to K7, loops as oracle."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import reference
from contracts import KernelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import KernelError
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct, kappa_0, kappa_1, mirror, raise_to

SQRT_3 = math.sqrt(3)


class TestExponential(KernelContract):
    kernel = DotProduct("exponential", sigma=0.6)
    different = DotProduct("exponential", sigma=0.65)
    shape = (11,)


class TestPolynomial(KernelContract):
    kernel = DotProduct("polynomial", degree=3)
    different = DotProduct("polynomial", degree=2)
    shape = (5,)


class TestLinear(KernelContract):
    kernel = DotProduct("linear", scale=0.5)
    different = DotProduct("linear")
    shape = (5,)


class TestArcCosine1(KernelContract):
    kernel = DotProduct("arc-cosine")
    different = DotProduct("arc-cosine", order=0)
    shape = (9,)


class TestArcCosine0(KernelContract):
    kernel = DotProduct("arc-cosine", order=0)
    different = DotProduct("arc-cosine", order=1)
    shape = (9,)


class TestLaplace(KernelContract):
    kernel = DotProduct("laplace", c=0.7, gamma=0.5)
    different = DotProduct("laplace", c=0.7)
    shape = (9,)

    def test_fingerprint_tells_kernels_apart(self) -> None:
        """The default gamma written out is the same kernel; another gamma is not."""
        assert self.kernel.fingerprint == self.different.fingerprint
        assert self.kernel.fingerprint != DotProduct("laplace", c=0.7, gamma=0.6).fingerprint


class TestSquare(KernelContract):
    kernel = DotProduct("square")
    different = DotProduct("polynomial", degree=2)
    shape = (6,)


@pytest.mark.parametrize(
    ("u", "k0", "k1"),
    [
        (-1, 0, 0),
        (-0.5, 1 / 3, SQRT_3 / (2 * math.pi) - 1 / 6),
        (0, 1 / 2, 1 / math.pi),
        (0.3, 0.596986684020678291, 0.482744283835487622),
        (0.5, 2 / 3, SQRT_3 / (2 * math.pi) + 1 / 3),
        (0.9, 0.856433706871293729, 0.909538398844672076),
        (1, 1, 1),
    ],
)
def test_arc_cosine_golden_values(u: float, k0: float, k1: float) -> None:
    """G1."""
    cosine = np.array([float(u)])
    assert kappa_0(cosine)[0] == pytest.approx(k0, abs=1e-12)
    assert kappa_1(cosine)[0] == pytest.approx(k1, abs=1e-12)
    assert DotProduct("arc-cosine", order=0).kappa(cosine)[0] == pytest.approx(k0, abs=1e-12)
    assert DotProduct("arc-cosine", order=1).kappa(cosine)[0] == pytest.approx(k1, abs=1e-12)


def test_cosines_beyond_one_are_clipped() -> None:
    """K2: a cosine that rounds out of [-1, 1] gives no NaN."""
    u = np.array([-1 - 1e-7, 1 + 1e-7])
    np.testing.assert_allclose(kappa_0(u), [0, 1], atol=1e-15)
    np.testing.assert_allclose(kappa_1(u), [0, 1], atol=1e-15)


def test_kappa_1_in_single_precision_near_one() -> None:
    """Forming 1 - u^2 from rounded squares would cost three digits here."""
    u = (1 - np.logspace(-7, -3, 50)).astype(np.float32)
    assert np.abs(kappa_1(u) - kappa_1(u.astype(np.float64))).max() < 3e-7


def test_arc_cosine_kernels_are_expectations() -> None:
    """K4: twice the mean of products of ReLU (of steps) over Gaussian vectors."""
    rng = np.random.default_rng(0)
    m = 200_000
    X = np.array([[1.0, 0, 0], [0, 2.0, 0], [1, 1, 1]])
    G = rng.standard_normal((m, 3)) @ X.T
    relu, step = np.maximum(G, 0), (G >= 0).astype(float)
    norms = np.linalg.norm(X, axis=1)
    scale = np.outer(norms, norms)
    np.testing.assert_allclose(
        2 * relu.T @ relu / m / scale, DotProduct("arc-cosine").gram(X) / scale, atol=5 * math.sqrt(5 / m)
    )
    # A step function is bounded by one, so twice its mean deviates by less.
    np.testing.assert_allclose(
        2 * step.T @ step / m, DotProduct("arc-cosine", order=0).gram(X) / scale, atol=5 / math.sqrt(m)
    )


def test_exponential_is_the_gaussian_kernel_on_the_sphere() -> None:
    """K5."""
    X = np.random.default_rng(0).standard_normal((6, 4))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    distances = ((X[:, None] - X[None]) ** 2).sum(-1)
    np.testing.assert_allclose(
        DotProduct("exponential", sigma=0.6).gram(X), np.exp(-distances / (2 * 0.36)), rtol=1e-13
    )


def test_square_is_not_homogeneous() -> None:
    """K6: <x, y>^2, where polynomial of degree 2 divides by the norms."""
    X = np.random.default_rng(0).standard_normal((5, 3))
    np.testing.assert_allclose(DotProduct("square").gram(X), (X @ X.T) ** 2, rtol=1e-12)


KERNELS = {
    ("exponential", 0.6): DotProduct("exponential", sigma=0.6),
    ("polynomial", 4): DotProduct("polynomial", degree=4),
    ("polynomial", 5): DotProduct("polynomial", degree=5),
    ("linear", 0.5): DotProduct("linear", scale=0.5),
    ("arc-cosine-0", 1): DotProduct("arc-cosine", order=0),
    ("arc-cosine-1", 1): DotProduct("arc-cosine", order=1),
    ("laplace", 0.7): DotProduct("laplace", c=0.7),
}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(KERNELS)),
    n=st.integers(1, 6),
    d=st.integers(1, 7),
    decades=st.integers(-9, 3),
    seed=st.integers(0, 1000),
)
def test_equals_loops(name: tuple[str, float], n: int, d: int, decades: int, seed: int) -> None:
    """K1, K2 against loops, with norms on both sides of the floor."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * 10.0 ** rng.integers(min(decades, 0), max(decades, 1), (n, 1))
    Y = rng.standard_normal((4, d))
    expected = reference.homogeneous(lambda u: reference.scalar(name[0], u, name[1]), X, Y)
    # kappa_0 and the Laplace kernel amplify the rounding of a cosine near 1 to its square root (K13).
    rtol = 1e-7 if name[0] in ("arc-cosine-0", "laplace") else 1e-11
    scale = np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(Y, axis=1))
    np.testing.assert_allclose(KERNELS[name].gram(X, Y) / scale, expected / scale, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("kernel", "slope"),
    [
        (DotProduct("arc-cosine"), 1),
        (DotProduct("linear", scale=0.5), 0.5),
        (DotProduct("exponential", sigma=1.0), 1),
        (DotProduct("exponential", sigma=0.6), 1 / 0.36),
        (DotProduct("polynomial", degree=2), 2),
        (DotProduct("polynomial", degree=3), 3),
        (DotProduct("polynomial", degree=4), 4),
    ],
)
def test_expansion_is_bounded_by_the_slope_at_one(kernel: DotProduct, slope: float) -> None:
    """K7: |phi(z) - phi(z')| <= max(1, sqrt(kappa'(1))) |z - z'|, and the bound of exp 0.6 is nearly reached."""
    assert kernel.kappa_prime_at_1 == pytest.approx(slope)
    assert kernel.is_nonexpansive == (slope <= 1)
    rng = np.random.default_rng(0)
    largest = 0.0
    for spread in (1.0, 1e-1, 1e-2):
        z = rng.standard_normal((300, 5)) * 10.0 ** rng.uniform(-3, 3, (300, 1))
        other = z + spread * np.linalg.norm(z, axis=1, keepdims=True) * rng.standard_normal((300, 5))
        for x, y in zip(z, other, strict=True):
            K = kernel.gram(np.stack([x, y]))
            distance = math.sqrt(max(0, K[0, 0] + K[1, 1] - 2 * K[0, 1]))
            largest = max(largest, distance / np.linalg.norm(x - y))
    assert largest <= max(1, math.sqrt(slope)) * (1 + 1e-6)
    if slope > 2.7 and kernel.kernel == "exponential":
        assert largest > 1.6


def test_slopes_that_are_infinite() -> None:
    assert DotProduct("arc-cosine", order=0).kappa_prime_at_1 == math.inf
    assert DotProduct("laplace").kappa_prime_at_1 == math.inf
    assert DotProduct("laplace", c=2, gamma=1).kappa_prime_at_1 == 2
    assert not DotProduct("square").is_nonexpansive


def test_same_sample_has_cosine_exactly_one() -> None:
    """K13: without it kappa_0 of a sample with itself is wrong in the fourth digit in float32."""
    X = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    kernel = DotProduct("arc-cosine", order=0)
    a = kernel.prepare(X)
    np.testing.assert_allclose(np.diag(kernel.pair(a, a)), a.arrays["norm"] ** 2, rtol=3e-7)
    apart = kernel.prepare(X, pool="another")
    assert np.abs(np.diag(kernel.pair(a, apart)) / a.arrays["norm"] ** 2 - 1).max() > 1e-6


def test_all_homogeneous_kernels_prepare_the_same() -> None:
    descriptions = [
        kernel.prepared_description()
        for kernel in (DotProduct("linear"), DotProduct("square"), FullyConnected("ntk", 4))
    ]
    assert descriptions[0] == descriptions[1] == descriptions[2]
    assert DotProduct("linear", floor=1e-3).prepared_description() != descriptions[0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kernel": "exponentail", "sigma": 1}, "did you mean 'exponential'"),
        ({"kernel": "exponential"}, "sigma is missing"),
        ({"kernel": "exponential", "sigma": -1}, "sigma must be a positive number"),
        ({"kernel": "exponential", "sigma": math.inf}, "sigma must be a positive number"),
        ({"kernel": "exponential", "sigma": True}, "sigma must be a positive number"),
        ({"kernel": "exponential", "sigma": 1, "degree": 2}, "degree has no meaning"),
        ({"kernel": "polynomial", "degree": 0}, "degree must be a whole number"),
        ({"kernel": "polynomial", "degree": 2.0}, "degree must be a whole number"),
        ({"kernel": "arc-cosine", "order": 2}, "order must be 0 or 1"),
        ({"kernel": "laplace", "gamma": 1.5}, "gamma must be at most 1"),
        ({"kernel": "linear", "floor": 0}, "floor must be a positive number"),
    ],
)
def test_invalid_parameters_are_named(parameters: dict, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        DotProduct(**parameters)


@pytest.mark.parametrize(
    "kernel", [DotProduct("exponential", sigma=0.6), FullyConnected("ntk", 3), FullyConnected("both", 3)]
)
def test_scratch_memory_is_as_stated(kernel: DotProduct | FullyConnected) -> None:
    """The plan trusts cost().scratch_bytes: within 20 % of what pair really allocates beside its result."""
    a = kernel.prepare(np.random.default_rng(0).standard_normal((600, 20)).astype(np.float32))
    b = kernel.prepare(np.random.default_rng(1).standard_normal((3000, 20)).astype(np.float32), pool="b")
    tracemalloc.start()
    K = kernel.pair(a, b)
    peak = tracemalloc.get_traced_memory()[1] - K.nbytes
    tracemalloc.stop()
    assert kernel.cost(600, 3000, (20,)).scratch_bytes == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 6, 7, 12, 31, 1000])
def test_powers_equal_those_of_numpy(degree: int) -> None:
    """Protects powers by squaring, of even, odd and large degrees, down to values that underflow."""
    u = np.linspace(-1, 1, 101)
    values = DotProduct("polynomial", degree=degree).kappa(u)
    np.testing.assert_allclose(values, u**degree, rtol=1e-12)


def test_a_power_takes_few_products() -> None:
    """Protects from time that grows with the degree: product by product, this one would never end."""
    u = np.array([1.0, -1.0, 0.5])
    raise_to(u, 10**18 + 1, np.empty(3))
    np.testing.assert_array_equal(u, [1, -1, 0])


def test_a_parameter_of_another_kernel_says_whose_it_is() -> None:
    """Protects ``exponential`` with a degree: whose that is, and what is needed instead."""
    with pytest.raises(KernelError, match=r"it belongs to 'polynomial': exponential takes sigma"):
        DotProduct("exponential", degree=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kernel",
    [
        *(DotProduct("exponential", sigma=0.6), DotProduct("polynomial", degree=3), DotProduct("linear")),
        *(DotProduct("arc-cosine", order=0), DotProduct("arc-cosine", order=1)),
        *(DotProduct("laplace"), DotProduct("square")),
        *(FullyConnected(family, depth=3) for family in ("rf", "ntk", "both")),
        *(FullyConnected(family, bias=True) for family in ("rf", "ntk", "both")),
        FullyConnected("ntk", depth=3, normalize_inputs=True),
    ],
    ids=lambda value: value.kernel if isinstance(value, DotProduct) else None,
)
def test_samples_with_themselves_give_a_symmetric_matrix(
    kernel: DotProduct | FullyConnected, dtype: type
) -> None:
    """Solvers that read one triangle and solvers that read both solve with one matrix, also where the second side
    was prepared again."""
    X = np.random.default_rng(0).gamma(1.0, size=(601, 37)).astype(dtype)
    a, again = kernel.prepare(X), kernel.prepare(X)
    for b in (a, again):
        K = kernel.pair(a, b)
        assert np.array_equal(K, np.swapaxes(K, -1, -2))


def test_tiles_on_both_sides_of_the_diagonal_are_scaled_alike() -> None:
    """The weights of a pair round the same in whichever order its samples come."""
    # Cosines of 0 and of 1 alone: no product rounds, and all that differs is the scaling.
    X = (
        np.random.default_rng(0).uniform(0.5, 2.0, size=300)[:, None] * np.eye(3)[np.arange(300) % 3]
    ).astype("f4")
    kernel = FullyConnected("rf", depth=2)
    a, b = kernel.prepare(X[:150]), kernel.prepare(X[150:], np.arange(150, 300))
    assert np.array_equal(kernel.pair(a, b), kernel.pair(b, a).T)


@pytest.mark.parametrize("n", [1, 3, 255, 256, 257, 700])
def test_mirror_copies_the_lower_triangle(n: int) -> None:
    K = np.random.default_rng(0).standard_normal((2, n, n)).astype(np.float32)
    expected = np.tril(K) + np.swapaxes(np.tril(K, -1), -1, -2)
    mirror(K)
    assert np.array_equal(K, expected)
