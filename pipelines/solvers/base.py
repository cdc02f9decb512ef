"""What every solver of (K + n*lambda*I) alpha = Y shares: its result, its options, its checks (SPEC R1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError, ExperimentError, NumericalError
from ..operators import GramOperator

ACCURATE = 1e-6
"""A relative residual above this makes a solution's status ``inaccurate``."""


class Status(StrEnum):
    SOLVED = "solved"
    INDEFINITE = "indefinite"
    """Cholesky failed by rounding; a symmetric indefinite factor solved the system (R3)."""
    INACCURATE = "inaccurate"
    """The measured residual is above ``ACCURATE``."""
    NOT_CONVERGED = "not converged"
    """An iterative solver stopped above the residual that was asked for."""


UNSOLVED = (Status.INACCURATE, Status.NOT_CONVERGED)
"""What is told of a ridge wherever its numbers are, and keeps it behind others of equal score."""


@dataclass(frozen=True)
class Solution:
    """What was solved, how well, at what price.

    alpha: (n, t) float64 coefficients; f(x) = sum_i alpha_i K(x_i, x).
    ridge: lambda (or n*lambda where the solver's ``absolute`` is set).
    shift: what was added to the diagonal in all, n*lambda + jitter; so K alpha = Y - shift * alpha.
    jitter: the part of it that was asked for beside the ridge.
    residual: |(K + shift I) alpha - Y|_F / |Y|_F, measured in float64 on the stored matrix.
    iterations: steps of refinement or of an iterative method; 0 for a plain direct solve.
    effective_dimension: d(lambda) = tr K (K + shift I)^-1 (R9), or None where it is not known.
    seconds: wall time of this ridge, with an equal share of the work common to all ridges.
    peak_bytes: the process's resident high-water mark when this ridge was done.
    loo: (n, t) leave-one-out predictions (R5) where asked for. loo_estimated: they are right in mean square alone, not
        sample by sample.
    notes: warnings and remarks that a report repeats.
    fitted: (n, t) predictions on the training samples where they do not follow from alpha, as for explicit features,
        whose weights (width, t) ``alpha`` then holds; ``residual`` is that of their normal equations.
    """

    alpha: np.ndarray
    ridge: float
    shift: float
    status: Status
    residual: float
    iterations: int
    effective_dimension: float | None
    seconds: float
    peak_bytes: int
    loo: np.ndarray | None = None
    jitter: float = 0.0
    notes: tuple[str, ...] = ()
    fitted: np.ndarray | None = None
    loo_estimated: bool = False


Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and of what: ridges, tiles of a factor, iterations."""

RIDGES = "ridges solved"


def unwatched(done: int, total: int, message: str) -> None:
    """The progress of a solve that nobody watches."""


State = TypeVar("State")


class Keeping(Protocol):
    """A solver that may keep something for its next start."""

    @property
    def kept_by_list(self) -> bool:
        """Whether what is kept belongs to the list of ridges: a solve with another list keeps what it has in another
        place.

        So it is where a ridge's solution has other bits beside other ridges and nothing but the place tells them apart.
        """
        ...


class Solver(Keeping, Protocol[State]):
    """Cholesky, eigendecomposition, and whatever else solves for a whole path of ridges."""

    def factor(self, K: GramOperator, ridges: Sequence[float]) -> State:
        """Do the work that does not depend on the targets."""
        ...

    def solve(self, state: State, Y: ArrayLike, progress: Progress = unwatched) -> tuple[Solution, ...]:
        """One solution per ridge, in the order given to ``factor``, for (n,) or (n, t) targets."""
        ...


@dataclass(frozen=True)
class DirectSolver:
    """Options that the direct solvers share.

    dtype: of the matrix in memory and its factor.
    jitter: added to the diagonal beside n*lambda, relative to the mean of K's diagonal.
    absolute: ridges are n*lambda itself rather than lambda (R1).
    loo: compute leave-one-out predictions (R5).
    """

    dtype: str = "float64"
    jitter: float = 0.0
    absolute: bool = False
    loo: bool = False

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    """What ``dtype`` may be."""

    def __post_init__(self) -> None:
        if self.dtype not in self.dtypes:
            raise ExperimentError(f"solve.dtype must be {' or '.join(self.dtypes)}, not {self.dtype!r}")
        if not (np.isfinite(self.jitter) and self.jitter >= 0):
            raise ExperimentError(f"solve.jitter must be finite and not negative, got {self.jitter}")

    @property
    def kept_by_list(self) -> bool:
        """As of ``Keeping``: each ridge has a factor of its own, but mixed precision goes on in float64 from
        the first ridge of the list at which float32 fails."""
        return self.dtype == "mixed"

    def shifts(self, ridges: Sequence[float], diagonal: np.ndarray) -> tuple[tuple[float, ...], float]:
        """What each ridge adds to K's (n,) diagonal in all, and the part of it that is jitter."""
        return shifts(ridges, diagonal, self.jitter, self.absolute)

    def jitter_notes(self, jitter: float) -> tuple[str, ...]:
        return jitter_notes(jitter)

    @property
    def inaccurate_note(self) -> str:
        """What an inaccurate factor does not give, of what it was asked for."""
        return f"the factor is too inaccurate for {'leave-one-out and ' if self.loo else ''}the effective dimension"

    def notes(self, jitter: float, residual: float, dtype: str) -> list[str]:
        """What is to be said of a solution by a factor in ``dtype``, whatever the method."""
        return [*jitter_notes(jitter), *quality_notes(residual, dtype)]


