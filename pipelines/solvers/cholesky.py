"""Direct solve by Cholesky, in the memory of one triangle for a whole path of ridges (SPEC R3, R5, R9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from ..errors import NumericalError
from ..memory import by_the_page, peak_bytes
from ..operators import GramOperator
from .base import (
    RIDGES,
    DirectSolver,
    Progress,
    Solution,
    Status,
    check_ridges,
    check_targets,
    extreme_eigenvalues,
    final_status,
    left_out,
    lost_in_rounding,
    not_positive_definite,
    refine,
    require_finite,
    rounding_level,
    unwatched,
)
from .blocked_factor import factor_in_place
from .checkpoints import Checkpoints

PANEL = 256
"""Columns copied or summed at a time: two such square blocks stay in the cache."""

EXACT_DIMENSION = 2000
"""Up to this many samples the effective dimension is exact; beyond, it is estimated unless LOO needs R_ii."""

PROBES = 32

ESTIMATED = f"effective dimension estimated with {PROBES} random probes"


@dataclass
class CholeskyState:
    """The matrix and, in the same array, the factor for one ridge at a time.

    operator: the stored matrix; None where it was made in memory.
    matrix: (n, n) Fortran order. On and below the diagonal it holds a lower factor of ``K + factored * I``;
    ``factored`` is None while there is none. Strictly above it holds K where that was made in memory, and else
    nothing, nor has it memory there but close to the diagonal.
    diagonal: (n,) of K, in the matrix's dtype.
    pivots: of the symmetric indefinite factor where Cholesky failed by rounding, else None.
    read: whether what is on and below the diagonal is K, just read.
    load_seconds: of reading it first, which all ridges share; factor_seconds: of the factor that is there, until the
    solution that it is for counts them.
    """

    operator: GramOperator | None
    ridges: tuple[float, ...]
    shifts: tuple[float, ...]
    jitter: float
    matrix: np.ndarray
    diagonal: np.ndarray
    load_seconds: float
    factored: float | None = None
    pivots: np.ndarray | None = None
    read: bool = False
    factor_seconds: float = 0.0

    @property
    def n(self) -> int:
        return len(self.diagonal)

    def apply(self, V: np.ndarray, shift: float) -> np.ndarray:
        """(K + shift I) V in float64, for V (n, t)."""
        product = _multiply(self, V, lower=False) if self.operator is None else self.operator.matmul(V)
        return product + shift * V


@dataclass(frozen=True)
class Cholesky(DirectSolver):
    """Cholesky's factor in place, once per ridge, in the memory of one triangle.

    The stored matrix is read again for every ridge, which takes little beside a factor; residuals are of the stored
    matrix, in float64. Pass all targets in one call: of several ridges only the last one's factor is kept.
    """

    def factor(self, K: GramOperator, ridges: Sequence[float]) -> CholeskyState:
        """Read the matrix and factor it for the first ridge.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
            NumericalError: not positive definite at the first ridge beyond rounding, or not finite.
        """
        values = check_ridges(ridges)
        started = perf_counter()
        matrix = K.dense(out=by_the_page(K.shape, self.dtype), triangle="lower")
        diagonal = matrix.diagonal().copy()
        shifts, jitter = self.shifts(values, diagonal.astype(np.float64))
        loaded = perf_counter()
        state = CholeskyState(K, values, shifts, jitter, matrix, diagonal, loaded - started, read=True)
        self._factor(state, values[0], shifts[0])
        state.factor_seconds = perf_counter() - loaded
        return state

    def solve(
        self, state: CholeskyState, Y: ArrayLike, progress: Progress = unwatched
    ) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets.

        Raises:
            DataError: targets of another shape, or not finite.
            NumericalError: not positive definite at some ridge beyond rounding.
        """
        targets = check_targets(Y, state.n)
        site = None if state.operator is None else state.operator.site
        kept = Checkpoints(None if site is None else site.folder)
        solutions: list[Solution] = []
        for ridge, shift in zip(state.ridges, state.shifts, strict=True):
            progress(len(solutions), len(state.ridges), RIDGES)
            solutions.append(self.solve_one(state, ridge, shift, targets))
            kept.save(solutions[-1])
        progress(len(solutions), len(state.ridges), RIDGES)
        return tuple(solutions)

    def solve_one(self, state: CholeskyState, ridge: float, shift: float, Y: np.ndarray) -> Solution:
        """The solution at one ridge, of which ``shift`` is what it adds to the diagonal, for (n, t) targets."""
        started = perf_counter()
        if state.factored != shift:
            self._factor(state, ridge, shift)
        factor_seconds, state.factor_seconds = state.factor_seconds, 0.0
        alpha, residual, iterations = refine(
            lambda V: _back_substitute(state, V), lambda V: state.apply(V, shift), Y
        )
        require_finite(alpha, ridge)
        status = final_status(residual, indefinite=state.pivots is not None)
        notes = self.notes(state.jitter, residual, self.dtype)
        loo: np.ndarray | None = None
        dimension: float | None = None
        if state.pivots is not None:
            notes.append(
                "Cholesky failed by rounding; a symmetric indefinite factor was used, which gives neither "
                "leave-one-out predictions nor the effective dimension; a larger ridge is safer"
            )
        elif status is Status.INACCURATE:
            notes.append(self.inaccurate_note)
        elif self.loo or state.n <= EXACT_DIMENSION:
            inverse_diagonal = _inverse_diagonal(state)
            dimension = state.n - shift * float(inverse_diagonal.sum())
            if self.loo:
                loo = left_out(Y, alpha, inverse_diagonal, state.diagonal)
                if self.dtype == "float32":
                    notes.append("leave-one-out uses a float32 factor; confirm close calls in float64")
        else:
            dimension = state.n - shift * _estimate_inverse_trace(state)
            notes.append(ESTIMATED)
        return Solution(
            alpha=alpha,
            ridge=ridge,
            shift=shift,
            status=status,
            residual=residual,
            iterations=iterations,
            effective_dimension=dimension,
            seconds=perf_counter() - started + factor_seconds + state.load_seconds / len(state.ridges),
            peak_bytes=peak_bytes(),
            loo=loo,
            jitter=state.jitter,
            notes=tuple(notes),
        )

    def _factor(self, state: CholeskyState, ridge: float, shift: float) -> None:
        state.factored, state.pivots = None, None  # before reading, which may fail half way
        _restore(state, shift)
        if order := factor_in_place(state.matrix):
            _restore(state, shift)
            level = self._require_rounding(state, ridge, shift, order - 1)
            (sytrf,) = get_lapack_funcs(("sytrf",), (state.matrix,))
            _, state.pivots, singular = sytrf(state.matrix, lower=1, lwork=64 * state.n, overwrite_a=1)
            if singular:
                message = lost_in_rounding(
                    ridge=ridge,
                    shift=shift,
                    level=level,
                    unit=1 if self.absolute else state.n,
                    single=np.dtype(np.float32) in _dtypes(state),
                    failed=f"{_pivot(state, order - 1)} is zero",
                )
                raise NumericalError(message)
        state.factored = shift

    def _require_rounding(self, state: CholeskyState, ridge: float, shift: float, position: int) -> float:
        """How far rounding may push an eigenvalue; raise NumericalError unless it explains why Cholesky failed.

        state: with K below its diagonal. position: of the pivot that is not positive.
        """
        dtypes = _dtypes(state)
        level = rounding_level(state.n, dtypes, float(np.abs(state.diagonal).max()))
        smallest, largest = extreme_eigenvalues(
            lambda v: _multiply(state, v[:, None], lower=True)[:, 0], state.n, tolerance=level / 10
        )
        if not smallest >= -level:
            raise not_positive_definite(
                ridge=ridge,
                shift=shift,
                smallest=smallest,
                largest=largest,
                unit=1 if self.absolute else state.n,
                single=np.dtype(np.float32) in dtypes,
                failed=_pivot(state, position),
            )
        return level


