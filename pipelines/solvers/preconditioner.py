"""Randomised Nystrom preconditioner of K + shift I (SPEC R6; Frangella, Tropp, Udell 2023, Algorithms 2.1, E.1).

What is of size (n, rank) is held once, in the precision of the sketch: the sketch, and in its place the eigenvectors.
All else goes by blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..archives import load_arrays, save_arrays
from ..operators import GramOperator, Symmetric
from .sketch import PANEL, ROWS, SKETCH_COLUMNS, SketchNotFinite, Spectrum, sketch_of

FIRST_RANK = PANEL
"""Columns of the first sketch at least; each further one doubles what there is."""

SMALL_TAIL = 1.0
"""An approximation whose smallest eigenvalue is at most so many times the smallest shift is good enough: what is left
has a condition number of about two."""

NOISE = 10.0
"""So many times a shift may the noise of a sketch be: a condition number of eleven at most, a few iterations more."""

RANK_PER_DIMENSION = 3.0
"""A rank of so many times the effective dimension is good enough (there, Theorem 2.2: 2 ceil(1.5 d) + 1)."""

BLOCK = (16384, 64)
"""Rows and columns of U that are converted to float64 and multiplied together: 8 MB, which stay in the cache."""

COLUMNS = 14
"""Systems per ridge that a solve is taken to have when its iterations are weighed against sketching."""

BEYOND = 3.0
"""So many times the smallest eigenvalue of the approximation is the largest that it misses: 2 to 4 were measured for
ranks from n / 16 to n / 2 of 4,000 MNIST digits, where iterations were then 1.2 times those estimated."""

SKETCH_COST = {"float32": 0.5, "float64": 1.0}
"""Price of a column that is multiplied for a sketch in columns of a float64 product."""

MEMORY = "as much memory as it may have"
EXPECTED = "the most that was expected to pay"
HALF = "half of all columns, beyond which a factor would cost less"
"""Why a rank is not larger that would be if it might."""

SMALL_MATRICES = 6
"""(rank, rank) float64 arrays held at the peak: omega^T K omega, its factor, B^T B, and what its eigenvectors take."""


@dataclass(frozen=True)
class Preconditioner:
    """K ~ U diag(values) U^T.

    U: (n, r) columns orthonormal to the rounding of ``precision``, in which they are held, Fortran order. values:
    (r,) float64, descending, positive. precision: that the sketch was multiplied in. reason: why the rank is what it
    is.
    """

    U: np.ndarray
    values: np.ndarray
    precision: str
    reason: str

    @property
    def rank(self) -> int:
        return len(self.values)

    def solve(self, R: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """P^-1 applied to the rows of R (k, n), row i with ``shifts[i]`` (R6).

        All arithmetic is in float64: with what U was rounded to, P^-1 is symmetric to the last digits.
        """
        out = R.copy()
        if self.rank:
            weights = (self.values[-1] + shifts[:, None]) / (self.values + shifts[:, None]) - 1
            weights *= self._within(R)
            for rows, columns, some in self._blocks():
                out[:, rows] += weights[:, columns] @ some.T
        return out

    def effective_dimension(self, shift: float) -> float:
        """Of the approximation: at most K's own (R9)."""
        return float((self.values / (self.values + shift)).sum())

    def quadratic_forms(self, Z: np.ndarray, shift: float) -> np.ndarray:
        """(k,) values z^T A (A + shift I)^-1 z for the rows of Z (k, n), A the approximation."""
        return np.square(self._within(Z)) @ (self.values / (self.values + shift))

    def note(self, shift: float) -> str:
        """What a report says of it at one ridge."""
        smallest = self.values[-1] if self.rank else 0.0
        return (
            f"Nystrom preconditioner of rank {self.rank} ({self.reason}), sketched in {self.precision}: effective "
            f"dimension {self.effective_dimension(shift):.1f}, smallest eigenvalue {smallest:.2g}, shift {shift:.2g}"
        )

    def _within(self, R: np.ndarray) -> np.ndarray:
        """R U for R (k, n), as (k, r)."""
        out = np.zeros((len(R), self.rank))
        for rows, columns, some in self._blocks():
            out[:, columns] += R[:, rows] @ some
        return out

    def _blocks(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """U in float64, in blocks that stay in the cache between being converted and being multiplied."""
        for start in range(0, len(self.U), BLOCK[0]):
            rows = slice(start, min(start + BLOCK[0], len(self.U)))
            for first in range(0, self.rank, BLOCK[1]):
                columns = slice(first, min(first + BLOCK[1], self.rank))
                yield rows, columns, self.U[rows, columns].astype(np.float64, copy=False)


@dataclass(frozen=True)
class Price:
    """What iterations and sketches cost, in columns of a float64 product (2 n^2 operations).

    shifts: of the ridges, with the smallest eigenvalue of K. tolerance: that they are solved to. pass_columns: what a
    pass over the matrix costs beside its columns. sampled: whether sketches take columns of the matrix (see
    ``ColumnSketch``), and do not multiply it.
    """

    n: int
    shifts: tuple[float, ...]
    tolerance: float
    pass_columns: float
    sampled: bool

    def solving(self, tail: float, rank: int) -> float:
        """All iterations, with a preconditioner whose smallest eigenvalue is ``tail``.

        The ridges share passes, as many as the slowest needs; a column also takes 4 n rank operations of P^-1.
        """
        counts = [iterations(tail, shift, self.tolerance) for shift in self.shifts]
        return self.pass_columns * max(counts) + COLUMNS * (1 + 2 * rank / self.n) * sum(counts)

    def growing(self, rank: int, columns: int, precision: str) -> float:
        """``columns`` more, to a sketch of ``rank`` in all."""
        passes = math.ceil(columns / SKETCH_COLUMNS)
        # B twice, B^T B and U, each against what would be done without more; and the eigenvectors of a small matrix
        dense = self.n * (2.0 * rank**2 + 3.0 * (rank**2 - (rank - columns) ** 2)) + 10.0 * rank**3
        if self.sampled:
            # A product with columns of the identity. Those that are read together are neighbours, so that all passes
            # together meet a tile once for each triangle.
            passes = min(passes, 2)
            multiplied = columns * min(columns, SKETCH_COLUMNS) / self.n
        else:
            dense += self.n * 2.0 * rank * columns  # omega^T of the new columns
            multiplied = columns
        return SKETCH_COST[precision] * multiplied + self.pass_columns * passes + dense / (2.0 * self.n**2)


def iterations(tail: float, shift: float, tolerance: float) -> float:
    """About how many iterations a preconditioner leaves whose smallest eigenvalue is ``tail``.

    shift: with the smallest eigenvalue of K.
    """
    return 0.5 * math.sqrt(1 + BEYOND * tail / shift) * math.log(2 / tolerance)


def preconditioner_bytes(n: int, rank: int, precision: str) -> int:
    """Bytes that making a preconditioner of so many columns takes at the peak."""
    itemsize = np.dtype(precision).itemsize
    chunk = n * min(rank, SKETCH_COLUMNS) * (itemsize + 8)  # of a product, and the test matrix
    small = SMALL_MATRICES * rank * rank * 8 + 4 * min(n, ROWS) * rank * 8
    return n * rank * itemsize + max(chunk, small)


def rank_within(limit: int, n: int, precision: str) -> int:
    """The largest rank whose making takes at most ``limit`` bytes: at least one, at most half of n.

    A test matrix of more columns would be ill-conditioned, and factoring K would cost less.
    """
    low, high = 1, max((n + 1) // 2, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if preconditioner_bytes(n, middle, precision) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def randomised_nystrom(
    K: Symmetric,
    shifts: Sequence[float],
    rank_bytes: int,
    seed: int,
    tolerance: float = 1e-6,
    pass_columns: float = 0.0,
    floor: float = 0.0,
    full: str = MEMORY,
) -> Preconditioner:
    """Sketch K with a growing random test matrix until its rank suffices for the smallest shift.

    The columns are doubled, and what was sketched stays, until the smallest eigenvalue or the effective dimension say
    that it is enough, until ``rank_bytes`` are full, or until more would cost more than the iterations that it saves
    (see ``Price``). All begins in float32. Where its rounding hides eigenvalues that the smallest shift does not, it
    begins anew in float64, if that pays and memory allows a larger rank so; and where values are beyond its range, in
    any case. floor: the smallest eigenvalue that K may have, which does what a shift does; zero where nothing is known
    of it. full: why ``rank_bytes`` are not more, ``MEMORY`` or ``EXPECTED``.

    Raises:
        NumericalError: K times random columns is not finite in float64 either.
    """
    sampled = isinstance(K, GramOperator)
    price = Price(K.n, tuple(shift + floor for shift in shifts), tolerance, pass_columns, sampled)
    largest = {precision: rank_within(rank_bytes, K.n, precision) for precision in SKETCH_COST}
    precision, rank = "float32", FIRST_RANK
    while rank < pass_columns:  # the first pass is not worth less
        rank *= 2
    rank = min(rank, largest[precision])
    sketch = sketch_of(K, precision, largest[precision], seed)
    before: Spectrum | None = None
    while True:
        try:
            sketch.grow(rank)
            spectrum = sketch.spectrum()
        except SketchNotFinite:
            if precision == "float64":
                raise
            precision, before = "float64", None
            rank = min(rank, largest[precision])
            sketch = sketch.anew(precision, largest[precision])
            continue
        following, reason = _next(spectrum, before, largest, price, full)
        if reason:
            values = spectrum.values.copy()
            U = sketch.eigenvectors(spectrum)
            return Preconditioner(U, values[: U.shape[1]], precision, reason)
        before = spectrum.without_vectors()
        del spectrum
        if following[0] != precision:
            sketch = sketch.anew(following[0], largest[following[0]])
        precision, rank = following


def _next(
    spectrum: Spectrum, before: Spectrum | None, largest: dict[str, int], price: Price, full: str
) -> tuple[tuple[str, int], str]:
    """Precision and rank of the sketch to make next; or why this one suffices, and not nothing."""
    here, precision = (spectrum.precision, spectrum.rank), spectrum.precision
    smallest, known = min(price.shifts), len(spectrum.values)
    if not known and spectrum.trace == 0:
        return here, "the matrix is zero"
    if not known and precision == "float64":
        return here, "nothing of the matrix is above rounding"
    if not known:
        return ("float64", min(spectrum.rank, largest["float64"])), ""
    tail = _tail(spectrum)
    if tail <= SMALL_TAIL * smallest:
        return here, "the spectrum beyond is below the ridge"
    dimension = float((spectrum.values / (spectrum.values + smallest)).sum())
    dimension += spectrum.trace / (BEYOND * tail + smallest)  # of what is missed, at least
    if known >= RANK_PER_DIMENSION * dimension:
        return here, "well above the effective dimension"
    # Columns that others stand for are hidden as well, and then more of them show more in the same precision.
    exhausted = known < spectrum.rank and spectrum.trace <= spectrum.noise * price.n
    coarse = spectrum.noise > NOISE * smallest
    if exhausted and (precision == "float64" or not coarse):
        return here, f"rounding hides what is below {spectrum.noise:.2g}"
    wider = "float64" if exhausted and coarse else precision
    useful = known if wider != precision else spectrum.rank
    rank = min(-(-2 * useful // PANEL) * PANEL, largest[wider])
    if rank <= useful:
        return here, HALF if useful >= (price.n + 1) // 2 else full
    if before is not None and 0 < len(before.values) < known:
        # The spectrum goes on falling as it fell over the last growth. Where rounding cut off both sketches their ends
        # say what it hides, and not how the spectrum falls: it does as over the last half of what is known.
        count, end = len(before.values), _tail(before)
        if wider != precision and count < before.rank:
            count = (known + 1) // 2
            end = float(spectrum.values[count - 1])
        power = math.log(end / tail) / math.log(known / count)
        ahead = tail * (useful / rank) ** max(power, 0.0)
        saved = price.solving(tail, known) - price.solving(ahead, rank)
        if saved < price.growing(rank, rank - useful if wider == precision else rank, wider):
            return here, "more would cost more than the iterations it saves"
    return (wider, rank), ""


def _tail(spectrum: Spectrum) -> float:
    """The smallest eigenvalue of an approximation, or what stands for it where more than ``BEYOND`` times as much is
    known to be missed: the diagonal of a matrix has no entry above its largest eigenvalue."""
    return max(float(spectrum.values[-1]), spectrum.peak / BEYOND)


def save(path: Path, made: Preconditioner) -> None:
    """Keep a preconditioner, whole and durable.

    Raises:
        DiskFull: no space is left.
    """
    words = np.array([made.precision, made.reason])
    save_arrays(path, {"U": made.U, "values": made.values, "words": words})


def load(path: Path, n: int) -> Preconditioner | None:
    """What was kept for n samples; None where there is none, or it is damaged."""
    arrays = load_arrays(path, ("U", "values", "words"))
    if arrays is None or arrays["U"].shape[0] != n:
        return None
    precision, reason = arrays["words"].tolist()
    return Preconditioner(arrays["U"], arrays["values"], precision, reason)
