"""Ridge regression on explicit features: weights w of (Phi^T Phi + n*lambda*I) w = Phi^T Y (SPEC F7, R1, R4 to R6, R9).

With the smaller of Phi^T Phi and Phi Phi^T by one eigendecomposition for the whole path of ridges or by a Cholesky
factor for each ridge; or by conjugate gradients, where neither fits the memory or few iterations cost less, with a
preconditioner that is sketched or, as Falkon's, of some samples. All give a ``Solution`` whose ``alpha`` are the
weights (width, t), whose ``residual`` |(Phi^T Phi + shift I) w - Phi^T Y|_F / |Phi^T Y|_F is measured by a pass over
the features, not taken from a matrix that was accumulated, and whose ``fitted`` are the predictions on the training
samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh

from ..errors import DataError, ExperimentError, NumericalError
from ..explicit.covariance import Moments, inner_products, moments
from ..explicit.feature_products import Asked, Found, flattened, stream, unflattened
from ..explicit.featuresource import FeatureSource
from ..memory import peak_bytes
from ..normal import normal_product
from ..site import Site
from ..tilesource import index_set
from .base import (
    RIDGES,
    DirectSolver,
    Keeping,
    Progress,
    Solution,
    Status,
    check_ridges,
    check_targets,
    final_status,
    jitter_notes,
    left_out,
    quality_notes,
    require_finite,
    shifts,
    unwatched,
)
from .cholesky import Cholesky, CholeskyState
from .conjugate_gradient import ConjugateGradient, ConjugateGradientState
from .eigen import inverse_diagonals
from .falkon import SAMPLES, Diagonal, Sampled
from .iterated import Iterative, digest

LOST = 10.0
"""So many times what rounding may make of a leverage h must 1 - h be, for a leave-one-out residual to mean anything."""


class FeatureOperator:
    """Features restricted to an index set of samples.

    source: all features (N, width). rows: (n,) index set. site: where workers take part and what was computed is kept;
    without one everything is done in this process, and nothing is kept.

    Raises:
        DataError: rows are not an index set of the source, or none.
    """

    def __init__(self, source: FeatureSource, rows: ArrayLike, site: Site | None = None) -> None:
        self.source = source
        self.site = site
        self.rows = index_set(rows, source.shape[0])
        if not self.rows.size:
            raise DataError("a regression on no samples cannot be solved; give at least one row")

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return self.source.shape[1]

    def moments(self, Y: np.ndarray) -> Moments:
        """Phi^T Phi and Phi^T Y, kept by the site."""
        return moments(self.source, self.rows, Y, self.site, self._told("strips of the covariance"))

    def inner_products(self) -> np.ndarray:
        """Phi Phi^T, its upper triangle."""
        return inner_products(self.source, self.rows, progress=self._told("blocks of inner products"))

    def stream(self, asked: Asked) -> Found:
        """What is asked, in one pass over the features."""
        return stream(self.source, self.rows, asked, self.site, self._told("strips of features"))

    def normal(self, V: np.ndarray) -> np.ndarray:
        """Phi^T (Phi V) for V (width, k), in one pass."""
        return normal_product(self.source, self.rows, np.arange(self.width), V, self.site)

    def _told(self, what: str) -> Any:
        site = self.site

        def told(done: int, total: int) -> None:
            if site is not None:
                site.progress(done, total, what)

        return told


class PrimalSolver(Keeping, Protocol):
    """A way to solve on features."""

    def solve(
        self,
        operator: FeatureOperator,
        ridges: Sequence[float],
        Y: ArrayLike,
        progress: Progress = unwatched,
    ) -> tuple[Solution, ...]:
        """One solution per ridge, in the order given, for (n,) or (n, t) targets."""
        ...


@dataclass(frozen=True)
class _Path:
    """Regressions on the same features and targets for a path of ridges.

    dual: whether they are solved by Phi Phi^T rather than Phi^T Phi. right: (m, t) what is solved for with that matrix
    (m, m). shifts: what each ridge adds to its diagonal, ``jitter`` of it beside the ridge.
    """

    operator: FeatureOperator
    ridges: tuple[float, ...]
    targets: np.ndarray
    dual: bool
    right: np.ndarray
    shifts: tuple[float, ...]
    jitter: float
    started: float

    @classmethod
    def of(
        cls, solver: DirectSolver, operator: FeatureOperator, ridges: Sequence[float], Y: ArrayLike
    ) -> tuple[_Path, np.ndarray]:
        """The path, and the matrix: float64 in Fortran order, its upper triangle. Nothing else refers to it."""
        values, targets = check_ridges(ridges), check_targets(Y, operator.n)
        started, dual = perf_counter(), operator.n < operator.width
        matrix, right = _system(operator, targets, dual)
        mean = float(matrix.diagonal().sum()) / operator.n
        added, jitter = shifts(values, np.broadcast_to(mean, operator.n), solver.jitter, solver.absolute)
        return cls(operator, values, targets, dual, right, added, jitter, started), matrix

    def weights(self, solved: np.ndarray) -> np.ndarray:
        """(r, width, t) weights of the (r, m, t) solutions with the matrix."""
        W = solved
        if self.dual:
            W = unflattened(self.operator.stream(Asked(Y=flattened(solved))).seen, solved.shape)
        for ridge, w in zip(self.ridges, W, strict=True):
            require_finite(w, ridge)
        return W

    def seen(self, W: np.ndarray, vectors: np.ndarray | None = None, by: np.ndarray | None = None) -> Found:
        """What a pass over the features sees of the weights; of leverages as well where vectors are given."""
        return self.operator.stream(Asked(flattened(W), self.targets, vectors, by))

    def solutions(
        self,
        W: np.ndarray,
        seen: Found,
        dimensions: Sequence[float | None],
        *,
        loos: Sequence[np.ndarray | None],
        indefinite: Sequence[bool],
        notes: Sequence[tuple[str, ...]],
    ) -> tuple[Solution, ...]:
        fitted, normal = (unflattened(one, W.shape) for one in (seen.values, seen.normal))
        scale = float(np.linalg.norm(seen.seen))
        seconds = (perf_counter() - self.started) / len(self.ridges)
        made = []
        for k, (ridge, shift) in enumerate(zip(self.ridges, self.shifts, strict=True)):
            error = float(np.linalg.norm(normal[k] + shift * W[k] - seen.seen))
            residual = error / scale if scale else 0.0
            made.append(
                Solution(
                    alpha=W[k],
                    ridge=ridge,
                    shift=shift,
                    status=final_status(residual, indefinite[k]),
                    residual=residual,
                    iterations=0,
                    effective_dimension=dimensions[k],
                    seconds=seconds,
                    peak_bytes=peak_bytes(),
                    loo=loos[k],
                    jitter=self.jitter,
                    notes=(*jitter_notes(self.jitter), *quality_notes(residual, "float64"), *notes[k]),
                    fitted=fitted[k],
                )
            )
        return tuple(made)


@dataclass(frozen=True)
class PrimalEigen(DirectSolver):
    """Phi^T Phi = U diag(s) U^T once gives all ridges: w = U (s + n*lambda)^-1 U^T Phi^T Y (R4).

    With fewer samples than features Phi Phi^T is decomposed instead, and w = Phi^T alpha (F7). loo: leave-one-out by
    the hat matrix, (y - f) / (1 - h) with h_i = sum_j (Phi U)_ij^2 / (s_j + n*lambda), for all ridges in one pass; in
    the dual by R5.
    """

    def solve(
        self,
        operator: FeatureOperator,
        ridges: Sequence[float],
        Y: ArrayLike,
        progress: Progress = unwatched,
    ) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets, the effective dimension exact.

        Two passes over the features (three in the dual), of which a site keeps the sums of the first. ``loo`` is None
        at a ridge so small that rounding leaves nothing of some 1 - h, and a note says so.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
            DataError: targets of another shape, or not finite.
            NumericalError: features or what is computed of them are not finite.
        """
        path, matrix = _Path.of(self, operator, ridges, Y)
        targets, count = path.targets, len(path.ridges)
        diagonal = matrix.diagonal().copy()
        spectrum, vectors = _decomposed(matrix)
        del matrix
        weights = 1.0 / (spectrum[:, None] + np.array(path.shifts))
        coordinates = vectors.T @ path.right
        solved = np.stack([vectors @ (w[:, None] * coordinates) for w in weights.T])
        W = path.weights(solved)
        hat = self.loo and not path.dual
        seen = path.seen(W, vectors, weights) if hat else path.seen(W)
        loos: list[np.ndarray | None] = [None] * count
        if hat:
            rounding = LOST * np.finfo(np.float64).eps * spectrum[-1]
            fitted = unflattened(seen.values, W.shape)
            loos = [
                targets - (targets - f) / left[:, None] if left.min() > rounding / shift else None
                for f, left, shift in zip(fitted, 1.0 - seen.leverages.T, path.shifts, strict=True)
            ]
        elif self.loo:
            inverses = inverse_diagonals(vectors, weights)
            loos = [left_out(targets, a, r, diagonal) for a, r in zip(solved, inverses.T, strict=True)]
        lost = ("rounding leaves nothing of some leave-one-out residuals at this ridge",)
        progress(count, count, RIDGES)
        return path.solutions(
            W,
            seen,
            (spectrum @ weights).tolist(),
            loos=loos,
            indefinite=[False] * count,
            notes=[lost if self.loo and loo is None else () for loo in loos],
        )