def shifts(
    ridges: Sequence[float], diagonal: np.ndarray, jitter: float, absolute: bool
) -> tuple[tuple[float, ...], float]:
    """What each ridge adds to K's (n,) diagonal in all, and the part of it that is jitter.

    jitter: relative to the mean of the diagonal; absolute: ridges are n*lambda itself (R1).

    Raises:
        DataError: the diagonal is zero, and so is all of K.
    """
    if not diagonal.any():
        raise DataError(
            f"each of the {len(diagonal)} training samples is zero to the kernel, so that nothing can be learned;"
            " look at the samples and at data.preprocess"
        )
    added = jitter * float(diagonal.mean())
    unit = 1 if absolute else len(diagonal)
    return tuple(unit * ridge + added for ridge in ridges), added


def jitter_notes(jitter: float) -> tuple[str, ...]:
    return (f"jitter: {jitter:.3g} was added to the diagonal beside the ridge",) if jitter else ()


def check_ridges(ridges: Sequence[float]) -> tuple[float, ...]:
    """``ridges`` as floats.

    Raises:
        ExperimentError: none, or one that is not finite and positive.
    """
    values = tuple(float(ridge) for ridge in ridges)
    if not values:
        raise ExperimentError("solve.ridges is empty; give at least one ridge, such as 1e-3")
    for value in values:
        if not (np.isfinite(value) and value > 0):
            raise ExperimentError(f"solve.ridges: a ridge must be finite and greater than zero, got {value}")
    return values


