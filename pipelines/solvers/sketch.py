"""A sketch K omega that grows, and the eigenvalues and eigenvectors of K that it shows (SPEC R6).

Where K is known by its products alone, omega is Gaussian. Where it has entries, omega takes columns of it: n * rank
entries are computed or read in place of 2 n^2 rank operations (see ``ColumnSketch``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import dgemm

from ..errors import NumericalError
from ..operators import GramOperator, Symmetric
from ..strided import add_square, divide
from ..tile_files import all_finite
from .blocked_factor import factor_in_place

SKETCH_COLUMNS = 2048
"""Columns that one pass over the matrix takes at most: workers hold a square's rows of them."""

MULTIPLIED_COLUMNS = 512
"""Columns of a Gaussian test matrix that are multiplied at a time: workers hold n rows of them."""

ROWS = 1024
"""Rows that are converted to float64 and worked on at a time."""

PANEL = 64
"""Columns of the test matrix that are drawn together; a sketch begins to grow at a multiple of it."""

RESOLVED = 4.0
"""Eigenvalues below so many times the noise are rounding as likely as not."""

SHIFT_TRIES = 20

DRAWS = 4
"""Times that a growth draws, the first included, in place of columns that turned out to be copies."""

COPY = 16.0
"""Two samples are copies whose cosine in feature space is one but for so many units of rounding."""


@dataclass(frozen=True)
class Spectrum:
    """What a sketch of ``rank`` columns shows of K.

    values: (k,) float64, descending: eigenvalues of an approximation that is at most K, those above rounding.
    vectors: (rank, k) so that B vectors / sqrt(values) are their eigenvectors. factor: (rank, rank), of which the lower
    triangle is meant, B = (K omega) factor^-T. noise: what rounding may have made of an eigenvalue. trace, peak:
    the trace of K - B B^T and the largest entry of its diagonal.
    """

    values: np.ndarray
    vectors: np.ndarray
    factor: np.ndarray
    noise: float
    rank: int
    precision: str
    trace: float
    peak: float

    def without_vectors(self) -> Spectrum:
        none = np.empty((0, 0))
        return replace(self, values=self.values.copy(), vectors=none, factor=none)


class SketchNotFinite(NumericalError):
    """A product with the test matrix is beyond the range of the precision."""


