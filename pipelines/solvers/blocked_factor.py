"""A Cholesky factor of a large matrix in memory, block of columns by block of columns, on all threads of BLAS."""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, get_blas_funcs, get_lapack_funcs

LARGEST = 12_288
"""Larger matrices are factored in blocks: OpenBLAS' own factor on several threads writes beyond its buffers where n
exceeds some 16,000 (https://github.com/OpenMathLib/OpenBLAS/issues/2562), and the process dies."""

COLUMNS = 2048
"""Of a block: enough for the speed of products, few beside n, of which they waste half their share."""

ROWS = 4096
"""That are updated at a time, in an array of ROWS x COLUMNS."""

STABILISER_TRIES = 20


def factor_in_place(matrix: np.ndarray) -> int:
    """Put the lower Cholesky factor of a symmetric matrix (n, n), Fortran order, on and below its diagonal.

    What is above the diagonal is neither read nor changed. Returns 0, or the order of the first leading minor that is
    not positive, as LAPACK's potrf does; the lower triangle is spent then.
    """
    n = len(matrix)
    (potrf,) = get_lapack_funcs(("potrf",), (matrix,))
    if n <= LARGEST:
        return int(potrf(matrix, lower=1, clean=0, overwrite_a=1)[1])
    (trsm,) = get_blas_funcs(("trsm",), (matrix,))
    # One array for all that is on its way: first touches of fresh memory cost a tenth of the arithmetic.
    memory = np.empty(COLUMNS * max(ROWS, COLUMNS), matrix.dtype)

    def updated(rows: slice, columns: slice) -> np.ndarray:
        """A block less the products of what lies left of it, in Fortran order, in the common array."""
        before = slice(0, columns.start)
        shape = columns.stop - columns.start, rows.stop - rows.start
        # Of transposes, so that all lie in memory as the matrix does and none is copied into another order.
        out = memory[: shape[0] * shape[1]].reshape(shape)
        np.matmul(matrix[columns, before], matrix[rows, before].T, out=out)
        return np.subtract(matrix[rows, columns].T, out, out=out).T

    for start in range(0, n, COLUMNS):
        columns = slice(start, min(start + COLUMNS, n))
        factor, failed = potrf(updated(columns, columns), lower=1)
        if failed:
            return start + int(failed)
        np.copyto(matrix[columns, columns], factor, where=np.tri(len(factor), dtype=bool))
        for first in range(columns.stop, n, ROWS):
            rows = slice(first, min(first + ROWS, n))
            below = updated(rows, columns)
            matrix[rows, columns] = trsm(1.0, factor, below, side=1, lower=1, trans_a=1, overwrite_b=1)
    return 0


def upper_factor(matrix: np.ndarray) -> np.ndarray:
    """U upper triangular with U^T U = matrix, symmetric (n, n) in C order, in its place.

    Raises:
        LinAlgError: it is not positive definite; it is spent then.
    """
    if factor_in_place(matrix.T):
        raise LinAlgError("the matrix is not positive definite")
    for start in range(0, len(matrix), COLUMNS):
        rows = slice(start, start + COLUMNS)
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
    _, order, rank, _ = pstrf(matrix)
    return np.sort(order[: max(rank, 1)] - 1)
