"""BLAS and LAPACK on parts of a matrix, where they lie: SciPy's own wrappers would copy what is not contiguous.

The routines are those that SciPy hands out for compiled code. Every matrix here is a view of an array in Fortran order,
(n, m) float32 or float64, whose columns may be further apart than n entries; factors may be transposes of such.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

LARGEST = 12_288
"""Order of a symmetric result up to which one call is safe: OpenBLAS' syrk on several threads, and potrf and NumPy's
A @ A.T by it, write beyond their buffers where it exceeds some 16,000 (AVX-512, float64, two threads; see
https://github.com/OpenMathLib/OpenBLAS/issues/2562), and the process dies."""

_LETTERS = {"float32": "s", "float64": "d"}

_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def factor(matrix: np.ndarray) -> int:
    """Put the lower Cholesky factor of a symmetric matrix (n, n) on and below its diagonal (potrf).

    What is above the diagonal is neither read nor changed. Returns 0, or the order of the first leading minor that is
    not positive.
    """
    potrf, integer = _routine(cython_lapack, "potrf", matrix.dtype)
    failed = integer(0)
    potrf(b"L", _whole(integer, len(matrix)), *_place(integer, matrix), ctypes.byref(failed))
    return int(failed.value)


def divide(matrix: np.ndarray, triangle: np.ndarray) -> None:
    """Put matrix @ triangle^-T in the place of a matrix (m, n); triangle: (n, n) lower (trsm)."""
    trsm, integer = _routine(cython_blas, "trsm", matrix.dtype)
    sizes = (_whole(integer, size) for size in matrix.shape)
    places = (*_place(integer, triangle), *_place(integer, matrix))
    trsm(b"R", b"L", b"T", b"N", *sizes, _number(matrix, 1), *places)


def add_square(matrix: np.ndarray, factor: np.ndarray, weight: float = 1.0, lower: bool = True) -> None:
    """Put matrix + weight * factor @ factor^T in the place of one triangle of a matrix (n, n), its diagonal included.

    factor: (n, k), of the same dtype. lower: the triangle below, else above; the other is neither read nor changed. By
    halves where n is beyond ``LARGEST``.
    """
    n = len(matrix)
    if n > LARGEST:
        first, rest = slice(0, n // 2), slice(n // 2, n)
        for half in (first, rest):
            add_square(matrix[half, half], factor[half], weight, lower)
        at = (rest, first) if lower else (first, rest)
        _add_product(matrix[at], factor[at[0]], factor[at[1]], weight)
        return
    syrk, integer = _routine(cython_blas, "syrk", matrix.dtype)
    transposed, *place = _operand(integer, factor)
    sizes = (_whole(integer, size) for size in factor.shape)
    letters = b"L" if lower else b"U", b"T" if transposed else b"N"
    syrk(*letters, *sizes, _number(matrix, weight), *place, _number(matrix, 1), *_place(integer, matrix))


def _add_product(matrix: np.ndarray, left: np.ndarray, right: np.ndarray, weight: float) -> None:
    """Put matrix + weight * left @ right^T in the place of a matrix (n, m); left: (n, k), right: (m, k) (gemm)."""
    gemm, integer = _routine(cython_blas, "gemm", matrix.dtype)
    (left_turned, *left_place), (right_turned, *right_place) = (
        _operand(integer, one) for one in (left, right)
    )
    letters = b"T" if left_turned else b"N", b"N" if right_turned else b"T"
    sizes = (_whole(integer, size) for size in (*matrix.shape, left.shape[1]))
    product = (_number(matrix, weight), *left_place, *right_place)
    gemm(*letters, *sizes, *product, _number(matrix, 1), *_place(integer, matrix))


@cache
def _routine(module: Any, name: str, dtype: np.dtype) -> tuple[Callable[..., None], type]:
    """A routine that takes addresses, and what its whole numbers are."""
    capsule = module.__pyx_capi__[_LETTERS[dtype.name] + name]
    signature = _name(capsule)
    arguments = signature.count(b"*")
    address = _pointer(capsule, signature)
    integer = ctypes.c_int if b" int *" in signature else ctypes.c_int64
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address), integer


def _whole(integer: type, number: int) -> Any:
    return ctypes.byref(integer(number))


def _number(matrix: np.ndarray, value: float) -> Any:
    return ctypes.byref((ctypes.c_float if matrix.itemsize == 4 else ctypes.c_double)(value))


def _operand(integer: type, factor: np.ndarray) -> tuple[bool, Any, Any]:
    """Whether it is a factor's transpose that lies in Fortran order; and its place."""
    transposed = factor.strides[0] != factor.itemsize
    return transposed, *_place(integer, factor.T if transposed else factor)


def _place(integer: type, matrix: np.ndarray) -> tuple[Any, Any]:
    """Where a matrix lies, and how many entries its columns are apart."""
    # Of one column NumPy may say anything.
    apart = max(matrix.strides[1] // matrix.itemsize, len(matrix))
    return ctypes.c_void_p(matrix.ctypes.data), _whole(integer, apart)
