"""Ridge regression on the feature store SOURCE by one eigendecomposition, as a program to be killed (see
``solve_runs``); its steps are strips of the covariance."""

from __future__ import annotations

import solve_runs

RIDGES = (1e-1, 1e-3, 1e-5)


def solve(source, site, told):
    import numpy as np

    from pipelines.explicit import covariance
    from pipelines.explicit.featuresource import StoredFeatures
    from pipelines.solvers.primal import FeatureOperator, PrimalEigen

    covariance.STRIP, covariance.UNSAVED = 16, 2
    features = StoredFeatures.of(source)
    operator = FeatureOperator(features, np.arange(features.shape[0]), site)
    Y = np.random.default_rng(0).standard_normal((operator.n, 3))
    return [one.alpha for one in PrimalEigen(loo=True).solve(operator, RIDGES, Y)]


if __name__ == "__main__":
    solve_runs.serve(solve, "covariance")
