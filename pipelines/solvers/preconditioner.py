"""Randomised Nystrom preconditioner of K + shift I (SPEC R6; Frangella, Tropp, Udell 2023, Algorithms 2.1, E.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.linalg import LinAlgError, cholesky, qr, svd
from scipy.linalg.blas import dtrsm

from ..operators import GramOperator
from .iterations import load_arrays, save_arrays

FIRST_RANK = 64
"""Columns of the first sketch; each further one doubles what there is."""

SMALL_TAIL = 1.0
"""An approximation whose smallest eigenvalue is at most so many times the smallest shift is good enough: what is left
has a condition number of about two."""

NOISE = 10.0
"""So many times a shift may the noise of a sketch be: a condition number of eleven at most, a few iterations more."""

RANK_PER_DIMENSION = 3.0
"""A rank of so many times the effective dimension is good enough (there, Theorem 2.2: 2 ceil(1.5 d) + 1)."""

COLUMNS = 14
"""Systems per ridge that a solve is taken to have when its iterations are weighed against sketching."""

SKETCH_COST = {"float32": 0.5, "float64": 1.0}
"""Price of a sketched column in columns of a float64 product."""

ARRAYS = 4
"""(n, rank) float64 arrays held at the peak: test matrix, sketch, its factor, eigenvectors."""

SHIFT_TRIES = 20


@dataclass(frozen=True)
class Preconditioner:
    """K ~ U diag(values) U^T.

    U: (n, r) float64, orthonormal columns. values: (r,) float64, descending, not negative. noise: eigenvalues below
    it are not resolved by the sketch. precision: that the sketch was multiplied in. reason: why the rank is what it
    is.
    """

    U: np.ndarray
    values: np.ndarray
    noise: float
    precision: str
    reason: str

    @property
    def rank(self) -> int:
        return len(self.values)

    def solve(self, R: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """P^-1 applied to the rows of R (k, n), row i with ``shifts[i]`` (R6)."""
        if not self.rank:
            return R.copy()
        weights = (self.values[-1] + shifts[:, None]) / (self.values + shifts[:, None]) - 1
        return R + (weights * (R @ self.U)) @ self.U.T

    def effective_dimension(self, shift: float) -> float:
        """Of the approximation: at most K's own (R9)."""
        return float((self.values / (self.values + shift)).sum())

    def quadratic_forms(self, Z: np.ndarray, shift: float) -> np.ndarray:
        """(k,) values z^T A (A + shift I)^-1 z for the rows of Z (k, n), A the approximation."""
        return np.square(Z @ self.U) @ (self.values / (self.values + shift))

    def note(self, shift: float) -> str:
        """What a report says of it at one ridge."""
        smallest = self.values[-1] if self.rank else 0.0
        text = (
            f"Nystrom preconditioner of rank {self.rank} ({self.reason}), sketched in {self.precision}: effective "
            f"dimension {self.effective_dimension(shift):.1f}, smallest eigenvalue {smallest:.2g}, shift {shift:.2g}"
        )
        hidden = self.noise > NOISE * shift
        return text + (f"; the sketch resolves nothing below {self.noise:.2g}" if hidden else "")


def precision_for(trace: float, smallest_shift: float) -> Literal["float32", "float64"]:
    """What the sketch is multiplied in: float32 while its noise cannot matter to the smallest shift.

    Eigenvalues below eps32 times the largest, which the trace bounds, drown; an eigenvalue of that size that the
    preconditioner misses costs iterations only where it is many times the shift.
    """
    return "float32" if np.finfo(np.float32).eps * trace <= NOISE * smallest_shift else "float64"


