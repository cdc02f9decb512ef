"""Solve and evaluate: kernel ridge regression on what the stores hold, for a whole path of ridges."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from . import evaluate, operators, results, solvers
from .experiment import Experiment
from .pools import Pools, fit_rows
from .solvers.base import Progress, unwatched
from .stores import GramStore

REVISION = 1
"""Raised whenever a solve or an evaluation gives other numbers, so that stored results are not used again."""

SMALL = 3000
"""Below so many training samples one BLAS thread solves as fast as several."""


def fit(
    experiment: Experiment,
    pools: Pools,
    gram: GramStore,
    cross: GramStore | None,
    folder: Path,
    *,
    method: str,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """Train, choose a ridge, score the test set once; returns the evaluation (see ``evaluate.evaluate``).

    gram: the pool's matrix. cross: test set against pool, where the source has a test set of its own.
    folder: gets ``alpha.npy`` (n, t) of the final model, ``rows.npy`` (n,) its pool rows and
    ``test_scores.npy``.

    Raises:
        ChunkLost: a tile is missing or damaged; computing it again mends the store.
        NumericalError: the system cannot be solved at some ridge.
    """
    split = pools.split
    solve = experiment.solve
    train = evaluate.encode(pools.y(split.train), pools.task, _classes(pools))
    validation = None
    if split.validation is not None:
        validation = evaluate.Held(
            pools.y(split.validation),
            partial(operators.predict, gram, split.validation, split.train),
        )

    final: dict[str, Any] = {"alpha": None, "rows": split.train}

    def test_on(rows: np.ndarray) -> evaluate.Held | None:
        test = split.test
        if test is None:
            return None
        source = gram if cross is None else cross

        def predict(alpha: np.ndarray) -> np.ndarray:
            scores = operators.predict(source, test, rows, alpha)
            if alpha.ndim == 2:
                final["scores"] = scores
            return scores

        return evaluate.Held(pools.y(test, test=not split.test_in_pool), predict)

    def refit(ridge: float) -> tuple[solvers.Solution, evaluate.Targets, evaluate.Held | None]:
        rows = fit_rows(split)
        targets = evaluate.encode(pools.y(rows), pools.task, _classes(pools))
        (solution,) = _solve(experiment, "cholesky", gram, rows, targets.matrix, (ridge,), loo=False)
        final["rows"], final["alpha"] = rows, solution.alpha
        return solution, targets, test_on(rows)

    loo = solve.select == "loo"
    progress(0, len(solve.ridges), solvers.base.RIDGES)
    solutions = _solve(
        experiment, method, gram, split.train, train.matrix, solve.ridges, loo=loo, progress=progress
    )
    evaluation = evaluate.evaluate(
        solutions,
        train,
        solve.select,
        validation=validation,
        test=test_on(split.train),
        refit=refit if solve.refit else None,
    )
    if final["alpha"] is None:
        # Not trained again: the model is the chosen ridge's.
        final["alpha"] = next(s.alpha for s in solutions if s.ridge == evaluation["ridge"])
    results.save_array(folder, "alpha", final["alpha"])
    results.save_array(folder, "rows", final["rows"])
    if "scores" in final:
        results.save_array(folder, "test_scores", final["scores"])
    return evaluation


def _solve(
    experiment: Experiment,
    method: str,
    gram: GramStore,
    rows: np.ndarray,
    targets: np.ndarray,
    ridges: tuple[float, ...],
    *,
    loo: bool,
    progress: Progress = unwatched,
) -> tuple[solvers.Solution, ...]:
    solve = experiment.solve
    solver, _ = solvers.choose(
        method,
        n=len(rows),
        ridges=ridges,
        loo=loo,
        dtype=solve.dtype,
        memory_bytes=sys.maxsize,  # the plan has accepted this method
        jitter=solve.jitter,
        absolute=solve.absolute,
    )
    # Threads of a small product spend their time waiting for each other, most of all on a busy machine.
    with threadpool_limits(1 if len(rows) < SMALL else None, user_api="blas"):
        state = solver.factor(operators.GramOperator(gram, rows), ridges)
        return solver.solve(state, targets, progress)  # type: ignore[arg-type]


def _classes(pools: Pools) -> np.ndarray | None:
    """Class ids that the pool's labels name."""
    labels = pools.train.labels
    return None if pools.task != "classification" or labels is None else np.arange(len(labels))
