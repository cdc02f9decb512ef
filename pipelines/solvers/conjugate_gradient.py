"""Preconditioned conjugate gradients for all targets and all ridges together, with nothing of size n x n (SPEC R6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..memory import peak_bytes
from ..operators import Symmetric
from .base import (
    Progress,
    Solution,
    check_targets,
    jitter_notes,
    require_finite,
    unwatched,
)
from .iterated import PROBE_ERROR, PROBES, SYSTEM_ARRAYS, Iterative, digest
from .iterations import State, Systems
from .preconditioner import (
    EXPECTED,
    MEMORY,
    SKETCH_COST,
    load,
    randomised_nystrom,
    rank_within,
    save,
)


class Preconditioning(Protocol):
    """A matrix A that stands for K, and P = A + shift I, or a multiple of it."""

    def solve(self, R: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """P^-1 applied to the rows of R (k, n), row i with ``shifts[i]``."""
        ...

    def effective_dimension(self, shift: float) -> float:
        """tr A (A + shift I)^-1."""
        ...

    def quadratic_forms(self, Z: np.ndarray, shift: float) -> np.ndarray:
        """(k,) values z^T A (A + shift I)^-1 z for the rows of Z (k, n)."""
        ...

    def note(self, shift: float) -> str:
        """What a report says of it at one ridge."""
        ...


@dataclass(frozen=True)
class ConjugateGradientState:
    """What does not depend on the targets. folder: of the operator's site; inputs: a digest of what this is for.

    helps: what would spare iterations, or nothing.
    """

    operator: Symmetric
    ridges: tuple[float, ...]
    shifts: tuple[float, ...]
    jitter: float
    preconditioner: Preconditioning
    folder: Path | None
    inputs: str
    seconds: float
    helps: str = ""


@dataclass(frozen=True)
class ConjugateGradient(Iterative):
    """Conjugate gradients on (K + n*lambda*I) alpha = Y, one product with K an iteration for the whole path.

    Every ridge and target is a system with step lengths of its own, which drops out when it has converged.
    rank_bytes: memory that making the preconditioner may take; memory_bound: whether it were more if there were more.
    pass_columns: what a pass over the matrix costs beside its columns, to read it or to compute it, in columns of a
    float64 product. floor: a guess at the smallest eigenvalue of K. None of the four names a solve, and a
    preconditioner that was kept is used whatever they say now.
    """

    rank_bytes: int = field(default=2**30, repr=False)
    memory_bound: bool = field(default=True, repr=False)
    pass_columns: float = field(default=0.0, repr=False)
    floor: float = field(default=0.0, repr=False)

    def factor(self, K: Symmetric, ridges: Sequence[float]) -> ConjugateGradientState:
        """Make the preconditioner, or find it in the operator's site.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
        """
        started = perf_counter()
        values, diagonal, added, jitter = self.begin(K, ridges)
        folder = K.site.folder if K.site is not None else None
        inputs = digest(K.rows, diagonal, np.array(added), str(self.seed))
        path = folder / f"preconditioner-{inputs}.npz" if folder is not None else None
        made = load(path, K.n) if path is not None else None
        if made is None:
            made = randomised_nystrom(
                K,
                added,
                self.rank_bytes,
                self.seed,
                self.tolerance,
                self.pass_columns,
                self.floor,
                full=MEMORY if self.memory_bound else EXPECTED,
            )
            if path is not None:
                save(path, made)
        seconds = perf_counter() - started
        # An iteration goes on with the preconditioner that it was begun with.
        inputs = digest(inputs, made.values)
        helps = "give the driver more memory for its preconditioner" if made.reason == MEMORY else ""
        return ConjugateGradientState(K, values, added, jitter, made, folder, inputs, seconds, helps)

    def solve(
        self, state: ConjugateGradientState, Y: ArrayLike, progress: Progress = unwatched
    ) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets; goes on from what the operator's site holds.

        A solution's status is ``solved`` where the residual measured on the operator is at most ``tolerance``, else
        ``not converged``, and a note says why.

        Raises:
            DataError: targets of another shape, or not finite.
        """
        K, targets = state.operator, check_targets(Y, state.operator.n)
        t = targets.shape[1]
        probes = self.signs(K.n)
        right = np.concatenate((targets.T, probes))
        added = np.array(state.shifts)
        least = [state.preconditioner.effective_dimension(shift) for shift in state.shifts]
        systems = Systems(
            lambda V, groups: _times(K, V) + added[groups, None] * V,
            lambda R, groups: state.preconditioner.solve(R, added[groups]),
            np.broadcast_to(right, (len(added), *right.shape)),
            self.tolerances(t),
            t,
            # No eigenvalue of K + shift I is below the shift: the error of shift z^T x is at most |r|^2.
            lambda group, product: PROBE_ERROR * min(added[group] * product, least[group]),
        )
        inputs = self.inputs(state.inputs, targets)
        folder = state.folder / f"iterations-{inputs}" if state.folder is not None else None

        def finish(iteration: State, group: int) -> Solution:
            rows = slice(group * len(right), group * len(right) + t)
            alpha = np.ascontiguousarray(iteration.X[rows].T)
            require_finite(alpha, state.ridges[group])
            shift, residual = state.shifts[group], float(iteration.residual[group])
            return Solution(
                alpha=alpha,
                ridge=state.ridges[group],
                shift=shift,
                status=self.status(residual),
                residual=residual,
                iterations=int(iteration.iterations[group]),
                effective_dimension=_effective_dimension(state, systems, iteration, group, least[group]),
                seconds=float(iteration.seconds[group]) + state.seconds / len(state.ridges),
                peak_bytes=peak_bytes(),
                jitter=state.jitter,
                notes=(
                    *jitter_notes(state.jitter),
                    state.preconditioner.note(shift),
                    *self.why_not(iteration, group, state.helps),
                ),
            )

        return self.solve_path(systems, state.ridges, folder, finish, progress)