class Sketch(ABC):
    """K omega for a random omega of up to ``capacity`` columns of length about one, held in ``precision``.

    Memory that is not filled yet is not taken either.
    """

    def __init__(self, K: Symmetric, precision: str, capacity: int, seed: int) -> None:
        self.rank = 0
        self.precision = precision
        self._K, self._n = K, K.n
        self._together = SKETCH_COLUMNS
        self._seed = seed
        self._columns = np.empty((K.n, capacity), precision, order="F")
        self._core = np.empty((0, 0), order="F")
        self._beyond = K.diag().copy()

    def grow(self, rank: int) -> None:
        """Sketch with more columns, ``rank`` in all.

        Raises:
            SketchNotFinite: a value is not finite; the sketch is spent.
        """
        for start in range(self.rank, rank, self._together):
            stop = min(start + self._together, rank)
            with np.errstate(over="ignore", invalid="ignore"):  # beyond the precision: named below
                self._columns[:, start:stop] = self._multiplied(start, stop)
            if not all_finite(self._columns[:, start:stop]):
                raise self._not_finite("values")
        new = self._among(rank)
        core = np.empty((rank, rank), order="F")
        old = slice(0, self.rank)
        core[old, old] = self._core
        core[:, self.rank :] = new
        core[self.rank :, old] = new[old].T
        corner = core[self.rank :, self.rank :]
        corner[:] = corner / 2 + corner.T / 2
        self._core, self.rank = core, rank

    def anew(self, precision: str, capacity: int) -> Sketch:
        """An empty sketch in another precision."""
        return type(self)(self._K, precision, capacity, self._seed)

    @abstractmethod
    def _multiplied(self, start: int, stop: int) -> np.ndarray:
        """K times columns ``start`` to ``stop`` of omega, (n, stop - start)."""

    @abstractmethod
    def _among(self, rank: int) -> np.ndarray:
        """omega^T K omega of the first ``rank`` columns against those after ``self.rank``, float64."""

    @abstractmethod
    def _norm(self) -> float:
        """What the rounding of omega^T K omega is told by: a norm of K, or of that matrix itself."""

    def _not_finite(self, what: str) -> SketchNotFinite:
        return SketchNotFinite(
            f"the matrix times random columns has {what} that are not finite in {self.precision}: its entries are too "
            "large; scale the kernel or the samples down, or verify the store"
        )

    def spectrum(self) -> Spectrum:
        """Eigenvalues of B B^T, B = Y L^-T with Y = K omega and L L^T = omega^T Y + noise I.

        That is K omega (omega^T K omega + noise I)^-1 omega^T K: at most K, and stable, since what is added is what
        rounding may have made of omega^T Y (there, Algorithm 2.1 adds it to K as well and takes it off again).
        """
        r, nothing = self.rank, np.empty((0, 0))
        noise = float(np.finfo(self.precision).eps) * self._norm()
        if noise == 0.0:
            return Spectrum(np.empty(0), nothing, nothing, 0.0, r, self.precision, *self._missed())
        for _ in range(SHIFT_TRIES):
            factor = self._core.copy(order="F")
            np.einsum("ii->i", factor)[:] += noise
            if not factor_in_place(factor):
                break
            noise *= 10
        else:
            raise AssertionError("no shift makes a finite matrix positive definite")
        gram = np.zeros((r, r), order="F")
        for rows in row_blocks(self._n):
            some = self._factored(rows, factor)
            self._beyond[rows] = np.maximum(self._K.diag()[rows] - np.einsum("ij,ij->i", some, some), 0.0)
            add_square(gram, some.T)
        values, vectors = eigh(gram, lower=True, overwrite_a=True, check_finite=False, driver="evd")
        # In B^T B, and in eigenvectors, what is smaller by so much than the largest eigenvalues is rounding too: of
        # sums over n samples where no digits are left beyond those of the sketch.
        terms = np.sqrt(self._n) if self.precision == "float64" else 1.0
        noise = max(noise, float(np.finfo(self.precision).eps * np.linalg.norm(values) * terms))
        first = int(np.searchsorted(values, RESOLVED * noise))
        kept = values[first:][::-1], vectors[:, first:][:, ::-1]
        return Spectrum(*kept, factor, noise, r, self.precision, *self._missed())

    def _missed(self) -> tuple[float, float]:
        """``trace`` and ``peak`` of a spectrum."""
        return float(self._beyond.sum()), float(self._beyond.max())

    def eigenvectors(self, spectrum: Spectrum) -> np.ndarray:
        """(n, k) eigenvectors of this sketch's spectrum, in its precision and in its place: it is used up.

        Of float64 fewer than there are eigenvalues, where rounding left no more: of the largest ones.
        """
        k = len(spectrum.values)
        out = self._columns[:, :k]
        if not k:
            return out
        weights = np.asfortranarray(spectrum.vectors / np.sqrt(spectrum.values))
        gram = np.zeros((k, k), order="F")
        for rows in row_blocks(self._n):
            some = dgemm(1.0, self._factored(rows, spectrum.factor), weights)
            if self.precision == "float64":
                add_square(gram, some.T)
            out[rows] = some
        # The squares in B^T B leave eigenvectors orthonormal to about the rounding of float64 times
        # values[0] / values[-1]. P^-1 is positive definite where that is far below values[-1] / values[0]: in float32
        # it is, since the quotient is at most 1 / (RESOLVED eps); in float64 a step of Cholesky QR is due.
        if self.precision == "float64":
            failed = factor_in_place(gram)
            if failed:  # what is left is of as many columns as are independent
                out = out[:, : failed - 1]
            correction = gram[: out.shape[1], : out.shape[1]]
            for rows in row_blocks(self._n):
                divide(out[rows], correction)
        return out

    def _factored(self, rows: slice, factor: np.ndarray) -> np.ndarray:
        """Rows of B, in Fortran order."""
        some = self._columns[rows, : self.rank].astype(np.float64, order="F")
        divide(some, factor)
        return some


class GaussianSketch(Sketch):
    """With a Gaussian omega, drawn again where it is needed."""

    def __init__(self, K: Symmetric, precision: str, capacity: int, seed: int) -> None:
        super().__init__(K, precision, capacity, seed)
        self._together = MULTIPLIED_COLUMNS
        self._squares = 0.0

    def _multiplied(self, start: int, stop: int) -> np.ndarray:
        V = np.empty((self._n, stop - start), self.precision)
        for rows in row_blocks(self._n):
            V[rows] = self._omega(rows, start, stop)
        product = self._K.matmul(V)
        self._squares += float(np.vdot(product, product))
        return product

    def _among(self, rank: int) -> np.ndarray:
        new = np.zeros((rank, rank - self.rank), order="F")
        for rows in row_blocks(self._n):
            omega = self._omega(rows, 0, rank).astype(np.float64)
            some = self._columns[rows, self.rank : rank].astype(np.float64, copy=False)
            new = dgemm(1.0, omega, some, beta=1.0, c=new, trans_a=1, overwrite_c=1)
        return new

    def _norm(self) -> float:
        # Of a matrix whose columns are random and of length one: the Frobenius norm of K, estimated.
        return float(np.sqrt(self._squares * self._n / self.rank))

    def _omega(self, rows: slice, start: int, stop: int) -> np.ndarray:
        """Rows and columns of the test matrix, float32; drawn from numbers that name the place."""
        out = np.empty((rows.stop - rows.start, stop - start), np.float32)
        for first in range(start, stop, PANEL):
            rng = np.random.default_rng((self._seed, rows.start, first))
            drawn = rng.standard_normal((len(out), PANEL), np.float32)
            out[:, first - start : first - start + PANEL] = drawn[:, : stop - first]
        out /= np.float32(np.sqrt(self._n))
        return out