@dataclass(frozen=True)
class PrimalCholesky(DirectSolver):
    """A factor of Phi^T Phi + n*lambda*I for each ridge, or of Phi Phi^T + n*lambda*I where samples are fewer (F7).

    For few ridges a fraction of the time of eigenvectors, in the memory that summing takes; no leave-one-out. The
    effective dimension is estimated where the matrix is large, and None where rounding leaves nothing of it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loo:
            raise ExperimentError('solve.method = "cholesky" has no leave-one-out on features; use "eigen"')

    def solve(
        self,
        operator: FeatureOperator,
        ridges: Sequence[float],
        Y: ArrayLike,
        progress: Progress = unwatched,
    ) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets.

        Two passes over the features (three in the dual), of which a site keeps the sums of the first.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
            DataError: targets of another shape, or not finite.
            NumericalError: features or what is computed of them are not finite, or the matrix is not positive
                definite at some ridge beyond rounding.
        """
        path, matrix = _Path.of(self, operator, ridges, Y)
        count, solver = len(path.ridges), Cholesky("float64", absolute=True)
        state = CholeskyState(None, path.ridges, path.shifts, 0.0, matrix, matrix.diagonal().copy(), 0.0)
        found: list[Solution] = []
        for ridge, shift in zip(path.ridges, path.shifts, strict=True):
            progress(len(found), count, RIDGES)
            try:
                found.append(solver.solve_one(state, ridge, shift, path.right))
            except NumericalError as error:
                raise NumericalError(
                    f"the features have no Cholesky factor at ridge {ridge:g} ({str(error).partition(';')[0]}); take a"
                    ' larger ridge, or solve.method = "eigen"'
                ) from None
        dimensions = [_dimension(one, state.n) for one in found]
        del state, matrix
        W = path.weights(np.stack([one.alpha for one in found]))
        progress(count, count, RIDGES)
        return path.solutions(
            W,
            path.seen(W),
            dimensions,
            loos=[None] * count,
            indefinite=[one.status is Status.INDEFINITE for one in found],
            notes=[
                tuple(note for note in one.notes if note not in quality_notes(one.residual, "float64"))
                for one in found
            ],
        )


