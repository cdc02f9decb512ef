"""A Cholesky factor of a large matrix in memory, block of columns by block of columns, on all threads of BLAS."""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, get_blas_funcs, get_lapack_funcs

LARGEST = 12_288
"""Larger matrices are factored in blocks: OpenBLAS' own factor on several threads writes beyond its buffers where n
exceeds some 16,000 (https://github.com/OpenMathLib/OpenBLAS/issues/2562), and the process dies."""

COLUMNS = 1024
"""Of a block: enough for the speed of products, few beside n, of which they waste half their share."""

ROWS = 4096
"""That are updated at a time, in an array of ROWS x COLUMNS."""


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
    for start in range(0, n, COLUMNS):
        columns = slice(start, min(start + COLUMNS, n))
        left = matrix[columns, :start].T
        corner = matrix[columns, columns]
        lower = np.tri(len(corner), dtype=bool)
        factor, failed = potrf(np.asfortranarray(corner - left.T @ left), lower=1, overwrite_a=1)
        if failed:
            return start + int(failed)
        np.copyto(corner, factor, where=lower)
        for first in range(columns.stop, n, ROWS):
            rows = slice(first, min(first + ROWS, n))
            below = matrix[rows, columns] - matrix[rows, :start] @ left
            # L X^T = B^T, and the transpose of an array in C order is one in Fortran order.
            matrix[rows, columns] = trsm(1.0, factor, np.ascontiguousarray(below).T, lower=1, overwrite_b=1).T
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