def _dtypes(state: CholeskyState) -> tuple[np.dtype, np.dtype]:
    """What K was rounded to: as it is stored, and in memory."""
    made = state.matrix.dtype
    return (made if state.operator is None else state.operator.dtype), made


def _pivot(state: CholeskyState, position: int) -> str:
    """A pivot by its row: of the pool where K is one between its samples."""
    if state.operator is None:
        return f"the pivot of row {position}"
    return f"the pivot of training row {state.operator.rows[position]}"


def _panels(n: int) -> Iterator[slice]:
    for start in range(0, n, PANEL):
        yield slice(start, min(start + PANEL, n))


def _restore(state: CholeskyState, shift: float) -> None:
    """Put ``K + shift I`` back on and below the diagonal, from K above it, or as it is stored."""
    matrix = state.matrix
    if state.operator is None:
        for columns in _panels(state.n):
            corner = np.triu(matrix[columns, columns], 1)
            matrix[columns, columns] = corner + corner.T
            for rows in _panels(columns.start):
                matrix[columns, rows] = matrix[rows, columns].T
    elif not state.read:
        state.operator.dense(out=matrix, triangle="lower")
    state.read = False
    np.einsum("ii->i", matrix)[:] = state.diagonal + state.diagonal.dtype.type(shift)


