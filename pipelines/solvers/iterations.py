"""Conjugate gradients for many systems at once, which go on after a kill with the same bits (SPEC R6, R7).

All systems share one product with the operator in each iteration. Those of one ridge form a group: it ends when its
residual, measured on the operator and not taken from the recursion, is small enough, or when nothing more helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter

import numpy as np

from ..archives import load_arrays, save_arrays
from ..wording import ITERATIONS
from .base import Progress

ITERATING, MEASURING, ENDED = range(3)
"""Phases of a group. What it measures rides along in the product of the others' next iteration."""

Apply = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(V (k, n), groups (k,)) -> (k, n): row i multiplied by what belongs to group ``groups[i]``."""


@dataclass(frozen=True)
class Systems:
    """Symmetric positive definite systems A_g x = b, c of them in each of r groups.

    apply: A. precondition: an approximate inverse of A, itself symmetric positive definite, as ``apply``. right:
    (r, c, n) float64 right-hand sides; may be a broadcast view. tolerances: (c,) relative residuals that are asked
    for. measured: the first so many of the c systems are what a group's measured residual is about; the others are
    probes. enough: (group, b^T x of a probe) -> the squared residual at which b^T A^-1 b is known well enough, where
    that is more than its tolerance asks for.
    """

    apply: Apply
    precondition: Apply
    right: np.ndarray
    tolerances: np.ndarray
    measured: int
    enough: Callable[[int, float], float] = lambda group, product: 0.0

    @property
    def tolerance(self) -> float:
        """The relative Frobenius residual at which a group is solved."""
        return float(self.tolerances[: self.measured].min())

    def probe_rows(self, group: int) -> slice:
        """Rows of the state with what a group solves beside the measured systems."""
        c = self.right.shape[1]
        return slice(group * c + self.measured, (group + 1) * c)

    def unsolved(self, state: State, rows: slice) -> np.ndarray:
        """Which of these rows have recursive residuals above what is asked for."""
        r, c, _ = self.right.shape
        bounds = [self.bound(state, k) for k in range(r * c)[rows]]
        return _lengths(state.R[rows]) > bounds

    def bound(self, state: State, row: int) -> float:
        """The recursive residual at which a row is solved."""
        group, column = divmod(row, self.right.shape[1])
        b = self.right[group, column]
        bound = float(self.tolerances[column] * np.linalg.norm(b))
        if column < self.measured:
            return bound
        return max(bound, math.sqrt(max(self.enough(group, float(b @ state.X[row])), 0.0)))

    def solved(self, state: State, rows: slice) -> bool:
        """Whether the recursive residuals of these rows are as small as asked for."""
        return not self.unsolved(state, rows).any()


@dataclass
class State:
    """Where an iteration is; everything that the next one depends on.

    X, R, P: (r * c, n) float64 iterates, residuals and directions, one system a row, group by group. rz: (r * c,)
    of R and the preconditioned R. live: (r * c,) bool, systems that iterate. phase: (r,) of each group.
    iterations: (r,) done. residual: (r,) last measured, infinite before. curvature: (r,) 1, or the Rayleigh quotient
    of a direction in which A is not positive. seconds: (r,) shares of the time.
    """

    X: np.ndarray
    R: np.ndarray
    P: np.ndarray
    rz: np.ndarray
    live: np.ndarray
    phase: np.ndarray
    iterations: np.ndarray
    residual: np.ndarray
    curvature: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, systems: Systems) -> State:
        """Before the first iteration, from zero."""
        r, c, n = systems.right.shape
        R = systems.right.reshape(r * c, n).copy()
        return cls(
            np.zeros((r * c, n)),
            R,
            np.zeros((r * c, n)),
            np.zeros(r * c),
            _lengths(R) > 0,
            np.full(r, ITERATING),
            np.zeros(r, np.int64),
            np.full(r, np.inf),
            np.ones(r),
            np.zeros(r),
        )

    def reopen(self, systems: Systems, group: int, limit: int) -> bool:
        """Let a group that had ended for want of iterations go on with them, up to ``limit``; whether it does."""
        if self.iterations[group] >= limit or self.curvature[group] <= 0:
            return False
        c = systems.right.shape[1]
        rows = slice(group * c, (group + 1) * c)
        left = systems.unsolved(self, rows)
        if self.residual[group] <= systems.tolerance or not left[: systems.measured].any():
            return False  # solved, or rounding ended it
        self.live[rows] = left
        self.phase[group], self.residual[group] = ITERATING, np.inf
        return True

    def save(self, path: Path) -> None:
        """Keep it under ``path``, in place of an earlier one; durable when this returns.

        Raises:
            DiskFull: no space is left.
        """
        save_arrays(path, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path, systems: Systems) -> State | None:
        """What ``save`` kept; None where it is damaged or of systems of another shape."""
        arrays = load_arrays(path, [f.name for f in fields(cls)])
        if arrays is None:
            return None
        r, c, n = systems.right.shape
        fits = arrays["X"].shape == (r * c, n) and arrays["phase"].shape == (r,)
        return cls(**arrays) if fits else None


def iterate(
    systems: Systems,
    state: State,
    *,
    limit: int,
    ended: Callable[[int], None],
    keep: Callable[[], None],
    every_seconds: float,
    progress: Progress,
    names: Sequence[str],
) -> None:
    """Iterate until every group has ended; ``state`` is changed in place.

    limit: iterations of a group. ended: called with the number of a group that ended. keep: called after that, and
    every so many seconds, to save the state. names: of the groups, for the progress.
    """
    kept = perf_counter()
    while (state.phase != ENDED).any():
        before = state.phase.copy()
        started = perf_counter()
        _step(systems, state, limit)
        taking_part = before != ENDED
        state.seconds[taking_part] += (perf_counter() - started) / taking_part.sum()
        just_ended = np.flatnonzero((state.phase == ENDED) & (before != ENDED))
        for group in just_ended.tolist():
            ended(group)
        if just_ended.size or perf_counter() - kept >= every_seconds:
            keep()
            kept = perf_counter()
        progress(int(state.iterations.max()), limit, _message(systems, state, names))


def _message(systems: Systems, state: State, names: Sequence[str]) -> str:
    """The largest recursive residual of a group that goes on."""
    r = len(systems.right)
    going = np.flatnonzero(state.phase != ENDED)
    if not going.size:
        return f"{ITERATIONS}, all {r} ridges ended"
    errors = [_recursive(systems, state, group) for group in going.tolist()]
    worst = int(np.argmax(errors))
    return f"{ITERATIONS}, relative residual {errors[worst]:.1e} at ridge {names[going[worst]]}"


def _step(systems: Systems, state: State, limit: int) -> None:
    """One product for all: an iteration of the live systems, and the residuals of groups that measure."""
    c = systems.right.shape[1]
    fresh = np.flatnonzero(state.live & (state.rz == 0))
    if fresh.size:
        _restart(systems, state, fresh)
    live = np.flatnonzero(state.live)
    measuring = np.flatnonzero(state.phase == MEASURING)
    columns = np.arange(systems.measured)
    read_out = (measuring[:, None] * c + columns).ravel()
    if not live.size and not read_out.size:  # right-hand sides that are zero
        state.phase[state.phase == ITERATING] = MEASURING
        return
    directions = np.concatenate((state.P[live], state.X[read_out]))
    products = systems.apply(directions, np.concatenate((live, read_out)) // c)
    del directions
    for place, group in enumerate(measuring.tolist()):
        start = len(live) + place * systems.measured
        _measure(systems, state, group, products[start : start + systems.measured], limit)
    _advance(systems, state, live, products)
    state.iterations[np.unique(live // c)] += 1
    for group in np.flatnonzero(state.phase == ITERATING).tolist():
        rows = slice(group * c, (group + 1) * c)
        if state.iterations[group] >= limit or state.curvature[group] <= 0 or _enough(systems, state, group):
            state.live[rows] = False
        if not state.live[rows].any():
            state.phase[group] = MEASURING


def _enough(systems: Systems, state: State, group: int) -> bool:
    """Whether the recursive residuals of a group are what is asked for: together, though one alone may be larger."""
    if state.live[systems.probe_rows(group)].any():
        return False
    return _recursive(systems, state, group) <= systems.tolerance


def _recursive(systems: Systems, state: State, group: int) -> float:
    """The relative Frobenius residual of a group's measured systems, by the recursion."""
    first = group * systems.right.shape[1]
    scale = float(np.linalg.norm(systems.right[group, : systems.measured])) or 1.0
    return float(np.linalg.norm(_lengths(state.R[first : first + systems.measured]))) / scale