def _effective_dimension(
    state: ConjugateGradientState, systems: Systems, iteration: State, group: int, least: float
) -> float | None:
    """d = tr K (K + shift I)^-1 by the probes (Hutchinson); None where they were not solved. least: the
    preconditioner's own.

    Either of two matrices is probed: K (K + shift I)^-1 less the preconditioner's approximation of it, whose trace is
    known, or R = shift (K + shift I)^-1, of trace n - d. Both have eigenvalues between 0 and 1, so that the variance
    of a probe is at most twice the trace: that of the smaller trace is taken. Generalised cross-validation divides by
    n - d, and where that is small only the second knows it.
    """
    rows = systems.probe_rows(group)
    if not systems.solved(iteration, rows):
        return None
    n, shift, known = state.operator.n, state.shifts[group], state.preconditioner
    probes = systems.right[group, systems.measured :]
    left = shift * np.einsum("kn,kn->k", probes, iteration.X[rows])
    dimension = n - float(left.mean())
    if dimension - least < n - dimension:
        rest = n - left - known.quadratic_forms(probes, shift)
        dimension = least + float(rest.mean())
    return min(max(dimension, 0.0), float(n))


def _times(K: Symmetric, V: np.ndarray) -> np.ndarray:
    """K applied to the rows of V (k, n)."""
    return np.ascontiguousarray(K.matmul(V.T).T)


def driver_bytes(n: int, targets: int, ridges: int, rank_bytes: int) -> int:
    """Bytes that the driver holds at its peak: making the preconditioner, or iterating with it."""
    systems = ridges * (targets + PROBES) * n * 8
    return max(rank_bytes, SYSTEM_ARRAYS * systems + _kept_bytes(n, rank_bytes))


def checkpoint_bytes(n: int, targets: int, ridges: int, rank_bytes: int) -> int:
    """Bytes on the disk: the state (an old one beside a new one), the preconditioner, the solutions."""
    columns = ridges * (targets + PROBES)
    return (6 * columns + ridges * targets) * n * 8 + _kept_bytes(n, rank_bytes)


def _kept_bytes(n: int, rank_bytes: int) -> int:
    """Bytes of a preconditioner once it is made."""
    return max(n * rank_within(rank_bytes, n, name) * np.dtype(name).itemsize for name in SKETCH_COST)


def iteration_operations(n: int, targets: int, ridges: int, rank: int) -> float:
    """Floating-point operations of one iteration of the whole path: the product, and the preconditioner."""
    columns = ridges * (targets + PROBES)
    return columns * (2.0 * n * n + 4.0 * n * rank)
