"""A Cholesky factor of a large matrix in memory, in its own place, on all threads of BLAS."""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, get_lapack_funcs
from threadpoolctl import threadpool_limits

from .. import strided

STRIP = 2048
"""Rows of a factor that are cleared at a time."""

STABILISER_TRIES = 20


def factor_in_place(matrix: np.ndarray) -> int:
    """Put the lower Cholesky factor of a symmetric matrix (n, n), Fortran order, on and below its diagonal.

    What is above the diagonal is neither read nor changed. Returns 0, or the order of the first leading minor that is
    not positive, as LAPACK's potrf does; the lower triangle is spent then.
    """
    n = len(matrix)
    if n <= strided.LARGEST:
        return strided.factor(matrix)
    first, rest = slice(0, n // 2), slice(n // 2, n)
    if order := factor_in_place(matrix[first, first]):
        return order
    strided.divide(matrix[rest, first], matrix[first, first])
    strided.add_square(matrix[rest, rest], matrix[rest, first], -1.0)
    order = factor_in_place(matrix[rest, rest])
    return rest.start + order if order else 0


def upper_factor(matrix: np.ndarray) -> np.ndarray:
    """U upper triangular with U^T U = matrix, symmetric (n, n) in C order, in its place.

    Raises:
        LinAlgError: it is not positive definite; it is spent then.
    """
    if factor_in_place(matrix.T):
        raise LinAlgError("the matrix is not positive definite")
    for start in range(0, len(matrix), STRIP):
        rows = slice(start, start + STRIP)
        matrix[rows, :start] = 0
        matrix[rows, rows] = np.triu(matrix[rows, rows])
    return matrix


def stabilised_factor(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """T upper triangular with matrix + stabiliser I = T^T T, and the least power of ten of rounding that it takes.

    matrix: finite, of no eigenvalue that is negative but by rounding; its upper triangle is read.
    """
    M = len(matrix)
    scale = float(np.abs(matrix.diagonal()).mean()) or 1.0
    stabiliser = np.finfo(np.float64).eps * M * scale
    for _ in range(STABILISER_TRIES):
        shifted = matrix.copy()
        shifted.flat[:: M + 1] += stabiliser
        try:
            return upper_factor(shifted), stabiliser
        except LinAlgError:
            stabiliser *= 10
    raise AssertionError("a finite matrix with so much on its diagonal is positive definite")


def independent(matrix: np.ndarray) -> np.ndarray:
    """Ascending positions of rows that the others of a positive semidefinite matrix (n, n) follow from, to rounding:
    those of the largest pivots. One at least."""
    (pstrf,) = get_lapack_funcs(("pstrf",), (matrix,))
    with threadpool_limits(None if len(matrix) <= strided.LARGEST else 1, user_api="blas"):
        _, order, rank, _ = pstrf(matrix)
    return np.sort(order[: max(rank, 1)] - 1)
