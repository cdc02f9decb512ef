"""Nystrom ridge regression on M centres by preconditioned conjugate gradients (SPEC R7; Rudi, Carratino and Rosasco
2017: Falkon). Nothing of size n x M is held; millions of samples stream by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import get_lapack_funcs, solve_triangular

from ..errors import ExperimentError
from ..memory import peak_bytes
from ..normal import normal_product, transposed_product
from ..operators import GramOperator, cross_block
from ..recomputed import GatheredTiles, gathered
from ..strided import add_square
from ..tilesource import TileSource
from .base import (
    Progress,
    Solution,
    check_targets,
    jitter_notes,
    require_finite,
    unwatched,
)
from .blocked_factor import independent, stabilised_factor, upper_factor
from .iterated import PROBES, SYSTEM_ARRAYS, Iterative, digest
from .iterations import State, Systems


@dataclass(frozen=True)
class NystromState:
    """What does not depend on the targets.

    centres: (M,) row ids of the operator's source, an index set: f(x) = sum_m alpha_m K(x, centre_m). drawn: how many
    there were before those were left out that others stand for. source, columns: where their columns of the matrix
    come from, while the operator's site lasts. T: (M, M) upper triangular, K_MM + stabiliser I = T^T T.
    A: one (M, M) upper triangular for each ridge, A^T A = T^-T S T^-1 + lambda I, S = K_Md K_dM / d of the d drawn,
    which is K_MM^2 / M where none was left out.
    """

    operator: GramOperator
    centres: np.ndarray
    drawn: int
    source: TileSource
    columns: np.ndarray
    ridges: tuple[float, ...]
    shifts: tuple[float, ...]
    jitter: float
    T: np.ndarray
    stabiliser: float
    A: tuple[np.ndarray, ...]
    folder: Path | None
    inputs: str
    seconds: float

    def outward(self, group: int, V: np.ndarray) -> np.ndarray:
        """B V for V (M, k), with B = n^(-1/2) T^-1 A^-1."""
        half = solve_triangular(self.A[group], V, check_finite=False)
        return solve_triangular(self.T, half, check_finite=False) / np.sqrt(self.operator.n)

    def inward(self, group: int, V: np.ndarray) -> np.ndarray:
        """B^T V for V (M, k)."""
        half = solve_triangular(self.T, V, trans=1, check_finite=False)
        return solve_triangular(self.A[group], half, trans=1, check_finite=False) / np.sqrt(self.operator.n)

    def apply(self, V: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """B^T H B on the rows of V (k, M), H = K_nM^T K_nM + n lambda T^T T; one pass over K for all.

        B^T T^T T B is A^-T A^-1 / n: so it is computed, for T^-1 is large where K_MM is singular.
        """
        K, chosen = self.operator, [(int(g), groups == g) for g in np.unique(groups)]
        D = np.empty((V.shape[1], V.shape[0]))
        for group, rows in chosen:
            D[:, rows] = self.outward(group, V[rows].T)
        H = normal_product(self.source, K.rows, self.columns, D, K.site)
        out = np.empty_like(V)
        for group, rows in chosen:
            A = self.A[group]
            beside = solve_triangular(A, V[rows].T, check_finite=False)
            beside = solve_triangular(A, beside, trans=1, check_finite=False)
            out[rows] = (self.inward(group, H[:, rows]) + self.shifts[group] / K.n * beside).T
        return out


@dataclass(frozen=True)
class Nystrom(Iterative):
    """(K_nM^T K_nM + n*lambda*K_MM) alpha = K_nM^T Y, preconditioned by R7's B, for a whole path of ridges.

    K_MM stands for its factor's square, with the stabiliser on its diagonal: where K_MM is singular, as with samples
    that are zero or equal among the centres or with a kernel of low rank, the system would be too, and what rounding
    makes of it indefinite. In float64 the centres that others stand for are left out: along what the stabiliser alone
    holds up, the factor's inverse makes the rounding of products larger than small ridges bear. In float32 the
    rounding of K_MM itself asks for a stabiliser that is large enough.

    centres: how many of the training samples, drawn without replacement by ``seed``; at most all of them. Every pass
    over K_nM serves all targets and ridges.
    """

    centres: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centres < 1:
            raise ExperimentError(f"solve.centres must be at least 1, got {self.centres}")

    def factor(self, K: GramOperator, ridges: Sequence[float]) -> NystromState:
        """Draw the centres and factor the two matrices of the preconditioner.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
        """
        started = perf_counter()
        values, diagonal, added, jitter = self.begin(K, ridges)
        drawn = min(self.centres, K.n)
        chosen = np.sort(np.random.default_rng(self.seed).choice(K.n, drawn, replace=False))
        centres = K.rows[chosen]
        source, columns = gathered(K.source, centres, K.site)
        square = source.among_columns if isinstance(source, GatheredTiles) else source
        among = cross_block(square, columns, columns)
        T, stabiliser = stabilised_factor(among)
        features = T
        if np.square(T.diagonal()).min() <= 2 * stabiliser and K.dtype == np.float64:
            kept = independent(among)
            centres, columns = centres[kept], columns[kept]
            T, stabiliser = stabilised_factor(among[np.ix_(kept, kept)])
            # All that were drawn: those that are kept are the most unlike each other.
            features = solve_triangular(T, among[kept], trans=1, check_finite=False)
        inner = np.zeros((len(features), len(features)))
        add_square(inner.T, features, 1 / drawn)
        del among, features  # before there is a matrix for each ridge
        A = tuple(upper_factor(inner + shift / K.n * np.eye(len(inner))) for shift in added)
        inputs = digest(K.rows, centres, diagonal, np.array(added))
        folder = K.site.folder if K.site is not None else None
        seconds = perf_counter() - started
        return NystromState(
            K,
            centres,
            drawn,
            source,
            columns,
            values,
            added,
            jitter,
            T,
            stabiliser,
            A,
            folder,
            inputs,
            seconds,
        )

    def solve(
        self, state: NystromState, Y: ArrayLike, progress: Progress = unwatched
    ) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets; goes on from what the operator's site holds.

        A solution's ``alpha`` is (M, t), of the state's centres. Its ``residual`` is that of the preconditioned
        normal equations, |B^T (H alpha - K_nM^T Y)| / |B^T K_nM^T Y|, measured on the operator; its
        ``effective_dimension`` is that of the Nystrom approximation K_nM K_MM^-1 K_nM^T, estimated. The status is
        ``solved`` where the residual is at most ``tolerance``, else ``not converged``, and a note says why.

        Raises:
            DataError: targets of another shape, or not finite.
        """
        K, targets = state.operator, check_targets(Y, state.operator.n)
        t, M = targets.shape[1], len(state.centres)
        left = f", of which {M} stand for all" if state.drawn > M else ""
        seen = transposed_product(state.source, K.rows, state.columns, targets, K.site)
        signs = self.signs(M)
        right = np.empty((len(state.ridges), t + PROBES, M))
        for group, A in enumerate(state.A):
            right[group, :t] = state.inward(group, seen).T
            right[group, t:] = solve_triangular(A, signs.T, trans=1, check_finite=False).T
        systems = Systems(state.apply, lambda R, groups: R, right, self.tolerances(t), t)
        inputs = self.inputs(state.inputs, targets)
        folder = state.folder / f"iterations-{inputs}" if state.folder is not None else None

        def finish(iteration: State, group: int) -> Solution:
            rows = slice(group * (t + PROBES), group * (t + PROBES) + t)
            alpha = np.ascontiguousarray(state.outward(group, iteration.X[rows].T))
            require_finite(alpha, state.ridges[group])
            residual = float(iteration.residual[group])
            return Solution(
                alpha=alpha,
                ridge=state.ridges[group],
                shift=state.shifts[group],
                status=self.status(residual),
                residual=residual,
                iterations=int(iteration.iterations[group]),
                effective_dimension=_effective_dimension(state, systems, iteration, group),
                seconds=float(iteration.seconds[group]) + state.seconds / len(state.ridges),
                peak_bytes=peak_bytes(),
                jitter=state.jitter,
                notes=(
                    *jitter_notes(state.jitter),
                    f"Nystrom with {state.drawn} centres of {K.n} samples{left}; {state.stabiliser:.1e} was added to "
                    "the diagonal of K_MM",
                    *self.why_not(iteration, group, "take other solve.centres"),
                ),
            )

        return self.solve_path(systems, state.ridges, folder, finish, progress)