class ColumnSketch(Sketch):
    """Of columns of a Gram matrix, each growth drawn by what the diagonal of K has beyond the sketch so far.

    That is randomly pivoted Cholesky in a few large blocks (Chen, Epperly, Tropp, Webber 2024), where R6 takes a
    Gaussian omega: samples that nothing drawn so far resembles are the likeliest to be drawn, copies of drawn ones the
    least, and of copies that are drawn together all but one are given back for others, a few times over.
    """

    def __init__(self, K: GramOperator, precision: str, capacity: int, seed: int) -> None:
        super().__init__(K, precision, capacity, seed)
        self._gram = K
        self._drawn = np.empty(0, np.int64)
        self._barred = np.zeros(self._n, bool)

    def grow(self, rank: int) -> None:
        """As of ``Sketch``; what is drawn rests on the spectrum that was looked at before."""
        for attempt in range(DRAWS):
            start = self.rank
            self._drawn = np.concatenate((self._drawn, self._draw(rank - len(self._drawn), attempt)))[:rank]
            super().grow(rank)
            if attempt + 1 < DRAWS:
                copies = self._copies(start)
                if not copies.any():
                    return
                self._give_back(copies)

    def anew(self, precision: str, capacity: int) -> ColumnSketch:
        """Of the same columns and others, as far as there is room for them: of some of them, at random, if need be."""
        made = ColumnSketch(self._gram, precision, capacity, self._seed)
        made._drawn = np.random.default_rng(self._seed).permutation(self._drawn)[:capacity]
        made._barred, made._beyond = self._barred, self._beyond
        return made

    def _draw(self, count: int, attempt: int) -> np.ndarray:
        """(count,) positions not drawn so far, increasing; any of them where K has nothing beyond the sketch."""
        if count <= 0:
            return np.empty(0, np.int64)
        weights = np.maximum(self._beyond, np.finfo(np.float64).eps * max(self._beyond.max(), 1e-290))
        # The largest of these are a sample without replacement (Efraimidis, Spirakis 2006).
        rng = np.random.default_rng((self._seed, len(self._drawn), attempt))
        keys = np.log(weights) + rng.gumbel(size=self._n)
        keys[self._barred] -= np.ptp(keys) + 1  # after all others
        keys[self._drawn] = -np.inf
        return np.sort(np.argpartition(keys, self._n - count)[self._n - count :])

    def _copies(self, start: int) -> np.ndarray:
        """(rank,) whether a column, not before ``start``, is a multiple of an earlier one to the rounding of tiles."""
        size = np.sqrt(np.maximum(self._core.diagonal(), 0))
        size[size == 0] = np.inf
        nearest = 1 - COPY * np.finfo(self.precision).eps
        found = np.zeros(self.rank, bool)
        for column in range(start, self.rank):
            before = np.abs(self._core[:column, column]) / size[:column]
            found[column] = np.any(before[~found[:column]] >= nearest * size[column])
        return found

    def _give_back(self, copies: np.ndarray) -> None:
        kept = np.flatnonzero(~copies)
        self._barred[self._drawn[copies]] = True
        for place, column in enumerate(kept):
            if place != column:
                self._columns[:, place] = self._columns[:, column]
        self._core = np.asfortranarray(self._core[np.ix_(kept, kept)])
        self._drawn, self.rank = self._drawn[kept], len(kept)

    def _multiplied(self, start: int, stop: int) -> np.ndarray:
        return self._gram.columns(self._drawn[start:stop], self.precision)

    def _among(self, rank: int) -> np.ndarray:
        return self._columns[self._drawn, self.rank : rank].astype(np.float64, order="F")

    def _norm(self) -> float:
        with np.errstate(over="ignore"):
            norm = float(np.linalg.norm(self._core))
        if not np.isfinite(norm):
            raise self._not_finite("squares")
        return norm


def sketch_of(K: Symmetric, precision: str, capacity: int, seed: int) -> Sketch:
    """An empty sketch of K: by columns where K has them."""
    if isinstance(K, GramOperator):
        return ColumnSketch(K, precision, capacity, seed)
    return GaussianSketch(K, precision, capacity, seed)


def row_blocks(n: int) -> Iterator[slice]:
    """Consecutive ranges of ``ROWS`` rows."""
    for start in range(0, n, ROWS):
        yield slice(start, min(start + ROWS, n))
