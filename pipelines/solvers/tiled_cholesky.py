"""Direct solve by a Cholesky factor in tiles on disk, made by many workers: memory does not grow with the matrix
(SPEC R1, R3, R5, R9)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from .. import leases
from ..errors import ExperimentError, NumericalError
from ..memory import WORKER_BASE_BYTES, peak_bytes
from ..operators import GramOperator
from ..site import Site
from ..stores import FactorStore, remove_store
from .base import (
    ACCURATE,
    RIDGES,
    DirectSolver,
    Progress,
    Solution,
    Status,
    check_ridges,
    check_targets,
    final_status,
    left_out,
    refine,
    require_finite,
    rounding_level,
    unwatched,
)
from .checkpoints import Checkpoints
from .cholesky import ESTIMATED, PROBES
from .factor_order import BEGUN
from .precision import DOUBLE, SINGLE, Precision
from .substitution import substitute
from .tiled_factor import FactorJob, complete, mending, release, release_all

ESTIMATED_LOO = f"leave-one-out estimated with {PROBES} random probes"


@dataclass
class TiledState:
    """What a path of ridges shares."""

    operator: GramOperator
    site: Site
    ridges: tuple[float, ...]
    shifts: tuple[float, ...]
    jitter: float
    diagonal: np.ndarray
    rows: Path
    precision: Precision
    peak: int = 0
    factors: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class TiledCholesky(DirectSolver):
    """A left-looking Cholesky factor in tiles of ``side``, once per ridge, under ``factors/`` of the root.

    A tile of the factor is written once, whole; whatever dies, the next start makes those that are missing, with
    the same bits on any number of workers. Ridges that are solved are kept in the site's folder, and their factors
    removed. dtype: "float32" (refined to a float64 residual), "float64", or "mixed": float32, and float64 for the
    ridges where that fails or is not accurate. loo: leave-one-out predictions are estimated (``_inverse_diagonal``).

    Raises:
        ExperimentError: an option is not valid.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64", "mixed")
    side: ClassVar[int] = 2048

    def factor(self, K: GramOperator, ridges: Sequence[float]) -> TiledState:
        """Check the ridges and prepare; factors are made one at a time when their ridge is solved.

        Raises:
            ExperimentError: no ridge, or one that is not finite and positive; an operator without a site.
            ChunkLost: a tile on K's diagonal is missing or damaged.
        """
        values = check_ridges(ridges)
        if K.site is None:
            raise ExperimentError(
                "tiled-cholesky keeps its factor in files and needs a site for them; without one take cholesky"
            )
        diagonal = K.diag()
        shifts, jitter = self.shifts(values, diagonal)
        precision = Precision(K.site.folder)
        rows = K.site.save("rows", K.rows)
        return TiledState(K, K.site, values, shifts, jitter, diagonal, rows, precision)

    def solve(self, state: TiledState, Y: ArrayLike, progress: Progress = unwatched) -> tuple[Solution, ...]:
        """One solution per ridge for (n,) or (n, t) targets; large ridges first, returned in the order given.

        Raises:
            DataError: targets of another shape, or not finite.
            NumericalError: not positive definite at some ridge; a value that is not finite.
            ChunkLost: a tile of K is missing or damaged.
            DiskFull: no space is left. What is solved, and tiles of the factor, are kept in any case.
        """
        targets = check_targets(Y, state.operator.n)
        kept = Checkpoints(state.site.folder)
        found: dict[int, Solution] = {}
        worked = False
        try:
            for k in np.argsort(state.shifts, kind="stable")[::-1].tolist():
                progress(len(found), len(state.ridges), RIDGES)
                solution = kept.load(state.ridges[k])
                if solution is None:
                    worked = True
                    solution = self._solve_one(state, k, targets, progress)
                    kept.save(solution)
                    solution = kept.told(solution)
                else:  # whoever solved it may have died before its factors were gone
                    state.factors += self._left(state, k, "float32", "float64")
                self._remove_factors(state)
                found[k] = solution
            if worked:
                release_all(state.site.workers())
        finally:
            release()
        progress(len(found), len(state.ridges), RIDGES)
        return tuple(found[k] for k in range(len(state.ridges)))

    def _solve_one(self, state: TiledState, k: int, Y: np.ndarray, progress: Progress) -> Solution:
        if self.dtype != "mixed":
            return self._solve_in(self.dtype, state, k, Y, progress)
        if not state.precision.needs_double(state.ridges[k]):
            try:
                solution = self._solve_in("float32", state, k, Y, progress)
            except NumericalError:  # of K itself float64 says the same
                pass
            else:
                if solution.residual <= ACCURATE:
                    return replace(solution, notes=(*solution.notes, SINGLE))
            state.precision.single_failed(state.ridges[k])
        state.factors += self._left(state, k, "float32")
        self._remove_factors(state)
        solution = self._solve_in("float64", state, k, Y, progress)
        return replace(solution, notes=(*solution.notes, DOUBLE))

    def _solve_in(self, dtype: str, state: TiledState, k: int, Y: np.ndarray, progress: Progress) -> Solution:
        started = perf_counter()
        K, site = state.operator, state.site
        ridge, shift = state.ridges[k], state.shifts[k]
        store = FactorStore.open_or_create(*self._store_of(state, k, dtype))
        state.factors.append(store.path)
        itemsize = np.dtype(dtype).itemsize
        dtypes = (K.dtype, np.dtype(dtype))
        job = FactorJob(
            source=K.source,
            rows=state.rows,
            store=store,
            ridge=ridge,
            shift=shift,
            unit=1 if self.absolute else K.n,
            cache_bytes=cache_bytes(K.n, self.side, itemsize, site.memory_bytes),
            level=rounding_level(K.n, dtypes, float(np.abs(state.diagonal).max())),
            single=np.dtype(np.float32) in dtypes,
        )
        message = f"tiles of the {dtype} factor at ridge {ridge:g}"

        def make() -> None:
            made = complete(job, site.workers, lambda done, total: progress(done, total, message))
            state.peak = max(state.peak, made)

        def half(V: np.ndarray, transposed: bool) -> np.ndarray:
            return mending(lambda: substitute(job, V, site, transposed), make)

        with leases.Lease(store.path):
            make()
            t, rng = Y.shape[1], np.random.default_rng(0)
            first = half(np.hstack([Y, rng.choice((-1.0, 1.0), size=(K.n, PROBES))]), False)
            trace = float(np.square(first[:, t:], dtype=np.float64).sum()) / PROBES
            second = first[:, :t]
            if self.loo:
                second = np.hstack([second, rng.standard_normal((K.n, PROBES))])
            solved = half(second, True).astype(np.float64)
            alpha, residual, iterations = refine(
                lambda V: half(half(V, False), True).astype(np.float64),
                lambda V: K.matmul(V) + shift * V,
                Y,
                start=solved[:, :t],
            )
        require_finite(alpha, ridge)
        status = final_status(residual)
        notes = self.notes(state.jitter, residual, dtype)
        loo: np.ndarray | None = None
        dimension: float | None = None
        if status is Status.INACCURATE:
            notes.append(self.inaccurate_note)
        else:
            dimension = K.n - shift * trace
            notes.append(ESTIMATED)
            if self.loo:
                loo = left_out(Y, alpha, _inverse_diagonal(solved[:, t:]), state.diagonal)
                notes.append(ESTIMATED_LOO)
        return Solution(
            alpha=alpha,
            ridge=ridge,
            shift=shift,
            status=status,
            residual=residual,
            iterations=iterations,
            effective_dimension=dimension,
            seconds=perf_counter() - started,
            peak_bytes=max(state.peak, peak_bytes()),
            loo=loo,
            loo_estimated=loo is not None,
            jitter=state.jitter,
            notes=tuple(notes),
        )

    def _store_of(self, state: TiledState, k: int, dtype: str) -> tuple[Path, dict[str, Any], int, str, int]:
        """What names the store of a ridge's factor."""
        K, folder = state.operator, state.site.folder
        rows = hashlib.sha256(K.rows.tobytes()).hexdigest()
        description = {"of": folder.name, "rows": rows, "shift": state.shifts[k]}
        return folder.parents[1], description, K.n, dtype, self.side

    def _left(self, state: TiledState, k: int, *dtypes: str) -> list[Path]:
        """Stores of a ridge's factors that are there."""
        return [path for dtype in dtypes for path in FactorStore.left(*self._store_of(state, k, dtype))]

    def _remove_factors(self, state: TiledState) -> None:
        if state.site.alone:
            for path in state.factors:
                with suppress(OSError):
                    remove_store(path)
            state.factors.clear()


