"""A sketch K omega that grows, and the eigenvalues and eigenvectors of K that it shows (SPEC R6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import LinAlgError, cholesky, eigh
from scipy.linalg.blas import dgemm, dsyrk, dtrsm

from ..errors import NumericalError
from ..operators import Symmetric
from ..tile_files import all_finite

SKETCH_COLUMNS = 2048
"""Columns that one pass over the matrix takes at most: workers hold a square's rows of them."""

ROWS = 1024
"""Rows that are converted to float64 and worked on at a time."""

PANEL = 64
"""Columns of the test matrix that are drawn together; a sketch begins to grow at a multiple of it."""

RESOLVED = 4.0
"""Eigenvalues below so many times the noise are rounding as likely as not."""

SHIFT_TRIES = 20


@dataclass(frozen=True)
class Spectrum:
    """What a sketch of ``rank`` columns shows of K.

    values: (k,) float64, descending: eigenvalues of an approximation that is at most K, those above rounding.
    vectors: (rank, k) so that B vectors / sqrt(values) are their eigenvectors. factor: (rank, rank) upper
    triangular, B = (K omega) factor^-1. noise: that was added to make omega^T K omega positive definite.
    """

    values: np.ndarray
    vectors: np.ndarray
    factor: np.ndarray
    noise: float
    rank: int
    precision: str

    def without_vectors(self) -> Spectrum:
        none = np.empty((0, 0))
        return replace(self, values=self.values.copy(), vectors=none, factor=none)


class SketchNotFinite(NumericalError):
    """A product with the test matrix is beyond the range of the precision."""


