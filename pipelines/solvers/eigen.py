"""One eigendecomposition for a whole path of ridges, with exact leave-one-out (SPEC R4, R5, R9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh

from ..errors import ExperimentError, NumericalError
from ..operators import GramOperator
from .base import (
    DirectSolver,
    Solution,
    check_ridges,
    check_targets,
    final_status,
    not_positive_definite,
    peak_resident_bytes,
    quality_notes,
    require_finite,
    rounding_level,
)

PANEL = 256
"""Eigenvectors squared at a time, so that Q * Q is never held."""


@dataclass(frozen=True)
class EigenState:
    """K = Q diag(values) Q^T.

    values: (n,) float64 ascending, those below zero by rounding set to zero; vectors: (n, n) float64.
    """

    operator: GramOperator
    ridges: tuple[float, ...]
    shifts: tuple[float, ...]
    jitter: float
    values: np.ndarray
    vectors: np.ndarray
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Eigen(DirectSolver):
    """LAPACK's symmetric eigendecomposition, once, in float64; two matrices of memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "float64":
            raise ExperimentError(
                'solve.method = "eigen" works in float64 alone; set solve.dtype = "float64" or use cholesky'
            )

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
            raise NumericalError(f"the eigendecomposition of K failed ({error}); verify the store") from None
        if not np.isfinite(spectrum).all():
            raise NumericalError("K has eigenvalues that are not finite; verify the store")
        level = rounding_level(K.n, (K.dtype,), float(np.abs(diagonal).max()))
        smallest, largest = float(spectrum[0]), float(spectrum[-1])
        at = int(np.argmin(shifts))
        if smallest < -level and smallest + shifts[at] <= 0:
            raise not_positive_definite(
                ridge=values[at],
                shift=shifts[at],
                smallest=smallest,
                largest=largest,
                unit=1 if self.absolute else K.n,
                single=K.dtype == np.float32,
            )
        notes = list(self.jitter_notes(jitter))
        if smallest < -level:
            notes.append(f"K is not positive semi-definite: its smallest eigenvalue is {smallest:.3g}")
        spectrum[(spectrum < 0) & (spectrum >= -level)] = 0.0
        return EigenState(
            K, values, shifts, jitter, spectrum, vectors, perf_counter() - started, tuple(notes)
        )

    def solve(self, state: EigenState, Y: ArrayLike) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets; residuals take one pass over the stored tiles.

        Raises:
            DataError: targets of another shape, or not finite.
        """
        started = perf_counter()
        n = len(state.values)
        targets = check_targets(Y, n)
        weights = 1.0 / (state.values[:, None] + np.asarray(state.shifts))
        coordinates = state.vectors.T @ targets
        alphas = np.stack([state.vectors @ (w[:, None] * coordinates) for w in weights.T])
        for ridge, alpha in zip(state.ridges, alphas, strict=True):
            require_finite(alpha, ridge)
        residuals = self._residuals(state, alphas, targets)
        inverse_diagonals = _inverse_diagonals(state.vectors, weights) if self.loo else None
        dimensions = state.values @ weights
        loos = None if inverse_diagonals is None else targets - alphas / inverse_diagonals.T[:, :, None]
        seconds = (state.seconds + perf_counter() - started) / len(state.ridges)
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
                peak_bytes=peak_resident_bytes(),
                loo=None if loos is None else loos[k],
                jitter=state.jitter,
                notes=(*state.notes, *quality_notes(residuals[k])),
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


def _inverse_diagonals(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, r) values R_ii = sum_j Q_ij^2 weights_jr, one column per ridge."""
    out = np.zeros((len(vectors), weights.shape[1]))
    for start in range(0, len(vectors), PANEL):
        part = slice(start, start + PANEL)
        out += np.square(vectors[:, part]) @ weights[part]
    return out
