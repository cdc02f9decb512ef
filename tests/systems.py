"""Small linear systems for solvers: matrices in memory read by tiles, targets, and their direct solution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pipelines.solvers.base import Solution


class DenseTiles:
    """A tile source over a matrix in memory; refuses tiles that a store would not hold."""

    def __init__(self, matrix: np.ndarray, side: int, symmetric: bool = True) -> None:
        self.matrix, self.side, self.symmetric = matrix, side, symmetric
        self.shape = matrix.shape

    def read_tile(self, i: int, j: int) -> np.ndarray:
        assert i >= j or not self.symmetric, "a symmetric store holds no tile above the diagonal"
        rows, columns = (slice(k * self.side, (k + 1) * self.side) for k in (i, j))
        return self.matrix[rows, columns].copy()


class CountingTiles(DenseTiles):
    """Counts how often each tile is read."""

    def __init__(self, matrix: np.ndarray, side: int, symmetric: bool = True) -> None:
        super().__init__(matrix, side, symmetric)
        self.reads: Counter[tuple[int, int]] = Counter()

    def read_tile(self, i: int, j: int) -> np.ndarray:
        self.reads[i, j] += 1
        return super().read_tile(i, j)


def gaussian(n: int, seed: int = 0, scale: float = 12.0, dtype: str = "float64") -> np.ndarray:
    """Gram matrix of a Gaussian kernel over n points in six dimensions: a spectrum that falls steadily."""
    X = np.random.default_rng(seed).standard_normal((n, 6))
    squares = (X * X).sum(axis=1)
    K = np.exp(-(squares[:, None] + squares - 2 * X @ X.T).clip(0) / scale)
    return ((K + K.T) / 2).astype(dtype)


def targets(n: int, t: int = 3) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, t))


def direct(K: np.ndarray, shift: float, Y: np.ndarray) -> np.ndarray:
    A = K.astype(np.float64) + shift * np.eye(len(K))
    return cho_solve(cho_factor(A), Y)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Stop(Exception):
    """Where a run is interrupted."""


def same(found: Sequence[Solution], expected: Sequence[Solution]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.alpha, b.alpha)
        assert (a.residual, a.iterations, a.effective_dimension, a.status) == (
            b.residual,
            b.iterations,
            b.effective_dimension,
            b.status,
        )