def _multiply(state: CholeskyState, V: np.ndarray, *, lower: bool) -> np.ndarray:
    """K V in the matrix's dtype, for V (n, t), from the triangle where K is; float64 out."""
    symm, symv = get_blas_funcs(("symm", "symv"), (state.matrix,))
    diagonal = np.einsum("ii->i", state.matrix)
    there = diagonal.copy()
    diagonal[:] = state.diagonal
    if V.shape[1] == 1:  # symm would pack the whole matrix for one column
        product = symv(1.0, state.matrix, V[:, 0], lower=lower)[:, None]
    else:
        product = symm(1.0, state.matrix, V, lower=lower)
    diagonal[:] = there
    return product.astype(np.float64, copy=False)


def _back_substitute(state: CholeskyState, V: np.ndarray) -> np.ndarray:
    """(K + shift I)^-1 V through the factor, in the factor's dtype; float64 out."""
    potrs, sytrs = get_lapack_funcs(("potrs", "sytrs"), (state.matrix,))
    if state.pivots is None:
        x, _ = potrs(state.matrix, V, lower=1)
    else:
        x, _ = sytrs(state.matrix, state.pivots, V, lower=1)
    return x.astype(np.float64, copy=False)


def _inverse_diagonal(state: CholeskyState) -> np.ndarray:
    """(n,) float64 diagonal R_ii of (K + shift I)^-1; inverts the factor in place, so it is spent."""
    (trtri,) = get_lapack_funcs(("trtri",), (state.matrix,))
    trtri(state.matrix, lower=1, overwrite_c=1)
    state.factored = None
    out = np.empty(state.n)
    for columns in _panels(state.n):
        corner = np.tril(state.matrix[columns, columns])
        below = state.matrix[columns.stop :, columns]
        out[columns] = np.einsum("ij,ij->j", corner, corner, dtype=np.float64)
        out[columns] += np.einsum("ij,ij->j", below, below, dtype=np.float64)
    return out


def _estimate_inverse_trace(state: CholeskyState) -> float:
    """tr (K + shift I)^-1 as the mean of |L^-1 z|^2 over random signs z (Hutchinson)."""
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(state.n, PROBES))
    (trtrs,) = get_lapack_funcs(("trtrs",), (state.matrix,))
    half, _ = trtrs(state.matrix, np.asfortranarray(signs, state.matrix.dtype), lower=1, overwrite_b=1)
    return float(np.square(half, dtype=np.float64).sum()) / PROBES
