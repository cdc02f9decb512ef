"""Ridge regression on stored features, against the symmetric products (dsyrk) that their covariance consists of.

All in CPU seconds of one core, one BLAS thread. The covariance is summed from a feature store on the RAM disk, reading,
checking, converting, writing and adding up the sums of strips included; bare dsyrk multiplies one panel, in memory and
in float64 already, as often as there are panels. Eigenvectors are those of the same matrix by LAPACK alone.
"""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk
from workload import folder

from kernels.base import Prepared
from kernels.features.base import FEATURES
from pipelines import tasks
from pipelines.explicit.covariance import moments
from pipelines.explicit.feature_strips import PANEL
from pipelines.explicit.featuresource import StoredFeatures
from pipelines.site import Site
from pipelines.solvers.primal import FeatureOperator, PrimalCholesky, PrimalEigen, PrimalSolver
from pipelines.stores import Axis, FeatureStore

SIDE = 1024
TARGETS = 10
RIDGES = tuple(10.0**-k for k in range(8))
TARGET = 0.8
REPEATS = 3
MEMORY = 4 * 2**30


def main() -> None:
    options = common.options(__doc__)
    sizes = ((8_192, 1_024),) if options.quick else ((32_768, 2_048), (32_768, 4_096))
    report = common.Report("primal", "Ridge regression on explicit features, one core", options)
    for n, width in sizes:
        with folder(common.RAM_DISK) as root:
            source = stored(root, n, width)
            covariance(report, root, source)
            whole(report, root, source)
    report.finish()


def stored(root: Path, n: int, width: int) -> StoredFeatures:
    """Random features in float32."""
    rng = np.random.default_rng(0)
    axis = Axis(n, (), lambda k: ())
    store = None
    for block in range(n // SIDE):
        rows = np.arange(block * SIDE, (block + 1) * SIDE)
        made = Prepared({FEATURES: rng.standard_normal((SIDE, width), np.float32)}, rows, "")
        store = store or FeatureStore.open_or_create(root, {"pool": {}}, axis, made, SIDE)
        store.write_block(block, made)
    assert store is not None
    return StoredFeatures.of(store.path)


def covariance(report: common.Report, root: Path, source: StoredFeatures) -> None:
    n, width = source.shape
    panel = np.random.default_rng(1).standard_normal((PANEL, width))
    C = np.zeros((width, width), order="F")
    Y = np.random.default_rng(2).standard_normal((n, TARGETS))
    starts = iter(range(100))

    def bare() -> None:
        for _ in range(n // PANEL):
            dsyrk(1.0, panel.T, beta=1.0, c=C, overwrite_c=1)

    def ours() -> None:
        with Site(root / "solves" / str(next(starts)), tasks.Workers, MEMORY) as site:
            moments(source, np.arange(n), Y, site)

    runs = common.interleaved(
        {"bare": lambda: common.timed(bare), "ours": lambda: common.timed(ours)}, REPEATS
    )
    least, taken = common.best_cpu(runs["bare"]), common.best_cpu(runs["ours"])
    report.add(
        f"covariance of {n:,} x {width:,} features, CPU",
        f"{taken:.2f} s, {n * width**2 / taken / 1e9:.1f} GFLOP/s",
        target=f"{TARGET:.0%} of dsyrk, {n * width**2 / least / 1e9:.1f} GFLOP/s",
        ratio=f"{least / taken:.0%}",
        met=least / taken >= TARGET,
    )


def whole(report: common.Report, root: Path, source: StoredFeatures) -> None:
    n, width = source.shape
    Y = np.random.default_rng(2).standard_normal((n, TARGETS))
    half = np.random.default_rng(3).standard_normal((width, width))
    C = half @ half.T

    def solve(solver: PrimalSolver) -> common.Timed:
        with Site(root / "solves" / repr(solver), tasks.Workers, MEMORY) as site:
            operator = FeatureOperator(source, np.arange(n), site)
            return common.timed(lambda: solver.solve(operator, RIDGES, Y))

    vectors = common.timed(lambda: eigh(C, driver="evr", check_finite=False)).cpu
    path = f"whole path of {len(RIDGES)} ridges, {TARGETS} targets"
    report.add(f"{path}, a factor for each, CPU", f"{solve(PrimalCholesky()).cpu:.2f} s")
    for loo in (False, True):
        report.add(
            f"{path}, eigenvectors{', leave-one-out' if loo else ''}, CPU",
            f"{solve(PrimalEigen(loo=loo)).cpu:.2f} s, of which eigenvectors {vectors:.2f} s",
        )


if __name__ == "__main__":
    main()
