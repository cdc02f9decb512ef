"""Solve and evaluate: kernel ridge regression on a stored or recomputed matrix, for a whole path of ridges."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from kernels.base import digest

from . import evaluate, operators, results, solvers, tasks
from .experiment import Experiment
from .explicit.featuresource import StoredFeatures, StreamedFeatures
from .pools import Pools, fit_rows
from .recomputed import RecomputedTiles, gathered
from .site import Site
from .solvers.base import RIDGES, Keeping, Progress, Solution, unwatched
from .solvers.checkpoints import DAMAGED, Checkpoints
from .solvers.choose import IN_MEMORY
from .stores import FeatureStore, Store
from .tilesource import TileSource

REVISION = 9
"""Raised whenever a solve or an evaluation gives other numbers, so that stored results are not used again."""

SMALL = 3000
"""Below so many training samples one BLAS thread solves as fast as several, and a solve in memory is not worth
keeping or sharing out."""


@dataclass(frozen=True)
class Place:
    """Where solves work: under which root, with which workers of how many bytes each.

    use: called with the folder of each solve before it begins.
    """

    root: Path
    workers: tasks.Open
    memory_bytes: int
    use: Callable[[Path], None] = lambda folder: None


@dataclass(frozen=True)
class Solved:
    """Solutions for a path of ridges, and the rows of the pool that their coefficients belong to."""

    solutions: tuple[Solution, ...]
    rows: np.ndarray


def fit(
    experiment: Experiment,
    pools: Pools,
    gram: TileSource,
    cross: TileSource | None,
    folder: Path,
    *,
    choice: solvers.Choice,
    place: Place | None = None,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """Train, choose a ridge, score the test set once; returns the evaluation (see ``evaluate.evaluate``), with
    ``checksums`` of the arrays saved, by name (see ``results.load_array``).

    gram: the pool's matrix. cross: test set against pool, where the source has a test set of its own.
    folder: gets ``alpha.npy`` (n, t) of the final model, ``rows.npy`` (n,) its pool rows and
    ``test_scores.npy``. choice: of the solver. place: where it keeps what an interrupted solve goes on from, and
    whose workers help; without one a solver in memory works in this process alone and keeps nothing.

    Raises:
        ChunkLost: a tile is missing or damaged; computing it again mends the store.
        NumericalError: the system cannot be solved at some ridge.
    """
    with contextlib.ExitStack() as sites:
        return Fitting(experiment, pools, gram, cross, folder, choice, place, progress, sites).evaluation()


@dataclass
class Fitting:
    """One call of ``fit``. final: coefficients that the test set is scored with, and rows of the pool."""

    coefficients: ClassVar[str] = "alpha"
    """Name of the file of coefficients."""

    revision: ClassVar[int] = REVISION

    experiment: Experiment
    pools: Pools
    source: TileSource
    cross: TileSource | None
    folder: Path
    choice: solvers.Choice
    place: Place | None
    progress: Progress
    sites: contextlib.ExitStack

    def __post_init__(self) -> None:
        self.site: Site | None = None
        self.scores: np.ndarray | None = None
        self.final: tuple[np.ndarray, np.ndarray] | None = None

    def evaluation(self) -> dict[str, Any]:
        split, solve = self.pools.split, self.experiment.solve
        train = train_targets(self.pools, split.train)
        self.progress(0, len(solve.ridges), RIDGES)
        solved = self.solve(self.choice, split.train, train.matrix, solve.ridges, loo=solve.select == "loo")
        validation = None
        if split.validation is not None:
            validation = evaluate.Held(
                self.pools.y(split.validation),
                partial(self.predict, self.source, split.validation, solved.rows),
            )
        evaluation = evaluate.evaluate(
            solved.solutions,
            train,
            solve.select,
            validation=validation,
            test=self._test_on(solved.rows),
            refit=self._refit if solve.refit else None,
            fitted=self._fitted(split.train, train.matrix, solved),
        )
        if self.final is None:  # not trained again: the model is the chosen ridge's
            chosen = next(s for s in solved.solutions if s.ridge == evaluation["ridge"])
            self.final = chosen.alpha, solved.rows
        alpha, rows = self.final
        saved = {self.coefficients: alpha, "rows": rows}
        if self.scores is not None:
            saved["test_scores"] = self.scores
        checksums = {name: results.save_array(self.folder, name, values) for name, values in saved.items()}
        damaged = [
            f"ridge {entry['ridge']:g}: {DAMAGED}"
            for entry in evaluate.entries(evaluation)
            if DAMAGED in entry["notes"]
        ]
        return {**evaluation, "notes": [*evaluation["notes"], *damaged], "checksums": checksums}

    def _refit(self, ridge: float) -> evaluate.Refit:
        rows = fit_rows(self.pools.split)
        targets = train_targets(self.pools, rows)
        solved = self.solve(self.choice_of_one(), rows, targets.matrix, (ridge,), loo=False)
        (solution,) = solved.solutions
        self.final = solution.alpha, solved.rows
        (fitted,) = self._fitted(rows, targets.matrix, solved)
        return evaluate.Refit(solution, targets, self._test_on(solved.rows), fitted)

    def choice_of_one(self) -> solvers.Choice:
        """The solver for a single ridge: a factor costs less than an eigendecomposition."""
        method = "cholesky" if self.choice.method == "eigen" else self.choice.method
        return replace(self.choice, estimate=replace(self.choice.estimate, method=method))

    def _test_on(self, rows: np.ndarray) -> evaluate.Held | None:
        split = self.pools.split
        test = split.test
        if test is None:
            return None
        source = self.source if self.cross is None else self.cross

        def predict(alpha: np.ndarray) -> np.ndarray:
            scores = self.predict(source, test, rows, alpha)
            if alpha.ndim == 2:
                self.scores = scores
            return scores

        return evaluate.Held(self.pools.y(test, test=not split.test_in_pool), predict)

    def _fitted(self, rows: np.ndarray, targets: np.ndarray, solved: Solved) -> list[np.ndarray | None]:
        """For each solution (n, t) predictions on the training samples; None where it has them, or they follow."""
        elsewhere, every = solved.rows is not rows, np.arange(len(rows))
        lost = {
            k: every if elsewhere else evaluate.lost(one, targets)
            for k, one in enumerate(solved.solutions)
            if one.fitted is None
        }
        lost = {k: positions for k, positions in lost.items() if positions.size}
        fitted: list[np.ndarray | None] = [None] * len(solved.solutions)
        if lost:
            asked = np.unique(np.concatenate(list(lost.values())))
            alphas = np.stack([solved.solutions[k].alpha for k in lost])
            found = self.predict(self.source, rows[asked], solved.rows, alphas)
            for (k, positions), values in zip(lost.items(), found, strict=True):
                if len(positions) < len(rows):
                    whole = evaluate.implied(solved.solutions[k], targets)
                    whole[positions] = values[np.searchsorted(asked, positions)]
                    values = whole
                fitted[k] = values
        return fitted

    def predict(
        self, source: TileSource, rows: np.ndarray, columns: np.ndarray, alpha: np.ndarray
    ) -> np.ndarray:
        """Scores of rows of a source by coefficients (k, t) or (r, k, t) that belong to its columns."""
        source, columns = gathered(source, columns, self.site)
        return operators.predict(source, rows, columns, alpha, self.site)

    def solve(
        self,
        choice: solvers.Choice,
        rows: np.ndarray,
        targets: np.ndarray,
        ridges: tuple[float, ...],
        *,
        loo: bool,
    ) -> Solved:
        """Solutions for a path of ridges, trained on rows of the pool."""
        solver = solvers.build(self.experiment.solve, choice, seed=self.experiment.seed, loo=loo)
        in_memory, small = choice.method in IN_MEMORY, len(rows) < SMALL
        site = None if in_memory and small else self.enter_site(solver, rows, targets, ridges)
        K = operators.GramOperator(self.source, rows, site)
        with few_threads(small):
            if in_memory:
                at_once = choice.method == "eigen"
                return Solved(self._solve_kept(solver, K, targets, ridges, at_once), rows)
            state = solver.factor(K, ridges)
            solutions = solver.solve(state, targets, self.progress)
        return Solved(solutions, state.centres if choice.method == "nystrom" else rows)

    def enter_site(
        self, solver: Keeping, rows: np.ndarray, targets: np.ndarray, ridges: tuple[float, ...]
    ) -> Site | None:
        """Where a solve works, at an address of all that a ridge's solution depends on; None without a place.

        What was solved is found by a later start with an edited list of ridges as well.
        """
        if self.place is None:
            return None
        what = {"solver": repr(solver), "revision": self.revision}
        if solver.kept_by_list:
            what["ridges"] = repr(ridges)
        folder = self.place.root / SOLVES / solve_address(self.source, rows, targets, what)
        self.place.use(folder)
        site = self.sites.enter_context(
            Site(folder, self.place.workers, self.place.memory_bytes, self.progress)
        )
        self.site = self.site or site
        return site

    def _solve_kept(
        self,
        solver: solvers.Solver[Any],
        K: operators.GramOperator,
        targets: np.ndarray,
        ridges: Sequence[float],
        at_once: bool,
    ) -> tuple[Solution, ...]:
        """Solutions in memory: those that an earlier start kept, and the others.

        at_once: products serve all ridges, and their last digits depend on how many: where one is missing all are
        solved again.
        """
        kept = Checkpoints(None if K.site is None else K.site.folder)
        found = {ridge: solution for ridge in ridges if (solution := kept.load(ridge)) is not None}
        left = [ridge for ridge in ridges if ridge not in found]
        if left and at_once:
            left = list(ridges)
        if left:

            def passed(done: int, total: int, message: str) -> None:
                self.progress(len(ridges) - total + done, len(ridges), message)

            passed(0, len(left), RIDGES)  # a factor is made before the solver tells of any
            for solution in solver.solve(solver.factor(K, left), targets, passed):
                found[solution.ridge] = kept.told(solution)
                kept.save(solution)
        return tuple(found[ridge] for ridge in ridges)


def few_threads(small: bool) -> threadpool_limits:
    """A context in which linear algebra takes one thread where it is small.

    Threads of a small product spend their time waiting for each other, most of all on a busy machine.
    """
    return threadpool_limits(1 if small else None, user_api="blas")


SOLVES = "solves"
"""Folder under a root of what solves keep while they last."""


def train_targets(pools: Pools, rows: np.ndarray) -> evaluate.Targets:
    """The targets of training samples, checked.

    Raises:
        DataError: see ``evaluate.encode``.
    """
    labels = pools.train.labels
    named = pools.task == "classification" and labels is not None
    return evaluate.encode(pools.y(rows), pools.task, np.arange(len(labels or ())) if named else None)


def solve_address(source: TileSource, rows: np.ndarray, targets: np.ndarray, what: dict[str, Any]) -> str:
    """Names the folder of a solve by all that its solutions depend on."""
    parts = {"matrix": matrix_identity(source), "rows": hash_array(rows), "targets": hash_array(targets)}
    return digest({**parts, **what})[:24]


def matrix_identity(source: TileSource) -> Any:
    """What names the entries of a matrix or of features, stored or computed when they are read, as JSON."""
    if isinstance(source, Store):
        return [source.path.name, source.axes]
    if isinstance(source, RecomputedTiles):
        # A feature store's name is a digest of the preprocessing and of the kernel's revision as well.
        stores = [Path(source.rows).name, Path(source.columns).name]
        return [json.loads(source.kernel), stores, list(source.samples), source.dtype, source.side]
    if isinstance(source, StoredFeatures):
        return [Path(source.path).name, FeatureStore(Path(source.path)).axes, list(source.shape)]
    if isinstance(source, StreamedFeatures):
        return source.identity
    raise TypeError(f"nothing names the tiles of {type(source).__name__}")


def hash_array(values: np.ndarray) -> str:
    """A digest of an array's dtype, shape and bytes."""
    head = hashlib.sha256(f"{values.dtype.str} {values.shape}".encode())
    head.update(np.ascontiguousarray(values).data)
    return head.hexdigest()
