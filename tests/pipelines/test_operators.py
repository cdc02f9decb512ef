"""Reading a stored Gram matrix through index sets, against the same matrix held densely."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import operators
from pipelines.errors import DataError
from pipelines.operators import GramOperator, cross_block, predict
from pipelines.tilesource import index_set


class MemoryTiles:
    """A tile source over a dense matrix that counts its reads and refuses tiles a store would not hold."""

    def __init__(self, matrix: np.ndarray, side: int, symmetric: bool = True) -> None:
        self.matrix, self.side, self.symmetric = matrix, side, symmetric
        self.shape = matrix.shape
        self.reads: Counter[tuple[int, int]] = Counter()

    def read_tile(self, i: int, j: int) -> np.ndarray:
        assert i >= j or not self.symmetric, "a symmetric store holds no tile above the diagonal"
        assert i * self.side < self.shape[0]
        assert j * self.side < self.shape[1]
        self.reads[i, j] += 1
        rows, columns = slice(i * self.side, (i + 1) * self.side), slice(j * self.side, (j + 1) * self.side)
        return self.matrix[rows, columns].copy()


def symmetric_matrix(n: int, dtype: str = "float64") -> np.ndarray:
    half = np.random.default_rng(n).standard_normal((n, n))
    return (half + half.T).astype(dtype)


@st.composite
def masked(draw: st.DrawFn) -> tuple[MemoryTiles, np.ndarray, np.ndarray]:
    """A ragged symmetric store and two index sets over it, from single rows to all."""
    n, side = draw(st.integers(1, 23)), draw(st.integers(1, 9))
    sets = [np.array(sorted(draw(st.sets(st.integers(0, n - 1), min_size=1))), np.int64) for _ in range(2)]
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return MemoryTiles(symmetric_matrix(n, dtype), side), sets[0], sets[1]


@settings(deadline=None, max_examples=60)
@given(masked())
def test_dense_equals_the_masked_matrix(case: tuple[MemoryTiles, np.ndarray, np.ndarray]) -> None:
    source, rows, _ = case
    operator = GramOperator(source, rows)
    expected = source.matrix[np.ix_(rows, rows)]
    full = operator.dense()
    assert full.flags.f_contiguous
    np.testing.assert_array_equal(full, expected)
    assert max(source.reads.values()) == 1
    for triangle, part in (("upper", np.triu), ("lower", np.tril)):
        out = np.full(operator.shape, np.nan, np.float32, order="F")
        assert operator.dense(out=out, triangle=triangle) is out
        np.testing.assert_array_equal(part(out), part(expected.astype(np.float32)))
    np.testing.assert_array_equal(operator.diag(), np.diag(expected))
    assert operator.dtype == source.matrix.dtype


def test_a_lower_triangle_leaves_what_is_above_alone() -> None:
    """Protects the memory of a triangle: of tiles on the diagonal, too, only squares on it are written."""
    matrix = symmetric_matrix(700, "float32")
    rows = np.delete(np.arange(700), [3, 400])
    out = np.full((698, 698), np.nan, order="F")
    GramOperator(MemoryTiles(matrix, 600), rows).dense(out=out, triangle="lower")
    np.testing.assert_array_equal(np.tril(out), np.tril(matrix[np.ix_(rows, rows)]))
    assert np.isfinite(np.triu(out, 1)[np.triu_indices(698, 1)]).sum() < 698 * operators.PANEL / 2


@settings(deadline=None, max_examples=60)
@given(masked())
def test_cross_block_and_predict_equal_the_dense_block(
    case: tuple[MemoryTiles, np.ndarray, np.ndarray],
) -> None:
    source, rows, columns = case
    expected = source.matrix[np.ix_(rows, columns)].astype(np.float64)
    np.testing.assert_array_equal(cross_block(source, rows, columns), expected)
    assert max(source.reads.values()) == 1, "each stored tile is read once, for both triangles"
    alpha = np.random.default_rng(0).standard_normal((3, len(columns), 2))
    stack = predict(source, rows, columns, alpha)
    assert stack.shape == (3, len(rows), 2)
    np.testing.assert_allclose(stack, expected @ alpha, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(predict(source, rows, columns, alpha[0]), stack[0], rtol=1e-13, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(masked())
def test_matmul_equals_the_dense_product(case: tuple[MemoryTiles, np.ndarray, np.ndarray]) -> None:
    source, rows, _ = case
    V = np.random.default_rng(1).standard_normal((len(rows), 3))
    expected = source.matrix[np.ix_(rows, rows)].astype(np.float64) @ V
    np.testing.assert_allclose(GramOperator(source, rows).matmul(V), expected, rtol=1e-12, atol=1e-12)


def test_rectangular_store_is_read_as_it_lies() -> None:
    matrix = np.random.default_rng(2).standard_normal((11, 17))
    source = MemoryTiles(matrix, 4, symmetric=False)
    rows, columns = np.array([0, 3, 4, 10]), np.array([1, 2, 3, 9, 16])
    np.testing.assert_array_equal(cross_block(source, rows, columns), matrix[np.ix_(rows, columns)])
    alpha = np.ones((5, 1))
    np.testing.assert_allclose(predict(source, rows, columns, alpha), matrix[np.ix_(rows, columns)] @ alpha)
    with pytest.raises(DataError, match="symmetric store"):
        GramOperator(source, rows)


def test_untouched_tiles_are_not_read() -> None:
    """A small run on a large pool pays for its own tiles only."""
    source = MemoryTiles(symmetric_matrix(40), 10)
    GramOperator(source, np.arange(5, 12)).dense()
    assert set(source.reads) == {(0, 0), (1, 0), (1, 1)}


def test_float32_tiles_are_accumulated_in_float64() -> None:
    n = 4096
    source = MemoryTiles(np.full((n, n), np.float32(0.1)), 1024)
    product = GramOperator(source, np.arange(n)).matmul(np.ones((n, 1)))
    np.testing.assert_allclose(product, n * float(np.float32(0.1)), rtol=1e-14)


@pytest.mark.parametrize("rows", [[2, 1], [1, 1], [-1, 2], [0, 5], [0.5], [[0], [1]]])
def test_bad_index_sets_are_refused(rows: list[int]) -> None:
    with pytest.raises(DataError, match="training"):
        index_set(rows, 5, "training")


def test_shapes_that_do_not_fit_are_refused() -> None:
    source = MemoryTiles(symmetric_matrix(6), 4)
    with pytest.raises(DataError, match="do not fit 3 columns"):
        predict(source, [0], [0, 1, 2], np.ones((4, 1)))
    with pytest.raises(DataError, match="Fortran"):
        GramOperator(source, [0, 1]).dense(out=np.empty((2, 2)))
    with pytest.raises(DataError, match="at least one row"):
        GramOperator(source, np.empty(0, np.int64))


def test_predicting_no_rows_gives_no_rows() -> None:
    source = MemoryTiles(symmetric_matrix(6), 4)
    assert predict(source, np.empty(0, np.int64), [0, 1], np.ones((2, 2, 3))).shape == (2, 0, 3)
