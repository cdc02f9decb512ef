"""One eigendecomposition for a whole path of ridges, with exact leave-one-out (SPEC R4, R5, R9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh

from ..errors import ExperimentError, NumericalError
from ..memory import peak_bytes
from ..operators import GramOperator
from .base import (
    RIDGES,
    DirectSolver,
    Progress,
    Solution,
    check_ridges,
    check_targets,
    final_status,
    left_out,
    not_positive_definite,
    quality_notes,
    require_finite,
    rounding_level,
    unwatched,
)

PANEL = 256
"""Eigenvectors squared at a time, so that Q * Q is never held."""


@dataclass(frozen=True)
class EigenState:
    """K = Q diag(values) Q^T.

    values: (n,) float64 ascending; vectors: (n, n) float64. diagonal: (n,) of K, float64. level: how far below zero
    rounding alone may have pushed a computed eigenvalue.
    """

    operator: GramOperator
    ridges: tuple[float, ...]
    shifts: tuple[float, ...]
    jitter: float
    values: np.ndarray
    vectors: np.ndarray
    diagonal: np.ndarray
    level: float
    seconds: float
    notes: tuple[str, ...]

    def spectrum(self, shift: float) -> tuple[np.ndarray, tuple[str, ...]]:
        """(n,) eigenvalues to solve with at one ridge, and a note where they are not K's own.

        Where K + shift I is positive definite as stored, they are, so that the path equals Cholesky's
        also when float32 storage left K slightly indefinite. Elsewhere R4 clips them at zero.
        """
        if self.values[0] >= 0 or self.values[0] + shift > self.level:
            return self.values, ()
        note = f"eigenvalues below zero by rounding, the smallest {self.values[0]:.1e}, were set to zero"
        return self.values.clip(0), (note,)


@dataclass(frozen=True)
class Eigen(DirectSolver):
    """LAPACK's symmetric eigendecomposition, once for a whole path, in float64; two matrices of memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "float64":
            raise ExperimentError(
                'solve.method = "eigen" works in float64 alone; set solve.dtype = "float64" or use cholesky'
            )

    @property
    def kept_by_list(self) -> bool:
        """As of ``Keeping``: products serve all ridges at once, and their last digits depend on how many."""
        return True

    def factor(self, K: GramOperator, ridges: Sequence[float]) -> EigenState:
        """Decompose the matrix.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
            NumericalError: not positive definite at some ridge beyond rounding, or not finite.
        """
        values = check_ridges(ridges)
        started = perf_counter()
        matrix = K.dense(np.float64, triangle="upper")
        diagonal = matrix.diagonal().copy()
        shifts, jitter = self.shifts(values, diagonal)
        try:
            # evr needs one more matrix; evd is no faster here, needs two, and its work space overflows
            # LAPACK's integers beyond n = 32,766
            spectrum, vectors = eigh(matrix, lower=False, overwrite_a=True, check_finite=False, driver="evr")
        except np.linalg.LinAlgError as error:
            raise NumericalError(f"the eigendecomposition of K failed ({error}); use cholesky") from None
        top = float(np.abs(diagonal).max())
        stored, computed = (rounding_level(K.n, (dtype,), top) for dtype in (K.dtype, matrix.dtype))
        smallest, largest = float(spectrum[0]), float(spectrum[-1])
        at = int(np.argmin(shifts))
        if smallest < -stored and smallest + shifts[at] <= computed:
            raise not_positive_definite(
                ridge=values[at],
                shift=shifts[at],
                smallest=smallest,
                largest=largest,
                unit=1 if self.absolute else K.n,
                single=K.dtype == np.float32,
            )
        notes = list(self.jitter_notes(jitter))
        if smallest < -stored:
            notes.append(f"K is not positive semi-definite: its smallest eigenvalue is {smallest:.3g}")
        seconds = perf_counter() - started
        return EigenState(
            K, values, shifts, jitter, spectrum, vectors, diagonal, computed, seconds, tuple(notes)
        )

    def solve(self, state: EigenState, Y: ArrayLike, progress: Progress = unwatched) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets; residuals take one pass over the stored tiles.

        Raises:
            DataError: targets of another shape, or not finite.
        """
        started = perf_counter()
        n = len(state.values)
        targets = check_targets(Y, n)
        chosen = [state.spectrum(shift) for shift in state.shifts]
        spectra = np.stack([values for values, _ in chosen], axis=1)
        weights = 1.0 / (spectra + np.asarray(state.shifts))
        coordinates = state.vectors.T @ targets
        alphas = np.stack([state.vectors @ (w[:, None] * coordinates) for w in weights.T])
        for ridge, alpha in zip(state.ridges, alphas, strict=True):
            require_finite(alpha, ridge)
        residuals = self._residuals(state, alphas, targets)
        inverses = inverse_diagonals(state.vectors, weights) if self.loo else None
        dimensions = (spectra * weights).sum(axis=0)
        seconds = (state.seconds + perf_counter() - started) / len(state.ridges)
        progress(len(state.ridges), len(state.ridges), RIDGES)
        return tuple(
            Solution(
                alpha=alphas[k],
                ridge=ridge,
                shift=state.shifts[k],
                status=final_status(residuals[k]),
                residual=residuals[k],
                iterations=0,
                effective_dimension=float(dimensions[k]),
                seconds=seconds,
                peak_bytes=peak_bytes(),
                loo=None
                if inverses is None
                else left_out(targets, alphas[k], inverses[:, k], state.diagonal),
                jitter=state.jitter,
                notes=(*state.notes, *chosen[k][1], *quality_notes(residuals[k], self.dtype)),
            )
            for k, ridge in enumerate(state.ridges)
        )

    def _residuals(self, state: EigenState, alphas: np.ndarray, Y: np.ndarray) -> list[float]:
        scale = float(np.linalg.norm(Y))
        if scale == 0.0:
            return [0.0] * len(alphas)
        products = state.operator.matmul(alphas)
        return [
            float(np.linalg.norm(product + shift * alpha - Y)) / scale
            for product, shift, alpha in zip(products, state.shifts, alphas, strict=True)
        ]


def inverse_diagonals(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, r) values R_ii = sum_j Q_ij^2 weights_jr, one column per ridge."""
    out = np.zeros((len(vectors), weights.shape[1]))
    for start in range(0, len(vectors), PANEL):
        part = slice(start, start + PANEL)
        out += np.square(vectors[:, part]) @ weights[part]
    return out
