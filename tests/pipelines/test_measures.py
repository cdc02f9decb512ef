"""The measures of F6 against dense linear algebra, and the line through errors against SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.comparison.measures import ROWS, errors, mean_error, power_law
from pipelines.errors import NumericalError


def matrices(n: int, seed: int, dtype: str = "float64") -> tuple[np.ndarray, np.ndarray]:
    """A positive definite matrix and a symmetric one beside it whose difference has both signs."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((2, n, n + 3))
    K = A @ A.T
    return K.astype(dtype), (K + 0.1 * (B @ B.T - (n + 3) * np.eye(n))).astype(dtype)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12) | st.sampled_from([64, 65, 130, ROWS + 7]), st.integers(0, 5))
def test_measures_are_those_of_dense_algebra(n: int, seed: int) -> None:
    """Protects F6: the three measures, for sizes on both sides of where Lanczos begins and blocks end."""
    K, other = matrices(n, seed)
    found = errors(K, other)
    scales = np.sqrt(np.diag(K))
    assert found["relF"] == pytest.approx(np.linalg.norm(K - other) / np.linalg.norm(K), rel=1e-12)
    assert found["relOp"] == pytest.approx(np.linalg.norm(K - other, 2) / np.linalg.norm(K, 2), rel=1e-6)
    assert found["relMax"] == pytest.approx(np.abs((K - other) / np.outer(scales, scales)).max(), rel=1e-12)


def test_sums_of_float32_matrices_are_in_float64() -> None:
    """Protects against sums that lose digits with the number of entries."""
    K, other = matrices(ROWS + 5, 0, "float32")
    exact = errors(K.astype(np.float64), other.astype(np.float64))
    assert errors(K, other) == pytest.approx(exact, rel=1e-12)


def test_equal_matrices_differ_by_nothing() -> None:
    K, _ = matrices(100, 1)
    assert errors(K, K.copy()) == {"relF": 0.0, "relOp": 0.0, "relMax": 0.0}


def test_a_zero_sample_counts_where_the_matrices_differ() -> None:
    """Protects relMax where K_ii = 0: nothing where both are zero, infinite where only one is."""
    K, other = matrices(5, 2)
    for matrix in (K, other):
        matrix[2] = matrix[:, 2] = 0
    assert math.isfinite(errors(K, other)["relMax"])
    other[2, 2] = 1e-3
    assert errors(K, other)["relMax"] == math.inf


def test_what_cannot_be_compared_is_refused() -> None:
    K, other = matrices(5, 3)
    with pytest.raises(NumericalError, match="zero"):
        errors(np.zeros_like(K), other)
    other[1, 3] = np.nan
    with pytest.raises(NumericalError, match="not finite"):
        errors(K, other)
    with pytest.raises(ValueError, match="one size"):
        errors(K, other[:3, :3])


def test_the_same_matrices_have_the_same_digits() -> None:
    """Protects a comparison's numbers against Lanczos's own random start."""
    K, other = matrices(150, 4)
    assert errors(K, other) == errors(K, other)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=7),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_line_is_least_squares_with_students_interval(
    means: list[float], repeats: int, seed: int
) -> None:
    """Protects slope and interval: SciPy's regression of the logarithms, each size counted once."""
    sizes = [16.0 * 3**k for k in range(len(means))]
    rng = np.random.default_rng(seed)
    values = [list(mean * np.exp(0.1 * rng.standard_normal(repeats))) for mean in means]
    fit = power_law(sizes, values)
    assert fit is not None
    line = stats.linregress(np.log(sizes), np.log([mean_error(v) for v in values]))
    half = stats.t.ppf(0.975, len(sizes) - 2) * line.stderr
    assert fit.slope == pytest.approx(line.slope, abs=1e-9)
    assert fit.high - fit.low == pytest.approx(2 * half, abs=1e-9)
    assert fit.error(sizes[0]) == pytest.approx(math.exp(line.intercept + line.slope * math.log(sizes[0])))


def test_a_power_law_is_found_and_inverted_exactly() -> None:
    """Protects the extrapolation: without scatter it is the law itself, and its interval a point."""
    sizes = [16, 64, 256, 1024]
    fit = power_law(sizes, [[3 * m**-0.5] * 2 for m in sizes])
    assert fit is not None
    assert fit.falls
    assert fit.slope == pytest.approx(-0.5, abs=1e-12)
    assert fit.size_for(0.01) == pytest.approx((90_000,) * 3, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.floats(1e-3, 0.5))
def test_the_interval_of_a_size_is_where_the_band_holds_the_error(seed: int, wanted: float) -> None:
    """Protects Fieller's interval: at both its ends the 95 % band about the line just meets the error."""
    x = np.log([16.0, 32, 64, 128, 256])
    y = -0.5 * x + 0.05 * np.random.default_rng(seed).standard_normal(5)
    fit = power_law(list(np.exp(x)), [[math.exp(v)] for v in y])
    assert fit is not None
    assert fit.falls
    size, low, high = fit.size_for(wanted)
    assert low <= size <= high
    for end in (low, high):
        u = math.log(end) - fit.centre
        band = fit.scatter * math.sqrt(1 / fit.count + u**2 / fit.spread)
        assert abs(fit.level + fit.slope * u - math.log(wanted)) == pytest.approx(band, rel=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Protects the 95 %: slopes and sizes of 400 noisy lines, of which 380 are expected to be held."""
    rng = np.random.default_rng(0)
    sizes = [32.0, 64, 128, 256, 512]
    slopes = held = 0
    for _ in range(400):
        noisy = [[2 * m**-0.5 * math.exp(0.05 * rng.standard_normal())] for m in sizes]
        fit = power_law(sizes, noisy)
        assert fit is not None
        assert fit.falls
        slopes += fit.low <= -0.5 <= fit.high
        _, low, high = fit.size_for(0.02)
        held += low <= 10_000 <= high
    assert 365 <= slopes <= 395
    assert 365 <= held <= 395


def test_no_line_is_drawn_through_too_little() -> None:
    """Protects against an interval from two sizes, and against the logarithm of zero."""
    assert power_law([16, 64], [[0.1], [0.05]]) is None
    assert power_law([16, 64, 256], [[0.1], [0.05], [0.0]]) is None
    assert power_law([16, 64, 256], [[0.1], [0.05], [math.inf]]) is None


def test_errors_that_do_not_fall_are_not_extrapolated() -> None:
    fit = power_law([16, 64, 256], [[0.1], [0.2], [0.1]])
    assert fit is not None
    assert not fit.falls
    with pytest.raises(ValueError, match="do not clearly fall"):
        fit.size_for(0.01)


def test_an_error_that_no_size_reaches_is_no_crash() -> None:
    """Protects a target such as relF=1e-300, whose size is beyond all numbers."""
    fit = power_law([16, 64, 256], [[0.4, 0.41], [0.2, 0.21], [0.1, 0.11]])
    assert fit is not None
    assert all(math.isfinite(size) and size > 1e12 for size in fit.size_for(1e-300))
