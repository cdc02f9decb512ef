"""Cholesky in memory in single precision, and in double for the ridges where that is not enough (SPEC R3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ..errors import NumericalError
from ..operators import GramOperator
from .base import (
    RIDGES,
    DirectSolver,
    Progress,
    Solution,
    Status,
    check_ridges,
    check_targets,
    unwatched,
)
from .checkpoints import Checkpoints
from .cholesky import Cholesky, CholeskyState
from .precision import DOUBLE, DOUBLE_LOO, SINGLE, Precision


@dataclass
class MixedState:
    """made: the matrix in the precision ``dtype`` that is used now, or None where none is read yet."""

    operator: GramOperator
    ridges: tuple[float, ...]
    precision: Precision
    made: CholeskyState | None = None
    dtype: str = ""


@dataclass(frozen=True)
class MixedCholesky(DirectSolver):
    """A float32 factor refined to a float64 residual, and a float64 one where that is not reached.

    Rounding hurts smaller ridges more: from the first that fails on, float64 is used, also by a later start of the
    same solve. Leave-one-out takes the factor's own digits, and float64 throughout.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("mixed",)

    dtype: str = "mixed"

    def factor(self, K: GramOperator, ridges: Sequence[float]) -> MixedState:
        """Check the ridges; the matrix is read when the first is solved.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
        """
        return MixedState(K, check_ridges(ridges), Precision(None if K.site is None else K.site.folder))

    def solve(self, state: MixedState, Y: ArrayLike, progress: Progress = unwatched) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets, larger ridges first, in the order given.

        Raises:
            DataError: targets of another shape, or not finite.
            NumericalError: not positive definite at some ridge beyond the rounding of float64.
        """
        targets = check_targets(Y, state.operator.n)
        site = state.operator.site
        kept = Checkpoints(None if site is None else site.folder)
        found: dict[float, Solution] = {}
        for ridge in sorted(state.ridges, reverse=True):
            progress(len(found), len(state.ridges), RIDGES)
            found[ridge] = self._solved(state, ridge, targets)
            kept.save(found[ridge])
        progress(len(found), len(state.ridges), RIDGES)
        return tuple(found[ridge] for ridge in state.ridges)

    def _solved(self, state: MixedState, ridge: float, Y: np.ndarray) -> Solution:
        if not (self.loo or state.precision.needs_double(ridge)):
            try:
                solution = self._solve_in("float32", state, ridge, Y)
            except NumericalError:
                solution = None
            if solution is not None and solution.status is Status.SOLVED:
                return replace(solution, notes=(*solution.notes, SINGLE))
            state.precision.single_failed(ridge)
        solution = self._solve_in("float64", state, ridge, Y)
        return replace(solution, notes=(*solution.notes, DOUBLE_LOO if self.loo else DOUBLE))

    def _solve_in(self, dtype: str, state: MixedState, ridge: float, Y: np.ndarray) -> Solution:
        solver = Cholesky(dtype, self.jitter, self.absolute, self.loo)
        if state.dtype != dtype:
            state.dtype, state.made = dtype, None  # one matrix in memory at a time
        if state.made is None:
            state.made = solver.factor(state.operator, (ridge, *(r for r in state.ridges if r != ridge)))
        shift = state.made.shifts[state.made.ridges.index(ridge)]
        return solver.solve_one(state.made, ridge, shift, Y)