def check_targets(Y: ArrayLike, n: int) -> np.ndarray:
    """``Y`` as an (n, t) float64 array.

    Raises:
        DataError: another number of samples, no column, or values that are not finite numbers.
    """
    try:
        targets = np.asarray(Y, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError("targets must be numbers; encode labels with one_vs_all") from None
    if targets.ndim == 1:
        targets = targets[:, None]
    if targets.ndim != 2 or len(targets) != n or not targets.shape[1]:
        raise DataError(f"{n} training samples need targets of shape ({n}, t), got {np.shape(Y)}")
    bad = np.flatnonzero(~np.isfinite(targets).all(axis=1))
    if bad.size:
        raise DataError(f"the target of training sample {bad[0]} is not finite ({bad.size} such in all)")
    return targets


def refine(
    correct: Callable[[np.ndarray], np.ndarray],
    apply: Callable[[np.ndarray], np.ndarray],
    Y: np.ndarray,
    goal: float = 1e-8,
    steps: int = 30,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, float, int]:
    """Solve A x = Y by an approximate inverse, repeated on the residual while that helps.

    correct: (n, t) -> (n, t), the approximate inverse; apply: V -> A V in float64. start: ``correct(Y)``
    where it is known already.
    Returns the best x, its measured relative residual, and the number of repetitions kept. One that does
    not at least halve the residual is the last: rounding has been reached.
    """
    scale = float(np.linalg.norm(Y))
    if scale == 0.0:
        return np.zeros_like(Y), 0.0, 0
    x = correct(Y) if start is None else start
    remainder = Y - apply(x)
    error = float(np.linalg.norm(remainder)) / scale
    kept = 0
    while goal < error < np.inf and kept < steps:
        better = x + correct(remainder)
        remainder = Y - apply(better)
        reached = float(np.linalg.norm(remainder)) / scale
        if not reached < error:
            break
        stalled = reached > error / 2
        x, error, kept = better, reached, kept + 1
        if stalled:
            break
    return x, error, kept


def rounding_level(n: int, dtypes: Sequence[np.dtype], largest_diagonal: float) -> float:
    """How far below zero rounding may push an eigenvalue of a positive semi-definite (n, n) matrix.

    Entries stored in a dtype, and a factor computed in one, are perturbed by a few units of its rounding
    each; n times the largest entry (for such a matrix on the diagonal) times that bounds the shift.
    """
    unit = max(float(np.finfo(dtype).eps) for dtype in dtypes)
    return 4 * n * unit * largest_diagonal


def advice_on_ridges(smallest: float, unit: int, single: bool) -> str:
    """What to do about an eigenvalue of K as small as this one; arguments as ``not_positive_definite``'s."""
    enough = 2 * abs(smallest) / unit
    advice = f"take a ridge of at least {enough:.1e} or set solve.jitter"
    return advice + (", or store and solve in float64" if single else "")


def not_positive_definite(
    *, ridge: float, shift: float, smallest: float, largest: float, unit: int, single: bool, failed: str = ""
) -> NumericalError:
    """The error for a matrix that no rounding explains.

    unit: what a ridge is multiplied by (n, or 1 where ridges are absolute); single: whether anything
    was stored or factored in float32, so that float64 could help. failed: the pivot that is not positive, in words.
    """
    advice = advice_on_ridges(smallest, unit, single)
    first = f"{failed} is not positive, " if failed else ""
    return NumericalError(
        f"K + n*lambda*I is not positive definite at ridge {ridge:g} (added to the diagonal: {shift:.3g}): {first}"
        f"the smallest eigenvalue of K is about {smallest:.3g}, the largest about {largest:.3g}; {advice}"
    )


def lost_in_rounding(
    *, ridge: float, shift: float, level: float, unit: int, single: bool, failed: str
) -> str:
    """Why there is no factor of a matrix that may be indefinite by rounding alone.

    level: how far that may push an eigenvalue; the others as of ``not_positive_definite``.
    """
    return (
        f"K + n*lambda*I is singular at ridge {ridge:g}: what it adds to the diagonal, {shift:.3g}, is lost in the"
        f" rounding of K, up to {level:.1e}, and {failed}; {advice_on_ridges(level, unit, single)}"
    )


def extreme_eigenvalues(
    multiply: Callable[[np.ndarray], np.ndarray], n: int, tolerance: float, steps: int = 300
) -> tuple[float, float]:
    """Estimates of the smallest and the largest eigenvalue of a symmetric (n, n) operator, by Lanczos.

    multiply: (n,) -> (n,) float64. Stops when both are known to ``tolerance`` or after ``steps``
    products; the estimates lie inside the spectrum, so the smallest is never below the true one.
    """
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(n)
    basis = np.empty((min(steps, n), n))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    basis[0] = vector / np.linalg.norm(vector)
    while True:
        k = len(diagonal)
        vector = multiply(basis[k])
        diagonal.append(float(basis[k] @ vector))
        for _ in range(2):  # twice: one pass of Gram-Schmidt leaves copies of converged eigenvalues
            vector -= basis[: k + 1].T @ (basis[: k + 1] @ vector)
        length = float(np.linalg.norm(vector))
        ended = k + 1 == len(basis) or length <= n * np.finfo(np.float64).eps * max(map(abs, diagonal))
        if ended or k % 10 == 9:
            tridiagonal = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
            values, vectors = np.linalg.eigh(tridiagonal)
            if ended or length * np.abs(vectors[-1, [0, -1]]).max() <= tolerance:
                return float(values[0]), float(values[-1])
        off_diagonal.append(length)
        basis[k + 1] = vector / length


def left_out(
    Y: np.ndarray, alpha: np.ndarray, inverse_diagonal: np.ndarray, diagonal: np.ndarray
) -> np.ndarray:
    """(n, t) leave-one-out predictions y - alpha / R_ii of targets Y (n, t), R = (K + shift I)^-1 (R5).

    inverse_diagonal: (n,) R_ii; diagonal: (n,) of K. Where K's is zero, so are its row and the prediction, exactly,
    of which the difference would leave the rounding or the error of an estimated R_ii.
    """
    predictions = Y - alpha / inverse_diagonal[:, None]
    predictions[diagonal == 0] = 0.0
    return predictions


def final_status(residual: float, indefinite: bool = False) -> Status:
    """The status that a measured relative residual earns."""
    if not residual <= ACCURATE:
        return Status.INACCURATE
    return Status.INDEFINITE if indefinite else Status.SOLVED


def quality_notes(residual: float, dtype: str) -> tuple[str, ...]:
    """The warning that goes with the status ``inaccurate``, for a factor in ``dtype``."""
    if residual <= ACCURATE:
        return ()
    advice = "take a larger ridge" + (" or solve in float64" if dtype == "float32" else "")
    return (f"the relative residual {residual:.1e} is above {ACCURATE:g}; {advice}",)


def require_finite(alpha: np.ndarray, ridge: float) -> None:
    """Raise NumericalError when a solve produced values that are not finite."""
    if not np.isfinite(alpha).all():
        raise NumericalError(
            f"the coefficients at ridge {ridge:g} are not finite; verify the store, or take a larger ridge"
        )
