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
def test_the_line_is_least_squares_with_the_jackknifes_interval(
    means: list[float], repeats: int, seed: int
) -> None:
    """Protects slope and intervals: SciPy's regression of the logarithms, each size counted once, and the same without
    each repeat, whose pseudo-values Student's t takes for independent; a size's ends are where the interval of the
    line's error just meets the one wanted."""
    sizes = [16.0 * 3**k for k in range(len(means))]
    rng = np.random.default_rng(seed)
    values = np.outer(means, np.ones(repeats)) * np.exp(0.1 * rng.standard_normal((len(means), repeats)))

    def line(kept: np.ndarray, place: float = 0.0) -> tuple[float, float]:
        """Slope, and the logarithm of the error at the logarithm of a size."""
        found = stats.linregress(np.log(sizes), [math.log(mean_error(v)) for v in kept])
        return found.slope, found.intercept + place * found.slope

    def halves(place: float) -> np.ndarray:
        without = np.array([line(np.delete(values, k, axis=1), place) for k in range(repeats)])
        pseudo = repeats * np.array(line(values, place)) - (repeats - 1) * without
        return stats.t.ppf(0.975, repeats - 1) * pseudo.std(axis=0, ddof=1) / math.sqrt(repeats)

    fit = power_law(sizes, values.tolist())
    assert fit is not None
    assert fit.slope == pytest.approx(line(values)[0], abs=1e-9)
    if repeats == 1:
        assert fit.interval is None
        return
    half = halves(0.0)[0]
    assert fit.interval == pytest.approx((fit.slope - half, fit.slope + half), abs=1e-9)
    if fit.falls:
        size, ends = fit.size_for(1e-3)
        assert ends is not None
        assert ends[0] <= size <= ends[1]
        assert fit.error(size) == pytest.approx(1e-3)
        for place in np.log(ends):
            if abs(place) < 100:
                gap = abs(line(values, place)[1] - math.log(1e-3))
                assert gap == pytest.approx(halves(place)[1], rel=1e-5, abs=1e-7)


def test_a_power_law_is_found_and_inverted_exactly() -> None:
    """Protects the extrapolation: without scatter it is the law itself, and its interval a point."""
    sizes = [16, 64, 256, 1024]
    fit = power_law(sizes, [[3 * m**-0.5] * 2 for m in sizes])
    assert fit is not None
    assert fit.falls
    assert fit.slope == pytest.approx(-0.5, abs=1e-12)
    size, ends = fit.size_for(0.01)
    assert (size, *(ends or ())) == pytest.approx((90_000,) * 3, rel=1e-6)


@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_intervals_hold_the_truth_nearly_as_often_as_they_say(repeats: int) -> None:
    """Protects the 95 % where the errors of a seed belong together: sums of the first 32, ..., 512 of one sequence of
    draws, as those of nested weights are. An interval from what the line leaves over holds 80 to 92 %."""
    rng = np.random.default_rng(0)
    sizes = np.array([32, 64, 128, 256, 512])
    studies = slopes = held = clear = 0
    for _ in range(400):
        # The error of M features: the norm of the mean of M independent matrices, here of 6 entries.
        draws = rng.standard_normal((repeats, sizes[-1], 6))
        means = np.cumsum(draws, axis=1)[:, sizes - 1] / sizes[None, :, None]
        fit = power_law(sizes.tolist(), np.linalg.norm(means, axis=2).T.tolist())
        assert fit is not None
        assert fit.interval is not None
        studies += 1
        slopes += fit.interval[0] <= -0.5 <= fit.interval[1]
        if fit.falls:
            _, ends = fit.size_for(0.02)
            assert ends is not None
            clear += 1
            held += ends[0] <= 6 / 0.02**2 <= ends[1]
    assert slopes >= 0.9 * studies
    assert held >= 0.9 * clear
    assert clear >= 0.5 * studies


def test_a_single_repeat_gives_a_size_without_an_interval() -> None:
    """Protects against a confidence that one seed cannot give."""
    fit = power_law([16, 64, 256], [[0.4], [0.2], [0.1]])
    assert fit is not None
    assert fit.falls
    assert fit.interval is None
    assert fit.size_for(0.05) == (pytest.approx(1024), None)


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
    size, ends = fit.size_for(1e-300)
    assert ends is not None
    assert all(math.isfinite(one) and one > 1e12 for one in (size, *ends))