def _dimension(solution: Solution, size: int) -> float | None:
    """What a factor says of the effective dimension; None where rounding leaves nothing of it."""
    found = solution.effective_dimension
    return found if found is not None and 0 <= found <= size else None


def _system(operator: FeatureOperator, Y: np.ndarray, dual: bool) -> tuple[np.ndarray, np.ndarray]:
    """The matrix to decompose, upper triangle, and what is solved for."""
    if dual:
        return operator.inner_products(), Y
    found = operator.moments(Y)
    return found.covariance, found.products


def _decomposed(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of a matrix whose upper triangle is given, and which is used up.

    Of such a product none is negative but by rounding: those are set to zero (R4).
    """
    try:
        # evr as in ``eigen``: beside the matrix one more for the vectors
        values, vectors = eigh(matrix, lower=False, overwrite_a=True, check_finite=False, driver="evr")
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            f'the eigendecomposition failed ({error}); use solve.method = "conjugate-gradient"'
        ) from None
    return values.clip(0), vectors


@dataclass(frozen=True)
class _Iterated(Iterative, ABC):
    """Conjugate gradients on the same system: one pass over the features an iteration, for all targets and ridges."""

    def solve(
        self,
        operator: FeatureOperator,
        ridges: Sequence[float],
        Y: ArrayLike,
        progress: Progress = unwatched,
    ) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets; goes on from what the operator's site holds.

        A solution's status is ``solved`` where its residual is at most ``tolerance``, else ``not converged``, and a
        note says why. The effective dimension is estimated.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
            DataError: targets of another shape, or not finite.
        """
        values, targets = check_ridges(ridges), check_targets(Y, operator.n)
        started = perf_counter()
        first = operator.stream(Asked(Y=targets))
        mean = float(first.squares.sum()) / operator.n
        added, jitter = shifts(values, np.broadcast_to(mean, operator.n), self.jitter, self.absolute)
        beside = perf_counter() - started
        state = replace(self._state(Covariance(operator, first.squares), added, targets), ridges=values)
        options: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Iterative)}
        # The jitter is in the shifts.
        solver = ConjugateGradient(**{**options, "jitter": 0.0, "absolute": True})
        solved = solver.solve(state, first.seen, progress)
        started = perf_counter()
        W = np.stack([one.alpha for one in solved])
        fitted = unflattened(operator.stream(Asked(W=flattened(W))).values, W.shape)
        beside += perf_counter() - started
        return tuple(
            replace(
                one,
                jitter=jitter,
                seconds=one.seconds + beside / len(values),
                notes=(*jitter_notes(jitter), *one.notes),
                fitted=f,
            )
            for one, f in zip(solved, fitted, strict=True)
        )

    @abstractmethod
    def _state(self, C: Covariance, added: tuple[float, ...], targets: np.ndarray) -> ConjugateGradientState:
        """The preconditioner of C + shift I for the shifts ``added``, and what names the solve."""