def _effective_dimension(state: NystromState, systems: Systems, iteration: State, group: int) -> float | None:
    """tr K_nM H^-1 K_nM^T = M - n lambda tr H^-1 T^T T, with what B^T H B differs from I by the probes (Hutchinson).

    None where the probes were not solved.
    """
    rows = systems.probe_rows(group)
    if not systems.solved(iteration, rows):
        return None
    M, ridge = len(state.centres), state.shifts[group] / state.operator.n
    probes = systems.right[group, systems.measured :]
    beyond = np.einsum("km,km->k", probes, iteration.X[rows] - probes).mean()
    (trtri,) = get_lapack_funcs(("trtri",), (state.A[group],))
    inverse, _ = trtri(state.A[group])
    return min(max(M - ridge * (float(np.square(inverse).sum()) + float(beyond)), 0.0), float(M))


def driver_bytes(centres: int, targets: int, ridges: int, n: int) -> int:
    """Bytes that the driver holds at its peak: the factors, three more matrices while they are made, and targets."""
    matrices = (ridges + 4) * centres * centres * 8
    return matrices + (SYSTEM_ARRAYS + 1) * ridges * (targets + PROBES) * centres * 8 + 3 * n * targets * 8


def iteration_operations(n: int, centres: int, targets: int, ridges: int) -> float:
    """Floating-point operations of one iteration of the whole path: K_nM twice, and six triangles or so of M."""
    return ridges * (targets + PROBES) * (4.0 * n * centres + 6.0 * centres * centres)
