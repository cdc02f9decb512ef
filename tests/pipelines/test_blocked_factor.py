"""Factors of large matrices in memory, by halves, at small sizes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from pipelines import strided
from pipelines.solvers import blocked_factor
from pipelines.solvers.blocked_factor import factor_in_place, upper_factor


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strided, "LARGEST", 4)
    monkeypatch.setattr(blocked_factor, "STRIP", 5)


def positive(n: int, seed: int, dtype: str = "float64") -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(n, n))
    return np.asfortranarray((X @ X.T + n * np.eye(n)).astype(dtype))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 33), seed=st.integers(0, 100), dtype=st.sampled_from(["float32", "float64"]))
def test_the_factor_is_scipy_s_and_the_upper_triangle_stays(n: int, seed: int, dtype: str) -> None:
    """Protects the solve, and the matrix that is kept above the diagonal for the next ridge."""
    K = positive(n, seed, dtype)
    matrix = K.copy(order="F")
    assert factor_in_place(matrix) == 0
    expected = scipy.linalg.cholesky(K.astype(np.float64), lower=True)
    assert np.tril(matrix) == pytest.approx(expected, rel=1e-12 if dtype == "float64" else 1e-4, abs=1e-4)
    if dtype == "float64":
        np.testing.assert_allclose(np.tril(matrix), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(np.triu(matrix, 1), np.triu(K, 1))


def test_what_is_above_the_diagonal_is_not_read() -> None:
    """Protects a second ridge: K stays above the diagonal of the spent factor."""
    K = positive(23, 1)
    matrix = np.asfortranarray(np.tril(K) + np.triu(np.full_like(K, 7.0), 1))
    assert factor_in_place(matrix) == 0
    np.testing.assert_allclose(np.tril(matrix), scipy.linalg.cholesky(K, lower=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_of_a_matrix_are_worked_on_where_they_lie(dtype: str) -> None:
    """Protects what lies beside a part: columns of a view are further apart than it has rows."""
    rng = np.random.default_rng(4)
    whole = np.asfortranarray(rng.normal(size=(17, 15)).astype(dtype))
    triangle = np.asfortranarray(positive(9, 5, dtype))[2:7, 2:7]
    before = whole.copy(order="F")
    rows, columns = slice(3, 12), slice(4, 9)
    strided.divide(whole[rows, columns], triangle)
    expected = before.copy(order="F")
    lower = np.tril(triangle).astype(np.float64)
    expected[rows, columns] = scipy.linalg.solve_triangular(lower, before[rows, columns].T, lower=True).T
    np.testing.assert_allclose(whole, expected, rtol=1e-5 if dtype == "float32" else 1e-12)
    before = whole.copy(order="F")
    strided.add_square(whole[5:10, 9:14], before[1:6, 0:3], -1.0)
    expected = before.copy(order="F")
    expected[5:10, 9:14] -= np.tril(before[1:6, 0:3] @ before[1:6, 0:3].T)
    np.testing.assert_allclose(whole, expected, rtol=1e-5 if dtype == "float32" else 1e-12)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 23),
    k=st.integers(1, 6),
    lower=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_squares_are_added_to_one_triangle(n: int, k: int, lower: bool, transposed: bool, dtype: str) -> None:
    """Protects both orders of factors and both triangles, by halves down to single rows and columns."""
    rng = np.random.default_rng(n + 31 * k)
    factor = np.asarray(rng.standard_normal((n, k)).astype(dtype), order="C" if transposed else "F")
    matrix = np.asfortranarray(rng.standard_normal((n, n)).astype(dtype))
    part = np.tril if lower else np.triu
    expected = matrix + 0.5 * part(factor @ factor.T)
    strided.add_square(matrix, factor, 0.5, lower)
    np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [0, 4, 5, 6, 14, 22])
def test_the_first_minor_that_is_not_positive_is_lapack_s(bad: int) -> None:
    """Protects the message that names the pivot."""
    K = positive(23, 2)
    K[bad, bad] = -1.0
    (potrf,) = scipy.linalg.get_lapack_funcs(("potrf",), (K,))
    expected = potrf(K.copy(order="F"), lower=1)[1]
    assert factor_in_place(K.copy(order="F")) == expected == bad + 1


def test_upper_factors_are_scipy_s() -> None:
    """Protects the preconditioner of many centres."""
    K = np.ascontiguousarray(positive(23, 3))
    U = upper_factor(K.copy())
    np.testing.assert_allclose(U, scipy.linalg.cholesky(K), rtol=1e-12, atol=1e-12)
    with pytest.raises(scipy.linalg.LinAlgError):
        upper_factor(-K)


@pytest.mark.slow
def test_a_matrix_beyond_openblas_s_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against the death of the process in LAPACK's own factor of so many columns on several threads."""
    monkeypatch.undo()
    n = 17_000
    matrix = np.zeros((n, n), np.float64, order="F")
    ramp = np.arange(n, dtype=np.float64) / n
    for start in range(0, n, 1000):
        rows = slice(start, start + 1000)
        matrix[rows] = np.cos(ramp[rows, None] - ramp)
    matrix[np.diag_indices(n)] += 1.0
    column = matrix[:, 5].copy()
    with threadpool_limits(2, user_api="blas"):
        assert factor_in_place(matrix) == 0
    L = np.tril(matrix[:6, :6])
    np.testing.assert_allclose(np.tril(matrix[:, :6]) @ L[5], column, rtol=1e-10, atol=1e-10)
    last = matrix[-1].copy()
    assert float(last @ last) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dtype"), [(20_000, "float64"), (40_000, "float32")])
def test_squares_beyond_openblas_s_buffers(n: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects factors by halves of still larger matrices, covariances of many features and sketches of high rank
    against the death of the process in syrk on several threads."""
    monkeypatch.undo()
    factor = np.random.default_rng(0).standard_normal((n, 64)).astype(dtype)
    matrix = np.zeros((n, n), dtype, order="F")
    with threadpool_limits(2, user_api="blas"):
        strided.add_square(matrix, factor)
    rows = np.random.default_rng(1).integers(0, n, (2, 1000))
    below, at = rows.max(axis=0), rows.min(axis=0)
    expected = np.einsum("ij,ij->i", factor[below], factor[at], dtype=np.float64)
    np.testing.assert_allclose(matrix[below, at], expected, atol=1e-3 if dtype == "float32" else 1e-11)
    assert not matrix[0, 1:].any()
