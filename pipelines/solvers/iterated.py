"""What the iterative solvers share: options, resuming, the solved ridges they keep, and why one did not converge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import ExperimentError
from ..operators import Symmetric
from .base import Progress, Solution, Status, check_ridges, shifts
from .checkpoints import Checkpoints
from .iterations import ENDED, MEASURING, State, Systems, iterate

PROBES = 4
"""Random right-hand sides that are solved along for the effective dimension."""

PROBE_TOLERANCE = 1e-3
"""Their relative residual: the error that it makes in z^T A^-1 z is about its square."""

PROBE_ERROR = 1e-3
"""The relative error of what they tell, where a bound is known that allows for a larger residual: their number alone
makes it larger."""

SYSTEM_ARRAYS = 7
"""(ridges * columns, n) float64 arrays at the peak: three of the state, directions, products, two of scratch."""

STATE_FILE = "iterations.npz"

Finish = Callable[[State, int], Solution]
"""The solution of group k of an iteration that has ended there."""


@dataclass(frozen=True)
class Iterative:
    """Options that the iterative solvers share.

    tolerance: relative residual (Frobenius over the targets) at which a ridge is solved. max_iterations: of a ridge;
    where it is raised, what ended for want of them goes on. seed: of everything that is drawn. checkpoint_seconds:
    between saves of the iteration; one is also made when a ridge ends. jitter, absolute: as in ``DirectSolver``.
    """

    tolerance: float = 1e-6
    max_iterations: int = field(default=1000, repr=False)
    seed: int = 0
    checkpoint_seconds: float = field(default=180.0, repr=False)
    jitter: float = 0.0
    absolute: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ExperimentError(f"solve.tolerance must be between 0 and 1, got {self.tolerance}")
        if self.max_iterations < 1:
            raise ExperimentError(f"solve.max_iterations must be at least 1, got {self.max_iterations}")
        if not (np.isfinite(self.jitter) and self.jitter >= 0):
            raise ExperimentError(f"solve.jitter must be finite and not negative, got {self.jitter}")

    @property
    def kept_by_list(self) -> bool:
        """As of ``Keeping``: ridges share products and a preconditioner, and one state is kept of all."""
        return True

    def begin(
        self, K: Symmetric, ridges: Sequence[float]
    ) -> tuple[tuple[float, ...], np.ndarray, tuple[float, ...], float]:
        """The ridges, checked; K's diagonal; what each adds to it in all; the part of it that is jitter.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive.
        """
        values, diagonal = check_ridges(ridges), K.diag()
        added, jitter = shifts(values, diagonal, self.jitter, self.absolute)
        return values, diagonal, added, jitter

    def status(self, residual: float) -> Status:
        return Status.SOLVED if residual <= self.tolerance else Status.NOT_CONVERGED

    def tolerances(self, targets: int) -> np.ndarray:
        """(targets + PROBES,) relative residuals that the systems of a ridge are solved to."""
        probes = np.full(PROBES, max(PROBE_TOLERANCE, self.tolerance))
        return np.concatenate((np.full(targets, self.tolerance), probes))

    def signs(self, n: int) -> np.ndarray:
        """(PROBES, n) random signs (Hutchinson)."""
        return np.random.default_rng(self.seed).choice((-1.0, 1.0), size=(PROBES, n))

    def inputs(self, *parts: np.ndarray | str) -> str:
        """Names the checkpoints of a solve, given all that it depends on beside these options."""
        return digest(*parts, str((self.tolerance, self.seed)))

    def why_not(self, state: State, group: int, advice: str) -> tuple[str, ...]:
        """Why a ridge ended above the residual asked for, if it did; advice: what else would help,
        or nothing."""
        if state.residual[group] <= self.tolerance:
            return ()
        reached = f"the relative residual {state.residual[group]:.1e} is above {self.tolerance:g}: "
        if state.curvature[group] <= 0:
            return (
                f"{reached}the matrix is not positive definite (a direction of curvature "
                f"{state.curvature[group]:.2g} was met); take a larger ridge, or store the matrix in float64",
            )
        if state.iterations[group] >= self.max_iterations:
            ways = ", ".join(filter(None, ("raise solve.max_iterations", advice, "or take a larger ridge")))
            return (f"{reached}{self.max_iterations} iterations were done; {ways}",)
        return (f"{reached}rounding lets it fall no further; take a larger ridge or solve.tolerance",)

    def solve_path(
        self,
        systems: Systems,
        ridges: Sequence[float],
        folder: Path | None,
        finish: Finish,
        progress: Progress,
    ) -> tuple[Solution, ...]:
        """Iterate, one group a ridge, from where ``folder`` says that an earlier start was.

        folder: of these inputs alone; None keeps nothing.
        """
        kept = Checkpoints(folder)
        path = folder / STATE_FILE if folder is not None else None
        stored = State.load(path, systems) if path is not None else None
        damaged = stored is None and path is not None and path.exists()
        state = State.of(systems) if stored is None else stored
        found = _solved_before(systems, state, stored is not None, kept, ridges, self.max_iterations)

        def ended(group: int) -> None:
            solution = finish(state, group)
            kept.save(solution)
            found[group] = kept.told(solution)

        def keep() -> None:
            if path is not None:
                state.save(path)

        iterate(
            systems,
            state,
            limit=self.max_iterations,
            ended=ended,
            keep=keep,
            every_seconds=self.checkpoint_seconds,
            progress=progress,
            names=[f"{ridge:g}" for ridge in ridges],
        )
        note = ("a checkpoint was damaged: ridges not yet solved were begun anew",) if damaged else ()
        return tuple(_with_notes(found[k], note) for k in range(len(ridges)))


def _solved_before(
    systems: Systems, state: State, resumed: bool, kept: Checkpoints, ridges: Sequence[float], limit: int
) -> dict[int, Solution]:
    """Solutions that were kept, and the state told of them; those that may have more iterations go on.

    A ridge whose solution was kept just before the death of a process, and its state not yet, is solved to its end
    again: it shares products with the others, whose last bits would change without it.
    """
    found: dict[int, Solution] = {}
    systems_of_one = len(state.live) // len(ridges)
    for group, ridge in enumerate(ridges):
        if resumed and state.phase[group] != ENDED:
            continue
        if resumed and state.reopen(systems, group, limit):
            kept.drop(ridge)
            continue
        solution = kept.load(ridge)
        if solution is not None:
            found[group] = solution
            state.phase[group] = ENDED
            first, t = group * systems_of_one, solution.alpha.shape[1]
            state.X[first : first + t] = solution.alpha.T
            state.residual[group], state.iterations[group] = solution.residual, solution.iterations
            state.live[group * systems_of_one : (group + 1) * systems_of_one] = False
        elif resumed:  # the iterate is there
            state.phase[group] = MEASURING
    return found


def _with_notes(solution: Solution, notes: tuple[str, ...]) -> Solution:
    return replace(solution, notes=(*solution.notes, *notes)) if notes else solution


def digest(*parts: np.ndarray | str) -> str:
    """Of arrays and words, short."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(str((part.shape, part.dtype.str)).encode())
            sha.update(np.ascontiguousarray(part).data)
        else:
            sha.update(part.encode())
    return sha.hexdigest()[:16]
