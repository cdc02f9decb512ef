"""Solve and evaluate on explicit features: as ``fit``, with weights of features for coefficients of samples."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from .. import solvers
from ..experiment import Experiment
from ..fit import SMALL, Fitting, Place, Solved, few_threads
from ..pools import Pools
from ..solvers.base import Progress, unwatched
from ..solvers.choose import IN_MEMORY
from ..solvers.primal import FeatureOperator
from ..tilesource import TileSource
from . import feature_products
from .featuresource import FeatureSource

REVISION = 7
"""Raised whenever a solve or an evaluation on features gives other numbers, so that stored results are not used
again."""


def fit(
    experiment: Experiment,
    pools: Pools,
    features: FeatureSource,
    cross: FeatureSource | None,
    folder: Path,
    *,
    choice: solvers.Choice,
    place: Place | None = None,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """Train, choose a ridge, score the test set once; returns the evaluation as ``pipelines.fit.fit``.

    features: of the pool. cross: of the test set, where the source has a test set of its own. folder: gets
    ``weights.npy`` (width, t) of the final model, ``rows.npy`` (n,) the pool rows that it was trained on, and
    ``test_scores.npy``. choice: of ``choose_primal``. place: where the solve keeps what it goes on from, and whose
    workers help; without one this process works alone and keeps nothing.

    Raises:
        ChunkLost: a block is missing or damaged; computing it again mends the store.
        NumericalError: the system cannot be solved at some ridge.
    """
    with contextlib.ExitStack() as sites:
        fitting = _FeatureFitting(experiment, pools, features, cross, folder, choice, place, progress, sites)
        return fitting.evaluation()


class _FeatureFitting(Fitting):
    """Weights of features: they belong to no rows, and predictions need no others than those asked for."""

    coefficients: ClassVar[str] = "weights"
    revision: ClassVar[int] = REVISION

    def solve(
        self,
        choice: solvers.Choice,
        rows: np.ndarray,
        targets: np.ndarray,
        ridges: tuple[float, ...],
        *,
        loo: bool,
    ) -> Solved:
        solver = solvers.build_primal(self.experiment.solve, choice, seed=self.experiment.seed, loo=loo)
        features = cast(FeatureSource, self.source)
        small = max(len(rows), features.shape[1]) < SMALL
        # Where features are many, a pass over them is worth sharing out however they are solved for.
        alone = small and choice.method in IN_MEMORY
        site = None if alone else self.enter_site(solver, rows, targets, ridges)
        with few_threads(small):
            operator = FeatureOperator(features, rows, site)
            return Solved(solver.solve(operator, ridges, targets, self.progress), rows)

    def predict(
        self, source: TileSource, rows: np.ndarray, columns: np.ndarray, alpha: np.ndarray
    ) -> np.ndarray:
        return feature_products.predict(cast(FeatureSource, source), rows, alpha, self.site)