@dataclass(frozen=True)
class PrimalGradients(_Iterated):
    """Conjugate gradients preconditioned by a randomised Nystrom approximation of Phi^T Phi.

    rank_bytes, memory_bound, pass_columns: as of ``ConjugateGradient``, whose checkpoints these are.
    """

    rank_bytes: int = field(default=2**30, repr=False)
    memory_bound: bool = field(default=True, repr=False)
    pass_columns: float = field(default=0.0, repr=False)

    def _state(self, C: Covariance, added: tuple[float, ...], targets: np.ndarray) -> ConjugateGradientState:
        options: dict[str, Any] = {**vars(self), "jitter": 0.0, "absolute": True}
        return ConjugateGradient(**options).factor(C, added)


@dataclass(frozen=True)
class PrimalFalkon(_Iterated):
    """Conjugate gradients with Falkon's preconditioner, whose iterations are few at any ridge (R7).

    whitened: whether features are those of a Nystrom map, of which it is diagonal; of others ``falkon.SAMPLES`` for
    each feature are drawn from the training samples by ``seed``, and what they sum to is kept by the site.
    """

    whitened: bool = False

    def _state(self, C: Covariance, added: tuple[float, ...], targets: np.ndarray) -> ConjugateGradientState:
        started, site = perf_counter(), C.site
        made: Diagonal | Sampled = Diagonal(C.diag())
        if not self.whitened:
            n = len(C.rows)
            count = min(n, SAMPLES * C.n)
            drawn = np.sort(np.random.default_rng(self.seed).choice(n, count, replace=False))
            A = C.among(drawn).moments(targets[drawn]).covariance
            A *= n / count
            made = Sampled.of(A, added, count)
        inputs = digest(C.rows, C.diag(), np.array(added), str((self.seed, self.whitened)))
        folder = site.folder if site is not None else None
        seconds = perf_counter() - started
        return ConjugateGradientState(C, added, added, 0.0, made, folder, inputs, seconds)


class Covariance:
    """Phi^T Phi as products alone. squares: (width,) its diagonal."""

    def __init__(self, operator: FeatureOperator, squares: np.ndarray) -> None:
        self.rows = operator.rows
        self.site = operator.site
        self._operator = operator
        self._squares = squares

    @property
    def n(self) -> int:
        return self._operator.width

    def diag(self) -> np.ndarray:
        return self._squares

    def matmul(self, V: np.ndarray) -> np.ndarray:
        return self._operator.normal(V)

    def among(self, positions: np.ndarray) -> FeatureOperator:
        """The features of some of its samples."""
        return FeatureOperator(self._operator.source, self.rows[positions], self.site)
