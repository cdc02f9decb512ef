"""A user's own Gram matrices as a kernel: blocks are read from files instead of computed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kernels.arrays import Array
from kernels.base import Cost, Kernel, KernelError, Prepared, row_ids
from kernels.registry import register

from .array_files import open_array
from .errors import DataError


@functools.lru_cache(maxsize=8)
def _matrix(path: str, modified: int) -> Any:
    matrix = open_array(path, ["K"])
    if matrix.ndim != 2 or matrix.dtype not in (np.float32, np.float64):
        raise DataError(
            f"{path}: a Gram matrix is a float32 or float64 array (n, n), not {matrix.dtype} {matrix.shape}"
        )
    return matrix


def _open(path: str) -> Any:
    where = Path(path)
    if not where.exists():
        raise DataError(f"{path}: no such file")
    return _matrix(path, where.stat().st_mtime_ns)


@dataclass(frozen=True)
class Precomputed(Kernel):
    """Entries of the matrices at ``gram`` (n, n) and ``cross`` (m, n): m test samples by n pool samples.

    Samples are (n, 1) float64 arrays of indices: i < n is row i of ``gram``, n + j is row j of ``cross``.
    """

    gram_path: str
    cross_path: str | None = None
    content: str = ""

    kind: ClassVar[str] = "precomputed"

    @property
    def size(self) -> int:
        return int(_open(self.gram_path).shape[0])

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        return Prepared({"index": np.asarray(X)[:, 0].astype(np.int64)}, row_ids(X, rows), pool)

    def pair(self, a: Prepared, b: Prepared) -> Array:
        n = self.size
        i, j = a.arrays["index"], b.arrays["index"]
        if (j >= n).any():
            if (i >= n).any():
                raise DataError("a precomputed kernel holds no entries between two test samples")
            return np.ascontiguousarray(self.pair(b, a).T)
        if not (i >= n).any():
            return _rectangle(_open(self.gram_path), i, j)
        if self.cross_path is None:
            raise DataError('the precomputed kernel needs "cross", the (m, n) matrix of test samples')
        if not (i >= n).all():
            raise DataError("a block of a precomputed kernel mixes pool and test samples")
        return _rectangle(_open(self.cross_path), i - n, j)

    def diag(self, a: Prepared) -> Array:
        # The values between a test sample and itself are in no file; 1 stands for them.
        matrix, n = _open(self.gram_path), self.size
        return np.array([matrix[int(i), int(i)] if i < n else 1.0 for i in a.arrays["index"]])

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        return Cost(float(n * m), 0.0, 2 * n * m * 8)

    def describe(self) -> dict[str, Any]:
        table = {"kind": self.kind, "gram": self.gram_path, "content": self.content}
        return table if self.cross_path is None else {**table, "cross": self.cross_path}


def _rectangle(matrix: Any, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Rows i and columns j, both increasing runs, by one slice and a choice inside it."""
    rows, columns = slice(int(i[0]), int(i[-1]) + 1), slice(int(j[0]), int(j[-1]) + 1)
    block = np.asarray(matrix[rows, columns])
    return np.array(block[np.ix_(i - i[0], j - j[0])])


def _content(*paths: str | None) -> str:
    """A digest of shapes, dtypes and sampled entries, so that another matrix gets another store."""
    sha = hashlib.sha256()
    for path in paths:
        if path is None:
            continue
        matrix = _open(path)
        sha.update(f"{matrix.shape}{matrix.dtype}".encode())
        for start in range(0, matrix.shape[0], 256):
            sha.update(np.ascontiguousarray(matrix[start : start + 256]).tobytes())
    return sha.hexdigest()


def _check_symmetric(path: str, matrix: Any) -> None:
    """Raise DataError for a matrix of which only one triangle would be used, and the other says otherwise."""
    for start in range(0, matrix.shape[0], 256):
        stop = min(start + 256, matrix.shape[0])
        rows, columns = np.asarray(matrix[start:stop, :stop]), np.asarray(matrix[:stop, start:stop])
        differ = np.abs(rows - columns.T) > 1e-3 * np.max(np.abs(rows))
        if differ.any():
            i, j = np.argwhere(differ)[0]
            raise DataError(
                f"{path}: a Gram matrix is symmetric, but entries {start + i}, {j} and {j}, {start + i} are"
                f" {rows[i, j]:.6g} and {columns[j, i]:.6g}; use (K + K.T) / 2 if that is what you mean"
            )


def _build(table: Mapping[str, Any]) -> Kernel:
    unknown = set(table) - {"kind", "gram", "cross", "content"}
    if unknown:
        raise KernelError(f"unknown key kernel.{min(unknown)}; a precomputed kernel takes gram and cross")
    gram, cross = table.get("gram"), table.get("cross")
    if not isinstance(gram, str) or not (cross is None or isinstance(cross, str)):
        raise KernelError(
            'a precomputed kernel needs gram = "K.npy" (and cross = "K_test.npy" for a test set)'
        )
    try:
        _check(gram, cross, fresh="content" not in table)
    except DataError as error:
        raise KernelError(str(error)) from None
    return Precomputed(gram, cross, str(table.get("content") or _content(gram, cross)))


def _check(gram: str, cross: str | None, *, fresh: bool) -> None:
    """Raise DataError for matrices of a wrong form; ``fresh``: not checked before, on the driver."""
    matrix = _open(gram)
    if matrix.shape[0] != matrix.shape[1]:
        raise DataError(f"{gram}: a Gram matrix is square, not {matrix.shape}")
    if fresh:
        _check_symmetric(gram, matrix)
    if cross is not None and _open(cross).shape[1] != matrix.shape[1]:
        raise DataError(
            f"{cross}: has {_open(cross).shape[1]} columns, but {gram} has {matrix.shape[1]} samples"
        )


register("precomputed", _build)