class Sketch:
    """K omega for a Gaussian omega of up to ``capacity`` columns, multiplied and held in ``precision``.

    Columns of omega have a length of about one. Memory that is not filled yet is not taken either.
    """

    def __init__(self, K: Symmetric, precision: str, capacity: int, seed: int) -> None:
        self.rank = 0
        self.precision = precision
        self._K = K
        self._seed = seed
        self._columns = np.empty((K.n, capacity), precision, order="F")
        self._core = np.empty((0, 0), order="F")
        self._squares = 0.0

    def grow(self, rank: int) -> None:
        """Sketch with more columns, ``rank`` in all.

        Raises:
            SketchNotFinite: a value is not finite; the sketch is spent.
        """
        multiply = self._K.sketch if self.precision == "float32" else self._K.matmul
        for start in range(self.rank, rank, SKETCH_COLUMNS):
            stop = min(start + SKETCH_COLUMNS, rank)
            V = np.empty((self._K.n, stop - start), self.precision)
            for rows in row_blocks(self._K.n):
                V[rows] = self._omega(rows, start, stop)
            with np.errstate(over="ignore", invalid="ignore"):  # beyond the precision: named below
                product = multiply(V)
                self._squares += float(np.vdot(product, product))
                self._columns[:, start:stop] = product
            if not all_finite(self._columns[:, start:stop]):
                raise SketchNotFinite(
                    f"the matrix times random columns has values that are not finite in {self.precision}: its entries "
                    "are too large; scale the kernel or the samples down, or verify the store"
                )
            del V, product
        new = np.zeros((rank, rank - self.rank), order="F")
        for rows in row_blocks(self._K.n):
            omega = self._omega(rows, 0, rank).astype(np.float64)
            some = self._columns[rows, self.rank : rank].astype(np.float64, copy=False)
            new = dgemm(1.0, omega, some, beta=1.0, c=new, trans_a=1, overwrite_c=1)
        core = np.empty((rank, rank), order="F")
        old = slice(0, self.rank)
        core[old, old] = self._core
        core[:, self.rank :] = new
        core[self.rank :, old] = new[old].T
        corner = core[self.rank :, self.rank :]
        corner[:] = (corner + corner.T) / 2
        self._core, self.rank = core, rank

    def spectrum(self) -> Spectrum:
        """Eigenvalues of B B^T, B = Y C^-1 with Y = K omega and C^T C = omega^T Y + noise I.

        That is K omega (omega^T K omega + noise I)^-1 omega^T K: at most K, and stable, since what is added is what
        rounding may have made of omega^T Y (there, Algorithm 2.1 adds it to K as well and takes it off again).
        """
        r, nothing = self.rank, np.empty((0, 0))
        # Of a matrix whose columns are random and of length one: the Frobenius norm of K, estimated.
        norm = float(np.sqrt(self._squares * self._K.n / r))
        noise = float(np.finfo(self.precision).eps) * norm
        if noise == 0.0:
            return Spectrum(np.empty(0), nothing, nothing, 0.0, r, self.precision)
        for _ in range(SHIFT_TRIES):
            try:
                shifted = self._core.copy(order="F")
                shifted.flat[:: r + 1] += noise
                factor = cholesky(shifted, overwrite_a=True, check_finite=False)
                break
            except LinAlgError:
                noise *= 10
        else:
            raise AssertionError("no shift makes a finite matrix positive definite")
        del shifted
        gram = np.zeros((r, r), order="F")
        for rows in row_blocks(self._K.n):
            gram = dsyrk(1.0, self._factored(rows, factor), beta=1.0, c=gram, trans=1, overwrite_c=1)
        values, vectors = eigh(gram, lower=False, overwrite_a=True, check_finite=False, driver="evd")
        first = int(np.searchsorted(values, RESOLVED * noise))
        return Spectrum(values[first:][::-1], vectors[:, first:][:, ::-1], factor, noise, r, self.precision)

    def eigenvectors(self, spectrum: Spectrum) -> np.ndarray:
        """(n, k) eigenvectors of this sketch's spectrum, in its precision and in its place: it is used up."""
        k = len(spectrum.values)
        out = self._columns[:, :k]
        if not k:
            return out
        weights = np.asfortranarray(spectrum.vectors / np.sqrt(spectrum.values))
        gram = np.zeros((k, k), order="F")
        for rows in row_blocks(self._K.n):
            some = dgemm(1.0, self._factored(rows, spectrum.factor), weights)
            if self.precision == "float64":
                gram = dsyrk(1.0, some, beta=1.0, c=gram, trans=1, overwrite_c=1)
            out[rows] = some
        # The squares in B^T B leave eigenvectors orthonormal to about the rounding of float64 times
        # values[0] / values[-1]. P^-1 is positive definite where that is far below values[-1] / values[0]: in float32
        # it is, since the quotient is at most 1 / (RESOLVED eps); in float64 a step of Cholesky QR is due.
        if self.precision == "float64":
            correction = cholesky(gram, overwrite_a=True, check_finite=False)
            for rows in row_blocks(self._K.n):
                some = np.asfortranarray(out[rows])
                out[rows] = dtrsm(1.0, correction, some, side=1, overwrite_b=1)
        return out

    def _factored(self, rows: slice, factor: np.ndarray) -> np.ndarray:
        """Rows of B, in Fortran order."""
        some = self._columns[rows, : self.rank].astype(np.float64, order="F")
        return dtrsm(1.0, factor, some, side=1, overwrite_b=1)

    def _omega(self, rows: slice, start: int, stop: int) -> np.ndarray:
        """Rows and columns of the test matrix, float32; drawn from numbers that name the place."""
        out = np.empty((rows.stop - rows.start, stop - start), np.float32)
        for first in range(start, stop, PANEL):
            rng = np.random.default_rng((self._seed, rows.start, first))
            drawn = rng.standard_normal((len(out), PANEL), np.float32)
            out[:, first - start : first - start + PANEL] = drawn[:, : stop - first]
        out /= np.float32(np.sqrt(self._K.n))
        return out


def row_blocks(n: int) -> Iterator[slice]:
    """Consecutive ranges of ``ROWS`` rows."""
    for start in range(0, n, ROWS):
        yield slice(start, min(start + ROWS, n))
