"""Kernel ridge regression on MNIST, one ridge, against scikit-learn's float64 KernelRidge.

Exponential kernel of unit vectors, which is scikit-learn's ``rbf``. Each run is a process of its own with
one BLAS thread and the same core type; imports and reading the data are not counted. Ours prepares
features, computes float32 tiles into stores on the disk, and solves in float64.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import common
import numpy as np

SIGMA = 0.6
RIDGE = 1e-4
CHECKED = 1000
CPU_ALLOWED = 0.8
MEMORY_ALLOWED = 1.3
MEMORY = 2 * 2**30


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("krr", "Kernel ridge regression against scikit-learn", options)
    sizes, repeats = ((2000,), 1) if options.quick else ((10_000,), 3)
    folder = os.environ.get("MEGAGRAM_DATA")
    report.note("MNIST" if folder else "random vectors of MNIST's shape (MEGAGRAM_DATA names no data)")
    for n in sizes:
        runs = common.interleaved(
            {
                "ours": lambda n=n: common.in_child(ours, n, folder),
                "theirs": lambda n=n: common.in_child(theirs, n, folder),
            },
            repeats,
        )
        mine, other = runs["ours"], runs["theirs"]
        ratio = common.median_ratio([r.cpu for r in mine], [r.cpu for r in other])
        report.add(
            f"n = {n:,}, CPU time, one thread",
            f"{common.best_cpu(mine):.1f} s against {common.best_cpu(other):.1f} s",
            target="at most 0.8 x",
            ratio=f"{ratio:.2f}",
            met=ratio <= CPU_ALLOWED,
        )
        matrix = n * n * 8
        for what, key in (("solve: growth of memory", "growth"), ("whole process: peak memory", "peak")):
            peak = max(run.value[key] for run in mine)
            report.add(
                f"n = {n:,}, {what}, against the float64 matrix",
                f"{common.megabytes(peak)} against {common.megabytes(matrix)}",
                target="at most 1.3 x",
                ratio=f"{peak / matrix:.2f}",
                met=peak <= MEMORY_ALLOWED * matrix,
            )
        peak = max(run.value["peak"] for run in other)
        report.add(
            f"n = {n:,}, scikit-learn: peak memory", common.megabytes(peak), ratio=f"{peak / matrix:.2f}"
        )
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in mine[0].value["stages"].items())
        difference = np.abs(mine[0].value["fitted"] - other[0].value["fitted"]).max()
        report.note(f"n = {n:,}: ours by CPU time: {stages}; median ratio of {repeats} neighbouring pairs")
        report.note(
            f"n = {n:,}: values at {CHECKED} training samples differ by at most {difference:.1e}"
            " (float32 tiles against float64)"
        )
    report.finish()


def samples(n: int, folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, 784) float32 unit vectors and (n,) labels."""
    if folder:
        from pipelines import datasets

        pool = datasets.load("mnist", data_dir=Path(folder)).train
        X, y = pool.X[:n].reshape(n, -1).astype(np.float32), pool.y[:n]
    else:
        rng = np.random.default_rng(0)
        X, y = rng.random((n, 784), dtype=np.float32), rng.integers(0, 10, n)
    return X / np.linalg.norm(X, axis=1, keepdims=True), y


def ours(n: int, folder: str | None) -> common.Timed:
    """Features, tiles, solve: one process, no cluster. Runs in a process of its own."""
    import workload
    from scipy import linalg  # noqa: F401  # what the solver loads when it first runs

    from pipelines import evaluate, memory
    from pipelines.operators import GramOperator
    from pipelines.solvers import Cholesky

    X, y = samples(n, folder)
    with workload.folder() as root:
        np.save(root / "X.npy", X)
        np.save(root / "y.npy", y)
        del X
        kernel = {**workload.EXPONENTIAL, "sigma": SIGMA}
        matrix = workload.Matrix.of(workload.experiment(root, n, kernel))
        targets = evaluate.encode(y, "classification").matrix
        features = common.timed(lambda: matrix.features(root, workload.here))
        tiles = common.timed(
            lambda: matrix.assemble(
                root, features.value, workload.here, tile_seconds=0.1, memory_bytes=MEMORY
            )
        )
        (store,) = matrix.stores(root)
        before = common.resident_bytes()
        peak = memory.peak_bytes()
        common.reset_peak()

        def solve() -> Any:
            solver = Cholesky()
            return solver.solve(solver.factor(GramOperator(store, np.arange(n)), (RIDGE,)), targets)

        solved = common.timed(solve)
        reached = memory.peak_bytes()
        (solution,) = solved.value
    stages = {"features": features.cpu, "tiles": tiles.cpu, "solve": solved.cpu}
    value = {
        "fitted": (targets - solution.shift * solution.alpha)[:CHECKED],
        "growth": reached - before,
        "peak": max(peak, reached),
        "stages": stages,
    }
    return common.Timed(sum(stage.wall for stage in (features, tiles, solved)), sum(stages.values()), value)


def theirs(n: int, folder: str | None) -> common.Timed:
    """scikit-learn's fit. Runs in a process of its own."""
    from sklearn.kernel_ridge import KernelRidge

    from pipelines import evaluate, memory

    X, y = samples(n, folder)
    X = X.astype(np.float64)
    targets = evaluate.encode(y, "classification").matrix
    model = KernelRidge(alpha=n * RIDGE, kernel="rbf", gamma=1 / (2 * SIGMA**2))
    run = common.timed(lambda: model.fit(X, targets))
    value = {
        "fitted": targets[:CHECKED] - n * RIDGE * model.dual_coef_[:CHECKED],
        "peak": memory.peak_bytes(),
    }
    return common.Timed(run.wall, run.cpu, value)


if __name__ == "__main__":
    main()