def _inverse_diagonal(probes: np.ndarray) -> np.ndarray:
    """(n,) R_ii of R = (K + shift I)^-1, estimated for leave-one-out predictions y - alpha / R_ii (R5).

    probes: (n, p) columns L^-T w of standard normal w. Their rows have squared lengths of R_ii times a chi-squared
    variable with p degrees of freedom: positive, with a relative error that is the same whatever R is, and a mean of
    1 / (p - 2) for the inverse. So the mean square of the errors is in the mean off by a factor of 1 + 2 / (p - 4)
    alone, the same for all ridges, and the choice among them is that of the exact R_ii but for chance.
    """
    lengths = np.einsum("ij,ij->i", probes, probes)
    return lengths / (probes.shape[1] - 2)


def operations(n: int) -> float:
    """Floating-point operations of one factor, in tiles of any side."""
    return n**3 / 3


def factor_bytes(n: int, side: int, itemsize: int) -> int:
    """Bytes on disk of one factor: its lower triangle in whole tiles, and their checksums."""
    count = -(-n // side)
    return count * (count + 1) // 2 * (side * side * itemsize + 4)


def cache_bytes(n: int, side: int, itemsize: int, memory_bytes: int) -> int:
    """Bytes of finished tiles that a worker of so much memory keeps: at most half of it, nor more than there are."""
    return min(factor_bytes(n, side, itemsize), memory_bytes // 2)


def worker_bytes(n: int, side: int, itemsize: int, cache: int, stored_bytes: int) -> int:
    """Peak memory of a worker that makes tiles of a factor, while it keeps ``cache`` bytes of finished ones.

    stored_bytes: of one tile of K as it is read. Beside them are the tiles that it has begun, the one that it
    works on, and either two finished ones that it reads, or what reading K's takes.
    """
    tile = min(side, n) ** 2 * itemsize
    count = -(-n // side)
    begun = min(BEGUN, count - 1) * tile
    return WORKER_BASE_BYTES + cache + begun + tile + 2 * max(tile, stored_bytes)


def driver_bytes(n: int, targets: int) -> int:
    """Peak memory of the driver beside its own: targets, probes and their halves, coefficients, remainders."""
    return 8 * n * (4 * (targets + PROBES) + 5 * targets)