def randomised_nystrom(
    K: GramOperator, shifts: Sequence[float], trace: float, rank_bytes: int, seed: int
) -> Preconditioner:
    """Sketch K with a growing Gaussian test matrix until its rank suffices for the smallest shift.

    The columns are doubled until the smallest eigenvalue or the effective dimension say that it is enough, until
    ``rank_bytes`` are full, or until sketching would cost more than the iterations that it can save. What was
    sketched stays: columns of the test matrix are drawn in blocks and made orthonormal to those before.
    """
    n, smallest = K.n, min(shifts)
    precision = precision_for(trace, smallest)
    multiply: Callable[[np.ndarray], np.ndarray] = K.sketch if precision == "float32" else K.matmul
    largest_rank = min(n, max(rank_bytes // (8 * n * ARRAYS), 1))
    rng = np.random.default_rng(seed)
    omega, sketch = np.empty((n, 0)), np.empty((n, 0))
    before: np.ndarray | None = None
    rank = min(FIRST_RANK, largest_rank)
    while True:
        block = _orthonormal(rng.standard_normal((n, rank - omega.shape[1])), omega)
        sketch = np.hstack((sketch, multiply(block)))
        omega = np.hstack((omega, block))
        del block
        U, values, noise = decompose(omega, sketch, float(np.finfo(precision).eps))
        reason = _enough(values, rank, shifts, before, largest_rank, precision)
        if reason:
            resolved = max(int((values > noise).sum()), 1) if values.size else 0
            return Preconditioner(
                np.ascontiguousarray(U[:, :resolved]), values[:resolved], noise, precision, reason
            )
        before = values
        del U
        rank = min(2 * rank, largest_rank)


def decompose(omega: np.ndarray, sketch: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Eigenvectors (n, r), eigenvalues (r,) of the Nystrom approximation of K, and the noise in them.

    omega: (n, r) orthonormal; sketch: K omega. unit: relative rounding of the sketch. A shift of the size of the
    noise makes omega^T K omega positive definite and is taken off the eigenvalues again, which are clipped at zero;
    those at or below the noise are rounding as likely as not.
    """
    norm = float(np.linalg.norm(sketch))  # at least the largest eigenvalue seen
    if norm == 0.0:
        return np.empty((len(omega), 0)), np.empty(0), 0.0
    shift = unit * norm
    core = omega.T @ sketch
    core = (core + core.T) / 2
    for _ in range(SHIFT_TRIES):
        try:
            factor = cholesky(core + shift * np.eye(len(core)), check_finite=False)
            break
        except LinAlgError:
            shift *= 10
    else:
        raise AssertionError("no shift makes a finite matrix positive definite")
    half = np.multiply(omega, shift, order="F")
    half += sketch
    half = dtrsm(1.0, factor, half, side=1, overwrite_b=1)  # in place, and so is what follows
    # By QR: the squares of the singular values would lose the small ones, and U its orthogonality.
    Q, R = qr(half, mode="economic", overwrite_a=True, check_finite=False)
    del half
    W, singular, _ = svd(R, check_finite=False)
    return Q @ W, np.maximum(singular**2 - shift, 0.0), shift


def _orthonormal(block: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The columns of ``block`` made orthonormal, and orthogonal to ``basis``."""
    for _ in range(2):  # twice is enough for rounding
        if basis.size:
            block -= basis @ (basis.T @ block)
        block, _ = qr(block, mode="economic", check_finite=False)
    return block


def _enough(
    values: np.ndarray,
    rank: int,
    shifts: Sequence[float],
    before: np.ndarray | None,
    largest_rank: int,
    precision: str,
) -> str:
    """Why the rank suffices; empty where it should be doubled."""
    smallest = min(shifts)
    if not values.size or values[-1] <= SMALL_TAIL * smallest:
        return "the spectrum beyond is below the ridge"
    dimension = float((values / (values + smallest)).sum())
    if rank >= RANK_PER_DIMENSION * dimension:
        return "well above the effective dimension"
    if rank >= largest_rank:
        return "as much memory as it may have"
    if before is not None:
        # The spectrum goes on falling as it fell over the last doubling.
        ahead = values[-1] * min(values[-1] / before[-1], 1.0)
        saved = sum(iterations(values[-1], s) - iterations(ahead, s) for s in shifts)
        if saved * COLUMNS < SKETCH_COST[precision] * min(rank, largest_rank - rank):
            return "more would cost more than the iterations it saves"
    return ""


def iterations(tail: float, shift: float, tolerance: float = 1e-6) -> float:
    """About how many iterations a preconditioner leaves whose smallest eigenvalue is ``tail``."""
    return 0.5 * math.sqrt(1 + tail / shift) * math.log(2 / tolerance)


def save(path: Path, made: Preconditioner) -> None:
    """Keep a preconditioner, whole and durable.

    Raises:
        DiskFull: no space is left.
    """
    words = np.array([made.precision, made.reason])
    arrays = {"U": made.U, "values": made.values, "noise": np.array(made.noise), "words": words}
    save_arrays(path, arrays)


def load(path: Path, n: int) -> Preconditioner | None:
    """What was kept for n samples; None where there is none, or it is damaged."""
    arrays = load_arrays(path)
    if arrays is None or arrays["U"].shape[0] != n:
        return None
    precision, reason = arrays["words"].tolist()
    return Preconditioner(arrays["U"], arrays["values"], float(arrays["noise"]), precision, reason)
