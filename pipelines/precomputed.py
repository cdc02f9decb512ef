"""A user's own Gram matrices as a kernel: blocks are read from files instead of computed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kernels.arrays import Array
from kernels.base import Cost, Kernel, KernelError, Prepared, Product, Scaled, Sum, row_ids
from kernels.registry import register

from .array_files import open_array
from .errors import DataError


@functools.lru_cache(maxsize=8)
def _matrix(path: str, version: tuple[int, ...]) -> Any:
    matrix = open_array(path, ["K"])
    if matrix.ndim != 2 or matrix.dtype not in (np.float32, np.float64):
        raise DataError(
            f"{path}: a Gram matrix is a float32 or float64 array (n, n), not {matrix.dtype} {matrix.shape}"
        )
    return matrix


def _open(path: str) -> Any:
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return _matrix(path, (status.st_mtime_ns, status.st_size, status.st_ino))


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

    @property
    def test_size(self) -> int:
        """m, the number of test samples; 0 without ``cross``."""
        return 0 if self.cross_path is None else int(_open(self.cross_path).shape[0])

    def check(self, shape: tuple[int, ...]) -> None:
        if tuple(shape) != (1,):
            raise KernelError(
                f"a precomputed kernel takes indices, an array (n, 1), not samples of shape {tuple(shape)}"
            )

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        values = np.asarray(X)
        self.check(values.shape[1:])
        values, count = values[:, 0], self.size + self.test_size
        wrong = values[~((values >= 0) & (values < count) & (values == np.rint(values)))]
        if len(wrong):
            raise DataError(
                f"{self.gram_path}: {wrong[0]} is no index of its samples, a whole number from 0 to {count - 1}"
            )
        return Prepared({"index": values.astype(np.int64)}, row_ids(X, rows), pool)

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


def sizes(kernel: Kernel) -> tuple[int, int]:
    """n and m, the samples and test samples of the matrices that ``kernel`` consists of; 0, 0 for no matrices.

    Raises:
        DataError: terms that are matrices of different numbers of samples.
    """
    found = list(_terms(kernel))
    if not found:
        return 0, 0
    first = found[0]
    n, m = first.size, first.test_size
    for other in found:
        if (other.size, other.test_size) != (n, m):
            raise DataError(
                f"{other.gram_path} has {other.size} samples and {other.test_size} test samples,"
                f" {first.gram_path} {n} and {m}: precomputed terms must be matrices of the same samples"
            )
    return n, m


def _terms(kernel: Kernel) -> Iterator[Precomputed]:
    """The precomputed kernels that ``kernel`` consists of or contains."""
    if isinstance(kernel, Precomputed):
        yield kernel
    elif isinstance(kernel, Scaled):
        yield from _terms(kernel.term)
    elif isinstance(kernel, Sum | Product):
        for term in kernel.terms:
            yield from _terms(term)


def _rectangle(matrix: Any, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Rows i and columns j, in any order: a permuted pool scatters them."""
    if _is_run(i) and _is_run(j):
        return np.array(matrix[int(i[0]) : int(i[-1]) + 1, int(j[0]) : int(j[-1]) + 1])
    if isinstance(matrix, np.ndarray):
        return matrix[np.ix_(i, j)]
    return np.asarray(matrix.oindex[i, j])


def _is_run(rows: np.ndarray) -> bool:
    return len(rows) > 0 and bool((np.diff(rows) == 1).all())


def _content(*paths: str | None) -> str:
    """A digest of shapes, dtypes and all entries, so that another matrix gets another store."""
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


def _check_finite(path: str, matrix: Any) -> None:
    for start in range(0, matrix.shape[0], 256):
        bad = ~np.isfinite(np.asarray(matrix[start : start + 256]))
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise DataError(f"{path}: the entry at row {start + i}, column {j} is NaN or infinite")


def _build(table: Mapping[str, Any]) -> Kernel:
    unknown = set(table) - {"kind", "gram", "cross", "content"}
    if unknown:
        raise KernelError(f"unknown key kernel.{min(unknown)}; a precomputed kernel takes gram and cross")
    gram, cross = table.get("gram"), table.get("cross")
    if not isinstance(gram, str) or not (cross is None or isinstance(cross, str)):
        raise KernelError(
            'a precomputed kernel needs gram = "K.npy" (and cross = "K_test.npy" for a test set)'
        )
    _check(gram, cross, fresh="content" not in table)
    return Precomputed(gram, cross, str(table.get("content") or _content(gram, cross)))


def _check(gram: str, cross: str | None, *, fresh: bool) -> None:
    """Raise DataError for matrices of a wrong form; ``fresh``: not checked before, on the driver."""
    matrix = _open(gram)
    if matrix.shape[0] != matrix.shape[1]:
        raise DataError(f"{gram}: a Gram matrix is square, not {matrix.shape}")
    if matrix.shape[0] == 0:
        raise DataError(f"{gram}: holds no samples")
    if fresh:
        _check_finite(gram, matrix)
        _check_symmetric(gram, matrix)
    if cross is not None and _open(cross).shape[1] != matrix.shape[1]:
        raise DataError(
            f"{cross}: has {_open(cross).shape[1]} columns, but {gram} has {matrix.shape[1]} samples"
        )
    if fresh and cross is not None:
        _check_finite(cross, _open(cross))


register("precomputed", _build)
