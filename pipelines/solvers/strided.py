"""BLAS and LAPACK on parts of a matrix, where they lie: SciPy's own wrappers would copy what is not contiguous.

The routines are those that SciPy hands out for compiled code. Every matrix here is a view of an array in Fortran order,
(n, m) float32 or float64, whose columns may be further apart than n entries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

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


def subtract_square(matrix: np.ndarray, factor: np.ndarray) -> None:
    """Put matrix - factor @ factor^T on and below the diagonal of a matrix (n, n); factor: (n, k) (syrk)."""
    syrk, integer = _routine(cython_blas, "syrk", matrix.dtype)
    sizes = (_whole(integer, size) for size in factor.shape)
    product = (_number(matrix, -1), *_place(integer, factor))
    syrk(b"L", b"N", *sizes, *product, _number(matrix, 1), *_place(integer, matrix))


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


def _number(matrix: np.ndarray, value: int) -> Any:
    return ctypes.byref((ctypes.c_float if matrix.itemsize == 4 else ctypes.c_double)(value))


def _place(integer: type, matrix: np.ndarray) -> tuple[Any, Any]:
    """Where a matrix lies, and how many entries its columns are apart."""
    return ctypes.c_void_p(matrix.ctypes.data), _whole(integer, matrix.strides[1] // matrix.itemsize)