def _restart(systems: Systems, state: State, rows: np.ndarray) -> None:
    """First directions, from the residuals as they are."""
    state.P[rows] = systems.precondition(state.R[rows], rows // systems.right.shape[1])
    for k in rows:
        state.rz[k] = state.R[k] @ state.P[k]


def _advance(systems: Systems, state: State, live: np.ndarray, products: np.ndarray) -> None:
    """One iteration of each live system, given the operator's products with their directions."""
    c = systems.right.shape[1]
    going: list[int] = []
    for k, q in zip(live.tolist(), products, strict=False):
        length = float(state.P[k] @ q)
        if not length > 0:  # also where it is not a number
            group = k // c
            quotient = length / float(state.P[k] @ state.P[k])
            state.curvature[group] = min(state.curvature[group], quotient if quotient <= 0 else 0.0)
            state.live[k] = False
            continue
        step = float(state.rz[k]) / length
        state.X[k] += step * state.P[k]
        state.R[k] -= step * q
        if float(np.linalg.norm(state.R[k])) <= systems.bound(state, k):
            state.live[k] = False
        else:
            going.append(k)
    if not going:
        return
    rows = np.array(going)
    Z = systems.precondition(state.R[rows], rows // c)
    for k, z in zip(going, Z, strict=True):
        rz = float(state.R[k] @ z)
        state.P[k] *= rz / float(state.rz[k])
        state.P[k] += z
        state.rz[k] = rz


def _measure(systems: Systems, state: State, group: int, products: np.ndarray, limit: int) -> None:
    """End a group by its true residual; where that is too large but still falling, go on from it."""
    c = systems.right.shape[1]
    right = systems.right[group, : systems.measured]
    remainder = right - products
    scale = float(np.linalg.norm(right))
    residual = float(np.linalg.norm(remainder)) / scale if scale else 0.0
    # As in refinement: what does not halve the residual has met rounding.
    falling = residual <= state.residual[group] / 2
    state.residual[group] = residual
    stopped = state.iterations[group] >= limit or state.curvature[group] <= 0
    if residual <= systems.tolerance or stopped or not falling:
        state.phase[group] = ENDED
        return
    rows = np.arange(group * c, group * c + systems.measured)
    state.R[rows] = remainder
    state.live[rows] = _lengths(remainder) > systems.tolerance * _lengths(right)
    state.rz[rows] = 0.0  # asks for first directions
    state.phase[group] = ITERATING


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.array([float(np.linalg.norm(row)) for row in rows])
