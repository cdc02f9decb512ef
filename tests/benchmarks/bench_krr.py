"""Kernel ridge regression on MNIST, one ridge, against scikit-learn's float64 KernelRidge.

Exponential kernel of unit vectors, which is scikit-learn's ``rbf``. Each run is a process of its own with
one BLAS thread and the same core type; imports and reading the data are not counted. Ours prepares
features, computes float32 tiles into stores on the disk, and solves: with a float64 factor, or with a
float32 factor whose solution is refined until its float64 residual on the stored matrix is below 1e-8.
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
WARM = 300
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
        compare(report, n, folder, repeats)
    report.finish()


def compare(report: common.Report, n: int, folder: str | None, repeats: int) -> None:
    runs = common.interleaved(
        {
            "float64": lambda: common.in_child(ours, n, folder, "float64"),
            "float32": lambda: common.in_child(ours, n, folder, "float32"),
            "theirs": lambda: common.in_child(theirs, n, folder),
            "potrf": lambda: common.in_child(factor_alone, n),
        },
        repeats,
    )
    theirs_cpu = [run.cpu for run in runs["theirs"]]
    matrix = n * n * 8

    def row(what: str, cpu: list[float], target: bool = True) -> None:
        ratio = common.median_ratio(cpu, theirs_cpu)
        report.add(
            f"n = {n:,}, {what}: CPU time",
            f"{min(cpu):.1f} s against {min(theirs_cpu):.1f} s",
            target="at most 0.8 x" if target else "",
            ratio=f"{ratio:.2f}",
            met=ratio <= CPU_ALLOWED if target else None,
        )

    for dtype in ("float64", "float32"):
        mine = runs[dtype]
        row(f"{dtype} factor", [run.cpu for run in mine])
        for what, key in (("solve's memory", "growth"), ("whole process's memory", "peak")):
            peak = max(run.value[key] for run in mine)
            report.add(
                f"n = {n:,}, {dtype} factor: {what} against the float64 matrix",
                f"{common.megabytes(peak)} against {common.megabytes(matrix)}",
                target="at most 1.3 x",
                ratio=f"{peak / matrix:.2f}",
                met=peak <= MEMORY_ALLOWED * matrix,
            )
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in mine[0].value["stages"].items())
        difference = np.abs(mine[0].value["fitted"] - runs["theirs"][0].value["fitted"]).max()
        residual = mine[0].value["residual"]
        report.note(
            f"n = {n:,}, {dtype} factor: {stages}; residual {residual:.0e}; values at {CHECKED} training"
            f" samples differ from scikit-learn's by at most {difference:.0e}"
        )
    row("LAPACK's float64 factorisation alone", [run.cpu for run in runs["potrf"]], target=False)
    peak = max(run.value["peak"] for run in runs["theirs"])
    report.add(f"n = {n:,}, scikit-learn: peak memory", common.megabytes(peak), ratio=f"{peak / matrix:.2f}")
    report.note(f"median CPU ratio of {repeats} neighbouring runs")


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


def ours(n: int, folder: str | None, dtype: str) -> common.Timed:
    """Features, tiles, solve: one process, no cluster. Runs in a process of its own."""
    fit_ours(WARM, None, dtype)  # loads what is imported at first use
    return fit_ours(n, folder, dtype)


def fit_ours(n: int, folder: str | None, dtype: str) -> common.Timed:
    import workload

    from pipelines import evaluate, gram, memory
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
        gram.forget()  # as a run does before it solves
        (store,) = matrix.stores(root)
        before = common.resident_bytes()
        peak = memory.peak_bytes()
        common.reset_peak()

        def solve() -> Any:
            solver = Cholesky(dtype)
            return solver.solve(solver.factor(GramOperator(store, np.arange(n)), (RIDGE,)), targets)

        solved = common.timed(solve)
        reached = memory.peak_bytes()
        (solution,) = solved.value
    stages = {"features": features.cpu, "tiles": tiles.cpu, "solve": solved.cpu}
    value = {
        "fitted": (targets - solution.shift * solution.alpha)[:CHECKED],
        "growth": reached - before,
        "peak": max(peak, reached),
        "residual": solution.residual,
        "stages": stages,
    }
    return common.Timed(sum(stage.wall for stage in (features, tiles, solved)), sum(stages.values()), value)


def theirs(n: int, folder: str | None) -> common.Timed:
    """scikit-learn's fit. Runs in a process of its own."""
    fit_theirs(WARM, None)
    return fit_theirs(n, folder)


def fit_theirs(n: int, folder: str | None) -> common.Timed:
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


def factor_alone(n: int) -> common.Timed:
    """What no direct solver can go below: Cholesky in place of a matrix that is there. A process of its own."""
    from scipy.linalg.lapack import dpotrf

    matrix = np.full((n, n), 0.5, order="F")
    np.einsum("ii->i", matrix)[:] = n
    return common.timed(lambda: dpotrf(matrix, lower=1, clean=0, overwrite_a=1)[1])


if __name__ == "__main__":
    main()
